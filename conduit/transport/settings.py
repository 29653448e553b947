"""What a side says about each of its connections."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from ..descriptors import ClientDescriptor, ServerDescriptor
from ..protocol.events import RESUME, Capabilities
from .buffers import Buffers
from .keyed import Keyed

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the descriptor of a side says about each of its connections.

    Attributes:
        capabilities: What the peer is told at login.
        timeout: Seconds that a call has by default, or None.
        running: Handlers on the event loop from which calls are refused.
        longest: Seconds that the handler of a call may run, if it has no timeout of its own.
        outbox_bytes: Unacknowledged bytes from which senders wait.
        debug: Whether the peer is shown the tracebacks of handlers that fail.
        backpressure: Whether senders wait at all, or are refused.
        heartbeat: Interval and timeout in seconds. A client takes its server's instead.
        keyed: Runs the calls with an idempotency key, which belong to no single connection.
        buffers: Bounds what waits in all connections together.
    """

    capabilities: Capabilities
    timeout: float | None
    running: int
    outbox_bytes: int
    backpressure: bool
    debug: bool
    longest: float = math.inf
    heartbeat: tuple[float, float] = (30.0, 90.0)
    keyed: Keyed = field(default_factory=Keyed)
    buffers: Buffers = field(default_factory=Buffers)

    @classmethod
    def of(cls, descriptor: ServerDescriptor | ClientDescriptor) -> Settings:
        """Return what a descriptor says."""
        limits, timeout = descriptor.limits, descriptor.rpc_timeout
        features = frozenset({"zlib"})
        if isinstance(descriptor, ClientDescriptor) and descriptor.reconnect_enabled:
            features |= {RESUME}
        settings = cls(
            capabilities=Capabilities(
                frame_max=limits.max_payload,
                features=features,
                calls=limits.max_calls,
                window=(limits.max_messages, limits.max_message_bytes),
                stream=(limits.max_stream_items, limits.max_stream_bytes),
                ttl=0 if timeout is None else max(1, round(timeout * 1000)),
            ),
            timeout=timeout,
            running=limits.max_running,
            outbox_bytes=limits.outbox_bytes,
            backpressure=descriptor.enable_backpressure,
            debug=descriptor.debug,
        )
        if isinstance(descriptor, ServerDescriptor):
            heartbeat = (descriptor.heartbeat_interval, descriptor.heartbeat_timeout)
            keyed = Keyed(descriptor.idempotency, descriptor.idempotency_ttl)
            longest = math.inf if limits.max_timeout is None else limits.max_timeout
            return replace(
                settings,
                longest=longest,
                heartbeat=heartbeat,
                keyed=keyed,
                buffers=Buffers(limits.max_buffered),
            )
        return settings
