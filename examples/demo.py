"""Run the quick start, server and client as two processes, and show what crosses the wire.

Ends with 0, or with 1 and the reason. Whatever it has started has ended before it does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
import time
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
SECONDS = 30  # far more than it takes anywhere
WIDTH = max(60, min(110, shutil.get_terminal_size((100, 24)).columns))

# A frame in the log of `conduit.wire`; the line with its bytes in hex does not match.
FRAME = re.compile(r"([<>]) .*?\b([A-Z]{3}[A-Z_]*)\b.*?\[(\d+)\+(\d+) bytes\] ?(.*)")

# The login's payloads are not for people.
MEANING = {
    "AUTH_REQUEST": "who I am, and a random number; the password itself never crosses",
    "AUTH_CHALLENGE": "the salt of the password, and another random number",
    "AUTH_RESPONSE": "a proof that I know the password",
    "AUTH_SUCCESS": "a proof that the server knows it too",
    "ACK": "everything so far has arrived",
}


class Failure(Exception):
    """A step did not end as it should."""


def show_frame(line: str) -> int | None:
    """Print a frame of the wire log in one line, and return its size; None if it is not one."""
    match = FRAME.match(line)
    if match is None:
        return None
    direction, name, header, size, payload = match.groups()
    arrow = "-->" if direction == ">" else "<--"
    total = int(header) + int(size)
    text = f"  {arrow}  {name:<15}{total:5}  {MEANING.get(name, payload)}"
    print(text if len(text) <= WIDTH else text[: WIDTH - 3] + "...")
    return total


@contextlib.asynccontextmanager
async def program(name: str, *arguments: str, port: str) -> AsyncIterator[Process]:
    """Start one of the two programs, and end it in every case."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(HERE / name), *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=PIPE,
        stderr=STDOUT,
        env={**os.environ, "QUICKSTART_PORT": port, "PYTHONUNBUFFERED": "1"},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def lines(process: Process) -> AsyncIterator[str]:
    """Yield what a program prints, until it ends."""
    assert process.stdout is not None
    async for line in process.stdout:
        yield line.decode(errors="replace").rstrip()


async def copy(process: Process) -> None:
    """Print what the server prints."""
    async for line in lines(process):
        print(f"server  {line}")


async def start(server: Process) -> str:
    """Wait until the server listens, and return its port."""
    printed = []
    async for line in lines(server):
        print(f"server  {line}")
        printed.append(line)
        if match := re.fullmatch(r"listening on .*:(\d+)", line):
            return match[1]
    raise Failure(f"the server did not start: {printed[-1] if printed else 'it said nothing'}")


async def demo() -> None:
    """Run both programs."""
    started = time.monotonic()
    frames, size = 0, 0
    print("Two processes and one TCP connection. --> goes to the server, <-- comes from it;")
    print("the number is the size of the frame in bytes, 32 of which are its header.\n")
    async with program("quickstart_server.py", port="0") as server:
        port = await start(server)
        copying = asyncio.create_task(copy(server))
        async with program("quickstart_client.py", "--wire", port=port) as client:
            last = "it said nothing"
            async for line in lines(client):
                shown = show_frame(line)
                if shown is not None:
                    frames, size = frames + 1, size + shown
                elif not line.startswith("    "):  # the bytes of a frame in hex
                    print(f"client  {line}")
                    last = line
            if code := await client.wait():
                raise Failure(f"the client ended with {code}: {last}")
        if server.returncode is not None:
            raise Failure(f"the server ended too early, with {server.returncode}")
        server.terminate()
        await copying
        code = await server.wait()
        if code and os.name == "posix":  # elsewhere `terminate` kills
            raise Failure(f"the server ended with {code}")
    seconds = time.monotonic() - started
    print(f"\n{frames} frames, {size} bytes, {seconds:.1f} s. The programs are")
    print("examples/quickstart_server.py and examples/quickstart_client.py; README.md goes on.")


async def main() -> int:
    """Run the demo within its time, and say what went wrong if it did."""
    task = asyncio.current_task()
    assert task is not None
    with contextlib.suppress(NotImplementedError, AttributeError):  # Windows has no such thing
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await asyncio.wait_for(demo(), SECONDS)
    except asyncio.TimeoutError:
        reason = f"it took more than {SECONDS} s"
    except (Failure, OSError) as error:
        reason = str(error)
    except asyncio.CancelledError:
        reason = "interrupted"
    else:
        return 0
    print(f"\nThe demo failed: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        sys.exit(asyncio.run(main()))
    except KeyboardInterrupt:
        sys.exit(1)
