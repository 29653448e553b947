"""The door of a server: how many may try to log in, who is sent away, and what proxies say.

Clients come from several addresses of the loopback network, which is not exempt here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import struct
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from conduit import TLS, Connection, Limits, Server
from tests.acceptance import raw
from tests.acceptance.raw import RawPeer, dial
from tests.acceptance.support import new_client, new_server, round_trips, until, within
from tests.conftest import LONG

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux has the whole of 127.0.0.0/8"
)

CROWD = 5_000 if LONG else 200
FRIEND, ENEMY, PROXY = "127.0.0.2", "127.0.0.3", "127.0.0.4"


class Material:
    """Both sides of TLS."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.certificate = folder / "server.pem"
        issued = authority.issue_cert("localhost")
        issued.private_key_and_cert_chain_pem.write_to_path(str(self.certificate))
        self.client = ssl.create_default_context()
        authority.configure_trust(self.client)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(tmp_path_factory.mktemp("certificates"))


def strict_server(**fields: Any) -> Server:
    """Return a server for which loopback is an address like any other."""
    return new_server(**{"exempt": (), **fields})


async def refuses(server: Server, source: str) -> bool:
    """Tell whether a server resets connections from an address without a word."""
    try:
        async with dial(server.address, source=source) as peer:
            peer.write(raw.frame(raw.AUTH_REQUEST, 1, b"\x80"))
            await asyncio.wait_for(peer.reader.read(1), raw.TIMEOUT)
    except ConnectionError:
        return True
    return False


async def logs_in(server: Server, source: str, **options: Any) -> None:
    async with dial(server.address, source=source, **options) as peer:
        await peer.login()
        assert await peer.call("add", {"a": 1, "b": 2}) == 3


async def guess(server: Server, source: str, **options: Any) -> None:
    async with dial(server.address, source=source, **options) as peer:
        with pytest.raises(raw.LoginRefused):
            await peer.login("a wrong guess")
        await peer.closed()


async def test_three_wrong_passwords_close_the_door_to_their_address_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with strict_server() as server:
        for _ in range(3):
            await guess(server, ENEMY)
        assert await refuses(server, ENEMY)
        await logs_in(server, FRIEND)
    (warning,) = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert f"{ENEMY} are refused for 15 s, because of wrong passwords" in warning.message


@pytest.mark.parametrize("where", ["header", "login"])
async def test_a_client_of_another_version_is_no_enemy(where: str) -> None:
    request = {"v": 2, "mech": "SCRAM-SHA-256", "scram": "n,,n=default,r=x", "caps": raw.CAPS}
    body = raw.pack({**request, "session": None, "agent": "raw/2.0"})
    async with strict_server() as server:
        for _ in range(5):
            async with dial(server.address, source=FRIEND) as peer:
                version = 2 if where == "header" else 1
                peer.write(raw.frame(raw.AUTH_REQUEST, 1, body, version=version))
                failure = await peer.until(raw.AUTH_FAILURE)
                assert failure.body["code"] == "unsupported_version"
                await peer.closed()
        await logs_in(server, FRIEND)


async def test_a_client_that_is_refused_is_told_what_may_be_the_matter() -> None:
    async with strict_server() as server:
        for _ in range(3):
            await guess(server, "127.0.0.1")
        # The reset may come while it connects, or when it begins to log in.
        with pytest.raises(ConnectionError, match="have logins from here failed|reset"):
            await within(new_client(server, reconnect_enabled=False).connect())


@pytest.mark.parametrize("times, bad", [(2, raw.HTTP), (2, bytes(64)), (15, b"")])
async def test_so_do_bytes_that_break_the_rules_and_visits_without_a_word(
    times: int, bad: bytes
) -> None:
    async with strict_server() as server:
        for _ in range(times):
            async with dial(server.address, source=ENEMY) as peer:
                peer.write(bad)
                peer.writer.write_eof()
                await peer.rest()
        await until(lambda: not server._clients.admission.visits)
        assert await refuses(server, ENEMY)
        await logs_in(server, FRIEND)


async def test_so_do_logins_that_take_too_long() -> None:
    async with strict_server(limits=Limits(login_timeout=0.05)) as server:
        for _ in range(2):
            async with dial(server.address, source=ENEMY) as peer:
                said = await peer.closed()
                assert said is not None and said[0] == 4408
        assert await refuses(server, ENEMY)


