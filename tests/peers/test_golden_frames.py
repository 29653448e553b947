"""The golden frames of docs/protocol.md, as bytes, through programs that know nothing of them.

bash connects over TCP and `openssl s_client` over TLS; both pass on what they are given. What the
server answers is held against the page.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from conduit import TLS, Connection, MethodNotFound, Server, User
from tests.acceptance import raw
from tests.acceptance.raw import RawPeer
from tests.acceptance.support import within
from tests.golden_frames import CLIENT_NONCE, GOLDEN, ITERATIONS, SALT, VERIFIER
from tools.peers import PEERS

OVER_TCP = 'exec 3<>"/dev/tcp/$0/$1" && { cat <&0 >&3 & cat <&3; kill $!; }'


class Files:
    """The certificates of a server and of a client, and the authority that has signed both."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.ca, self.server, self.device = (folder / name for name in ("ca", "server", "device"))
        authority.cert_pem.write_to_path(str(self.ca))
        for path, name in ((self.server, "localhost"), (self.device, "device-7")):
            issued = authority.issue_cert(name)
            issued.private_key_and_cert_chain_pem.write_to_path(str(path))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("certificates"))


def over_tcp(address: tuple[str, int]) -> list[str]:
    return [str(PEERS["bash"].path), "-c", OVER_TCP, address[0], str(address[1])]


def over_tls(address: tuple[str, int], files: Files, *options: str) -> list[str]:
    where = ["-connect", f"{address[0]}:{address[1]}", "-servername", "localhost"]
    trust = ["-CAfile", str(files.ca), "-verify_return_error", "-verify_hostname", "localhost"]
    return [str(PEERS["openssl"].path), "s_client", *where, *trust, "-alpn", "cndt/1", *options]


@contextlib.asynccontextmanager
async def through(command: list[str]) -> AsyncIterator[RawPeer]:
    """Run a program that passes on bytes; only the frames that come back are checked."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    peer = RawPeer(process.stdout, process.stdin)
    try:
        yield peer
    finally:
        await peer.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def golden_server(**fields: Any) -> Server:
    """Return the server of the page's conversation."""
    server = Server(host="127.0.0.1", port=0, **fields)

    @server.on("greeting")
    async def greeting(client: Connection, message: dict[str, str]) -> dict[str, str]:
        return {"reply": f"Hello, {message['name']}!"}

    @server.on("status")
    async def status(client: Connection, message: None) -> str:
        return "ok"

    @server.rpc
    async def add(a: int, b: int) -> int:
        return a + b

    @server.rpc
    async def divide(a: int, b: int) -> float:
        return a / b

    @server.rpc
    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds)

    @server.rpc
    async def double(numbers: AsyncIterator[int]) -> AsyncIterator[int]:
        async for number in numbers:
            yield 2 * number

    return server


FOR_PEOPLE = {raw.RPC_ERROR: 1, raw.GOAWAY: 1, raw.CLOSE: 1}
"""Where a payload has a text for people, which nobody else may rely on."""


def send(peer: RawPeer, *names: str) -> None:
    """Send golden frames as they stand on the page."""
    peer.write(b"".join(GOLDEN[name].raw for name in names))


async def receive(peer: RawPeer, *names: str) -> None:
    """Take frames that mean what golden ones mean, in this order.

    ACK and STREAM_CREDIT may come at other times than on the page, and so the numbers differ; that
    they are right, `RawPeer` checks.
    """
    for name in names:
        golden, got = GOLDEN[name], await peer.receive()
        while got is not None and got.type in (raw.ACK, raw.STREAM_CREDIT):
            got = await peer.receive()
        assert got is not None, f"hung up in place of {name}"
        assert (got.type, got.flags, got.id) == (golden.type, golden.flags, golden.id), name
        if got.type not in FOR_PEOPLE:
            assert got.payload == golden.raw[raw.HEADER.size :], name
        else:
            assert machine_readable(got.type, got.body) == machine_readable(
                golden.type, golden.value
            ), name


def machine_readable(type: int, body: Any) -> list[Any]:
    """Return what programs read of a payload, without what is made up anew each time."""
    assert isinstance(body[FOR_PEOPLE[type]], str)
    return [
        dict.fromkeys(value) if isinstance(value, dict) else value
        for index, value in enumerate(body)
        if index != FOR_PEOPLE[type]
    ]


