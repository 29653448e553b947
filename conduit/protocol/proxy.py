"""The PROXY protocol, versions 1 and 2: what a proxy says of its client before anything else.

https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt. Bytes in, an address out; nothing is
taken that belongs to what comes behind the header.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import Final

from ..exceptions import ProtocolError

__all__ = ["ProxyHeader"]

SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
FIRST: Final = b"PROXY "
LONGEST_LINE: Final = 107
"""Bytes of a header of version 1, its end of line included."""
LONGEST: Final = 4096
"""Bytes of a header of version 2; what proxies add to the addresses takes a few hundred."""

_HEAD: Final = struct.Struct("!12sBBH")
_PORTS: Final = struct.Struct("!HH")
_LOCAL, _PROXY = 0x20, 0x21
_TCP4, _TCP6 = 0x11, 0x21
_PORT_DIGITS: Final = 5


class ProxyHeader:
    """Reads one header.

    Attributes:
        done: Whether the header is complete.
        source: The client's address and port then; None where the proxy speaks for itself, as in
            its health checks, or for a client that has no such address.
    """

    __slots__ = ("_data", "done", "source")

    def __init__(self) -> None:
        self._data = b""
        self.done = False
        self.source: tuple[str, int] | None = None

    def receive(self, data: bytes) -> int:
        """Take bytes of the header, cut anywhere.

        Returns:
            How many of them belong to it. Less than all only when it is done.

        Raises:
            ProtocolError: It is no header.
        """
        before, self._data = len(self._data), self._data + data
        if SIGNATURE.startswith(self._data[: len(SIGNATURE)]):
            size = self._read_binary()
        elif FIRST.startswith(self._data[: len(FIRST)]):
            size = self._read_line()
        else:
            raise ProtocolError("no PROXY header came from a proxy")
        return len(data) if size is None else size - before

    def _read_line(self) -> int | None:
        """Read version 1; return its size once it is known."""
        end = self._data.find(b"\n", 0, LONGEST_LINE)
        if end < 0:
            if len(self._data) >= LONGEST_LINE:
                raise _bad("its line has no end")
            return None
        try:
            line = self._data[: end + 1].decode("ascii")
        except UnicodeDecodeError:
            raise _bad("its line is not ASCII") from None
        if not line.endswith("\r\n"):
            raise _bad("its line does not end in CR LF")
        words = line[:-2].split(" ")
        if words[1] != "UNKNOWN":
            self.source = _read_words(words)
        self.done = True
        return end + 1

    def _read_binary(self) -> int | None:
        """Read version 2; return its size once it is complete."""
        if len(self._data) < _HEAD.size:
            return None
        _, command, family, length = _HEAD.unpack_from(self._data)
        if command not in (_LOCAL, _PROXY):
            raise _bad(f"version and command are 0x{command:02x}")
        size: int = _HEAD.size + length
        if size > LONGEST:
            raise _bad(f"it claims {size} bytes, more than {LONGEST}")
        if len(self._data) < size:
            return None
        width = {_TCP4: 4, _TCP6: 16}.get(family)
        if command == _PROXY and width is not None:
            body = self._data[_HEAD.size : size]
            if len(body) < 2 * width + _PORTS.size:
                raise _bad(f"{len(body)} bytes are too few for the addresses")
            host = ipaddress.ip_address(body[:width])
            self.source = str(host), _PORTS.unpack_from(body, 2 * width)[0]
        self.done = True
        return size


def _read_words(words: list[str]) -> tuple[str, int]:
    """Read `PROXY TCP4 source destination port port`."""
    if len(words) != 6 or words[1] not in ("TCP4", "TCP6"):
        raise _bad("it is not PROXY, TCP4 or TCP6, two addresses and two ports")
    kind = ipaddress.IPv4Address if words[1] == "TCP4" else ipaddress.IPv6Address
    try:
        source, _ = kind(words[2]), kind(words[3])
        port, _ = _read_port(words[4]), _read_port(words[5])
    except ValueError as exc:
        raise _bad(str(exc)) from None
    return str(source), port


def _read_port(text: str) -> int:
    if not text.isdigit() or len(text) > _PORT_DIGITS or int(text) > 0xFFFF:
        raise ValueError(f"{text!r} is no port")
    return int(text)


def _bad(why: str) -> ProtocolError:
    return ProtocolError(f"bad PROXY header: {why}")
