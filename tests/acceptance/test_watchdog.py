"""Who holds the event loop is named while it does, and so is who is to blame for a silent peer."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from conduit import ConnectionClosed
from conduit.transport.loop import Shared
from conduit.transport.watchdog import Watchdog
from tests.acceptance.raw import TIMEOUT, Relay
from tests.acceptance.support import new_client, new_server, until, within


class Reports(logging.Handler):
    """What the watchdog says, and a handler that waits to be named."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.named = threading.Event()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
        if record.levelno == logging.WARNING:
            self.named.set()

    def hold_the_loop(self) -> None:
        """Do not come back before somebody has complained."""
        assert self.named.wait(TIMEOUT)


@pytest.fixture
def reports() -> Iterator[Reports]:
    logger = logging.getLogger("conduit.loop")
    handler = Reports()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
async def test_a_handler_that_holds_the_loop_is_named_with_its_stack(
    reports: Reports, later: bool
) -> None:
    server = new_server(watchdog=0.02)

    @server.rpc
    async def greedy() -> str:
        if later:
            await asyncio.sleep(0)
        reports.hold_the_loop()
        return "done"

    async with server, new_client(server) as client:
        assert await within(client.rpc.call("greedy")) == "done"
    report = next(text for text in reports.texts if "has held" in text)
    assert report.startswith("the handler 'greedy' has held the event loop for more than 0.02 s")
    assert "reports.hold_the_loop()" in report
    assert reports.named.is_set()


async def test_it_does_not_matter_when_a_handler_begins_to_hold_the_loop(reports: Reports) -> None:
    patience = 0.4
    server = new_server(watchdog=patience)

    @server.rpc
    async def greedy() -> None:
        reports.hold_the_loop()

    @server.rpc
    async def less_greedy() -> None:
        time.sleep(1.6 * patience)

    async with server, new_client(server) as client:
        await within(client.rpc.call("greedy"))
        await until(lambda: "was held for" in reports.texts[-1])
        # Now it has just looked, and looks again as late as it ever does.
        await within(client.rpc.call("less_greedy"))
        await until(lambda: len(reports.texts) >= 4)
    assert [text.partition(" for ")[0] for text in reports.texts] == [
        "the handler 'greedy' has held the event loop",
        "the event loop was held",
        "the handler 'less_greedy' has held the event loop",
        "the event loop was held",
    ]


async def test_what_is_no_handler_is_shown_by_its_stack(reports: Reports) -> None:
    async with new_server(watchdog=0.02):
        reports.hold_the_loop()
    assert reports.texts[0].startswith("something has held the event loop")
    assert "test_what_is_no_handler_is_shown_by_its_stack" in reports.texts[0]


async def test_it_looks_away_when_it_is_told_to_and_ends_with_the_server(
    reports: Reports,
) -> None:
    def dogs() -> list[threading.Thread]:
        return [one for one in threading.enumerate() if one.name == "conduit-watchdog"]

    async with new_server(watchdog=None):
        assert dogs() == []
    async with new_server():
        assert len(dogs()) == 1
    assert dogs() == []
    assert reports.texts == []


async def test_a_silent_peer_is_declared_dead_with_what_this_side_did() -> None:
    server = new_server(heartbeat_interval=0.05, heartbeat_timeout=0.2, resume_ttl=0)
    reasons: asyncio.Queue[Any] = asyncio.Queue()

    @server.on_client_disconnect
    async def gone(connection: Any, reason: ConnectionClosed) -> None:
        reasons.put_nowait(str(reason))

    async with server, Relay(server.address) as relay:
        client = new_client(relay.address, reconnect_enabled=False)
        await client.connect()
        relay.swallow()
        text = await within(reasons.get())
        assert "no sign of life from the peer for 0.2 s (heartbeat_timeout); this side" in text
        await client.disconnect()


class Late(threading.Event):
    """An answer that comes just before it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()

    def clear(self) -> None:
        self.asked.set()
        assert self.wait(TIMEOUT)
        super().clear()


async def test_it_may_be_stopped_in_the_very_moment_in_which_it_asks() -> None:
    loop = asyncio.get_running_loop()
    dog = Watchdog(loop, Shared.of(loop).handling, 0.05)
    dog._answered = late = Late()
    assert late.asked.wait(TIMEOUT)
    dog.stop()