@pytest.mark.parametrize("ending", ["timeout", "garbage"])
async def test_so_do_tls_handshakes_that_fail(material: Material, ending: str) -> None:
    tls = TLS(certificate=material.certificate)
    async with strict_server(tls=tls, limits=Limits(login_timeout=0.1)) as server:
        for _ in range(2):
            async with dial(server.address, source=ENEMY) as peer:
                peer.write(raw.HTTP if ending == "garbage" else b"")
                await peer.rest()
        await until(lambda: not server._clients.admission.visits)
        assert await refuses(server, ENEMY)
        await logs_in(server, FRIEND, tls=material.client)


async def test_a_client_that_does_not_trust_the_certificate_is_no_enemy(
    material: Material,
) -> None:
    async with strict_server(tls=TLS(certificate=material.certificate)) as server:
        for _ in range(5):
            with pytest.raises(ssl.SSLError):
                async with dial(server.address, source=ENEMY, tls=ssl.create_default_context()):
                    pass
        await until(lambda: not server._clients.admission.visits)
        await logs_in(server, ENEMY, tls=material.client)


async def test_clients_with_the_right_password_may_share_an_address() -> None:
    async with strict_server(limits=Limits(max_pending_per_address=5)) as server:

        async def visit() -> None:
            async with new_client(server, reconnect_enabled=False) as client:
                await round_trips(client, 1)

        for _ in range(20):
            await asyncio.gather(*(visit() for _ in range(5)))


async def test_whom_the_server_keeps_waiting_has_done_nothing_wrong() -> None:
    async def find(user: str) -> str | None:
        await asyncio.Event().wait()
        return None

    # Long enough for the client to have asked in time: the rest is the server's fault.
    server = strict_server(users=find, limits=Limits(login_timeout=0.2))
    async with server:
        for _ in range(3):
            async with dial(server.address, source=FRIEND) as peer:
                with pytest.raises(AssertionError, match="the login took more than"):
                    await peer.login()
        assert not await refuses(server, FRIEND)


async def test_users_that_are_looked_up_are_penalised_all_the_same() -> None:
    async def find(user: str) -> str | None:
        await asyncio.sleep(0)
        return raw.VERIFIER

    async with strict_server(users=find) as server:
        for _ in range(3):
            await guess(server, ENEMY)
        assert await refuses(server, ENEMY)


async def test_loopback_is_exempt_unless_it_is_told_otherwise() -> None:
    async with new_server() as server:
        for _ in range(10):
            await guess(server, ENEMY)
        await logs_in(server, ENEMY)


async def test_a_server_that_starts_again_has_all_its_places() -> None:
    server = strict_server(limits=Limits(max_pending_logins=2))
    for _ in range(3):
        async with server, dial(server.address, source=ENEMY), dial(server.address, source=FRIEND):
            await until(lambda: server._clients.admission.visits == 2)
        assert server._clients.admission.visits == 0


# Crowds.


@contextlib.asynccontextmanager
async def crowd(server: Server, sources: list[str]) -> AsyncIterator[list[socket.socket]]:
    """Connect from each address and say nothing; the sockets may have been reset already."""
    loop, sockets = asyncio.get_running_loop(), list[socket.socket]()
    try:
        for source in sources:
            sock = socket.socket()
            sockets.append(sock)
            sock.setblocking(False)
            sock.bind((source, 0))
            with contextlib.suppress(ConnectionError):
                await within(loop.sock_connect(sock, server.address))
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


def held(sockets: list[socket.socket]) -> int:
    """Count the sockets that the server has not closed."""
    count = 0
    for sock in sockets:
        with contextlib.suppress(ConnectionError):
            try:
                count += bool(sock.recv(4096))
            except BlockingIOError:
                count += 1
    return count


async def answered_within_a_second(server: Server, **options: Any) -> None:
    """Log in, at the second or third attempt if need be, as a client that connects does."""
    start = time.monotonic()
    while True:
        try:
            await logs_in(server, FRIEND, **options)
        except ConnectionError:
            await asyncio.sleep(0.1)
        else:
            break
        finally:
            assert time.monotonic() - start < 1


