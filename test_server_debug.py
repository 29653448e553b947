"""A server to look at: prints every frame, in words and in hex, and who comes and goes.

python test_server_debug.py             then, in a second terminal: python test_client_debug.py
python test_server_debug.py --ipv6                          python test_client_debug.py --ipv6
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from typing import Any

from conduit import Connection, ConnectionClosed, Server

log = logging.getLogger("debug")


def make_server(host: str, port: int, password: str, *, ipv6: bool) -> Server:
    """Return the server with its handlers."""
    server = Server(host=host, port=port, password=password, ipv6=ipv6, name="debug-server")

    @server.rpc
    async def listall() -> list[str]:
        """List what can be called."""
        return ["listall", "add", "multiply"]

    @server.rpc
    async def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    @server.rpc
    async def multiply(x: float, y: float) -> float:
        """Multiply two numbers."""
        return x * y

    @server.on("hello")
    async def hello(client: Connection, message: Any) -> dict[str, Any]:
        log.info("* %s says hello: %r", client.name, message)
        return {"reply": f"hello, {client.name}", "received": message}

    @server.on_startup
    async def started(server: Server) -> None:
        log.info("* listening on %s port %s; Ctrl-C ends it", *server.address)

    @server.on_client_connect
    async def came(client: Connection) -> None:
        log.info("* %s %s came from %s port %s", client.name, client.version, *client.address[:2])

    @server.on_client_disconnect
    async def went(client: Connection, reason: ConnectionClosed) -> None:
        log.info("* %s went: %s (%s)", client.name, reason, reason.code)

    return server


def main() -> int:
    """Run the server until it is told to end."""
    parser = argparse.ArgumentParser(description="A server that prints every frame.")
    parser.add_argument("--ipv6", action="store_true", help="listen on IPv6")
    parser.add_argument("--host", help="address to listen on (127.0.0.1, or ::1 with --ipv6)")
    parser.add_argument(
        "--port", type=int, default=9999, help="port, 0 for a free one (%(default)s)"
    )
    parser.add_argument(
        "--password", default="test_secret_123", help="what clients must know (%(default)s)"
    )
    options = parser.parse_args()
    if not 0 <= options.port <= 65535:
        parser.error(f"{options.port} is not a port")

    logging.basicConfig(
        stream=sys.stdout, format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("conduit.wire").setLevel(logging.DEBUG)  # this shows the frames
    log.setLevel(logging.INFO)

    host = options.host or ("::1" if options.ipv6 else "127.0.0.1")
    try:
        server = make_server(host, options.port, options.password, ipv6=options.ipv6)
        asyncio.run(server.run())
    except (OSError, ValueError) as error:
        # One line: an OSError without its number, a validation error without its line breaks.
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        log.error("* failed: %s", reason)
        return 1
    log.info("* stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
