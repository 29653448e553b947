"""Logging in by a certificate: who it lets in, and that nothing weaker passes for it."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import ValidationError

import conduit
from conduit import (
    TLS,
    AuthenticationError,
    Client,
    ClientDescriptor,
    Connection,
    Limits,
    PermissionDenied,
    Server,
    ServerDescriptor,
    User,
)
from conduit.protocol.events import Broken, Capabilities, VerifierNeeded, WelcomeNeeded
from conduit.protocol.frames import FrameType
from conduit.protocol.login import ClientLogin, ServerLogin
from conduit.protocol.session import Session
from conduit.transport.tls import client_context, peer_names, server_context
from tests.acceptance.raw import PASSWORD, VERIFIER, Relay
from tests.acceptance.support import within
from tests.golden_frames import CLIENT_NONCE, GOLDEN, SERVER_NONCE
from tests.protocol.pair import make_client, written
from tests.wire_client import LoginFailed, WireClient


class Hub:
    """An authority, the files of a server, and those of its clients."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(str(self.ca))
        self.server = TLS(certificate=self.issued("localhost"), ca=self.ca)

    def issued(self, *names: str, authority: trustme.CA | None = None, **options: Any) -> Path:
        """Return the file of a certificate with these names."""
        path = self.folder / f"{len(list(self.folder.iterdir()))}.pem"
        issued = (authority or self.authority).issue_cert(*names, **options)
        issued.private_key_and_cert_chain_pem.write_to_path(str(path))
        return path

    def issued_without_extensions(self, common_name: str) -> Path:
        """Return the file of a certificate that has nothing but the name of its subject."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.timezone.utc)
        authority = x509.load_pem_x509_certificate(self.authority.cert_pem.bytes())
        signer = serialization.load_pem_private_key(self.authority.private_key_pem.bytes(), None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(authority.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False
            )
            .sign(signer, hashes.SHA256())
        )
        path = self.folder / "plain.pem"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        return path

    def client(self, server: Server, user: str, *names: str, **fields: Any) -> Client:
        """Return a client with a certificate with these names, and no password."""
        known: dict[str, Any] = {
            "tls": TLS(ca=self.ca, certificate=self.issued(*(names or (user,))))
        }
        known |= {"reconnect_enabled": False}
        return Client(f"tls://localhost:{server.address[1]}", user=user, **{**known, **fields})


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub(tmp_path)


USERS: dict[str, User | str] = {
    "device-7": User(certificate=True, roles="sensor"),
    "both": User(certificate=True, verifier=VERIFIER),
    "ann": User(verifier=VERIFIER, roles="sensor"),
    "eve": VERIFIER,
}


async def look_up(name: str) -> User | str | None:
    await asyncio.sleep(0)
    return USERS.get(name)


def new_server(tls: TLS | ssl.SSLContext | None, **fields: Any) -> Server:
    server = Server(**{"host": "127.0.0.1", "port": 0, "users": USERS, "tls": tls, **fields})

    @server.rpc
    async def whoami(connection: Connection) -> str:
        return connection.identity

    @server.rpc(requires="sensor")
    async def measure() -> int:
        return 42

    return server


async def refused(client: Client, code: str) -> AuthenticationError:
    with pytest.raises(AuthenticationError) as caught:
        await within(client.connect())
    assert caught.value.code == code, caught.value
    return caught.value


@pytest.mark.parametrize("users", [USERS, look_up], ids=["mapping", "lookup"])
async def test_a_certificate_says_who_logs_in(hub: Hub, users: Any) -> None:
    server, seen = new_server(hub.server, users=users), []

    @server.on_client_connect
    async def check(connection: Connection) -> None:
        await asyncio.sleep(0)
        seen.append((connection.identity, connection.roles))

    async with server:
        async with hub.client(server, "device-7") as client:
            assert seen == [("device-7", frozenset({"sensor"}))]
            assert client.connection.identity == "device-7"
            assert await within(client.rpc.whoami()) == "device-7"
            assert await within(client.rpc.measure()) == 42
        async with hub.client(server, "both", "other", "both", "third") as client:
            assert await within(client.rpc.whoami()) == "both"
            with pytest.raises(PermissionDenied):
                await within(client.rpc.measure())


@pytest.mark.parametrize("users", [USERS, look_up], ids=["mapping", "lookup"])
async def test_nobody_gets_in_as_somebody_else(hub: Hub, users: Any) -> None:
    async with new_server(hub.server, users=users) as server:
        for user, names in (
            ("ann", ["ann"]),  # may not log in so, whatever the certificate says
            ("eve", ["eve"]),
            ("nobody", ["nobody"]),  # does not exist
            ("device-7", ["device-8"]),
            ("device-7", ["device-77", "xdevice-7", "DEVICE-7.example"]),
            ("both", ["device-7"]),
            ("device-7", ["*.device-7"]),
        ):
            error = await refused(hub.client(server, user, *names), "invalid_credentials")
            assert str(error) == (
                f"the server refused user {user!r}: its certificate does not let it in"
            )
        assert not server.connections


async def test_a_user_without_a_verifier_has_no_password(hub: Hub) -> None:
    async with new_server(hub.server) as server:
        for user in ("device-7", "nobody"):
            limits = Limits(min_iterations=4096)
            client = hub.client(server, user, password=PASSWORD, limits=limits)
            await refused(client, "invalid_credentials")
        # With a password the certificate is the gate in front of the login, as ever.
        client = hub.client(server, "ann", "x", password=PASSWORD, limits=limits)
        async with client:
            assert await within(client.rpc.whoami()) == "ann"


async def test_certificates_of_others_do_not_count(hub: Hub) -> None:
    stranger = hub.issued("device-7", authority=trustme.CA())
    async with new_server(hub.server) as server:
        tls = TLS(ca=hub.ca, certificate=stranger)
        with pytest.raises((conduit.ConnectionClosed, OSError)):
            await within(hub.client(server, "device-7", tls=tls).connect())
        assert not server.connections


async def test_without_a_verified_certificate_it_is_not_offered(hub: Hub) -> None:
    """Neither a server that asks for none, nor one with one password, nor plain TCP."""
    asks_for_none = TLS(certificate=hub.server.certificate)
    for tls, fields in (
        (asks_for_none, {"users": look_up}),
        (hub.server, {"users": None, "verifier": VERIFIER}),
        (hub.server, {"users": None}),
    ):
        async with new_server(tls, **fields) as server:
            error = await refused(hub.client(server, "device-7"), "unsupported_mechanism")
            assert "lets nobody in by a certificate" in str(error)
    async with new_server(None, users=look_up) as server:
        with pytest.raises(LoginFailed) as caught:
            await asyncio.to_thread(by_wire, server, None, "device-7")
        assert caught.value.code == "unsupported_mechanism"
        assert caught.value.details["mechs"] == ["SCRAM-SHA-256"]


async def test_contexts_of_ones_own_are_as_good(hub: Hub) -> None:
    async with new_server(server_context(hub.server)) as server:
        own = client_context(TLS(ca=hub.ca, certificate=hub.issued("device-7")))
        async with hub.client(server, "device-7", tls=own) as client:
            assert await within(client.rpc.whoami()) == "device-7"


def by_wire(server: Server, tls: ssl.SSLContext | None, user: str) -> dict[str, Any]:
    """Log in as docs/protocol.md says, by a client that was made from that page alone."""
    client = WireClient(*server.address, tls=tls)
    try:
        client.login(None, user=user, external=True)
        assert client.call("whoami", {}) == user
        return client.success
    finally:
        client.close()


async def test_the_page_is_enough_to_log_in_so(hub: Hub) -> None:
    tls = client_context(TLS(ca=hub.ca, certificate=hub.issued("device-7")))
    async with new_server(hub.server) as server:
        success = await asyncio.to_thread(by_wire, server, tls, "device-7")
        assert (success["identity"], success["scram"]) == ("device-7", "")
        assert isinstance(success["caps"], bytes)
        with pytest.raises(LoginFailed) as caught:
            await asyncio.to_thread(by_wire, server, tls, "both")
        assert caught.value.code == "invalid_credentials"
        assert caught.value.details["mechs"] == ["SCRAM-SHA-256-PLUS", "SCRAM-SHA-256", "EXTERNAL"]


async def test_a_session_goes_on_by_certificate(hub: Hub) -> None:
    async with new_server(hub.server) as server, Relay(server.address) as relay:
        client = hub.client(server, "device-7", reconnect_enabled=True, reconnect_delay=0.01)
        through = client.descriptor.model_copy(
            update={"urls": (f"tls://localhost:{relay.address[1]}",)}
        )
        async with Client(through) as client:
            resumed = asyncio.Event()
            client.on_resume(lambda cli: resumed.set())
            (peer,) = server.connections.values()
            relay.cut()
            await within(resumed.wait())
            assert list(server.connections.values()) == [peer]
            assert await within(client.rpc.measure()) == 42


async def test_a_client_that_wants_it_tells_no_other_server_more(hub: Hub) -> None:
    """It does not fall back to a login that says nothing of who it is."""
    async with new_server(TLS(certificate=hub.server.certificate), users=None) as server:
        await refused(hub.client(server, "device-7"), "unsupported_mechanism")
        assert not server.connections
        # Without a user it is no login by certificate, and everybody is let in.
        async with Client(
            f"tls://localhost:{server.address[1]}",
            tls=TLS(ca=hub.ca, certificate=hub.issued("device-7")),
        ) as client:
            assert await within(client.rpc.whoami()) == "anonymous"


@pytest.mark.parametrize(
    "tls",
    [
        lambda path: TLS(certificate=path, verify=False),
        lambda path: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
        lambda path: unchecked(),
    ],
    ids=["verify", "none", "no name"],
)
def test_a_server_that_proves_nothing_is_not_logged_in_to(tls: Callable[[Path], Any]) -> None:
    with pytest.raises(ValidationError, match="leave verify on"):
        ClientDescriptor(urls=("tls://h:1",), user="device-7", tls=tls(Path("x.pem")))
    ClientDescriptor(urls=("tls://h:1",), user="ann", password="x", tls=tls(Path("x.pem")))


def unchecked() -> ssl.SSLContext:
    """Return a context that takes any certificate of a known authority."""
    context = ssl.create_default_context()
    context.check_hostname = False
    return context


def test_a_user_has_some_way_to_log_in() -> None:
    with pytest.raises(ValidationError, match="needs a verifier, or certificate=True"):
        User(roles="x")


def test_both_sides_write_the_golden_frames() -> None:
    """Those of docs/protocol.md, but for `caps`, of which the page shows fewer keys."""
    request, success = (GOLDEN[f"auth_{name}_external"] for name in ("request", "success"))
    told: list[tuple[FrameType, Any]] = []

    def send(type: FrameType, body: Mapping[str, Any]) -> bytes:
        told.append((type, body))
        return b""

    client = ClientLogin(
        send,
        capabilities=Capabilities(),
        nonce=CLIENT_NONCE,
        user="device-7",
        external=True,
        agent="conduit-py/1.0",
    )
    client.open()
    server = ServerLogin(
        send,
        capabilities=Capabilities(),
        nonce=SERVER_NONCE,
        mock_secret=bytes(32),
        names=frozenset({"device-7", "device-7.example"}),
    )
    asked = server.requested(request.raw[32:])
    assert asked == VerifierNeeded("device-7", certified=True)
    assert server.certified() == WelcomeNeeded("device-7")
    assert isinstance(success.value, dict) and isinstance(request.value, dict)
    session = Session(success.value["session"]["id"], success.value["session"]["epoch"])
    server.welcome(session, (30.0, 90.0), "conduit-server", "1.0.0", keeps=0)
    for (type, body), golden in zip(told, (request, success), strict=True):
        assert type == golden.type
        assert isinstance(golden.value, dict)
        assert {**body, "caps": golden.value["caps"]} == golden.value
    resumed, accepted = client.welcomed(success.raw[32:])
    assert (resumed.id, accepted, client.peer.identity) == (session.id, None, "device-7")


def test_a_server_without_names_does_not_know_the_mechanism() -> None:
    server = ServerLogin(
        lambda type, body: b"",
        capabilities=Capabilities(),
        nonce=SERVER_NONCE,
        mock_secret=bytes(32),
    )
    with pytest.raises(AuthenticationError) as caught:
        server.requested(GOLDEN["auth_request_external"].raw[32:])
    assert caught.value.code == "unsupported_mechanism"


def test_a_client_with_a_password_does_not_believe_such_a_success() -> None:
    client = make_client()
    written(client)
    (broken,) = client.receive(GOLDEN["auth_success_external"].raw)
    assert isinstance(broken, Broken)


@pytest.mark.parametrize("tls", [None, TLS(certificate="x.pem")], ids=["plain", "no ca"])
def test_a_user_who_could_never_log_in_is_noticed_at_once(tls: TLS | None) -> None:
    with pytest.raises(ValidationError, match="'device-7' can log in by certificate only"):
        ServerDescriptor(users=USERS, tls=tls)
    both = {"both": User(certificate=True, verifier=VERIFIER)}
    ServerDescriptor(users=both, tls=tls)
    ServerDescriptor(users=USERS, tls=TLS(certificate="x.pem", ca="ca.pem"))
    ServerDescriptor(users=USERS, tls=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))


# What a certificate calls its holder


async def names_of(hub: Hub, certificate: Path) -> frozenset[str]:
    """Return what a server learns of a client with this certificate."""
    learned: asyncio.Future[frozenset[str]] = asyncio.get_running_loop().create_future()

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        learned.set_result(peer_names(writer.get_extra_info("ssl_object")))
        writer.transport.abort()

    listening = await asyncio.start_server(accepted, "127.0.0.1", 0, ssl=server_context(hub.server))
    try:
        _, writer = await asyncio.open_connection(
            "127.0.0.1",
            listening.sockets[0].getsockname()[1],
            ssl=client_context(TLS(ca=hub.ca, certificate=certificate)),
            server_hostname="localhost",
        )
        try:
            return await within(learned)
        finally:
            writer.transport.abort()
    finally:
        listening.close()


@pytest.mark.parametrize(
    "names, options, expected",
    [
        (["device-7"], {}, {"device-7"}),
        (
            ["a.example", "*.b.example", "ann@c.example"],
            {},
            {"a.example", "*.b.example", "ann@c.example"},
        ),
        (["10.0.0.1"], {}, set()),
        (["a.example"], {"common_name": "root"}, {"a.example"}),
        (["10.0.0.1"], {"common_name": "root"}, set()),
    ],
)
async def test_names_of_certificates(
    hub: Hub, names: list[str], options: dict[str, Any], expected: set[str]
) -> None:
    assert await names_of(hub, hub.issued(*names, **options)) == expected


@pytest.mark.parametrize(
    "common_name, expected",
    [("device 7, of Größe", {"device 7, of Größe"}), ("a\nb", set()), ("x" * 64, {"x" * 64})],
)
async def test_the_common_name_counts_where_there_is_no_other(
    hub: Hub, common_name: str, expected: set[str]
) -> None:
    assert await names_of(hub, hub.issued_without_extensions(common_name)) == expected


def test_a_certificate_that_was_not_verified_has_no_name(hub: Hub) -> None:
    """`getpeercert` says nothing of one, and neither may we."""
    lax = server_context(TLS(certificate=hub.server.certificate))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = client_context(TLS(ca=hub.ca, certificate=hub.issued("device-7")))
    client = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    server = lax.wrap_bio(outgoing, incoming, server_side=True)
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert peer_names(server) == frozenset()
    assert peer_names(client) == {"localhost"}
