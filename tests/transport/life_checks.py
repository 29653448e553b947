"""What must hold of two connections whatever their users do: credit, slots, tables, agreement."""

from __future__ import annotations

import math

from conduit.protocol.frames import FrameType
from conduit.transport.connection import Connection
from conduit.transport.streaming import Streams
from tests.transport.pair import Side


def check_credit(side: Side, other: Connection) -> None:
    """No credit is negative, and none comes from nowhere."""
    messages, inbox = side.connection._messages, side.connection._inbox
    assert 0 <= messages._count <= inbox._granted
    assert 0 <= inbox._open_count <= inbox._window[0]
    assert 0 <= inbox._owed_count <= inbox._open_count
    assert messages._count + other._inbox._open_count <= inbox._granted
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
    calls, serving, answers = connection._calls, connection._serving, connection._answers
    session = connection._protocol.session
    assert len(calls._pending) <= max(1, calls._limit)
    assert len(serving._running) + answers.held_calls <= max(1, serving._limit)
    assert len(answers.held or ()) <= answers._most
    assert not serving._refusals, "a caller heeds the limit by itself"
    assert session.outbox_bytes == sum(size for _, size, _ in session._outbox) >= 0
    assert answers.held_bytes == sum(len(payload) for _, _, payload, _ in answers.held or ())
    assert answers.held_calls == sum(slot for _, _, _, slot in answers.held or ())
    inbox = connection._inbox
    assert inbox._inbox_bytes == sum(size for _, size in inbox._inbox or ())
    assert inbox._best_effort_bytes == sum(size for _, size in inbox._best_effort or ())
    assert connection.weigh() >= session.outbox_bytes
    entries = (*calls._pending.values(), *calls._replies.values())
    deadlines = [entry[1] for entry in entries]
    deadlines += [running.deadline for running in serving._running.values()]
    assert connection.closed or connection._sweep.at <= min(deadlines, default=math.inf)


def check_agreement(connection: Connection, other: Connection) -> None:
    """When nothing is under way, both sides know the same of what this one has asked for."""
    mine, theirs = connection._calls, other._serving
    waiting = {message.id for message, _ in other._inbox._inbox or () if message.id}
    known = {*theirs._running, *theirs._requests, *waiting}
    known |= {id for _, id, _, _ in other._answers.held or () if id}
    asked = {*mine._pending, *mine._replies}
    assert asked == known, f"asked for {asked}, and there are {known}"
    messages = connection._messages
    window = other._inbox._window
    count = messages._count + other._inbox._open_count
    size = messages._bytes + other._inbox._open_bytes
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
    messages, inbox, serving = connection._messages, connection._inbox, connection._serving
    assert not (connection._calls._pending or connection._calls._replies)
    assert not (connection._calls._line.waiters or connection._calls._door.waiters)
    assert not (serving._running or serving._requests or connection._answers.held)
    assert not (inbox._running or messages._line.waiters or messages._reliable)
    assert not (inbox._inbox or inbox._best_effort or inbox.held_bytes)
    assert not inbox._busy
    assert connection._streams is None or not connection._streams._open
    finals = (FrameType.RPC_RESPONSE, FrameType.RPC_ERROR)
    answered = [frame.id for frame in side.link.frames if frame.type in finals]
    assert len(answered) == len(set(answered)), "a request was answered twice"
