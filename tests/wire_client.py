"""A blocking client of the CNDT wire, written from docs/protocol.md alone, without conduit.

`WireClient(host, port).login("secret")`, then `call`, `send`, `request`, `ping` and `close`.
`Wire` is what both sides share; wire_server.py builds the other side from it. Tests that attack
a server write bytes of their own, `client.write(frame(type, flags, id, payload, seq))`, and look
at what comes back with `read_frame` or `wait_closed`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import socket
import ssl
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import msgpack

HEADER = struct.Struct(">4sBBHIQQI")
MESSAGE, RPC_REQUEST, RPC_RESPONSE, RPC_ERROR, PING, PONG = 1, 2, 3, 4, 5, 6
AUTH_REQUEST, AUTH_SUCCESS, AUTH_FAILURE, AUTH_CHALLENGE, AUTH_RESPONSE = 7, 8, 9, 16, 17
ACK, CANCEL, STREAM_ITEM, STREAM_END, STREAM_CREDIT, GOAWAY, CLOSE = 18, 19, 20, 21, 22, 23, 24
COMPRESSED, SEQUENCED, PRIORITY, REPLY = 1, 2, 8, 16
# The low byte of the flags that a type may have after login.
FLAGS: dict[int, tuple[int, ...]] = {
    MESSAGE: (SEQUENCED, SEQUENCED | REPLY, PRIORITY),
    PING: (0, PRIORITY),
    **dict.fromkeys((PONG, ACK, GOAWAY, CLOSE), (0,)),
    **dict.fromkeys((RPC_REQUEST, RPC_RESPONSE, RPC_ERROR, CANCEL), (SEQUENCED,)),
    **dict.fromkeys((STREAM_ITEM, STREAM_END, STREAM_CREDIT), (SEQUENCED,)),
}
DEFAULTS: dict[str, Any] = {
    "frame_max": 1 << 20,
    "calls": 256,
    "window": [256, 1 << 20],
    "stream": [4096, 1 << 18],
}
W = TypeVar("W", bound="Wire")


class Frame(NamedTuple):
    type: int
    flags: int
    id: int
    payload: bytes
    seq: int  # the reserved field
    timestamp: int

    @property
    def value(self) -> Any:
        return unpack(self.payload)


class WireError(Exception):
    """The peer broke the wire, or did not prove that it knows the password."""


class LoginFailed(Exception):
    """AUTH_FAILURE; `code` says why and `details` is its whole payload."""

    def __init__(self, details: dict[str, Any]) -> None:
        super().__init__(f"{details['code']}: {details['message']}")
        self.code: str = details["code"]
        self.details = details


class RemoteError(Exception):
    """RPC_ERROR: the peer answered with an error."""

    def __init__(self, code: str, message: str = "", details: dict[str, Any] | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message, self.details = code, message, details or {}


class Closed(Exception):
    """The peer closed; code 1006 when it did so without CLOSE."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(f"{code}: {reason}")
        self.code, self.reason = code, reason


def frame(
    type: int, flags: int = 0, id: int = 0, payload: bytes = b"", seq: int = 0, version: int = 1
) -> bytes:
    """Make one frame; nothing is checked, so that tests can send what is wrong."""
    reserved = seq & 0xFFFFFFFF
    return HEADER.pack(b"CNDT", version, type, flags, len(payload), id, 0, reserved) + payload


def pack(value: object) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


def unpack(payload: bytes) -> Any:
    """Decode a payload; `max_ext_len` stops timestamps, for which `ext_hook` is not asked."""
    try:
        return msgpack.unpackb(
            payload,
            ext_hook=refuse_extension,
            max_ext_len=0,
            strict_map_key=False,
            object_pairs_hook=with_text_keys,
        )
    except ValueError as exc:
        raise WireError(f"bad payload: {exc}") from exc


