"""No password, token, verifier or key is shown: not by a repr, a log, an error or its traceback.

Whatever is shown is searched for each secret and for all that is derived from it, as text, as
bytes, in hex and in base64.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import hashlib
import io
import logging
import pprint
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from pydantic import BaseModel, ValidationError

import conduit
from conduit import (
    TLS,
    AuthenticationError,
    Client,
    ClientDescriptor,
    Limits,
    PermissionDenied,
    Server,
    ServerDescriptor,
    User,
    blocking,
    hash_password,
    new_token,
)
from conduit.protocol.scram import Keys, Verifier, derive_keys
from conduit.users import Found, Users
from tests.acceptance.support import within

PACKAGE = str(Path(conduit.__file__).parent)
PASSWORD = "Tr0ub4dor & drei"
WRONG = "another Tr0ub4dor"
KEY_PASSWORD = "opens the private key"
MOCK_SECRET = "salts of nobody at all"
TOKEN = new_token("ci")
ITERATIONS = 4096
VERIFIERS = {
    "ann": hash_password(PASSWORD, iterations=ITERATIONS),
    "cnd_ci": hash_password(TOKEN),
}


def derived(secret: str, verifier: str) -> Iterator[bytes]:
    """Yield all that the login makes of a password."""
    parsed = Verifier.parse(verifier)
    yield hashlib.pbkdf2_hmac("sha256", secret.encode(), parsed.salt, parsed.iterations)
    keys = derive_keys(secret, parsed.salt, parsed.iterations)
    yield from (keys.client_key, keys.server_key, parsed.stored_key)


def spellings(secret: bytes) -> set[str]:
    """Return the ways in which bytes may be written."""
    coded = (base64.b64encode(secret), base64.urlsafe_b64encode(secret))
    return {
        repr(secret)[2:-1],
        secret.hex(),
        secret.hex(" "),
        *(one.decode().rstrip("=") for one in coded),
    }


TEXTS = [PASSWORD, WRONG, KEY_PASSWORD, MOCK_SECRET, TOKEN, TOKEN[-43:]]
SECRETS = {
    *TEXTS,
    *(spelling for text in TEXTS for spelling in spellings(text.encode())),
    *(verifier.rpartition("$")[2] for verifier in VERIFIERS.values()),
    *(
        spelling
        for secret, verifier in ((PASSWORD, VERIFIERS["ann"]), (TOKEN, VERIFIERS["cnd_ci"]))
        for key in derived(secret, verifier)
        for spelling in spellings(key)
    ),
    *spellings(hashlib.sha256(MOCK_SECRET.encode()).digest()),
}


def found_in(text: str) -> list[str]:
    """Return the secrets that a text shows."""
    plain = text.replace("\n", "").replace("    ", "")
    return [secret for secret in SECRETS if secret in text or secret in plain]


def shown(thing: object) -> str:
    """Return whatever people look at to see what they have."""
    parts = [f"{thing} {thing!r} {pprint.pformat(thing)}"]
    if hasattr(thing, "__dict__"):
        parts.append(repr(vars(thing)))
        parts += [f"{value!r} {value}" for value in vars(thing).values()]
    for base in type(thing).__mro__:
        slots = base.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if not slot.startswith("__") and hasattr(thing, slot):
                parts.append(repr(getattr(thing, slot)))
    if isinstance(thing, BaseModel):
        parts += [repr(thing.model_dump()), thing.model_dump_json(exclude={"users", "tls"})]
    return "\n".join(parts)


def told(error: BaseException) -> str:
    """Return all that can be told of an error, with the local variables of conduit's frames."""
    trace = traceback.TracebackException.from_exception(error, capture_locals=True)
    pending, lines = [trace], [repr(error), str(error), repr(error.args), repr(vars(error))]
    while pending:
        one = pending.pop()
        pending += [each for each in (one.__cause__, one.__context__) if each is not None]
        lines += one.format_exception_only()
        for frame in one.stack:
            if frame.filename.startswith(PACKAGE):  # a test knows its own password, and shows it
                lines.append(f"{frame.name}: {frame.locals}")
    return "\n".join(lines)


