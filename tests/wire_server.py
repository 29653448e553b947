"""A blocking server of the CNDT wire for one connection, in a thread; see wire_client.py.

It shows whether a client keeps to docs/protocol.md: `frames` is every frame that the client sent,
`error` what ended the thread if it was not the end of the connection. `rewrite_first` and
`rewrite_final` change the SCRAM strings on their way out and make a rogue server of it.
"""

from __future__ import annotations

import hmac
import os
import re
import socket
import threading
from base64 import b64decode
from collections.abc import Callable, Mapping
from typing import Any

from tests.wire_client import (
    AUTH_CHALLENGE,
    AUTH_FAILURE,
    AUTH_REQUEST,
    AUTH_RESPONSE,
    AUTH_SUCCESS,
    MESSAGE,
    REPLY,
    RPC_ERROR,
    RPC_RESPONSE,
    SEQUENCED,
    STREAM_CREDIT,
    Closed,
    Frame,
    RemoteError,
    Wire,
    WireError,
    b64,
    derive_keys,
    frame,
    login_digest,
    mac,
    pack,
    xor,
)

Answer = Callable[[Any], Any]
NO_ANSWER = object()
"""What an entry of `calls` or `replies` returns so that nothing is sent back."""


class WireServer:
    """Listen on a free port of loopback, serve the first connection, then end.

    `calls` and `replies` map names to functions of the params or data; one that raises
    `RemoteError` gives RPC_ERROR. A message without an entry in `replies` goes to `messages`.
    `script` runs after login in place of serving; it gets the `ServerEnd`, which is `end` as well.
    `failure` is sent as AUTH_FAILURE in place of the challenge; `trusting` is a rogue that answers
    AUTH_SUCCESS at once, whoever asks; without `give_credit` no message gets its credit back.
    `methods` is what identifies the calls, if it is told.
    `ttl` is how long it says that it keeps the session; a script calls `end.next_link()`.
    """

    def __init__(
        self,
        password: str | None = "pencil",
        *,
        iterations: int = 4096,
        caps: dict[str, Any] | None = None,
        heartbeat: tuple[int, int] = (30_000, 90_000),
        calls: Mapping[str, Answer] | None = None,
        replies: Mapping[str, Answer] | None = None,
        script: Callable[[ServerEnd], object] | None = None,
        failure: dict[str, Any] | None = None,
        trusting: bool = False,
        give_credit: bool = True,
        methods: object = None,
        ttl: int = 0,
        rewrite_first: Callable[[str], str] = str,
        rewrite_final: Callable[[str], str] = str,
    ) -> None:
        self.password = password
        self.iterations = iterations
        self.salt = os.urandom(16)  # of its user: one that changes is a fault, and throttled
        self.caps = caps or {}
        self.heartbeat = heartbeat
        self.calls = calls or {}
        self.replies = replies or {}
        self.script = script
        self.failure = failure
        self.trusting = trusting
        self.give_credit = give_credit
        self.methods = methods
        self.ttl = ttl
        self.rewrite_first = rewrite_first
        self.rewrite_final = rewrite_final
        self.frames: list[Frame] = []
        self.messages: list[tuple[str, Any]] = []
        self.closed: tuple[int, str] | None = None
        self.error: Exception | None = None
        self.end: ServerEnd
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(5.0)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, name="wire-server", daemon=True)

    def start(self) -> WireServer:
        self._thread.start()
        return self

    def __enter__(self) -> WireServer:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.join()

    def join(self) -> None:
        """Wait until the connection has ended; raise what went wrong on this side."""
        self._thread.join(10.0)
        self._listener.close()
        if self._thread.is_alive():
            raise TimeoutError("the wire server still serves its connection")
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def accept(self) -> socket.socket:
        """Wait for the next connection."""
        sock, _ = self._listener.accept()
        sock.settimeout(5.0)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def _run(self) -> None:
        try:
            with ServerEnd(self.accept(), self) as self.end:
                if self.end.login():
                    (self.script or ServerEnd.serve)(self.end)
        except Closed as exc:
            self.closed = (exc.code, exc.reason)
        except Exception as exc:  # noqa: BLE001 - join() hands it to the test
            self.error = exc


