"""What a session remembers of both directions, so that nothing sent is lost or taken twice.

Each direction numbers its sequenced frames from 1. The receiver verifies that no number is missing
and acknowledges the highest; the sender keeps every flushed batch until it is acknowledged. The
numbers belong to the session and not to the link, so a session goes on over another link: each side
tells the highest number that it has accepted, and is sent again what comes behind it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Final

from ..exceptions import ProtocolError
from .frames import HEADER, HEADER_SIZE

__all__ = ["ACK_BYTES", "ACK_FRAMES", "EPOCH_BYTES", "ID_BYTES", "Session"]

ACK_FRAMES = 64
"""Sequenced frames after which the receiver acknowledges at once."""
ACK_BYTES = 256 * 1024
"""Bytes after which the receiver acknowledges at once."""
ID_BYTES = 16
"""Bytes that name a session."""
EPOCH_BYTES = 8
"""Bytes that name the server process in which it lives."""


_GONE: Final[tuple[int, int, Sequence[bytes]]] = (0, 0, ())


class Session:
    """The numbers of both directions, and the outbox of one.

    Attributes:
        id: What names the session, `ID_BYTES` long.
        epoch: What names the server process in which it lives, `EPOCH_BYTES` long.
        sent: The highest number that this side has given out.
        received: The highest number that this side has accepted.
        reported: The highest number that this side has acknowledged.
        outbox_bytes: What waits for an acknowledgement.
        wanted: The number behind which frames are kept even if they are acknowledged, because a
            peer that goes away accepts them and does not serve them.
    """

    __slots__ = (
        "_acknowledged",
        "_flushed",
        "_forgotten",
        "_gone",
        "_outbox",
        "epoch",
        "id",
        "outbox_bytes",
        "received",
        "reported",
        "sent",
        "wanted",
    )

    def __init__(self, id: bytes = b"", epoch: bytes = b"") -> None:
        self.id = id
        self.epoch = epoch
        self.sent = 0
        self._flushed = 0
        self._acknowledged = 0
        self._forgotten = 0
        self.received = 0
        self.reported = 0
        self.outbox_bytes = 0
        self.wanted = sys.maxsize
        # A deque would take 600 bytes of each session. What is acknowledged at its beginning stays
        # as `_GONE` until that is half of it: to shorten a long list takes as long each time.
        self._outbox: list[tuple[int, int, Sequence[bytes]]] = []
        self._gone = 0

    def keep(self, chunks: Sequence[bytes], size: int) -> None:
        """Keep what is about to be written: `size` bytes, up to the frame numbered `sent`."""
        self._flushed = sent = self.sent
        self._outbox.append((sent, size, chunks))
        self.outbox_bytes += size

    def drop(self) -> None:
        """Forget all that was kept: nobody will ask for it again."""
        self._outbox.clear()
        self._gone = 0
        self._forgotten = self._flushed
        self.outbox_bytes = 0

    def acknowledge(self, number: int) -> None:
        """Forget what the peer has accepted.

        Raises:
            ProtocolError: The peer acknowledges what was never sent.
        """
        if number > self._flushed:
            raise ProtocolError(
                f"the peer acknowledges frame {number}, but {self._flushed} were sent"
            )
        self._acknowledged = max(self._acknowledged, number)
        number = min(number, self.wanted)
        if number == self._flushed:
            self.drop()
            return
        outbox, gone = self._outbox, self._gone
        while gone < len(outbox) and outbox[gone][0] <= number:
            self._forgotten, size, _ = outbox[gone]
            self.outbox_bytes -= size
            outbox[gone] = _GONE
            gone += 1
        if gone * 2 >= len(outbox):
            del outbox[:gone]
            gone = 0
        self._gone = gone

    def again(self, accepted: int) -> list[bytes]:
        """Return what the peer has not accepted, to be written to another link.

        A login may be overtaken by a later one of the same peer. What it says is then less than the
        peer has acknowledged since, and the peer will come again.

        Args:
            accepted: The highest number that the peer has accepted.

        Raises:
            ProtocolError: The peer has accepted what was never sent. Then nothing has changed.
        """
        self.acknowledge(accepted)
        accepted = max(accepted, self._acknowledged)
        if self._forgotten < accepted:  # the peer has the beginning of the first batch
            last, size, chunks = self._outbox[self._gone]
            batch = b"".join(chunks)
            start = _behind(batch, accepted - self._forgotten)
            self._outbox[self._gone] = last, size - start, [batch[start:]]
            self.outbox_bytes -= start
            self._forgotten = accepted
        self.reported = self.received
        return [chunk for _, _, chunks in self._outbox for chunk in chunks]

    def unserved(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield word, id and payload of the frames behind `wanted` that were written."""
        for last, _, chunks in self._outbox:
            batch = b"".join(chunks) if last > self.wanted else b""
            headers = list(_headers(batch))
            for place, (start, word, size, id) in enumerate(headers):
                if last - len(headers) + 1 + place > self.wanted:
                    yield word, id, batch[start : start + size]

    def release(self) -> None:
        """Want nothing any more but what is not acknowledged."""
        self.wanted = sys.maxsize
        self.acknowledge(self._acknowledged)


def _headers(batch: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield of each frame of a batch where the payload begins, the word, the size and the id."""
    start = 0
    while start < len(batch):
        word, size, id, _, _ = HEADER.unpack_from(batch, start)
        start += HEADER_SIZE
        yield start, word, size, id
        start += size


def _behind(batch: bytes, frames: int) -> int:
    """Return where the first so many frames of a batch end."""
    start = 0
    for _ in range(frames):
        start += HEADER_SIZE + HEADER.unpack_from(batch, start)[1]
    return start
