"""How long the server takes to refuse a login says nothing about whether there is such a user."""

from __future__ import annotations

import gc
import random
import statistics
import time

import pytest

from conduit.descriptors import ServerDescriptor
from conduit.protocol.cndt import CNDT
from conduit.protocol.events import Broken, KeysNeeded, VerifierNeeded
from conduit.users import Users
from tests.conftest import LONG
from tests.golden_frames import USER, VERIFIER
from tests.protocol.pair import DEFAULTS, Clock, keys_of, make_client, written

LOGINS = 20_000 if LONG else 400
NEAR = 0.03
"""Share by which the medians may differ. Only many logins say so, so only the long form asks."""


def refused_login(users: Users, user: str) -> tuple[int, bytes]:
    """Return the nanoseconds in which the server refuses a wrong password, and what it wrote."""
    client = make_client(user=user)
    server = CNDT(clock=Clock())
    users.start_login(server, DEFAULTS, None)
    request = written(client)

    started = time.perf_counter_ns()
    (asked,) = server.receive(request)
    assert isinstance(asked, VerifierNeeded)
    server.verifier_found(users.find(asked.user).verifier)
    challenge = written(server)
    spent = time.perf_counter_ns() - started

    (needed,) = client.receive(challenge)
    assert isinstance(needed, KeysNeeded)
    client.keys_derived(keys_of("wrong", b"any salt", 1))  # as wrong as any, and costs nothing
    response = written(client)

    started = time.perf_counter_ns()
    (broken,) = server.receive(response)
    failure = written(server)
    spent += time.perf_counter_ns() - started
    assert isinstance(broken, Broken)
    return spent, failure


@pytest.mark.long
@pytest.mark.parametrize("known, unknown", [(USER, "nobody!"), ("cnd_ci", "cnd_cd")])
def test_an_unknown_user_is_refused_as_slowly_as_a_known_one(known: str, unknown: str) -> None:
    others = [f"user{number:03}" for number in range(100)]
    assert len(known) == len(unknown)
    users = Users(ServerDescriptor(users=dict.fromkeys([known, *others], VERIFIER)))
    spent: dict[str, list[int]] = {known: [], unknown: []}
    answers = set()
    order = [known, unknown] * (LOGINS // 2)
    random.Random(1).shuffle(order)
    gc.collect()
    gc.disable()
    try:
        for user in order:
            nanoseconds, failure = refused_login(users, user)
            spent[user].append(nanoseconds)
            answers.add(failure)
    finally:
        gc.enable()
    assert len(answers) == 1, "the answer itself tells them apart"
    slow, fast = (statistics.median(spent[user]) / 1000 for user in (known, unknown))
    print(  # noqa: T201  # the figure is what the long form is run for
        f"\n{LOGINS} logins: known {slow:.2f} us, unknown {fast:.2f} us, {fast / slow - 1:+.2%}"
    )
    if LONG:
        assert abs(fast / slow - 1) <= NEAR
