"""What goes back to the peer: results and errors, each the one final frame of what was asked.

While the peer does not acknowledge what it was sent before, answers are held, and their calls keep
their slots: whoever asks and never reads is refused, and in the end closed.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from ..exceptions import PayloadTooLarge, ProtocolError, RPCError
from ..protocol.events import Capabilities
from ..protocol.frames import SEQUENCED, CloseCode, FrameType, word
from ..protocol.payload import LARGE, UNSENDABLE, Encoder, decode
from .outlet import Outlet
from .running import Handler, text_of

__all__ = ["Answers", "Response"]

logger = logging.getLogger("conduit.connection")

_RESPONSE: Final = word(FrameType.RPC_RESPONSE, SEQUENCED)
_ERROR: Final = word(FrameType.RPC_ERROR, SEQUENCED)

HELD_BYTES: Final = 8 * 1024 * 1024
"""Bytes of answers that wait for an acknowledgement, above which calls are refused."""

T = TypeVar("T")

_Held = tuple[int, int, bytes, bool]


@dataclass(frozen=True, slots=True)
class Response(Generic[T]):
    """A result with metadata. A handler returns it; `returns=Response` gives it to the caller.

    Attributes:
        value: The result itself.
        headers: A map of plain data that travels beside it.
    """

    value: T
    headers: Mapping[str, Any] | None = None


class Answers:
    """The answers of one connection.

    Args:
        outlet: Where they go.
        encoder: Packs results.
        most: Answers that may wait for an acknowledgement at once.

    Attributes:
        held: Answers that wait because the outbox is full, if any ever did.
        held_bytes: Bytes of them.
        held_calls: Those of calls, whose slots are not free until they have left.
        value_max: Bytes of one value that the peer accepts.
    """

    __slots__ = (
        "_encoder",
        "_most",
        "_outlet",
        "held",
        "held_bytes",
        "held_calls",
        "value_max",
    )

    def __init__(self, outlet: Outlet, encoder: Encoder, *, most: int) -> None:
        self._outlet = outlet
        self._encoder = encoder
        self._most = most
        self.held: deque[_Held] | None = None
        self.held_bytes = self.held_calls = 0
        self.value_max = 0

    def opened(self, peer: Capabilities) -> None:
        """Learn what the peer accepts."""
        self.value_max = peer.frame_max

    def result(
        self, id: int, handler: Handler, result: Any, headers: dict[str, Any] | None = None
    ) -> None:
        """Answer a call with what its handler returned.

        Args:
            id: The correlation id.
            handler: Checks the result.
            result: The result, or a `Response`.
            headers: What else goes back beside it.

        Raises:
            Exception: The result cannot be sent, so the call is still to be answered.
        """
        finish = handler.finish
        if finish is not None:
            result = finish(result)
        if headers:
            result = _with_headers(result, headers)
        kind = type(result)
        if kind is bytes and len(result) >= LARGE:
            self._large(id, result)
            return
        try:
            if kind is Response:
                value = self._encoder.pack(result.value)
                body = b"\x92" + value + self._encoder.pack(dict(result.headers or {}))
            else:
                body = b"\x91" + self._encoder.pack(result)
        except UNSENDABLE as exc:
            raise self._encoder.explained(exc, result) from exc
        if len(body) - 1 > self.value_max:
            raise _too_large(len(body) - 1, self.value_max)
        outlet = self._outlet
        if outlet.full:
            self.send(_RESPONSE, id, body)
        else:
            outlet.protocol.send(_RESPONSE, id, body)

    def _large(self, id: int, result: bytes) -> None:
        if len(result) > self.value_max:
            raise _too_large(len(result), self.value_max)
        split = self._encoder.split(result)
        assert split is not None
        if self._outlet.full:
            self.send(_RESPONSE, id, b"\x91" + split[0] + split[1])
        else:
            self._outlet.send_split(_RESPONSE, id, b"\x91" + split[0], split[1])

    def error(self, id: int, error: RPCError, *, slot: bool = True) -> None:
        """Answer with an error; see `send`."""
        code, message = error.code, text_of(error.message)
        try:
            payload = self._encoder.pack([code, message, error.to_wire()])
            decode(payload)  # keys that are no text are noticed only there
        except (*UNSENDABLE, RPCError):
            logger.exception("the details of %s cannot be sent", type(error).__name__)
            payload = self._encoder.pack([code, message[:1000], {}])
        if len(payload) > self.value_max:
            logger.error(
                "the details of %s take %d bytes, and the caller accepts %d",
                type(error).__name__,
                len(payload),
                self.value_max,
            )
            payload = self._encoder.pack([code, message[:1000], {}])
        self.send(_ERROR, id, payload, slot=slot)

    def send(self, word: int, id: int, payload: bytes, *, slot: bool = True) -> None:
        """Send an answer, or hold it while the peer does not acknowledge what it has.

        Args:
            word: Type and flags.
            id: The correlation id.
            payload: MessagePack.
            slot: Whether it answers a call, which has its slot until the answer has left.
        """
        if self._outlet.full:
            if self.held is None:
                self.held = deque()
            self.held.append((word, id, payload, slot))
            self.held_bytes += len(payload)
            self.held_calls += slot
            self._outlet.head.grown()
        else:
            self._outlet.protocol.send(word, id, payload)

    def room(self) -> None:
        """Go on: the outlet has room again."""
        while self.held and not self._outlet.full:
            word, id, payload, slot = self.held.popleft()
            self.held_bytes -= len(payload)
            self.held_calls -= slot
            self._outlet.protocol.send(word, id, payload)
            self._outlet.flush()

    def waits(self) -> bool:
        """Whether so much waits for an acknowledgement that nothing new is to be begun."""
        return self._outlet.full and self.held_bytes > HELD_BYTES

    def check(self) -> None:
        """Refuse to go on with a peer that goes on asking and does not acknowledge the answers.

        Raises:
            ProtocolError: Too many answers are held.
        """
        held = len(self.held or ())
        if held > self._most:
            raise ProtocolError(
                f"{held} answers wait for an acknowledgement of what was sent before",
                close_code=CloseCode.FLOOD,
            )

    def end(self) -> None:
        """Forget what is held: nobody would read it."""
        self.held = None
        self.held_bytes = self.held_calls = 0


def _with_headers(result: Any, headers: dict[str, Any]) -> Response[Any]:
    """Return a result with further headers, those that it has itself before these."""
    if type(result) is Response:
        return Response(result.value, {**headers, **(result.headers or {})})
    return Response(result, headers)


def _too_large(size: int, limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"the result takes {size} bytes and the caller accepts {limit}; "
        "raise the caller's Limits.max_payload"
    )
