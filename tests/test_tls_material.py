"""TLS contexts, what is wrong with the files they are made from, and the channel binding."""

from __future__ import annotations

import base64
import datetime
import hashlib
import ssl
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from conduit.descriptors import TLS
from conduit.transport.tls import (
    ALPN,
    client_context,
    end_point_hash,
    peer_end_point,
    server_context,
    server_end_point,
)

KEY_PASSWORD = SecretStr("open sesame")


class Material(NamedTuple):
    """Paths of what the tests use. `pair` is a chain and its key in one file."""

    ca: Path
    other_ca: Path
    chain: Path
    key: Path
    locked_key: Path
    pair: Path
    other_key: Path
    rsa_key: Path
    client: Path


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("tls")
    made = Material(*(folder / f"{name}.pem" for name in Material._fields))
    ca, other_ca = trustme.CA(), trustme.CA()
    # An intermediate, so that the file of the server holds more than one certificate.
    server = ca.create_child_ca().issue_cert("localhost")
    ca.cert_pem.write_to_path(str(made.ca))
    other_ca.cert_pem.write_to_path(str(made.other_ca))
    made.chain.write_bytes(b"".join(blob.bytes() for blob in server.cert_chain_pems))
    server.private_key_pem.write_to_path(str(made.key))
    server.private_key_and_cert_chain_pem.write_to_path(str(made.pair))
    other_ca.issue_cert("localhost").private_key_pem.write_to_path(str(made.other_key))
    ca.issue_cert("someone").private_key_and_cert_chain_pem.write_to_path(str(made.client))
    key = serialization.load_pem_private_key(made.key.read_bytes(), None)
    made.locked_key.write_bytes(private_pem(key, KEY_PASSWORD.get_secret_value()))
    made.rsa_key.write_bytes(private_pem(rsa_key()))
    return made


def private_pem(key: PrivateKeyTypes, password: str | None = None) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption()
        if password is None
        else serialization.BestAvailableEncryption(password.encode()),
    )


