"""What a caller is told of errors: its own classes with their fields, tracebacks when debugging."""

from __future__ import annotations

from typing import Any

import pytest

from conduit import Connection, InternalError, RPCError
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
