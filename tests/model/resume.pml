/* Resume: how a session goes on over another link, and what it promises. For Spin; `make model`.

One client and one server have logged in. Each sends numbered messages to the other while links are
cut at any point, answers to logins are lost with them, the server process is killed, and a session
that nobody asks for expires. Spin goes through every order in which all this can happen.

What stands for what (docs/protocol.md, sections 6, 7 and 15):

  Session         conduit's Session: id, epoch, sent, received, reported. Its outbox is what is above
                  `acked`, up to `sent`; of it, everything from `next` on is still to be written to
                  the present link. A message is numbered when it enters the outbox, also while there
                  is no link.
  client, server  the session as each side knows it, with the link it goes over. id 0: none.
  up, down        the two directions of each link: frames in order that were written and not read.
  cut             this link passes nothing any more. Either side may still read any part of what
                  had been written before it finds the end, which it does at any later time.
  held            the server has not let go of its end of this link yet.
  serves          frames that come over this link count for the server's session. The FENCE takes
                  that from every other link, and aborts them, before the server looks up what it
                  has received and answers.
  epoch           the server process; a new one knows no session of the one before. Ids count from 1
                  in each process here, so that nothing but the epoch tells their sessions apart.
                  (Real ids are random, so the epoch stands behind them as a second wall.)
  Client          connects again, asks for its session, writes, acknowledges, and reads.
  Server          writes, acknowledges, lets a session expire. Its other half, Reader, reads one link:
                  each step of either is one turn of the event loop.
  Faults          cuts links and kills the server.
  book            what was promised: no part of the scheme, it only checks it. One for the messages
                  of each direction, numbered over all sessions, as sets of bits.

Frames: LOGIN id epoch recv    AUTH_REQUEST with `session`; the SCRAM exchange is one step here
        RESUMED recv           AUTH_SUCCESS with resumed true
        STARTED id epoch       AUTH_SUCCESS with resumed false
        DATA number message    any sequenced frame; the message is what the book calls it
        ACK number

Checked: messages are handed over in order, none twice, and none is missing (G1, 1002 on the wire);
no ACK is above what was sent; what is acknowledged has been handed over; nothing is given up unless
the server was killed or the session has expired (G2); and when everything has come to rest, each
message is acknowledged or was reported lost (G3) or died with the process that had accepted it.

Broken on purpose, so that it is seen that the checks can fail:
  -DNO_FENCE  the server goes on reading the old link of a session that it has resumed
  -DNO_EPOCH  the server looks at the id of a session alone

Left out: who asks (the server resumes a session for its own identity only), limits of the outbox,
and sessions that no client ever learns of, beyond the last one. */

#ifndef UP
#define UP 2                    /* messages of the client, at most 7 */
#endif
#ifndef DOWN
#define DOWN 2                  /* messages of the server */
#endif
#ifndef CUTS
#define CUTS 3
#endif
#ifndef KILLS
#define KILLS 1
#endif
#ifndef EXPIRIES
#define EXPIRIES 1
#endif
#ifndef ROOM
#define ROOM 2                  /* frames that a direction of a link holds; its writer waits */
#endif

#define LINKS (CUTS + KILLS + 1)
#define NONE  255
#define ALL(count) ((1 << (count)) - 1)
#define BIT(message) (1 << ((message) - 1))

mtype = { LOGIN, RESUMED, STARTED, DATA, ACK };
mtype = { CLIENT, SERVER };      /* only to be printed: `spin -t` tells the story of a failure */

chan up[LINKS] = [ROOM] of { mtype, byte, byte, byte };
chan down[LINKS] = [ROOM] of { mtype, byte, byte, byte };
bool cut[LINKS];
bool held[LINKS];
bool serves[LINKS];

typedef Session {
    byte id;
    byte epoch;
    byte sent;
    byte acked;
    byte next;
    byte received;
    byte reported;
    byte link;
    byte before                 /* messages of earlier sessions, for the book */
};
Session client, server;
bool ready;                     /* the client's login is done */
byte ids;                       /* sessions that this server process has made */
byte epoch;                     /* which server process it is */

typedef Book {
    byte accepted;              /* how many */
    byte handed_over;           /* the rest are sets */
    byte acknowledged;
    byte lost;
    byte died
};
Book book_up, book_down;

byte cuts, kills, expiries;     /* those to come */
bool given_up;                  /* a session has ended: G2 promises nothing more */

inline accept(session, book) {
    session.sent++;
    book.accepted++;
}

