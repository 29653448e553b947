"""The log of frames: each once, however the bytes were cut, and no secret in it."""

from __future__ import annotations

import logging

import pytest

from conduit.transport.wire_log import WireLog
from tests.transport.pair import Pair, turns, within


@pytest.fixture(autouse=True)
def wire(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "conduit.wire")


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the readable half of each record, direction and name of the frame first."""
    records = [record for record in caplog.records if record.name == "conduit.wire"]
    return [record.getMessage().partition("\n")[0] for record in records]


@pytest.mark.parametrize("split", [0, 1, 50_000])
async def test_every_frame_is_logged_once_in_each_direction(
    caplog: pytest.LogCaptureFixture, split: int
) -> None:
    async with Pair() as pair:
        assert [line.split()[1] for line in lines(caplog)] == [
            "AUTH_REQUEST",
            "AUTH_REQUEST",
            "AUTH_SUCCESS",
            "AUTH_SUCCESS",
        ]
        caplog.clear()
        pair.client.link.split = pair.server.link.split = split

        @pair.server.rpc
        async def length(body: bytes) -> int:
            return len(body)

        size = 200_000 if split != 1 else 100
        for _ in range(2):
            assert await within(pair.client.call("length", {"body": bytes(size)})) == size
        await within(pair.client.connection.ping())
        await turns()
        seen = [line.split()[:2] for line in lines(caplog) if " ACK " not in line]
        for name in ("RPC_REQUEST", "RPC_RESPONSE"):
            assert seen.count([">", name]) == seen.count(["<", name]) == 2
        for name in ("HEARTBEAT_PING", "HEARTBEAT_PONG"):
            assert seen.count([">", name]) == seen.count(["<", name]) == 1
        assert len(seen) == 12


async def test_what_is_not_wanted_is_not_made(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "conduit.wire")
    async with Pair() as pair:
        await within(pair.client.connection.ping())
    assert lines(caplog) == []


async def test_a_record_has_the_frame_in_words_and_in_hex(caplog: pytest.LogCaptureFixture) -> None:
    async with Pair() as pair:
        caplog.clear()
        await pair.client.connection.send("greeting", {"text": "hello"})
        await turns()
        message = next(
            record.getMessage() for record in caplog.records if "MESSAGE" in record.getMessage()
        )
        line, dump = message.split("\n")
        assert line.startswith("> MESSAGE SEQUENCED id=0 seq=1")
        assert line.endswith("['greeting', {'text': 'hello'}]")
        assert dump.strip().startswith("434e4454") and b"hello".hex() in dump


@pytest.mark.parametrize(
    "address, expected",
    [
        (("127.0.0.1", 80), "127.0.0.1:80"),
        (("::1", 80, 0, 0), "::1:80"),
        (None, "peer"),
        ("", "peer"),
    ],
)
def test_a_record_names_the_peer(
    caplog: pytest.LogCaptureFixture, address: object, expected: str
) -> None:
    log = WireLog(address)
    log.sent(bytes.fromhex("434e4454 01050000 00000000") + bytes(20))
    log.received(bytes.fromhex("434e4454 01060000 00000000") + bytes(20))
    assert [record.peer for record in caplog.records] == [expected] * 2  # type: ignore[attr-defined]
    assert [line[:16] for line in lines(caplog)] == ["> HEARTBEAT_PING", "< HEARTBEAT_PONG"]
