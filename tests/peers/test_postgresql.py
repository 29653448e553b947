"""SCRAM with PostgreSQL: its server, and libpq, which is what psql logs in by.

Neither uses any code of conduit's, of Python's or of OpenSSL's. A verifier of one must let clients
of the other in, and nobody else. Message by message, conduit's client logs in at PostgreSQL as
well. libpq cannot log in at conduit: it names no user in SCRAM, and conduit insists on one.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator

import pytest

from conduit import AuthenticationError, Limits, hash_password, new_token
from conduit.protocol.scram import ClientScram, derive_keys
from tests.acceptance.support import ROOT, new_client, new_server, round_trips, within
from tests.peers.postgresql import (
    CONTINUE,
    FINAL,
    OK,
    PostgreSQL,
    Refused,
    Wire,
    quoted,
)

PASSWORDS = {
    "plain": "pencil",
    "spaces": "  two  words ",
    "signs": 'it\'s 100% "$HOME", \\n; --',
    "latin": "pässwörd",
    "composed": "caf\u00e9",
    "decomposed": "cafe\u0301",
    "wide space": "a\u00a0b\u2003c\u3000d",
    "cyrillic": "пароль",
    "hangul": "\u1112\u1161\u11ab",
    "japanese": "日本語",
    "arabic": "كلمة السر",
    "both directions": "user كلمة",
    "emoji": "correct \U0001f40e battery",
    "longest": "x" * 1024,
    "longest of others": "é" * 512,
}
BOTH_PASSWORDS = pytest.mark.parametrize("password", PASSWORDS.values(), ids=PASSWORDS.keys())

OTHERWISE = {
    "compatibility": "conduit\u2122",
    "ligature": "\ufb01nd",
    "full width": "\uff50\uff41\uff53\uff53",
    "soft hyphen": "pass\u00adword",
    "accent beside an emoji": "cafe\u0301 \U0001f40e",
}
"""Passwords that only one of the two changes.

PostgreSQL prepares them by SASLprep, which knows Unicode 3.2 and takes what is newer as it is;
conduit by OpaqueString (RFC 8265).
"""


@pytest.fixture(scope="module")
def postgresql() -> Iterator[PostgreSQL]:
    server = PostgreSQL()
    try:
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        server.remove()


def new_user(postgresql: PostgreSQL, password: str, *, before: str = "") -> str:
    """Make a user with a password or a verifier, and return the name."""
    user = f"u{secrets.token_hex(8)}"
    postgresql.execute(f"{before}; create role {user} login password {quoted(password)}")
    return user


def kept(postgresql: PostgreSQL, user: str) -> str:
    """Return what PostgreSQL keeps of a user's password."""
    return postgresql.verifiers()[user]


# A verifier of conduit's at PostgreSQL


@BOTH_PASSWORDS
def test_postgresql_takes_a_verifier_of_conduit(postgresql: PostgreSQL, password: str) -> None:
    verifier = hash_password(password, iterations=4096)
    user = new_user(postgresql, verifier)
    assert kept(postgresql, user) == verifier  # a verifier to it, and no password to hash
    assert postgresql.logs_in(user, password)
    assert not postgresql.logs_in(user, password[:-1] + "?")
    assert not postgresql.logs_in(user, verifier)


