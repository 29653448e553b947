"""What a request says, as bytes: the method, its parameters, its time, and what is beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import BaseModel

from ..exceptions import PayloadTooLarge
from ..idempotency import KEY_BYTES
from ..protocol.payload import UNSENDABLE, Encoder

__all__ = [
    "DEFAULT",
    "NAME_BYTES",
    "Default",
    "Headers",
    "Params",
    "Requests",
    "checked_key",
    "no_timeout",
    "plain",
    "too_large",
]


class Default:
    """The type of `DEFAULT`, for annotations."""

    def __repr__(self) -> str:
        return "DEFAULT"


DEFAULT: Final = Default()
"""The timeout that the descriptor gives."""

_PREFIXES: Final = 1024
NAME_BYTES: Final = 256
HEADER_BYTES: Final = 3072
"""Bytes of headers that a request may have; they and the names fit into a frame's envelope."""

Params = Mapping[str, Any] | Sequence[Any] | BaseModel | None

Headers = Mapping[str, Any] | None
"""What travels beside the parameters of a call."""


class Requests:
    """Writes the requests of connections, but for their parameters.

    Args:
        encoder: Packs values.
        timeout: Seconds that the peer has been told at login that a call has; None for no limit.

    Attributes:
        prefixes: What stands before the parameters, by method, for those that were called.
    """

    __slots__ = ("_encoder", "_timeout", "prefixes")

    def __init__(self, encoder: Encoder, timeout: float | None) -> None:
        self._encoder = encoder
        self._timeout = timeout
        self.prefixes: dict[str, bytes] = {}

    def prefix(self, method: str) -> bytes:
        """Return what stands before the parameters, and keep it for the next call.

        Raises:
            ValueError: It is no name.
        """
        if not isinstance(method, str) or not 0 < len(method.encode()) <= NAME_BYTES:
            raise ValueError(
                f"a method name is text of 1 to {NAME_BYTES} bytes, not {method!r:.80}"
            )
        if len(self.prefixes) >= _PREFIXES:
            self.prefixes.clear()
        prefix = self.prefixes[method] = b"\x92" + self._encoder.pack(method)
        return prefix

    def with_ttl(self, prefix: bytes, seconds: float | None) -> tuple[bytes, bytes]:
        """Say how much time the call has, where it is not what was agreed at login.

        Returns:
            What stands before the parameters, and what stands behind them.
        """
        if seconds == self._timeout:
            return prefix, b""
        return b"\x93" + prefix[1:], b"\x81\xa3ttl" + self._encoder.pack(_ttl(seconds))

    def with_meta(
        self, prefix: bytes, seconds: float | None, headers: Headers, **meta: Any
    ) -> tuple[bytes, bytes]:
        """The same with headers, and with whatever else there is to say."""
        if headers:
            if not isinstance(headers, Mapping):
                raise TypeError(f"headers must be a mapping, not {headers!r:.80}")
            if not all(isinstance(key, str) for key in headers):
                raise TypeError("the names of headers must be text")
            meta["headers"] = dict(headers)
            try:
                size = len(self._encoder.pack(meta["headers"]))
            except UNSENDABLE as exc:
                raise self._encoder.explained(exc, {"headers": headers}) from exc
            if size > HEADER_BYTES:
                raise PayloadTooLarge(
                    f"the headers take {size} bytes, and {HEADER_BYTES} are the most"
                )
        if seconds != self._timeout:
            meta["ttl"] = _ttl(seconds)
        return b"\x93" + prefix[1:], self._encoder.pack(meta)


def plain(args: Any) -> dict[str, Any] | list[Any] | tuple[Any, ...]:
    """Return parameters as a map or an array."""
    if args is None:
        return {}
    if isinstance(args, (dict, list, tuple)):
        return args
    if isinstance(args, BaseModel):
        return args.model_dump(by_alias=True)
    if isinstance(args, Mapping):
        return dict(args)
    raise TypeError(
        f"args must be a mapping, a list, a tuple or a model, not {type(args).__name__}; "
        "data(a=1) makes one"
    )


def checked_key(key: str) -> str:
    """Return an idempotency key, or raise ValueError if it cannot be one."""
    if not isinstance(key, str) or not 0 < len(key.encode()) <= KEY_BYTES:
        raise ValueError(f"an idempotency key is text of 1 to {KEY_BYTES} bytes, not {key!r:.80}")
    return key


def _ttl(seconds: float | None) -> int:
    try:
        return 0 if seconds is None else max(1, round(seconds * 1000))
    except (TypeError, ValueError, OverflowError):
        raise no_timeout(seconds) from None


def no_timeout(given: Any) -> TypeError:
    """Return the error for what cannot be a timeout."""
    return TypeError(
        f"timeout must be a number of seconds, or None for no deadline, not {given!r:.80}"
    )


def too_large(what: str, size: int, limit: int) -> PayloadTooLarge:
    """Return the error for what the peer does not accept."""
    return PayloadTooLarge(
        f"{what} take {size} bytes and the peer accepts {limit}; raise its Limits.max_payload"
    )
