"""Who may log in to a server, and the accepting side of each login."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Awaitable, Mapping
from typing import Final, NamedTuple

from pydantic import SecretBytes, SecretStr

from .descriptors import ServerDescriptor, User, reveal
from .protocol import tokens
from .protocol.cndt import CNDT
from .protocol.events import Capabilities
from .protocol.login import MOCK, ServerLogin
from .protocol.scram import DEFAULT_ITERATIONS, SALT_BYTES, Verifier

__all__ = ["Found", "Users", "hash_password", "new_token"]

DEFAULT_USER = "default"
"""The name of the only user where the descriptor has one password."""

_NOBODY: Final = User(
    verifier=Verifier(DEFAULT_ITERATIONS, bytes(SALT_BYTES), bytes(32), bytes(32)).text()
)
"""A user that nobody is, looked at where there is none, so that it takes as long."""


def hash_password(password: str, *, iterations: int | None = None) -> str:
    """Return the verifier of a password or a token, for the descriptor of a server.

    It is PostgreSQL's own form, with a fresh random salt. It stands in for the password without
    showing it; still, keep it secret. A password takes a tenth of a second of CPU.

    Args:
        password: Text of 1 to 1024 bytes.
        iterations: Rounds of PBKDF2; by default 600,000, and 4096 for a token. Clients refuse
            fewer than 100,000 for a password unless they are told otherwise.

    Raises:
        ValueError: The password is empty, too long or has characters that cannot be typed.
    """
    if iterations is None:
        iterations = DEFAULT_ITERATIONS if tokens.user_of(password) is None else tokens.ITERATIONS
    salt = secrets.token_bytes(SALT_BYTES)
    return Verifier.from_password(password, salt=salt, iterations=iterations).text()


def new_token(id: str) -> str:
    """Return a new token, `cnd_<id>_<secret>`: the password of the user `cnd_<id>`.

    The client gives it as its password, and needs no user. The server keeps what `hash_password`
    makes of it. The secret has 256 random bits.

    Args:
        id: What the token is known by: 1 to 64 letters, digits, `.`, `_` and `-`.

    Raises:
        ValueError: The id has other characters, or too many.
    """
    return tokens.make_token(id, secrets.token_urlsafe(32))


class Found(NamedTuple):
    """What is known of a user; of one who does not exist there is neither of the two proofs."""

    verifier: Verifier | None
    roles: frozenset[str] = frozenset()
    certificate: bool = False


class Users:
    """The users that a descriptor names.

    Args:
        descriptor: Has a password, a verifier, users, or none of them.
    """

    def __init__(self, descriptor: ServerDescriptor) -> None:
        self._descriptor = descriptor
        self._verifier: Verifier | None = None
        # Makes the salts of users who do not exist, so that they cannot be told from others.
        secret = secrets.token_bytes(32)
        if descriptor.mock_secret is not None:
            secret = hashlib.sha256(reveal(descriptor.mock_secret).encode()).digest()
        self._mock_secret = SecretBytes(secret)
        self._sample: Verifier | None = None
        if isinstance(descriptor.users, Mapping):
            for name in descriptor.users:
                self._learn(name, self.find(name).verifier)
        if descriptor.verifier is not None:
            self._verifier = Verifier.parse(reveal(descriptor.verifier))

    @property
    def roles(self) -> set[frozenset[str]]:
        """The roles that users have together, as far as the descriptor names the users."""
        users = self._descriptor.users
        known = users.values() if isinstance(users, Mapping) else ()
        return {frozenset(), *(one.roles for one in map(_found, known))}

    @property
    def anybody(self) -> bool:
        """Whether there are no users, so that everybody is let in."""
        descriptor = self._descriptor
        return descriptor.password is None and self._verifier is None and descriptor.users is None

    async def prepare(self) -> None:
        """Derive the verifier of a plain password; a tenth of a second of CPU, in a thread."""
        password = self._descriptor.password
        if password is not None and self._verifier is None:
            self._verifier = await asyncio.to_thread(
                Verifier.from_password,
                reveal(password),
                salt=secrets.token_bytes(SALT_BYTES),
            )

    def start_login(
        self,
        protocol: CNDT,
        capabilities: Capabilities,
        binding: bytes | None,
        names: frozenset[str] = frozenset(),
    ) -> None:
        """Start the accepting side of a login.

        Args:
            protocol: The peer of the new connection.
            capabilities: What this side accepts.
            binding: The hash of the server's certificate, when the link has one.
            names: What the verified certificate of the client calls it.
        """
        sample = self._verifier or self._sample
        protocol.accept(
            ServerLogin(
                protocol.send_login,
                capabilities=capabilities,
                nonce=secrets.token_urlsafe(18),
                mock_secret=self._mock_secret.get_secret_value(),
                mock=(sample.iterations, len(sample.salt)) if sample else MOCK,
                binding=binding,
                anonymous=self.anybody,
                names=names if self._descriptor.users is not None else frozenset(),
                compress=self._descriptor.enable_compression,
            )
        )

    @property
    def known_at_once(self) -> bool:
        """Whether a user can be looked up without waiting."""
        users = self._descriptor.users
        return users is None or isinstance(users, Mapping)

    def find(self, user: str) -> Found:
        """Look up a user who is known at once."""
        users = self._descriptor.users
        if isinstance(users, Mapping):
            return _found(users.get(user))
        return Found(self._verifier if user == DEFAULT_USER else None)

    async def look_up(self, user: str) -> Found:
        """Ask the application's function for a user.

        Raises:
            Exception: What the function raises, or ValueError for text that is no verifier.
        """
        users = self._descriptor.users
        assert users is not None
        assert not isinstance(users, Mapping)
        asked = users(user)
        if not isinstance(asked, Awaitable):
            raise TypeError(f"users= must be an async function; it returned {type(asked).__name__}")
        found = _found(await asked)
        self._learn(user, found.verifier)
        return found

    def _learn(self, user: str, verifier: Verifier | None) -> None:
        """Have users who do not exist look like the real one with the most iterations.

        Not like the last one that was found: what an unknown user is asked for must not change with
        who else logs in.
        """
        if verifier is None or user.startswith(tokens.PREFIX):
            return
        if self._sample is None or verifier.iterations > self._sample.iterations:
            self._sample = verifier


def _found(given: User | SecretStr | str | None) -> Found:
    """Return what is known of a user, or of none; it takes as long for one who does not exist."""
    user = _NOBODY if given is None else given
    if not isinstance(user, User):
        text = user.get_secret_value() if isinstance(user, SecretStr) else user
        return Found(Verifier.parse(text))
    hidden = _NOBODY.verifier if user.verifier is None else user.verifier
    verifier = Verifier.parse(reveal(hidden))
    real = user is not _NOBODY and user.verifier is not None
    return Found(verifier if real else None, frozenset(user.roles), user.certificate)
