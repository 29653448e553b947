"""What all tests share: the event loop they run on, and that nothing is left behind on it.

CONDUIT_TEST_LOOP=asyncio (the default) or uvloop chooses the loop of every asynchronous test.
CONDUIT_TEST_LONG=1 has the tests marked `long` try a hundred times as much; `make long` runs them.
CONDUIT_TEST_CHAOS=1 chooses what is between the two for those that `make chaos` runs.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

LOOP = os.environ.get("CONDUIT_TEST_LOOP") or "asyncio"
LOOPS = ("asyncio", "uvloop")
PEERS = Path(__file__).resolve().parent / "peers"
LONG = bool(os.environ.get("CONDUIT_TEST_LONG"))
CHAOS = bool(os.environ.get("CONDUIT_TEST_CHAOS"))
EXAMPLES = 200_000 if LONG else 2_000
"""How many examples Hypothesis tries in the tests marked `long`."""

# A busy machine is no failure: what may hang has the timeout of the whole test.
hypothesis.settings.register_profile("conduit", deadline=None)
hypothesis.settings.load_profile("conduit")


def tell(text: str) -> None:
    """Print what a longer form has found, which is what it is run for."""
    if LONG or CHAOS:
        print(f"\n{text}")  # noqa: T201


def pytest_configure(config: pytest.Config) -> None:
    # A shell that runs this in the background makes all processes ignore SIGINT; programs under
    # test are to hear it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if LOOP not in LOOPS:
        raise pytest.UsageError(f"CONDUIT_TEST_LOOP must be one of {LOOPS}, not {LOOP!r}")
    try:
        importlib.import_module(LOOP)
    except ImportError as error:  # asked for by name, so its absence is no reason to skip
        raise pytest.UsageError(f"CONDUIT_TEST_LOOP={LOOP}, but {error}") from error


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out tests/peers unless it is named: it needs what `make peers` fetches."""
    if collection_path != PEERS:
        return None
    named = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    return None if any(path.is_relative_to(PEERS) for path in named) else True


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    # One more than there are cores: a quarter of the time, tests wait for something.
    return (os.cpu_count() or 1) + 1


def pytest_report_header(config: pytest.Config) -> str:
    return f"event loop: {LOOP}"


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    # One factory, so that pytest-asyncio adds nothing to the names of the tests.
    return {LOOP: importlib.import_module(LOOP).new_event_loop}


@pytest.fixture(autouse=True)
def loop_guard(request: pytest.FixtureRequest) -> None:
    """Put `clean_loop` around every asynchronous test, outside its other fixtures."""
    if request.node.get_closest_marker("asyncio") is not None:
        request.getfixturevalue("clean_loop")


@pytest.fixture
async def clean_loop() -> AsyncIterator[None]:
    """Fail a test that leaves tasks behind, or errors that only the loop's handler has seen."""
    loop = asyncio.get_running_loop()
    assert type(loop).__module__.partition(".")[0] == LOOP
    errors: list[str] = []

    def record(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        errors.append(f"{context['message']}: {context.get('exception')!r}")
        loop.default_exception_handler(context)

    loop.set_exception_handler(record)
    yield
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if left:  # what is about to end may do so
        _, left = await asyncio.wait(left, timeout=0.5)
    problems = [f"task left behind: {task!r}" for task in left] + errors
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)
