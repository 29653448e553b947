"""Annotations with values that must cross as what they are, and how to compare what came out."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import ipaddress
import math
import pathlib
import uuid
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar
from zoneinfo import ZoneInfo

import pydantic.dataclasses
from pydantic import BaseModel, ConfigDict, Field, RootModel, SerializeAsAny, computed_field
from typing_extensions import NotRequired, TypedDict

T = TypeVar("T")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Word(str, enum.Enum):
    YES = "yes"


class Right(enum.Flag):
    READ = 1
    WRITE = 2


class IntRight(enum.IntFlag):
    READ = 1
    WRITE = 2


class Since(enum.Enum):
    """A value that JSON would not have."""

    RAW = b"\xff"


class Point(NamedTuple):
    x: int
    when: dt.datetime
    label: str = "none"


class Address(TypedDict):
    street: str
    since: dt.date
    code: NotRequired[Decimal]


@dataclasses.dataclass
class Leaf:
    weight: Decimal
    seen: dt.datetime | None = None
    tags: set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass
class Branch:
    leaves: list[Leaf]
    by_name: dict[str, Leaf] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Frozen:
    id: uuid.UUID
    pair: tuple[int, bytes] = (0, b"")


@dataclasses.dataclass
class Slotted:
    __slots__ = ("x", "y")  # `slots=True` makes these
    x: int
    y: dt.timedelta


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Strict:
    day: dt.date
    colour: Colour = Colour.RED


@dataclasses.dataclass
class Computed:
    base: int
    double: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.double = self.base * 2


@dataclasses.dataclass
class Box(Generic[T]):
    content: T


@pydantic.dataclasses.dataclass
class Tagged:
    seen: dt.date = Field(alias="seenOn")


class Sensor(BaseModel):
    id: uuid.UUID
    last: dt.datetime
    readings: list[Decimal] = []
    raw: bytes = b""


class Page(BaseModel, Generic[T]):
    items: list[T]
    next: T | None = None


class Aliased(BaseModel):
    first_name: str = Field(alias="firstName")
    born: dt.date = Field(alias="bornOn")


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    name: str


class Area(BaseModel):
    width: int
    height: int

    @computed_field
    def size(self) -> int:
        return self.width * self.height


class Names(RootModel[list[str]]):
    pass


class Node(BaseModel):
    value: dt.date
    children: list[Node] = []


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int = 9


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    born: dt.date


class Puppy(Dog):
    toy: str


class Zoo(BaseModel):
    animals: list[Annotated[Cat | Dog, Field(discriminator="kind")]]
    star: SerializeAsAny[Dog] | None = None


NOW = dt.datetime(2028, 2, 29, 23, 59, 59, 123456)
UTC = dt.timezone.utc
INDIA = dt.timezone(dt.timedelta(hours=5, minutes=30))
WEST = dt.timezone(-dt.timedelta(hours=3, minutes=30))
ID = uuid.UUID("12345678-1234-5678-1234-567812345678")
DAY = dt.date(2028, 2, 29)
MICRO = dt.timedelta(microseconds=1)
PET = Annotated[Cat | Dog, Field(discriminator="kind")]

CASES: list[tuple[Any, list[Any]]] = [
    (None, [None]),
    (bool, [True, False]),
    (int, [0, -1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)]),
    (float, [0.0, -0.0, 0.1, 1e308, 5e-324, math.inf, -math.inf, math.nan]),
    (str, ["", "ascii", "Zürich \U0001f600", "nul \0 inside", "2028-02-29", "x" * 300_000]),
    (bytes, [b"", b"\0\xff", b"2028-02-29", b"x" * 300_000, b"text"]),
    (
        dt.datetime,
        [
            NOW,
            NOW.replace(microsecond=0),
            NOW.replace(microsecond=1),
            NOW.replace(tzinfo=UTC),
            NOW.replace(tzinfo=INDIA),
            NOW.replace(tzinfo=WEST),
            NOW.replace(tzinfo=ZoneInfo("Europe/Zurich")),
            dt.datetime.min,
            dt.datetime.max,
            dt.datetime(1850, 1, 1, tzinfo=UTC),
            dt.datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
        ],
    ),
    (dt.date, [DAY, dt.date.min, dt.date.max]),
    (dt.time, [dt.time(), dt.time.max, dt.time(1, 2, 3, 4), dt.time(1, 2, 3, 4, tzinfo=INDIA)]),
    (
        dt.timedelta,
        [
            dt.timedelta(),
            MICRO,
            -MICRO,
            dt.timedelta(days=-1, seconds=3, microseconds=999999),
            dt.timedelta(seconds=1.5),
            dt.timedelta(days=400 * 365) + MICRO,
            dt.timedelta.max,
            dt.timedelta(days=-999_999_998) - MICRO,
        ],
    ),
    (uuid.UUID, [ID, uuid.UUID(int=0)]),
    (
        Decimal,
        [
            Decimal("0.1"),
            Decimal("0.10"),
            Decimal("-0"),
            Decimal("1E+1000"),
            Decimal("1E-1000"),
            Decimal("123456789012345678901234567890.123456789"),
        ],
    ),
    (
        Annotated[Decimal, Field(allow_inf_nan=True)],
        [Decimal("NaN"), Decimal("Infinity"), Decimal("-Infinity")],
    ),
    (Colour, [Colour.RED]),
    (Level, [Level.HIGH]),
    (Word, [Word.YES]),
    (Right, [Right.READ, Right.READ | Right.WRITE]),
    (IntRight, [IntRight.READ, IntRight.READ | IntRight.WRITE]),
    (Since, list(Since)),
    (Literal["a", 1], ["a", 1]),
    (pathlib.Path, [pathlib.Path("/tmp/a b"), pathlib.Path(".")]),
    (pathlib.PurePosixPath, [pathlib.PurePosixPath("a/b")]),
    (ipaddress.IPv4Address, [ipaddress.IPv4Address("10.0.0.1")]),
    (ipaddress.IPv6Interface, [ipaddress.IPv6Interface("fe80::1/64")]),
    (ipaddress.IPv4Network, [ipaddress.IPv4Network("10.0.0.0/8")]),
    (list[dt.datetime], [[], [NOW, NOW.replace(tzinfo=UTC)]]),
    (set[uuid.UUID], [set(), {ID, uuid.UUID(int=1)}]),
    (set[dt.date], [{DAY, dt.date.min}]),
    (frozenset[int], [frozenset(), frozenset(range(1000))]),
    (frozenset[tuple[int, str]], [frozenset({(1, "a"), (2, "b")})]),
    (tuple[int, ...], [(), (1, 2, 3)]),
    (tuple[int, str, dt.date], [(1, "a", DAY)]),
    (tuple[()], [()]),
    (list[bytes], [[b"", b"\xff"]]),
    (deque[dt.date], [deque([DAY])]),
    (Sequence[dt.date], [[DAY]]),
    (dict[str, Decimal], [{}, {"a": Decimal("0.10")}]),
    (dict[str, bytes], [{"a": b"\xff", "": b""}]),
    (dict[bytes, int], [{b"\xff": 1, b"a": 2}]),
    (dict[int, dt.date], [{}, {1: DAY, -1: DAY}]),
    (dict[dt.date, list[set[int]]], [{DAY: [{1}, set()]}]),
    (dict[uuid.UUID, Colour], [{ID: Colour.BLUE}]),
    (dict[Colour, int], [{Colour.RED: 1}]),
    (dict[Level, int], [{Level.LOW: 1}]),
    (dict[Decimal, int], [{Decimal("0.10"): 1}]),
    (dict[bool, int], [{True: 1, False: 0}]),
    (dict[float, int], [{0.5: 1}]),
    (Mapping[str, dt.time], [{"a": dt.time(1)}]),
    (OrderedDict[str, dt.date], [OrderedDict(b=DAY, a=DAY)]),
    (dt.datetime | None, [None, NOW]),
    (int | str, [1, "1", ""]),
    (int | float, [1, 1.5]),
    (str | bytes, ["a", b"a"]),
    (bytes | str, ["a", b"a"]),
    (uuid.UUID | int | None, [ID, 3, None]),
    (dt.datetime | int, [NOW, 3]),
    (dt.date | str, ["text", "2028-02-29"]),
    (PET, [Cat(lives=3), Dog(born=DAY)]),
    (Cat | Dog, [Cat(lives=3), Dog(born=DAY)]),
    (list[PET], [[Cat(), Dog(born=DAY)]]),
    (Leaf, [Leaf(Decimal("0.1")), Leaf(Decimal(1), NOW, {"a", "b"})]),
    (Branch, [Branch([Leaf(Decimal("0.1"))], {"a": Leaf(Decimal(2), NOW)}), Branch([])]),
    (Frozen, [Frozen(ID, (1, b"\xff"))]),
    (Slotted, [Slotted(1, -MICRO)]),
    (Strict, [Strict(day=DAY, colour=Colour.BLUE)]),
    (Computed, [Computed(3)]),
    (Box[dt.date], [Box(DAY)]),
    (Tagged, [Tagged(seenOn=DAY)]),
    (Point, [Point(1, NOW), Point(1, NOW.replace(tzinfo=UTC), "a")]),
    (list[Point], [[Point(1, NOW)]]),
    (
        Address,
        [
            {"street": "a", "since": DAY},
            {"street": "a", "since": DAY, "code": Decimal("0.10")},
        ],
    ),
    (
        Sensor,
        [Sensor(id=ID, last=NOW.replace(tzinfo=UTC), readings=[Decimal("0.10")], raw=b"\xff")],
    ),
    (Page[dt.date], [Page[dt.date](items=[DAY], next=DAY), Page[dt.date](items=[])]),
    (Page[Sensor], [Page[Sensor](items=[Sensor(id=ID, last=NOW)])]),
    (Aliased, [Aliased(firstName="Ada", bornOn=DAY)]),
    (Open, [Open(name="a", other=[1, 2])]),  # type: ignore[call-arg]
    (Area, [Area(width=2, height=3)]),
    (Names, [Names(["a"]), Names([])]),
    (Node, [Node(value=DAY, children=[Node(value=DAY)])]),
    (Zoo, [Zoo(animals=[Cat(), Dog(born=DAY)])]),
    (
        dict[str, list[tuple[Leaf, set[Colour] | None, Point]]],
        [{"a": [(Leaf(Decimal("0.1")), {Colour.RED}, Point(1, NOW))], "b": []}],
    ),
]


def name_of(annotation: Any) -> str:
    """Return a name for a test."""
    text = getattr(annotation, "__name__", None) if isinstance(annotation, type) else None
    return (text or str(annotation)).replace(__name__ + ".", "").replace("typing.", "")[:60]


def same(one: Any, other: Any) -> Any:
    """Tell whether two values have the same types all the way down, and the same content."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return repr(one) == repr(other)  # NaN, and the sign of 0
    if isinstance(one, Decimal):
        return one.as_tuple() == other.as_tuple()
    if isinstance(one, (dt.datetime, dt.time)):
        naive = one.replace(tzinfo=None) == other.replace(tzinfo=None)
        return naive and one.utcoffset() == other.utcoffset()
    if isinstance(one, enum.Enum):
        return one is other
    if isinstance(one, BaseModel):
        if isinstance(one, RootModel):
            return same(one.root, other.root)
        return same(one.__dict__, other.__dict__) and one.model_extra == other.model_extra
    if dataclasses.is_dataclass(one):
        return all(
            same(getattr(one, field.name), getattr(other, field.name))
            for field in dataclasses.fields(one)
        )
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            same(a, b) for a, b in zip(one.items(), other.items(), strict=True)
        )
    if isinstance(one, (set, frozenset)):
        return one == other and {type(a) for a in one} == {type(a) for a in other}
    if isinstance(one, (list, tuple, deque)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
