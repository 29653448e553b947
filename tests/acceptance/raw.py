"""A CNDT peer made by hand: sockets, `struct`, `msgpack` and `hashlib`, and nothing of conduit.

It plays both sides, sends whatever bytes a test wants, and checks every frame that it receives
against the rules of the wire. `Relay` is a piece of cable between two peers that a test can tap
and cut.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import hmac
import os
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import msgpack

TIMEOUT = 10.0
"""Seconds after which a test gives up waiting for something that should have happened."""

HEADER = struct.Struct(">4sBBHIQQI")

MESSAGE, RPC_REQUEST, RPC_RESPONSE, RPC_ERROR, PING, PONG = range(1, 7)
AUTH_REQUEST, AUTH_SUCCESS, AUTH_FAILURE = range(7, 10)
AUTH_CHALLENGE, AUTH_RESPONSE, ACK, CANCEL, STREAM_ITEM, STREAM_END = range(16, 22)
STREAM_CREDIT, GOAWAY, CLOSE = range(22, 25)

COMPRESSED, SEQUENCED, PRIORITY, REPLY = 1, 2, 8, 16

ALWAYS_SEQUENCED = {
    RPC_REQUEST,
    RPC_RESPONSE,
    RPC_ERROR,
    CANCEL,
    STREAM_ITEM,
    STREAM_END,
    STREAM_CREDIT,
}

PASSWORD = "a password of the tests"
ITERATIONS = 4096

CAPS: dict[str, Any] = {
    "frame_max": 1 << 20,
    "feat": [],
    "calls": 256,
    "window": [256, 1 << 20],
    "ttl": 30_000,
}


class Frame(NamedTuple):
    """What one frame said."""

    type: int
    flags: int
    id: int
    timestamp: int
    reserved: int
    payload: bytes

    @property
    def body(self) -> Any:
        """The payload, inflated if it has to be, and decoded."""
        data = self.payload
        if self.flags & COMPRESSED:
            import zlib

            data = zlib.decompress(data)
        return msgpack.unpackb(data, strict_map_key=False)


class LoginRefused(Exception):
    """The server answered AUTH_FAILURE; `body` is what it said, None if it only hung up."""

    def __init__(self, body: dict[str, Any] | None) -> None:
        super().__init__(repr(body))
        self.body = body


def pack(value: object) -> bytes:
    """Return `value` as MessagePack."""
    packed: bytes = msgpack.packb(value)
    return packed


def b64(data: bytes) -> str:
    """Return `data` in base64."""
    return base64.b64encode(data).decode("ascii")


def frame(
    type: int,
    id: int = 0,
    payload: bytes = b"",
    *,
    flags: int = 0,
    reserved: int = 0,
    version: int = 1,
    magic: bytes = b"CNDT",
    length: int | None = None,
) -> bytes:
    """Return one frame, true to the rules or, where a test says so, not."""
    claimed = len(payload) if length is None else length
    stamp = time.time_ns() // 1_000_000
    return HEADER.pack(magic, version, type, flags, claimed, id, stamp, reserved) + payload


# SCRAM-SHA-256


@functools.lru_cache(maxsize=64)
def salted_password(password: str, salt: bytes, iterations: int) -> bytes:
    """Derive what a password turns into; remembered, since all tests use the same few."""
    return hashlib.pbkdf2_hmac("sha256", password.encode(), salt, iterations)


def mac(key: bytes, message: str | bytes) -> bytes:
    """Return HMAC-SHA-256."""
    data = message.encode() if isinstance(message, str) else message
    return hmac.new(key, data, "sha256").digest()


def make_verifier(
    password: str = PASSWORD, iterations: int = ITERATIONS, salt: bytes = b"salt of 16 bytes"
) -> str:
    """Return what a server stores in place of a password, as PostgreSQL writes it."""
    salted = salted_password(password, salt, iterations)
    stored = hashlib.sha256(mac(salted, "Client Key")).digest()
    server = mac(salted, "Server Key")
    return f"SCRAM-SHA-256${iterations}:{b64(salt)}${b64(stored)}:{b64(server)}"


VERIFIER = make_verifier()


def attributes(message: str) -> dict[str, str]:
    """Split a SCRAM message into its attributes."""
    return dict(part.split("=", 1) for part in message.split(","))


def binding(request: bytes, caps: bytes) -> str:
    """Return the attribute `d`: what was offered before anybody could sign anything."""
    prefix = b"CNDT-AUTH-v1" + b"\x01" + struct.pack(">I", len(request))
    return b64(hashlib.sha256(prefix + request + caps).digest())


class RawPeer:
    """One end of a connection, as the connecting side or (`accepted`) the accepting one."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, accepted: bool = False
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.sent = 0
        self.received = 0
        # The login uses id 1, so the first id that is right in any reading is 3.
        self.next_id = 2 if accepted else 3
        self.caps: dict[str, Any] = {}
        self.success: dict[str, Any] = {}
        self.log: list[Frame] = []

    # sending

    def write(self, data: bytes) -> None:
        """Send bytes as they are."""
        with contextlib.suppress(ConnectionError, RuntimeError):
            self.writer.write(data)

    async def write_slowly(self, data: bytes) -> None:
        """Send bytes one at a time, and let the other side run after each."""
        for index in range(len(data)):
            self.write(data[index : index + 1])
            with contextlib.suppress(ConnectionError):
                await self.writer.drain()
            await asyncio.sleep(0)

    def numbered(self, type: int, id: int, body: object, *, flags: int = 0) -> bytes:
        """Return a sequenced frame with the next number."""
        self.sent += 1
        return frame(
            type, id, pack(body), flags=flags | SEQUENCED, reserved=self.sent & 0xFFFF_FFFF
        )

    def send(self, type: int, id: int, body: object, *, flags: int = 0) -> None:
        """Send a sequenced frame with the next number."""
        self.write(self.numbered(type, id, body, flags=flags))

    def take_id(self) -> int:
        """Return the next correlation id of this side."""
        taken = self.next_id
        self.next_id += 2
        return taken

    def request(self, method: str, params: object) -> int:
        """Send an RPC_REQUEST and return its id."""
        id = self.take_id()
        self.send(RPC_REQUEST, id, [method, params])
        return id

    # receiving

    async def receive(self, timeout: float = TIMEOUT) -> Frame | None:
        """Return the next frame, or None when the other side has hung up."""
        try:
            head = await asyncio.wait_for(self.reader.readexactly(32), timeout)
            magic, version, type, flags, length, id, stamp, reserved = HEADER.unpack(head)
            assert magic == b"CNDT" and version == 1, f"not a frame: {head.hex(' ')}"
            payload = await asyncio.wait_for(self.reader.readexactly(length), timeout)
        except asyncio.IncompleteReadError as exc:
            assert not exc.partial, f"the link ended inside a frame: {exc.partial.hex(' ')}"
            return None
        except ConnectionError:
            return None
        got = Frame(type, flags, id, stamp, reserved, payload)
        self.log.append(got)
        self._check(got)
        return got

    def _check(self, got: Frame) -> None:
        """Fail unless the frame keeps the rules of the wire; acknowledge now and then."""
        numbered = bool(got.flags & SEQUENCED)
        if got.type in ALWAYS_SEQUENCED:
            assert numbered, f"not numbered: {got}"
        elif got.type == MESSAGE:
            assert numbered or (got.id == 0 and got.flags & PRIORITY), f"not numbered: {got}"
        else:
            assert not numbered, f"numbered: {got}"
        if numbered:
            self.received += 1
            assert got.reserved == self.received & 0xFFFF_FFFF, f"wrong number: {got}"
            assert not got.flags & PRIORITY, f"numbered and urgent: {got}"
            if self.received % 32 == 0:
                self.write(frame(ACK, self.received))
        else:
            assert got.reserved == 0, f"reserved is in use: {got}"

    async def until(self, *types: int, timeout: float = TIMEOUT) -> Frame:
        """Return the next frame of one of these types; the others are passed over."""
        while True:
            got = await self.receive(timeout)
            assert got is not None, f"hung up while waiting for {types}; before that: {self.log}"
            if got.type in types:
                return got

    async def call(self, method: str, params: object) -> Any:
        """Make a call, and return its result or the body of the RPC_ERROR as a tuple."""
        id = self.request(method, params)
        while True:
            got = await self.until(RPC_RESPONSE, RPC_ERROR)
            if got.id != id:
                continue
            return got.body[0] if got.type == RPC_RESPONSE else tuple(got.body)

    async def closed(self, timeout: float = TIMEOUT) -> tuple[int, str] | None:
        """Wait until the other side hangs up; return what its CLOSE frame said, None without."""
        said = None
        while (got := await self.receive(timeout)) is not None:
            if got.type == CLOSE:
                code, reason = got.body
                assert got.id == 0
                assert isinstance(code, int) and isinstance(reason, str)
                said = (code, reason)
        return said

    async def rest(self, timeout: float = TIMEOUT) -> bytes:
        """Wait until the other side hangs up; return every byte that came before."""
        data = b""
        with contextlib.suppress(ConnectionError):
            while chunk := await asyncio.wait_for(self.reader.read(65536), timeout):
                data += chunk
        return data

    # login

    async def login(
        self,
        password: str = PASSWORD,
        user: str = "default",
        *,
        caps: dict[str, Any] | None = None,
        session: dict[str, Any] | None = None,
        write: Callable[[bytes], Awaitable[None]] | None = None,
    ) -> dict[str, Any]:
        """Log in as a client, check that the server knows the password too, return AUTH_SUCCESS.

        `write` sends each of the two frames, for tests that cut them into pieces. `session` is the
        one to go on with.

        Raises:
            LoginRefused: the server said no.
        """
        nonce = b64(os.urandom(18))
        bare = f"n={user},r={nonce}"
        request = pack(
            {
                "v": 1,
                "mech": "SCRAM-SHA-256",
                "scram": "n,," + bare,
                "caps": CAPS if caps is None else caps,
                "session": session,
                "agent": "raw/1.0",
            }
        )
        write = write or self._write_at_once
        await write(frame(AUTH_REQUEST, 1, request))
        body = await self._login_frame(AUTH_CHALLENGE)
        server_first, packed = body["scram"], body["caps"]
        self.caps = msgpack.unpackb(packed)
        said = attributes(server_first)
        assert said["r"].startswith(nonce) and len(said["r"]) >= len(nonce) + 18
        assert said["d"] == binding(request, packed), "the offer was not signed as sent"
        salted = salted_password(password, base64.b64decode(said["s"]), int(said["i"]))
        client_key = mac(salted, "Client Key")
        final = f"c={b64(b'n,,')},r={said['r']}"
        signed = f"{bare},{server_first},{final}"
        signature = mac(hashlib.sha256(client_key).digest(), signed)
        proof = bytes(a ^ b for a, b in zip(client_key, signature, strict=True))
        answer = pack({"scram": f"{final},p={b64(proof)}"})
        await write(frame(AUTH_RESPONSE, 1, answer))
        self.success = await self._login_frame(AUTH_SUCCESS)
        expected = b64(mac(mac(salted, "Server Key"), signed))
        assert self.success["scram"] == f"v={expected}", "the server does not know the password"
        return self.success

    async def _write_at_once(self, data: bytes) -> None:
        self.write(data)

    async def _login_frame(self, wanted: int) -> dict[str, Any]:
        got = await self.receive()
        if got is None:
            raise LoginRefused(None)
        assert (got.flags, got.id, got.reserved) == (0, 1, 0), f"not a login frame: {got}"
        assert len(got.payload) <= 4096
        body = got.body
        assert isinstance(body, dict)
        if got.type == AUTH_FAILURE:
            raise LoginRefused(body)
        assert got.type == wanted, f"expected type {wanted}: {got}"
        return body

    async def accept_login(
        self,
        password: str = PASSWORD,
        *,
        iterations: int = ITERATIONS,
        heartbeat: tuple[int, int] = (30_000, 90_000),
        forge: str = "",
        caps: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Play the server's part of a login and return the client's AUTH_REQUEST.

        `forge` names a lie to tell: "signature" or "binding".
        """
        asked = await self.until(AUTH_REQUEST)
        offer: dict[str, Any] = asked.body
        gs2_mode, gs2_name, bare = offer["scram"].split(",", 2)
        assert (gs2_mode, gs2_name) == ("n", ""), "there is no channel to bind to"
        packed = pack(CAPS if caps is None else caps)
        d = b64(bytes(32)) if forge == "binding" else binding(asked.payload, packed)
        salt = b"salt of 16 bytes"
        nonce = attributes(bare)["r"] + b64(os.urandom(18))
        server_first = f"r={nonce},s={b64(salt)},i={iterations},d={d}"
        self.write(frame(AUTH_CHALLENGE, 1, pack({"scram": server_first, "caps": packed})))
        answer = await self.until(AUTH_RESPONSE)
        final = answer.body["scram"].rsplit(",p=", 1)[0]
        assert attributes(final)["r"] == nonce
        salted = salted_password(password, salt, iterations)
        signed = f"{bare},{server_first},{final}"
        signature = mac(mac(salted, "Server Key"), signed)
        if forge == "signature":
            signature = bytes(32)
        success = {
            "scram": f"v={b64(signature)}",
            "identity": "default",
            "session": {
                "id": os.urandom(16),
                "epoch": os.urandom(8),
                "resumed": False,
                "recv": 0,
                "ttl": 0,
            },
            "hb": list(heartbeat),
            "server": {"name": "raw", "version": "1.0"},
        }
        self.write(frame(AUTH_SUCCESS, 1, pack(success)))
        return offer

    # the end

    async def close(self) -> None:
        """Hang up."""
        self.writer.close()
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(self.writer.wait_closed(), TIMEOUT)

    def abort(self) -> None:
        """Hang up with a reset, as a killed process may."""
        reset(self.writer)


def reset(writer: asyncio.StreamWriter) -> None:
    """End a link with RST in place of FIN."""
    sock = writer.get_extra_info("socket")
    if sock is not None and not writer.is_closing():
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextlib.asynccontextmanager
async def dial(
    address: tuple[str, int],
    *,
    source: str | None = None,
    header: bytes = b"",
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[RawPeer]:
    """Connect to a server; nothing is sent yet.

    `source` is the address to come from, `header` what stands before everything else, TLS included.
    """
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    # With the protocol named, asyncio knows that it is TCP and sets TCP_NODELAY.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setblocking(False)
        if source is not None:
            sock.bind((source, 0))
        loop = asyncio.get_running_loop()
        await asyncio.wait_for(loop.sock_connect(sock, address), TIMEOUT)
        await loop.sock_sendall(sock, header)
        opening = asyncio.open_connection(
            sock=sock, ssl=tls, server_hostname="localhost" if tls is not None else None
        )
        reader, writer = await asyncio.wait_for(opening, TIMEOUT)
    except BaseException:
        sock.close()
        raise
    peer = RawPeer(reader, writer)
    try:
        yield peer
    finally:
        await peer.close()


@contextlib.asynccontextmanager
async def logged_in(
    address: tuple[str, int], *, caps: dict[str, Any] | None = None
) -> AsyncIterator[RawPeer]:
    """Connect to a server and log in."""
    async with dial(address) as peer:
        await peer.login(caps=caps)
        yield peer


@contextlib.asynccontextmanager
async def listen(script: Callable[[RawPeer], Awaitable[None]]) -> AsyncIterator[tuple[str, int]]:
    """Run `script` for each client that connects, and hang up when it ends; yields the address.

    A script that fails fails the test.
    """
    tasks: list[asyncio.Task[None]] = []
    peers: list[RawPeer] = []

    async def serve(peer: RawPeer) -> None:
        try:
            await script(peer)
        finally:
            await peer.close()

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = RawPeer(reader, writer, accepted=True)
        peers.append(peer)
        tasks.append(asyncio.ensure_future(serve(peer)))

    server = await asyncio.start_server(accepted, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[:2]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        for peer in peers:  # a script that was cancelled while it hung up has not done so
            peer.writer.transport.abort()
        await asyncio.wait_for(server.wait_closed(), TIMEOUT)
    for outcome in ended:
        if isinstance(outcome, Exception):
            raise outcome


class Relay:
    """A cable between clients and `target`: it can be tapped, cut, and left unplugged."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.upward = bytearray()
        self.downward = bytearray()
        self.plugged = True
        self.attempts = 0
        self._attempted = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self._deaf: set[asyncio.StreamWriter] = set()
        self._server: asyncio.AbstractServer | None = None
        self.address = ("127.0.0.1", 0)

    async def __aenter__(self) -> Relay:
        server = await asyncio.start_server(self._accepted, *self.address)
        self._server = server
        self.address = server.sockets[0].getsockname()[:2]
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.cut()
        await asyncio.wait_for(self._server.wait_closed(), TIMEOUT)

    def cut(self) -> None:
        """Break every link that goes through here, as if a cable were cut."""
        writers, self._writers = self._writers, []
        for writer in writers:
            reset(writer)

    def unplug(self) -> None:
        """Break every link, and hang up on whoever tries again."""
        self.plugged = False
        self.cut()

    def swallow(self) -> None:
        """Let nothing through any more, without a word; new links are as good as ever."""
        self._deaf.update(self._writers)

    async def attempted(self, count: int) -> None:
        """Wait until somebody has connected `count` times since the start."""
        while self.attempts < count:
            self._attempted.clear()
            await asyncio.wait_for(self._attempted.wait(), TIMEOUT)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.attempts += 1
        self._attempted.set()
        if not self.plugged:
            reset(writer)
            return
        self._writers.append(writer)
        task = asyncio.ensure_future(self._join(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*self.target)
        except OSError:
            reset(writer)
            return
        self._writers.append(far_writer)
        await asyncio.gather(
            self._pump(reader, far_writer, self.upward),
            self._pump(far_reader, writer, self.downward),
        )

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tap: bytearray
    ) -> None:
        with contextlib.suppress(ConnectionError, RuntimeError):
            while data := await reader.read(65536):
                tap += data
                if writer not in self._deaf:
                    writer.write(data)
                    await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def client_hello() -> bytes:
    """Return the first bytes of a TLS client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    link = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        link.do_handshake()
    return outgoing.read()


HTTP = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n"
