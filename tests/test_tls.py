"""TLS, mutual TLS and channel binding, end to end over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import logging
import ssl
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trustme

import conduit
from conduit import TLS, Client, Limits, Server
from tests.acceptance.raw import PASSWORD, VERIFIER
from tests.acceptance.support import until, within


class Certificates:
    """An authority, a server certificate of it for localhost, and a client certificate."""

    def __init__(self, folder: Path) -> None:
        self.authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(str(self.ca))
        self.server = folder / "server.pem"
        self.client = folder / "client.pem"
        self.other = folder / "other.pem"
        for path, name in ((self.server, "localhost"), (self.client, "device-7")):
            issued = self.authority.issue_cert(name)
            issued.private_key_and_cert_chain_pem.write_to_path(str(path))
        stranger = trustme.CA().issue_cert("localhost")
        stranger.private_key_and_cert_chain_pem.write_to_path(str(self.other))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@contextlib.asynccontextmanager
async def serving(tls: TLS | ssl.SSLContext | None, **fields: Any) -> AsyncIterator[Server]:
    server = Server(verifier=VERIFIER, host="127.0.0.1", port=0, tls=tls, **fields)

    @server.rpc
    async def add(a: int, b: int) -> int:
        return a + b

    @server.rpc
    async def echo(value: bytes) -> bytes:
        return value

    async with server:
        yield server


def client_of(server: Server, tls: TLS | ssl.SSLContext | None, **fields: Any) -> Client:
    return Client(
        f"{'tls' if tls is not None else 'tcp'}://localhost:{server.address[1]}",
        password=PASSWORD,
        limits=Limits(min_iterations=4096),
        tls=tls,
        reconnect_enabled=False,
        **fields,
    )


async def works(client: Client) -> None:
    async with client:
        assert await within(client.rpc.add(a=1, b=2)) == 3
        value = bytes(range(256)) * 2000
        assert await within(client.rpc.echo(value=value)) == value


async def test_calls_over_tls(certificates: Certificates) -> None:
    async with serving(TLS(certificate=certificates.server)) as server:
        await works(client_of(server, TLS(ca=certificates.ca)))


async def test_both_sides_may_bring_a_context_of_their_own(certificates: Certificates) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates.server)
    # Such a server cannot bind the login, and a client that could says so under its proof.
    async with serving(context) as server:
        await works(client_of(server, TLS(ca=certificates.ca)))
        own = ssl.create_default_context(cafile=str(certificates.ca))
        await works(client_of(server, own))


async def test_the_protocol_is_agreed_on_in_the_handshake(certificates: Certificates) -> None:
    async with serving(TLS(certificate=certificates.server)) as server:
        context = ssl.create_default_context(cafile=str(certificates.ca))
        context.set_alpn_protocols(["http/1.1", "cndt/1"])
        _, writer = await asyncio.open_connection(
            *server.address, ssl=context, server_hostname="localhost"
        )
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "cndt/1"
        writer.transport.abort()


async def test_mutual_tls(certificates: Certificates) -> None:
    tls = TLS(certificate=certificates.server, ca=certificates.ca)
    async with serving(tls) as server:
        await works(client_of(server, TLS(ca=certificates.ca, certificate=certificates.client)))
        for stranger in (
            TLS(ca=certificates.ca),
            TLS(ca=certificates.ca, certificate=certificates.other),
        ):
            with pytest.raises((ssl.SSLError, conduit.ConnectionClosed, OSError)):
                await within(client_of(server, stranger).connect())
        with pytest.raises((ssl.SSLError, conduit.ConnectionClosed, OSError)) as refused:
            await within(client_of(server, TLS(ca=certificates.ca)).connect())
        if isinstance(refused.value, conduit.ConnectionClosed):  # TLS 1.3, on most systems
            assert "TLS(certificate=...)" in str(refused.value)
        assert not server.connections


async def test_an_unknown_authority_is_refused_with_what_to_do(
    certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "conduit.server")
    async with serving(TLS(certificate=certificates.other)) as server:
        with pytest.raises(ssl.SSLCertVerificationError, match=r"issuer.*TLS\(ca="):
            await within(client_of(server, TLS(ca=certificates.ca)).connect())
        await until(lambda: "did not complete the TLS handshake" in caplog.text)
    assert not caplog.text.rstrip().endswith("handshake:")


async def test_an_expired_certificate_is_called_expired(
    certificates: Certificates, tmp_path: Path
) -> None:
    path = tmp_path / "expired.pem"
    past = datetime.datetime(2020, 1, 1)
    issued = certificates.authority.issue_cert("localhost", not_before=past, not_after=past)
    issued.private_key_and_cert_chain_pem.write_to_path(str(path))
    async with serving(TLS(certificate=path)) as server:
        with pytest.raises(ssl.SSLCertVerificationError, match=r"expired; the server needs"):
            await within(client_of(server, TLS(ca=certificates.ca)).connect())


async def test_another_name_is_refused_unless_it_is_expected(certificates: Certificates) -> None:
    async with serving(TLS(certificate=certificates.client)) as server:
        with pytest.raises(ssl.SSLCertVerificationError, match=r"'localhost'.*server_name="):
            await within(client_of(server, TLS(ca=certificates.ca)).connect())
        await works(client_of(server, TLS(ca=certificates.ca, server_name="device-7")))


@pytest.mark.parametrize("missing", ["certificate", "key", "ca"])
async def test_a_missing_file_fails_at_start(
    certificates: Certificates, tmp_path: Path, missing: str
) -> None:
    fields = {"certificate": certificates.server, missing: tmp_path / "nowhere.pem"}
    tls = TLS.model_validate(fields)
    server = Server(verifier=VERIFIER, host="127.0.0.1", port=0, tls=tls)
    with pytest.raises(OSError, match=r"nowhere\.pem'$"):
        await server.start()
    with pytest.raises(RuntimeError, match="no address"):
        _ = server.address


async def test_tls_without_a_certificate_never_serves_plaintext() -> None:
    server = Server(verifier=VERIFIER, host="127.0.0.1", port=0, tls=TLS())
    with pytest.raises(ValueError, match="certificate"):
        await server.start()


async def test_plain_tcp_at_a_tls_port_and_back(certificates: Certificates) -> None:
    async with serving(TLS(certificate=certificates.server)) as server:
        with pytest.raises((conduit.ConduitError, OSError), match="TLS"):
            await within(client_of(server, None).connect())
    async with serving(None) as server:
        with pytest.raises(OSError, match="does the server speak TLS"):
            await within(client_of(server, TLS(ca=certificates.ca)).connect())


@contextlib.asynccontextmanager
async def man_in_the_middle(server: Server, shown: Path, ca: Path) -> AsyncIterator[int]:
    """Run a TLS proxy that shows another certificate; yields its port."""
    outer = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    outer.load_cert_chain(shown)
    inner = ssl.create_default_context(cafile=str(ca))
    tasks: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def relay() -> None:
            inside_reader, inside = await asyncio.open_connection(
                *server.address, ssl=inner, server_hostname="localhost"
            )
            try:
                await asyncio.gather(pump(reader, inside), pump(inside_reader, writer))
            finally:
                inside.transport.abort()
                writer.transport.abort()

        tasks.add(asyncio.ensure_future(relay()))

    proxy = await asyncio.start_server(accepted, "127.0.0.1", 0, ssl=outer)
    try:
        yield proxy.sockets[0].getsockname()[1]
    finally:
        proxy.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_who_relays_the_login_is_found_out_even_without_verification(
    certificates: Certificates,
) -> None:
    async with serving(TLS(certificate=certificates.server)) as server:
        trusting = TLS(verify=False)
        await works(client_of(server, trusting))  # the certificate is not checked, the binding is
        async with man_in_the_middle(server, certificates.other, certificates.ca) as port:
            client = Client(
                f"tls://localhost:{port}",
                password=PASSWORD,
                limits=Limits(min_iterations=4096),
                tls=trusting,
            )
            with pytest.raises(conduit.AuthenticationError):
                await within(client.connect())


async def test_without_verification_a_server_that_cannot_bind_is_refused(
    certificates: Certificates,
) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates.server)
    async with serving(context) as server:
        with pytest.raises(conduit.AuthenticationError) as caught:
            await within(client_of(server, TLS(verify=False)).connect())
        assert caught.value.code == "unsupported_mechanism"


async def test_binding_can_be_switched_off_for_a_proxy_that_ends_tls(
    certificates: Certificates,
) -> None:
    tls = TLS(certificate=certificates.server, channel_binding=False)
    async with serving(tls) as server:
        proxy = man_in_the_middle(server, certificates.server, certificates.ca)
        async with proxy as port:
            client = Client(
                f"tls://localhost:{port}",
                password=PASSWORD,
                limits=Limits(min_iterations=4096),
                tls=TLS(ca=certificates.ca, channel_binding=False),
            )
            await works(client)


async def give_up(server: Server, tls: TLS, turns: int) -> weakref.ref[Client]:
    """Begin to connect, and go away after so many turns of the loop."""
    client = client_of(server, tls, connect_timeout=0.2)
    connecting = asyncio.ensure_future(client.connect())
    for _ in range(turns):
        await asyncio.sleep(0)
    connecting.cancel()
    with contextlib.suppress(asyncio.CancelledError, TimeoutError):  # a busy machine takes so long
        await connecting
    await client.disconnect()
    return weakref.ref(client)


async def test_a_client_that_has_given_up_a_handshake_is_not_kept(
    certificates: Certificates,
) -> None:
    """uvloop keeps it for as long as the handshake might have taken, which is a minute for it."""
    async with serving(TLS(certificate=certificates.server)) as server:
        tls = TLS(ca=certificates.ca)
        clients = [await give_up(server, tls, turns) for turns in list(range(40)) * 3]

        def gone() -> bool:
            gc.collect()
            return not any(client() for client in clients)

        await until(gone)
