"""Roles: what a user has, and what a handler requires of whoever calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from .exceptions import PermissionDenied

__all__ = ["Guard", "Roles", "guard", "guarded", "role_names"]

Roles = str | Iterable[str]
"""One role, or several."""


class _HasRoles(Protocol):
    @property
    def roles(self) -> frozenset[str]: ...


Guard = Callable[[_HasRoles], None]
"""Raises PermissionDenied for a connection that lacks a role."""


def role_names(roles: Roles) -> frozenset[str]:
    """Return the names of one role or of several.

    Raises:
        ValueError: One of them is no name.
    """
    names = frozenset([roles] if isinstance(roles, str) else roles)
    for name in names:
        if not isinstance(name, str) or not name or not name.isprintable():
            raise ValueError(f"a role is named by printable text, not by {name!r:.80}")
    return names


def guard(name: str, requires: frozenset[str]) -> Guard | None:
    """Return what checks the roles of a caller, or None where there is nothing to check.

    Args:
        name: The method or the message.
        requires: The roles, all of which the caller must have.
    """
    if not requires:
        return None

    def check(connection: _HasRoles) -> None:
        if not requires <= connection.roles:
            missing = sorted(requires - connection.roles)
            roles = " and ".join(map(repr, missing))
            raise PermissionDenied(
                f"{name!r} requires the role{'s' * (len(missing) > 1)} {roles}",
                details={"executed": False},
            )

    return check


def guarded(check: Guard | None, start: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return the `start` of a handler with the check before it.

    So a handler that requires nothing is not asked whether it does.
    """
    if check is None:
        return start

    def start_if_allowed(data: Any, connection: Any) -> Any:
        check(connection)
        return start(data, connection)

    return start_if_allowed
