"""What must hold of two connections whatever their users do: credit, slots, tables, agreement."""

from __future__ import annotations

import math

from conduit.protocol.frames import FrameType
from conduit.transport.connection import Connection
from conduit.transport.streaming import Streams
from tests.transport.pair import Side


def check_credit(side: Side, other: Connection) -> None:
    """No credit is negative, and none comes from nowhere."""
    messages = side.connection._messages
    assert 0 <= messages._count <= messages._granted
    assert 0 <= messages._open_count <= messages._window[0]
    assert 0 <= messages._owed_count <= messages._open_count
    assert messages._count + other._messages._open_count <= messages._granted
    mine, theirs = side.connection._streams, other._streams
    for id, (sender, receiver, _) in (mine._open if mine is not None else {}).items():
        if sender is not None:
            assert sender._items >= 0
            partner = theirs._open.get(id, (None, None, None))[1] if theirs else None
            if partner is not None:
                assert sender._items + partner._open_items <= partner._window[0]
                assert sender._bytes + partner._open_bytes <= partner._window[1]
        if receiver is not None:
            assert 0 <= receiver._open_items <= receiver._window[0]
            assert receiver._owed_items <= receiver._open_items


def check_tables(connection: Connection) -> None:
    """No more than is allowed, nothing miscounted, and no deadline without a timer."""
    calls, serving, session = (
        connection._calls,
        connection._serving,
        connection._protocol.session,
    )
    assert len(calls._pending) <= max(1, calls._limit)
    assert len(serving._running) + serving._held_calls <= max(1, serving._limit)
    assert len(serving.held or ()) <= serving._limit + serving._messages
    assert not serving._refusals, "a caller heeds the limit by itself"
    assert session.outbox_bytes == sum(size for _, size, _ in session._outbox) >= 0
    assert serving._held_bytes == sum(len(payload) for _, _, payload, _ in serving.held or ())
    assert serving._held_calls == sum(slot for _, _, _, slot in serving.held or ())
    messages = connection._messages
    assert messages._inbox_bytes == sum(size for _, size in messages._inbox or ())
    assert messages._best_effort_bytes == sum(size for _, size in messages._best_effort or ())
    assert connection.weigh() >= session.outbox_bytes
    entries = (*calls._pending.values(), *calls._replies.values())
    deadlines = [entry[1] for entry in entries]
    deadlines += [running.deadline for running in serving._running.values()]
    assert connection.closed or connection._sweep.at <= min(deadlines, default=math.inf)


def check_agreement(connection: Connection, other: Connection) -> None:
    """When nothing is under way, both sides know the same of what this one has asked for."""
    mine, theirs = connection._calls, other._serving
    waiting = {message.id for message, _ in other._messages._inbox or () if message.id}
    known = {*theirs._running, *theirs._requests, *waiting}
    known |= {id for _, id, _, _ in theirs.held or () if id}
    asked = {*mine._pending, *mine._replies}
    assert asked == known, f"asked for {asked}, and there are {known}"
    messages = connection._messages
    window = other._messages._window
    count = messages._count + other._messages._open_count
    size = messages._bytes + other._messages._open_bytes
    assert (count, size) == window, f"credit for {(count, size)} in place of {window}"
    _check_streams_agree(connection._streams, other._streams)


def _check_streams_agree(mine: Streams | None, theirs: Streams | None) -> None:
    if mine is None or theirs is None:
        return
    for id, (sender, _, _) in mine._open.items():
        partner = theirs._open.get(id, (None, None, None))[1]
        if sender is not None and partner is not None and not partner._ended:
            items = sender._items + partner._open_items
            size = sender._bytes + partner._open_bytes
            given = f"credit for {(items, size)} in place of {partner._window}"
            assert (items, size) == partner._window, given


def check_nothing_open(side: Side) -> None:
    """No table has an entry, no queue a message, and no request two answers."""
    connection = side.connection
    messages, serving = connection._messages, connection._serving
    assert not (connection._calls._pending or connection._calls._replies)
    assert not connection._calls._line.waiters
    assert not (serving._running or serving._requests or serving.held)
    assert not (messages._running or messages._line.waiters or messages._reliable)
    assert not (messages._inbox or messages._best_effort or messages.held_bytes)
    assert not messages._busy
    assert connection._streams is None or not connection._streams._open
    finals = (FrameType.RPC_RESPONSE, FrameType.RPC_ERROR)
    answered = [frame.id for frame in side.link.frames if frame.type in finals]
    assert len(answered) == len(set(answered)), "a request was answered twice"