@pytest.mark.long
@pytest.mark.parametrize("over", ["tcp", "tls"])
@pytest.mark.parametrize("slow", [False, True], ids=["silent", "slow"])
async def test_a_crowd_from_one_address_has_its_places_and_leaves_the_others(
    over: str, slow: bool, material: Material
) -> None:
    tls = TLS(certificate=material.certificate) if over == "tls" else None
    options = {"tls": material.client} if over == "tls" else {}
    limits = Limits(login_timeout=1.5)
    async with strict_server(tls=tls, limits=limits) as server:
        start = time.monotonic()
        async with crowd(server, [ENEMY] * CROWD) as sockets:
            # The first 32 have the places until their time is up, and nobody else has one.
            assert server._clients.admission.visits <= 32
            if slow:
                for sock in sockets:
                    with contextlib.suppress(OSError):
                        sock.send(b"\x16" if tls else b"C")
            await answered_within_a_second(server, **options)
            if time.monotonic() - start < limits.login_timeout / 2:
                await until(lambda: held(sockets) == 32)
            await until(lambda: held(sockets) == 0)
            if CROWD <= 200:
                assert time.monotonic() - start < limits.login_timeout + 1
            assert await refuses(server, ENEMY)
            await answered_within_a_second(server, **options)


@pytest.mark.long
@pytest.mark.parametrize("over", ["tcp", "tls"])
@pytest.mark.parametrize("exempt", [(), ("127.0.0.0/8",)], ids=["counted", "exempt"])
async def test_a_crowd_from_everywhere_gives_way_to_who_logs_in(
    exempt: tuple[str, ...], over: str, material: Material
) -> None:
    tls = TLS(certificate=material.certificate) if over == "tls" else None
    options = {"tls": material.client} if over == "tls" else {}
    everywhere = [f"127.0.{number // 250 + 1}.{number % 250 + 1}" for number in range(CROWD)]
    limits = Limits(max_pending_logins=64, login_timeout=1.5)
    async with new_server(tls=tls, limits=limits, exempt=exempt) as server:
        async with crowd(server, everywhere) as sockets:
            assert 32 < server._clients.admission.visits <= 64
            await until(lambda: held(sockets) == server._clients.admission.visits)
            await answered_within_a_second(server, **options)
            await until(lambda: not server._clients.admission.visits)
            await until(lambda: held(sockets) == 0)


# Proxies.


def version_1(source: str) -> bytes:
    return f"PROXY TCP4 {source} 192.0.2.99 5000 8080\r\n".encode()


def version_2(source: str) -> bytes:
    addresses = socket.inet_aton(source) + socket.inet_aton("192.0.2.99")
    body = addresses + struct.pack("!HH", 5000, 8080)
    return b"\r\n\r\n\0\r\nQUIT\n" + struct.pack("!BBH", 0x21, 0x11, len(body)) + body


HEADERS = pytest.mark.parametrize("header", [version_1, version_2])
BEHIND: dict[str, Any] = {"exempt": (), "proxies": (f"{PROXY}/32",)}


@contextlib.asynccontextmanager
async def addressed(**fields: Any) -> AsyncIterator[tuple[Server, list[Any]]]:
    """Run a server behind a proxy, which notes where its clients come from."""
    server, addresses = new_server(**{**BEHIND, **fields}), list[Any]()

    @server.on_client_connect
    async def connected(connection: Connection) -> None:
        addresses.append(connection.address)

    async with server:
        yield server, addresses


@HEADERS
@pytest.mark.parametrize("over", ["tcp", "tls"])
async def test_the_address_is_what_the_proxy_says(
    header: Any, over: str, material: Material
) -> None:
    tls = TLS(certificate=material.certificate) if over == "tls" else None
    options = {"tls": material.client} if over == "tls" else {}
    async with addressed(tls=tls) as (server, addresses):
        await logs_in(server, PROXY, header=header("203.0.113.7"), **options)
        assert addresses == [("203.0.113.7", 5000)]


