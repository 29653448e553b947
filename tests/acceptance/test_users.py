"""Users and their roles: who may call what, and what anybody else is told."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Collection
from typing import Any, Protocol

import pytest
from pydantic import SecretStr, ValidationError

from conduit import (
    Client,
    Connection,
    InterfaceMismatch,
    InvalidParams,
    MethodNotFound,
    PermissionDenied,
    Server,
    Stream,
    Unavailable,
    User,
)
from tests.acceptance.raw import PASSWORD, VERIFIER, Relay, make_verifier
from tests.acceptance.support import new_client, new_server, round_trips, within

USERS: dict[str, User | str] = {
    "ann": User(verifier=VERIFIER, roles=("admin", "operator")),
    "bob": User(verifier=VERIFIER, roles="operator"),
    "eve": VERIFIER,
}


class Store(Protocol):
    async def read(self, key: str) -> str: ...


class Maintenance(Protocol):
    async def wipe(self, key: str) -> str: ...
    def watch(self, count: int) -> AsyncIterator[int]: ...


class Files:
    """Implements both interfaces."""

    async def read(self, key: str) -> str:
        return key

    async def wipe(self, key: str, connection: Connection) -> str:
        return f"{connection.identity} wipes {key}"

    async def watch(self, count: int) -> AsyncIterator[int]:
        for number in range(count):
            yield number


def guarded_server(**fields: Any) -> tuple[Server, list[str]]:
    """Return a server with methods for several roles, and a list of what has run there."""
    server = new_server(**{"users": USERS, **fields})
    ran: list[str] = []

    @server.rpc(requires="admin")
    async def restart(delay: int = 0) -> str:
        ran.append("restart")
        return "restarting"

    @server.rpc(requires=["admin", "operator"])
    def both() -> str:
        ran.append("both")
        return "both"

    @server.rpc(requires={"operator"}, thread=False)
    def operate(connection: Connection) -> list[str]:
        ran.append("operate")
        return sorted(connection.roles)

    @server.rpc(requires="admin")
    async def count(to: int) -> AsyncIterator[int]:
        ran.append("count")
        for number in range(to):
            yield number

    @server.rpc(requires="admin")
    async def total(numbers: AsyncIterator[int], stream: Stream[int]) -> int:
        ran.append("total")
        return sum([number async for number in numbers])

    @server.on("shut", requires="admin")
    async def shut(connection: Connection, message: int) -> str:
        ran.append(f"shut {message}")
        return "shut"

    server.serve(Store, files := Files())
    server.serve(Maintenance, files, requires="admin")
    return server, ran


@contextlib.asynccontextmanager
async def logged_in(server: Server, *users: str) -> AsyncIterator[list[Client]]:
    """Run a server with these users as its clients."""
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(server)
        clients = [new_client(server, user=user) for user in users]
        for client in clients:
            await stack.enter_async_context(client)
        yield clients


@pytest.mark.parametrize("lookup", [False, True], ids=["mapping", "lookup"])
async def test_a_method_is_called_by_whoever_has_its_roles(lookup: bool) -> None:
    async def look_up(name: str) -> User | str | None:
        return USERS.get(name)

    server, ran = guarded_server(users=look_up if lookup else USERS)
    async with logged_in(server, "ann", "bob", "eve") as (ann, bob, eve):
        assert await within(ann.rpc.restart()) == "restarting"
        assert await within(ann.rpc.both()) == "both"
        assert await within(ann.rpc.operate()) == ["admin", "operator"]
        assert await within(bob.rpc.operate()) == ["operator"]
        assert ran == ["restart", "both", "operate", "operate"]
        for client, method, missing in (
            (bob, "restart", "the role 'admin'"),
            (bob, "both", "the role 'admin'"),
            (eve, "both", "the roles 'admin' and 'operator'"),
            (eve, "operate", "the role 'operator'"),
        ):
            with pytest.raises(PermissionDenied) as caught:
                await within(client.rpc.call(method))
            assert str(caught.value) == f"{method!r} requires {missing}"
            assert caught.value.details == {"executed": False}
            assert not caught.value.retryable
        await round_trips(eve, 1)
        assert len(ran) == 4


async def test_the_roles_come_before_the_parameters() -> None:
    server, ran = guarded_server()
    async with logged_in(server, "ann", "bob") as (ann, bob):
        wrong: list[Any] = [{"delay": "x"}, {"unknown": 1}, [1, 2, 3]]
        for args in wrong:
            with pytest.raises(InvalidParams):
                await within(ann.rpc.call("restart", args))
            with pytest.raises(PermissionDenied):
                await within(bob.rpc.call("restart", args))
        # How a method streams is not told to others either.
        for method in ("count", "total", "restart"):
            with pytest.raises(PermissionDenied):
                await within(bob.rpc.call(method, {"to": "x"}))
            streamed: list[dict[str, Any]] = [{"to": "x"}, {"numbers": iter([1])}, {}]
            for given in streamed:
                with pytest.raises(PermissionDenied):
                    await within(bob.rpc.stream(method, given).result())
        assert not ran


async def test_streams_need_the_roles_as_well() -> None:
    server, ran = guarded_server()
    async with logged_in(server, "ann", "bob") as (ann, bob):
        assert [n async for n in ann.rpc.stream("count", {"to": 3}, items=int)] == [0, 1, 2]
        assert await within(ann.rpc.stream("total", {"numbers": iter([1, 2])}).result()) == 3
        assert ran == ["count", "total"]

        closed = asyncio.Event()

        async def numbers() -> AsyncIterator[int]:
            try:
                while True:
                    yield 1
                    await asyncio.sleep(0)
            finally:
                closed.set()

        with pytest.raises(PermissionDenied, match="'total' requires the role 'admin'"):
            async with bob.rpc.stream("total", {"numbers": numbers()}) as run:
                await within(run.result())
        await within(closed.wait())
        with pytest.raises(PermissionDenied):
            async for _ in bob.rpc.stream("count", {"to": 3}):
                pytest.fail("an item")
        assert ran == ["count", "total"]


async def test_an_interface_is_served_to_whoever_has_its_roles() -> None:
    server, _ = guarded_server()
    async with logged_in(server, "ann", "bob") as (ann, bob):
        assert await within(ann.rpc.bind(Maintenance).wipe("x")) == "ann wipes x"
        assert [n async for n in ann.rpc.bind(Maintenance).watch(2)] == [0, 1]
        assert await within(bob.rpc.bind(Store).read("x")) == "x"
        with pytest.raises(PermissionDenied, match="'wipe' requires the role 'admin'"):
            await within(bob.rpc.bind(Maintenance).wipe("x"))
        with pytest.raises(PermissionDenied, match="'watch' requires the role 'admin'"):
            async for _ in bob.rpc.bind(Maintenance).watch(2):
                pytest.fail("an item")


async def test_messages_need_the_roles_too(caplog: pytest.LogCaptureFixture) -> None:
    server, ran = guarded_server()
    async with logged_in(server, "ann", "bob") as (ann, bob):
        assert await within(ann.request("shut", 1)) == "shut"
        with pytest.raises(PermissionDenied, match="'shut' requires the role 'admin'"):
            await within(bob.request("shut", "not even a number"))
        with pytest.raises(PermissionDenied):
            await within(bob.send("shut", 2, ack=True))
        with caplog.at_level(logging.WARNING, "conduit.connection"):
            for _ in range(600):  # more than the credit, which is given back
                await within(bob.send("shut", 3))
            await round_trips(bob, 1)
        assert "message 'shut' refused: 'shut' requires the role 'admin'" in caplog.messages
        assert ran == ["shut 1"]


async def test_discovery_shows_a_caller_what_it_may_call() -> None:
    server, _ = guarded_server()
    async with logged_in(server, "ann", "bob", "eve") as clients:
        shown = []
        for client in clients:
            methods = await within(client.rpc.discover())
            shown.append({method["name"]: method["requires"] for method in methods})
    ann, bob, eve = shown
    assert eve == {"add": None, "read": None}
    assert bob == {**eve, "operate": ["operator"]}
    assert ann == {
        **bob,
        "restart": ["admin"],
        "both": ["admin", "operator"],
        "count": ["admin"],
        "total": ["admin"],
        "wipe": ["admin"],
        "watch": ["admin"],
    }


async def test_the_fingerprint_is_that_of_what_a_caller_may_call() -> None:
    """Else a client that has found an interface to fit would think so for every user."""
    idle = User(verifier=VERIFIER, roles=("operator", "of no use here"))
    server, _ = guarded_server(users={**USERS, "bob 2": idle})
    async with logged_in(server, "ann", "bob", "bob 2", "eve") as clients:
        ann, bob, other_bob, eve = (client.connection.fingerprint for client in clients)
        assert len({ann, bob, eve}) == 3 and bob == other_bob

        @server.rpc(requires="operator")
        async def new() -> None: ...

        async with new_client(server, user="bob") as again:
            assert again.connection.fingerprint not in (ann, bob, eve)
        async with new_client(server, user="eve") as again:
            assert again.connection.fingerprint == eve


async def test_an_interface_that_a_user_may_not_call_does_not_fit() -> None:
    server, _ = guarded_server()
    async with server:
        for user, fits in (("ann", True), ("bob", False), ("ann", True), ("bob", False)):
            client = new_client(server, user=user)
            client.rpc.bind(Maintenance)
            if fits:
                async with client:
                    continue
            with pytest.raises(InterfaceMismatch, match="no method 'wipe'"):
                await within(client.connect())


async def test_nobody_is_pointed_to_what_it_may_not_call() -> None:
    server, _ = guarded_server()
    async with logged_in(server, "ann", "bob") as (ann, bob):
        with pytest.raises(MethodNotFound, match=r"did you mean restart\("):
            await within(ann.rpc.call("restrat"))
        with pytest.raises(MethodNotFound) as caught:
            await within(bob.rpc.call("restrat"))
        assert str(caught.value) == "no method 'restrat'"
        with pytest.raises(MethodNotFound, match="did you mean 'shut'"):
            await within(ann.request("shutt"))
        with pytest.raises(MethodNotFound) as caught:
            await within(bob.request("shutt"))
        assert str(caught.value) == "no handler for message 'shutt'"


@pytest.mark.parametrize("who", [{"verifier": VERIFIER}, {"verifier": None}], ids=["one", "none"])
async def test_without_users_nobody_has_a_role(who: dict[str, Any]) -> None:
    server, ran = guarded_server(users=None, **who)
    async with server, new_client(server, password=server.descriptor.verifier and PASSWORD) as one:
        with pytest.raises(PermissionDenied):
            await within(one.rpc.restart())
        assert [peer.roles for peer in server.connections.values()] == [frozenset()]
        assert one.connection.roles == frozenset()
    assert not ran


async def test_roles_are_looked_up_again_when_a_session_goes_on() -> None:
    """A role that was taken away is not kept by losing the link."""
    roles: dict[str, Collection[str]] = {"ann": ["admin"]}

    async def look_up(name: str) -> User:
        return User(verifier=VERIFIER, roles=roles[name])

    server, ran = guarded_server(users=look_up)
    async with server, Relay(server.address) as relay:
        async with new_client(relay.address, user="ann") as client:
            (peer,) = server.connections.values()
            await within(client.rpc.restart())
            resumed = asyncio.Event()
            client.on_resume(lambda cli: resumed.set())
            roles["ann"] = ["operator"]
            relay.cut()
            await within(resumed.wait())
            assert list(server.connections.values()) == [peer]
            with pytest.raises(PermissionDenied):
                await within(client.rpc.restart())
            assert await within(client.rpc.operate()) == ["operator"]
    assert ran == ["restart", "operate"]


async def test_a_kept_answer_is_for_those_who_may_call() -> None:
    """A key gives nobody the answer to a call that they may no longer make."""
    roles = {"ann": ["admin"]}

    async def look_up(name: str) -> User:
        return User(verifier=VERIFIER, roles=roles[name])

    server, ran = guarded_server(users=look_up)
    async with server:
        for may_call in (True, True, False, True):
            roles["ann"] = ["admin"] if may_call else []
            async with new_client(server, user="ann") as client:
                call = client.rpc.call("restart", key="once")
                if may_call:
                    assert await within(call) == "restarting"
                else:
                    with pytest.raises(PermissionDenied):
                        await within(call)
    assert ran == ["restart"]


async def test_hooks_see_the_roles() -> None:
    server, _ = guarded_server()
    seen: list[frozenset[str]] = []

    @server.on_client_connect
    async def check(connection: Connection) -> None:
        seen.append(connection.roles)

    async with logged_in(server, "bob"):
        assert seen == [{"operator"}]


@pytest.mark.parametrize("requires", ["", [""], ["a", "b\n"], [5], [None]])
def test_a_role_that_is_no_name_is_refused(requires: Any) -> None:
    server = new_server()
    with pytest.raises(ValueError, match="a role is named by printable text"):
        server.rpc("restart", requires=requires)(lambda: None)
    with pytest.raises(ValueError, match="a role is named by printable text"):
        server.on("restart", requires=requires)(lambda client, message: None)
    with pytest.raises(ValueError, match="a role is named by printable text"):
        server.serve(Store, Files(), requires=requires)
    with pytest.raises(ValidationError, match="roles"):
        User(verifier=VERIFIER, roles=requires)


@pytest.mark.parametrize("roles", ["admin", ["admin"], ("admin",), {"admin"}, frozenset({"admin"})])
def test_roles_are_kept_as_a_set_of_names(roles: Any) -> None:
    assert User(verifier=VERIFIER, roles=roles).roles == frozenset({"admin"})


def test_a_verifier_may_come_as_a_secret_already() -> None:
    hidden = SecretStr(VERIFIER)
    users = {"ann": hidden, "bob": User(verifier=hidden)}
    kept = Server(users=users).descriptor.users
    assert kept == {"ann": User(verifier=VERIFIER), "bob": User(verifier=VERIFIER)}


async def test_a_server_whose_salt_changes_cannot_keep_its_clients_busy() -> None:
    salts = iter(range(100))

    async def look_up(name: str) -> str:
        return make_verifier(salt=b"salt number %4d" % next(salts))

    async with new_server(users=look_up) as server:
        client = new_client(server, reconnect_enabled=False)
        for _ in range(5):
            async with client:
                await round_trips(client, 1)
        with pytest.raises(Unavailable, match="has had keys derived 5 times") as caught:
            await within(client.connect())
        assert str(caught.value).startswith("tcp://{}:{} ".format(*server.address))
        assert caught.value.retryable and 0 < (caught.value.retry_after or 0) <= 60
        assert not server.connections
