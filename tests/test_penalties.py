"""Penalties: what an address earns, when it is refused, and for how long."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from conduit.penalties import Penalties

HOST, OTHER = b"\x0a\0\0\x01", b"\x0a\0\0\x02"


def test_three_failures_in_quick_succession_are_enough() -> None:
    penalties = Penalties()
    assert [penalties.add(HOST, 5.0, now) for now in (0.0, 0.3)] == [0.0, 0.0]
    assert not penalties.refuses(HOST, 0.3)
    assert penalties.add(HOST, 5.0, 0.6) == 15.0 - 0.6
    assert penalties.refuses(HOST, 0.6)
    assert not penalties.refuses(OTHER, 0.6)


def test_who_is_refused_stays_so_until_the_end() -> None:
    penalties = Penalties()
    penalties.add(HOST, 15.0, 100.0)
    assert penalties.refuses(HOST, 114.9)
    assert not penalties.refuses(HOST, 115.0)
    assert len(penalties) == 0, "what has ended is forgotten"


def test_failures_that_lie_far_apart_are_forgiven() -> None:
    penalties = Penalties()
    for now in range(0, 1000, 6):
        penalties.add(HOST, 5.0, now)
        assert not penalties.refuses(HOST, now)


def test_a_penalty_is_told_once_and_has_an_end() -> None:
    penalties = Penalties()
    told = [penalties.add(HOST, 10.0, 0.0) for _ in range(100)]
    assert told == [0.0, 20.0] + [0.0] * 98
    assert penalties.refuses(HOST, 599.9)
    assert not penalties.refuses(HOST, 600.0)


def test_the_table_is_bounded_and_keeps_who_still_tries() -> None:
    penalties = Penalties(most=3)
    penalties.add(HOST, 100.0, 0.0)
    for number in range(10):
        assert penalties.refuses(HOST, 1.0)
        penalties.add(bytes([number]), 1.0, 1.0)
    assert len(penalties) == 3
    assert penalties.refuses(HOST, 1.0)


Steps = st.lists(
    st.tuples(
        st.sampled_from([HOST, OTHER]), st.floats(0, 30), st.sampled_from([0.0, 1.0, 5.0, 10.0])
    ),
    max_size=80,
)


@example(steps=[(HOST, 1.560075381387085, 5.0), (HOST, 1.0, 10.0), (HOST, 1.0, 0.0)])
@given(steps=Steps)
def test_it_is_refused_who_has_earned_it_and_nobody_else(
    steps: list[tuple[bytes, float, float]],
) -> None:
    penalties, now = Penalties(longest=40.0), 0.0
    debts, refused = {HOST: 0.0, OTHER: 0.0}, set[bytes]()
    either = set[bytes]()  # where the sums of floats differ in the last digits, either is right
    for source, pause, seconds in steps:
        now += pause
        for one in debts:
            debts[one] = max(0.0, debts[one] - pause)
            if not debts[one]:
                refused.discard(one)
                either.discard(one)
        if seconds:
            penalties.add(source, seconds, now)
            debts[source] = min(40.0, debts[source] + seconds)
            if debts[source] > 14.001:
                refused.add(source)
                either.discard(source)
            elif debts[source] > 13.999:
                either.add(source)
        for one, debt in debts.items():
            if debt > 0.001 and one not in either - refused:
                assert penalties.refuses(one, now) == (one in refused)
            if debt == 0.0:
                assert not penalties.refuses(one, now + 0.001)


@given(sources=st.lists(st.binary(max_size=2), max_size=200), most=st.integers(1, 10))
def test_the_table_never_grows_beyond_its_bound(sources: list[bytes], most: int) -> None:
    penalties = Penalties(most=most)
    for now, source in enumerate(sources):
        penalties.add(source, 1000.0, now)
        assert penalties.refuses(source, now)
        assert len(penalties) <= most


def test_the_rounding_of_floats_is_not_held_against_an_address() -> None:
    penalties = Penalties()
    penalties.add(HOST, 5.0, 1.560075381387085)
    penalties.add(HOST, 10.0, 2.560075381387085)  # 14 s, and a hair
    assert not penalties.refuses(HOST, 2.560075381387085)