inline hand_over(side, session, book, number, message) {
    printf("%e takes message %d, numbered %d; next is %d\n", side, message, number, session.received + 1);
    assert(number == session.received + 1);         /* none is missing */
    assert(book.handed_over < BIT(message));        /* in order, and none twice */
    session.received = number;
    book.handed_over = book.handed_over | BIT(message);
}

inline acknowledge(session, book, number) {
    assert(number <= session.sent);
    do
    :: session.acked < number ->
        session.acked++;
        assert(book.handed_over & BIT(session.before + session.acked));
        assert(!((book.lost | book.died) & BIT(session.before + session.acked)));
        book.acknowledged = book.acknowledged | BIT(session.before + session.acked)
    :: else -> break
    od
}

/* Enter what is in the outbox of a session that has ended. */
inline give_up(session, book, fate) {
    assert(given_up);
    do
    :: session.acked < session.sent ->
        session.acked++;
        assert(!(book.acknowledged & BIT(session.before + session.acked)));
        fate = fate | BIT(session.before + session.acked)
    :: else -> break
    od
}

/* Go on over another link: forget what has arrived, write the rest again. */
inline resume(session, book, received_there) {
    acknowledge(session, book, received_there);
    session.next = session.acked + 1;
    session.reported = session.received
}

inline start(session, book, new_id, new_epoch) {
    session.id = new_id;
    session.epoch = new_epoch;
    session.before = book.accepted;
    session.sent = 0;
    session.acked = 0;
    session.next = 1;
    session.received = 0;
    session.reported = 0
}

/* What one side does with the frames of an open session, in a line each. */
#define CAN_WRITE(session, to) (session.next <= session.sent && !cut[session.link] && nfull(to))
#define CAN_TELL(session, to)  (session.reported < session.received && !cut[session.link] && nfull(to))

inline write(side, session, to) {
    printf("%e writes message %d, numbered %d, to link %d\n", side,
        session.before + session.next, session.next, session.link);
    to ! DATA(session.next, session.before + session.next, 0);
    session.next++
}

inline tell(session, to) {
    to ! ACK(session.received, 0, 0);
    session.reported = session.received
}

inline drain(frames) {
    do
    :: nempty(frames) -> frames ? _, _, _, _
    :: empty(frames) -> break
    od
}

proctype Client() {
    byte a, b, c;
end:
    do
    /* Whoever uses the client sends a message. */
    :: atomic { client.id && book_up.accepted < UP -> accept(client, book_up) }

    :: atomic { ready && CAN_WRITE(client, up[client.link]) -> write(CLIENT, client, up[client.link]) }
    :: atomic { ready && CAN_TELL(client, up[client.link]) -> tell(client, up[client.link]) }

    :: atomic { client.link != NONE && cut[client.link] ->
        drain(down[client.link]);
        client.link = NONE;
        ready = false
      }
    :: atomic { client.link == NONE ->
        a = 0;
        do
        :: held[a] -> a++
        :: else -> break
        od;
        assert(a < LINKS);
        client.link = a;
        printf("CLIENT asks on link %d for session %d of epoch %d; it has %d\n", a, client.id,
            client.epoch, client.received);
        held[a] = true;
        cut[a] = false;
        up[a] ! LOGIN(client.id, client.epoch, client.received);
        a = 0
      }

    :: atomic { client.link != NONE && nempty(down[client.link]) ->
        if
        :: down[client.link] ? DATA(a, b, _) -> hand_over(CLIENT, client, book_down, a, b)
        :: down[client.link] ? ACK(a, _, _) -> acknowledge(client, book_up, a)
        :: down[client.link] ? RESUMED(a, _, _) ->
            printf("CLIENT goes on; the server has %d\n", a);
            resume(client, book_up, a);
            ready = true
        :: down[client.link] ? STARTED(a, b, _) ->
            give_up(client, book_up, book_up.lost);
            start(client, book_up, a, b);
            ready = true
        fi;
        a = 0; b = 0
      }
    od
}

/* The server lets go of its end of a link. */
inline close_link(g) {
    serves[g] = false;
    held[g] = false;
    cut[g] = true;
    drain(up[g]);
    if
    :: server.link == g -> server.link = NONE
    :: else
    fi
}

inline fence(g) {
    other = 0;
    do
    :: other < LINKS ->
        if
        :: other != g && serves[other] -> close_link(other)
        :: else
        fi;
        other++
    :: else -> break
    od;
    other = 0
}

