"""The table of who is connected, by identity; what users see of it is in tests/acceptance/."""

from __future__ import annotations

from typing import Any

from conduit.peers import Peers


class Unlike:
    """A connection that nobody may compare with others one by one."""

    identity = "default"
    away = False

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared with another connection")

    __hash__ = object.__hash__


def test_who_leaves_is_not_searched_for_among_all_who_share_the_identity() -> None:
    peers = Peers()
    connections: list[Any] = [Unlike() for _ in range(1000)]
    for connection in connections:
        peers.add(connection)
    for connection in connections[10:]:
        peers.discard(connection)
        peers.discard(connection)
    assert [id(one) for one in peers.of("default")] == [id(one) for one in connections[:10]]
