"""Whatever one peer sends, the other gets: any values, compressed or not, cut anywhere."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conduit.protocol.events import Capabilities
from conduit.protocol.frames import HEADER_SIZE, REPLY, SEQUENCED, FrameType, word
from conduit.protocol.payload import Encoder, decode
from fuzz.source import Source
from tests.conftest import EXAMPLES
from tests.protocol.pair import Frame, Pair
from tests.wire_client import COMPRESSED

ZLIB = {"capabilities": Capabilities(features=frozenset({"zlib"})), "compress": True}
KINDS = [
    (FrameType.RPC_REQUEST, SEQUENCED),
    (FrameType.RPC_RESPONSE, SEQUENCED),
    (FrameType.RPC_ERROR, SEQUENCED),
    (FrameType.MESSAGE, SEQUENCED | REPLY),
    (FrameType.STREAM_ITEM, SEQUENCED),
]


@pytest.mark.long
@settings(max_examples=EXAMPLES)
@given(data=st.binary(max_size=300))  # ten times as fast as strategies for each part of it
def test_what_is_sent_arrives(data: bytes) -> None:
    source = Source(data)
    options = ZLIB if source.below(2) else {}
    pair = Pair(client={"user": None, **options}, server={"anonymous": True, **options}).log_in()
    side, id = (pair.client, 1) if source.below(2) else (pair.server, 2)
    pair.split = source.cut
    encoder, sent = Encoder(), []
    for _ in range(1 + source.below(6)):
        type, flags = source.choose(KINDS)
        value = source.value() if source.below(4) else source.short() * 300  # that shrinks
        payload = encoder.pack(value)
        side.peer.send(word(type, flags), id, payload)
        sent.append((Frame(type, flags, id, payload), repr(value)))
        id += 2
    pair.run()
    assert [
        (frame._replace(flags=frame.flags & ~COMPRESSED), repr(decode(frame.payload)))
        for frame in pair.other(side).of(Frame)
    ] == sent
    assert pair.other(side).peer.session.received == len(sent)


def test_the_frames_that_are_compressed_are_among_them() -> None:
    pair = Pair(client=ZLIB, server=ZLIB).log_in()
    pair.client.peer.send(word(FrameType.RPC_REQUEST, SEQUENCED), 1, bytes(20_000))
    pair.run()
    assert zlib.decompress(pair.client.wrote[HEADER_SIZE:]) == bytes(20_000)
