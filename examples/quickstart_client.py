"""The client of the quick start. With --wire it also prints every frame that crosses the wire."""

import asyncio
import logging
import os
import sys

from conduit import Client, InvalidParams

client = Client(
    server_host="127.0.0.1",
    server_port=int(os.environ.get("QUICKSTART_PORT", "8080")),
    password="your_secret_password",
    name="Ada",
)


@client.on("news")
async def news(message: dict[str, str]) -> None:
    print(f"News: {message['text']}")


async def main() -> None:
    async with client:
        print(f"Logged in to {client.server_name}")

        answer = await client.request("greeting", {"name": "Ada"})
        print(answer["reply"])

        print(f"10 + 20 = {await client.rpc.add(a=10, b=20)}")
        print(f"3.5 * 2.0 = {await client.rpc.multiply(x=3.5, y=2.0)}")

        try:
            await client.rpc.add(a=10, b="twenty")
        except InvalidParams as error:
            print(f"Refused: {error}")

        methods = await client.rpc.discover()
        print(f"Available methods: {[method['name'] for method in methods]}")


if __name__ == "__main__":
    if "--wire" in sys.argv:
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        logging.getLogger("conduit.wire").setLevel(logging.DEBUG)
    asyncio.run(main())
