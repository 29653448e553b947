"""Peers that have come to a state already: to log in for each input would be most of what it costs.

A peer is brought to a state once, and each input gets a copy of it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from conduit.protocol.cndt import CNDT, State
from conduit.protocol.events import Capabilities
from tests.protocol.pair import Clock, Pair, Side, peer_in

__all__ = ["open_pair", "peer_at"]

T = TypeVar("T")

_names: dict[type, list[str]] = {}
"""Class -> the names of its slots."""


def peer_at(side: str, state: State, capabilities: Capabilities) -> CNDT:
    """Return a new peer that is in a state, as `tests.protocol.pair.peer_in` brings it there."""
    return _brought(side, state, capabilities).copy(Clock())


def open_pair(make: Callable[[], Pair]) -> Pair:
    """Return a new pair as `make` returns it, whose login is done; `make` is called once."""
    made, client, server = _made(make)
    pair = copy.copy(made)
    pair.clock = Clock()
    pair.client = Side("client", client.copy(pair.clock))
    pair.server = Side("server", server.copy(pair.clock))
    return pair


class Template:
    """A peer as it stands, of which there may be any number."""

    def __init__(self, peer: CNDT) -> None:
        values = {name: getattr(peer, name) for name in _slots(CNDT)}
        self._shared = {name: value for name, value in values.items() if _never_changes(value)}
        self._own = {name: value for name, value in values.items() if name not in self._shared}

    def copy(self, clock: Clock) -> CNDT:
        """Return a peer that shares nothing with another which could change."""
        new = object.__new__(CNDT)
        for name, value in self._shared.items():
            setattr(new, name, value)
        for name, value in self._own.items():
            setattr(new, name, value.copy() if type(value) is list else _twin(value))
        new._clock = clock
        new.session._outbox = new.session._outbox.copy()
        login = new._login
        if login is not None:
            login._send = new.send_login
            login._scram = _twin(login._scram)
            login.peer = new.peer
        return new


def _twin(value: T) -> T:
    # As `copy.copy` does, which was half of what a peer costs.
    new = object.__new__(type(value))
    for name in _slots(type(value)):
        setattr(new, name, getattr(value, name))
    if hasattr(value, "__dict__"):
        new.__dict__.update(value.__dict__)
    return new


def _slots(kind: type) -> list[str]:
    if kind not in _names:
        slots = (name for base in kind.__mro__ for name in getattr(base, "__slots__", ()))
        _names[kind] = [name for name in slots if not name.startswith("__")]
    return _names[kind]


def _never_changes(value: Any) -> bool:
    # What is accepted in a state is one table for all peers.
    return value is None or callable(value) or isinstance(value, (int, bytes, State, dict))


@functools.cache
def _brought(side: str, state: State, capabilities: Capabilities) -> Template:
    return Template(peer_in(side, state, capabilities=capabilities))


@functools.cache
def _made(make: Callable[[], Pair]) -> tuple[Pair, Template, Template]:
    made = make()
    return made, Template(made.client.peer), Template(made.server.peer)
