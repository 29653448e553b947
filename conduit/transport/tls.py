"""TLS: contexts from the `TLS` settings, and the value that binds a login to its channel.

An `ssl.SSLContext` of the user is used as it is. conduit does not set ALPN on it, and no peer
demands ALPN: the first four bytes of the wire say what it is. A server with such a context offers
no channel binding either, because a context does not tell which certificate it shows.

The binding is `tls-server-end-point` (RFC 5929 section 4): a hash of the server's certificate. The
server takes it from its own file, the client from the handshake, and the login fails if the two
differ because somebody with another certificate is in between. It is the only type that Python
offers for TLS 1.3.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

from ..descriptors import TLS, reveal

__all__ = [
    "ALPN",
    "Shown",
    "client_context",
    "end_point_hash",
    "peer_end_point",
    "peer_names",
    "server_context",
    "server_end_point",
    "shown_by",
]

ALPN: Final = "cndt/1"

_NAMES = ("DNS", "URI", "email")

_PEM = re.compile(b"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", re.DOTALL)

_SEQUENCE, _OBJECT_IDENTIFIER, _EXPLICIT_0 = 0x30, 0x06, 0xA0
_RSASSA_PSS = bytes.fromhex("2a864886f70d01010a")  # names its hash in its parameters
# Object identifier -> hash, where it is not SHA-256: RSA, ECDSA, DSA, then the hashes themselves.
_HASHES = {
    bytes.fromhex(prefix + last): name
    for prefix, codes in (
        ("2a864886f70d0101", ("0e", "0c", "0d")),
        ("2a8648ce3d0403", ("01", "03", "04")),
        ("6086480165030403", ("01", "03", "04")),
        ("6086480165030402", ("04", "02", "03")),
    )
    for last, name in zip(codes, ("sha224", "sha384", "sha512"), strict=True)
}


class Shown(NamedTuple):
    """What a server shows to those who connect.

    The two belong together: a login that is bound to another certificate than the one that its
    client has seen is refused.

    Attributes:
        context: For the handshake.
        end_point: The channel binding, or None if there is none.
    """

    context: ssl.SSLContext
    end_point: bytes | None


def shown_by(tls: TLS | ssl.SSLContext) -> Shown:
    """Read the files of a server.

    Raises:
        OSError, ssl.SSLError, ValueError: As `server_context`; ValueError also when the certificate
            was replaced meanwhile.
    """
    end_point = server_end_point(tls)
    context = server_context(tls)
    if server_end_point(tls) != end_point:
        raise ValueError("the tls certificate was replaced while it was read; read it again")
    return Shown(context, end_point)


def server_context(tls: TLS | ssl.SSLContext) -> ssl.SSLContext:
    """Make the context of a listener: TLS 1.2 or newer, ALPN `cndt/1`.

    With `ca`, clients must show a certificate that it signed.

    Raises:
        OSError: A file cannot be read; the error names it.
        ssl.SSLError: A key does not fit its certificate or `key_password`, or OpenSSL refuses
            what a file holds.
        ValueError: There is no certificate, or its file holds something else.
    """
    if isinstance(tls, ssl.SSLContext):
        return tls
    certificate = _required_certificate(tls)
    context = _context(ssl.Purpose.CLIENT_AUTH, tls.ca)
    if tls.ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    _load_identity(context, certificate, tls)
    return context


def client_context(tls: TLS | ssl.SSLContext) -> ssl.SSLContext:
    """Make the context of an outgoing connection: TLS 1.2 or newer, ALPN `cndt/1`.

    The server's certificate must be signed by `ca`, or by a root that the system trusts if there
    is no `ca`, and carry the name of the host. `verify=False` turns both checks off.

    Raises:
        OSError: A file cannot be read; the error names it.
        ssl.SSLError: A key does not fit its certificate or `key_password`, or OpenSSL refuses
            what a file holds.
        ValueError: There is a key without a certificate, or a file holds something else.
    """
    if isinstance(tls, ssl.SSLContext):
        return tls
    context = _context(ssl.Purpose.SERVER_AUTH, tls.ca)
    if not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if tls.certificate is not None:
        _load_identity(context, tls.certificate, tls)
    elif tls.key is not None:
        raise ValueError(f"tls key {tls.key} is of no use without a certificate")
    return context


def server_end_point(tls: TLS | ssl.SSLContext) -> bytes | None:
    """Return the channel binding of a server, or None if it does not offer one.

    It is made from the first certificate of the file, which is the one that OpenSSL shows. None
    means that the context is the user's own or that `channel_binding` is off.

    Raises:
        OSError: The certificate cannot be read; the error names it.
        ValueError: There is no certificate, or its file holds something else.
    """
    if isinstance(tls, ssl.SSLContext) or not tls.channel_binding:
        return None
    return _read_end_point(_required_certificate(tls))


def peer_end_point(ssl_object: ssl.SSLObject | ssl.SSLSocket) -> bytes | None:
    """Return the channel binding that a client sees, or None if the peer showed no certificate.

    It does not matter whether the certificate was verified.

    Raises:
        ValueError: The handshake is not done.
    """
    certificate = ssl_object.getpeercert(True)
    return None if certificate is None else end_point_hash(certificate)


def peer_names(ssl_object: ssl.SSLObject | ssl.SSLSocket) -> frozenset[str]:
    """Return what the verified certificate of a peer calls it; nothing if there is none.

    These are the DNS names, URIs and mail addresses of its subjectAltName. Only a certificate
    without that extension has the common name of its subject, which authorities check less.
    """
    # Empty for one that was not verified.
    certificate: Mapping[str, Any] = cast("Any", ssl_object.getpeercert()) or {}
    if "subjectAltName" in certificate:
        names = [name for kind, name in certificate["subjectAltName"] if kind in _NAMES]
    else:
        subject = itertools.chain.from_iterable(certificate.get("subject", ()))
        names = [name for kind, name in subject if kind == "commonName"]
    return frozenset(name for name in names if name.isprintable() and 0 < len(name.encode()) <= 128)


def end_point_hash(certificate: bytes) -> bytes:
    """Return the `tls-server-end-point` of a certificate in DER form (RFC 5929 section 4.1).

    The hash is the one of the certificate's own signature, but SHA-256 in place of MD5 and SHA-1.
    For a signature without one hash, such as Ed25519, the RFC says nothing; that is SHA-256 too.

    Raises:
        ValueError: This is not a certificate.
    """
    # Certificate ::= SEQUENCE { tbsCertificate, signatureAlgorithm, signatureValue }
    content, rest = _element(certificate, _SEQUENCE)
    if rest:
        raise ValueError(f"certificate is followed by {len(rest)} bytes")
    _, rest = _element(content, _SEQUENCE)
    algorithm, rest = _element(rest, _SEQUENCE)
    identifier, parameters = _element(algorithm, _OBJECT_IDENTIFIER)
    if identifier == _RSASSA_PSS:
        identifier = _pss_hash(parameters)
    return hashlib.new(_HASHES.get(identifier, "sha256"), certificate).digest()


def _pss_hash(parameters: bytes) -> bytes:
    # RSASSA-PSS-params ::= SEQUENCE { [0] hashAlgorithm DEFAULT sha1, ... } (RFC 4055 section 3.1)
    content, _ = _element(parameters, _SEQUENCE)
    if content[:1] != bytes([_EXPLICIT_0]):
        return b""
    algorithm, _ = _element(_element(content, _EXPLICIT_0)[0], _SEQUENCE)
    return _element(algorithm, _OBJECT_IDENTIFIER)[0]


def _element(data: bytes, expected: int) -> tuple[bytes, bytes]:
    """Split off the first DER element (X.690): its content, and what follows it."""
    if len(data) < 2:
        raise ValueError("certificate ends within an element")
    tag, size, start = data[0], data[1], 2
    if tag != expected:
        raise ValueError(f"certificate has an element of type {tag:#04x}, not {expected:#04x}")
    if size >= 0x80:  # the long form: so many bytes of length follow; none at all is not DER
        start += size & 0x7F
        if not 2 < start <= 6:
            raise ValueError(f"certificate has an element with the length byte {size:#04x}")
        size = int.from_bytes(data[2:start], "big")
    end = start + size
    if end > len(data):
        raise ValueError("certificate ends within an element")
    return data[start:end], data[end:]


def _required_certificate(tls: TLS) -> Path | str:
    if tls.certificate is None:
        raise ValueError("tls on a server needs a certificate")
    return tls.certificate


def _context(purpose: ssl.Purpose, ca: Path | str | None) -> ssl.SSLContext:
    if ca is None:
        context = ssl.create_default_context(purpose)
    else:
        _read(ca, "ca")
        try:
            context = ssl.create_default_context(purpose, cafile=ca)
        except ssl.SSLError as exc:
            message = f"tls ca {ca} holds no usable certificate in PEM form"
            raise ssl.SSLError(exc.errno, message) from exc
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols([ALPN])
    return context


def _load_identity(context: ssl.SSLContext, certificate: Path | str, tls: TLS) -> None:
    """Load certificate and key. OpenSSL's errors name neither file nor cause: find both out."""
    _read_end_point(certificate)
    key = certificate if tls.key is None else tls.key
    _read(key, "key")
    password_used = False

    def password() -> str:
        # Always set, because without it OpenSSL asks on the terminal.
        nonlocal password_used
        password_used = True
        if tls.key_password is None:
            raise ValueError(f"tls key {key} is encrypted, and key_password is not set")
        return reveal(tls.key_password)

    try:
        context.load_cert_chain(certificate, key, password)
    except ssl.SSLError as exc:
        # The second one is what a key of another type than the certificate's leads to.
        if exc.reason in ("KEY_VALUES_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
            message = f"tls key {key} does not belong to the certificate {certificate}"
        elif password_used:
            message = f"key_password does not open the tls key {key}"
        elif exc.reason:
            reason = exc.reason.replace("_", " ").lower()
            message = f"tls certificate {certificate} cannot be used: {reason}"
        else:
            message = f"tls key {key} holds no private key in PEM form"
        raise ssl.SSLError(exc.errno, message) from exc


def _read_end_point(certificate: Path | str) -> bytes:
    match = _PEM.search(_read(certificate, "certificate"))
    if match is None:
        raise ValueError(f"tls certificate {certificate} holds no certificate in PEM form")
    try:
        return end_point_hash(base64.b64decode(match[1]))
    except ValueError as exc:
        raise ValueError(f"tls certificate {certificate} is damaged: {exc}") from exc


def _read(path: Path | str, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        # OSError picks the subclass by number, so a missing file stays a FileNotFoundError.
        raise OSError(exc.errno, f"tls {what} cannot be read: {exc.strerror}", str(path)) from exc
