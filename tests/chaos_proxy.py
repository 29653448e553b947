"""A proxy that does to a link what networks do, and worse.

    async with ChaosProxy(*server.address, seed=7) as proxy:
        client = new_client(("127.0.0.1", proxy.port))
        proxy.down.latency, proxy.down.jitter = 0.02, 0.01
        ...
        proxy.cut()

It moves bytes from TCP to TCP within the process of the test and knows nothing of what they mean,
so it does the same to TLS. What it does can be changed while connections run, for each direction:
`up` is from whoever connects to the target, `down` the other one. One `random.Random` decides what
is left to chance: with the same seed and the same bytes in the same pieces the same is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket

from tests.acceptance.raw import reset

READ = 64 * 1024
QUEUED = 64
"""Chunks on their way in one direction of a connection; then the sender has to wait."""
TICK = 0.005
"""Seconds for which a rate lets bytes pass at once."""


class Direction:
    """What happens to the bytes that go one way, on every connection, now and later.

    Everything may be set at any time. What counts bytes does so from where it is set, over all
    connections; it is None again when it has happened.

    Attributes:
        latency: Seconds that each byte is under way.
        jitter: Seconds, up to which a random time is added to that. Nothing overtakes.
        rate: Bytes in a second that each connection lets pass; None for no limit.
        slice: Most bytes that are written at once; how many is random, and those who read may read
            between the pieces. None leaves the pieces as they come.
        hole: Nothing passes, nobody is told. What was sent in the meantime passes when it is over.
        corrupt: How probable it is that a byte of a piece is changed to another.
        corrupt_after: Bytes that pass before one is changed.
        cut_after: Bytes that pass before the connection that has the next one is cut.
        taken: How many bytes were taken from their senders.
        passed: How many of them have passed.
        pieces: How many pieces they were written in.
        corrupted: How many bytes were changed.
    """

    def __init__(self, chance: random.Random) -> None:
        self._random = chance
        self._open = asyncio.Event()
        self.taken = self.passed = self.pieces = self.corrupted = 0
        self.heal()

    def heal(self) -> None:
        """Be a plain cable again; what is late already stays so."""
        self.latency = self.jitter = self.corrupt = 0.0
        self.rate: float | None = None
        self.slice: int | None = None
        self.corrupt_after: int | None = None
        self.cut_after: int | None = None
        self.hole = False

    @property
    def hole(self) -> bool:
        return not self._open.is_set()

    @hole.setter
    def hole(self, closed: bool) -> None:
        if closed:
            self._open.clear()
        else:
            self._open.set()

    async def opened(self) -> None:
        """Wait while there is a hole."""
        while self.hole:
            await self._open.wait()

    def delay(self) -> float:
        """Return how long the bytes that have just come are under way, in seconds."""
        return self.latency + (self._random.uniform(0.0, self.jitter) if self.jitter else 0.0)

    def size(self) -> int:
        """Return how many bytes may be written at once."""
        most = READ
        if self.rate is not None:
            most = max(1, min(most, int(self.rate * TICK)))
        if self.slice is not None:
            most = min(most, self._random.randint(1, self.slice))
        if self.cut_after is not None:
            most = min(most, self.cut_after)
        return most

    def count(self, piece: bytes) -> bytes:
        """Count a piece that passes, and return it as it goes on."""
        if self.corrupt and self._random.random() < self.corrupt:
            piece = self._changed(piece, self._random.randrange(len(piece)))
        if self.corrupt_after is not None:
            if self.corrupt_after < len(piece):
                piece = self._changed(piece, self.corrupt_after)
                self.corrupt_after = None
            else:
                self.corrupt_after -= len(piece)
        if self.cut_after is not None:
            self.cut_after -= len(piece)
        self.passed += len(piece)
        self.pieces += 1
        return piece

    def _changed(self, piece: bytes, place: int) -> bytes:
        self.corrupted += 1
        changed = bytearray(piece)
        changed[place] ^= self._random.randrange(1, 256)
        return bytes(changed)


class _Reset(Exception):
    """The sender has reset its connection, or a byte has come that cuts it."""


async def _wait_until(due: float) -> None:
    """Wait until a time on the loop's clock, never less: timers may be early by a millisecond."""
    loop = asyncio.get_running_loop()
    while (left := due - loop.time()) > 0:  # noqa: ASYNC110  # the clock is what is waited for
        await asyncio.sleep(left)