def test_postgresql_takes_what_the_command_prints(postgresql: PostgreSQL) -> None:
    command = [sys.executable, "-m", "conduit", "hash-password"]
    verifier = subprocess.run(
        command, input="correct horse\n", cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert verifier.startswith("SCRAM-SHA-256$600000:")
    user = new_user(postgresql, verifier)
    assert postgresql.logs_in(user, "correct horse")
    assert not postgresql.logs_in(user, "correct horses")


# A verifier of PostgreSQL's at conduit


async def may_log_in(verifier: str, password: str) -> bool:
    """Tell whether a client with this password gets in at a server with this verifier."""
    async with new_server(verifier=verifier) as server:
        client = new_client(server, password=password)
        try:
            async with client:
                await round_trips(client, 1)
        except AuthenticationError as error:
            assert error.code == "invalid_credentials"
            return False
        return True


@BOTH_PASSWORDS
async def test_conduit_takes_a_verifier_of_postgresql(
    postgresql: PostgreSQL, password: str
) -> None:
    verifier = kept(postgresql, new_user(postgresql, password))
    assert verifier.startswith("SCRAM-SHA-256$4096:")
    assert await may_log_in(verifier, password)
    assert not await may_log_in(verifier, password[:-1] + "?")


@pytest.mark.parametrize("iterations", [4097, 100_000])
async def test_iterations_are_what_postgresql_was_told(
    postgresql: PostgreSQL, iterations: int
) -> None:
    user = new_user(postgresql, "pencil", before=f"set scram_iterations = {iterations}")
    verifier = kept(postgresql, user)
    assert verifier.startswith(f"SCRAM-SHA-256${iterations}:")
    assert await may_log_in(verifier, "pencil")
    assert not await may_log_in(verifier, "pencils")
    assert postgresql.logs_in(user, "pencil")


async def test_clients_refuse_postgresqls_own_iterations_unless_they_are_told(
    postgresql: PostgreSQL,
) -> None:
    verifier = kept(postgresql, new_user(postgresql, "pencil"))
    async with new_server(verifier=verifier) as server:
        with pytest.raises(AuthenticationError, match="asks for '4096' iterations") as caught:
            await within(new_client(server, password="pencil", limits=Limits()).connect())
        assert caught.value.code == "untrusted_server"


async def test_a_token_may_be_the_password_of_a_user_of_postgresql(
    postgresql: PostgreSQL,
) -> None:
    token = new_token("ci")
    postgresql.execute(f"create role cnd_ci login password {quoted(token)}")
    async with new_server(users={"cnd_ci": kept(postgresql, "cnd_ci")}) as server:
        # 4096 iterations are enough for a token, so nobody has to be told.
        async with new_client(server, password=token, limits=Limits()) as client:
            await round_trips(client, 1)
            assert client.connection.identity == "cnd_ci"


async def test_the_users_of_postgresql_are_the_users_of_a_server(postgresql: PostgreSQL) -> None:
    ada, bob = (new_user(postgresql, password) for password in ("of ada", "of bob"))
    async with new_server(users=dict(postgresql.verifiers())) as server:
        for user, password in ((ada, "of ada"), (bob, "of bob")):
            async with new_client(server, user=user, password=password) as client:
                await round_trips(client, 1)
                assert client.connection.identity == user
        for user, password in ((ada, "of bob"), ("postgres", "of ada")):
            with pytest.raises(AuthenticationError):
                await within(new_client(server, user=user, password=password).connect())


# Where the two prepare a password in different ways


@pytest.mark.parametrize("password", OTHERWISE.values(), ids=OTHERWISE.keys())
async def test_passwords_that_only_one_of_the_two_changes_do_not_fit_both(
    postgresql: PostgreSQL, password: str
) -> None:
    ours = new_user(postgresql, hash_password(password, iterations=4096))
    theirs = new_user(postgresql, password)
    assert postgresql.logs_in(theirs, password)
    assert not postgresql.logs_in(ours, password)
    assert not await may_log_in(kept(postgresql, theirs), password)
    assert await may_log_in(kept(postgresql, ours), password)


# Message by message


def log_in_by_hand(postgresql: PostgreSQL, user: str, password: str) -> None:
    """Be PostgreSQL's client with conduit's SCRAM, to the end of the login."""
    scram = ClientScram(user, secrets.token_urlsafe(18), min_iterations=4096)
    with Wire(postgresql.socket) as wire:
        assert wire.ask(user) == f"{scram.mechanism}\0\0"
        wire.choose(scram.mechanism, scram.first())
        scram.challenge(wire.told(CONTINUE), None)
        keys = derive_keys(password, scram.salt, scram.iterations)
        wire.answer(scram.final(keys))
        scram.verify(wire.told(FINAL))
        assert wire.told(OK) == ""


@BOTH_PASSWORDS
def test_conduits_client_logs_in_at_postgresql(postgresql: PostgreSQL, password: str) -> None:
    log_in_by_hand(postgresql, new_user(postgresql, password), password)


def test_conduits_client_is_refused_at_postgresql(postgresql: PostgreSQL) -> None:
    with pytest.raises(Refused, match="password authentication failed"):
        log_in_by_hand(postgresql, new_user(postgresql, "pencil"), "pencils")
