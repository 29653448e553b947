"""One client and one server whose links are cut, again and again, by conduit's own `CNDT`.

There is no socket, no event loop and no clock: `World(seed).run()` draws from one generator what
happens next, so the same seed gives the same run. Each side sends numbered frames to the other
while links are cut at any byte, logins and their answers are lost with them or come too late, the
server process is started again, and sessions that nobody asks for expire.

What stands for what, in the words of tests/model/resume.pml where it has them:

  Link    the bytes of both directions that were written and not read, `cut` when it passes no more.
          `held` is who reads it at the server: a peer that logs in, or the session that it carries.
          The FENCE takes that away before the server looks up what it has received.
  End     a session as one side knows it: conduit's CNDT, the link, and how much was handed over.
  epoch   the server process. Ids count from 1 in each, so that nothing but the epoch tells their
          sessions apart.

Checked: what is handed over belongs to the session, in order, none twice and none missing; no peer
breaks; a session ends only with the server process or because it has expired; a session that has
ended with all acknowledged had handed over all of it, so that no loss is silent; and when the links
are left alone in the end, all is handed over and acknowledged. The first thing that is not so
raises `Violation`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Final

from conduit.protocol.cndt import CNDT, State
from conduit.protocol.events import (
    Acknowledged,
    Broken,
    Capabilities,
    KeysNeeded,
    Opened,
    Ponged,
    Resumed,
    ResumeWanted,
    VerifierNeeded,
    WelcomeNeeded,
)
from conduit.protocol.frames import Payload
from conduit.protocol.login import ClientLogin, ServerLogin
from conduit.protocol.session import EPOCH_BYTES, ID_BYTES, Session
from fuzz.targets.parser import small_frames
from tests.golden_frames import CLIENT_NONCE, ITERATIONS, PASSWORD, SERVER_NONCE, USER
from tests.protocol.pair import HEARTBEAT, keys_of, verifier_of
from tests.simulation.parts import End, Link, Violation, read, receive, send

STEPS: Final = 1_500
"""What happens in a run before its links are left alone."""
LINKS: Final = 4
"""Links that there may be at once; the server finds the end of the oldest one then."""
PASSWORDS: Final = 32
"""One run in so many logs in with a password, which takes ten times as long."""
CAPABILITIES: Final = Capabilities(features=frozenset({"resume"}))
INFLATING: Final = Capabilities(features=frozenset({"resume", "zlib"}))


class World:
    """One run.

    Args:
        seed: Decides everything.
        steps: What happens before the links are left alone.
        tell: Is told each step, for people who look for the cause of a violation.

    Attributes:
        messages: How many frames were handed over, in both directions.
        cuts: How many links were lost, by a cut or because a side gave one up.
        restarts: How often the server process was started again.
        resumes: How often a side went on with its session over another link.
    """

    def __init__(
        self, seed: int, *, steps: int = STEPS, tell: Callable[[str], None] | None = None
    ) -> None:
        self.seed = seed
        self.steps = steps
        self._tell = tell
        self.messages = 0
        self.cuts = 0
        self.restarts = 0
        self.resumes = 0
        self._random = random.Random(seed).random
        self._clock = itertools.count(0, 1000).__next__  # milliseconds, as far apart as seconds
        dice = self._random
        self._anonymous = self._below(PASSWORDS) > 0
        self._capabilities = INFLATING if dice() < 0.3 else CAPABILITIES
        self._pieces = (1, 20, 300, 5000, 100_000)[self._below(5)]
        self._large = dice() < 0.5
        self._serials = itertools.count(1).__next__
        self._names: dict[tuple[bytes, bytes], End] = {}
        self._links: list[Link] = []
        self._epoch = 0
        self._server: dict[bytes, End] = {}
        self._client: End | None = None
        self._joining: tuple[CNDT, Link] | None = None
        self._gone = 0
        self._begin_process()

    def __str__(self) -> str:
        """Say how both sides stand: session, sent, handed over; `-` is a side without a link."""
        sides = [f"links {''.join('x' if link.cut else 'o' for link in self._links):4}"]
        for end in [*self._server.values(), *([self._client] if self._client else [])]:
            link = "-" if end.link is None else "+"
            kept = end.peer.session.outbox_bytes
            sides.append(
                f"{self._name(end)}{link} {end.serial}: {end.sent} sent, {kept} bytes kept, "
                f"{end.handed_over} handed over"
            )
        return "; ".join(sides)

    def _below(self, limit: int) -> int:
        return int(self._random() * limit)

    def run(self) -> World:
        """Let everything happen that the seed says.

        Raises:
            Violation: It must not have.
        """
        try:
            # As if frames of a few hundred bytes were large: those are read in other ways.
            with small_frames(State.OPEN if self._below(3) == 0 else State.CLOSED):
                self._run()
        finally:
            for end in (*self._names.values(), *self._ends()):
                end.peer.forget()
        return self

    def _run(self) -> None:
        actions = self._actions()
        for _ in range(self.steps):
            action = actions[int(self._random() * len(actions))]
            action()
            if self._tell is not None:
                self._tell(f"{action.__name__.strip('_'):15} {self}")
        self._settle()

    def _actions(self) -> list[Callable[[], None]]:
        """Return what may happen, each as often as it is probable in this run."""
        weights: list[tuple[Callable[[], None], int]] = [
            (self._send_up, 4 + self._below(12)),
            (self._send_down, 4 + self._below(12)),
            (self._flush, 8 + self._below(12)),
            (self._acknowledge, self._below(6)),
            (self._read_up, 10 + self._below(20)),
            (self._read_down, 10 + self._below(20)),
            (self._cut, 1 + self._below(12)),
            (self._client_notices, 2 + self._below(12)),
            (self._server_notices, self._below(12)),
            (self._connect, 4 + self._below(20)),
            (self._seldom, 1),
        ]
        return [action for action, weight in weights for _ in range(weight)]

    # What both sides do.

    def _ends(self) -> list[End]:
        return [*self._server.values(), *([self._client] if self._client else [])]

    def _send_up(self) -> None:
        if self._client is not None:
            self._send(self._client)

    def _send_down(self) -> None:
        for end in self._server.values():
            self._send(end)

    def _send(self, end: End) -> None:
        for _ in range(1 + self._below(4)):
            send(end, self._below, large=self._large)

    def _flush(self) -> None:
        for end in self._ends():
            if self._random() < 0.7:
                self._write(end)

    def _write(self, end: End) -> None:
        """Write what is queued; without a link it stays in the outbox."""
        data = b"".join(end.peer.take())
        if end.link is not None and not end.link.cut:
            way = end.link.up if end is self._client else end.link.down
            way += data

    def _acknowledge(self) -> None:
        for end in self._ends():
            if end.peer.ack_due and end.link is not None:
                end.peer.acknowledge()

    def _take(self, end: End, data: bytes | bytearray) -> None:
        """Let one side take what has come over its link."""
        peer = end.peer
        for event in receive(peer, data):
            if type(event) is tuple:
                self._hand_over(end, event[3])
            elif not isinstance(event, (Acknowledged, Ponged)):
                error = event.error if isinstance(event, Broken) else event
                raise Violation(f"the {self._name(end)} broke: {error}")

    def _hand_over(self, end: End, payload: Payload) -> None:
        serial, number = read(payload)
        end.handed_over += 1
        self.messages += 1
        if (serial, number) != (end.serial, end.handed_over):
            raise Violation(
                f"the {self._name(end)} of session {end.serial} takes message {number} of session "
                f"{serial}; next is {end.handed_over}"
            )

    def _name(self, end: End) -> str:
        return "client" if end is self._client else "server"

    # Links.

    def _cut(self) -> None:
        """Cut a link: of what is on its way anything may arrive, from the beginning."""
        if self._links:
            link = self._links[self._below(len(self._links))]
            if not link.cut:
                link.cut = True
                self.cuts += 1
                del link.up[self._below(len(link.up) + 1) :]
                del link.down[self._below(len(link.down) + 1) :]

    def _client_notices(self) -> None:
        """Let the client find the end of its link, or believe that it has."""
        end = self._client
        if end is not None and end.link is not None and (end.link.cut or self._random() < 0.1):
            self.cuts += not end.link.cut
            end.link = None

    def _server_notices(self) -> None:
        """Let the server find that a link has ended."""
        for link in self._links:
            if link.cut and self._random() < 0.5:
                self._lose(link)
                return

    def _lose(self, link: Link) -> None:
        """Let go of a link at the server."""
        held, link.held = link.held, None
        if isinstance(held, End) and held.link is link:
            held.link = None
        mine = self._client is not None and self._client.link is link
        if mine or (self._joining is not None and self._joining[1] is link):
            link.cut = True
        self._links.remove(link)

    def _piece(self, way: bytearray) -> bytes:
        """Take what one read of a link gives."""
        size = 1 + self._below(min(len(way), self._pieces)) if self._pieces < 100_000 else len(way)
        piece = bytes(way[:size])
        del way[:size]
        return piece

    def _read_up(self) -> None:
        """Let the server read from one of its links; it may have the old one in its hands yet."""
        ready = [link for link in self._links if link.up]
        if not ready:
            return
        link = ready[self._below(len(ready))]
        piece, held = self._piece(link.up), link.held
        if isinstance(held, End):
            self._take(held, piece)
        elif held is not None:
            self._log_in_at_server(held, link, piece)

    def _read_down(self) -> None:
        """Let the client read from the link that it uses; the others it has given up."""
        if self._joining is not None:
            peer, link = self._joining
            if link.down:
                self._log_in_at_client(peer, link, self._piece(link.down))
        elif self._client is not None and self._client.link is not None and self._client.link.down:
            self._take(self._client, self._piece(self._client.link.down))

    # Logins.

    def _connect(self) -> None:
        """Let a client without a link try again, which ends an attempt that is under way."""
        if self._client is not None and self._client.link is not None:
            return
        if self._joining is not None and not self._joining[1].cut and self._random() < 0.8:
            return
        link = Link()
        self._links.append(link)
        if len(self._links) > LINKS:
            self._lose(self._links[0])
        peer = CNDT(clock=self._clock)
        session = self._client.peer.session if self._client is not None else None
        peer.open(
            ClientLogin(
                peer.send_login,
                capabilities=self._capabilities,
                nonce=CLIENT_NONCE,
                user=None if self._anonymous else USER,
                agent="simulation/1",
                min_iterations=ITERATIONS,
                compress=self._capabilities is INFLATING,
                session=session,
            )
        )
        self._joining = peer, link
        link.up += b"".join(peer.take())
        server = CNDT(clock=self._clock)
        server.accept(
            ServerLogin(
                server.send_login,
                capabilities=self._capabilities,
                nonce=SERVER_NONCE,
                mock_secret=bytes(32),
                anonymous=self._anonymous,
                compress=self._capabilities is INFLATING,
            )
        )
        link.held = server

    def _log_in_at_server(self, peer: CNDT, link: Link, piece: bytes) -> None:
        for event in peer.receive(piece):
            if isinstance(event, VerifierNeeded):
                peer.verifier_found(verifier_of(PASSWORD))
            elif isinstance(event, ResumeWanted) and (older := self._older(event)) is not None:
                self._resume(peer, link, older, event.accepted)
                return
            elif isinstance(event, (WelcomeNeeded, ResumeWanted)):
                self._begin(peer, link)
            else:
                raise Violation(f"the login broke at the server: {event}")
        if not link.cut:
            link.down += b"".join(peer.take())

    def _older(self, wanted: ResumeWanted) -> End | None:
        """Return the session that a client wants to go on with, if the server has it."""
        if wanted.epoch != self._epoch.to_bytes(EPOCH_BYTES, "big"):
            return None
        return self._server.get(wanted.id)

    def _resume(self, peer: CNDT, link: Link, older: End, accepted: int) -> None:
        """Fence the old link, tell the client, and go on over the new one."""
        self._fence(older)
        peer.welcome_back(
            older.peer.session, heartbeat=HEARTBEAT, name="server", version="1", keeps=30.0
        )
        answer = b"".join(peer.take())
        if not link.cut:
            link.down += answer
        link.held, older.link = older, link
        self._go_on(older, accepted)

    def _fence(self, end: End) -> None:
        """Take nothing more from the old link, and abort it."""
        if end.link is not None:
            end.link.held, end.link.cut = None, True
            end.link = None

    def _go_on(self, end: End, accepted: int) -> None:
        try:
            end.peer.resume(accepted)
        except Exception as exc:
            raise Violation(f"the {self._name(end)} cannot go on: {exc}") from exc
        self.resumes += 1
        self._write(end)

    def _begin(self, peer: CNDT, link: Link) -> None:
        """Start a new session at the server."""
        id = (len(self._server) + self._gone + 1).to_bytes(ID_BYTES, "big")
        peer.session = Session(id, self._epoch.to_bytes(EPOCH_BYTES, "big"))
        peer.welcome(heartbeat=HEARTBEAT, name="server", version="1", keeps=30.0)
        end = End(peer, link, self._serials(), 2)
        self._server[id] = self._names[id, peer.session.epoch] = end
        link.held = end

    def _log_in_at_client(self, peer: CNDT, link: Link, piece: bytes) -> None:
        for event in peer.receive(piece):
            if isinstance(event, KeysNeeded):
                peer.keys_derived(keys_of(PASSWORD, event.salt, event.iterations))
            elif isinstance(event, Resumed):
                end = self._client
                if end is None:
                    raise Violation("a session goes on that the client does not have")
                self._joining, end.link = None, link
                self._go_on(end, event.accepted)
                self._take(end, event.rest)
                return
            elif isinstance(event, Opened):
                self._joining = None
                self._end(self._client)
                named = self._names[peer.session.id, peer.session.epoch]
                self._client = End(peer, link, named.serial, 1)
                self._client.given_up = named.given_up  # the server may have ended since
            elif type(event) is tuple and self._client is not None:
                self._hand_over(self._client, event[3])
            else:
                raise Violation(f"the login broke at the client: {event}")
        if not link.cut:
            link.up += b"".join(peer.take())

    # The ends of sessions.

    def _seldom(self) -> None:
        """Let happen what ends sessions, and what need not happen often."""
        kind = self._below(10)
        if kind == 0:
            self._start_again()
        elif kind == 1:
            for id, end in list(self._server.items()):
                if end.link is None:
                    del self._server[id]
                    self._gone += 1
                    self._give_up(end)
        elif kind == 2 and self._client is not None and self._client.link is None:
            self._give_up(self._client)  # it has waited for too long
            self._client = None
            self._joining = None
        else:
            for end in self._ends():
                end.peer.ping(kind)

    def _begin_process(self) -> None:
        self._epoch += 1
        self._gone = 0

    def _start_again(self) -> None:
        """Kill the server process and start another: it knows no session, all links are cut."""
        self.restarts += 1
        self._begin_process()
        for link in list(self._links):
            link.cut = True
            link.up.clear()
            self._lose(link)
        for end in self._server.values():
            self._give_up(end)
        self._server.clear()

    def _give_up(self, end: End) -> None:
        """End a session for a reason that allows for that: both sides may lose what they sent."""
        end.given_up = True
        other = self._other(end)
        if other is not None:
            other.given_up = True
            self._check_loss(end, other)
            self._check_loss(other, end)

    def _other(self, end: End) -> End | None:
        named = self._names[end.peer.session.id, end.peer.session.epoch]
        if end is not named:
            return named
        client = self._client
        return client if client is not None and client.serial == end.serial else None

    def _end(self, older: End | None) -> None:
        """Check what becomes of a session that the server has not kept: its client is told."""
        if older is None:
            return
        if not older.given_up:
            raise Violation(f"session {older.serial} is lost, and the server has not ended it")
        self._check_loss(older, self._names[older.peer.session.id, older.peer.session.epoch])

    def _check_loss(self, sender: End, receiver: End) -> None:
        """Check that a side which believes that all has arrived is right."""
        if sender.silent() and receiver.handed_over < sender.sent:
            raise Violation(
                f"the {self._name(sender)} of session {sender.serial} has sent {sender.sent} "
                f"messages, all acknowledged, and {receiver.handed_over} were handed over"
            )

    # The end.

    def _settle(self) -> None:
        """Leave the links alone: all that was sent in the last session must arrive."""
        for _ in range(10_000):
            client = self._client
            if client is not None and client.link is not None and client.link.cut:
                client.link = None
            self._pieces = 100_000
            self._connect()
            while any(link.up for link in self._links):
                self._read_up()
            self._read_down()
            for end in self._ends():
                if end.peer.ack_due and end.link is not None:
                    end.peer.acknowledge()
                self._write(end)
            if self._at_rest():
                return
        raise Violation("it does not come to rest")

    def _at_rest(self) -> bool:
        """Tell whether nothing is under way any more; then all must have arrived."""
        client = self._client
        if client is None or client.link is None or client.link.up or client.link.down:
            return False
        server = self._names[client.peer.session.id, client.peer.session.epoch]
        if client.peer.ack_due or server.peer.ack_due or server.link is not client.link:
            return False
        for sender, receiver in ((client, server), (server, client)):
            if receiver.handed_over != sender.sent:
                raise Violation(
                    f"{receiver.handed_over} of {sender.sent} messages of the "
                    f"{self._name(sender)} were handed over when all was at rest"
                )
            if sender.peer.session.outbox_bytes:
                raise Violation(f"the {self._name(sender)} waits for an ACK when all is at rest")
        return True
