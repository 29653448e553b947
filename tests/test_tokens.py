"""Tokens: what they look like, who they log in, and that nobody learns which there are."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from conduit import (
    AuthenticationError,
    Client,
    ClientDescriptor,
    Limits,
    PermissionDenied,
    Server,
    User,
    hash_password,
    new_token,
)
from conduit.descriptors import ServerDescriptor
from conduit.protocol.cndt import CNDT
from conduit.protocol.events import KeysNeeded, VerifierNeeded
from conduit.protocol.scram import DEFAULT_ITERATIONS, Verifier
from conduit.protocol.tokens import ITERATIONS, make_token, user_of
from conduit.users import Users
from tests.acceptance.raw import PASSWORD, VERIFIER
from tests.acceptance.support import new_server, within
from tests.protocol.pair import DEFAULTS, Clock, make_client, written

SECRET = "s" * 43
STRONG = VERIFIER.replace("$4096:", "$600000:")


def holder(server: Server, token: str, **fields: Any) -> Client:
    """Return a client with nothing but a token: as strict as clients are by default."""
    host, port = server.address
    return Client(f"tcp://{host}:{port}", password=token, reconnect_enabled=False, **fields)


# The form


def test_a_token_says_whose_it_is_and_hides_256_bits() -> None:
    token = new_token("ci")
    assert re.fullmatch(r"cnd_ci_[A-Za-z0-9_-]{43}", token)
    assert user_of(token) == "cnd_ci"
    assert new_token("ci") != token


@pytest.mark.parametrize("id", ["a", "x" * 64, "a_b", "a_", "_", "device-7.example", "cnd_a"])
def test_an_id_may_have_any_character_of_a_secret(id: str) -> None:
    for secret in (SECRET, "_" * 43, "-" * 43, f"{'x' * 20}_{'y' * 22}"):
        assert user_of(make_token(id, secret)) == f"cnd_{id}"


@pytest.mark.parametrize("id", ["", "x" * 65, "a b", "ä", "a\n", "a/b", "a,b=c"])
def test_an_id_that_is_none_is_refused(id: str) -> None:
    with pytest.raises(ValueError, match="the id of a token has 1 to 64 letters"):
        new_token(id)


@pytest.mark.parametrize(
    "password",
    [
        "",
        "hunter2",
        "cnd_",
        f"cnd__{SECRET}",
        f"cnd_ci_{SECRET[1:]}",
        f"cnd_ci_{SECRET[1:]}+",
        f"cnd_ci{SECRET}",
        f"CND_ci_{SECRET}",
        f" cnd_ci_{SECRET}",
        f"cnd_ci_{SECRET}\n",
        f"cnd_ß_{SECRET}",
    ],
)
def test_a_password_is_not_taken_for_a_token(password: str) -> None:
    assert user_of(password) is None


def test_a_verifier_of_a_token_costs_little_and_one_of_a_password_does_not() -> None:
    assert Verifier.parse(hash_password(new_token("ci"))).iterations == ITERATIONS == 4096
    assert Verifier.parse(hash_password("hunter2")).iterations == DEFAULT_ITERATIONS
    assert Verifier.parse(hash_password(new_token("ci"), iterations=5000)).iterations == 5000


# Logging in


@pytest.mark.parametrize("lookup", [False, True], ids=["mapping", "lookup"])
async def test_a_token_is_all_that_a_client_needs(lookup: bool) -> None:
    token = new_token("ci")
    users: dict[str, User | str] = {
        "cnd_ci": User(verifier=hash_password(token), roles="deploy"),
        "ann": VERIFIER,
    }

    async def look_up(name: str) -> User | str | None:
        return users.get(name)

    server = new_server(users=look_up if lookup else users)

    @server.rpc(requires="deploy")
    async def deploy() -> str:
        return "deployed"

    async with server:
        async with holder(server, token) as client:
            assert client.connection.identity == "cnd_ci"
            assert await within(client.rpc.deploy()) == "deployed"
            peer = await within(server.peer("cnd_ci"))
            assert peer.roles == {"deploy"}
        for wrong in (new_token("ci"), new_token("other"), new_token("ann")):
            with pytest.raises(AuthenticationError) as caught:
                await within(holder(server, wrong).connect())
            assert caught.value.code == "invalid_credentials"
        async with Client(
            "tcp://{}:{}".format(*server.address),
            user="ann",
            password=PASSWORD,
            limits=Limits(min_iterations=4096),
        ) as ann:
            with pytest.raises(PermissionDenied):
                await within(ann.rpc.deploy())


async def test_the_floor_of_a_client_is_lower_for_tokens_only() -> None:
    """A false server that asks for few iterations gets no proof of a password."""
    async with new_server(users={"cnd_ci": VERIFIER, "ann": VERIFIER}) as server:
        for user in ("ann", "cnd_ci"):
            client = holder(server, PASSWORD, user=user)
            with pytest.raises(AuthenticationError, match="min_iterations") as caught:
                await within(client.connect())
            assert caught.value.code == "untrusted_server"
    token = new_token("ci")
    weak = hash_password(token, iterations=ITERATIONS - 1)
    async with new_server(users={"cnd_ci": weak}) as server:
        with pytest.raises(AuthenticationError, match="min_iterations=4096"):
            await within(holder(server, token).connect())


async def test_a_token_ends_when_the_lookup_says_so() -> None:
    token = new_token("ci")
    valid = {"cnd_ci": hash_password(token)}

    async def look_up(name: str) -> str | None:
        return valid.get(name)

    async with new_server(users=look_up) as server:
        async with holder(server, token) as client:
            del valid["cnd_ci"]
            assert await within(client.rpc.add(a=1, b=2)) == 3, "what is up stays up"
        with pytest.raises(AuthenticationError) as caught:
            await within(holder(server, token).connect())
        assert caught.value.code == "invalid_credentials"


# What a descriptor makes of it


@pytest.mark.parametrize("hidden", [False, True])
def test_the_user_of_a_client_is_the_tokens(hidden: bool) -> None:
    token = new_token("ci")
    where: dict[str, Any] = {
        "urls": ("tcp://h:1",),
        "password": SecretStr(token) if hidden else token,
    }
    assert ClientDescriptor(**where).user == "cnd_ci"
    assert ClientDescriptor(**where, user="cnd_ci").user == "cnd_ci"
    for user in ("ci", "default"):
        with pytest.raises(ValidationError, match="leave user= out") as caught:
            ClientDescriptor(**where, user=user)
        assert token not in f"{caught.value} {caught.value!r}"
    assert token not in repr(ClientDescriptor(**where))


def test_a_server_with_one_password_cannot_take_a_token() -> None:
    """Its user is `default`, and that of the token another, so nobody could log in."""
    token = new_token("ci")
    with pytest.raises(ValidationError, match=r"users=\{'cnd_ci': hash_password") as caught:
        Server(password=token)
    assert token not in f"{caught.value} {caught.value!r}"


# Users who do not exist


async def asked_for(users: Users, user: str) -> tuple[bytes, int]:
    """Return the salt and the iterations that somebody is asked for who says that this is them."""
    client = make_client(user=user, min_iterations=1)
    server = CNDT(clock=Clock())
    users.start_login(server, DEFAULTS, None)
    (asked,) = server.receive(written(client))
    assert isinstance(asked, VerifierNeeded)
    found = users.find(user) if users.known_at_once else await users.look_up(user)
    server.verifier_found(found.verifier)
    (needed,) = client.receive(written(server))
    assert isinstance(needed, KeysNeeded)
    return needed.salt, needed.iterations


def users_of(known: dict[str, str], *, lookup: bool, **fields: Any) -> Users:
    async def look_up(name: str) -> str | None:
        return known.get(name)

    return Users(ServerDescriptor(users=look_up if lookup else known, **fields))


async def test_a_token_that_does_not_exist_looks_like_one_that_does() -> None:
    """Who asks learns neither which tokens nor which users there are."""
    known = {"cnd_ci": hash_password(new_token("ci")), "ann": STRONG, "bob": STRONG}
    for order in (list(known), list(reversed(known))):
        users = users_of({name: known[name] for name in order}, lookup=False)
        asked = {name: await asked_for(users, name) for name in ("cnd_ci", "cnd_cd", "ann", "eve")}
        assert [iterations for _, iterations in asked.values()] == [4096, 4096, 600_000, 600_000]
        assert {len(salt) for salt, _ in asked.values()} == {16}
        assert asked == {name: await asked_for(users, name) for name in asked}


async def test_who_else_logs_in_changes_nothing_for_a_user_who_does_not_exist() -> None:
    known = {"cnd_ci": hash_password(new_token("ci")), "ann": STRONG, "bob": VERIFIER}
    users = users_of(known, lookup=True)
    assert Verifier.parse(VERIFIER).iterations < Verifier.parse(STRONG).iterations
    before = {name: await asked_for(users, name) for name in ("eve", "cnd_cd")}
    for name in (*known, *reversed(known)):
        await asked_for(users, name)
        assert before == {name: await asked_for(users, name) for name in before}


@pytest.mark.parametrize("lookup", [False, True], ids=["mapping", "lookup"])
async def test_salts_of_users_who_do_not_exist_outlast_a_restart(lookup: bool) -> None:
    known = {"ann": STRONG}
    secret = "0123456789abcdef"
    first, again, other = (
        users_of(known, lookup=lookup, mock_secret=secret)
        for secret in (secret, SecretStr(secret), secret[::-1])
    )
    random, at_random = users_of(known, lookup=lookup), users_of(known, lookup=lookup)
    for name in ("eve", "cnd_ci"):
        salts = [await asked_for(users, name) for users in (first, again, other, random, at_random)]
        assert salts[0] == salts[1]
        assert len(set(salts)) == 4
    assert await asked_for(first, "ann") == await asked_for(other, "ann")


@pytest.mark.parametrize("secret", ["", "x" * 15, 5])
def test_a_mock_secret_that_can_be_guessed_is_refused(secret: Any) -> None:
    with pytest.raises(ValidationError, match="mock_secret") as caught:
        ServerDescriptor(users={}, mock_secret=secret)
    assert not secret or str(secret) not in str(caught.value).replace("15 characters", "")