@HEADERS
async def test_a_header_may_come_in_pieces_and_together_with_the_login(header: Any) -> None:
    async with addressed() as (server, addresses):
        async with dial(server.address, source=PROXY) as peer:
            pieces: list[bytes] = [header("203.0.113.7")]

            async def write(data: bytes) -> None:
                whole = b"".join(pieces) + data
                pieces.clear()
                await peer.write_slowly(whole[:60])
                peer.write(whole[60:])

            await peer.login(write=write)
        async with dial(server.address, source=PROXY) as peer:
            pieces = [header("203.0.113.8")]

            async def write_at_once(data: bytes) -> None:
                peer.write(b"".join(pieces) + data)
                pieces.clear()

            await peer.login(write=write_at_once)
        assert addresses == [("203.0.113.7", 5000), ("203.0.113.8", 5000)]


@pytest.mark.parametrize("local", [b"PROXY UNKNOWN\r\n", b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"])
async def test_a_proxy_that_speaks_for_itself_has_its_own_address(local: bytes) -> None:
    async with addressed() as (server, addresses):
        for _ in range(30):  # health checks
            async with dial(server.address, source=PROXY, header=local) as peer:
                peer.writer.write_eof()
                assert await peer.rest() == b""
        await logs_in(server, PROXY, header=local)
        assert addresses[0][0] == PROXY


@HEADERS
async def test_nobody_else_is_believed(header: Any) -> None:
    async with addressed() as (server, addresses):
        async with dial(server.address, source=FRIEND, header=header("203.0.113.7")) as peer:
            assert await peer.rest() == b""
        await logs_in(server, FRIEND)
        assert [address[0] for address in addresses] == [FRIEND]


BAD_HEADERS = {
    "none": raw.frame(raw.AUTH_REQUEST, 1, b"\x80"),
    "bad": b"PROXY TCP4 nowhere 192.0.2.99 5000 8080\r\n",
    "endless": b"PROXY UNKNOWN " + b"x" * 1000,
    "huge": b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff" + bytes(60_000),
    "cut": b"PROXY TCP4 203.0.113.7",
    "late": b"",
}


@pytest.mark.parametrize("name", BAD_HEADERS)
async def test_a_proxy_must_say_whom_it_speaks_for(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with addressed(limits=Limits(login_timeout=0.1)) as (server, addresses):
        for _ in range(20):
            try:
                async with dial(server.address, source=PROXY, header=BAD_HEADERS[name]) as peer:
                    if name == "cut":
                        peer.writer.write_eof()
                    assert await peer.rest() == b""
            except ConnectionError:  # reset while the header is still being sent
                pass
            if name == "late":
                break
        await until(lambda: not server._clients.admission.visits)
        assert addresses == []
    assert f"a connection of the proxy {PROXY} is closed: " in caplog.text


async def test_penalties_behind_a_proxy_are_the_clients(caplog: pytest.LogCaptureFixture) -> None:
    async with addressed() as (server, _):
        for _ in range(3):
            await guess(server, PROXY, header=version_2("203.0.113.7"))
        with pytest.raises((ConnectionError, AssertionError, raw.LoginRefused)):
            await logs_in(server, PROXY, header=version_2("203.0.113.7"))
        await logs_in(server, PROXY, header=version_2("203.0.113.8"))
        assert "connections from 203.0.113.7 are refused" in caplog.text


async def test_a_server_stops_while_proxies_are_silent() -> None:
    server = new_server(**BEHIND)
    await server.start()
    async with dial(server.address, source=PROXY) as peer:
        await until(lambda: server._clients.admission.visits == 1)
        await within(server.stop(), 1)
        assert await peer.rest() == b""
        assert server._clients.admission.visits == 0


async def test_the_time_for_the_login_begins_before_tls(material: Material) -> None:
    limits = Limits(login_timeout=0.6)
    async with strict_server(tls=TLS(certificate=material.certificate), limits=limits) as server:
        start = time.monotonic()
        sock = socket.create_connection(server.address)
        sock.setblocking(False)
        await asyncio.sleep(0.4)  # the time that TLS takes is what is measured
        reader, writer = await within(
            asyncio.open_connection(sock=sock, ssl=material.client, server_hostname="localhost")
        )
        peer = RawPeer(reader, writer)
        said = await peer.closed()
        await peer.close()
        assert said is not None and said[0] == 4408
        assert time.monotonic() - start < 0.9
