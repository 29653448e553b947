"""A server behind HAProxy: the PROXY protocol, TLS that passes it or ends there, cut links."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from conduit import TLS, AuthenticationError, Client, Connection, Server
from tests.acceptance import raw
from tests.acceptance.raw import dial
from tests.acceptance.support import (
    free_port,
    has_ipv6,
    issue_certificate,
    new_client,
    new_server,
    round_trips,
    until,
    within,
)
from tests.peers.haproxy import SOURCE, haproxy

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux has the whole of 127.0.0.0/8"
)

FRIEND, ENEMY = "127.0.0.2", "127.0.0.3"
HEADERS = pytest.mark.parametrize("header", ["send-proxy", "send-proxy-v2"])


class Material:
    """The certificate of the server, another of HAProxy's, and who has signed each."""

    def __init__(self, folder: Path) -> None:
        for name in ("hub", "proxy"):
            (folder / name).mkdir()
        self.hub, self.hub_ca = issue_certificate(folder / "hub")
        self.proxy, self.proxy_ca = issue_certificate(folder / "proxy")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(tmp_path_factory.mktemp("certificates"))


def strict_server(**fields: Any) -> Server:
    """Return a server that believes HAProxy, and for which loopback is like any other network."""
    return new_server(**{"exempt": (), "proxies": (f"{SOURCE}/32",), **fields})


@contextlib.asynccontextmanager
async def noting(**fields: Any) -> AsyncIterator[tuple[Server, list[Any]]]:
    """Run such a server, which notes where its clients come from."""
    server, addresses = strict_server(**fields), list[Any]()

    @server.on_client_connect
    async def connected(connection: Connection) -> None:
        addresses.append(connection.address[:2])

    async with server:
        yield server, addresses


# The PROXY protocol


@HEADERS
async def test_the_server_is_told_who_is_behind_haproxy(header: str, tmp_path: Path) -> None:
    async with noting() as (server, addresses):
        with haproxy(tmp_path, server.address, header) as proxy:
            async with dial(proxy.address, source=FRIEND) as peer:
                await peer.login()
                assert await peer.call("add", {"a": 1, "b": 2}) == 3
                assert addresses == [peer.writer.get_extra_info("sockname")]


@pytest.mark.skipif(not has_ipv6(), reason="there is no ::1")
@HEADERS
async def test_so_it_is_over_ipv6(header: str, tmp_path: Path) -> None:
    async with noting() as (server, addresses):
        with haproxy(tmp_path, server.address, header, host="::1") as proxy:
            async with dial(proxy.address) as peer:
                await peer.login()
                assert addresses == [peer.writer.get_extra_info("sockname")[:2]]


@HEADERS
async def test_tls_and_its_binding_pass_haproxy(
    header: str, material: Material, tmp_path: Path
) -> None:
    async with noting(tls=TLS(certificate=material.hub)) as (server, addresses):
        with haproxy(tmp_path, server.address, header) as proxy:
            async with new_client(proxy.address, tls=TLS(ca=material.hub_ca)) as client:
                await round_trips(client)
        ((host, _),) = addresses
        assert host == "127.0.0.1"


@HEADERS
async def test_wrong_passwords_are_held_against_the_client_and_not_against_haproxy(
    header: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with strict_server() as server:
        with haproxy(tmp_path, server.address, header) as proxy:
            for _ in range(3):
                async with dial(proxy.address, source=ENEMY) as peer:
                    with pytest.raises(raw.LoginRefused):
                        await peer.login("a wrong guess")
                    await peer.closed()
            async with dial(proxy.address, source=ENEMY) as peer:
                with pytest.raises(raw.LoginRefused) as caught:
                    await peer.login()
                assert caught.value.body is None  # not a word
            async with dial(proxy.address, source=FRIEND) as peer:
                await peer.login()
    assert f"connections from {ENEMY} are refused" in caplog.text


@HEADERS
@pytest.mark.parametrize("over", ["tcp", "tls"])
async def test_health_checks_are_held_against_nobody(
    header: str,
    over: str,
    material: Material,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    address, tls, client_tls = ("127.0.0.1", free_port()), None, None
    # `rise`: so many in a row, and it is up. `inter` is also how long HAProxy waits for an answer.
    options = f"{header} check inter 5s fastinter 10ms downinter 10ms fall 1 rise 20"
    if over == "tls":
        tls, client_tls = TLS(certificate=material.hub), TLS(ca=material.hub_ca)
        options += " check-ssl verify none"
    with haproxy(tmp_path, address, options) as proxy:
        await until(lambda: ",DOWN," in proxy.order("show stat -1 4 -1"))
        async with strict_server(port=address[1], tls=tls) as server:
            await until(lambda: ",UP," in proxy.order("show stat -1 4 -1"))
            async with new_client(proxy.address, tls=client_tls) as client:
                await round_trips(client)
                assert len(server.connections) == 1
    said = [one.getMessage() for one in caplog.records if one.name == "conduit.server"]
    assert not [text for text in said if "refused" in text or "proxy" in text], said


# TLS that ends at HAProxy


@pytest.mark.parametrize("header", ["send-proxy", "send-proxy-v2", "send-proxy-v2-ssl-cn"])
async def test_tls_may_end_at_haproxy(header: str, material: Material, tmp_path: Path) -> None:
    async with noting() as (server, addresses):
        bind = f"ssl crt {material.proxy} alpn cndt/1"
        with haproxy(tmp_path, server.address, header, bind=bind) as proxy:
            tls = TLS(ca=material.proxy_ca, channel_binding=False)
            async with new_client(proxy.address, tls=tls) as client:
                await round_trips(client)
        ((host, _),) = addresses
        assert host == "127.0.0.1"


async def test_one_in_between_is_found_out_by_the_login(material: Material, tmp_path: Path) -> None:
    """HAProxy with a certificate that the client trusts opens TLS and makes its own to the hub."""
    async with strict_server(tls=TLS(certificate=material.hub)) as server:
        bind = f"ssl crt {material.proxy} alpn cndt/1"
        options = f"send-proxy-v2 ssl verify required ca-file {material.hub_ca} alpn cndt/1"
        with haproxy(tmp_path, server.address, options, bind=bind) as proxy:
            unbound = TLS(ca=material.proxy_ca, channel_binding=False)
            async with new_client(proxy.address, tls=unbound) as client:
                await round_trips(client)
            with pytest.raises(AuthenticationError) as caught:
                await within(new_client(proxy.address, tls=TLS(ca=material.proxy_ca)).connect())
            assert caught.value.code == "invalid_credentials"


# Links that HAProxy cuts


async def test_a_call_outlives_its_link(tmp_path: Path) -> None:
    server, started, go_on = strict_server(), asyncio.Semaphore(0), asyncio.Event()
    runs: list[int] = []

    @server.rpc
    async def wait(number: int) -> int:
        runs.append(number)
        started.release()
        await go_on.wait()
        return number

    async with server:
        with haproxy(tmp_path, server.address, "send-proxy-v2") as proxy:
            client, back = new_client(proxy.address), asyncio.Event()

            @client.on_resume
            async def resumed(client: Client) -> None:
                back.set()

            async with client:
                calls = [asyncio.ensure_future(client.rpc.wait(number=n)) for n in range(3)]
                for _ in calls:
                    await within(started.acquire())
                for _ in range(3):
                    back.clear()
                    proxy.order("shutdown sessions server conduit/hub")
                    await within(back.wait())
                go_on.set()
                assert await within(asyncio.gather(*calls)) == [0, 1, 2]
    assert runs == [0, 1, 2]
