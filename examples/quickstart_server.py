"""The server of the quick start: two methods, one message, one piece of news for everybody."""

import asyncio
import os

from conduit import Connection, Server

server = Server(
    host="127.0.0.1",
    port=int(os.environ.get("QUICKSTART_PORT", "8080")),
    password="your_secret_password",
    name="quickstart",
)


@server.rpc
async def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.rpc
async def multiply(x: float, y: float) -> float:
    """Multiply two numbers."""
    return x * y


@server.on("greeting")
async def greeting(client: Connection, message: dict[str, str]) -> dict[str, str]:
    await server.broadcast("news", {"text": f"{message['name']} is here"})
    return {"reply": f"Hello, {message['name']}!"}


@server.on_startup
async def started(server: Server) -> None:
    print("listening on {}:{}".format(*server.address))


@server.on_client_connect
async def came(client: Connection) -> None:
    print(f"{client.name} has logged in")


if __name__ == "__main__":
    asyncio.run(server.run())  # until Ctrl-C
