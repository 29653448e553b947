"""A client to look at: goes through everything once, and prints every frame in words and in hex.

Start test_server_debug.py first. Ends with 0, or with 1 and the reason in the last line.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys

from conduit import Client, ConduitError

log = logging.getLogger("debug")


async def walk(client: Client) -> None:
    """Log in, ask what there is, call it, send a message, ping."""
    log.info("* login at %s", client.descriptor.addresses[0])
    async with client:
        log.info("* logged in: %s %s", client.server_name, client.server_version)

        methods = await client.rpc.discover()
        log.info("* discovered: %s", ", ".join(method["name"] for method in methods))

        log.info("* listall() = %r", await client.rpc.listall())
        log.info("* add(a=10, b=20) = %r", await client.rpc.add(a=10, b=20))
        log.info("* multiply(x=3.5, y=2.0) = %r", await client.rpc.multiply(x=3.5, y=2.0))

        answer = await client.request("hello", {"text": "is anybody there?"})
        log.info("* hello was answered with %r", answer)

        log.info("* ping took %.3f ms", await client.ping() * 1000)
    log.info("* all went well")


def main() -> int:
    """Connect and go through the steps."""
    parser = argparse.ArgumentParser(
        description="A client that goes through everything once and prints every frame."
    )
    parser.add_argument("--ipv6", action="store_true", help="connect over IPv6")
    parser.add_argument("--host", help="the server (127.0.0.1, or ::1 with --ipv6)")
    parser.add_argument("--port", type=int, default=9999, help="its port (%(default)s)")
    parser.add_argument(
        "--password", default="test_secret_123", help="what the server wants (%(default)s)"
    )
    options = parser.parse_args()
    if not 1 <= options.port <= 65535:
        parser.error(f"{options.port} is not a port")

    logging.basicConfig(
        stream=sys.stdout, format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("conduit.wire").setLevel(logging.DEBUG)  # this shows the frames
    log.setLevel(logging.INFO)

    try:
        client = Client(
            server_host=options.host or ("::1" if options.ipv6 else "127.0.0.1"),
            server_port=options.port,
            password=options.password,
            name="debug-client",
            use_ipv6=options.ipv6,
            reconnect_enabled=False,
        )
        asyncio.run(walk(client))
    except (ConduitError, OSError, ValueError) as error:
        # One line: an OSError without its number, a validation error without its line breaks.
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        log.error("* failed: %s", reason)
        return 1
    except KeyboardInterrupt:
        log.error("* failed: interrupted")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