def shape(body: Any) -> dict[str, Any]:
    """Return the keys of a map, and the types of what they stand for."""
    return {
        key: shape(value) if isinstance(value, dict) else type(value) for key, value in body.items()
    }


@pytest.mark.parametrize("over", ["tcp", "tls"])
async def test_the_conversation_of_the_page(over: str, files: Files) -> None:
    server = golden_server(tls=TLS(certificate=files.server) if over == "tls" else None)
    async with server:
        quiet = over_tls(server.address, files, "-quiet")
        async with through(quiet if over == "tls" else over_tcp(server.address)) as peer:
            send(peer, "resume_request")  # of a session that this server does not know
            success = await peer.until(raw.AUTH_SUCCESS)
            golden: Any = GOLDEN["resume_success"].value
            assert shape(success.body).items() >= shape(golden).items()
            assert success.body["identity"] == golden["identity"]
            assert success.body["session"]["resumed"] is False

            send(peer, "message", "request", "call_by_name", "call_by_position")
            await receive(peer, "message_response", "reply", "result", "error")
            send(peer, "call_to_cancel", "cancel")
            await receive(peer, "cancelled")

            (connection,) = server.connections.values()
            calling = asyncio.ensure_future(connection.rpc.call("read_sensor"))
            await receive(peer, "call_from_server")
            send(peer, "error_from_client", "ack")
            with pytest.raises(MethodNotFound, match="read_sensor"):
                await within(calling)
            assert await server.broadcast("news", {"text": "hi"}) == 1
            await receive(peer, "broadcast")
            send(peer, "ping")
            await receive(peer, "pong")

            send(peer, "stream_call", "stream_item", "stream_end")
            await receive(peer, "stream_answer", "stream_result")
            await within(server.stop(grace=5))
            await receive(peer, "goaway", "close")
            assert await peer.receive() is None


@pytest.mark.parametrize("over", ["tcp", "tls"])
async def test_a_recorded_login_is_refused(over: str, files: Files) -> None:
    tls = TLS(certificate=files.server) if over == "tls" else None
    async with golden_server(verifier=VERIFIER, tls=tls) as server:
        quiet = over_tls(server.address, files, "-quiet")
        async with through(quiet if over == "tls" else over_tcp(server.address)) as peer:
            send(peer, "auth_request")
            challenge = await peer.until(raw.AUTH_CHALLENGE)
            assert shape(challenge.body) == shape(GOLDEN["auth_challenge"].value)
            said = raw.attributes(challenge.body["scram"])
            assert list(said) == ["r", "s", "i", "d"]
            assert said["r"].startswith(CLIENT_NONCE)
            assert (said["s"], said["i"]) == (SALT, str(ITERATIONS))

            send(peer, "auth_response")  # right, but for another nonce of the server
            failure = await peer.until(raw.AUTH_FAILURE)
            golden: Any = GOLDEN["auth_failure"].value
            assert shape(failure.body) == shape(golden)
            assert failure.body["code"] == golden["code"]
            assert await peer.receive() is None


async def test_openssl_logs_in_by_a_certificate(files: Files) -> None:
    tls = TLS(certificate=files.server, ca=files.ca)
    async with golden_server(users={"device-7": User(certificate=True)}, tls=tls) as server:
        own = over_tls(server.address, files, "-quiet", "-cert", str(files.device))
        async with through(own) as peer:
            send(peer, "auth_request_external")
            success = await peer.until(raw.AUTH_SUCCESS)
            golden: Any = GOLDEN["auth_success_external"].value
            assert shape(success.body).items() >= shape(golden).items()
            assert success.body["identity"] == golden["identity"]
            send(peer, "message", "request", "call_by_name")
            await receive(peer, "message_response", "reply", "result")


@pytest.mark.parametrize("version, taken", [("1_1", False), ("1_2", True), ("1_3", True)])
async def test_openssl_agrees_on_tls_and_the_protocol(
    version: str, taken: bool, files: Files
) -> None:
    # At the lowest level openssl itself would take TLS 1.1.
    options = [f"-tls{version}", "-cipher", "DEFAULT:@SECLEVEL=0"]
    async with golden_server(tls=TLS(certificate=files.server)) as server:
        process = await asyncio.create_subprocess_exec(
            *over_tls(server.address, files, *options),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output, _ = await within(process.communicate())
    assert (process.returncode == 0) is taken, output.decode()
    assert (b"ALPN protocol: cndt/1\n" in output) is taken, output.decode()
