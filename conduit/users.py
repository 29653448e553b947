"""Who may log in to a server, and the accepting side of each login."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from typing import Final, NamedTuple

from pydantic import SecretStr

from .descriptors import ServerDescriptor, User, reveal
from .protocol.cndt import CNDT
from .protocol.events import Capabilities
from .protocol.login import MOCK, ServerLogin
from .protocol.scram import DEFAULT_ITERATIONS, Verifier

__all__ = ["Found", "Users", "hash_password"]

DEFAULT_USER = "default"
"""The name of the only user where the descriptor has one password."""

_NOBODY: Final = Verifier(DEFAULT_ITERATIONS, bytes(16), bytes(32), bytes(32)).text()
"""A verifier that is nobody's, parsed where a user has none, so that it takes as long."""


def hash_password(password: str, *, iterations: int = DEFAULT_ITERATIONS) -> str:
    """Return the verifier of a password, for `ServerDescriptor(verifier=...)` or `users`.

    It is PostgreSQL's own form, with a fresh random salt. It stands in for the password without
    showing it; still, keep it secret. Takes a tenth of a second of CPU at 600,000 iterations.

    Args:
        password: Text of 1 to 1024 bytes.
        iterations: Rounds of PBKDF2. Clients refuse fewer than 100,000 by default.

    Raises:
        ValueError: The password is empty, too long or has characters that cannot be typed.
    """
    return Verifier.from_password(
        password, salt=secrets.token_bytes(16), iterations=iterations
    ).text()


class Found(NamedTuple):
    """What is known of a user; of one who does not exist there is no verifier."""

    verifier: Verifier | None
    roles: frozenset[str] = frozenset()


class Users:
    """The users that a descriptor names.

    Args:
        descriptor: Has a password, a verifier, users, or none of them.
    """

    def __init__(self, descriptor: ServerDescriptor) -> None:
        self._descriptor = descriptor
        self._verifier: Verifier | None = None
        # Makes the salts of users who do not exist, so that they cannot be told from others.
        self._mock_secret = secrets.token_bytes(32)
        self._sample: Verifier | None = None
        if isinstance(descriptor.users, Mapping):
            self._sample = next((_found(one).verifier for one in descriptor.users.values()), None)
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
                salt=secrets.token_bytes(16),
            )

    def start_login(
        self, protocol: CNDT, capabilities: Capabilities, binding: bytes | None
    ) -> None:
        """Start the accepting side of a login.

        Args:
            protocol: The peer of the new connection.
            capabilities: What this side accepts.
            binding: The hash of the server's certificate, when the link has one.
        """
        sample = self._verifier or self._sample
        protocol.accept(
            ServerLogin(
                protocol.send_login,
                capabilities=capabilities,
                nonce=secrets.token_urlsafe(18),
                mock_secret=self._mock_secret,
                mock=(sample.iterations, len(sample.salt)) if sample else MOCK,
                binding=binding,
                anonymous=self.anybody,
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
        found = _found(await users(user))
        if found.verifier is not None:
            self._sample = found.verifier
        return found


def _found(given: User | SecretStr | str | None) -> Found:
    """Return what is known of a user, or of none; it takes as long for one who does not exist."""
    text, roles = (given.verifier, given.roles) if isinstance(given, User) else (given, ())
    if isinstance(text, SecretStr):
        text = text.get_secret_value()
    verifier = Verifier.parse(_NOBODY if text is None else text)
    return Found(None if text is None else verifier, frozenset(roles))
