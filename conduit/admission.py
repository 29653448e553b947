"""Who may try to log in: counted when a socket is accepted, before TLS and before any byte is read.

A connection that has not logged in is a visit. There may be so many of them in all and so many from
one address. When there are many, somebody has to go: whoever has been silent for longest, or else
the newcomer. A visit that fails is held against its address, one that succeeds never is, so any
number of clients with the right password may share an address.
"""

from __future__ import annotations

import enum
import functools
import ipaddress
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from .penalties import Penalties

__all__ = ["Admission", "Fault", "Visit"]

logger = logging.getLogger("conduit.server")


class Fault(enum.Enum):
    """What was wrong with a visit."""

    PASSWORD = "wrong passwords"
    VIOLATION = "bytes that break the rules"
    SLOW = "logins that took too long"
    SILENT = "connections that did not try to log in"


SECONDS = {Fault.PASSWORD: 5.0, Fault.VIOLATION: 10.0, Fault.SLOW: 10.0, Fault.SILENT: 1.0}
"""What each fault adds to the penalty of its address; the numbers are those of OpenSSH 9.8."""

PATIENCE = 0.25
"""Seconds that every visit has to say something, however many others come."""


class _Networks:
    """A list of networks, asked whether an address lies in one of them."""

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks = [ipaddress.ip_network(network) for network in networks]

    def __contains__(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
        return any(address in network for network in self._networks)


class Visit:
    """A connection that has not logged in.

    Attributes:
        address: Where it comes from; what a proxy says once it has said it.
        proxied: Whether a proxy is to say first where it comes from.
        since: When it was accepted, by the clock of its `Admission`.
        close: Closes its socket; set by whoever has it.
    """

    __slots__ = ("_admission", "_ended", "_source", "address", "close", "proxied", "since")

    def __init__(self, admission: Admission, address: Any, since: float, *, proxied: bool) -> None:
        self._admission = admission
        self._source: bytes | None = None
        self._ended = False
        self.address = address
        self.close: Callable[[], object] = _nothing
        self.proxied = proxied
        self.since = since

    def reveal(self, address: tuple[str, int] | None) -> bool:
        """Take what the proxy says, and tell whether the visit may go on.

        Args:
            address: Where the client comes from; None for a connection of the proxy itself, which
                is not held against anybody. Some proxies name their own end of it in its place.
        """
        self.proxied = False
        if address is None or _end(address) == _end(self.address):
            return True
        self.address = address
        return self._admission.count(self)

    def spoke(self) -> None:
        """Know that the client has begun to log in."""
        self._admission.heard(self)

    def end(self, fault: Fault | None = None) -> None:
        """Give the place back: the client is in, or it has gone. The second time means nothing.

        Args:
            fault: What was wrong, if anything was.
        """
        if not self._ended:
            self._ended = True
            self.close = _nothing  # it knows the connection, which is to be freed when it ends
            self._admission.left(self, self._source, fault)

    def counts_for(self, source: bytes) -> None:
        """Know the address that the visit is counted for."""
        self._source = source


class Admission:
    """Decides which sockets may go on to log in.

    From half of `most` on it is crowded, at random, and the more likely the fuller it is. Then a
    visit that has said nothing for a while gives its place to the newcomer; if there is none, the
    newcomer is refused. So a crowd that only holds places keeps nobody else out.

    Args:
        most: Visits at the same time.
        most_per_source: Those of one address. IPv6 addresses count by their first 64 bits, which is
            what one customer is given.
        exempt: Networks to which nothing applies but `most`, and that silent visits give way.
        proxies: Networks whose sockets speak for others.
        clock: Tells the time.
        chance: Returns a number from 0 to below 1, at random.
    """

    def __init__(
        self,
        *,
        most: int,
        most_per_source: int,
        exempt: Iterable[str] = (),
        proxies: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._most = most
        self._most_per_source = most_per_source
        self._exempt = _Networks(exempt)
        self._proxies = _Networks(proxies)
        self._clock = clock
        self._chance = chance
        self._penalties = Penalties()
        self._visits = 0
        self._silent: dict[Visit, None] = {}
        self._by_source: Counter[bytes] = Counter()

    @property
    def visits(self) -> int:
        """Connections that have not logged in."""
        return self._visits

    def enter(self, address: tuple[Any, ...]) -> Visit | None:
        """Count a socket that was accepted; None if it is to be closed.

        Args:
            address: Its peer's, as the socket tells it.
        """
        host = _parsed(address)
        visit = Visit(self, address, self._clock(), proxied=host in self._proxies)
        self._visits += 1
        if (visit.proxied or self.count(visit)) and self._has_place(visit, host):
            self._silent[visit] = None
            return visit
        visit.end()
        return None

    def _has_place(self, visit: Visit, host: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
        """Whether there is a place for a newcomer, if need be that of one who is silent."""
        others, half = self._visits - 1, self._most // 2
        full = others >= self._most
        if not full and others - half <= self._chance() * (self._most - half):
            return True
        oldest = next(iter(self._silent), None)
        if oldest is not None and visit.since - oldest.since >= PATIENCE:
            close = oldest.close
            oldest.end(Fault.SILENT)
            close()
            return True
        return not full and (visit.proxied or host in self._exempt)

    def count(self, visit: Visit) -> bool:
        """Count a visit for its address, which is known now; False if it is to be closed."""
        address = _parsed(visit.address)
        if address in self._exempt:
            return True
        source = address.packed[:8]
        if (
            self._penalties.refuses(source, self._clock())
            or self._by_source[source] >= self._most_per_source
        ):
            return False
        self._by_source[source] += 1
        visit.counts_for(source)
        return True

    def heard(self, visit: Visit) -> None:
        """Know that a visit is not silent; see `Visit.spoke`."""
        self._silent.pop(visit, None)

    def left(self, visit: Visit, source: bytes | None, fault: Fault | None) -> None:
        """Count a visit out; see `Visit.end`."""
        self._visits -= 1
        self._silent.pop(visit, None)
        if source is None:
            return
        self._by_source[source] -= 1
        if not self._by_source[source]:
            del self._by_source[source]
        if fault is not None:
            seconds = self._penalties.add(source, SECONDS[fault], self._clock())
            if seconds:
                logger.warning(
                    "connections from %s are refused for %.0f s, because of %s",
                    visit.address[0],
                    seconds,
                    fault.value,
                )


def _parsed(address: tuple[Any, ...]) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Read the host of a socket's address; IPv4 in IPv6 is IPv4."""
    return _parsed_host(str(address[0]))


@functools.lru_cache(maxsize=1024)  # a socket's address is looked at twice, and clients come again
def _parsed_host(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    host = ipaddress.ip_address(text.partition("%")[0])
    return getattr(host, "ipv4_mapped", None) or host


def _end(address: tuple[Any, ...]) -> tuple[object, object]:
    """Return the host and the port of a socket's address."""
    return _parsed(address), address[1]


def _nothing() -> None:
    """What closes a visit that has no socket."""
