"""What a sans-I/O peer tells its owner, and what both sides tell each other at login.

`VerifierNeeded`, `KeysNeeded`, `WelcomeNeeded` and `ResumeWanted` are questions: the peer cannot go
on before the method of its class that the event names is called. The others are news.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from ..exceptions import ProtocolError
from .frames import Frame

__all__ = [
    "Acknowledged",
    "Broken",
    "Capabilities",
    "Closed",
    "Event",
    "GoingAway",
    "KeysNeeded",
    "Opened",
    "Peer",
    "Ponged",
    "ResumeWanted",
    "Resumed",
    "VerifierNeeded",
    "WelcomeNeeded",
    "number",
    "printable",
]


WINDOW: Final = (256, 1024 * 1024)
RESUME: Final = "resume"
"""The feature of a client that comes back to its session when it has lost the link."""
_KNOWN_FEATURES: Final = frozenset({"zlib", RESUME})
"""Others are of no use here, and a peer could name thousands of them."""
STREAM_WINDOW: Final = (4096, 256 * 1024)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a side accepts, told at login.

    Attributes:
        frame_max: Bytes of one value.
        features: Names of optional abilities; `"zlib"` says that it can inflate, `"resume"` of a
            client that it comes back to its session.
        calls: Calls that it serves at once; 0 for a side that serves none.
        window: Messages, and bytes of messages, that may be sent before any was handled.
        ttl: Milliseconds that the calls it makes have by default; 0 for no deadline.
        stream: Items, and bytes of items, that each stream may send before any was handed out.
    """

    frame_max: int = 1024 * 1024
    features: frozenset[str] = frozenset()
    calls: int = 256
    window: tuple[int, int] = WINDOW
    ttl: int = 30_000
    stream: tuple[int, int] = STREAM_WINDOW

    def to_map(self) -> dict[str, Any]:
        """Return the map that goes over the wire."""
        return {
            "frame_max": self.frame_max,
            "feat": sorted(self.features),
            "calls": self.calls,
            "window": list(self.window),
            "ttl": self.ttl,
            "stream": list(self.stream),
        }

    @staticmethod
    def from_map(received: Any) -> Capabilities:
        """Read the map of the peer; keys that are missing have their defaults.

        Raises:
            ProtocolError: A value has the wrong type or range.
        """
        if not isinstance(received, dict):
            raise ProtocolError(f"caps must be a map, not {type(received).__name__}")
        features = received.get("feat", [])
        if not isinstance(features, list) or not all(isinstance(name, str) for name in features):
            raise ProtocolError("caps.feat must be a list of names")
        return _shared(
            number("caps.frame_max", received.get("frame_max", 1024 * 1024)),
            _KNOWN_FEATURES.intersection(features),
            number("caps.calls", received.get("calls", 256), least=0),
            _credit(received, "window", WINDOW),
            number("caps.ttl", received.get("ttl", 30_000), least=0),
            _credit(received, "stream", STREAM_WINDOW),
        )


# Most peers claim the same, and each would keep 400 bytes of it.
_shared = lru_cache(maxsize=256)(Capabilities)
_USUAL: Final = Capabilities()


@dataclass(slots=True)
class Peer:
    """What is known of the other side once the login is done.

    `methods` identifies what can be called there; it is empty if the other side has not told.
    """

    identity: str = ""
    name: str = ""
    version: str = ""
    capabilities: Capabilities = _USUAL
    heartbeat: tuple[float, float] = (30.0, 90.0)
    keeps: float = 0.0
    """Seconds for which a server keeps the session of a client that has lost its link."""
    methods: bytes = b""


@dataclass(frozen=True, slots=True)
class VerifierNeeded:
    """The server must look up `user` and call `verifier_found`.

    Attributes:
        user: Who wants to log in.
        session: The session that they claim to have, or nothing.
        certified: Their certificate has this name: no verifier is asked for, only whether they may
            log in so. Then `certified` is called in place of `verifier_found`, or `refuse`.
    """

    user: str
    session: bytes = b""
    certified: bool = False


@dataclass(frozen=True, slots=True)
class KeysNeeded:
    """The client must derive its keys from the password and call `keys_derived`."""

    salt: bytes
    iterations: int


@dataclass(frozen=True, slots=True)
class WelcomeNeeded:
    """The user has proved who they are; the server must call `welcome` or `refuse`."""

    identity: str


@dataclass(frozen=True, slots=True)
class ResumeWanted:
    """The user has proved who they are, and wants to go on with a session.

    The server must call `welcome_back` if it is theirs and still there, or `welcome`, or `refuse`.

    Attributes:
        identity: Who it is.
        id: The session.
        epoch: The server process that it was made in.
        accepted: The highest number that the client has accepted.
    """

    identity: str
    id: bytes
    epoch: bytes
    accepted: int


@dataclass(slots=True)
class Resumed:
    """The login is done, and the session goes on; this peer has nothing more to do.

    Attributes:
        accepted: The highest number that the server has accepted.
        rest: What has come behind the answer. It belongs to the peer that has the session.
    """

    accepted: int
    rest: bytes = b""


@dataclass(frozen=True, slots=True)
class Opened:
    """The login is done; frames may be sent."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The peer has accepted more of what was sent, so the outbox is shorter."""


@dataclass(frozen=True, slots=True)
class Ponged:
    """The answer to the ping with this id."""

    id: int


@dataclass(frozen=True, slots=True)
class GoingAway:
    """The peer will close soon, and says why.

    Attributes:
        last: The number of the last frame whose request or message it serves.
    """

    code: int
    reason: str
    last: int


@dataclass(frozen=True, slots=True)
class Closed:
    """The peer closes, and says why."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Broken:
    """This peer cannot go on.

    Attributes:
        error: Why; `AuthenticationError`, `ProtocolError` or what the login ended with.
    """

    error: Exception


Event = (
    Frame
    | VerifierNeeded
    | KeysNeeded
    | WelcomeNeeded
    | ResumeWanted
    | Resumed
    | Opened
    | Acknowledged
    | Ponged
    | GoingAway
    | Closed
    | Broken
)


def _credit(received: dict[str, Any], key: str, default: tuple[int, int]) -> tuple[int, int]:
    credit = received.get(key, list(default))
    if not isinstance(credit, list) or len(credit) != 2:
        raise ProtocolError(f"caps.{key} must be two numbers, a count and bytes")
    return number(f"caps.{key}", credit[0]), number(f"caps.{key}", credit[1])


def number(name: str, value: Any, *, least: int = 1, bits: int = 32) -> int:
    """Return a number that the peer sent, once it is one.

    Raises:
        ProtocolError: It is not a number, or out of range.
    """
    if type(value) is not int or not least <= value < 2**bits:
        raise ProtocolError(f"{name} must be a number from {least} to {2**bits - 1}")
    return value


def printable(text: str) -> str:
    """Return text of the peer for errors and logs: what does not print is escaped.

    As it is, a line break in it would begin a line of the log that the peer has made up.
    """
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )
