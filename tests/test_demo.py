"""`make demo` shows the quick start, ends with 0 or with a reason, and leaves nothing running."""

from __future__ import annotations

import re
import shutil
import signal
import socket
from pathlib import Path

import pytest

from tests.acceptance.support import ROOT, Program

EXAMPLES = ROOT / "examples"
RESULTS = [
    "Logged in to quickstart",
    "News: Ada is here",
    "Hello, Ada!",
    "10 + 20 = 30",
    "3.5 * 2.0 = 7.0",
    "Available methods: ['add', 'multiply']",
]


def is_listening(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def port_of(demo: Program) -> int:
    match = re.search(r"^server  listening on 127\.0\.0\.1:(\d+)$", demo.output, re.M)
    assert match, demo.output
    return int(match[1])


def test_the_demo_shows_the_login_the_frames_and_the_results(tmp_path: Path) -> None:
    with Program(str(EXAMPLES / "demo.py"), cwd=tmp_path) as demo:
        assert demo.finish() == 0, demo.output + demo.error_output
    assert demo.error_output == ""
    assert 20 <= len(demo.lines) <= 35
    assert not re.search(r"[0-9a-f]{32}", demo.output)
    assert max(map(len, demo.lines)) <= 110
    shown = [line.removeprefix("client  ") for line in demo.lines if line.startswith("client  ")]
    assert [line for line in shown if not line.startswith("Refused: ")] == RESULTS
    assert any(line.startswith("Refused: 'add': b: ") for line in shown)
    assert "server  Ada has logged in" in demo.lines
    frames = re.findall(r"^  (-->|<--)  ([A-Z_]+) +(\d+)  (.*)$", demo.output, re.M)
    names = [name for _, name, _, _ in frames]
    assert names[:4] == ["AUTH_REQUEST", "AUTH_CHALLENGE", "AUTH_RESPONSE", "AUTH_SUCCESS"]
    assert {"MESSAGE", "RPC_REQUEST", "RPC_RESPONSE", "RPC_ERROR", "CLOSE"} <= set(names)
    assert ("-->", "RPC_REQUEST", "44", "['add', {'a': 10, 'b': 20}]") in frames
    total = sum(int(size) for _, _, size, _ in frames)
    assert f"{len(frames)} frames, {total} bytes, " in demo.output
    assert not is_listening(port_of(demo))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the examples that a test may break."""
    return Path(shutil.copytree(EXAMPLES, tmp_path / "examples"))


def change(program: Path, before: str, after: str) -> None:
    text = program.read_text("utf-8")
    assert before in text
    program.write_text(text.replace(before, after), "utf-8")


def test_a_client_that_fails_fails_the_demo(copy: Path) -> None:
    change(copy / "quickstart_client.py", "your_secret_password", "another_password")
    with Program(str(copy / "demo.py"), cwd=copy) as demo:
        assert demo.finish() == 1
    assert re.search(
        r"^The demo failed: the client ended with 1: .*password", demo.error_output, re.M
    )
    assert not is_listening(port_of(demo))


def test_a_server_that_does_not_start_fails_the_demo(copy: Path) -> None:
    change(copy / "quickstart_server.py", "127.0.0.1", "203.0.113.1")
    with Program(str(copy / "demo.py"), cwd=copy) as demo:
        assert demo.finish() == 1
    assert re.search(
        r"^The demo failed: the server did not start: .*203\.0\.113\.1", demo.error_output, re.M
    )


def test_a_server_that_ends_badly_fails_the_demo(copy: Path) -> None:
    change(
        copy / "quickstart_server.py",
        "asyncio.run(server.run())",
        "asyncio.run(server.run())\n    raise SystemExit(3)",
    )
    with Program(str(copy / "demo.py"), cwd=copy) as demo:
        assert demo.finish() == 1
    assert "The demo failed: the server ended with 3" in demo.error_output


def test_a_demo_that_takes_too_long_fails(copy: Path) -> None:
    change(copy / "demo.py", "SECONDS = 30", "SECONDS = 1")
    change(
        copy / "quickstart_client.py",
        "async with client:",
        "async with client:\n        await asyncio.Event().wait()",
    )
    with Program(str(copy / "demo.py"), cwd=copy) as demo:
        assert demo.finish() == 1
    assert "The demo failed: it took more than 1 s" in demo.error_output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_demo_that_is_interrupted_ends_what_it_has_started(
    copy: Path, number: signal.Signals
) -> None:
    change(
        copy / "quickstart_client.py",
        "async with client:",
        "async with client:\n        await asyncio.Event().wait()",
    )
    with Program(str(copy / "demo.py"), cwd=copy) as demo:
        demo.wait_for("AUTH_SUCCESS")
        demo.signal(number)
        assert demo.finish() == 1
    assert "Traceback" not in demo.error_output
    assert not is_listening(port_of(demo))
