"""A time limit that loses no cancellation.

Up to Python 3.11 a task that is cancelled inside `asyncio.wait_for` goes on as if it had not been,
when what it waits for ends at the same moment. A client would go on connecting after `disconnect`.
"""

from __future__ import annotations

import sys

if sys.version_info >= (3, 11):
    from asyncio import timeout
else:
    from async_timeout import timeout

__all__ = ["timeout"]
