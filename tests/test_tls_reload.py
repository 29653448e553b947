"""A certificate that is renewed while the server runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trustme

import conduit
from conduit import TLS, Server
from conduit.transport.tls import peer_end_point, server_end_point, shown_by
from tests.acceptance.support import until, within
from tests.test_tls import Certificates, client_of, serving, works


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


def renew(certificates: Certificates) -> None:
    """Replace the server's certificate, and its key, by another one of the same authority."""
    issued = certificates.authority.issue_cert("localhost")
    issued.private_key_and_cert_chain_pem.write_to_path(str(certificates.server))


async def shown(server: Server, ca: Path) -> bytes | None:
    """Return the channel binding of the certificate that the server shows now."""
    context = ssl.create_default_context(cafile=str(ca))
    _, writer = await asyncio.open_connection(
        *server.address, ssl=context, server_hostname="localhost"
    )
    try:
        return peer_end_point(writer.get_extra_info("ssl_object"))
    finally:
        writer.transport.abort()


async def test_new_connections_see_the_new_certificate_and_old_ones_stay(
    certificates: Certificates,
) -> None:
    tls, trusting = TLS(certificate=certificates.server), TLS(ca=certificates.ca)
    async with serving(tls) as server, client_of(server, trusting) as older:
        before = await within(shown(server, certificates.ca))
        renew(certificates)
        assert await within(shown(server, certificates.ca)) == before, "nobody has asked for it"
        server.reload_tls()
        now = await within(shown(server, certificates.ca))
        assert before != now == server_end_point(tls)
        # The login of both is bound to what they were shown, which each of them checks.
        assert await within(older.rpc.add(a=1, b=2)) == 3
        await works(client_of(server, trusting))
        await works(client_of(server, TLS(verify=False)))
        assert await within(older.rpc.add(a=1, b=2)) == 3
        assert not older.connection.away


@contextlib.asynccontextmanager
async def gate(server: Server, opened: asyncio.Event) -> AsyncIterator[int]:
    """Connect clients to the server at once, and let their first byte through later."""
    tasks: list[asyncio.Task[None]] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inside_reader, inside = await asyncio.open_connection(*server.address)
        try:
            await opened.wait()
            await asyncio.gather(pump(reader, inside), pump(inside_reader, writer))
        finally:
            inside.transport.abort()
            writer.transport.abort()

    proxy = await asyncio.start_server(
        lambda *pair: tasks.append(asyncio.ensure_future(relay(*pair))), "127.0.0.1", 0
    )
    try:
        yield proxy.sockets[0].getsockname()[1]
    finally:
        proxy.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_login_is_bound_to_what_its_own_handshake_has_shown(
    certificates: Certificates,
) -> None:
    """A handshake that began before ends, and logs in, with the certificate of before."""
    tls, opened = TLS(certificate=certificates.server), asyncio.Event()
    async with serving(tls) as server, gate(server, opened) as port:
        client = client_of(server, TLS(verify=False))  # the binding is all that is checked
        through_the_gate = client.descriptor.model_copy(
            update={"urls": (f"tls://localhost:{port}",)}
        )
        client = conduit.Client(through_the_gate)
        connecting = asyncio.ensure_future(client.connect())
        assert server._listener is not None
        await until(lambda: server._listener and server._listener.starting)
        await asyncio.sleep(0)  # the first step of the handshake takes the context
        renew(certificates)
        server.reload_tls()
        opened.set()
        await within(connecting)
        assert await within(client.rpc.add(a=1, b=2)) == 3
        await within(client.disconnect())
        await works(client_of(server, TLS(verify=False)))


@pytest.mark.parametrize("broken", ["missing", "empty", "damaged", "other key"])
async def test_files_that_cannot_be_used_change_nothing(
    certificates: Certificates, broken: str
) -> None:
    key = certificates.server.with_name("key.pem")
    issued = certificates.authority.issue_cert("localhost")
    issued.private_key_pem.write_to_path(str(key))
    issued.cert_chain_pems[0].write_to_path(str(certificates.server))
    tls = TLS(certificate=certificates.server, key=key)
    async with serving(tls) as server:
        before = await within(shown(server, certificates.ca))
        if broken == "missing":
            key.unlink()
        elif broken == "empty":
            certificates.server.write_bytes(b"")
        elif broken == "damaged":
            text = certificates.server.read_bytes()
            certificates.server.write_bytes(text[:100] + b"!" + text[101:])
        else:  # half of a renewal: the certificate is new, and its key is not there yet
            other = certificates.authority.issue_cert("localhost")
            other.cert_chain_pems[0].write_to_path(str(certificates.server))
        with pytest.raises((OSError, ssl.SSLError, ValueError), match=r"server\.pem|key\.pem"):
            server.reload_tls()
        assert await within(shown(server, certificates.ca)) == before
        await works(client_of(server, TLS(ca=certificates.ca)))


async def test_the_authority_of_clients_is_read_again_too(certificates: Certificates) -> None:
    known = certificates.ca.with_name("known.pem")
    certificates.authority.cert_pem.write_to_path(str(known))
    mine = TLS(ca=certificates.ca, certificate=certificates.client)
    async with serving(TLS(certificate=certificates.server, ca=known)) as server:
        await works(client_of(server, mine))
        trustme.CA().cert_pem.write_to_path(str(known))
        server.reload_tls()
        with pytest.raises((conduit.ConnectionClosed, OSError)):
            await within(client_of(server, mine).connect())


def test_a_certificate_that_changes_while_it_is_read_is_not_used(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Context and binding are read one after the other, and must be of one certificate."""
    load = ssl.SSLContext.load_cert_chain

    def load_then_renew(context: ssl.SSLContext, *args: Any) -> None:
        load(context, *args)
        renew(certificates)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", load_then_renew)
    with pytest.raises(ValueError, match="replaced while it was read"):
        shown_by(TLS(certificate=certificates.server))


async def test_only_a_running_server_with_files_can_read_them_again(
    certificates: Certificates,
) -> None:
    server = Server(host="127.0.0.1", port=0, tls=TLS(certificate=certificates.server))
    with pytest.raises(RuntimeError, match="does not run"):
        server.reload_tls()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates.server)
    for tls in (None, context):
        async with serving(tls) as server:
            with pytest.raises(RuntimeError, match=r"no TLS\(certificate=...\)"):
                server.reload_tls()
    with pytest.raises(RuntimeError, match="does not run"):
        server.reload_tls()


async def test_a_signal_may_ask_for_it(
    certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    """What docs/howto.md shows."""
    loop = asyncio.get_running_loop()
    async with serving(TLS(certificate=certificates.server)) as server:
        loop.add_signal_handler(signal.SIGHUP, server.reload_tls)
        try:
            before = await within(shown(server, certificates.ca))
            renew(certificates)
            with caplog.at_level("INFO", "conduit.server"):
                os.kill(os.getpid(), signal.SIGHUP)
                await until(lambda: "shows the certificate" in caplog.text)
            assert await within(shown(server, certificates.ca)) != before
        finally:
            loop.remove_signal_handler(signal.SIGHUP)