def with_text_keys(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return a map in which numbers, booleans and nil are keys as JSON has them."""
    return {key if isinstance(key, str | bytes) else json.dumps(key): value for key, value in pairs}


def refuse_extension(code: int, data: bytes) -> object:
    raise ValueError(f"extension type {code}")


class Wire:
    """One end of a connection after login: numbers, acknowledgement, credit, calls."""

    def __init__(self, sock: socket.socket, first_id: int, caps: dict[str, Any] | None) -> None:
        self.sock = sock
        self.caps = {**DEFAULTS, **(caps or {})}
        self.peer_caps = DEFAULTS
        self.messages: list[tuple[str, Any, int]] = []  # name, data, credit in bytes (-1: none)
        self.goaway: list[Any] | None = None
        self.sent = self.received = self.peer_acked = self.acked = 0
        self.unacked_bytes = 0
        self.buffer = b""
        self.outbox: dict[int, bytes] = {}  # what is not acknowledged, for another link
        self._next_id, self._last_peer_id = first_id, 0
        self._answers: dict[int, Any] = {}  # None while the answer is awaited
        self._pongs: set[int] = set()
        self._credit = [0, 0]
        self.items: dict[int, list[Any]] = {}  # of each call with streams
        self._item_credit: dict[int, list[int]] = {}

    def __enter__(self: W) -> W:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    # Bytes and frames

    def write(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except ConnectionError as exc:
            raise Closed(1006, str(exc)) from exc

    def read_frame(self) -> Frame:
        """Read one frame, whatever it is; raise `Closed` at the end of the stream."""
        header = self._read(HEADER.size)
        magic, version, type, flags, length, id, timestamp, reserved = HEADER.unpack(header)
        if (magic, version) != (b"CNDT", 1):
            raise WireError(f"not a CNDT frame of version 1: {header.hex()}")
        if length > self.caps["frame_max"] + 4096:
            raise WireError(f"frame of {length} bytes is above the limit")
        return Frame(type, flags, id, self._read(length), reserved, timestamp)

    def _read(self, size: int) -> bytes:
        while len(self.buffer) < size:
            try:
                data = self._receive()
            except ConnectionError as exc:
                raise Closed(1006, str(exc)) from exc
            if not data:
                raise Closed(1006, "the stream ended without CLOSE")
            self.buffer += data
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def _receive(self) -> bytes:
        """Receive bytes; what is not acknowledged after 200 ms of waiting is acknowledged then."""
        patience = self.sock.gettimeout()
        if self.acked < self.received and (patience is None or patience > 0.2):
            self.sock.settimeout(0.2)
            try:
                return self.sock.recv(65536)
            except TimeoutError:
                self.acknowledge()
            finally:
                self.sock.settimeout(patience)
        return self.sock.recv(65536)

    def post(self, type: int, id: int, value: object, flags: int = SEQUENCED) -> None:
        """Send one sequenced frame."""
        self._post(type, flags, id, b"" if value is None else pack(value))

    def _post(self, type: int, flags: int, id: int, payload: bytes) -> None:
        self.sent += 1
        self.outbox[self.sent] = frame(type, flags, id, payload, self.sent)
        self.write(self.outbox[self.sent])

    def acknowledge(self) -> None:
        if self.acked < self.received:
            self.acked, self.unacked_bytes = self.received, 0
            self.write(frame(ACK, id=self.received))

    # What the program does

    def call(self, method: str, params: Any = None, meta: dict[str, Any] | None = None) -> Any:
        """Call a method and wait for its result; raise `RemoteError` for RPC_ERROR."""
        if not self.peer_caps["calls"]:
            raise RemoteError("overloaded", "the peer serves no calls")
        id = self.open_id()
        request = [method, {} if params is None else params]
        self.post(RPC_REQUEST, id, request if meta is None else [*request, meta])
        return self.wait_answer(id)[0]

    def stream(
        self,
        method: str,
        params: Any = None,
        parameter: str | int | None = None,
        items: Iterable[Any] = (),
    ) -> tuple[list[Any], Any]:
        """Call a method with streams; return its items and its result."""
        id = self.open_id()
        self.items[id] = []
        self._item_credit[id] = list(self.peer_caps["stream"])
        meta = {"stream": parameter, "ttl": 0}
        self.post(RPC_REQUEST, id, [method, {} if params is None else params, meta])
        for item in items:
            while min(self._item_credit[id]) <= 0 and self._answers[id] is None:
                self.step()
            payload = pack([item])
            credit = self._item_credit[id]
            self._item_credit[id] = [credit[0] - 1, credit[1] - len(payload)]
            self.post(STREAM_ITEM, id, [item])
        if parameter is not None:
            self.post(STREAM_END, id, None)
        result = self.wait_answer(id)[0]
        return self.items.pop(id), result

    def send(self, name: str, data: Any = None, id: int = 0) -> None:
        """Send a message; wait for credit first."""
        while min(self._credit) <= 0:
            self.step()
        payload = pack([name, data])
        self._credit = [self._credit[0] - 1, self._credit[1] - len(payload)]
        self._post(MESSAGE, SEQUENCED, id, payload)

    def request(self, name: str, data: Any = None) -> Any:
        """Send a message and wait for its answer."""
        id = self.open_id()
        self.send(name, data, id)
        return self.wait_answer(id)[1]

    def ping(self, id: int = 1) -> None:
        """Ping and wait for the pong, which comes after the acknowledgement of what was sent."""
        self.write(frame(PING, PRIORITY, id))
        while id not in self._pongs:
            self.step()
        self._pongs.remove(id)

    def receive(self) -> tuple[str, Any]:
        """Wait for the next message of the peer, and give its credit back."""
        while not self.messages:
            self.step()
        name, data, size = self.messages.pop(0)
        if size >= 0:
            self.post(STREAM_CREDIT, 0, [1, size])
        self.acknowledge()  # the program may not read again for long
        return name, data

    def close(self, code: int = 1000, reason: str = "") -> None:
        try:
            self.write(frame(CLOSE, payload=pack([code, reason])))
            self.sock.shutdown(socket.SHUT_WR)
            while self.sock.recv(65536):
                pass
        except (Closed, ConnectionError):
            pass  # the peer cut the connection; that is an end as well
        self.sock.close()

    def wait_closed(self) -> tuple[int, str]:
        """Serve the peer until it closes; return its code and reason."""
        try:
            while True:
                self.step()
        except Closed as exc:
            return exc.code, exc.reason

    def open_id(self) -> int:
        id, self._next_id = self._next_id, self._next_id + 2
        self._answers[id] = None
        return id

    def wait_answer(self, id: int) -> Any:
        """Wait for the answer to `id`, serving the peer meanwhile."""
        while self._answers[id] is None:
            self.step()
        self.acknowledge()  # the program may not read again for long
        answer = self._answers.pop(id)
        if isinstance(answer, RemoteError):
            raise answer
        return answer

    # What the peer does

    def step(self) -> Frame:
        """Read one frame and do what it asks for."""
        got = self.read_frame()
        self.check(got)
        if got.type == MESSAGE:
            self._message(got)
        elif got.type == RPC_REQUEST:
            self._check_id(got.id)
            method, params, *_ = got.value
            self.on_call(got.id, method, params)
        elif got.type in (RPC_RESPONSE, RPC_ERROR):
            value = got.value
            self._answer(got.id, RemoteError(*value) if got.type == RPC_ERROR else value)
        elif got.type == PING:
            self.acknowledge()
            self.write(frame(PONG, id=got.id))
        elif got.type == PONG:
            self._pongs.add(got.id)
        elif got.type == ACK:
            self._acknowledged(got.id)
        elif got.type == STREAM_CREDIT and got.id == 0:
            self._credit = [old + more for old, more in zip(self._credit, got.value, strict=True)]
        elif got.type == STREAM_CREDIT and got.id in self._item_credit:
            credit = self._item_credit[got.id]
            self._item_credit[got.id] = [a + b for a, b in zip(credit, got.value, strict=True)]
        elif got.type == STREAM_ITEM and got.id in self.items:
            self.items[got.id] += got.value
            self.post(STREAM_CREDIT, got.id, [len(got.value), len(got.payload)])
        elif got.type == GOAWAY:
            self.goaway = got.value
        elif got.type == CLOSE:
            raise Closed(*got.value)
        if self.received - self.acked >= 64 or self.unacked_bytes >= 256 * 1024:
            self.acknowledge()
        return got

    def on_call(self, id: int, method: str, params: Any) -> None:
        """Answer a call of the peer."""
        self.post(RPC_ERROR, id, ["method_not_found", f"no method named {method!r}", {}])

    def on_message(self, id: int, name: str, data: Any, size: int) -> None:
        """Take a message of the peer; `size` is its credit in bytes, -1 if it has none."""
        if not id:
            self.messages.append((name, data, size))
            return
        self.post(RPC_ERROR, id, ["method_not_found", f"no handler for {name!r}", {}])
        self.post(STREAM_CREDIT, 0, [1, size])

    def _message(self, got: Frame) -> None:
        name, data = got.value
        if got.flags & REPLY and got.id:
            self._answer(got.id, [name, data])
            return
        if got.id:
            self._check_id(got.id)
        costs_credit = got.flags & SEQUENCED and not got.flags & REPLY
        self.on_message(got.id, name, data, len(got.payload) if costs_credit else -1)

    def _answer(self, id: int, answer: Any) -> None:
        if id in self._answers:  # otherwise it is a late one
            self._answers[id] = answer

    def check(self, got: Frame) -> None:
        """Check flags and number of a frame; count it."""
        low = got.flags & 0xFF
        unlisted = (0,) if got.type >= 128 else ()
        is_broadcast = got.type == MESSAGE and low == PRIORITY
        if low not in FLAGS.get(got.type, unlisted) or (is_broadcast and got.id):
            raise WireError(f"frame of type {got.type} with flags {got.flags} and id {got.id}")
        if low & SEQUENCED:
            self.received += 1
            self.unacked_bytes += HEADER.size + len(got.payload)
        if got.seq != (self.received & 0xFFFFFFFF if low & SEQUENCED else 0):
            raise WireError(f"number {got.seq} in place of {self.received}")

    def _check_id(self, id: int) -> None:
        if id % 2 == self._next_id % 2 or id <= self._last_peer_id:
            raise WireError(f"id {id} after {self._last_peer_id}")
        self._last_peer_id = id

    def _acknowledged(self, number: int) -> None:
        if number > self.sent:
            raise WireError(f"{number} frames are accepted, but only {self.sent} were sent")
        for accepted in range(self.peer_acked + 1, number + 1):
            self.outbox.pop(accepted, None)
        self.peer_acked = max(self.peer_acked, number)

    def go_on(self, accepted: int) -> None:
        """Send again, over another link, what the peer has not accepted."""
        self._acknowledged(accepted)
        self.acked, self.unacked_bytes = self.received, 0  # the login has told
        self.write(b"".join(self.outbox.values()))

    def start(self, peer_caps: dict[str, Any]) -> None:
        """Login is over: the limits of the peer are in force."""
        self.peer_caps = {**DEFAULTS, **peer_caps}
        self._credit = list(self.peer_caps["window"])


class Keys(NamedTuple):
    client: bytes
    stored: bytes
    server: bytes


def derive_keys(password: str, salt: bytes, iterations: int) -> Keys:
    """The keys of SCRAM. ASCII passwords need no preparation, others NFC first."""
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, iterations)
    client = mac(salted, b"Client Key")
    return Keys(client, hashlib.sha256(client).digest(), mac(salted, b"Server Key"))


def mac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def login_digest(request: bytes, caps: bytes) -> str:
    """`d`: it puts the whole AUTH_REQUEST and the server's capabilities under both proofs."""
    head = b"CNDT-AUTH-v1" + struct.pack(">BI", 1, len(request))
    return b64(hashlib.sha256(head + request + caps).digest())


def dial(host: str, port: int, timeout: float) -> socket.socket:
    sock = socket.create_connection((host, port), timeout)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class WireClient(Wire):
    """The connecting side."""

    def __init__(
        self,
        host: str,
        port: int,
        caps: dict[str, Any] | None = None,
        timeout: float = 5.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        sock = dial(host, port, timeout)
        if tls is not None:
            sock = tls.wrap_socket(sock, server_hostname="localhost")
        super().__init__(sock, 1, caps)
        self.own_caps = caps or {}
        self.success: dict[str, Any] = {}

    def resume(self, host: str, port: int, password: str | None, timeout: float = 5.0) -> bool:
        """Go on with the session over another link; False if the server has started a new one."""
        session = self.success["session"]
        name = {"id": session["id"], "epoch": session["epoch"]}
        self.sock, self.buffer = dial(host, port, timeout), b""
        self.login(password, session={**name, "recv": self.received})
        answer = self.success["session"]
        if not answer["resumed"]:
            return False
        if {"id": answer["id"], "epoch": answer["epoch"]} != name:
            raise WireError("the server goes on with another session")
        self.go_on(answer["recv"])
        return True

    def login(
        self,
        password: str | None,
        user: str = "default",
        agent: str = "wire-client/1.0",
        min_iterations: int = 4096,
        nonce: str = "",
        methods: bytes = b"",
        session: dict[str, Any] | None = None,
        external: bool = False,
    ) -> WireClient:
        """Log in: by password, by certificate (`external`), or as ANONYMOUS.

        Raises `LoginFailed` or `WireError`.
        """
        nonce = nonce or b64(os.urandom(18))
        bare = f"n={user.replace('=', '=3D').replace(',', '=2C')},r={nonce}"
        scram = "" if password is None else "n,," + bare
        mech = "ANONYMOUS" if password is None else "SCRAM-SHA-256"
        if external:
            mech, scram = "EXTERNAL", user
        payload = {"v": 1, "mech": mech, "scram": scram, "caps": self.own_caps}
        payload |= {"session": session, "agent": agent}
        request = pack({**payload, "methods": methods} if methods else payload)
        self.write(frame(AUTH_REQUEST, id=1, payload=request))
        if password is None:
            self.success = self._expect(AUTH_SUCCESS)
            self._begin(unpack(self.success["caps"]))
            return self

        challenge = self._expect(AUTH_CHALLENGE)
        server_first = challenge["scram"]
        fields = dict(field.split("=", 1) for field in server_first.split(","))
        if "m" in fields or not fields["r"].startswith(nonce) or len(fields["r"]) < len(nonce) + 18:
            raise WireError(f"wrong nonce in {server_first!r}")
        if not min_iterations <= int(fields["i"]) <= 2_000_000:
            raise WireError(f"{fields['i']} iterations are outside the limits")
        if fields.get("d") != login_digest(request, challenge["caps"]):
            raise WireError("the login was changed on its way: wrong d or none")
        salt = base64.b64decode(fields["s"], validate=True)
        if not 12 <= len(salt) <= 64:
            raise WireError(f"salt of {len(salt)} bytes")

        keys = derive_keys(password, salt, int(fields["i"]))
        final = f"c=biws,r={fields['r']}"
        transcript = f"{bare},{server_first},{final}".encode()
        proof = b64(xor(keys.client, mac(keys.stored, transcript)))
        self.write(frame(AUTH_RESPONSE, id=1, payload=pack({"scram": f"{final},p={proof}"})))
        self.success = self._expect(AUTH_SUCCESS)
        if self.success["scram"] != "v=" + b64(mac(keys.server, transcript)):
            raise WireError("the server does not know the password: wrong v")
        self._begin(unpack(challenge["caps"]))
        return self

    def _begin(self, caps: dict[str, Any]) -> None:
        """Start a session, unless one goes on: then its limits and its credit do so, too."""
        if not self.success["session"]["resumed"]:
            self.start(caps)

    def _expect(self, type: int) -> dict[str, Any]:
        got = self.read_frame()
        if got.type == AUTH_FAILURE:
            raise LoginFailed(got.value)
        if got.type == CLOSE:
            raise Closed(*got.value)
        if (got.type, got.flags, got.id, got.seq) != (type, 0, 1, 0) or len(got.payload) > 4096:
            raise WireError(f"{got} in place of a frame of type {type}")
        value: dict[str, Any] = got.value
        return value