class ServerEnd(Wire):
    """The accepting side of the one connection."""

    def __init__(self, sock: socket.socket, server: WireServer) -> None:
        super().__init__(sock, 2, server.caps)
        self.server = server
        self.asked: dict[str, Any] = {}
        self.session = {"id": os.urandom(16), "epoch": os.urandom(8)}

    def next_link(self) -> bool:
        """Give the link up, if it is still there, and wait for the client to come again.

        Returns True if it goes on with the session; else this end is of no more use.
        """
        self.sock.close()
        self.sock, self.buffer = self.server.accept(), b""
        return self.login() and self.resumed

    @property
    def resumed(self) -> bool:
        """Whether the client has asked for the session of this end."""
        wanted = self.asked.get("session") or {}
        return {key: wanted.get(key) for key in ("id", "epoch")} == self.session

    def read_frame(self) -> Frame:
        got = super().read_frame()
        self.server.frames.append(got)
        return got

    def serve(self) -> None:
        """Answer until the client closes."""
        while True:
            self.step()

    def login(self) -> bool:
        """Log the client in; False after AUTH_FAILURE."""
        server = self.server
        request = self._expect(AUTH_REQUEST)
        self.asked = request.value
        caps = pack(server.caps)
        mech = "ANONYMOUS" if server.password is None else "SCRAM-SHA-256"
        if server.trusting:
            return self.answer("", "anonymous", caps=caps)
        if server.failure is not None:
            return self._fail(**server.failure)
        if self.asked["mech"] != mech:
            return self._fail("unsupported_mechanism", f"use {mech}", mechs=[mech])
        if server.password is None:
            return self.answer("", "anonymous", caps=caps)

        match = re.fullmatch(r"([ny],,)(n=([^,]+),r=([!-+\--~]{18,}))", self.asked["scram"])
        if match is None:
            return self._fail("bad_request", f"bad client-first {self.asked['scram']!r}")
        binding, bare, user, nonce = match.groups()
        salt = server.salt
        nonce += b64(os.urandom(18))
        digest = login_digest(request.payload, caps)
        first = f"r={nonce},s={b64(salt)},i={server.iterations},d={digest}"
        first = server.rewrite_first(first)
        self.write(frame(AUTH_CHALLENGE, id=1, payload=pack({"scram": first, "caps": caps})))

        final = self._expect(AUTH_RESPONSE).value["scram"]
        without_proof, _, proof = final.rpartition(",p=")
        keys = derive_keys(server.password, salt, server.iterations)
        transcript = f"{bare},{first},{without_proof}".encode()
        client_key = xor(b64decode(proof), mac(keys.stored, transcript))
        right = hmac.compare_digest(client_key, keys.client)
        if not right or without_proof != f"c={b64(binding.encode())},r={nonce}":
            return self._fail("invalid_credentials", "invalid credentials")
        signature = server.rewrite_final("v=" + b64(mac(keys.server, transcript)))
        return self.answer(signature, user.replace("=2C", ",").replace("=3D", "="))

    def answer(self, scram: str, identity: str, **more: object) -> bool:
        """Let the client in, or go on with its session."""
        numbers = {"resumed": self.resumed, "recv": self.received if self.resumed else 0}
        success = {
            "scram": scram,
            "identity": identity,
            "session": {**self.session, **numbers, "ttl": self.server.ttl},
            "hb": list(self.server.heartbeat),
            "server": {"name": "wire-server", "version": "1.0"},
            **({"methods": self.server.methods} if self.server.methods is not None else {}),
            **more,
        }
        self.write(frame(AUTH_SUCCESS, id=1, payload=pack(success)))
        if self.resumed:
            self.go_on(self.asked["session"]["recv"])
        else:
            self.start(self.asked["caps"])
        return True

    def _fail(self, code: str, message: str = "", **more: object) -> bool:
        failure = {"code": code, "message": message, "retry": False, "retry_after": 0, "mechs": []}
        self.write(frame(AUTH_FAILURE, id=1, payload=pack({**failure, **more})))
        return False

    def _expect(self, type: int) -> Frame:
        got = self.read_frame()
        if (got.type, got.flags, got.id, got.seq) != (type, 0, 1, 0) or len(got.payload) > 4096:
            raise WireError(f"{got} in place of a frame of type {type}")
        return got

    def on_call(self, id: int, method: str, params: Any) -> None:
        answer = self.server.calls.get(method)
        if answer is None:
            super().on_call(id, method, params)
            return
        try:
            result = answer(params)
        except RemoteError as exc:
            self.post(RPC_ERROR, id, [exc.code, exc.message, exc.details])
        else:
            if result is not NO_ANSWER:
                self.post(RPC_RESPONSE, id, [result])

    def on_message(self, id: int, name: str, data: Any, size: int) -> None:
        answer = self.server.replies.get(name)
        if answer is None:
            self.server.messages.append((name, data))
            if id:
                super().on_message(id, name, data, size)
                return
        else:
            result = answer(data)
            if result is not NO_ANSWER and (id or result is not None):
                reply = [name if id else f"{name}_response", result]
                self.post(MESSAGE, id, reply, SEQUENCED | REPLY)
        if size >= 0 and self.server.give_credit:
            self.post(STREAM_CREDIT, 0, [1, size])
