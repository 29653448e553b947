"""The keys that clients derive from passwords, kept so that only the first login is slow.

Deriving takes a tenth of a second of CPU by design, so it is done in a thread of its own and never
twice for the same password, salt and iterations: neither after a reconnect nor by a thousand
clients that start at the same time. The password itself is not kept.
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

from ..protocol.scram import Keys, derive_keys

__all__ = ["client_keys", "forget_keys", "known_keys"]

KEPT = 16

# A forked process has the executor, but none of its threads, and derivations that never end.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _start_again())

_Key = tuple[bytes, bytes, int]
_cache: OrderedDict[_Key, Future[Keys]] = OrderedDict()
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


async def client_keys(password: str, salt: bytes, iterations: int) -> Keys:
    """Return the keys of a password, derived in a thread unless they are known.

    Cancelling the caller does not end a derivation that others may wait for.
    """
    key = _key(password, salt, iterations)
    with _lock:
        future = _cache.get(key)
        if future is None or future.cancelled():
            future = _cache[key] = _executor().submit(derive_keys, password, salt, iterations)
        _cache.move_to_end(key)
        while len(_cache) > KEPT:
            _cache.popitem(last=False)
    if future.done():
        return future.result()
    return await asyncio.shield(asyncio.wrap_future(future))


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
