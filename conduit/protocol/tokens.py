"""The form of a token: `cnd_<id>_<secret>`, a password that says whose it is.

To SCRAM it is a password like any other, of the user `cnd_<id>`. Its secret has 256 random bits,
which nobody finds by trying. So it is stretched with few iterations, and a client that recognises
a token may let a server ask for no more than that. The secret has a fixed length: an id may have
any of its characters.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["ITERATIONS", "PREFIX", "make_token", "user_of"]

PREFIX: Final = "cnd_"
"""What the names of the users of tokens begin with."""
ITERATIONS: Final = 4096
"""Rounds of PBKDF2 for a token; the fewest that RFC 7677 allows."""
ID_LENGTH: Final = 64

_ID: Final = re.compile(rf"[A-Za-z0-9._-]{{1,{ID_LENGTH}}}")
_TOKEN: Final = re.compile(rf"({PREFIX}{_ID.pattern})_[A-Za-z0-9_-]{{43}}")


def make_token(id: str, secret: str) -> str:
    """Return the token of an id and 43 characters of base64url.

    Raises:
        ValueError: The id has other characters, or too many.
    """
    if not _ID.fullmatch(id):
        raise ValueError(
            f"the id of a token has 1 to {ID_LENGTH} letters, digits, '.', '_' and '-', "
            f"not {id!r:.80}"
        )
    return f"{PREFIX}{id}_{secret}"


def user_of(password: str) -> str | None:
    """Return the user whose token this is; None for a password that is no token."""
    match = _TOKEN.fullmatch(password)
    return None if match is None else match[1]