def test_the_search_finds_what_it_looks_for() -> None:
    keys = list(derived(PASSWORD, VERIFIERS["ann"]))
    for leak in (
        f"password={PASSWORD!r}",
        f"x {keys[1]!r}",
        keys[2].hex(),
        VERIFIERS["cnd_ci"],
        base64.b64encode(keys[3]).decode(),
        PASSWORD.encode().hex(" "),
    ):
        assert found_in(leak), leak
    assert not found_in("nothing of that kind")


async def look_up(name: str) -> User | str | None:
    return VERIFIERS.get(name)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TLS:
    folder = tmp_path_factory.mktemp("secrets")
    issued = trustme.CA().issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(KEY_PASSWORD.encode()),
        )
    )
    return TLS(certificate=folder / "cert.pem", key=folder / "key.pem", key_password=KEY_PASSWORD)


THINGS: list[Callable[[], object]] = [
    lambda: ServerDescriptor(password=PASSWORD, mock_secret=MOCK_SECRET),
    lambda: ServerDescriptor(verifier=VERIFIERS["ann"]),
    lambda: ServerDescriptor(users=VERIFIERS, mock_secret=MOCK_SECRET),
    lambda: ServerDescriptor(users={"ann": User(verifier=VERIFIERS["ann"], roles="x")}).users,
    lambda: ServerDescriptor(users=look_up, tls=TLS(key_password=KEY_PASSWORD)),
    lambda: copy.deepcopy(ServerDescriptor(users=VERIFIERS, mock_secret=MOCK_SECRET)),
    lambda: ClientDescriptor(urls=("tcp://h:1",), password=TOKEN),
    lambda: ClientDescriptor(urls=("tcp://h:1",), password=PASSWORD, user="ann"),
    lambda: User(verifier=VERIFIERS["ann"]),
    lambda: TLS(key_password=KEY_PASSWORD),
    lambda: Server(users=VERIFIERS, mock_secret=MOCK_SECRET),
    lambda: Server(password=PASSWORD),
    lambda: Client("tcp://h:1", password=TOKEN),
    lambda: blocking.Client("tcp://h:1", password=PASSWORD),
    lambda: Users(ServerDescriptor(users=VERIFIERS, mock_secret=MOCK_SECRET)),
    lambda: Users(ServerDescriptor(users=VERIFIERS)).find("ann"),
    lambda: Found(Verifier.parse(VERIFIERS["ann"])),
    lambda: Verifier.parse(VERIFIERS["ann"]),
    lambda: derive_keys(PASSWORD, Verifier.parse(VERIFIERS["ann"]).salt, ITERATIONS),
]


@pytest.mark.parametrize("make", THINGS, ids=range(len(THINGS)))
def test_what_people_hold_shows_no_secret(make: Callable[[], object]) -> None:
    thing = make()
    # What `Keys` and `Verifier` are there for is their fields; their repr is what must not tell.
    told_of = repr(thing) if isinstance(thing, (Keys, Verifier, Found)) else shown(thing)
    assert found_in(told_of) == []


WRONG_SETTINGS: list[Callable[[], object]] = [
    lambda: ServerDescriptor(password=PASSWORD, verifier=VERIFIERS["ann"]),
    lambda: ServerDescriptor(users={"ann": PASSWORD}),
    lambda: ServerDescriptor(users={"ann": VERIFIERS["ann"] + "x"}),
    lambda: ServerDescriptor(users={"ann": User(verifier=VERIFIERS["ann"])}, port=-1),
    lambda: ServerDescriptor(users={"ann": {"verifier": VERIFIERS["ann"], "role": "x"}}),  # type: ignore[dict-item]
    lambda: ServerDescriptor(password=TOKEN),
    lambda: ServerDescriptor(mock_secret=MOCK_SECRET[:15], password=PASSWORD),
    lambda: ClientDescriptor(urls=("tcp://h:1",), password=TOKEN, user="x"),
    lambda: ClientDescriptor(urls=("tcp://h:1",), password=PASSWORD, usr="x"),  # type: ignore[call-arg]
    lambda: User(verifier=PASSWORD),
    lambda: User(verifier=VERIFIERS["ann"], roles=[""]),
    lambda: User(verifier=VERIFIERS["ann"], role="x"),  # type: ignore[call-arg]
]


