"""Listening and connecting: which addresses are tried, who is admitted, and what errors say."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from typing import Any

import pytest

from conduit.admission import Admission, Visit
from conduit.descriptors import Address
from conduit.transport.connection import Connection
from conduit.transport.listeners import Listener, bind, connect
from conduit.transport.tls import Shown
from tests.acceptance.support import free_port, has_ipv6
from tests.transport.pair import Side, settings, turns, until, within

needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")


def admitting(most: int = 256, proxies: tuple[str, ...] = ()) -> Admission:
    return Admission(most=most, most_per_source=most, exempt=["127.0.0.0/8"], proxies=proxies)


@contextlib.asynccontextmanager
async def listening(
    host: str = "127.0.0.1",
    *,
    ipv6: bool = False,
    port: int = 0,
    tls: ssl.SSLContext | None = None,
    admission: Admission | None = None,
) -> AsyncIterator[tuple[Address, list[Side], Listener]]:
    """Give an address, the sides that are made for whoever connects, and the listener."""
    sides: list[Side] = []

    def make(visit: Visit, link: Any, transport: Any, binding: Any) -> Connection:
        visit.end()
        sides.append(Side(settings(), accepting=True))
        return sides[-1].connection

    bound = await bind(Address(host=host, port=port), ipv6=ipv6)
    address = Address(host=host, port=bound.getsockname()[1])
    shown = None if tls is None else Shown(tls, None)
    listener = Listener(bound, shown, admission or admitting(), make)
    try:
        yield address, sides, listener
    finally:
        await within(listener.close())
        for side in sides:
            await within(side.connection.close())
            if not side.ready.cancel() and not side.ready.cancelled():
                side.ready.exception()


async def dial(address: Address, *, ipv6: bool = False, tls: Any = None) -> Side:
    """Connect and log in."""
    side = Side(settings(), accepting=False)
    made = await connect(
        address,
        lambda link, transport: side.connection,
        tls=tls,
        server_name=None,
        prefer_ipv6=ipv6,
        patience=10.0,
    )
    assert made is side.connection
    await within(side.ready)
    return side


@pytest.mark.parametrize(
    "host, ipv6",
    [
        ("127.0.0.1", False),
        ("localhost", False),
        pytest.param("::1", False, marks=needs_ipv6),
        pytest.param("::1", True, marks=needs_ipv6),
    ],
)
async def test_who_connects_gets_a_connection(host: str, ipv6: bool) -> None:
    async with listening(host, ipv6=ipv6) as (address, sides, listener):
        client = await dial(address, ipv6=ipv6)
        (server,) = sides
        await within(server.ready)
        assert listener.starting == 0
        assert not client.connection.closed and not server.connection.closed
        await within(client.connection.close())


@needs_ipv6
@pytest.mark.parametrize("where", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("prefer_ipv6", [False, True])
async def test_every_address_of_a_name_is_tried(where: str, prefer_ipv6: bool) -> None:
    infos = await asyncio.get_running_loop().getaddrinfo("localhost", 1, type=socket.SOCK_STREAM)
    if {info[4][0] for info in infos} != {"127.0.0.1", "::1"}:
        pytest.skip("localhost does not have both kinds of address here")
    async with listening(where) as (address, _, _):
        client = await dial(Address(host="localhost", port=address.port), ipv6=prefer_ipv6)
        await within(client.connection.close())


async def test_a_listener_that_is_closed_leaves_its_connections_alone() -> None:
    async with listening() as (address, sides, listener):
        client = await dial(address)
        await within(listener.close())
        await within(client.connection.ping())
        with pytest.raises(ConnectionRefusedError):
            await dial(address)
        assert len(sides) == 1
        await within(client.connection.close())


async def test_who_is_not_admitted_is_cut_off_at_once() -> None:
    async with listening(admission=admitting(0)) as (address, sides, _):
        with socket.create_connection((address.host, address.port)) as peer:
            peer.setblocking(False)
            with pytest.raises(ConnectionResetError):
                await within(asyncio.get_running_loop().sock_recv(peer, 1))
        assert sides == []


async def test_one_that_is_admitted_later_gets_in() -> None:
    admission = admitting(1)
    first = admission.enter(("127.0.0.1", 1))
    assert first is not None
    async with listening(admission=admission) as (address, sides, _):
        with socket.create_connection((address.host, address.port)) as peer:
            peer.setblocking(False)
            with pytest.raises(ConnectionResetError):
                await within(asyncio.get_running_loop().sock_recv(peer, 1))
        first.end()
        client = await dial(address)
        assert len(sides) == 1
        await within(client.connection.close())


async def test_a_client_that_does_not_speak_tls_is_counted_and_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "conduit.server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    async with listening(tls=context) as (address, sides, listener):
        with socket.create_connection((address.host, address.port)) as peer:
            peer.setblocking(False)
            await until(lambda: listener.starting == 1)
            peer.send(b"GET / HTTP/1.1\r\n\r\n")
            await until(lambda: listener.starting == 0)
        assert sides == []
    assert "did not complete the TLS handshake: [SSL: " in caplog.text
    assert "('127.0.0.1', " in caplog.text


@pytest.mark.parametrize("wait", [0, 1, 2, 3, 4, 10])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_to_close_closes_the_sockets_that_are_not_connections_yet(
    tls: bool, wait: int
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if tls else None
    admission = admitting()
    async with listening(tls=context, admission=admission) as (address, _, listener):
        with socket.create_connection((address.host, address.port)) as peer:
            peer.setblocking(False)
            await until(lambda: listener.starting)
            await turns(wait)
            await within(listener.close())
            assert admission.visits == 0
            if tls:  # without it, a socket is a connection at once
                assert listener.starting == 0
                with contextlib.suppress(ConnectionResetError):
                    received = asyncio.get_running_loop().sock_recv(peer, 1)
                    assert await within(received, 1) == b""


async def test_a_socket_that_cannot_accept_is_logged_and_can_be_closed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bound = await bind(Address(host="127.0.0.1", port=0), ipv6=False)
    listener = Listener(bound, None, admitting(), lambda *_: None)  # type: ignore[arg-type]
    await turns()
    bound.shutdown(socket.SHUT_RDWR)  # as good as a process that has no descriptor left
    await until(lambda: "cannot accept a connection" in caplog.text)
    await within(listener.close(), 0.9)
    assert caplog.text.count("cannot accept") == 1, "it waits before it tries again"


async def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    with pytest.raises(OSError, match=r"cannot listen on tcp://192\.0\.2\.1:80") as caught:
        await bind(Address(host="192.0.2.1", port=80), ipv6=False)
    assert caught.value.errno is not None


async def test_an_address_that_is_in_use_says_so_and_gives_its_socket_back() -> None:
    async with listening() as (address, _, _):
        with pytest.raises(OSError, match=r"another program listens there.*0 takes a free one"):
            await bind(address, ipv6=False)


async def test_an_address_where_nobody_listens_says_so() -> None:
    address = Address(host="127.0.0.1", port=free_port())
    with pytest.raises(ConnectionRefusedError) as caught:
        await dial(address)
    assert f"cannot connect to {address}" in str(caught.value)
    assert "is the server running" in str(caught.value)


async def test_tls_with_a_server_that_has_none_says_so() -> None:
    async with listening() as (address, _, _):
        context = ssl.create_default_context()
        with pytest.raises((ssl.SSLError, OSError)) as caught:
            await within(dial(address, tls=context))
        assert str(address.port) in str(caught.value)
        if isinstance(caught.value, ssl.SSLError):
            assert "does the server speak TLS on this port?" in str(caught.value)