inline answer(g, frame, x, y) {
    if
    :: cut[g] -> printf("SERVER answers %e %d on link %d, which is lost\n", frame, x, g)
    :: else ->
        printf("SERVER answers %e %d on link %d\n", frame, x, g);
        down[g] ! frame(x, y, 0)
    fi
}

#ifdef NO_EPOCH
#define KNOWN(asked, its_epoch) (asked && asked == server.id)
#else
#define KNOWN(asked, its_epoch) (asked && asked == server.id && its_epoch == server.epoch)
#endif

proctype Reader(byte g) {
    byte a, b, c, other;
end:
    do
    :: atomic { up[g] ? LOGIN(a, b, c) ->
        if
        :: KNOWN(a, b) ->
#ifndef NO_FENCE
            fence(g);
#endif
            server.link = g;
            serves[g] = true;
            /* An old login that was overtaken by a newer one knows less than what was acknowledged
               since. Its link is dead, and the client will ask once more. */
            resume(server, book_down, c);
            answer(g, RESUMED, server.received, 0)
        :: else ->
            if
            :: client.link == g ->
                /* Whatever session there is, the client does not know it, nor ever will. */
                fence(g);
                if
                :: server.id -> give_up(server, book_down, book_down.lost)
                :: else
                fi;
                ids++;
                start(server, book_down, ids, epoch);
                server.link = g;
                serves[g] = true;
                answer(g, STARTED, ids, epoch)
            :: else             /* a session that nobody will learn of, beside the other */
            fi
        fi;
        a = 0; b = 0; c = 0
      }
    :: atomic { up[g] ? DATA(a, b, _) ->
        if
        :: serves[g] -> hand_over(SERVER, server, book_up, a, b)
        :: else
        fi;
        a = 0; b = 0
      }
    :: atomic { up[g] ? ACK(a, _, _) ->
        if
        :: serves[g] -> acknowledge(server, book_down, a)
        :: else
        fi;
        a = 0
      }
    :: atomic { held[g] && cut[g] -> close_link(g) }
    od
}

proctype Server() {
end:
    do
    /* A handler, or whoever uses the server, sends the client a message. */
    :: atomic { server.id && book_down.accepted < DOWN -> accept(server, book_down) }

    :: atomic { server.link != NONE && CAN_WRITE(server, down[server.link]) ->
        write(SERVER, server, down[server.link]) }
    :: atomic { server.link != NONE && CAN_TELL(server, down[server.link]) ->
        tell(server, down[server.link]) }

    :: atomic { expiries && server.id && server.link == NONE ->
        expiries--;
        printf("SERVER lets session %d expire\n", server.id);
        given_up = true;
        give_up(server, book_down, book_down.lost);
        start(server, book_down, 0, 0)
      }
    od
}

proctype Faults() {
    byte g;
end:
    do
    :: atomic { cuts && client.link != NONE && !cut[client.link] ->
        cuts--;
        cut[client.link] = true;
        printf("link %d is cut\n", client.link)
      }
    :: atomic { kills ->
        kills--;
        printf("the server is killed\n");
        given_up = true;
        g = 0;
        do
        :: g < LINKS ->
            if
            :: held[g] -> close_link(g)
            :: else
            fi;
            g++
        :: else -> break
        od;
        g = 0;
        give_up(server, book_down, book_down.died);
        start(server, book_down, 0, 0);
        ids = 0;
        epoch++
      }
    od
}

/* When nothing more can happen: every message has an end, and what was acknowledged has arrived. */
proctype Rest() {
end:
    do
    :: atomic { timeout ->
        assert(book_up.accepted == UP && book_down.accepted == DOWN);
        assert((book_up.acknowledged | book_up.lost) == ALL(UP));
        assert((book_down.acknowledged | book_down.lost | book_down.died) == ALL(DOWN));
        break
      }
    od
}

init {
    byte g;
    atomic {
        /* Fewer faults than there might be, so that no fault has to come that mends another. */
        do
        :: cuts < CUTS -> cuts++
        :: break
        od;
        do
        :: kills < KILLS -> kills++
        :: break
        od;
        do
        :: expiries < EXPIRIES -> expiries++
        :: break
        od;
        ids = 1;
        start(client, book_up, 1, 0);
        start(server, book_down, 1, 0);
        client.link = 0;
        held[0] = true;
        serves[0] = true;
        ready = true;
        do
        :: g < LINKS -> run Reader(g); g++
        :: else -> break
        od;
        g = 0;
        run Client();
        run Server();
        run Faults();
        run Rest()
    }
}
