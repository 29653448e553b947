"""conduit: calls and messages both ways over one connection, in binary frames over asyncio."""

from __future__ import annotations

from . import blocking, from_thread
from .client import Client, Status
from .descriptors import TLS, ClientDescriptor, Limits, ServerDescriptor, User
from .exceptions import (
    AuthenticationError,
    CallCancelled,
    ConduitError,
    ConnectionClosed,
    ConnectionLost,
    IdempotencyMismatch,
    InterfaceMismatch,
    InternalError,
    InvalidParams,
    MethodNotFound,
    Overloaded,
    PayloadTooLarge,
    PermissionDenied,
    ProtocolError,
    RPCError,
    RPCTimeout,
    Unavailable,
)
from .idempotency import IdempotencyStore, MemoryStore
from .rpc.bind import options
from .rpc.caller import data
from .rpc.context import Context
from .rpc.contract import idempotent
from .rpc.retry import Retry
from .server import Server
from .transport.answers import Response
from .transport.connection import Connection
from .transport.handling import no_deadline
from .transport.stream_call import StreamCall
from .transport.streaming import Stream
from .users import hash_password, new_token

__version__ = "0.1.0"

__all__ = [
    "AuthenticationError",
    "CallCancelled",
    "Client",
    "ClientDescriptor",
    "ConduitError",
    "Connection",
    "ConnectionClosed",
    "ConnectionLost",
    "Context",
    "IdempotencyMismatch",
    "IdempotencyStore",
    "InterfaceMismatch",
    "InternalError",
    "InvalidParams",
    "Limits",
    "MemoryStore",
    "MethodNotFound",
    "Overloaded",
    "PayloadTooLarge",
    "PermissionDenied",
    "ProtocolError",
    "RPCError",
    "RPCTimeout",
    "Response",
    "Retry",
    "Server",
    "ServerDescriptor",
    "Status",
    "Stream",
    "StreamCall",
    "TLS",
    "Unavailable",
    "User",
    "blocking",
    "data",
    "from_thread",
    "hash_password",
    "idempotent",
    "new_token",
    "no_deadline",
    "options",
]
