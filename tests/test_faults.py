"""Faults: peers that vanish, stall or flood, races of our own making, and handlers that misbehave.

Whatever happens, callers get an exception at once or by their deadline, the server goes on, and
nothing is left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import re
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
import trustme

from conduit import (
    TLS,
    AuthenticationError,
    Client,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    Limits,
    PermissionDenied,
    ProtocolError,
    RPCError,
    RPCTimeout,
    Server,
    Status,
)
from conduit.transport import link as link_module
from conduit.transport.keys import client_keys
from tests.acceptance import raw
from tests.acceptance.raw import CAPS, PASSWORD, RawPeer, frame, listen, pack
from tests.acceptance.support import (
    FAST_LOGIN,
    ROOT,
    free_port,
    neighbourhood,
    new_client,
    new_server,
    round_trips,
    within,
)
from tests.chaos_proxy import ChaosProxy

SOON = 2.0
"""Seconds within which everything here has to happen; what is right takes milliseconds."""

WIDE = {**CAPS, "window": [100_000, 1 << 30]}
"""The capabilities of a peer that lets others send as much as they like."""


async def until(condition: Callable[[], object], seconds: float = SOON) -> None:
    """Let the loop run until a condition holds that no event tells of."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.005)


async def at_once(condition: Callable[[], object]) -> None:
    """Let the loop run until a condition holds, and not one turn longer."""
    for _ in range(100_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came true")


async def outcome(awaitable: Any, seconds: float = SOON) -> Any:
    """Return the result of something, or the exception that it ended with."""
    (result,) = await within(asyncio.gather(awaitable, return_exceptions=True), seconds)
    return result


def only(server: Server) -> Connection:
    """Return the one connection of a server."""
    (connection,) = server.connections.values()
    return connection


async def fill(connection: Connection) -> int:
    """Send to a peer that does not read until sending waits; return how many were sent."""
    sent = 0
    with contextlib.suppress(asyncio.TimeoutError):
        while True:
            await asyncio.wait_for(connection.send("news", b"x" * 100_000), 0.1)
            sent += 1
    return sent


def read_no_more(peer: RawPeer) -> None:
    """Leave everything that comes to a peer in its socket."""
    transport: Any = peer.writer.transport
    transport.pause_reading()


@contextlib.asynccontextmanager
async def stalled(
    address: tuple[str, int], tls: ssl.SSLContext | None = None
) -> AsyncIterator[RawPeer]:
    """A peer that logs in and then reads nothing."""
    name = "localhost" if tls is not None else None
    reader, writer = await asyncio.open_connection(*address, ssl=tls, server_hostname=name)
    peer = RawPeer(reader, writer)
    await peer.login(caps=WIDE)
    read_no_more(peer)
    try:
        yield peer
    finally:
        writer.transport.abort()


@contextlib.asynccontextmanager
async def served(client: Client) -> AsyncIterator[Client]:
    """Connect, and disconnect in the end, whatever state the client is in."""
    await client.connect()
    try:
        yield client
    finally:
        await client.disconnect()


async def program(code: str, seconds: float) -> str:
    """Run a program on the loop of the tests, and return what it printed; it has to end in time."""
    head = (
        "import asyncio, os, sys, threading, time\n"
        "from conduit import *\nfrom conduit import from_thread\n"
        "from tests.acceptance.raw import make_verifier\n"
        "from tests.acceptance.support import new_client, new_server\n"
        "run = __import__(os.environ.get('CONDUIT_TEST_LOOP') or 'asyncio').run\n"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "ignore", "-c", head + code),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), seconds)
    except asyncio.TimeoutError:
        process.kill()
        output, _ = await process.communicate()
        pytest.fail(f"the program never ended; it printed {output.decode()!r}")
    return output.decode()


# Peers that vanish.


def reset_behind(sock: socket.socket, data: bytes) -> None:
    """Send bytes and reset the connection before the other side can have read them."""
    sock.setblocking(True)
    sock.sendall(data)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


async def test_a_reset_behind_the_last_frame_leaves_no_connection_behind() -> None:
    async with neighbourhood(new_server()) as neighbour:
        gone = asyncio.Event()
        neighbour.server.on_client_disconnect(lambda connection, reason: gone.set())
        sock = socket.create_connection(neighbour.server.address)
        # The peer's streams work on one descriptor and let go of it; the other one stays.
        reader, writer = await asyncio.open_connection(sock=sock.dup())
        peer = RawPeer(reader, writer)
        success = await peer.login()
        connection = neighbour.server.connections[success["session"]["id"].hex()]
        call = asyncio.ensure_future(connection.rpc.call("anything", timeout=None))
        await peer.until(raw.RPC_REQUEST)
        await peer.close()
        reset_behind(sock, frame(raw.CLOSE, 0, pack([1000, "bye"])))
        assert isinstance(await outcome(call), ConnectionLost)
        await within(gone.wait(), SOON)
        assert len(neighbour.server.connections) == 1


async def test_a_reset_behind_garbage_does_not_occupy_a_place() -> None:
    async with new_server(max_connections=3) as server:
        for _ in range(6):
            sock = socket.create_connection(server.address)
            await asyncio.sleep(0.005)  # accepted, so that it is read and reset in one turn
            reset_behind(sock, raw.HTTP)
        await asyncio.sleep(0.01)
        async with served(new_client(server)):
            pass


async def stop_while_accepting(turns: int) -> None:
    """Stop a server so many turns of the loop after three sockets have knocked."""
    server = new_server()
    await server.start()
    with contextlib.ExitStack() as socks:
        for _ in range(3):
            sock = socks.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(server.address)
        for _ in range(turns):
            await asyncio.sleep(0)
        await within(server.stop(), SOON)
    await server.start()  # which is refused to a server that has stopped by halves
    await server.stop()


async def test_a_server_stops_while_sockets_are_being_accepted() -> None:
    # At the same time, because each waits a second for sockets that do not close.
    await asyncio.gather(*(stop_while_accepting(turns) for turns in range(8)))


async def conversation(client: Client) -> list[Any]:
    """Log in, do a bit of everything, and leave."""
    await client.connect()
    results = await asyncio.gather(
        client.rpc.call("add", {"a": 1, "b": 2}),
        client.rpc.call("echo", {"value": b"x" * 150_000}),
        client.request("later", 1),
        client.send("nobody", None),
        return_exceptions=True,
    )
    await client.disconnect()
    return list(results)


