"""Descriptors: what they accept, what they refuse and why, and that they keep secrets."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from conduit import MemoryStore
from conduit.descriptors import TLS, Address, ClientDescriptor, Limits, ServerDescriptor
from conduit.protocol.events import Capabilities
from conduit.transport.settings import Settings
from tests.golden_frames import VERIFIER

PASSWORD = "hunter2 and more"
WHERE: dict[str, Any] = {"server_host": "localhost", "server_port": 8080}


async def lookup(user: str) -> str | None:
    return None


def shown(error: BaseException) -> str:
    """Return whatever of an error can reach a log."""
    return f"{error} {error!r} {error.args}"


# Values


SECONDS_WRONG = [0, -1, "x", float("inf"), float("nan")]
COUNT_WRONG = [0, -1, 1.5, "x", None]
NETWORKS_WRONG = ["10.0.0.0/8", ["host.example"], ["10.0.0.1/8"], ["10.0.0.0/33"], [5], None]

SERVER_FIELDS: list[tuple[str, list[Any], list[Any]]] = [
    ("name", ["x", "x" * 40, "größe"], ["", "x" * 41, 5, None]),
    ("version", ["", "1.0", "x" * 20], ["x" * 21, 1.0]),
    ("host", ["127.0.0.1", "::1", "localhost"], [5, None]),
    ("port", [0, 1, 65535], [-1, 65536, 1.5, "x", None]),
    ("ipv6", [True, False], ["x", None]),
    ("max_connections", [1, 10_000], COUNT_WRONG),
    ("duplicate", ["allow"], ["x", "", True, None, "replace"]),
    ("heartbeat_interval", [1, 30.0], SECONDS_WRONG),
    ("heartbeat_timeout", [31, 90.0], SECONDS_WRONG),
    ("enable_compression", [True, False], ["x", None]),
    ("enable_backpressure", [True, False], ["x", None]),
    ("watchdog", [0.001, 0.25, None], SECONDS_WRONG),
    ("resume_ttl", [0, 0.5, 30, 3600], [-1, "x", None, float("inf"), float("nan")]),
    ("idempotency", [None, MemoryStore()], [{}, 5, "x"]),
    ("idempotency_ttl", [0.1, 600], [*SECONDS_WRONG, None]),
    ("rpc_timeout", [0.1, 30, None], SECONDS_WRONG),
    ("debug", [True, False], ["x", None]),
    ("tls", [None, TLS(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)], [True, "cert.pem", 5]),
    ("proxies", [(), ("10.0.0.0/8", "fd00::/8", "192.0.2.7")], NETWORKS_WRONG),
    ("exempt", [(), ("0.0.0.0/0", "::/0")], NETWORKS_WRONG),
    ("limits", [Limits(), {"max_calls": 5}], [None, 5, {"max_call": 5}, {"max_calls": 0}]),
]

CLIENT_FIELDS: list[tuple[str, list[Any], list[Any]]] = [
    ("server_host", ["localhost", "::1"], [5]),
    ("server_port", [1, 65535], [0, -1, 65536, "x"]),
    ("user", ["x", "ann@example", "x" * 128], ["", "x" * 129, None]),
    ("name", ["x", "x" * 40], ["", "x" * 41, None]),
    ("version", ["", "1.0"], ["x" * 21]),
    ("use_ipv6", [True, False], ["x"]),
    ("reconnect_enabled", [True, False], ["x"]),
    ("reconnect_attempts", [0, 1, 1000], [-1, 1.5, None]),
    ("reconnect_delay", [0.01, 5], SECONDS_WRONG),
    ("rpc_timeout", [0.1, 30, None], SECONDS_WRONG),
    ("debug", [True, False], ["x", None]),
    ("connect_timeout", [0.1, 30], [*SECONDS_WRONG, None]),
    ("enable_compression", [True, False], ["x"]),
    ("enable_backpressure", [True, False], ["x"]),
    ("tls", [None, TLS(), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)], [True, "ca.pem"]),
    ("limits", [Limits()], [None, {"unknown": 1}]),
]

LIMITS_FIELDS: list[tuple[str, list[Any], list[Any]]] = [
    ("max_payload", [1, 64 * 1024 * 1024], [0, -1, 64 * 1024 * 1024 + 1, None]),
    ("max_calls", [1, 65536], [0, 65537]),
    ("max_running", [1, 10**6], COUNT_WRONG),
    ("max_timeout", [0.1, 3600, None], SECONDS_WRONG),
    ("max_messages", [1, 65536], [0, 65537]),
    ("max_message_bytes", [1, 64 * 1024 * 1024], [0, 64 * 1024 * 1024 + 1]),
    ("max_stream_items", [1, 65536], [0, 65537]),
    ("max_stream_bytes", [1, 64 * 1024 * 1024], [0, 64 * 1024 * 1024 + 1]),
    ("outbox_bytes", [1, 2**40], [0, -1]),
    ("login_timeout", [0.1, 60], SECONDS_WRONG),
    ("max_pending_logins", [1, 10_000], COUNT_WRONG),
    ("max_pending_per_address", [1, 10_000], COUNT_WRONG),
    ("max_buffered", [1024 * 1024, 2**40], [*COUNT_WRONG, 1024 * 1024 - 1]),
    ("max_away", [1, 10_000], COUNT_WRONG),
    ("max_away_bytes", [1, 2**40], COUNT_WRONG),
    ("min_iterations", [4096, 600_000], [4095, 0]),
    ("max_iterations", [100_000, 10**9], [4095, 0]),
]

TLS_FIELDS: list[tuple[str, list[Any], list[Any]]] = [
    ("certificate", [None, "cert.pem", Path("cert.pem")], [5]),
    ("key", [None, "key.pem"], [5]),
    ("ca", [None, "ca.pem"], [5]),
    ("verify", [True], ["x", None]),
    ("server_name", [None, "example.org", "::1"], [5, "a..b", ".org", 64 * "a", "a\0b"]),
    ("channel_binding", [True, False], ["x"]),
]

MODELS: list[tuple[type[Any], dict[str, Any], list[tuple[str, list[Any], list[Any]]]]] = [
    (ServerDescriptor, {}, SERVER_FIELDS),
    (ClientDescriptor, WHERE, CLIENT_FIELDS),
    (Limits, {}, LIMITS_FIELDS),
    (TLS, {}, TLS_FIELDS),
]
GOOD = [
    (m, known, f, value) for m, known, fields in MODELS for f, good, _ in fields for value in good
]
BAD = [(m, known, f, value) for m, known, fields in MODELS for f, _, bad in fields for value in bad]


def named(value: Any) -> str | None:
    if isinstance(value, type):
        return value.__name__
    return "" if isinstance(value, dict) else repr(value).partition(" at 0x")[0][:30]


@pytest.mark.parametrize("model, known, field, value", GOOD, ids=named)
def test_a_field_takes_what_makes_sense(
    model: type[Any], known: dict[str, Any], field: str, value: Any
) -> None:
    built = model(**{**known, field: value})
    got = getattr(built, field)
    assert got == value or got == Path(str(value)) or isinstance(got, Limits)


@pytest.mark.parametrize("model, known, field, value", BAD, ids=named)
def test_a_field_refuses_what_does_not(
    model: type[Any], known: dict[str, Any], field: str, value: Any
) -> None:
    with pytest.raises(ValidationError) as caught:
        model(**{**known, field: value})
    assert field in str(caught.value)


@pytest.mark.parametrize("model, known", [(model, known) for model, known, _ in MODELS], ids=named)
def test_unknown_fields_are_an_error_and_known_ones_are_final(
    model: type[Any], known: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError, match="max_conections"):
        model(**{**known, "max_conections": 5})
    built = model(**known)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(built, next(iter(model.model_fields)), None)


@pytest.mark.parametrize("model, known, fields", MODELS, ids=named)
def test_every_field_is_tried_here(
    model: type[Any], known: dict[str, Any], fields: list[tuple[str, list[Any], list[Any]]]
) -> None:
    elsewhere = {"password", "verifier", "users", "urls", "key_password", "mock_secret"}
    assert set(model.model_fields) - elsewhere == {field for field, *_ in fields}


def test_the_timeout_exceeds_the_interval() -> None:
    for interval, timeout in ((30, 30), (30, 29.9)):
        with pytest.raises(ValidationError, match="heartbeat_timeout.*must exceed.*interval"):
            ServerDescriptor(heartbeat_interval=interval, heartbeat_timeout=timeout)


def test_tls_without_any_check_is_refused() -> None:
    with pytest.raises(ValidationError, match="nothing is checked at all"):
        TLS(verify=False, channel_binding=False)
    assert TLS(verify=False).channel_binding
    urls = ("tls://localhost:8443",)
    with pytest.raises(ValidationError, match="verify=False needs a password"):
        ClientDescriptor(urls=urls, tls=TLS(verify=False))
    assert ClientDescriptor(urls=urls, tls=TLS(verify=False), password="secret").tls is not None


# What is accepted here is told to the peer at login, which checks it again


@pytest.mark.parametrize("rpc_timeout", [1e-9, 0.0001, 1e6, 1e7, 1e12])
def test_every_deadline_that_is_accepted_can_be_told(rpc_timeout: float) -> None:
    for make in (
        lambda: ServerDescriptor(rpc_timeout=rpc_timeout),
        lambda: ClientDescriptor(**WHERE, rpc_timeout=rpc_timeout),
    ):
        try:
            descriptor: Any = make()
        except ValidationError:
            continue
        told = Settings.of(descriptor).capabilities.to_map()
        assert Capabilities.from_map(told).ttl >= 1


@pytest.mark.parametrize("interval, timeout", [(1e-9, 1e-8), (0.0001, 1), (1e6, 1e7), (1e9, 2e9)])
def test_every_heartbeat_that_is_accepted_can_be_told(interval: float, timeout: float) -> None:
    try:
        descriptor = ServerDescriptor(heartbeat_interval=interval, heartbeat_timeout=timeout)
    except ValidationError:
        return
    for seconds in (descriptor.heartbeat_interval, descriptor.heartbeat_timeout):
        assert 1 <= round(seconds * 1000) < 2**32, "milliseconds in 32 bits"


@pytest.mark.parametrize("name", ["x" * 40, "ä" * 40, "€" * 40, "😀" * 40])
def test_every_name_that_is_accepted_can_be_told(name: str) -> None:
    try:
        descriptor = ClientDescriptor(**WHERE, name=name, version="v" * 20)
    except ValidationError:
        return
    assert len(f"{descriptor.name}/{descriptor.version}".encode()) <= 64


# Who may log in


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"password": PASSWORD},
        {"verifier": VERIFIER},
        {"users": {"ann": VERIFIER, "bob": VERIFIER}},
        {"users": {}},
        {"users": lookup},
    ],
    ids=lambda given: "".join(given),
)
def test_one_credential_or_none(given: dict[str, Any]) -> None:
    ServerDescriptor(**given)


@pytest.mark.parametrize(
    "given, names",
    [
        ({"password": PASSWORD, "verifier": VERIFIER}, "password and verifier"),
        ({"password": PASSWORD, "users": {}}, "password and users"),
        ({"verifier": VERIFIER, "users": lookup}, "verifier and users"),
        (
            {"password": PASSWORD, "verifier": VERIFIER, "users": {}},
            "password and verifier and users",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_not_two(given: dict[str, Any], names: str) -> None:
    with pytest.raises(ValidationError, match=f"not {names}") as caught:
        ServerDescriptor(**given)
    assert PASSWORD not in shown(caught.value) and VERIFIER not in shown(caught.value)


@pytest.mark.parametrize("password", ["", "x" * 1025, "line\nbreak", "\ud800"])
def test_a_password_that_cannot_be_one_is_refused(password: str) -> None:
    for make in (
        lambda: ServerDescriptor(password=password),
        lambda: ClientDescriptor(**{**WHERE, "password": password}),
    ):
        with pytest.raises(ValidationError, match="password") as caught:
            make()
        assert not password or password not in shown(caught.value)


@pytest.mark.parametrize("verifier", ["", "x", PASSWORD, VERIFIER[:-1], VERIFIER + "x", None, 5])
def test_a_verifier_that_is_none_is_refused(verifier: Any) -> None:
    if verifier is not None:
        with pytest.raises(ValidationError, match="verifier"):
            ServerDescriptor(verifier=verifier)
    with pytest.raises(ValidationError) as caught:
        ServerDescriptor(users={"ann": verifier})
    if isinstance(verifier, str):
        assert "'ann'" in str(caught.value)
        assert len(verifier) < 10 or verifier not in shown(caught.value)


def test_users_may_not_be_a_list() -> None:
    with pytest.raises(ValidationError, match="users"):
        ServerDescriptor(users=["ann"])  # type: ignore[arg-type]


# Secrets


@pytest.mark.parametrize(
    "make",
    [
        lambda: ServerDescriptor(password=PASSWORD),
        lambda: ServerDescriptor(verifier=VERIFIER),
        lambda: ServerDescriptor(users={"ann": VERIFIER}),
        lambda: ClientDescriptor(**{**WHERE, "password": PASSWORD}),
        lambda: TLS(key_password=PASSWORD),
        lambda: ServerDescriptor(tls=TLS(key_password=PASSWORD)),
    ],
    ids=["password", "verifier", "users", "client", "key", "key of a server"],
)
def test_what_is_secret_is_not_shown(make: Any) -> None:
    descriptor = make()
    for text in (repr(descriptor), str(descriptor), f"{descriptor}", repr(descriptor.model_dump())):
        assert PASSWORD not in text and VERIFIER not in text
        assert VERIFIER.rpartition(":")[2] not in text


@pytest.mark.parametrize(
    "make",
    [
        lambda: ServerDescriptor(password=PASSWORD, port=-1),
        lambda: ServerDescriptor(password=PASSWORD, unknown=1),  # type: ignore[call-arg]
        lambda: ServerDescriptor(password=PASSWORD, heartbeat_interval=90),
        lambda: ServerDescriptor(password=5, name=PASSWORD * 10),  # type: ignore[arg-type]
        lambda: ServerDescriptor(verifier=PASSWORD),
        lambda: ServerDescriptor(users={"ann": PASSWORD}),
        lambda: ClientDescriptor(password=PASSWORD),
        lambda: ClientDescriptor(**{**WHERE, "urls": ("tcp://h:1",), "password": PASSWORD}),
        lambda: ClientDescriptor(urls=(f"tcp://me:{PASSWORD}@h:1",)),
        lambda: ClientDescriptor(urls=(f"tcp://me:{PASSWORD}@h:99999",)),
        lambda: ClientDescriptor(urls=(f"tcp://me:{PASSWORD}@h:port",)),
        lambda: ClientDescriptor(urls=(f"http://me:{PASSWORD}@h:1",)),
        lambda: Address.parse(f"tcp://me:{PASSWORD}@h:99999"),
        lambda: Address.parse(f"tcp://me:{PASSWORD}@[h:1"),
    ],
)
def test_not_even_an_error_shows_it(make: Any) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert PASSWORD not in shown(caught.value)


# Addresses


@pytest.mark.parametrize(
    "url, host, port, tls",
    [
        ("tcp://localhost:8080", "localhost", 8080, False),
        ("tls://hub.example.org:1", "hub.example.org", 1, True),
        ("TLS://Hub:65535", "hub", 65535, True),
        ("tcp://[::1]:80", "::1", 80, False),
        ("tcp://127.0.0.1:0", "127.0.0.1", 0, False),
    ],
)
def test_a_url_is_an_address_and_the_other_way_round(
    url: str, host: str, port: int, tls: bool
) -> None:
    address = Address.parse(url)
    assert address == Address(host=host, port=port, tls=tls)
    assert Address.parse(str(address)) == address
    assert str(address) == url.lower()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost",
        "localhost:80",
        "tcp://localhost",
        "tcp://:80",
        "tcp://",
        "tcp:localhost:80",
        "http://localhost:80",
        "ws://localhost:80",
        "tcp://localhost:port",
        "tcp://localhost:65536",
        "tcp://localhost:-1",
        "tcp://localhost:80/",
        "tcp://localhost:80/path",
        "tcp://localhost:80?x=1",
        "tcp://localhost:80#x",
        "tcp://[::1:80",
        "tcp://user@localhost:80",
    ],
)
def test_a_url_that_is_no_address_says_what_is_wrong(url: str) -> None:
    with pytest.raises(ValueError) as caught:
        Address.parse(url)
    assert not isinstance(caught.value, ValidationError)
    assert "tcp://" in str(caught.value) or "password" in str(caught.value)


def test_a_client_is_told_where_its_server_is_in_one_way() -> None:
    plain = ClientDescriptor(**WHERE)
    assert plain.addresses == [Address(host="localhost", port=8080)]
    assert ClientDescriptor(**WHERE, tls=TLS()).addresses == [
        Address(host="localhost", port=8080, tls=True)
    ]
    several = ClientDescriptor(urls=("tls://one:1", "tcp://two:2"))
    assert several.addresses == [
        Address(host="one", port=1, tls=True),
        Address(host="two", port=2, tls=False),
    ]
    assert ClientDescriptor(urls=["tcp://one:1"]).urls == ("tcp://one:1",)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"server_host": "localhost"},
        {"server_port": 1},
        {**WHERE, "urls": ("tcp://one:1",)},
        {"server_host": "localhost", "urls": ("tcp://one:1",)},
        {"urls": ()},
        {"urls": "tcp://one:1"},
        {"urls": ("one:1",)},
        {"urls": ("tcp://one:1", "nonsense")},
        {"urls": ("tcp://one:0",)},
        {"urls": ("tls://one:1", "tcp://two:2"), "tls": TLS()},
    ],
    ids=str,
)
def test_a_client_that_is_not_told_where_its_server_is_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ClientDescriptor(**given)
