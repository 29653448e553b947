"""A fixed loop of plain Python: the unit that the guard counts in, and how fast a machine is."""

from __future__ import annotations

import struct
from collections.abc import Coroutine
from typing import Any

LOOPS = 2000


class Frame:
    """What the loop makes of each entry."""

    __slots__ = ("id", "payload")

    def __init__(self, id: int, payload: bytes) -> None:
        self.id = id
        self.payload = payload


class Table:
    """What the loop calls."""

    def __init__(self) -> None:
        self.frames: dict[int, Frame] = {}

    def keep(self, frame: Frame) -> None:
        self.frames[frame.id] = frame

    async def take(self, id: int) -> bytes:
        return self.frames.pop(id).payload


def loop(count: int) -> None:
    """Do what calls do, without conduit: objects, methods, dicts, bytes, coroutines.

    It is the unit of what is counted, so it never changes.
    """
    table, header = Table(), struct.Struct(">QIQQI")
    for number in range(count):
        try:
            packed = header.pack(number, 16, number, number, 0) + b"sixteen bytes, no"
            _, size, id, _, _ = header.unpack_from(packed, 0)
            table.keep(Frame(id, packed[32 : 32 + size]))
            first: Coroutine[Any, Any, bytes] = table.take(id)
            first.send(None)
        except StopIteration as stop:
            assert len(stop.value) == 16
