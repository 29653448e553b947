"""Reads the PROXY header from a socket that was accepted, and not one byte more."""

from __future__ import annotations

import asyncio
import socket

from ..protocol.proxy import LONGEST, ProxyHeader

__all__ = ["read_proxy_header"]


async def read_proxy_header(accepted: socket.socket) -> tuple[str, int] | None:
    """Return where the client of a proxy comes from, or None for the proxy itself.

    What is behind the header stays in the socket, because it belongs to TLS or to the connection.
    So bytes are looked at first, and then only those of the header are taken.

    Raises:
        ProtocolError: Something else came.
        ConnectionError: The proxy has hung up.
    """
    header = ProxyHeader()
    while not header.done:
        await _readable(accepted)
        try:
            seen = accepted.recv(LONGEST, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            continue
        if not seen:
            raise ConnectionResetError("the proxy hung up before its header was complete")
        taken = header.receive(seen)
        accepted.recv(taken)
    return header.source


async def _readable(accepted: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(accepted, tell)
    try:
        await ready
    finally:
        loop.remove_reader(accepted)
