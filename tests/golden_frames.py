"""Golden frames of the CNDT wire, version 1: bytes on one side, their meaning on the other.

The same hex stands in docs/protocol.md; test_wire.py compares the two and builds every frame again
from its meaning with `struct` and `msgpack` alone.

The frames whose `alone` is false are one conversation, in this order. All frames of one sender,
joined, are what that side writes on one connection: numbers, ids and acknowledgements fit.
The login is the one of the test vector below (password `pencil`, user `default`).
"""

from __future__ import annotations

from typing import NamedTuple


class Golden(NamedTuple):
    """One frame: its bytes and what they mean."""

    sender: str
    """Who writes it: `client` or `server`."""
    hex: str
    """The whole frame."""
    type: int
    flags: int
    id: int
    seq: int
    """The sequence number; 0 in a frame that has none."""
    value: object
    """The payload after decompression and decoding; None where there is no payload."""
    meaning: str
    alone: bool = False
    """True for a frame that is not part of the conversation."""

    @property
    def raw(self) -> bytes:
        return bytes.fromhex(self.hex)


TIMESTAMP = 1_767_225_600_000
"""The timestamp in every golden frame: 2026-01-01 00:00:00 UTC."""

PASSWORD = "pencil"
USER = "default"
SALT = "W22ZaJ0SNY7soEsUEjb6gQ=="
ITERATIONS = 4096
CLIENT_NONCE = "rOprNGfwEbeRWgbNEkqO0000"
SERVER_NONCE = "hvYDpWUa2RaTCAfuxFIljhNl"
DIGEST = "7+HGH5f8xMVMZFk4IS6k2fJvzhOf8UTx080MzxlyZCU="
STORED_KEY = "WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY="
SERVER_KEY = "wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
VERIFIER = f"SCRAM-SHA-256${ITERATIONS}:{SALT}${STORED_KEY}:{SERVER_KEY}"
"""What a server keeps instead of the password `pencil`."""
SESSION_KEY = "8b2f21fd205912f10b6a776b5320d1b07ef59f87a1d695e59a84f20a3cfc8ea4"
"""HMAC(StoredKey, "CNDT session key" + ClientKey + AuthMessage); reserved, no frame uses it."""

