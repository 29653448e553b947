"""The keys that clients derive from passwords, kept so that only the first login is slow.

Deriving takes a tenth of a second of CPU by design, so it is done in a thread of its own and never
twice for the same password, salt and iterations: neither after a reconnect nor by a thousand
clients that start at the same time. The password itself is not kept.

A server that asks for another salt each time makes its clients burn that time at each login. So
only a few derivations a minute are begun for one server and one password.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import secrets
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from time import monotonic

from ..exceptions import Unavailable
from ..protocol.scram import Keys, derive_keys

__all__ = ["client_keys", "forget_keys", "known_keys"]

KEPT = 16

MOST, PERIOD = 5, 60.0
"""Derivations that are begun for one server and one password, within so many seconds."""

# A forked process has the executor, but none of its threads, and derivations that never end.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _start_again())

_Key = tuple[bytes, bytes, int]
_cache: OrderedDict[_Key, Future[Keys]] = OrderedDict()
_begun: OrderedDict[tuple[str, bytes], list[float]] = OrderedDict()
"""When derivations were begun by `monotonic`, by server and password; the latest stands last."""
_lock = threading.Lock()
_secret = secrets.token_bytes(32)


@cache
def _executor() -> ThreadPoolExecutor:
    # asyncio's default executor also resolves host names; a queue of derivations must not block it.
    return ThreadPoolExecutor(2, thread_name_prefix="conduit-keys")


def _start_again() -> None:
    global _lock
    _executor.cache_clear()
    _lock = threading.Lock()
    for key in [key for key, keys in _cache.items() if not keys.done()]:
        del _cache[key]


def _key(password: str, salt: bytes, iterations: int) -> _Key:
    return _digest(password), salt, iterations


async def client_keys(server: str, password: str, salt: bytes, iterations: int) -> Keys:
    """Return the keys of a password, derived in a thread unless they are known.

    Cancelling the caller does not end a derivation that others may wait for.

    Args:
        server: Who asks for them.
        password: Of what.
        salt: With what.
        iterations: How often.

    Raises:
        Unavailable: The server has asked for too many within a minute; `retry_after` says when the
            next may be derived.
    """
    key = _key(password, salt, iterations)
    with _lock:
        future = _cache.get(key)
        if future is None or future.cancelled():
            _count(server, key[0])
            future = _cache[key] = _executor().submit(derive_keys, password, salt, iterations)
        _cache.move_to_end(key)
        while len(_cache) > KEPT:
            _cache.popitem(last=False)
    if future.done():
        return future.result()
    return await asyncio.shield(asyncio.wrap_future(future))


def _count(server: str, digest: bytes) -> None:
    """Count a derivation for a server and a password, if there may be another one now."""
    now = monotonic()
    while _begun and next(iter(_begun.values()))[-1] <= now - PERIOD:
        _begun.popitem(last=False)
    recent = [moment for moment in _begun.get((server, digest), ()) if moment > now - PERIOD]
    if len(recent) >= MOST:
        seconds = recent[-MOST] + PERIOD - now
        raise Unavailable(
            f"{server} has had keys derived {len(recent)} times within {PERIOD:g} s, because its "
            f"salt changes or it refuses the password; the next may be in {seconds:.0f} s",
            details={"retryable": True, "retry_after": round(seconds * 1000)},
        )
    _begun[server, digest] = [*recent, now]
    _begun.move_to_end((server, digest))


def known_keys(password: str, salt: bytes, iterations: int) -> Keys | None:
    """Return the keys of a password if they were derived before."""
    future = _cache.get(_key(password, salt, iterations))
    return future.result() if future is not None and future.done() else None


def forget_keys(password: str) -> None:
    """Drop the keys of a password that was refused."""
    digest = _digest(password)
    with _lock:
        for key in [key for key in _cache if key[0] == digest]:
            del _cache[key]


def _digest(password: str) -> bytes:
    return hmac.new(_secret, password.encode(), hashlib.sha256).digest()
