"""What a caller is told of errors: its own classes with their fields, tracebacks when debugging."""

from __future__ import annotations

import dataclasses
import datetime
import uuid
from decimal import Decimal
from typing import Any

import pytest
from pydantic import BaseModel

from conduit import Connection, InternalError, RPCError, Stream
from tests.acceptance.support import new_client, new_server, within

SECRET = "the password of the database"


class JobNotFound(RPCError):
    """An error of the application with a field."""

    job: str
    near: list[str]

    def __init__(self, job: str, near: list[str]) -> None:
        super().__init__(f"there is no job {job}")
        self.job = job
        self.near = near


async def look_for(job: str) -> None:
    raise JobNotFound(job, ["backup"])


async def fail(message: Any = None) -> None:
    raise ValueError(SECRET)


async def test_an_error_arrives_with_its_fields_in_both_directions() -> None:
    server = new_server()
    server.rpc(look_for)
    async with server:
        client = new_client(server)
        client.rpc(look_for)
        async with client:
            (peer,) = server.connections.values()
            for caller in (client.rpc, peer.rpc):
                with pytest.raises(JobNotFound, match="there is no job bakcup") as caught:
                    await within(caller.call("look_for", {"job": "bakcup"}))
                assert (caught.value.job, caught.value.near) == ("bakcup", ["backup"])
                assert caught.value.details == {"job": "bakcup", "near": ["backup"]}


class Article(BaseModel):
    name: str
    price: Decimal


class Unavailing(RPCError):
    """An error whose fields have defaults, and types that are no plain data."""

    until: datetime.datetime
    among: dict[uuid.UUID, list[Article]]
    left: int = 0
    tried: set[str] | None = None

    def __init__(self, until: datetime.datetime, among: dict[uuid.UUID, list[Article]]) -> None:
        super().__init__("sold out")
        self.until, self.among = until, among


@dataclasses.dataclass(eq=False)
class PrinterJam(RPCError):
    """One that is a dataclass."""

    tray: int
    page: int = 1
    papers: list[str] = dataclasses.field(default_factory=list)


async def test_fields_arrive_as_what_they_are() -> None:
    until = datetime.datetime(2028, 2, 29, 12, 30)
    among = {uuid.UUID(int=7): [Article(name="nail", price=Decimal("0.10"))]}
    server = new_server()

    async def buy(tries: int) -> None:
        error = Unavailing(until, among)
        if tries:
            error.left, error.tried = tries, {"here", "there"}
        raise error

    @server.rpc
    async def print_all(stream: Stream[int]) -> None:
        await stream.send(1)
        raise PrinterJam(2, page=3, papers=["A4"])

    server.rpc(buy)
    async with server:
        client = new_client(server)
        client.rpc(buy)
        async with client:
            (peer,) = server.connections.values()
            for caller in (client.rpc, peer.rpc):
                with pytest.raises(Unavailing) as first:
                    await within(caller.call("buy", [0]))
                assert (first.value.until, first.value.among) == (until, among)
                assert (first.value.left, first.value.tried) == (0, None)
                with pytest.raises(Unavailing) as second:
                    await within(caller.call("buy", [3]))
                assert (second.value.left, second.value.tried) == (3, {"here", "there"})
                assert second.value.details["until"] == "2028-02-29T12:30:00"
            with pytest.raises(PrinterJam) as jam:
                await within(client.rpc.stream("print_all").result())
            assert (jam.value.tray, jam.value.page, jam.value.papers) == (2, 3, ["A4"])


class Stubborn(RPCError):
    """An error that does not take what its own class has sent."""

    amount: int

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "amount" and "code" in vars(self):
            raise ValueError("an error that has arrived cannot be changed")
        super().__setattr__(name, value)


async def test_an_error_that_cannot_be_rebuilt_does_not_break_the_connection() -> None:
    server = new_server()

    @server.rpc
    async def choose() -> None:
        error = Stubborn("no")
        error.amount = 5
        raise error

    async with server, new_client(server) as client:
        connection = client.connection
        with pytest.raises(RPCError) as caught:
            await within(client.rpc.choose())
        assert (type(caught.value), caught.value.code) == (RPCError, "stubborn")
        assert caught.value.details == {"amount": 5}
        assert client.connection is connection and not connection.away


class Upstream(RPCError):
    """An error whose `code` is set to what is no code."""

    def __init__(self, code: Any) -> None:
        super().__init__("upstream said no")
        self.code = code


@pytest.mark.parametrize("code", [404, None, "\udc80", b"no"])
async def test_a_code_that_is_no_text_fails_one_call_and_leaves_the_connection(
    code: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def fetch() -> None:
        raise Upstream(code)

    async def tell(message: Any) -> None:
        raise Upstream(code)

    server = new_server()
    server.rpc(fetch)

    @server.rpc
    async def fetch_all(stream: Stream[int]) -> None:
        await stream.send(1)
        raise Upstream(code)

    @server.on("fetch")
    async def tell_server(client: Connection, message: Any) -> None:
        raise Upstream(code)

    async with server:
        client = new_client(server)
        client.rpc(fetch)
        client.on("fetch")(tell)
        async with client:
            (peer,) = server.connections.values()
            connection = client.connection
            asked = [
                client.rpc.call("fetch"),
                client.rpc.call("fetch", key="k"),
                client.rpc.call("fetch", key="k"),
                client.rpc.stream("fetch_all").result(),
                client.request("fetch"),
                peer.rpc.call("fetch"),
                peer.request("fetch"),
            ]
            for call in asked:
                with pytest.raises(InternalError) as caught:
                    await within(call)
                error_id = caught.value.error_id
                (told,) = (r.getMessage() for r in caplog.records if error_id in r.getMessage())
                assert f"raised Upstream, whose code is {code!r} and not text" in told
            assert client.connection is connection and not connection.away


@pytest.mark.parametrize("debug", [True, False])
async def test_a_traceback_is_shown_only_to_who_debugs(debug: bool) -> None:
    server = new_server(debug=debug)
    server.rpc(fail)

    @server.on("fail")
    async def fail_too(client: Connection, message: Any) -> None:
        await fail()

    async with server:
        client = new_client(server, debug=debug)
        client.rpc(fail)
        async with client:
            (peer,) = server.connections.values()
            asked = [
                client.rpc.call("fail"),
                peer.rpc.call("fail"),
                client.request("fail"),
            ]
            for call in asked:
                with pytest.raises(InternalError) as caught:
                    await within(call)
                error = caught.value
                assert error.error_id in str(error)
                assert (SECRET in str(error)) is debug
                assert (SECRET in repr(error.details)) is debug
                assert ("traceback" in error.details) is debug
                if debug:
                    assert "ValueError" in str(error)
                    assert "in fail\n" in error.details["traceback"]
