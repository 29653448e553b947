"""What a simulated world is made of: links, the ends of sessions, and the frames between them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from conduit.protocol.cndt import CNDT, State
from conduit.protocol.events import Event
from conduit.protocol.frames import REPLY, SEQUENCED, FrameType, Parted, Payload, word

MESSAGE: Final = word(FrameType.MESSAGE, SEQUENCED)
REQUEST: Final = word(FrameType.RPC_REQUEST, SEQUENCED)
ANSWER: Final = word(FrameType.RPC_RESPONSE, SEQUENCED)
REPLIED: Final = word(FrameType.MESSAGE, SEQUENCED | REPLY)

MARK: Final = struct.Struct(">BBIBI")
"""What every payload begins with: an array of three, and two numbers of 32 bits."""
FILL: Final = tuple(
    b"\xc6" + size.to_bytes(4, "big") + bytes(size) for size in (0, 0, 0, 1, 30, 100, 100, 900)
)
"""The third: bytes, for frames of many sizes."""


class Violation(AssertionError):
    """Something that must not be has happened."""


class Link:
    """One connection of the transport: what is on its way, and who reads it at the server."""

    __slots__ = ("cut", "down", "held", "up")

    def __init__(self) -> None:
        self.up = bytearray()
        self.down = bytearray()
        self.cut = False
        self.held: CNDT | End | None = None


class End:
    """A session as one side knows it."""

    __slots__ = ("given_up", "handed_over", "last_id", "link", "peer", "serial", "sent")

    def __init__(self, peer: CNDT, link: Link, serial: int, first_id: int) -> None:
        self.peer = peer
        self.link: Link | None = link
        self.serial = serial
        self.sent = 0
        self.handed_over = 0
        self.last_id = first_id - 2
        self.given_up = False

    def silent(self) -> bool:
        """Tell whether this side believes that all it has sent was accepted."""
        return not self.peer.session.outbox_bytes and not self.peer.corked


def send(end: End, below: Callable[[int], int], *, large: bool) -> None:
    """Send one frame of any kind and size."""
    end.sent += 1
    mark = MARK.pack(0x93, 0xCE, end.serial, 0xCE, end.sent)
    fill = FILL[below(len(FILL))]
    kind = below(16)
    if kind < 8:
        end.peer.send(MESSAGE, 0, mark + fill)
    elif kind < 12:
        end.last_id += 2
        end.peer.send(REQUEST, end.last_id, mark + fill)
    elif kind < 15 or not large:
        end.peer.send(ANSWER if kind & 1 else REPLIED, kind, mark + fill)
    else:
        fill = bytes(700 + below(2000))
        head = mark + b"\xc6" + len(fill).to_bytes(4, "big")
        end.peer.send_split(ANSWER, 1, head, fill)


def read(payload: Payload) -> tuple[int, int]:
    """Return the session that a frame belongs to, and its number there."""
    start = payload.rest if isinstance(payload, Parted) else payload
    _, _, serial, _, number = MARK.unpack_from(start)
    return serial, number


def receive(peer: CNDT, data: bytes | bytearray) -> list[Event]:
    """Hand bytes to a peer as a link does: the rest of a large frame goes to its buffer."""
    if peer.large is None:
        return peer.receive(bytes(data))
    events: list[Event] = []
    left = memoryview(data)
    while left:
        room = peer.buffer()
        if room is None or peer.state is State.CLOSED:
            return events + peer.receive(bytes(left))
        count = min(len(room), len(left))
        room[:count] = left[:count]
        del room
        # What a frame says may lie in the buffer, which the next one may overwrite.
        events += [
            (*event[:3], event[3] if isinstance(event[3], Parted) else bytes(event[3]))
            if type(event) is tuple
            else event
            for event in peer.buffer_filled(count)
        ]
        left = left[count:]
    return events
