"""Logs every frame of a connection under `conduit.wire`, when that logger is at DEBUG."""

from __future__ import annotations

import logging
from typing import Any

from ..protocol.describe import FrameCutter, describe

__all__ = ["WireLog"]

logger = logging.getLogger("conduit.wire")


class WireLog:
    """Two lines for each frame: what it says, and its bytes.

    `>` is out, `<` is in. The record's attribute `peer` is the address of the other side, which a
    formatter shows with `%(peer)s`.
    """

    __slots__ = ("_in", "_out", "_peer")

    def __init__(self, address: Any) -> None:
        self._peer = ":".join(map(str, address[:2])) if address else "peer"
        self._in = FrameCutter()
        self._out = FrameCutter()

    @staticmethod
    def wanted() -> bool:
        """Whether somebody wants to see the frames."""
        return logger.isEnabledFor(logging.DEBUG)

    def sent(self, data: bytes) -> None:
        """Log what is written."""
        self._log(">", self._out.cut(data))

    def received(self, data: bytes) -> None:
        """Log what was read."""
        self._log("<", self._in.cut(data))

    def _log(self, direction: str, frames: list[bytes]) -> None:
        for frame in frames:
            line, dump = describe(frame)
            logger.debug("%s %s\n    %s", direction, line, dump, extra={"peer": self._peer})
