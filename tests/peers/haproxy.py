"""HAProxy in front of a server, in a process of its own."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.acceptance.raw import TIMEOUT
from tools.peers import PEERS

SOURCE = "127.0.0.4"
"""Where HAProxy connects from, so that it can be told from its clients."""

CONFIGURATION = """
global
    stats socket fd@{orders} level admin
defaults
    mode tcp
    timeout connect 5s
    timeout client 1m
    timeout server 1m
listen conduit
    bind fd@{clients} {bind}
    server hub {address} source {source} {options}
"""


class HAProxy:
    """A running HAProxy; clients connect to `address`."""

    def __init__(self, address: tuple[str, int], orders: str) -> None:
        self.address = address
        self._orders = orders

    def order(self, command: str) -> str:
        """Give an order over the socket for administrators; return the answer."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(TIMEOUT)
            sock.connect(self._orders)
            sock.sendall(command.encode() + b"\n")
            return sock.makefile("r").read().strip()


@contextlib.contextmanager
def haproxy(
    folder: Path,
    to: tuple[str, int],
    options: str = "",
    *,
    bind: str = "",
    host: str = "127.0.0.1",
) -> Iterator[HAProxy]:
    """Run HAProxy in front of an address, with options of its `server` and its `bind`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Both sockets listen before HAProxy runs, so that nobody has to wait for it.
    with socket.create_server((host, 0), family=family) as clients, orders_socket(folder) as orders:
        configuration = CONFIGURATION.format(
            orders=orders.fileno(),
            clients=clients.fileno(),
            bind=bind,
            address=f"{to[0]}:{to[1]}",
            source=SOURCE,
            options=options,
        )
        (folder / "haproxy.cfg").write_text(configuration, "ascii")
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [PEERS["haproxy"].path, "-db", "-f", folder / "haproxy.cfg"],
                pass_fds=[clients.fileno(), orders.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            try:
                yield HAProxy(clients.getsockname()[:2], orders.getsockname())
                assert process.poll() is None, (folder / "log").read_text()
            finally:
                process.terminate()
                process.wait(TIMEOUT)


def orders_socket(folder: Path) -> socket.socket:
    """Return the socket at which HAProxy takes orders."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(folder / "orders"))
    sock.listen()
    return sock