@pytest.mark.parametrize("make", WRONG_SETTINGS, ids=range(len(WRONG_SETTINGS)))
def test_nor_does_an_error_about_a_setting(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    error = caught.value
    text = f"{error} {error!r} {error.args} {''.join(traceback.format_exception(error))}"
    if isinstance(error, ValidationError):
        text += error.json(include_input=False)
    source = [line for line in text.splitlines() if "lambda" not in line]
    assert found_in("\n".join(source)) == []


@pytest.fixture
def everything_logged() -> Iterator[Callable[[], str]]:
    """Log all that conduit and asyncio have to say, with what hangs on each record."""
    lines = io.StringIO()

    class Everything(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.write(f"{self.format(record)} {record.__dict__}\n")
            if record.exc_info and record.exc_info[1] is not None:
                lines.write(told(record.exc_info[1]))

    handler = Everything()
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield lines.getvalue
    finally:
        root.removeHandler(handler)
        root.setLevel(before)


@pytest.mark.parametrize("how", ["plain", "tls", "lookup"])
async def test_logins_leave_no_secret_in_logs_errors_and_what_is_held(
    everything_logged: Callable[[], str], tls: TLS, how: str
) -> None:
    asyncio.get_running_loop().set_debug(True)
    server = Server(
        host="127.0.0.1",
        port=0,
        users=look_up if how == "lookup" else VERIFIERS,
        mock_secret=MOCK_SECRET,
        tls=tls if how == "tls" else None,
    )
    server.rpc("secret", requires="nobody")(lambda: None)

    def client(password: str, **fields: Any) -> Client:
        return Client(
            f"{'tls' if how == 'tls' else 'tcp'}://127.0.0.1:{server.address[1]}",
            password=password,
            limits=Limits(min_iterations=ITERATIONS),
            tls=TLS(verify=False) if how == "tls" else None,
            reconnect_enabled=False,
            **fields,
        )

    texts: list[str] = []
    async with server:
        good = [client(PASSWORD, user="ann"), client(TOKEN)]
        for one in good:
            async with one:
                with pytest.raises(PermissionDenied) as denied:
                    await within(one.rpc.secret())
                texts += [told(denied.value), shown(one), shown(one.connection), shown(server)]
                texts += [shown(peer) for peer in server.connections.values()]
        bad = [client(WRONG, user="ann"), client(WRONG, user="eve"), client(TOKEN[:-1] + "_")]
        strict = Client(good[0].descriptor.model_copy(update={"limits": Limits()}))
        for one in (*bad, strict):
            with pytest.raises(AuthenticationError) as refused:
                await within(one.connect())
            texts += [told(refused.value), shown(one)]
        texts += [shown(server._users), shown(server._clients)]
    logged = everything_logged()
    assert "AUTH_RESPONSE" in logged and "logged in as 'cnd_ci'" in logged
    for text in (*texts, logged):
        assert found_in(text) == []


async def test_a_key_that_does_not_open_is_not_told_either(
    everything_logged: Callable[[], str], tls: TLS
) -> None:
    locked = TLS(certificate=tls.certificate, key=tls.key, key_password=WRONG)
    server = Server(host="127.0.0.1", port=0, tls=locked, password=PASSWORD)
    with pytest.raises(OSError, match="key_password does not open") as caught:
        await within(server.start())
    assert found_in(told(caught.value) + everything_logged() + shown(server)) == []