class _Pump:
    """Moves the bytes of one connection in one direction."""

    def __init__(
        self, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.direction = direction
        self.reader = reader
        self.writer = writer
        self.ended = False
        self._free = 0.0
        # When each chunk is to arrive; b"" is the end, None a reset.
        self._chunks: asyncio.Queue[tuple[float, bytes | None]] = asyncio.Queue(QUEUED)

    def end(self) -> None:
        """Tell the receiver that nothing more will come; what comes is thrown away."""
        if not self.ended:
            self.ended = True
            # It may have been reset a moment ago; uvloop says so by a RuntimeError.
            with contextlib.suppress(OSError, RuntimeError):
                self.writer.write_eof()

    async def read(self) -> None:
        """Take everything from the sender up to the end."""
        loop = asyncio.get_running_loop()
        due = 0.0
        data: bytes | None = None
        while data != b"":
            try:
                data = await self.reader.read(READ)
            except OSError:
                data = None
            self.direction.taken += len(data or b"")
            due = max(due, loop.time() + self.direction.delay())
            await self._chunks.put((due, data))
            if data is None:
                return

    async def write(self) -> None:
        """Hand everything to the receiver when its time has come.

        Raises:
            _Reset: The connection is to be reset.
        """
        while True:
            due, data = await self._chunks.get()
            await _wait_until(due)
            await self.direction.opened()
            if data is None:
                raise _Reset
            if not data:
                self.end()
                return
            await self._pass(data)

    async def _pass(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        direction = self.direction
        start = 0
        while start < len(data):
            await direction.opened()
            if direction.cut_after == 0:
                direction.cut_after = None
                raise _Reset
            piece = direction.count(data[start : start + direction.size()])
            start += len(piece)
            if self.ended:
                continue
            try:
                self.writer.write(piece)
                await self.writer.drain()
            except (OSError, RuntimeError):  # uvloop's word for a socket that has gone
                raise _Reset from None
            if direction.rate is not None:
                self._free = max(self._free, loop.time()) + len(piece) / direction.rate
                await _wait_until(self._free)
            elif direction.slice is not None:
                await asyncio.sleep(0)  # the loop looks which sockets can be read,
                await asyncio.sleep(0)  # and they are read before the next piece


class _Joint:
    """One connection: two sockets, and what goes between them."""

    task: asyncio.Task[None]

    def __init__(self, near: asyncio.StreamWriter) -> None:
        self.writers = [near]
        self.pumps: list[_Pump] = []

    def reset(self) -> None:
        """Reset both sockets."""
        for writer in self.writers:
            reset(writer)


class ChaosProxy:
    """Passes connections on to a target, and does to them what it is told.

    Args:
        host: Where the target is.
        port: The same.
        seed: Decides all that is left to chance.

    Attributes:
        up: What happens to bytes on their way to the target.
        down: What happens to bytes that come from there.
        port: Where it listens, on 127.0.0.1.
        random: For tests that want their own chances to follow from the same seed.
        accepted: How many connections were accepted.
        cuts: How many of them were reset from here.
    """

    def __init__(self, host: str, port: int, *, seed: int = 0) -> None:
        self.target = (host, port)
        self.seed = seed
        self.random = random.Random(seed)
        self.up = Direction(self.random)
        self.down = Direction(self.random)
        self.port = 0
        self.accepted = 0
        self.cuts = 0
        self._server: asyncio.AbstractServer | None = None
        self._held: socket.socket
        self._joints: list[_Joint] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> ChaosProxy:
        # Bound and not listening, it keeps the port while nobody listens, so that nobody takes it.
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(self.address)
        self.port = self._held.getsockname()[1]
        await self.admit()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.refuse()
        self._held.close()
        for task in self._tasks:
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        for outcome in ended:
            if isinstance(outcome, Exception):
                raise outcome

    def __repr__(self) -> str:
        return f"<ChaosProxy at {self.port} to {self.target}, seed {self.seed}>"

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return ("127.0.0.1", self.port)

    @property
    def connections(self) -> int:
        """How many connections there are."""
        return len(self._joints)

    async def admit(self) -> None:
        """Listen, again at the same port."""
        if self._server is None:
            self._server = await asyncio.start_server(self._accepted, *self.address)

    def refuse(self) -> None:
        """Stop listening, so that whoever connects is refused; what is connected stays so."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def cut(self) -> int:
        """Reset every connection, on both sides and at once; return how many there were."""
        joints, self._joints = self._joints, []
        for joint in joints:
            self._cut(joint)
            if joint.pumps:  # else it connects to the target, whose socket is to be reset as well
                joint.task.cancel()
        return len(joints)

    def half_close(self, direction: Direction) -> None:
        """Tell the receivers of a direction that it has ended; the other one goes on."""
        for joint in self._joints:
            for pump in joint.pumps:
                if pump.direction is direction:
                    pump.end()

    def heal(self) -> None:
        """Be a plain cable in both directions."""
        self.up.heal()
        self.down.heal()

    def _cut(self, joint: _Joint) -> None:
        self.cuts += 1
        joint.reset()

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        joint = _Joint(writer)
        self._joints.append(joint)
        joint.task = asyncio.ensure_future(self._join(joint, reader, writer))
        self._tasks.add(joint.task)
        joint.task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Forget a connection; one that has failed fails the test in the end."""
        if task.cancelled() or task.exception() is None:
            self._tasks.discard(task)

    async def _join(
        self, joint: _Joint, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        tasks: list[asyncio.Task[None]] = []
        try:
            far_reader, far_writer = await asyncio.open_connection(*self.target)
            joint.writers.append(far_writer)
            if joint not in self._joints:  # it was cut in the meantime
                joint.reset()
                return
            joint.pumps += [
                _Pump(self.up, reader, far_writer),
                _Pump(self.down, far_reader, writer),
            ]
            for pump in joint.pumps:
                tasks += [asyncio.ensure_future(pump.read()), asyncio.ensure_future(pump.write())]
            await asyncio.gather(*tasks)
            for one in joint.writers:
                one.close()
                with contextlib.suppress(OSError):
                    await one.wait_closed()
        except (_Reset, OSError):  # an OSError says that the target refuses, and so do we
            if joint in self._joints:
                self._joints.remove(joint)
                self._cut(joint)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for one in joint.writers:
                one.transport.abort()
            if joint in self._joints:
                self._joints.remove(joint)
