"""The header of the PROXY protocol: what is read, what is refused, and what is left alone."""

from __future__ import annotations

import socket
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conduit.exceptions import ProtocolError
from conduit.protocol.proxy import LONGEST, LONGEST_LINE, SIGNATURE, ProxyHeader
from tests.conftest import EXAMPLES

REST = b"CNDT and what belongs to the connection"


def binary(
    body: bytes = b"", *, command: int = 0x21, family: int = 0x11, length: int | None = None
) -> bytes:
    """Return a header of version 2."""
    size = len(body) if length is None else length
    return SIGNATURE + struct.pack("!BBH", command, family, size) + body


def tcp4(source: str, port: int, more: bytes = b"") -> bytes:
    there = socket.inet_aton(source) + socket.inet_aton("192.0.2.99")
    return binary(there + struct.pack("!HH", port, 8080) + more)


def tcp6(source: str, port: int) -> bytes:
    there = socket.inet_pton(socket.AF_INET6, source) + bytes(16)
    return binary(there + struct.pack("!HH", port, 8080), family=0x21)


GOOD: dict[str, tuple[bytes, tuple[str, int] | None]] = {
    "TCP4": (b"PROXY TCP4 192.0.2.1 192.0.2.99 5000 8080\r\n", ("192.0.2.1", 5000)),
    "TCP6": (b"PROXY TCP6 2001:db8::1 2001:db8::2 65535 0\r\n", ("2001:db8::1", 65535)),
    "UNKNOWN": (b"PROXY UNKNOWN\r\n", None),
    "UNKNOWN with more": (b"PROXY UNKNOWN " + b"f" * 91 + b"\r\n", None),
    "2 over IPv4": (tcp4("192.0.2.1", 5000), ("192.0.2.1", 5000)),
    "2 over IPv6": (tcp6("2001:db8::1", 5000), ("2001:db8::1", 5000)),
    "2 with more": (tcp4("192.0.2.1", 5000, b"\x04\0\x03abc"), ("192.0.2.1", 5000)),
    "2 local": (binary(command=0x20, family=0), None),
    "2 local with addresses": (binary(bytes(12), command=0x20), None),
    "2 over a Unix socket": (binary(bytes(216), family=0x31), None),
    "2 unspecified": (binary(family=0), None),
    "2 over UDP": (binary(bytes(12), family=0x12), None),
    "2 as long as may be": (binary(bytes(LONGEST - 16)), ("0.0.0.0", 0)),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_header_is_read_however_it_is_cut_and_nothing_behind_it(name: str) -> None:
    data, source = GOOD[name]
    whole = ProxyHeader()
    assert whole.receive(data + REST) == len(data)
    assert (whole.done, whole.source) == (True, source)
    drop_by_drop = ProxyHeader()
    for at in range(len(data)):
        assert not drop_by_drop.done
        assert drop_by_drop.receive(data[at : at + 1]) == 1
    assert (drop_by_drop.done, drop_by_drop.source) == (True, source)


BAD: dict[str, bytes] = {
    "CNDT": b"CNDT" + bytes(28),
    "TLS": b"\x16\x03\x01\x02\0\x01",
    "HTTP": b"GET / HTTP/1.1\r\n",
    "lower case": b"proxy TCP4 192.0.2.1 192.0.2.99 5000 8080\r\n",
    "no end of line": b"PROXY UNKNOWN " + b"x" * LONGEST_LINE,
    "bare LF": b"PROXY UNKNOWN\n",
    "not ASCII": b"PROXY UNKNOWN \xff\r\n",
    "nothing": b"PROXY \r\n",
    "another family": b"PROXY UDP4 192.0.2.1 192.0.2.99 5000 8080\r\n",
    "the wrong family": b"PROXY TCP4 2001:db8::1 192.0.2.99 5000 8080\r\n",
    "too few words": b"PROXY TCP4 192.0.2.1 192.0.2.99 5000\r\n",
    "too many words": b"PROXY TCP4 192.0.2.1 192.0.2.99 5000 8080 1\r\n",
    "two spaces": b"PROXY TCP4  192.0.2.1 192.0.2.99 5000 8080\r\n",
    "a name": b"PROXY TCP4 localhost 192.0.2.99 5000 8080\r\n",
    "a port too large": b"PROXY TCP4 192.0.2.1 192.0.2.99 65536 8080\r\n",
    "a port too long": b"PROXY TCP4 192.0.2.1 192.0.2.99 000080 8080\r\n",
    "a port below zero": b"PROXY TCP4 192.0.2.1 192.0.2.99 -1 8080\r\n",
    "another signature": SIGNATURE[:-1] + b"X" + bytes(4),
    "another version": binary(bytes(12), command=0x11),
    "another command": binary(bytes(12), command=0x22),
    "too long": binary(length=LONGEST - 15),
    "too short": binary(bytes(11)),
    "too short for IPv6": binary(bytes(35), family=0x21),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_header_is_refused(name: str) -> None:
    with pytest.raises(ProtocolError, match="PROXY"):
        ProxyHeader().receive(BAD[name])
    header = ProxyHeader()
    with pytest.raises(ProtocolError, match="PROXY"):
        for at in range(len(BAD[name])):
            assert header.receive(BAD[name][at : at + 1]) == 1


@pytest.mark.long
@settings(max_examples=EXAMPLES)
@given(
    start=st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", b"PROXY TCP6 ::1 ", SIGNATURE]),
    data=st.binary(max_size=300) | st.text("0123456789abcdef.: \r\n", max_size=120).map(str.encode),
    cut=st.integers(1, 300),
)
def test_any_bytes_are_a_header_or_refused_and_cuts_change_nothing(
    start: bytes, data: bytes, cut: int
) -> None:
    data = start + data
    outcomes: list[object] = []
    for size in (len(data) or 1, cut):
        header, taken, outcome = ProxyHeader(), 0, object()
        try:
            while taken < len(data) and not header.done:
                piece = data[taken : taken + size]
                count = header.receive(piece)
                assert 0 < count <= len(piece)
                assert count == len(piece) or header.done
                taken += count
            outcome = (taken, header.done, header.source)
        except ProtocolError:
            outcome = "refused"
        assert taken <= LONGEST
        outcomes.append(outcome)
    assert outcomes[0] == outcomes[1]