def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def self_signed(key, algorithm, **options) -> bytes:
    """A certificate in DER form."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    start = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=36500))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, algorithm, **options)
    )
    return certificate.public_bytes(serialization.Encoding.DER)


def shake_hands(
    client: ssl.SSLContext, server: ssl.SSLContext, host: str = "localhost"
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Connect two contexts in memory; raise what either side raises."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    connecting = client.wrap_bio(back, there, server_hostname=host)
    accepting = server.wrap_bio(there, back, server_side=True)
    waiting = [connecting, accepting]
    for _ in range(10):
        for side in list(waiting):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(side)
        if not waiting:
            return connecting, accepting
    raise AssertionError("the handshake does not end")


# --- contexts ---------------------------------------------------------------------------------


def test_handshake(material):
    server = server_context(TLS(certificate=material.chain, key=material.key))
    client = client_context(TLS(ca=material.ca))
    connecting, accepting = shake_hands(client, server)
    assert connecting.selected_alpn_protocol() == accepting.selected_alpn_protocol() == ALPN
    assert connecting.version() == "TLSv1.3"
    assert accepting.getpeercert(True) is None
    assert client.verify_mode is ssl.CERT_REQUIRED
    assert client.check_hostname
    assert server.verify_mode is ssl.CERT_NONE


def test_paths_may_be_strings_and_one_file_may_hold_both(material):
    server = server_context(TLS.model_validate({"certificate": str(material.pair)}))
    shake_hands(client_context(TLS.model_validate({"ca": str(material.ca)})), server)


def test_key_password(material):
    server = server_context(
        TLS(certificate=material.chain, key=material.locked_key, key_password=KEY_PASSWORD)
    )
    shake_hands(client_context(TLS(ca=material.ca)), server)


def test_tls_1_2_is_accepted_and_1_1_is_not(material):
    tls = TLS(certificate=material.chain, key=material.key, ca=material.ca)
    for context in (server_context(tls), client_context(tls)):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    client = client_context(TLS(ca=material.ca))
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    connecting, _ = shake_hands(client, server_context(TLS(certificate=material.pair)))
    assert connecting.version() == "TLSv1.2"


def test_the_certificate_is_checked(material):
    server = server_context(TLS(certificate=material.pair))
    for tls, host, error in (
        (TLS(ca=material.other_ca), "localhost", "self.signed|unable to get"),
        (TLS(), "localhost", "self.signed|unable to get"),
        (TLS(ca=material.ca), "example.org", "[Hh]ostname mismatch"),
    ):
        with pytest.raises(ssl.SSLCertVerificationError, match=error):
            shake_hands(client_context(tls), server, host)


def test_verify_false_checks_neither_signer_nor_name(material):
    server = server_context(TLS(certificate=material.pair))
    for ca in (None, material.other_ca):
        client = client_context(TLS(verify=False, ca=ca))
        connecting, _ = shake_hands(client, server, "example.org")
        assert peer_end_point(connecting) == server_end_point(TLS(certificate=material.pair))


def test_system_roots_are_used_only_without_ca(material, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        ssl.SSLContext, "load_default_certs", lambda self, purpose: loaded.append(purpose)
    )
    client_context(TLS(ca=material.ca))
    assert loaded == []
    client_context(TLS())
    assert loaded == [ssl.Purpose.SERVER_AUTH]


def test_mutual_tls(material):
    server = server_context(TLS(certificate=material.pair, ca=material.ca))
    assert server.verify_mode is ssl.CERT_REQUIRED
    _, accepting = shake_hands(
        client_context(TLS(ca=material.ca, certificate=material.client)), server
    )
    assert accepting.getpeercert()
    with pytest.raises(
        ssl.SSLError, match="did not return a certificate|(?i:certificate required)"
    ):
        shake_hands(client_context(TLS(ca=material.ca)), server)
    stranger = server_context(TLS(certificate=material.pair, ca=material.other_ca))
    with pytest.raises(ssl.SSLError, match="certificate"):
        shake_hands(client_context(TLS(ca=material.ca, certificate=material.client)), stranger)


def test_verify_false_does_not_open_a_server_that_wants_certificates(material):
    server = server_context(TLS(certificate=material.pair, ca=material.ca, verify=False))
    assert server.verify_mode is ssl.CERT_REQUIRED


def test_a_context_of_the_user_is_left_alone():
    for side, protocol in (
        (server_context, ssl.PROTOCOL_TLS_SERVER),
        (client_context, ssl.PROTOCOL_TLS_CLIENT),
    ):
        context = ssl.SSLContext(protocol)
        before = (context.options, context.verify_mode, context.minimum_version)
        assert side(context) is context
        assert (context.options, context.verify_mode, context.minimum_version) == before


def test_a_context_without_alpn_is_understood(material):
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.load_cert_chain(material.pair)
    connecting, _ = shake_hands(client_context(TLS(ca=material.ca)), server_context(own))
    assert connecting.selected_alpn_protocol() is None


# --- files that are missing or wrong ----------------------------------------------------------


def test_a_server_needs_a_certificate(material):
    for build in (server_context, server_end_point):
        with pytest.raises(ValueError, match="tls on a server needs a certificate"):
            build(TLS(ca=material.ca))


def test_a_client_key_needs_a_certificate(material):
    with pytest.raises(ValueError, match=r"tls key .*key\.pem is of no use without a certificate"):
        client_context(TLS(key=material.key))


@pytest.mark.parametrize("side", [server_context, client_context])
@pytest.mark.parametrize("field", ["certificate", "key", "ca"])
@pytest.mark.parametrize(
    ("kind", "error"), [("missing", FileNotFoundError), ("folder", IsADirectoryError)]
)
def test_a_file_that_cannot_be_read(material, tmp_path, side, field, kind, error):
    path = tmp_path / "missing.pem" if kind == "missing" else tmp_path
    files = {"certificate": material.chain, "key": material.key, "ca": material.ca, field: path}
    with pytest.raises(error, match=f"tls {field} cannot be read") as caught:
        side(TLS(**files))
    assert caught.value.filename == str(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("side", [server_context, client_context])
@pytest.mark.parametrize("content", [b"", b"hello", b"\xff\0\xfe"])
def test_files_that_hold_something_else(material, tmp_path, side, content):
    path = tmp_path / "file.pem"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"tls certificate .*file\.pem holds no certificate in PEM"
    ):
        side(TLS(certificate=path, key=material.key))
    with pytest.raises(ssl.SSLError, match=r"tls key .*file\.pem holds no private key in PEM"):
        side(TLS(certificate=material.chain, key=path))
    with pytest.raises(ssl.SSLError, match=r"tls ca .*file\.pem holds no usable certificate"):
        side(TLS(certificate=material.chain, key=material.key, ca=path))


def test_a_certificate_without_its_key(material):
    with pytest.raises(ssl.SSLError, match=r"tls key .*chain\.pem holds no private key in PEM"):
        server_context(TLS(certificate=material.chain))


def pem(der: bytes) -> bytes:
    body = base64.encodebytes(der)
    return b"-----BEGIN CERTIFICATE-----\n" + body + b"-----END CERTIFICATE-----\n"


def test_a_damaged_certificate(material, tmp_path):
    path = tmp_path / "file.pem"
    for content in (
        pem(b"0\0"),
        pem(b""),
        pem(b"hello"),
        material.chain.read_bytes().replace(b"\n", b"\nA", 1),
    ):
        path.write_bytes(content)
        for build in (server_context, server_end_point):
            with pytest.raises(ValueError, match=r"tls certificate .*file\.pem is damaged"):
                build(TLS(certificate=path, key=material.key))


def test_a_certificate_that_openssl_refuses(tmp_path):
    key = rsa.generate_private_key(65537, 1024)
    path = tmp_path / "weak.pem"
    path.write_bytes(pem(self_signed(key, hashes.SHA256())) + private_pem(key))
    with pytest.raises(ssl.SSLError, match=r"weak\.pem cannot be used: ee key too small"):
        server_context(TLS(certificate=path))


def test_a_key_of_another_certificate(material):
    for key in (material.other_key, material.rsa_key):
        with pytest.raises(ssl.SSLError) as caught:
            server_context(TLS(certificate=material.chain, key=key))
        assert str(caught.value) == (
            f"tls key {key} does not belong to the certificate {material.chain}"
        )


def test_a_wrong_key_password(material):
    wrong = SecretStr("wrong")
    tls = TLS(certificate=material.chain, key=material.locked_key, key_password=wrong)
    with pytest.raises(ssl.SSLError) as caught:
        server_context(tls)
    assert str(caught.value) == f"key_password does not open the tls key {material.locked_key}"


def test_a_locked_key_without_password_does_not_ask_on_the_terminal(material):
    with pytest.raises(ValueError, match=r"locked_key\.pem is encrypted, and key_password is not"):
        server_context(TLS(certificate=material.chain, key=material.locked_key))


# --- channel binding --------------------------------------------------------------------------


SHA: dict[int, hashes.HashAlgorithm] = {
    224: hashes.SHA224(),
    256: hashes.SHA256(),
    384: hashes.SHA384(),
    512: hashes.SHA512(),
}
CURVE = ec.SECP256R1()


@pytest.fixture(scope="module")
def keys():
    return {
        "rsa": rsa_key(),
        "ecdsa": ec.generate_private_key(CURVE),
        "ed25519": ed25519.Ed25519PrivateKey.generate(),
        "ed448": ed448.Ed448PrivateKey.generate(),
    }


@pytest.mark.parametrize("kind", ["rsa", "ecdsa", "pss"])
@pytest.mark.parametrize("size", SHA)
def test_the_hash_is_the_one_of_the_signature(keys, kind, size):
    options = {}
    if kind == "pss":
        scheme = padding.PSS(padding.MGF1(SHA[size]), padding.PSS.DIGEST_LENGTH)
        options["rsa_padding"] = scheme
    certificate = self_signed(keys["rsa" if kind == "pss" else kind], SHA[size], **options)
    assert end_point_hash(certificate) == hashlib.new(f"sha{size}", certificate).digest()


@pytest.mark.parametrize("kind", ["ed25519", "ed448"])
def test_a_signature_without_a_hash_counts_as_sha_256(keys, kind):
    certificate = self_signed(keys[kind], None)
    assert end_point_hash(certificate) == hashlib.sha256(certificate).digest()


SHA256_RSA = bytes.fromhex("06092a864886f70d01010b")


@pytest.mark.parametrize(
    "identifier",
    [
        "06092a864886f70d010104",  # md5WithRSAEncryption
        "06092a864886f70d010105",  # sha1WithRSAEncryption
        "06092a864886f70d010163",  # nothing that is known
    ],
)
def test_md5_sha_1_and_unknown_count_as_sha_256(keys, identifier):
    # Nobody signs with MD5 any more, but the name of the algorithm is all that is read.
    certificate = self_signed(keys["rsa"], hashes.SHA256())
    assert certificate.count(SHA256_RSA) == 2
    certificate = certificate.replace(SHA256_RSA, bytes.fromhex(identifier))
    assert end_point_hash(certificate) == hashlib.sha256(certificate).digest()


def der(tag: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    assert len(content) < 128
    return bytes([tag, len(content)]) + content


def pss_certificate(*parameters: bytes) -> bytes:
    """The least that has the shape of a certificate."""
    algorithm = der(0x30, der(6, bytes.fromhex("2a864886f70d01010a")), *parameters)
    return der(0x30, der(0x30), algorithm, der(3, b"\0"))


def test_pss_without_a_named_hash_is_sha_1_and_counts_as_sha_256():
    for parameters in (der(0x30), der(0x30, der(0xA2, der(2, b"\x20")))):
        certificate = pss_certificate(parameters)
        assert end_point_hash(certificate) == hashlib.sha256(certificate).digest()
    sha384 = der(6, bytes.fromhex("608648016503040202"))
    certificate = pss_certificate(der(0x30, der(0xA0, der(0x30, sha384))))
    assert end_point_hash(certificate) == hashlib.sha384(certificate).digest()


@pytest.mark.parametrize(
    "certificate",
    [
        pss_certificate(),
        pss_certificate(der(5)),
        pss_certificate(der(0x30, b"\xa0")),
        pss_certificate(der(0x30, der(0xA0))),
        pss_certificate(der(0x30, der(0xA0, der(0x30)))),
        pss_certificate(der(0x30, der(0xA0, der(0x30, der(5))))),
        der(0x30),
        der(0x30, der(0x30)),
        der(0x30, der(0x30), der(0x30)),
        der(0x30, der(0x30), der(5)),
        der(0x30, der(0x30), der(0x30, der(5))),
        der(0x30, der(5), der(0x30)),
        der(0x31, der(0x30), der(0x30)),
        b"\x30\x84\xff\xff\xff\xff",
        b"\x30\x82\x01",
        b"-----BEGIN CERTIFICATE-----",
    ],
)
def test_what_is_no_certificate(certificate):
    with pytest.raises(ValueError, match="certificate"):
        end_point_hash(certificate)


@pytest.mark.parametrize("length", [b"\x80", b"\x85\0\0\0\0\x11", b"\xff"])
def test_lengths_that_are_not_der(length):
    """The first one is the indefinite length of BER, which ends with two zero bytes."""
    content = pss_certificate(der(0x30))[2:]
    assert end_point_hash(b"\x30\x84\0\0\0" + bytes([len(content)]) + content)
    with pytest.raises(ValueError, match="with the length byte"):
        end_point_hash(b"\x30" + length + content)


def test_a_certificate_that_is_cut_anywhere_or_too_long(keys):
    for certificate in (
        self_signed(keys["rsa"], hashes.SHA256()),
        self_signed(keys["ecdsa"], hashes.SHA384()),
        pss_certificate(der(0x30)),
    ):
        end_point_hash(certificate)
        for size in range(len(certificate)):
            with pytest.raises(ValueError, match="certificate"):
                end_point_hash(certificate[:size])
        with pytest.raises(ValueError, match="followed by 1 bytes"):
            end_point_hash(certificate + b"\0")


@given(st.binary() | st.binary().map(lambda rest: b"0" + bytes([len(rest) % 128]) + rest))
def test_any_bytes_hash_or_raise_value_error(data):
    try:
        assert len(end_point_hash(data)) in (28, 32, 48, 64)
    except ValueError:
        pass


@given(st.data())
def test_any_changed_byte_hashes_or_raises_value_error(data):
    original = pss_certificate(der(0x30, der(0xA0, der(0x30, der(6, bytes(9))))))
    changed = bytearray(original)
    changed[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    try:
        end_point_hash(bytes(changed))
    except ValueError:
        pass


@pytest.mark.parametrize("maximum", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("kind", ["rsa", "ecdsa", "ed25519"])
def test_both_sides_find_the_same_binding(keys, tmp_path, kind, maximum):
    path = tmp_path / "server.pem"
    algorithm = None if kind == "ed25519" else hashes.SHA384()
    certificate = self_signed(keys[kind], algorithm)
    # What stands before the certificate, and more certificates, change nothing.
    path.write_bytes(
        b"Subject: CN = localhost \xfc\n"
        + private_pem(keys[kind])
        + pem(certificate)
        + pem(self_signed(keys["ecdsa"], hashes.SHA512()))
    )
    tls = TLS(certificate=path)
    client = client_context(TLS(verify=False))
    client.maximum_version = maximum
    connecting, accepting = shake_hands(client, server_context(tls))
    assert peer_end_point(connecting) == server_end_point(tls) == end_point_hash(certificate)
    assert peer_end_point(accepting) is None


def test_the_first_certificate_of_a_chain_counts(material):
    tls = TLS(certificate=material.chain, key=material.key)
    connecting, _ = shake_hands(client_context(TLS(ca=material.ca)), server_context(tls))
    assert material.chain.read_bytes().count(b"BEGIN CERTIFICATE") > 1
    assert peer_end_point(connecting) == server_end_point(tls)


def test_no_binding_is_offered_when_it_is_off_or_unknown(material):
    assert server_end_point(TLS(certificate=material.pair, channel_binding=False)) is None
    assert server_end_point(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)) is None


def test_the_binding_needs_a_handshake(material):
    side = client_context(TLS(ca=material.ca)).wrap_bio(
        ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="localhost"
    )
    with pytest.raises(ValueError, match="handshake"):
        peer_end_point(side)
