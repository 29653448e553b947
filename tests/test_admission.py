"""Who may try to log in: by count, by address, by chance, and by what went wrong before."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conduit.admission import PATIENCE, Admission, Fault, Visit

HOME, OTHER = ("192.0.2.1", 5000), ("192.0.2.2", 5000)


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def made(
    most: int = 100,
    most_per_source: int = 100,
    *,
    exempt: tuple[str, ...] = (),
    proxies: tuple[str, ...] = (),
    clock: Callable[[], float] | None = None,
    chance: float = 0.999,
) -> Admission:
    """Return an admission with which nobody has bad luck, unless told otherwise."""
    return Admission(
        most=most,
        most_per_source=most_per_source,
        exempt=exempt,
        proxies=proxies,
        clock=clock or Time(),
        chance=lambda: chance,
    )


def entered(admission: Admission, address: tuple[Any, ...] = HOME) -> Visit:
    visit = admission.enter(address)
    assert visit is not None
    return visit


def test_there_are_so_many_places_and_each_is_given_back_once() -> None:
    admission = made(most=3)
    visits = [entered(admission, (f"192.0.2.{number}", 1)) for number in range(3)]
    assert admission.enter(OTHER) is None
    visits[0].end()
    visits[0].end(Fault.VIOLATION)
    assert admission.visits == 2
    entered(admission)
    assert admission.enter(OTHER) is None


def test_one_address_has_its_own_number_of_places() -> None:
    admission = made(most_per_source=2)
    first, _ = entered(admission), entered(admission)
    assert admission.enter(HOME) is None
    entered(admission, OTHER)
    first.end()
    entered(admission)
    assert admission.visits == 3


@pytest.mark.parametrize(
    "one, another, same",
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("192.0.2.1", "192.0.2.2", False),
    ],
)
def test_ipv6_counts_by_its_first_64_bits(one: str, another: str, same: bool) -> None:
    admission = made(most_per_source=1)
    entered(admission, (one, 1))
    assert (admission.enter((another, 1)) is None) == same


def test_exempt_networks_are_bound_by_all_places_alone() -> None:
    admission = made(most=10, most_per_source=1, exempt=("192.0.2.0/31",), chance=0.0)
    for _ in range(10):
        visit = entered(admission)
    assert admission.enter(HOME) is None
    for _ in range(20):
        visit.end(Fault.VIOLATION)
        visit = entered(admission)


@pytest.mark.parametrize("chance, let_in", [(0.0, 51), (0.5, 75), (0.999, 100)])
def test_from_half_on_it_is_crowded_at_random(chance: float, let_in: int) -> None:
    admission = made(most=100, chance=chance)
    for _ in range(200):
        admission.enter(HOME)
    assert admission.visits == pytest.approx(let_in, abs=1)


@pytest.mark.parametrize(
    "fault, times", [(Fault.PASSWORD, 3), (Fault.VIOLATION, 2), (Fault.SLOW, 2), (Fault.SILENT, 15)]
)
def test_failures_close_the_door_to_their_address(
    fault: Fault, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Time()
    admission = made(clock=clock)
    for _ in range(times):
        assert "192.0.2.1" not in caplog.text
        entered(admission).end(fault)
    assert admission.enter(HOME) is None
    assert caplog.text.count("192.0.2.1") == 1
    assert caplog.records[0].levelno == logging.WARNING
    entered(admission, OTHER)
    clock.now += 20
    entered(admission)


def crowded(admission: Admission, count: int) -> tuple[list[Visit], list[Visit]]:
    """Let visits in; return them, and the list of those that are closed from now on."""
    visits, closed = list[Visit](), list[Visit]()
    for number in range(count):
        visit = entered(admission, (f"192.0.2.{number}", 1))
        visit.close = functools.partial(closed.append, visit)
        visits.append(visit)
    return visits, closed


def test_who_is_silent_for_longest_gives_way_to_a_newcomer() -> None:
    clock = Time()
    admission = made(most=3, clock=clock)
    visits, closed = crowded(admission, 3)
    visits[0].spoke()
    assert admission.enter(OTHER) is None, "the others have had no time yet"
    clock.now += PATIENCE
    entered(admission, ("198.51.100.1", 1))
    assert closed == [visits[1]]
    assert admission.visits == 3
    entered(admission, ("198.51.100.2", 1)).spoke()
    assert closed == [visits[1], visits[2]]
    assert admission.enter(OTHER) is None, "who has said something stays"
    visits[1].end(Fault.VIOLATION)  # its socket is closed now, which changes nothing
    assert admission.visits == 3


def test_somebody_may_have_to_give_way_before_all_places_are_taken() -> None:
    clock = Time()
    admission = made(most=4, clock=clock, chance=0.0)
    visits, closed = crowded(admission, 3)
    clock.now += PATIENCE
    entered(admission, OTHER)
    assert closed == [visits[0]]


def test_to_give_way_again_and_again_is_a_failure() -> None:
    clock = Time()
    admission = made(most=1, clock=clock)
    for _ in range(15):
        entered(admission, HOME)
        clock.now += PATIENCE
        entered(admission, OTHER).end()
    for _ in range(15):
        visit = admission.enter(HOME)
        clock.now += PATIENCE
        if visit is not None:
            visit.end(Fault.SILENT)
    assert admission.enter(HOME) is None


def test_logins_that_succeed_are_never_held_against_anybody() -> None:
    admission = made()
    for _ in range(10_000):
        entered(admission).end()
    entered(admission)


def test_a_visit_behind_a_proxy_counts_for_its_own_address() -> None:
    admission = made(most_per_source=1, proxies=("10.0.0.0/8",))
    visits = [entered(admission, ("10.0.0.1", number)) for number in range(3)]
    assert all(visit.proxied for visit in visits)
    assert visits[0].reveal(HOME)
    assert visits[0].address == HOME
    assert not visits[0].proxied
    assert not visits[1].reveal(HOME)
    assert visits[2].reveal(OTHER)
    assert admission.enter(HOME) is None, "they are counted together with those who come directly"


@pytest.mark.parametrize("named", [None, ("10.0.0.1", 5000)])  # HAProxy does so in version 1
@pytest.mark.parametrize("end", [("10.0.0.1", 5000), ("::ffff:10.0.0.1", 5000, 0, 0)])
def test_what_a_proxy_does_for_itself_is_held_against_nobody(named: Any, end: Any) -> None:
    admission = made(proxies=("10.0.0.0/8",))
    for _ in range(100):
        visit = entered(admission, end)
        assert visit.reveal(named)
        visit.end(Fault.SILENT)


def test_who_is_on_the_machine_of_a_proxy_is_a_client_like_any_other() -> None:
    admission = made(most_per_source=1, proxies=("10.0.0.0/8",))
    visits = [entered(admission, ("10.0.0.1", port)) for port in (5000, 5001)]
    assert visits[0].reveal(("10.0.0.1", 6000))
    assert not visits[1].reveal(("10.0.0.1", 6001))


def test_the_last_place_may_be_a_proxys() -> None:
    visit = entered(made(most=1, proxies=("10.0.0.0/8",), chance=0.0), ("10.0.0.1", 1))
    assert visit.reveal(HOME)


Steps = st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 30)), max_size=120)


@given(steps=Steps, most=st.integers(1, 12), each=st.integers(1, 4), chance=st.floats(0, 0.999))
def test_the_counts_are_exact(
    steps: list[tuple[int, bool, int]], most: int, each: int, chance: float
) -> None:
    clock, here = Time(), list[Visit]()
    admission = made(most, each, proxies=("10.0.0.0/8",), clock=clock, chance=chance)
    for number, proxied, leaving in steps:
        clock.now += leaving / 100
        address = (f"192.0.2.{number}", 1)
        visit = admission.enter(("10.0.0.1", 1) if proxied else address)
        if visit is not None and visit.proxied and not visit.reveal(address):
            visit.end()
            visit = None
        if visit is not None:
            visit.close = functools.partial(here.remove, visit)
            here.append(visit)
            if leaving % 3 == 0:
                visit.spoke()
        if leaving < len(here):
            here.pop(leaving).end()
        assert admission.visits == len(here) <= most
        sources = [visit.address for visit in here]
        assert max(map(sources.count, sources), default=0) <= each
    for visit in here:
        visit.end()
    assert admission.visits == 0
    assert not admission._by_source
    assert not admission._silent