GOLDEN: dict[str, Golden] = {
    "auth_request": Golden(
        sender="client",
        hex=(
            "434e4454010700000000008600000000000000010000019b76daa80000000000"
            "86a17601a46d656368ad534352414d2d5348412d323536a5736372616dd9276e2c2c6e3d64656661"
            "756c742c723d724f70724e476677456265525767624e456b714f30303030a46361707382a9667261"
            "6d655f6d6178ce00100000a46665617491a6726573756d65a773657373696f6ec0a56167656e74ae"
            "636f6e647569742d70792f312e30"
        ),
        type=7,
        flags=0,
        id=1,
        seq=0,
        value={
            "v": 1,
            "mech": "SCRAM-SHA-256",
            "scram": "n,,n=default,r=rOprNGfwEbeRWgbNEkqO0000",
            "caps": {"frame_max": 1048576, "feat": ["resume"]},
            "session": None,
            "agent": "conduit-py/1.0",
        },
        meaning="login, step 1: the client asks",
    ),
    "auth_challenge": Golden(
        sender="server",
        hex=(
            "434e445401100000000000b300000000000000010000019b76daa80000000000"
            "82a5736372616dd983723d724f70724e476677456265525767624e456b714f303030306876594470"
            "57556132526154434166757846496c6a684e6c2c733d5732325a614a30534e5937736f457355456a"
            "623667513d3d2c693d343039362c643d372b484748356638784d564d5a466b344953366b32664a76"
            "7a684f66385554783038304d7a786c795a43553da463617073c42083a17601a96672616d655f6d61"
            "78ce00100000a46665617491a6726573756d65"
        ),
        type=16,
        flags=0,
        id=1,
        seq=0,
        value={
            "scram": "r=rOprNGfwEbeRWgbNEkqO0000hvYDpWUa2RaTCAfuxFIljhNl,"
            "s=W22ZaJ0SNY7soEsUEjb6gQ==,"
            "i=4096,d=7+HGH5f8xMVMZFk4IS6k2fJvzhOf8UTx080MzxlyZCU=",
            "caps": b"\x83\xa1v\x01\xa9frame_max\xce\x00\x10\x00\x00\xa4feat\x91\xa6resume",
        },
        meaning="login, step 2: the server answers with salt, iterations and `d`",
    ),
    "auth_response": Golden(
        sender="client",
        hex=(
            "434e4454011100000000007100000000000000010000019b76daa80000000000"
            "81a5736372616dd968633d626977732c723d724f70724e476677456265525767624e456b714f3030"
            "3030687659447057556132526154434166757846496c6a684e6c2c703d584d4478714a576b545557"
            "2f704a69477777393272624a566f31575035774a6146515463422b30504e36673d"
        ),
        type=17,
        flags=0,
        id=1,
        seq=0,
        value={
            "scram": "c=biws,r=rOprNGfwEbeRWgbNEkqO0000hvYDpWUa2RaTCAfuxFIljhNl,"
            "p=XMDxqJWkTUW/pJiGww92rbJVo1WP5wJaFQTcB+0PN6g="
        },
        meaning="login, step 3: the client proves that it knows the password",
    ),
    "auth_success": Golden(
        sender="server",
        hex=(
            "434e445401080000000000d200000000000000010000019b76daa80000000000"
            "86a5736372616dd92e763d656a4557344c324645324a3835386d773544474359452b7a666634744a"
            "556e5461513554716856323237343da86964656e74697479a764656661756c74a773657373696f6e"
            "85a26964c410000102030405060708090a0b0c0d0e0fa565706f6368c408f0f1f2f3f4f5f6f7a772"
            "6573756d6564c2a47265637600a374746c00a2686292cd7530ce00015f90a673657276657282a46e"
            "616d65ae636f6e647569742d736572766572a776657273696f6ea5312e302e30a76d6574686f6473"
            "c4085f0e7c2a91b3d486"
        ),
        type=8,
        flags=0,
        id=1,
        seq=0,
        value={
            "scram": "v=ejEW4L2FE2J858mw5DGCYE+zff4tJUnTaQ5TqhV2274=",
            "identity": "default",
            "session": {
                "id": b"\x00\x01\x02\x03\x04\x05\x06\x07\x08\t\n\x0b\x0c\r\x0e\x0f",
                "epoch": b"\xf0\xf1\xf2\xf3\xf4\xf5\xf6\xf7",
                "resumed": False,
                "recv": 0,
                "ttl": 0,
            },
            "hb": [30000, 90000],
            "server": {"name": "conduit-server", "version": "1.0.0"},
            "methods": b"\x5f\x0e\x7c\x2a\x91\xb3\xd4\x86",
        },
        meaning="login, step 4: the server proves it as well",
    ),
    "message": Golden(
        sender="client",
        hex=(
            "434e4454010100020000001600000000000000000000019b76daa80000000001"
            "92a86772656574696e6781a46e616d65a5576f726c64"
        ),
        type=1,
        flags=2,
        id=0,
        seq=1,
        value=["greeting", {"name": "World"}],
        meaning="a message that wants no answer",
    ),
    "message_response": Golden(
        sender="server",
        hex=(
            "434e4454010100120000002800000000000000000000019b76daa80000000001"
            "92b16772656574696e675f726573706f6e736581a57265706c79ad48656c6c6f2c20576f726c6421"
        ),
        type=1,
        flags=18,
        id=0,
        seq=1,
        value=["greeting_response", {"reply": "Hello, World!"}],
        meaning="what its handler returned, sent back as a reply with id 0",
    ),
    "request": Golden(
        sender="client",
        hex=("434e4454010100020000000900000000000000010000019b76daa8000000000292a6737461747573c0"),
        type=1,
        flags=2,
        id=1,
        seq=2,
        value=["status", None],
        meaning="a message that wants an answer",
    ),
    "reply": Golden(
        sender="server",
        hex=(
            "434e4454010100120000000b00000000000000010000019b76daa8000000000292a6737461747573a26f6b"
        ),
        type=1,
        flags=18,
        id=1,
        seq=2,
        value=["status", "ok"],
        meaning="the answer to it",
    ),
    "call_by_name": Golden(
        sender="client",
        hex=(
            "434e4454010200020000000c00000000000000030000019b76daa80000000003"
            "92a361646482a1610aa16214"
        ),
        type=2,
        flags=2,
        id=3,
        seq=3,
        value=["add", {"a": 10, "b": 20}],
        meaning="a call with named parameters",
    ),
    "result": Golden(
        sender="server",
        hex=("434e4454010300020000000200000000000000030000019b76daa80000000003911e"),
        type=3,
        flags=2,
        id=3,
        seq=3,
        value=[30],
        meaning="its result",
    ),
    "call_by_position": Golden(
        sender="client",
        hex=(
            "434e4454010200020000001300000000000000050000019b76daa80000000004"
            "93a664697669646592010081a374746ccd1388"
        ),
        type=2,
        flags=2,
        id=5,
        seq=4,
        value=["divide", [1, 0], {"ttl": 5000}],
        meaning="a call by position, with 5 seconds left",
    ),
    "error": Golden(
        sender="server",
        hex=(
            "434e4454010400020000003200000000000000050000019b76daa80000000004"
            "93ae696e7465726e616c5f6572726f72ae696e7465726e616c206572726f7281a86572726f725f69"
            "64a83566336139633031"
        ),
        type=4,
        flags=2,
        id=5,
        seq=4,
        value=["internal_error", "internal error", {"error_id": "5f3a9c01"}],
        meaning="the handler failed",
    ),
    "call_to_cancel": Golden(
        sender="client",
        hex=(
            "434e4454010200020000001100000000000000070000019b76daa80000000005"
            "92a5736c65657081a77365636f6e64733c"
        ),
        type=2,
        flags=2,
        id=7,
        seq=5,
        value=["sleep", {"seconds": 60}],
        meaning="a call that takes long",
    ),
    "cancel": Golden(
        sender="client",
        hex=("434e4454011300020000000900000000000000070000019b76daa8000000000691a774696d656f7574"),
        type=19,
        flags=2,
        id=7,
        seq=6,
        value=["timeout"],
        meaning="the caller gives up",
    ),
    "cancelled": Golden(
        sender="server",
        hex=(
            "434e4454010400020000002900000000000000070000019b76daa80000000005"
            "93ae63616c6c5f63616e63656c6c6564b763616e63656c6c6564206279207468652063616c6c6572"
            "80"
        ),
        type=4,
        flags=2,
        id=7,
        seq=5,
        value=["call_cancelled", "cancelled by the caller", {}],
        meaning="the final answer of the cancelled call",
    ),
    "call_from_server": Golden(
        sender="server",
        hex=(
            "434e4454010200020000000e00000000000000020000019b76daa80000000006"
            "92ab726561645f73656e736f7280"
        ),
        type=2,
        flags=2,
        id=2,
        seq=6,
        value=["read_sensor", {}],
        meaning="the server calls the client",
    ),
    "error_from_client": Golden(
        sender="client",
        hex=(
            "434e4454010400020000003100000000000000020000019b76daa80000000007"
            "93b06d6574686f645f6e6f745f666f756e64bd6e6f206d6574686f64206e616d6564202772656164"
            "5f73656e736f722780"
        ),
        type=4,
        flags=2,
        id=2,
        seq=7,
        value=["method_not_found", "no method named 'read_sensor'", {}],
        meaning="the client has no such method",
    ),
    "broadcast": Golden(
        sender="server",
        hex=(
            "434e4454010100080000000f00000000000000000000019b76daa80000000000"
            "92a46e65777381a474657874a26869"
        ),
        type=1,
        flags=8,
        id=0,
        seq=0,
        value=["news", {"text": "hi"}],
        meaning="a best-effort broadcast, not sequenced",
    ),
    "ping": Golden(
        sender="server",
        hex=("434e44540105000800000000000000000000002a0000019b76daa80000000000"),
        type=5,
        flags=8,
        id=42,
        seq=0,
        value=None,
        meaning="a ping, written ahead of what waits",
    ),
    "ack": Golden(
        sender="client",
        hex=("434e4454011200000000000000000000000000060000019b76daa80000000000"),
        type=18,
        flags=0,
        id=6,
        seq=0,
        value=None,
        meaning="the client has accepted 6 sequenced frames",
    ),
    "pong": Golden(
        sender="client",
        hex=("434e44540106000000000000000000000000002a0000019b76daa80000000000"),
        type=6,
        flags=0,
        id=42,
        seq=0,
        value=None,
        meaning="the answer to the ping",
    ),
    "credit": Golden(
        sender="server",
        hex=("434e4454011600020000000300000000000000000000019b76daa8000000000792021f"),
        type=22,
        flags=2,
        id=0,
        seq=7,
        value=[2, 31],
        meaning="credit for 2 messages with 31 payload bytes comes back",
    ),
    "stream_call": Golden(
        sender="client",
        hex=(
            "434e4454010200020000001e00000000000000090000019b76daa8000000000893a6646f75626c65"
            "8082a673747265616da76e756d62657273a374746c00"
        ),
        type=2,
        flags=2,
        id=9,
        seq=8,
        value=["double", {}, {"stream": "numbers", "ttl": 0}],
        meaning="a call with streams: items for `numbers` follow, and there is no deadline",
    ),
    "stream_item": Golden(
        sender="client",
        hex=("434e4454011400020000000400000000000000090000019b76daa8000000000993010203"),
        type=20,
        flags=2,
        id=9,
        seq=9,
        value=[1, 2, 3],
        meaning="three items of the caller",
    ),
    "stream_end": Golden(
        sender="client",
        hex=("434e4454011500020000000000000000000000090000019b76daa8000000000a"),
        type=21,
        flags=2,
        id=9,
        seq=10,
        value=None,
        meaning="the end of the caller's items",
    ),
    "stream_answer": Golden(
        sender="server",
        hex=("434e4454011400020000000400000000000000090000019b76daa8000000000893020406"),
        type=20,
        flags=2,
        id=9,
        seq=8,
        value=[2, 4, 6],
        meaning="three items of the handler",
    ),
    "stream_credit": Golden(
        sender="server",
        hex=("434e4454011600020000000300000000000000090000019b76daa80000000009920304"),
        type=22,
        flags=2,
        id=9,
        seq=9,
        value=[3, 4],
        meaning="credit for 3 items with 4 payload bytes comes back",
    ),
    "stream_result": Golden(
        sender="server",
        hex=("434e4454010300020000000200000000000000090000019b76daa8000000000a91c0"),
        type=3,
        flags=2,
        id=9,
        seq=10,
        value=[None],
        meaning="the end of the call: the handler has returned nothing",
    ),
    "goaway": Golden(
        sender="server",
        hex=(
            "434e4454011700000000001b00000000000000000000019b76daa8000000000094cd03e9b2736572"
            "7665722069732073746f7070696e67cd13880a"
        ),
        type=23,
        flags=0,
        id=0,
        seq=0,
        value=[1001, "server is stopping", 5000, 10],
        meaning="the server stops in five seconds and serves frames up to number 10",
    ),
    "close": Golden(
        sender="server",
        hex=(
            "434e4454011800000000001700000000000000000000019b76daa80000000000"
            "92cd03e9b27365727665722069732073746f7070696e67"
        ),
        type=24,
        flags=0,
        id=0,
        seq=0,
        value=[1001, "server is stopping"],
        meaning="the server closes",
    ),
    "auth_failure": Golden(
        sender="server",
        hex=(
            "434e4454010900000000005f00000000000000010000019b76daa80000000000"
            "85a4636f6465b3696e76616c69645f63726564656e7469616c73a76d657373616765b3696e76616c"
            "69642063726564656e7469616c73a57265747279c2ab72657472795f616674657200a56d65636873"
            "91ad534352414d2d5348412d323536"
        ),
        type=9,
        flags=0,
        id=1,
        seq=0,
        value={
            "code": "invalid_credentials",
            "message": "invalid credentials",
            "retry": False,
            "retry_after": 0,
            "mechs": ["SCRAM-SHA-256"],
        },
        meaning="in place of step 4: the login failed",
        alone=True,
    ),
    "auth_request_external": Golden(
        sender="client",
        hex=(
            "434e4454010700000000006100000000000000010000019b76daa80000000000"
            "86a17601a46d656368a845585445524e414ca5736372616da86465766963652d37a46361707382a9"
            "6672616d655f6d6178ce00100000a46665617491a6726573756d65a773657373696f6ec0a5616765"
            "6e74ae636f6e647569742d70792f312e30"
        ),
        type=7,
        flags=0,
        id=1,
        seq=0,
        value={
            "v": 1,
            "mech": "EXTERNAL",
            "scram": "device-7",
            "caps": {"frame_max": 1048576, "feat": ["resume"]},
            "session": None,
            "agent": "conduit-py/1.0",
        },
        meaning="login by certificate: the client says who it is",
        alone=True,
    ),
    "auth_success_external": Golden(
        sender="server",
        hex=(
            "434e445401080000000000b900000000000000010000019b76daa80000000000"
            "86a5736372616da0a86964656e74697479a86465766963652d37a773657373696f6e85a26964c410"
            "000102030405060708090a0b0c0d0e0fa565706f6368c408f0f1f2f3f4f5f6f7a7726573756d6564"
            "c2a47265637600a374746c00a2686292cd7530ce00015f90a673657276657282a46e616d65ae636f"
            "6e647569742d736572766572a776657273696f6ea5312e302e30a463617073c42083a17601a96672"
            "616d655f6d6178ce00100000a46665617491a6726573756d65"
        ),
        type=8,
        flags=0,
        id=1,
        seq=0,
        value={
            "scram": "",
            "identity": "device-7",
            "session": {
                "id": b"\x00\x01\x02\x03\x04\x05\x06\x07\x08\t\n\x0b\x0c\r\x0e\x0f",
                "epoch": b"\xf0\xf1\xf2\xf3\xf4\xf5\xf6\xf7",
                "resumed": False,
                "recv": 0,
                "ttl": 0,
            },
            "hb": [30000, 90000],
            "server": {"name": "conduit-server", "version": "1.0.0"},
            "caps": b"\x83\xa1v\x01\xa9frame_max\xce\x00\x10\x00\x00\xa4feat\x91\xa6resume",
        },
        meaning="the answer to it: the server lets the client in",
        alone=True,
    ),
    "compressed": Golden(
        sender="client",
        hex=(
            "434e4454010100030000002500000000000000000000019b76daa80000000001"
            "78019bb438273ffd16fb85c451301a02a321301a02a321301a02a32130e4430000f1eefa17"
        ),
        type=1,
        flags=3,
        id=0,
        seq=1,
        value=["log", "a" * 2000],
        meaning=(
            "a payload of 2,008 bytes in 37, the first sequenced frame of its side; to "
            "be read, not compared: zlib libraries differ"
        ),
        alone=True,
    ),
    "resume_request": Golden(
        sender="client",
        hex=(
            "434e4454010700000000008500000000000000010000019b76daa80000000000"
            "86a17601a46d656368a9414e4f4e594d4f5553a5736372616da0a46361707382a96672616d655f6d"
            "6178ce00100000a46665617491a6726573756d65a773657373696f6e83a26964c410000102030405"
            "060708090a0b0c0d0e0fa565706f6368c408f0f1f2f3f4f5f6f7a47265637603a56167656e74ae63"
            "6f6e647569742d70792f312e30"
        ),
        type=7,
        flags=0,
        id=1,
        seq=0,
        value={
            "v": 1,
            "mech": "ANONYMOUS",
            "scram": "",
            "caps": {"frame_max": 1048576, "feat": ["resume"]},
            "session": {
                "id": b"\x00\x01\x02\x03\x04\x05\x06\x07\x08\t\n\x0b\x0c\r\x0e\x0f",
                "epoch": b"\xf0\xf1\xf2\xf3\xf4\xf5\xf6\xf7",
                "recv": 3,
            },
            "agent": "conduit-py/1.0",
        },
        meaning=(
            "the client has lost its link, has accepted 3 sequenced frames, and wants to go "
            "on; this session has no password"
        ),
        alone=True,
    ),
    "resume_success": Golden(
        sender="server",
        hex=(
            "434e445401080000000000ba00000000000000010000019b76daa80000000000"
            "86a5736372616da0a86964656e74697479a9616e6f6e796d6f7573a773657373696f6e85a26964c4"
            "10000102030405060708090a0b0c0d0e0fa565706f6368c408f0f1f2f3f4f5f6f7a7726573756d65"
            "64c3a47265637607a374746c1ea2686292cd7530ce00015f90a673657276657282a46e616d65ae63"
            "6f6e647569742d736572766572a776657273696f6ea5312e302e30a463617073c42083a17601a966"
            "72616d655f6d6178ce00100000a46665617491a6726573756d65"
        ),
        type=8,
        flags=0,
        id=1,
        seq=0,
        value={
            "scram": "",
            "identity": "anonymous",
            "session": {
                "id": b"\x00\x01\x02\x03\x04\x05\x06\x07\x08\t\n\x0b\x0c\r\x0e\x0f",
                "epoch": b"\xf0\xf1\xf2\xf3\xf4\xf5\xf6\xf7",
                "resumed": True,
                "recv": 7,
                "ttl": 30,
            },
            "hb": [30000, 90000],
            "server": {"name": "conduit-server", "version": "1.0.0"},
            "caps": b"\x83\xa1v\x01\xa9frame_max\xce\x00\x10\x00\x00\xa4feat\x91\xa6resume",
        },
        meaning=(
            "the server goes on, and has accepted 7: the client sends its frames from 8 "
            "again, the server its own from 4"
        ),
        alone=True,
    ),
}
