"""What is measured: one table of workloads, each of one or more points."""

from __future__ import annotations

from dataclasses import dataclass, field

KIB, MIB = 1024, 1024 * 1024


@dataclass(frozen=True)
class Point:
    """One measurement of one contestant.

    Attributes:
        label: What it is called within its workload.
        kind: `calls`, `echo`, `stream`, `connect`, `idle`, `broadcast` or `nothing`; see
            measures.py.
        connections: Connections of the client's process.
        callers: Tasks per connection; each awaits one call after another.
        size: Bytes of the values that are echoed.
        count: Connections that idle, broadcasts that are sent, or items of a stream.
        methods: Methods that the server has besides the two that are called.
        one_core: Whether server and client share a core.
        fresh: Whether the server's process is started for this point alone.
        rounds: At most so many rounds.
        warm_up: Whether it is done for a while before it counts.
        cold: Whether what makes a second login cheap is forgotten before each.
        beside: Whether somebody in a process of its own makes a call now and then meanwhile, and
            both event loops are asked how late their timers are.
    """

    label: str
    kind: str = "calls"
    connections: int = 1
    callers: int = 1
    size: int = 0
    count: int = 0
    methods: int = 0
    one_core: bool = False
    fresh: bool = False
    rounds: int = 100
    warm_up: bool = True
    cold: bool = False
    beside: bool = False


@dataclass(frozen=True)
class Workload:
    """A table of the results.

    Attributes:
        title: Its heading.
        points: What is measured.
        floor: The floor that the rates are compared with.
        only: The contestants, where not everybody takes part.
        part_of: `table` for the comparison, `page` for what else docs/performance.md shows, `hurt`
            for what one peer does to another.
        seconds: Factor for the length of a measurement.
    """

    title: str
    points: tuple[Point, ...]
    floor: str = "F1"
    only: tuple[str, ...] = ()
    part_of: str = "table"
    seconds: float = 1.0
    unit: str = field(default="calls/s", kw_only=True)


def one(**settings: object) -> tuple[Point, ...]:
    """Return the point of a workload that has just one."""
    return (Point("", **settings),)  # type: ignore[arg-type]


def size_label(size: int) -> str:
    """Write a number of bytes as people do."""
    for unit, factor in (("MiB", MIB), ("KiB", KIB)):
        if size >= factor:
            return f"{size // factor} {unit}"
    return f"{size} B"


ALONE = Point("alone", "nothing", beside=True, warm_up=False, rounds=3)

WORKLOADS = {
    "sequential": Workload("one call after another, a core for each side", one()),
    "one-core": Workload("one call after another, both sides on one core", one(one_core=True)),
    "in-flight": Workload("256 calls in flight on one connection", one(callers=256)),
    "connections": Workload(
        "50 connections with 8 calls in flight on each", one(connections=50, callers=8)
    ),
    "echo-1m": Workload(
        "1 MiB there and back", one(kind="echo", size=MIB), floor="SF", unit="MB/s"
    ),
    "echo-64m": Workload(
        "64 MiB there and back", one(kind="echo", size=64 * MIB - 64), floor="SF", unit="MB/s"
    ),
    "stream": Workload(
        "100,000 small items from one call",
        one(kind="stream", count=100_000),
        floor="Fc",
        unit="items/s",
    ),
    "connect": Workload(
        "connect, log in, call once, close", one(kind="connect"), unit="connections/s"
    ),
    "broadcast": Workload(
        "1,000 broadcasts to 200 connections",
        one(kind="broadcast", connections=200, count=1000),
        floor="",
        unit="messages/s",
    ),
    "idle": Workload(
        "1,000 idle connections, each logged in and used once",
        one(kind="idle", count=1000, fresh=True, rounds=3),
        unit="KiB each",
    ),
    "sweep": Workload(
        "calls in flight on one connection",
        tuple(Point(str(n), callers=n) for n in (1, 4, 16, 64, 256, 1024, 4096)),
        only=("conduit", "picows", "websockets", "grpc"),
        part_of="page",
        seconds=0.5,
    ),
    "payload": Workload(
        "bytes of the value, 16 echoes in flight",
        tuple(
            Point(size_label(n), kind="echo", callers=16, size=n)
            for n in (16, 256, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB)
        ),
        only=("conduit",),
        part_of="page",
        seconds=0.5,
        unit="MB/s",
    ),
    "many": Workload(
        "connections, 1,000 calls in flight over all of them",
        tuple(
            Point(f"{n:,}", connections=n, callers=1000 // n) for n in (1, 10, 50, 200, 500, 1000)
        ),
        only=("conduit",),
        part_of="page",
        seconds=0.5,
    ),
    "methods": Workload(
        "methods registered, 256 calls in flight",
        tuple(Point(f"{n:,}", callers=256, methods=n, fresh=True) for n in (10, 100, 1000, 10_000)),
        only=("conduit",),
        part_of="page",
        seconds=0.5,
    ),
    "hammer": Workload(
        "a caller now and then, while others have a call in flight on each of 500 connections",
        (
            ALONE,
            Point("500 connections", connections=500, beside=True, rounds=3),
            Point("500 connections x 8 calls", connections=500, callers=8, beside=True, rounds=3),
            Point("1 connection x 4,000 calls", callers=4000, beside=True, rounds=3),
        ),
        only=("F1", "conduit", "conduit-asyncio", "picows", "websockets"),
        part_of="hurt",
        seconds=2.0,
    ),
    "beside-large": Workload(
        "a caller now and then, while another sends 64 MiB and gets them back, again and again",
        (ALONE, Point("beside 64 MiB", "echo", size=64 * MIB - 64, beside=True, rounds=3)),
        only=("conduit", "conduit-asyncio", "picows", "websockets"),
        part_of="hurt",
        seconds=2.0,
        unit="MB/s",
    ),
    "logins": Workload(
        "a caller now and then, while others log in and derive their keys by 600,000 iterations",
        (ALONE, Point("beside logins", "connect", cold=True, beside=True, rounds=3)),
        only=("conduit", "conduit-asyncio"),
        part_of="hurt",
        seconds=2.0,
        unit="logins/s",
    ),
}