@pytest.mark.parametrize("upward", [True, False])
async def test_a_link_cut_after_any_byte_ends_every_call_at_once(upward: bool) -> None:
    server = new_server()

    @server.rpc
    async def echo(value: bytes) -> bytes:
        return value

    @server.on("later")
    async def later(connection: Connection, message: int) -> int:
        await asyncio.sleep(0)
        return message

    async with neighbourhood(server) as neighbour:
        async with ChaosProxy(*server.address) as proxy:
            await conversation(new_client(proxy.address, reconnect_enabled=False))
            most = (proxy.up if upward else proxy.down).passed
        for count in (*range(1, 700, 31), *range(700, most, most // 20)):
            async with ChaosProxy(*server.address) as proxy:
                (proxy.up if upward else proxy.down).cut_after = count
                client = new_client(proxy.address, reconnect_enabled=False)
                ended = await outcome(conversation(client))
                found = ended if isinstance(ended, list) else [ended]
                assert all(
                    isinstance(one, (ConnectionClosed, OSError, int, bytes, type(None)))
                    for one in found
                ), (count, found)
                await client.disconnect()
        await until(lambda: len(server.connections) == 1)
        await neighbour.check()


async def test_a_server_stops_although_a_peer_has_shut_down_its_side_and_does_not_read() -> None:
    server = new_server()
    await server.start()
    async with stalled(server.address) as peer:
        await fill(only(server))
        peer.writer.write_eof()
        await asyncio.sleep(0.05)  # for the end of file to arrive; nothing tells of it
        stopping = asyncio.ensure_future(server.stop(grace=0))
        done, _ = await asyncio.wait([stopping], timeout=link_module.LINGER + SOON)
    await within(stopping, SOON)
    assert done, "stop() waited for a peer that will never read"


async def test_a_client_disconnects_although_the_server_has_shut_down_its_side() -> None:
    full, over = asyncio.Event(), asyncio.Event()

    async def script(peer: RawPeer) -> None:
        await peer.accept_login(caps=WIDE)
        read_no_more(peer)
        await full.wait()
        peer.writer.write_eof()
        await over.wait()
        peer.abort()

    async with listen(script) as address:
        client = new_client(address, reconnect_enabled=False)
        await client.connect()
        await fill(client.connection)
        full.set()
        await asyncio.sleep(0.05)  # for the end of file to arrive; nothing tells of it
        leaving = asyncio.ensure_future(client.disconnect())
        done, _ = await asyncio.wait([leaving], timeout=link_module.LINGER + SOON)
        over.set()
        await within(leaving, SOON)
    assert done, "disconnect() waited for a server that will never read"


async def test_a_call_fails_at_once_when_the_peer_has_shut_down_its_side() -> None:
    async with new_server() as server, stalled(server.address) as peer:
        connection = only(server)
        await fill(connection)
        call = asyncio.ensure_future(connection.rpc.call("anything", timeout=SOON / 2))
        peer.writer.write_eof()
        assert isinstance(await outcome(call), ConnectionClosed)


# TLS.


class Certificates:
    """An authority with two certificates for this machine, and a stranger's."""

    def __init__(self, folder: Path) -> None:
        authority, stranger = trustme.CA(), trustme.CA()
        self.ca = folder / "ca.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        self.stranger_ca = folder / "stranger-ca.pem"
        stranger.cert_pem.write_to_path(str(self.stranger_ca))
        self.server = folder / "server.pem"
        self.stranger = folder / "stranger.pem"
        for issuer, path in ((authority, self.server), (stranger, self.stranger)):
            issued = issuer.issue_cert("localhost", "127.0.0.1")
            issued.private_key_and_cert_chain_pem.write_to_path(str(path))

    def trusting(self) -> ssl.SSLContext:
        """Return a context for a client that checks nothing but the signature."""
        context = ssl.create_default_context(cafile=str(self.ca))
        context.check_hostname = False
        return context

    def showing(self, certificate: Path) -> ssl.SSLContext:
        """Return a context for a server that shows a certificate."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
        return context


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


async def test_a_server_stops_although_a_tls_peer_does_not_read(
    certificates: Certificates,
) -> None:
    server = new_server(tls=TLS(certificate=certificates.server))
    await server.start()
    async with stalled(server.address, certificates.trusting()):
        await fill(only(server))
        stopping = asyncio.ensure_future(server.stop(grace=0))
        done, _ = await asyncio.wait([stopping], timeout=link_module.LINGER + SOON)
    await within(stopping, SOON)
    assert done, "stop() waited for a peer that will never read"


@contextlib.asynccontextmanager
async def in_the_middle(
    certificates: Certificates, target: tuple[str, int], *, deny_binding: bool = False
) -> AsyncIterator[tuple[str, int]]:
    """Somebody who ends TLS with another certificate, and passes everything on."""
    tasks: list[asyncio.Task[None]] = []
    attempts = 0

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal attempts
        attempts += 1
        if deny_binding and attempts == 1:
            await reader.read(65536)
            body = {"code": "unsupported_mechanism", "message": "", "retry": False}
            writer.write(
                frame(
                    raw.AUTH_FAILURE,
                    1,
                    pack({**body, "retry_after": 0, "mechs": ["x"]}),
                )
            )
            writer.close()
            return
        far_reader, far_writer = await asyncio.open_connection(*target, ssl=certificates.trusting())
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.ensure_future(between(reader, writer)))

    context = certificates.showing(certificates.stranger)
    listener = await asyncio.start_server(accepted, "127.0.0.1", 0, ssl=context)
    try:
        yield listener.sockets[0].getsockname()
    finally:
        listener.close()
        await within(asyncio.gather(*tasks, return_exceptions=True))
        await listener.wait_closed()


@pytest.mark.parametrize("deny_binding", [False, True])
@pytest.mark.parametrize("verify", [False, True])
async def test_somebody_in_between_with_another_certificate_is_found_out(
    certificates: Certificates, verify: bool, deny_binding: bool
) -> None:
    # With `verify` the certificate in between is one that the client trusts.
    tls = TLS(ca=certificates.stranger_ca) if verify else TLS(verify=False)
    async with (
        new_server(tls=TLS(certificate=certificates.server)) as server,
        in_the_middle(certificates, server.address, deny_binding=deny_binding) as address,
    ):
        client = new_client(address, tls=tls)
        assert isinstance(await outcome(client.connect()), AuthenticationError)
        assert not server.connections


async def test_a_server_that_cannot_bind_does_not_cost_a_derivation_at_each_login(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    derived = 0

    async def counted(*args: Any) -> Any:
        nonlocal derived
        derived += 1
        return await client_keys(*args)

    monkeypatch.setattr("conduit.dialing.client_keys", counted)
    async with new_server(tls=certificates.showing(certificates.server)) as server:
        for _ in range(3):
            async with served(new_client(server, tls=TLS(ca=certificates.ca))):
                pass
    assert derived <= 1


# Races: connect and disconnect.


async def test_disconnect_during_connect_leaves_the_client_unconnected() -> None:
    server, entered, let_in = new_server(), asyncio.Event(), asyncio.Event()

    @server.on_client_connect
    async def hold(connection: Connection) -> None:
        entered.set()
        await let_in.wait()

    async with server:
        client = new_client(server)
        connecting = asyncio.ensure_future(client.connect())
        await within(entered.wait(), SOON)
        await client.disconnect()
        let_in.set()
        await asyncio.wait([connecting], timeout=SOON)
        status = client.status
        await client.disconnect()
        assert status is Status.CLOSED
        assert isinstance(await outcome(connecting), (ConnectionClosed, asyncio.CancelledError))
        await until(lambda: not server.connections)


async def test_disconnect_ends_connect_with_retry() -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        address = occupied.getsockname()
    client = new_client(address, reconnect_attempts=0)
    connecting = asyncio.ensure_future(client.connect(retry=True))
    await asyncio.sleep(0.02)
    await client.disconnect()
    done, _ = await asyncio.wait([connecting], timeout=SOON)
    connecting.cancel()
    await asyncio.gather(connecting, return_exceptions=True)
    assert done, "connect(retry=True) went on after disconnect()"


async def test_disconnect_ends_connect_with_retry_at_every_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("conduit.attempts.LONGEST_DELAY", 0.0)
    for turns in range(1, 60):
        client = new_client(("127.0.0.1", free_port()), reconnect_attempts=0)
        connecting = asyncio.ensure_future(client.connect(retry=True))
        for _ in range(turns):
            await asyncio.sleep(0)
        await within(client.disconnect(), SOON)
        assert isinstance(await outcome(connecting), (ConnectionClosed, asyncio.CancelledError))


@contextlib.asynccontextmanager
async def answering_http(port: int = 0) -> AsyncIterator[int]:
    """A load balancer whose server is away; yields its port."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answered.set()
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")
        writer.close()

    answered = asyncio.Event()
    balancer = await asyncio.start_server(refuse, "127.0.0.1", port)
    async with balancer:
        yield balancer.sockets[0].getsockname()[1]
        await within(answered.wait(), SOON)


async def test_a_client_comes_back_although_something_else_has_answered_meanwhile() -> None:
    server = new_server()
    await server.start()
    async with new_client(server, reconnect_attempts=0, reconnect_delay=0.01) as client:
        port = server.address[1]
        await server.stop(grace=0)
        async with answering_http(port):
            await until(lambda: client.status is Status.RECONNECTING)
        async with new_server(port=port):
            await until(lambda: client.status is Status.READY)


async def test_a_server_of_several_that_is_something_else_is_passed_over() -> None:
    async with new_server() as server, answering_http() as port:
        urls = [f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{server.address[1]}"]
        async with Client(urls, password=PASSWORD, limits=FAST_LOGIN) as client:
            assert client.connection is not None and client.connection.address == server.address


async def test_connect_without_retry_tells_at_once_of_something_else() -> None:
    async with answering_http() as port:
        client = new_client(("127.0.0.1", port))
        with pytest.raises(ProtocolError, match="look like HTTP"):
            await within(client.connect())


@pytest.mark.skipif(sys.platform != "linux", reason="how the kernel chooses ports is its own")
async def test_a_client_that_reaches_itself_has_reached_nobody() -> None:
    """The kernel may give a socket that connects the very port it connects to, and join the two."""
    for _ in range(100):
        port = port_that_comes_next()
        client = new_client(("127.0.0.1", port), reconnect_enabled=False)
        with pytest.raises(ConnectionRefusedError, match="nothing listens there") as caught:
            await client.connect()
        if caught.value.__cause__ is not None and isinstance(
            caught.value.__cause__, (ProtocolError, ConnectionClosed)
        ):
            return  # the client has spoken with itself
    pytest.fail("no client has reached itself")


def port_that_comes_next() -> int:
    """Return a port that the kernel may well choose for the next socket that connects to it.

    For each port it begins somewhere and goes on in small even steps.
    """
    while True:
        with socket.socket() as listening, contextlib.suppress(OSError):
            port = random.randrange(33_000, 60_000, 2)
            listening.bind(("127.0.0.1", port))
            listening.listen()
            came = 0
            while not 0 < port - came <= 8:
                with socket.create_connection(("127.0.0.1", port)) as connecting:
                    came = connecting.getsockname()[1]
                if not 0 < port - came < 500:
                    break
            else:
                return port


async def test_disconnect_ends_the_reconnecting_at_every_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("conduit.attempts.LONGEST_DELAY", 0.0)
    async with new_server(resume_ttl=0) as server:
        for turns in range(1, 60):
            client = new_client(server)
            await client.connect()
            await only(server).close(1001)
            await leave_in_turn(client, turns)
            assert client.status is Status.CLOSED, turns
            await until(lambda: not server.connections)


async def leave_in_turn(client: Client, turns: int) -> None:
    """Disconnect so many turns behind the loss of a connection."""
    await at_once(lambda: client.status is not Status.READY)
    for _ in range(turns):
        await asyncio.sleep(0)
    await within(client.disconnect(), SOON)


async def test_a_connect_that_is_cancelled_does_not_come_back_to_a_lost_link() -> None:
    class Adder(Protocol):
        async def add(self, a: int, b: int) -> int: ...

    async with new_server() as server, raw.Relay(server.address) as relay:
        client = new_client(relay.address)
        client.rpc.bind(Adder)  # connecting, it asks the server for its methods
        connecting = asyncio.ensure_future(client.connect())
        await at_once(lambda: client.status is Status.READY)
        relay.unplug()
        await until(lambda: client.status is Status.RECONNECTING)
        connecting.cancel()
        assert isinstance(await outcome(connecting), asyncio.CancelledError)
        relay.plugged = True
        await asyncio.sleep(0.1)  # longer than reconnect_delay: it must not come back
        assert client.status is Status.CLOSED
        await within(client.connect(), SOON)
        await client.disconnect()


async def test_nobody_is_told_of_a_connection_that_a_message_has_ended_during_connect() -> None:
    server, told = new_server(), list[str]()

    @server.on_client_connect
    async def send_away(connection: Connection) -> None:
        await connection.send("leave")

    async with server:
        client = new_client(server)
        client.on_connect(lambda client: told.append("connect"))
        client.on_disconnect(lambda client, reason: told.append("disconnect"))

        @client.on("leave")
        async def leave(message: None) -> None:
            await client.disconnect()

        with pytest.raises(ConnectionClosed):
            await within(client.connect(), SOON)
        await client.disconnect()
        assert not told


async def test_disconnect_in_the_disconnect_hook_ends_the_reconnecting() -> None:
    async with new_server() as server, raw.Relay(server.address) as relay:
        client, called = new_client(relay.address), asyncio.Event()

        @client.on_disconnect
        async def leave(client: Client, reason: ConnectionClosed) -> None:
            await client.disconnect()
            called.set()

        async with served(client):
            relay.cut()
            await within(called.wait(), SOON)
            await within(client.wait_closed(), SOON)
            await asyncio.sleep(0.1)  # longer than reconnect_delay: it must not come back
            assert client.status is Status.CLOSED
            assert relay.attempts == 1


async def test_a_disconnect_that_is_cancelled_closes_all_the_same() -> None:
    async with new_server() as server:
        client, entered, gone = new_client(server), asyncio.Event(), asyncio.Event()
        begun, go = asyncio.Event(), asyncio.Event()

        @server.rpc
        async def work() -> None:
            begun.set()
            await go.wait()

        @client.on_disconnect
        async def clean_up(client: Client, reason: ConnectionClosed) -> None:
            entered.set()
            try:
                await asyncio.Event().wait()
            finally:
                await gone.wait()

        await client.connect()
        calling = asyncio.ensure_future(client.rpc.call("work"))
        await within(begun.wait(), SOON)
        stopping = asyncio.ensure_future(server.stop(grace=60))  # the client leaves, with a call
        await within(entered.wait(), SOON)
        disconnecting = asyncio.ensure_future(client.disconnect())
        await asyncio.sleep(0)
        assert not disconnecting.done()  # it waits for the hook
        disconnecting.cancel()
        assert isinstance(await outcome(disconnecting), asyncio.CancelledError)
        assert isinstance(await outcome(calling), ConnectionLost)
        gone.set()
        await within(stopping, SOON)  # long before the grace is over
        await client.disconnect()


async def test_a_connect_that_is_cancelled_in_its_hook_leaves_the_client_unconnected(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with new_server() as server:
        client, entered = new_client(server), asyncio.Event()

        @client.on_connect
        async def wait(client: Client) -> None:
            entered.set()
            await asyncio.Event().wait()

        connecting = asyncio.ensure_future(client.connect())
        await within(entered.wait(), SOON)
        connecting.cancel()
        assert isinstance(await outcome(connecting), asyncio.CancelledError)
        status = client.status
        await client.disconnect()
        assert status is Status.CLOSED
        assert re.search("hook on_connect .*wait.* was cancelled before its end", caplog.text)


async def test_connect_may_be_cancelled_at_every_turn() -> None:
    async with new_server() as server:
        client = new_client(server, reconnect_enabled=False)
        for turns in range(1, 25):
            connecting = asyncio.ensure_future(client.connect())
            for _ in range(turns):
                await asyncio.sleep(0)
            connecting.cancel()
            ended = await outcome(connecting)
            expected = Status.READY if ended is None else Status.CLOSED
            assert client.status is expected, (turns, ended)
            await client.disconnect()
        async with served(client):
            assert await client.rpc.call("add", {"a": 1, "b": 2}) == 3
        await until(lambda: not server.connections)
        gc.collect()
        known = [one for one in gc.get_objects() if isinstance(one, Connection)]
        assert [one for one in known if not one.closed] == []  # nobody looks after it any more


async def test_a_link_that_is_lost_while_the_client_disconnects_is_not_made_again() -> None:
    async with new_server(resume_ttl=0.1) as server, raw.Relay(server.address) as relay:
        for turns in range(8):
            client = new_client(relay.address, reconnect_delay=0.001)
            back = asyncio.Event()
            client.on_resume(lambda client, back=back: back.set())
            await client.connect()
            relay.cut()
            await within(back.wait())  # from now on it has connected again once
            relay.cut()
            for _ in range(turns):
                await asyncio.sleep(0)
            await client.disconnect()
            assert client.status is Status.CLOSED, turns
            await until(lambda: not server.connections)


def is_ready(client: Client) -> bool:
    return client.status is Status.READY


async def test_connect_that_is_cancelled_when_it_is_done_leaves_no_connection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told: list[str] = []
    async with new_server() as server:
        for turns in range(5):
            client = new_client(server)

            @client.on_disconnect
            async def gone(client: Client, reason: object) -> None:
                told.append("gone")

            connecting = asyncio.ensure_future(client.connect())
            while not is_ready(client):  # noqa: ASYNC110  # `until` may be late
                await asyncio.sleep(0)
            for _ in range(turns):
                await asyncio.sleep(0)
            connecting.cancel()
            if await outcome(connecting) is None:
                await client.disconnect()
                told.remove("gone")
            assert client.status is Status.CLOSED
            await until(lambda: not server.connections)
    assert told == []
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_success_that_comes_after_connect_has_given_up_changes_nothing() -> None:
    given_up = asyncio.Event()

    async def script(peer: RawPeer) -> None:
        held: list[bytes] = []
        write = peer.write
        peer.write = lambda data: (held if data[5] == raw.AUTH_SUCCESS else sent).append(data)  # type: ignore[method-assign]
        sent: list[bytes] = []
        login = asyncio.ensure_future(peer.accept_login())
        while not login.done():
            await asyncio.sleep(0)
            while sent:
                write(sent.pop(0))
        await given_up.wait()
        write(held[0])

    async with listen(script) as address:
        client = new_client(address, connect_timeout=0.1, reconnect_enabled=False)
        assert isinstance(await outcome(client.connect()), OSError)
        given_up.set()
        await asyncio.sleep(0.05)
        assert client.status is Status.CLOSED


async def test_connect_raises_when_the_server_closes_right_behind_the_login() -> None:
    async def script(peer: RawPeer) -> None:
        write = peer.write
        goodbye = frame(raw.CLOSE, 0, pack([1013, "no room"]))
        peer.write = lambda data: write(data + goodbye * (data[5] == raw.AUTH_SUCCESS))  # type: ignore[method-assign]
        await peer.accept_login()
        await peer.rest()

    async with listen(script) as address:
        client = new_client(address, reconnect_enabled=False)
        assert isinstance(await outcome(client.connect()), ConnectionClosed)
        assert client.status is Status.CLOSED
        await client.disconnect()


async def test_a_handler_may_disconnect_its_client_and_goes_on() -> None:
    async with new_server() as server:
        client, steps = new_client(server), asyncio.Queue[str]()

        @client.on("leave")
        async def leave(message: Any) -> None:
            await asyncio.sleep(0)
            try:
                await client.disconnect()
                steps.put_nowait("went on")
            except asyncio.CancelledError:
                steps.put_nowait("was cancelled by its own disconnect()")
                raise

        async with served(client):
            await server.broadcast("leave")
            assert await within(steps.get(), SOON) == "went on"


# Races: start and stop.


async def test_a_handler_may_stop_the_server() -> None:
    server, finished = new_server(), asyncio.Event()
    server.on_shutdown(lambda server: finished.set())

    @server.rpc
    async def shut_down() -> None:
        await server.stop(grace=0.1)

    await server.start()
    async with served(new_client(server, reconnect_enabled=False)) as client:
        other = new_client(server, reconnect_enabled=False)
        async with served(other):
            await outcome(client.rpc.call("shut_down"), SOON * 2)
            await within(asyncio.wait([asyncio.ensure_future(finished.wait())], timeout=SOON))
            left = len(server.connections)
    await server.stop()
    assert (left, finished.is_set()) == (0, True), "the server has stopped by halves"
    await server.start()
    await server.stop()


async def test_run_returns_when_a_stop_that_somebody_else_has_called_is_done() -> None:
    server, entered = new_server(), asyncio.Event()

    @server.rpc
    async def slow() -> str:
        entered.set()
        await asyncio.sleep(0.1)
        return "done"

    listening = asyncio.Event()
    server.on_startup(lambda server: listening.set())
    running = asyncio.ensure_future(server.run(signals=False))
    await within(listening.wait(), SOON)
    async with served(new_client(server, reconnect_enabled=False)) as client:
        call = asyncio.ensure_future(client.rpc.call("slow"))
        await within(entered.wait(), SOON)
        stopping = asyncio.ensure_future(server.stop())
        await within(running, SOON)
        early = not stopping.done()
        await within(stopping, SOON)
        assert await outcome(call) == "done"
    assert not early, "run() returned first, and its caller would now cancel the stop"


async def test_a_second_stop_returns_when_the_server_has_stopped() -> None:
    server, entered = new_server(), asyncio.Event()

    @server.rpc
    async def slow() -> None:
        entered.set()
        await asyncio.sleep(0.1)

    await server.start()
    async with served(new_client(server, reconnect_enabled=False)) as client:
        call = asyncio.ensure_future(client.rpc.call("slow"))
        await within(entered.wait(), SOON)
        first = asyncio.ensure_future(server.stop())
        await asyncio.sleep(0)
        await within(server.stop(), SOON)
        early = not first.done()
        await within(first, SOON)
        await outcome(call)
    assert not early


async def test_a_stop_takes_its_grace_once() -> None:
    """Not once for handlers, again for peers that do not read, and a third time for hooks."""
    server, entered, grace = new_server(), asyncio.Event(), 3.0
    cut: list[str] = []

    @server.rpc
    async def work() -> None:
        entered.set()
        await never()

    async def never() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cut.append("handler" if len(cut) == 0 else "hook")

    @server.on_client_disconnect
    async def left(connection: Connection, reason: ConnectionClosed) -> None:
        await never()

    await server.start()
    async with stalled(server.address), served(new_client(server, reconnect_enabled=False)) as one:
        call = asyncio.ensure_future(one.rpc.call("work"))
        await within(entered.wait(), SOON)
        began = time.monotonic()
        await within(server.stop(grace=grace), 5 * grace)
        took = time.monotonic() - began
        await outcome(call)
    assert cut == ["handler", "hook", "hook"]
    assert took < 2.5 * grace  # with a second at least for each of what comes behind it


async def test_stop_gives_message_handlers_their_time() -> None:
    server, entered, steps = new_server(), asyncio.Event(), list[str]()

    @server.on("work")
    async def work(connection: Connection, message: Any) -> None:
        entered.set()
        try:
            await asyncio.sleep(0.1)
            steps.append("done")
        except asyncio.CancelledError:
            steps.append("cancelled")
            raise

    await server.start()
    async with served(new_client(server, reconnect_enabled=False)) as client:
        await client.send("work")
        await within(entered.wait(), SOON)
        await within(server.stop(grace=SOON), SOON * 2)
    assert steps == ["done"]


async def test_stop_waits_for_the_handlers_that_it_has_cancelled() -> None:
    server, entered, steps = new_server(), asyncio.Event(), list[str]()
    server.on_shutdown(lambda server: steps.append("shutdown"))

    @server.rpc
    async def slow() -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            steps.append("cleaned up")

    await server.start()
    async with served(new_client(server, reconnect_enabled=False)) as client:
        call = asyncio.ensure_future(client.rpc.call("slow"))
        await within(entered.wait(), SOON)
        await within(server.stop(grace=0), SOON)
        await outcome(call)
    assert steps == ["cleaned up", "shutdown"]


async def test_stop_during_start_leaves_the_server_stopped() -> None:
    server = new_server(password="turned into a verifier, which takes its time")
    starting = asyncio.ensure_future(server.start())
    await asyncio.sleep(0)
    await server.stop()
    await asyncio.gather(starting, return_exceptions=True)
    try:
        with pytest.raises(RuntimeError):
            _ = server.address
    finally:
        await server.stop()


async def test_a_server_is_started_once() -> None:
    server = new_server(password="turned into a verifier, which takes its time")
    results = await asyncio.gather(server.start(), server.start(), return_exceptions=True)
    await server.stop()
    assert sorted(type(one).__name__ for one in results) == ["NoneType", "RuntimeError"]


async def test_a_startup_hook_may_stop_the_server() -> None:
    server = new_server()
    server.on_startup(lambda server: server.stop())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="stopped while it started"):
            await within(server.start(), SOON)


@pytest.mark.parametrize("way", ["start_task", "ensure_future"])
async def test_a_task_of_a_startup_hook_may_stop_the_server(way: str) -> None:
    server = new_server()

    @server.on_startup
    async def start(server: Server) -> None:
        make = server.start_task if way == "start_task" else asyncio.ensure_future
        task = make(server.stop())
        await (task if way == "ensure_future" else asyncio.sleep(60))

    for _ in range(2):
        with pytest.raises(RuntimeError, match="stopped while it started"):
            await within(server.start(), SOON)


async def test_a_shutdown_hook_may_stop_the_server() -> None:
    server = new_server()
    server.on_shutdown(lambda server: server.stop())
    for _ in range(2):
        await server.start()
        await within(server.stop(), SOON)


@pytest.mark.parametrize("grace", [float("inf"), float("nan")])
async def test_a_grace_that_is_no_number_of_seconds_leaves_the_server_as_it_is(
    grace: float,
) -> None:
    async with new_server() as server, new_client(server) as client:
        with pytest.raises(ValueError, match="grace must be a number of seconds"):
            await within(server.stop(grace), SOON)
        await round_trips(client)
    with pytest.raises(ValueError, match="grace must be a number of seconds"):
        await within(server.run(grace=grace), SOON)


async def test_a_call_that_waits_in_line_fails_when_the_server_stops() -> None:
    server, entered = new_server(limits=Limits(max_calls=1)), asyncio.Event()

    @server.rpc
    async def slow() -> str:
        entered.set()
        await asyncio.sleep(0.05)
        return "done"

    await server.start()
    async with served(new_client(server, reconnect_enabled=False)) as client:
        calls = [asyncio.ensure_future(client.rpc.call("slow", timeout=None)) for _ in range(2)]
        await within(entered.wait(), SOON)
        await within(server.stop(grace=SOON), SOON * 2)
        # The answer to the first gives the second its turn, and the end comes in the same read.
        assert await outcome(calls[0]) == "done"
        assert isinstance(await outcome(calls[1]), (ConnectionClosed, RPCError))


@pytest.mark.parametrize("operation", ["send", "request"])
async def test_a_message_that_waits_for_credit_fails_when_credit_and_close_come_together(
    operation: str,
) -> None:
    waits = asyncio.Event()

    async def script(peer: RawPeer) -> None:
        await peer.accept_login(caps={**CAPS, "window": [1, 1 << 20]})
        await peer.until(raw.MESSAGE)
        await waits.wait()
        credit = peer.numbered(raw.STREAM_CREDIT, 0, [1, 100])
        peer.write(credit + frame(raw.CLOSE, 0, pack([1000, "bye"])))
        await peer.rest()

    async with listen(script) as address:
        async with served(new_client(address, reconnect_enabled=False)) as client:
            await client.send("first")
            second = asyncio.ensure_future(getattr(client, operation)("second"))
            await asyncio.sleep(0)
            waits.set()
            assert isinstance(await outcome(second), ConnectionClosed)


# Floods and stalls.


async def test_a_handler_may_send_more_messages_than_fit_although_each_is_answered() -> None:
    server = new_server(limits=Limits(max_messages=8))

    @server.on("record")
    async def record(connection: Connection, message: int) -> int:
        return message

    async with server:
        client = new_client(server, limits=Limits(min_iterations=4096, max_messages=8))
        sent, answered, done = 0, 0, asyncio.Event()

        @client.on("start")
        async def start(message: Any) -> None:
            nonlocal sent
            for sent in range(1, 41):
                await client.send("record", sent)
            done.set()

        @client.on("record_response")
        async def response(message: int) -> None:
            nonlocal answered
            answered += 1

        async with served(client):
            await server.broadcast("start")
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(done.wait(), SOON)
            assert sent == 40
            await until(lambda: answered == 40)


async def flood(server: Server, make: Callable[[RawPeer], bytes], count: int) -> RawPeer:
    """Send frames without ever acknowledging an answer, until the server hangs up."""
    reader, writer = await asyncio.open_connection(*server.address)
    peer = RawPeer(reader, writer)
    await peer.login()
    for number in range(count):
        peer.write(make(peer))
        if number % 50 == 49:
            while not reader.at_eof() and reader._buffer:  # type: ignore[attr-defined]
                await reader.read(1 << 20)
            await asyncio.sleep(0)
        if reader.at_eof():
            break
    return peer


FLOODS: dict[str, Callable[[RawPeer], bytes]] = {
    "unknown methods": lambda peer: peer.numbered(raw.RPC_REQUEST, peer.take_id(), ["nobody", {}]),
    "unknown messages": lambda peer: peer.numbered(raw.MESSAGE, peer.take_id(), ["nobody", None]),
    "answered messages": lambda peer: peer.numbered(raw.MESSAGE, 0, ["large", None]),
    "large results": lambda peer: peer.numbered(raw.RPC_REQUEST, peer.take_id(), ["large", {}]),
}


@pytest.mark.parametrize("kind", FLOODS)
async def test_answers_that_a_peer_never_acknowledges_are_bounded(kind: str) -> None:
    server, made = new_server(limits=Limits(outbox_bytes=50_000)), 0

    @server.on("large")
    async def large_message(connection: Connection, message: Any) -> bytes:
        nonlocal made
        made += 1
        return bytes(20_000)

    @server.rpc("large")
    async def large_result() -> bytes:
        nonlocal made
        made += 1
        return bytes(200_000)

    async with neighbourhood(server):
        peer = await flood(server, FLOODS[kind], 3_000)
        try:
            await until(lambda: len(server.connections) == 1)
        finally:
            peer.writer.transport.abort()
        assert made * (200_000 if kind == "large results" else 20_000) < 20e6


async def test_broadcasts_in_one_turn_do_not_pile_up_for_a_peer_that_does_not_read() -> None:
    async with new_server() as server, stalled(server.address):
        reached = 0
        for _ in range(30):
            reached += await server.broadcast("news", b"x" * 1_000_000)
        assert reached < 12, f"{reached} MB wait for one peer"


@pytest.mark.parametrize("reliable", [True, False])
async def test_a_broadcast_that_is_too_large_ends_nobody(reliable: bool) -> None:
    async with neighbourhood(new_server(limits=Limits(max_payload=4 << 20))) as neighbour:
        with contextlib.suppress(RPCError):
            await neighbour.server.broadcast("news", bytes(2 << 20), reliable=reliable)
        await neighbour.check()


async def test_what_was_sent_arrives_before_the_end_although_the_peer_is_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_module, "LINGER", 0.2)
    async with new_server() as server, stalled(server.address) as peer:
        connection = only(server)
        sent = await fill(connection)
        closing = asyncio.ensure_future(connection.close())
        await asyncio.sleep(0.3)
        arrived = 0
        transport: Any = peer.writer.transport
        transport.resume_reading()
        said = None
        while (got := await peer.receive()) is not None:
            arrived += got.type == raw.MESSAGE
            said = got.type
        peer.writer.close()
        await within(closing)
        assert (arrived, said) == (sent, raw.CLOSE)


async def test_messages_sent_before_disconnect_are_handled() -> None:
    server, handled, last = new_server(), list[int](), asyncio.Event()

    @server.on("log")
    async def log(connection: Connection, message: int) -> None:
        await asyncio.sleep(0)
        handled.append(message)
        if message == 9:
            last.set()

    async with server:
        async with served(new_client(server)) as client:
            for number in range(10):
                await client.send("log", number)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(last.wait(), SOON)
        assert handled == list(range(10))


async def test_handlers_of_a_client_that_has_left_end_with_the_server_at_the_latest() -> None:
    server, entered, ended = new_server(), asyncio.Event(), list[str]()

    @server.on("work")
    async def work(connection: Connection, message: Any) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("work")

    await server.start()
    async with served(new_client(server)) as client:
        await client.send("work")
        await client.send("work")
        await within(entered.wait(), SOON)
    await until(lambda: not server.connections)
    await within(server.stop(grace=0), SOON)
    left = [one for one in asyncio.all_tasks() if one is not asyncio.current_task()]
    for task in left:
        task.cancel()
    assert ended, "its handler runs on although the server has stopped"


async def test_a_stalled_peer_slows_nobody_down() -> None:
    async with (
        neighbourhood(new_server()) as neighbour,
        stalled(neighbour.server.address),
    ):
        stuck = [one for one in neighbour.server.connections.values() if one.name == "raw"]
        sending = [asyncio.ensure_future(stuck[0].send("news", b"x" * 200_000)) for _ in range(60)]
        started = time.monotonic()
        await neighbour.check()
        for task in sending:
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)
        assert time.monotonic() - started < SOON


async def test_an_ended_connection_lets_go_of_its_outbox() -> None:
    server, gone = new_server(), list[Connection]()
    server.on_client_disconnect(lambda connection, reason: gone.append(connection))
    async with server:
        async with stalled(server.address):
            for _ in range(2):  # what the kernel takes
                await only(server).send("news", b"x" * 100_000)
        await until(lambda: gone)
        assert gone[0].protocol.session.outbox_bytes == 0


# Handlers and hooks that misbehave.


class WithoutSuper(RPCError):
    """An error of an application that forgets about its base."""

    def __init__(self, value: int) -> None:
        self.value = value


ERRORS: dict[str, Callable[[], BaseException]] = {
    "an exception for a message": lambda: PermissionDenied(ValueError("why")),  # type: ignore[arg-type]
    "no message": lambda: PermissionDenied(None),  # type: ignore[arg-type]
    "a lone surrogate": lambda: PermissionDenied("\udc80"),
    "no call of the base": lambda: WithoutSuper(1),
    "keys that are no text": lambda: PermissionDenied("no", details={"by": {1: 2}}),
    "details that cannot be sent": lambda: PermissionDenied("no", details={"by": object()}),
    "StopIteration": lambda: StopIteration(1),
    "GeneratorExit": lambda: GeneratorExit(),
}


@pytest.mark.parametrize("kind", ERRORS)
async def test_whatever_a_handler_raises_is_an_answer_and_harms_nothing(
    kind: str,
) -> None:
    server, make = new_server(), ERRORS[kind]

    @server.rpc
    async def at_once() -> None:
        raise make()

    @server.rpc
    async def later() -> None:
        await asyncio.sleep(0)
        raise make()

    @server.rpc
    def thread() -> None:
        raise make()

    @server.on("message")
    async def message(connection: Connection, message: Any) -> None:
        raise make()

    async with neighbourhood(server) as neighbour:
        client = neighbour.client
        answers = [
            await outcome(client.rpc.call(method, timeout=SOON / 2))
            for method in ("at_once", "later", "thread")
        ]
        answers.append(await outcome(client.request("message", timeout=SOON / 2)))
        for answer in answers:
            assert isinstance(answer, RPCError), answer
            assert not isinstance(answer, RPCTimeout), answer


async def test_a_connect_hook_may_not_ping_and_harms_nothing_by_it() -> None:
    server, told = new_server(), list[BaseException]()

    @server.on_client_connect
    async def hook(connection: Connection) -> None:
        try:
            await asyncio.wait_for(connection.ping(), 0.1)
        except (RuntimeError, asyncio.TimeoutError) as exc:
            told.append(exc)

    async with server, served(new_client(server)) as client:
        assert await client.rpc.call("add", {"a": 1, "b": 2}) == 3
    assert told


class Unexpected(BaseException):
    """Not an `Exception`."""


class Mute(RPCError):
    """A refusal that cannot say why."""

    def __str__(self) -> str:
        raise ValueError("no words")


@pytest.mark.parametrize("error", [Unexpected, asyncio.CancelledError, Mute])
async def test_a_connect_hook_that_ends_in_an_odd_way_refuses_at_once(
    error: type[BaseException],
) -> None:
    server = new_server()

    @server.on_client_connect
    async def hook(connection: Connection) -> None:
        raise error

    async with server:
        assert isinstance(await outcome(new_client(server).connect()), AuthenticationError)


@pytest.mark.parametrize("what", ["lookup", "hook"])
async def test_what_a_login_waits_for_ends_with_the_login(what: str) -> None:
    started, ended = 0, 0

    async def hang(*args: Any) -> str | None:
        nonlocal started, ended
        started += 1
        try:
            await asyncio.Event().wait()
        finally:
            ended += 1
        return None

    limits = Limits(login_timeout=0.1)
    if what == "lookup":
        server = new_server(users=hang, limits=limits)
    else:
        server = new_server(limits=limits)
        server.on_client_connect(hang)
    await server.start()
    try:
        for _ in range(3):
            async with raw.dial(server.address) as peer:
                with contextlib.suppress(raw.LoginRefused, AssertionError):
                    await peer.login()
        assert started == 3
        await until(lambda: ended == 3)
    finally:
        await server.stop(grace=0)


async def test_calls_queued_for_a_thread_do_not_run_for_those_who_have_gone() -> None:
    server, release, ran = (
        new_server(limits=Limits(max_calls=200)),
        threading.Event(),
        list[int](),
    )

    @server.rpc
    def wait(number: int) -> None:
        ran.append(number)
        release.wait(SOON)

    async with neighbourhood(server) as neighbour:
        client = new_client(server, reconnect_enabled=False)
        async with served(client):
            calls = [
                asyncio.ensure_future(client.rpc.call("wait", {"number": number}))
                for number in range(150)
            ]
            await until(lambda: len(ran) == 64)  # the threads of the pool
        await asyncio.gather(*calls, return_exceptions=True)
        release.set()
        await outcome(neighbour.client.rpc.call("wait", {"number": 999}))
        assert len(ran) < 100, f"{len(ran) - 65} calls of a client that has gone were run"


async def test_a_thread_that_asks_for_the_loop_while_it_ends_does_not_hang_the_process() -> None:
    output = await program(
        """
server = new_server()
@server.rpc
def work() -> int:
    for _ in range(3):
        try:
            from_thread.run(asyncio.sleep, 60)
        except BaseException as exc:
            print(type(exc).__name__, flush=True)
async def main():
    await server.start()
    client = new_client(server, reconnect_enabled=False)
    await client.connect()
    call = asyncio.ensure_future(client.rpc.call("work", timeout=0.1))
    await asyncio.gather(call, return_exceptions=True)
    # The default executor is waited for after the tasks were cancelled and before the loop ends.
    asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.3)
    await client.disconnect()
    await server.stop(grace=0)
run(main())
print("ended", flush=True)
""",
        6,
    )
    assert "ended" in output, output


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
async def test_a_process_that_was_forked_has_threads_of_its_own() -> None:
    output = await program(
        """
def once(password):
    async def main():
        server = Server(verifier=make_verifier(password), host="127.0.0.1", port=0)
        @server.rpc
        def in_a_thread() -> int:
            return 7
        async with server:
            client = new_client(server, password=password, connect_timeout=1)
            await client.connect()
            try:
                return await client.rpc.call("in_a_thread", timeout=1)
            finally:
                await client.disconnect()
    return run(main())
assert once("first password") == 7
for number, password in enumerate(("first password", "second password")):
    pid = os.fork()
    if pid == 0:
        try:
            print("child", number, once(password), flush=True)
        except BaseException as exc:
            print("child", number, repr(exc), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
""",
        10,
    )
    assert "child 0 7" in output and "child 1 7" in output, output


# Logins.


async def challenge(server: Server, user: str) -> dict[str, str]:
    """Ask to log in as a user and return what the server says."""
    async with raw.dial(server.address) as peer:
        nonce = raw.b64(os.urandom(18))
        request = {"v": 1, "mech": "SCRAM-SHA-256", "scram": f"n,,n={user},r={nonce}"}
        body = {**request, "caps": CAPS, "session": None, "agent": "raw/1.0"}
        peer.write(frame(raw.AUTH_REQUEST, 1, pack(body)))
        got = await peer.until(raw.AUTH_CHALLENGE)
        return raw.attributes(got.body["scram"])


@pytest.mark.parametrize("salt", [b"salt of 16 bytes", b"a salt that has 24 bytes"])
async def test_the_challenge_does_not_tell_who_exists(salt: bytes) -> None:
    users = {name: raw.make_verifier(salt=salt) for name in ("alice", "bob")}
    async with new_server(users=users) as server:
        known, unknown = (
            await challenge(server, "alice"),
            await challenge(server, "mallory"),
        )
    assert known["i"] == unknown["i"]
    assert len(known["s"]) == len(unknown["s"])


@pytest.mark.parametrize(
    "fields",
    [
        {"heartbeat_interval": 1e7, "heartbeat_timeout": 2e7},
        {"heartbeat_interval": 0.0001, "heartbeat_timeout": 1.0},
        {"rpc_timeout": 1e7},
    ],
)
async def test_a_descriptor_is_refused_or_its_clients_can_log_in(
    fields: dict[str, float],
) -> None:
    try:
        server = new_server(**fields)
    except ValueError:
        return
    async with server, served(new_client(server)) as client:
        assert await client.rpc.call("add", {"a": 1, "b": 2}) == 3


async def test_a_server_that_is_full_is_passed_over_for_the_next() -> None:
    async with new_server(max_connections=1) as full, new_server() as free:
        async with served(new_client(full)):
            urls = [f"tcp://127.0.0.1:{server.address[1]}" for server in (full, free)]
            client = Client(urls, password=PASSWORD, limits=FAST_LOGIN)
            async with served(client):
                assert len(free.connections) == 1


# Heartbeats.


async def test_a_stall_that_is_longer_than_the_timeout_ends_nobody() -> None:
    server = new_server(heartbeat_interval=0.1, heartbeat_timeout=0.3)
    async with neighbourhood(server) as neighbour:
        for _ in range(2):
            time.sleep(0.6)  # a handler that blocks the loop of both sides
            await asyncio.sleep(0.15)
        await neighbour.check()


async def test_no_socket_outlives_a_server_that_has_stopped() -> None:
    loop = asyncio.get_running_loop()
    with socket.socket() as peer:
        peer.setblocking(False)
        async with Server(host="127.0.0.1", port=0, password=PASSWORD) as server:
            await loop.sock_connect(peer, server.address)
            await loop.sock_sendall(peer, b"GET / HTTP/1.1\r\n\r\n" + bytes(32))
            while await loop.sock_recv(peer, 4096):
                pass  # until the server has said its last word; it waits for this side's
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            peer.send(b"is anybody there?")  # answered by a reset
            peer.send(b"then not")


async def come_and_go(server: Server) -> list[weakref.ref[Any]]:
    """Connect, use the connection and leave; return what is to be freed then."""
    client = new_client(server)
    async with client:
        assert await within(client.rpc.call("add", {"a": 1, "b": 2})) == 3
        async with client.rpc.stream("add", {"a": 1, "b": 2}) as run:
            assert await within(run.result()) == 3
        (peer,) = (one for one in server.connections.values() if one.name == client.descriptor.name)
        made = [weakref.ref(one) for one in (client, client.connection, peer)]
    await within(peer.wait_closed())
    return made


async def test_connections_that_have_ended_need_no_garbage_collection() -> None:
    async with new_server() as server, new_client(server, name="neighbour"):
        gc.collect()
        gc.disable()
        try:
            made = [one for _ in range(3) for one in await come_and_go(server)]
            # What has come last is acknowledged a moment later, by a timer that knows who it is.
            await until(lambda: not any(one() for one in made))
        finally:
            gc.enable()
