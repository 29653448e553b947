"""The two debug scripts: every frame in words and in hex, no secret, and a clear end."""

from __future__ import annotations

import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from conduit.protocol.frames import HEADER, HEADER_SIZE, type_name
from tests.acceptance.support import ROOT, Program, end_cleanly, free_port, has_ipv6

TIME = r"\d\d:\d\d:\d\d\.\d{3}"
FRAME = re.compile(rf"{TIME} [<>] (?:\S*:\S* )?([A-Z_]+) (.*)\[32\+(\d+) bytes\] ?(.*)")
HEX = re.compile(r" {4}([0-9a-f]{64,})(?:\.\.\. \(\d+ bytes\)| \(\d+ bytes masked\))?")


@contextmanager
def debug_server(*arguments: str) -> Iterator[tuple[Program, str]]:
    """Run the server on a free port, and yield it with that port."""
    with Program("test_server_debug.py", "--port", "0", *arguments, cwd=ROOT) as server:
        yield server, server.wait_for(r"\* listening on \S+ port (\d+)")[1]


def debug_client(*arguments: str) -> Program:
    """Run the client to its end."""
    with Program("test_client_debug.py", *arguments, cwd=ROOT) as client:
        client.finish()
    return client


def frames(lines: list[str]) -> list[str]:
    """Return the types of the frames shown, each of them checked against its bytes."""
    names = []
    for line, dump in zip(lines, lines[1:] + [""], strict=True):
        if not (match := FRAME.fullmatch(line)):
            continue
        name, _, size, payload = match.groups()
        assert (shown := HEX.fullmatch(dump)), f"no bytes after {line!r}: {dump!r}"
        head = bytes.fromhex(shown[1])
        first, length, *_ = HEADER.unpack_from(head)
        assert head.startswith(b"CNDT")
        assert (type_name(first >> 16 & 0xFF), length) == (name, int(size))
        if name.startswith("AUTH_"):
            assert len(head) == HEADER_SIZE
            assert "masked" in dump
            assert not re.search(r"(?<=[,'])[pvs]=(?!\*\*\*)", payload), payload
        else:
            assert bool(payload) == bool(length)
        names.append(name)
    return names


ALL = [
    *("AUTH_REQUEST", "AUTH_CHALLENGE", "AUTH_RESPONSE", "AUTH_SUCCESS"),
    *["RPC_REQUEST", "RPC_RESPONSE"] * 4,
    *["MESSAGE"] * 2,
    *("HEARTBEAT_PING", "HEARTBEAT_PONG"),
    "CLOSE",
]


@pytest.mark.parametrize("flags", [(), ("--ipv6",)], ids=["ipv4", "ipv6"])
def test_client_and_server_show_every_frame(flags: tuple[str, ...]) -> None:
    if flags and not has_ipv6():
        pytest.skip("this machine has no ::1")
    with debug_server(*flags) as (server, port):
        client = debug_client("--port", port, *flags)
        assert client.process.returncode == 0, client.output
        server.wait_for(r"\* debug-client went: ")
        end_cleanly(server, signal.SIGTERM)
    for program in (server, client):
        assert [name for name in frames(program.lines) if name != "ACK"] == ALL
        assert program.error_output == ""
        assert "test_secret_123" not in program.output
    steps = re.findall(rf"^{TIME} \* (.*)$", client.output, re.M)
    host = "[::1]" if flags else "127.0.0.1"
    assert steps[:6] == [
        f"login at tcp://{host}:{port}",
        "logged in: debug-server 1.0.0",
        "discovered: listall, add, multiply",
        "listall() = ['listall', 'add', 'multiply']",
        "add(a=10, b=20) = 30",
        "multiply(x=3.5, y=2.0) = 7.0",
    ]
    assert re.fullmatch(r"hello was answered with .*'hello, debug-client'.*", steps[6])
    assert re.fullmatch(r"ping took \d+\.\d{3} ms", steps[7])
    assert steps[8:] == ["all went well"]
    steps = re.findall(rf"^{TIME} \* (.*)$", server.output, re.M)
    assert steps[0].startswith(f"listening on {host.strip('[]')} port {port};")
    assert steps[1].startswith(f"debug-client 1.0.0 came from {host.strip('[]')} port ")
    assert steps[2] == "debug-client says hello: {'text': 'is anybody there?'}"
    assert steps[3].startswith("debug-client went: ")
    assert steps[4:] == ["stopped"]


def failure(client: Program) -> str:
    """Return the reason in the last line of a client that must have failed."""
    assert client.process.returncode == 1, client.output
    assert client.error_output == ""
    match = re.fullmatch(rf"{TIME} \* failed: (.*)", client.lines[-1])
    assert match, client.output
    return match[1]


def test_a_wrong_password() -> None:
    with debug_server("--password", "one password") as (server, port):
        wrong = debug_client("--port", port, "--password", "another password")
        assert "password" in failure(wrong)
        assert frames(wrong.lines)[-1] == "AUTH_FAILURE"
        right = debug_client("--port", port, "--password", "one password")
        assert right.process.returncode == 0, right.output
        end_cleanly(server, signal.SIGINT)


def test_no_server() -> None:
    port = free_port()
    reason = failure(debug_client("--port", str(port)))
    assert f"127.0.0.1:{port}" in reason
    assert "is the server running" in reason


def test_something_else_on_the_port() -> None:
    def answer(listening: socket.socket) -> None:
        connected, _ = listening.accept()
        with connected:
            connected.recv(1024)
            connected.sendall(b"SSH-2.0-OpenSSH_9.9 and so on, and so on\r\n")
            connected.recv(1024)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=answer, args=(listening,), daemon=True)
        thread.start()
        client = debug_client("--port", str(listening.getsockname()[1]))
        thread.join(10)
    assert "conduit" in failure(client)


def test_a_port_in_use() -> None:
    with debug_server() as (_, port):
        with Program("test_server_debug.py", "--port", port, cwd=ROOT) as second:
            assert second.finish() == 1
        assert re.search(rf"failed: .*127\.0\.0\.1:{port}.*in use", second.lines[-1])


@pytest.mark.parametrize("script", ["test_server_debug.py", "test_client_debug.py"])
def test_what_cannot_be_meant_ends_with_one_line(script: str, tmp_path: Path) -> None:
    with Program(str(ROOT / script), "--password", "", cwd=tmp_path) as program:
        assert program.finish() == 1
    assert len(program.lines) == 1
    assert "password is empty" in program.lines[0]
    with Program(str(ROOT / script), "--port", "65536", cwd=tmp_path) as program:
        assert program.finish() == 2
    assert "65536 is not a port" in program.error_output


def test_an_interrupted_client_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = str(silent.getsockname()[1])
        with Program("test_client_debug.py", "--port", port, cwd=ROOT) as client:
            client.wait_for("AUTH_REQUEST")
            client.signal(signal.SIGINT)
            assert client.finish() == 1
    assert client.lines[-1].endswith("* failed: interrupted")
