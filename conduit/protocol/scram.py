"""SCRAM-SHA-256 for both sides of a login, without I/O, clock or randomness.

SCRAM (RFC 5802, with SHA-256 as in RFC 7677) lets two peers prove to each other that they know a
password which never crosses the wire. The exchange has four messages:

1. client-first names the user, carries a fresh nonce and says in its "GS2 header" whether the
   login is bound to the TLS channel (`p=`), could have been (`y`) or cannot be (`n`).
2. server-first extends that nonce with one of its own and tells salt and iteration count.
3. client-final stretches the password with PBKDF2 (RFC 8018) into two keys, ClientKey and
   ServerKey, and sends `ClientKey XOR HMAC(StoredKey, AuthMessage)`. StoredKey is the SHA-256 of
   ClientKey; AuthMessage is the three messages so far, so both nonces are under the proof and a
   recorded login cannot be replayed.
4. server-final carries `HMAC(ServerKey, AuthMessage)`: only a server that holds the verifier of
   this password can make it.

The server keeps a `Verifier` and never runs PBKDF2 for a login: `derive_keys` is the only costly
function, and the client pays. AuthMessage is built from the text as received, never from a parsed
form of it.

Within the grammar of RFC 5802 there are three additions. The extension `d` in server-first puts
what was negotiated outside SCRAM under both signatures (`transcript_digest`). The client has a
floor and a ceiling for iterations: a false server that asks for few would get a proof that is cheap
to attack. A user who does not exist gets a stable mock verifier, and fails where, when and how a
wrong password, or a wrong token, does. Channel binding is `tls-server-end-point` (RFC 5929).

A message from the peer is accepted or raises `AuthenticationError`; a step that failed ends its
exchange. `ValueError` and `RuntimeError` are mistakes of the calling code.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import unicodedata
from binascii import a2b_base64, b2a_base64
from dataclasses import dataclass, field
from typing import ClassVar, Final

from ..exceptions import AuthenticationError
from . import tokens

__all__ = [
    "DEFAULT_ITERATIONS",
    "MECHANISM",
    "MECHANISM_PLUS",
    "REFUSED",
    "SALT_BYTES",
    "ClientScram",
    "Keys",
    "ServerScram",
    "Verifier",
    "derive_keys",
    "normalise",
    "transcript_digest",
]

MECHANISM: Final = "SCRAM-SHA-256"
MECHANISM_PLUS: Final = "SCRAM-SHA-256-PLUS"
DEFAULT_ITERATIONS: Final = 600_000
SALT_BYTES: Final = 16

_BOUND = "p=tls-server-end-point"  # the flag at the start of the GS2 header
_DIGEST_SIZE = 32
_MIN_NONCE = 18  # characters that each side adds: at least 108 bits when they are base64
_MIN_SALT, _MAX_SALT = 12, 64
_MAX_PASSWORD, _MAX_USER = 1024, 128  # bytes

# One text for every way in which credentials fail, so that it cannot be told which one it was.
REFUSED: Final = "wrong user name or password"

# RFC 5802 section 7. A value has no comma (the text is split there), no NUL and is valid UTF-8:
# without lone surrogates everything that was matched can be encoded.
_ATTRIBUTE = re.compile("([A-Za-z])=([^\0,\ud800-\udfff]+)")
_NONCE = re.compile("[!-+\\--~]{18,256}")
_COUNT = re.compile("[1-9][0-9]{0,9}")
_USER = re.compile("(?:[^=,\0]|=2C|=3D)+")
_VERIFIER = re.compile(r"SCRAM-SHA-256\$([1-9][0-9]{0,9}):([^$:]*)\$([^$:]*):([^$:]*)")


@dataclass(frozen=True, slots=True)
class Keys:
    """Hold what a client needs of a password for one salt and iteration count."""

    client_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)


def normalise(password: str) -> bytes:
    """Return the bytes of `password` that are stretched (OpaqueString, RFC 8265 section 4.2).

    Non-ASCII spaces become U+0020, then the text is put into Unicode form NFC. Code points that
    Unicode has not assigned are accepted: what counts as assigned depends on the Python version,
    and the same password has to work from each of them.

    Raises:
        ValueError: The password is empty, longer than 1024 bytes in UTF-8, or holds a control
            character or a lone surrogate. The text never quotes the password.
    """
    if _is_plain(password):
        prepared = password.encode()
    else:
        mapped: list[str] = []
        for character in password:
            category = unicodedata.category(character)
            if category in ("Cc", "Cs"):
                kind = "a control character" if category == "Cc" else "a lone surrogate"
                raise ValueError(f"password holds {kind}")
            mapped.append(" " if category == "Zs" else character)
        prepared = unicodedata.normalize("NFC", "".join(mapped)).encode()
    if not prepared:
        raise ValueError("password is empty")
    if len(prepared) > _MAX_PASSWORD:
        raise ValueError(f"password has {len(prepared)} bytes, the limit is {_MAX_PASSWORD}")
    return prepared


def derive_keys(password: str, salt: bytes, iterations: int) -> Keys:
    """Stretch `password` with PBKDF2-HMAC-SHA256 into the keys of a client.

    It takes about 0.1 s for 600,000 iterations and releases the GIL meanwhile: use a thread.

    Raises:
        ValueError: `normalise` refuses the password, or `iterations` is below 1.
    """
    salted = hashlib.pbkdf2_hmac("sha256", normalise(password), salt, iterations)
    return Keys(_mac(salted, b"Client Key"), _mac(salted, b"Server Key"))


@dataclass(frozen=True, slots=True)
class Verifier:
    """Hold what a server keeps of a password. It logs nobody in, but treat it as a secret.

    Who has it can try passwords against it offline, and together with one overheard login it is
    enough to log in as the user (RFC 5802 section 9).

    Raises:
        ValueError: A field has a size that no login could use.
    """

    iterations: int
    salt: bytes
    stored_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.iterations < 2**31:
            raise ValueError(f"verifier has {self.iterations} iterations, not 1 to 2147483647")
        if not _MIN_SALT <= len(self.salt) <= _MAX_SALT:
            raise ValueError(
                f"salt of the verifier has {len(self.salt)} bytes, not {_MIN_SALT} to {_MAX_SALT}"
            )
        for name, key in (("StoredKey", self.stored_key), ("ServerKey", self.server_key)):
            if len(key) != _DIGEST_SIZE:
                raise ValueError(f"{name} of the verifier has {len(key)} bytes, not {_DIGEST_SIZE}")

    @classmethod
    def parse(cls, text: str) -> Verifier:
        """Read the form that PostgreSQL stores: `SCRAM-SHA-256$i:salt$StoredKey:ServerKey`.

        Raises:
            ValueError: The text has another form; the error does not quote it.
        """
        match = _VERIFIER.fullmatch(text)
        if match is None:
            raise ValueError(
                "verifier does not have the form SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey;"
                " hash_password(...) makes one of a password"
            )
        salt, stored_key, server_key = map(_from_base64, match.groups()[1:])
        if salt is None or stored_key is None or server_key is None:
            raise ValueError("salt, StoredKey or ServerKey of the verifier is not canonical base64")
        return cls(int(match[1]), salt, stored_key, server_key)

    @classmethod
    def from_password(
        cls, password: str, *, salt: bytes, iterations: int = DEFAULT_ITERATIONS
    ) -> Verifier:
        """Make the verifier of `password`; as costly as `derive_keys`.

        Args:
            salt: 12 to 64 random bytes, 16 are usual. Never derive it from the password.

        Raises:
            ValueError: The password, the salt or the iteration count is not usable.
        """
        keys = derive_keys(password, salt, iterations)
        return cls(iterations, salt, _sha256(keys.client_key), keys.server_key)

    def text(self) -> str:
        """Return the form that `parse` reads. Not `str()`: nobody prints this by accident."""
        return (
            f"{MECHANISM}${self.iterations}:{_base64(self.salt)}"
            f"${_base64(self.stored_key)}:{_base64(self.server_key)}"
        )


def transcript_digest(version: int, request: bytes, caps: bytes) -> str:
    """Return the value of the extension `d`: a hash of what was negotiated outside SCRAM.

    Args:
        version: The version byte of the frame header.
        request: The payload of AUTH_REQUEST as it was sent or received.
        caps: The packed capabilities of the server.
    """
    digest = hashlib.sha256(b"CNDT-AUTH-v1")
    digest.update(version.to_bytes(1, "big") + len(request).to_bytes(4, "big"))
    digest.update(request)
    digest.update(caps)
    return _base64(digest.digest())


class _Exchange:
    """Keep the steps in order, and read messages strictly."""

    _code: ClassVar[str]  # of the error for a message that breaks the rules

    def __init__(self, first_step: str) -> None:
        self._next = first_step

    def _enter(self, step: str) -> None:
        if step != self._next:
            raise RuntimeError(f"scram step {step!r} is out of turn, expected {self._next!r}")
        self._next = "none"  # each step names the next one when it has succeeded

    def _error(self, message: str) -> AuthenticationError:
        return AuthenticationError(message, code=self._code)

    def _attributes(self, text: str, head: str, tail: str = "") -> dict[str, str]:
        """Split `text` into attributes named `head`, unknown extensions, then `tail`."""
        found: dict[str, str] = {}
        for part in text.split(","):
            match = _ATTRIBUTE.fullmatch(part)
            if match is None or match[1] in found:
                raise self._error("malformed scram message")
            found[match[1]] = match[2]
        if "m" in found:  # RFC 5802 section 5.1: a mandatory extension that we do not know
            raise self._error("scram message demands an extension that is not supported")
        names = "".join(found)
        if not names.startswith(head) or not names[len(head) :].endswith(tail):
            raise self._error(f"malformed scram message: its attributes are {names!r}")
        return found

    def _bytes(self, value: str) -> bytes:
        decoded = _from_base64(value)
        if decoded is None:
            raise self._error("malformed scram message: not canonical base64")
        return decoded


class ClientScram(_Exchange):
    """Log in: `first`, `challenge`, `final`, `verify`, each once and in this order.

    Between `challenge` and `final` the caller derives the `Keys` for `salt` and `iterations`, or
    takes them from a cache. Nothing that the server says may be believed before `verify` returns.

    Args:
        user: 1 to 128 bytes of UTF-8 after NFC, no control characters.
        nonce: 18 to 256 random printable ASCII characters without a comma.
        binding: The `tls-server-end-point` of the server's certificate, to bind the login to it.
        can_bind: Whether this side could have bound the login, had the server offered it. The
            server refuses the login if it did offer: somebody in between took the offer away.
        min_iterations: Refuse a server that asks for fewer.
        max_iterations: Refuse a server that asks for more.

    Raises:
        AuthenticationError: The user name is not usable (code `bad_request`).
        ValueError: The nonce is not usable.
    """

    _code = "untrusted_server"
    salt: bytes
    iterations: int
    _server_first: str
    _signature: bytes

    def __init__(
        self,
        user: str,
        nonce: str,
        *,
        binding: bytes | None = None,
        can_bind: bool = False,
        min_iterations: int = 100_000,
        max_iterations: int = 2_000_000,
    ) -> None:
        super().__init__("first")
        prepared = _prepare_user(user)
        if prepared is None:
            # The name is a setting of this side: say what it must be, and do not blame the peer.
            raise AuthenticationError(
                f"user name {_shown(user)} does not have 1 to {_MAX_USER} bytes without"
                " control characters",
                code="bad_request",
            )
        self._nonce = _checked_nonce(nonce)
        self._limits = (max(1, min_iterations), max_iterations)
        flag = _BOUND if binding is not None else "y" if can_bind else "n"
        self._gs2 = f"{flag},,"
        self._bound = self._gs2.encode() + (binding or b"")
        self._bare = f"n={prepared.replace('=', '=3D').replace(',', '=2C')},r={nonce}"

    @property
    def mechanism(self) -> str:
        """Name the SASL mechanism: the PLUS one exactly when the login is bound."""
        return MECHANISM_PLUS if self._gs2.startswith(_BOUND) else MECHANISM

    def first(self) -> str:
        """Return client-first."""
        self._enter("first")
        self._next = "challenge"
        return self._gs2 + self._bare

    def challenge(self, text: str, digest: str | None) -> None:
        """Accept server-first; afterwards `salt` and `iterations` are set.

        Args:
            text: The message as received.
            digest: The `transcript_digest` of this side; None accepts a server without one.

        Raises:
            AuthenticationError: The message is malformed, asks for something outside the limits,
                or what the server saw at login is not what this side sent.
        """
        self._enter("challenge")
        self._raise_server_error(text)
        found = self._attributes(text, "rsi")
        nonce = found["r"]
        extended = nonce.startswith(self._nonce) and _NONCE.fullmatch(nonce)
        if not extended or len(nonce) < len(self._nonce) + _MIN_NONCE:
            raise self._error("nonce of the server does not extend the one that it was sent")
        if digest is not None and not _equal(found.get("d", ""), digest):
            raise self._error(
                "downgrade detected: the login request or the answer was changed on the way"
            )
        iterations = int(found["i"]) if _COUNT.fullmatch(found["i"]) else 0
        low, high = self._limits
        if not low <= iterations <= high:
            raise self._error(
                f"server asks for {_shown(found['i'])} iterations, the limits are"
                f" min_iterations={low} and max_iterations={high}; its verifier should have"
                " others, or the client other Limits(...)"
            )
        salt = self._bytes(found["s"])
        if not _MIN_SALT <= len(salt) <= _MAX_SALT:
            raise self._error(
                f"salt of the server has {len(salt)} bytes, not {_MIN_SALT} to {_MAX_SALT}"
            )
        self.salt, self.iterations = salt, iterations
        self._nonce, self._server_first = nonce, text
        self._next = "final"

    def final(self, keys: Keys) -> str:
        """Return client-final, which proves that this side holds `keys`."""
        self._enter("final")
        unproved = f"c={_base64(self._bound)},r={self._nonce}"
        message = f"{self._bare},{self._server_first},{unproved}".encode()
        proof = _xor(keys.client_key, _mac(_sha256(keys.client_key), message))
        self._signature = _mac(keys.server_key, message)
        self._next = "verify"
        return f"{unproved},p={_base64(proof)}"

    def verify(self, text: str) -> None:
        """Accept server-final: return when the server has proved that it knows the password.

        Raises:
            AuthenticationError: It did not, or it answered with an error.
        """
        self._enter("verify")
        self._raise_server_error(text)
        signature = self._bytes(self._attributes(text, "v")["v"])
        if not hmac.compare_digest(signature, self._signature):
            raise self._error("server did not prove that it knows the password")

    def _raise_server_error(self, text: str) -> None:
        if text.startswith("e="):
            message = f"server refused the login: {_shown(text[2:])}"
            raise AuthenticationError(message, code="refused")


class ServerScram(_Exchange):
    """Let a client log in: `start`, `challenge`, `final`, each once and in this order.

    Between `start` and `challenge` the caller looks up the `Verifier` of the user.

    Args:
        nonce: 18 to 256 random printable ASCII characters without a comma.
        binding: The `tls-server-end-point` of the own certificate, if channel binding is offered.
        mock_secret: At least 16 random bytes that stay the same, so that a user who does not
            exist has the same salt in every login.
        mock_iterations: What users who do not exist are asked for; the count that the verifiers
            of real users have. Those whose name is that of a token are asked for a token's.

    Raises:
        ValueError: The nonce or the mock secret is not usable.
    """

    _code = "bad_request"
    _bare: str
    _user: str
    _bound: bytes
    _verifier: Verifier
    _doomed: bool
    _server_first: str

    def __init__(
        self,
        nonce: str,
        *,
        binding: bytes | None = None,
        mock_secret: bytes,
        mock_iterations: int = DEFAULT_ITERATIONS,
        mock_salt_bytes: int = SALT_BYTES,
    ) -> None:
        super().__init__("start")
        if len(mock_secret) < 16:
            raise ValueError(f"mock secret has {len(mock_secret)} bytes, fewer than 16")
        self._nonce = _checked_nonce(nonce)
        self._binding = binding
        self._mock_secret = mock_secret
        self._mock_iterations = mock_iterations
        self._mock_salt_bytes = mock_salt_bytes

    def start(self, mechanism: str, text: str) -> str:
        """Accept client-first and return the user name in NFC.

        Raises:
            AuthenticationError: `unsupported_mechanism`, or `bad_request` for a message that
                is malformed or whose channel binding contradicts the mechanism or this server.
        """
        self._enter("start")
        if mechanism != MECHANISM and (mechanism != MECHANISM_PLUS or self._binding is None):
            raise AuthenticationError(
                f"mechanism {_shown(mechanism)} is not supported", code="unsupported_mechanism"
            )
        flag, _, rest = text.partition(",")
        authzid, _, bare = rest.partition(",")
        if flag == "y" and self._binding is not None:
            # RFC 5802 section 6: the client was told that this server cannot bind, which is false.
            raise AuthenticationError(
                "downgrade detected: this server does support channel binding",
                code="invalid_credentials",
            )
        bound = mechanism == MECHANISM_PLUS
        if flag not in ((_BOUND,) if bound else ("n", "y")):
            raise self._error(f"gs2 flag {_shown(flag)} does not fit the mechanism {mechanism}")
        if authzid:
            raise self._error(f"acting as another user, {_shown(authzid)}, is not supported")
        found = self._attributes(bare, "nr")
        if not _NONCE.fullmatch(found["r"]) or not _USER.fullmatch(found["n"]):
            raise self._error("malformed scram message: nonce or user name")
        # "=2C" first: what "=3D" leaves behind must not be read as an escape again.
        user = _prepare_user(found["n"].replace("=2C", ",").replace("=3D", "="))
        if user is None:
            raise self._error(
                f"user name does not have 1 to {_MAX_USER} bytes without control characters"
            )
        self._bare, self._user = bare, user
        self._bound = f"{flag},,".encode() + (self._binding or b"" if bound else b"")
        self._nonce = found["r"] + self._nonce
        self._next = "challenge"
        return user

    def challenge(self, verifier: Verifier | None, digest: str | None) -> str:
        """Return server-first for a user with this `verifier`; None if there is no such user.

        Args:
            digest: The `transcript_digest` of this side; None leaves the extension `d` out.
        """
        self._enter("challenge")
        mock = self._mock_verifier()  # made for every user, so that the time says nothing
        self._doomed = verifier is None
        self._verifier = mock if verifier is None else verifier
        salt, iterations = self._verifier.salt, self._verifier.iterations
        self._server_first = f"r={self._nonce},s={_base64(salt)},i={iterations}"
        if digest is not None:
            self._server_first += f",d={digest}"
        self._next = "final"
        return self._server_first

    def final(self, text: str) -> str:
        """Accept client-final and return server-final: the client has proved who it is.

        Raises:
            AuthenticationError: `invalid_credentials` with one text for all of unknown user,
                wrong password, wrong nonce and wrong channel binding; `bad_request` for a
                malformed message.
        """
        self._enter("final")
        found = self._attributes(text, "cr", "p")
        bound, proof = self._bytes(found["c"]), self._bytes(found["p"])
        if len(proof) != _DIGEST_SIZE:
            raise self._error(f"malformed scram message: a proof of {len(proof)} bytes")
        unproved = text[: -len(",p=" + found["p"])]
        message = f"{self._bare},{self._server_first},{unproved}".encode()
        client_key = _xor(proof, _mac(self._verifier.stored_key, message))
        # No early way out: each check is made for every login.
        checks = (
            hmac.compare_digest(_sha256(client_key), self._verifier.stored_key),
            hmac.compare_digest(bound, self._bound),
            _equal(found["r"], self._nonce),
            not self._doomed,
        )
        if not all(checks):
            raise AuthenticationError(REFUSED, code="invalid_credentials")
        return f"v={_base64(_mac(self._verifier.server_key, message))}"

    def _mock_verifier(self) -> Verifier:
        salt = _mac(self._mock_secret, f"salt:{self._user}".encode())
        iterations, salt_bytes = self._mock_iterations, self._mock_salt_bytes
        if self._user.startswith(tokens.PREFIX):
            iterations, salt_bytes = tokens.ITERATIONS, SALT_BYTES
        key = _sha256(salt)  # no proof fits it, and none would help: the login is doomed
        return Verifier(iterations, salt[:salt_bytes], key, key)


def _prepare_user(user: str) -> str | None:
    """Return the user name in NFC, or None if it is not usable."""
    if _is_plain(user):
        return user if 1 <= len(user) <= _MAX_USER else None
    # Sorting combining marks takes quadratic time, so look at the length first: NFC joins at most
    # four code points into one, and a usable name has at most _MAX_USER of those.
    if len(user) > 4 * _MAX_USER or any(unicodedata.category(c) in ("Cc", "Cs") for c in user):
        return None
    prepared = unicodedata.normalize("NFC", user)
    return prepared if 1 <= len(prepared.encode()) <= _MAX_USER else None


def _is_plain(text: str) -> bool:
    """Whether text is ASCII without control characters, which is the same in every Unicode form."""
    return text.isascii() and text.isprintable()


def _checked_nonce(nonce: str) -> str:
    if not _NONCE.fullmatch(nonce):
        raise ValueError("nonce does not have 18 to 256 printable ASCII characters without comma")
    return nonce


def _from_base64(text: str) -> bytes | None:
    """Decode base64 of the one form that encoding produces; None for any other text."""
    try:
        decoded = a2b_base64(text)
    except ValueError:
        return None
    # It passes over what is no base64, and unused bits of the last character could be anything, so
    # compare with the way back.
    return decoded if _base64(decoded) == text else None


def _base64(data: bytes) -> str:
    return b2a_base64(data, newline=False).decode("ascii")


def _equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())


def _mac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _xor(one: bytes, other: bytes) -> bytes:
    mixed = int.from_bytes(one, "big") ^ int.from_bytes(other, "big")
    return mixed.to_bytes(_DIGEST_SIZE, "big")


def _shown(text: str) -> str:
    """Quote text of the peer for an error: ASCII only and short."""
    return ascii(text[:40])
