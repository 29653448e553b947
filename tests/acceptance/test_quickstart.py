"""Both programs of the published quick start run as they were published."""

from __future__ import annotations

import asyncio
import hashlib
import signal
from pathlib import Path

import pytest

from conduit import Client
from tests.acceptance.support import (
    QUICKSTART,
    QUICKSTART_LINES,
    Program,
    copy_program,
    end_cleanly,
    start_quickstart_server,
    within,
)

PUBLISHED = {
    "server.py": "af865d7419fd29dc6f1a02acfced9a897fabade0cf93deecd1c7c5923abbd312",
    "client.py": "25139741d7409adbf8d339f32659b0c5d1d02b40de7d60e197866cf33b592b66",
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_programs_are_the_published_ones_to_the_byte(name: str) -> None:
    assert hashlib.sha256((QUICKSTART / name).read_bytes()).hexdigest() == PUBLISHED[name]


def test_server_and_client_talk_in_two_processes(tmp_path: Path) -> None:
    server, port = start_quickstart_server(tmp_path)
    with server:
        with Program(copy_program("client.py", tmp_path, port), cwd=tmp_path) as client:
            assert client.finish() == 0, client.error_output
            assert client.lines == QUICKSTART_LINES
            assert client.error_output == ""
        server.wait_for(r"^Client connected: \S+$")
        end_cleanly(server, signal.SIGINT)


def test_the_server_serves_one_client_after_the_other(tmp_path: Path) -> None:
    server, port = start_quickstart_server(tmp_path)
    with server:
        for _ in range(2):
            with Program(copy_program("client.py", tmp_path, port), cwd=tmp_path) as client:
                assert client.finish() == 0, client.error_output
                assert client.lines == QUICKSTART_LINES
        first = server.wait_for(r"^Client connected: (\S+)$")
        second = server.wait_for(r"^Client connected: (\S+)$")
        assert first[1] != second[1]
        end_cleanly(server, signal.SIGINT)


def test_the_server_warns_that_it_is_open_to_the_network_without_tls(tmp_path: Path) -> None:
    server, _ = start_quickstart_server(tmp_path)
    with server:
        end_cleanly(server, signal.SIGINT)
        assert "0.0.0.0" in server.error_output
        assert "TLS" in server.error_output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_the_server_while_a_client_is_connected(
    tmp_path: Path, number: signal.Signals
) -> None:
    server, port = await asyncio.to_thread(start_quickstart_server, tmp_path)
    with server:
        client = Client(
            server_host="localhost",
            server_port=port,
            password="your_secret_password",
            reconnect_enabled=False,
        )
        async with client:
            assert await within(client.rpc.call("add", args={"a": 1, "b": 2})) == 3
            await asyncio.to_thread(end_cleanly, server, number)
            await within(client.wait_closed())


def test_a_wrong_password_ends_the_client_with_an_error_that_says_so(tmp_path: Path) -> None:
    server, port = start_quickstart_server(tmp_path)
    with server:
        name = copy_program("client.py", tmp_path, port)
        text = (tmp_path / name).read_text(encoding="ascii")
        changed = text.replace('"your_secret_password"', '"another_secret_password"')
        (tmp_path / name).write_text(changed, encoding="ascii")
        with Program(name, cwd=tmp_path) as client:
            assert client.finish() == 1
            assert "AuthenticationError" in client.error_output
            assert "another_secret_password" not in client.error_output
            assert client.lines == []
        end_cleanly(server, signal.SIGINT)


def test_without_a_server_the_client_ends_with_an_error_that_names_the_address(
    tmp_path: Path,
) -> None:
    server, port = start_quickstart_server(tmp_path)
    with server:
        end_cleanly(server, signal.SIGINT)
    with Program(copy_program("client.py", tmp_path, port), cwd=tmp_path) as client:
        assert client.finish() == 1
        assert "ConnectionRefusedError" in client.error_output
        assert "localhost" in client.error_output and str(port) in client.error_output
