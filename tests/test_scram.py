"""SCRAM-SHA-256: published vectors, a second implementation, and everything that must fail."""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Callable
from functools import cache

import msgpack
import pytest
import scramp
from hypothesis import given, settings
from hypothesis import strategies as st

from conduit.exceptions import AuthenticationError
from conduit.protocol.scram import (
    DEFAULT_ITERATIONS,
    MECHANISM,
    MECHANISM_PLUS,
    ClientScram,
    Keys,
    ServerScram,
    Verifier,
    derive_keys,
    normalise,
    transcript_digest,
)

USER = "default"
PASSWORD = "pencil"
SALT = base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")
ITERATIONS = 64
CLIENT_NONCE = "rOprNGfwEbeRWgbNEkqO0000"
SERVER_NONCE = "hvYDpWUa2RaTCAfuxFIljhNl"
NONCE = CLIENT_NONCE + SERVER_NONCE
SALT64 = "W22ZaJ0SNY7soEsUEjb6gQ=="
BINDING = bytes(range(32))
DIGEST = transcript_digest(1, b"request", b"caps")
MOCK_SECRET = b"m" * 32
SERVER_FIRST = f"r={NONCE},s={SALT64},i={ITERATIONS},d={DIGEST}"

derive = cache(derive_keys)


@cache
def verifier(password: str = PASSWORD, iterations: int = ITERATIONS) -> Verifier:
    return Verifier.from_password(password, salt=SALT, iterations=iterations)


def client(user: str = USER, **options) -> ClientScram:
    return ClientScram(user, CLIENT_NONCE, **{"min_iterations": 1, **options})


def server(**options) -> ServerScram:
    defaults = {"mock_secret": MOCK_SECRET, "mock_iterations": ITERATIONS}
    return ServerScram(SERVER_NONCE, **{**defaults, **options})


def nothing_changed(step: int, text: str) -> str:
    return text


def log_in(
    client: ClientScram,
    server: ServerScram,
    *,
    password: str = PASSWORD,
    digest: str | None = DIGEST,
    change: Callable[[int, str], str] = nothing_changed,
) -> str:
    """Run the whole exchange; `change` sees message 1 to 4 on its way."""
    user = server.start(client.mechanism, change(1, client.first()))
    known = verifier() if user == USER else None
    client.challenge(change(2, server.challenge(known, digest)), digest)
    keys = derive(password, client.salt, client.iterations)
    client.verify(change(4, server.final(change(3, client.final(keys)))))
    return user


def challenged_client(text: str = SERVER_FIRST, **options) -> ClientScram:
    side = client(**options)
    side.first()
    side.challenge(text, DIGEST)
    return side


def proved_client() -> tuple[ClientScram, str]:
    """A client that waits for server-final, and its client-final."""
    side = challenged_client()
    return side, side.final(derive(PASSWORD, SALT, ITERATIONS))


def challenged_server(**options) -> ServerScram:
    side = server(**options)
    side.start(MECHANISM, client().first())
    side.challenge(verifier(), DIGEST)
    return side


# --- vectors ----------------------------------------------------------------------------------

RFC_7677 = [
    "n,,n=user,r=rOprNGfwEbeRWgbNEkqO",
    "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096",
    "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,"
    "p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=",
    "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=",
]


def test_rfc_7677_vector_as_client():
    side = ClientScram("user", "rOprNGfwEbeRWgbNEkqO", min_iterations=4096)
    assert side.mechanism == MECHANISM
    assert side.first() == RFC_7677[0]
    side.challenge(RFC_7677[1], None)
    assert (side.salt, side.iterations) == (SALT, 4096)
    assert side.final(derive_keys(PASSWORD, side.salt, side.iterations)) == RFC_7677[2]
    side.verify(RFC_7677[3])


def test_rfc_7677_vector_as_server():
    side = ServerScram("%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0", mock_secret=MOCK_SECRET)
    assert side.start(MECHANISM, RFC_7677[0]) == "user"
    assert side.challenge(verifier(iterations=4096), None) == RFC_7677[1]
    assert side.final(RFC_7677[2]) == RFC_7677[3]


REQUEST = bytes.fromhex(
    "86a17601a46d656368ad534352414d2d5348412d323536a5736372616dd9276e2c2c6e3d64656661756c742c723d72"
    "4f70724e476677456265525767624e456b714f30303030a46361707382a96672616d655f6d6178ce00100000a46665"
    "617491a6726573756d65a773657373696f6ec0a56167656e74ae636f6e647569742d70792f312e30"
)
CAPS = bytes.fromhex("83a17601a96672616d655f6d6178ce00100000a46665617491a6726573756d65")
WITH_DIGEST = [
    "n,,n=default,r=rOprNGfwEbeRWgbNEkqO0000",
    "r=rOprNGfwEbeRWgbNEkqO0000hvYDpWUa2RaTCAfuxFIljhNl,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,"
    "d=7+HGH5f8xMVMZFk4IS6k2fJvzhOf8UTx080MzxlyZCU=",
    "c=biws,r=rOprNGfwEbeRWgbNEkqO0000hvYDpWUa2RaTCAfuxFIljhNl,"
    "p=XMDxqJWkTUW/pJiGww92rbJVo1WP5wJaFQTcB+0PN6g=",
    "v=ejEW4L2FE2J858mw5DGCYE+zff4tJUnTaQ5TqhV2274=",
]
VERIFIER_TEXT = (
    "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY="
    ":wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
)


def test_vector_with_digest():
    caps = {"frame_max": 0x100000, "feat": ["resume"]}
    request = msgpack.packb(
        {
            "v": 1,
            "mech": MECHANISM,
            "scram": WITH_DIGEST[0],
            "caps": caps,
            "session": None,
            "agent": "conduit-py/1.0",
        }
    )
    assert request == REQUEST
    assert msgpack.packb({"v": 1, **caps}) == CAPS
    digest = transcript_digest(1, REQUEST, CAPS)
    assert digest == "7+HGH5f8xMVMZFk4IS6k2fJvzhOf8UTx080MzxlyZCU="

    connecting, accepting = client(), server()
    assert connecting.first() == WITH_DIGEST[0]
    assert accepting.start(MECHANISM, WITH_DIGEST[0]) == USER
    assert accepting.challenge(Verifier.parse(VERIFIER_TEXT), digest) == WITH_DIGEST[1]
    connecting.challenge(WITH_DIGEST[1], digest)
    assert connecting.final(derive(PASSWORD, SALT, 4096)) == WITH_DIGEST[2]
    assert accepting.final(WITH_DIGEST[2]) == WITH_DIGEST[3]
    connecting.verify(WITH_DIGEST[3])


def test_the_digest_covers_each_part_and_where_it_ends():
    parts = [
        (1, b"ab", b"c"),
        (2, b"ab", b"c"),
        (1, b"a", b"bc"),
        (1, b"ab", b""),
        (1, b"abc", b""),
    ]
    assert len({transcript_digest(*each) for each in parts}) == len(parts)


# --- the other implementation -----------------------------------------------------------------

BOTH_PASSWORDS = pytest.mark.parametrize(
    "password", ["pencil", "pässwörd", "пароль", "e\u0301 and no\u00a0break", "日本語"]
)
BOTH_BINDINGS = pytest.mark.parametrize("binding", [None, BINDING], ids=["plain", "bound"])


def scramp_binding(binding: bytes | None) -> tuple[str, bytes] | None:
    return None if binding is None else ("tls-server-end-point", binding)


@BOTH_PASSWORDS
@BOTH_BINDINGS
@pytest.mark.parametrize("digest", [None, DIGEST])
def test_scramp_logs_in_here(password, binding, digest):
    other = scramp.ScramClient(
        [MECHANISM, MECHANISM_PLUS], "us,e=r", password, scramp_binding(binding), CLIENT_NONCE
    )
    side = server(binding=binding)
    assert other.mechanism_name == (MECHANISM if binding is None else MECHANISM_PLUS)
    assert side.start(other.mechanism_name, other.get_client_first()) == "us,e=r"
    other.set_server_first(side.challenge(verifier(password, 4096), digest))
    other.set_server_final(side.final(other.get_client_final()))


@BOTH_PASSWORDS
@BOTH_BINDINGS
def test_logs_in_at_scramp(password, binding):
    mechanism = scramp.ScramMechanism(MECHANISM if binding is None else MECHANISM_PLUS)
    stored = mechanism.make_auth_info(password, iteration_count=4096, salt=SALT)
    names = []

    def look_up(user):
        names.append(user)
        return stored

    other = mechanism.make_server(look_up, channel_binding=scramp_binding(binding))
    side = client("us,e=r", binding=binding)
    other.set_client_first(side.first())
    side.challenge(other.get_server_first(), None)
    other.set_client_final(side.final(derive(password, side.salt, side.iterations)))
    side.verify(other.get_server_final())
    assert names == ["us,e=r"]


@BOTH_PASSWORDS
def test_scramp_derives_the_same_verifier(password):
    info = scramp.ScramMechanism(MECHANISM).make_auth_info(password, 4096, SALT)
    own = Verifier.from_password(password, salt=SALT, iterations=4096)
    assert info == (SALT, own.stored_key, own.server_key, 4096)


def test_scramp_is_refused_with_a_wrong_password_and_without_its_binding():
    for password, mechanism, binding in (
        ("pencils", MECHANISM, None),
        (PASSWORD, MECHANISM_PLUS, bytes(32)),
    ):
        other = scramp.ScramClient([mechanism], USER, password, scramp_binding(binding))
        side = server(binding=BINDING)
        side.start(mechanism, other.get_client_first())
        other.set_server_first(side.challenge(verifier(iterations=4096), None))
        with pytest.raises(AuthenticationError, match="wrong user name or password"):
            side.final(other.get_client_final())


# --- passwords and verifiers ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("password", "expected"),
    [
        ("pencil", b"pencil"),
        (" two  words ", b" two  words "),
        ("e\u0301", "é".encode()),
        ("a\u00a0b\u3000c\u2003d", b"a b c d"),
        ("\N{KELVIN SIGN}", b"K"),
        ("\N{TRADE MARK SIGN}", "\N{TRADE MARK SIGN}".encode()),
        ("\N{GRINNING FACE}", "\N{GRINNING FACE}".encode()),
        ("\U000e0fff unassigned", "\U000e0fff unassigned".encode()),
        ("x" * 1024, b"x" * 1024),
    ],
)
def test_normalise(password, expected):
    assert normalise(password) == expected


@pytest.mark.parametrize(
    ("password", "error"),
    [
        ("", "empty"),
        ("x" * 1025, "1025 bytes"),
        ("é" * 513, "1026 bytes"),
        ("secret\n", "control character"),
        ("\0secret", "control character"),
        ("sec\x7fret", "control character"),
        ("sec\x85ret", "control character"),
        ("secret\ud800", "lone surrogate"),
    ],
)
def test_normalise_refuses(password, error):
    with pytest.raises(ValueError, match=error) as caught:
        normalise(password)
    assert "sec" not in str(caught.value)


@given(st.text(alphabet=st.characters()))
def test_normalise_is_stable(password):
    try:
        prepared = normalise(password)
    except ValueError:
        return
    assert normalise(prepared.decode()) == prepared


def test_equivalent_passwords_have_the_same_keys():
    assert derive("caf\u00e9\u00a0noir", SALT, 1) == derive("cafe\u0301 noir", SALT, 1)
    assert derive("cafe noir", SALT, 1) != derive("caf\u00e9 noir", SALT, 1)


def test_no_iterations_is_an_error():
    with pytest.raises(ValueError, match="iteration"):
        derive_keys(PASSWORD, SALT, 0)


def test_verifier_text_and_back():
    parsed = Verifier.parse(VERIFIER_TEXT)
    assert parsed == verifier(iterations=4096)
    assert parsed.text() == VERIFIER_TEXT
    assert parsed.iterations == 4096
    assert parsed.salt == SALT


def test_default_iterations(monkeypatch):
    monkeypatch.setattr("hashlib.pbkdf2_hmac", lambda name, password, salt, iterations: b"")
    made = Verifier.from_password(PASSWORD, salt=SALT)
    assert made.iterations == DEFAULT_ITERATIONS == 600_000
    unknown = ServerScram(SERVER_NONCE, mock_secret=MOCK_SECRET)
    unknown.start(MECHANISM, client("nobody").first())
    assert unknown.challenge(None, None).endswith(",i=600000")


KEY64 = base64.b64encode(bytes(32)).decode()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "form"),
        ("pencil", "form"),
        ("md5d9b2b9b0", "form"),
        (VERIFIER_TEXT.replace("256", "1"), "form"),
        (VERIFIER_TEXT.replace("4096", "0"), "form"),
        (VERIFIER_TEXT.replace("4096", "04096"), "form"),
        (VERIFIER_TEXT.replace("4096", "-4096"), "form"),
        (VERIFIER_TEXT.replace("4096", "٤٠٩٦"), "form"),
        (VERIFIER_TEXT.replace("4096", "9" * 5000), "form"),
        (VERIFIER_TEXT + "\n", "base64"),
        (VERIFIER_TEXT + ":", "form"),
        (VERIFIER_TEXT.replace("W22Z", "W2!Z"), "base64"),
        (VERIFIER_TEXT.replace("gQ==", "gR=="), "base64"),
        (VERIFIER_TEXT.replace("WG5d", "ÄG5d"), "base64"),
        (VERIFIER_TEXT.replace("gQ==", "gQ"), "base64"),
        (f"SCRAM-SHA-256$9999999999:{SALT64}${KEY64}:{KEY64}", "9999999999 iterations"),
        (f"SCRAM-SHA-256$2147483648:{SALT64}${KEY64}:{KEY64}", "2147483648 iterations"),
        (f"SCRAM-SHA-256$4096:c2FsdA==${KEY64}:{KEY64}", "4 bytes, not 12 to 64"),
        (f"SCRAM-SHA-256$4096:{KEY64}{KEY64}${KEY64}:{KEY64}", "base64"),
        (f"SCRAM-SHA-256$4096:{SALT64}$c2FsdA==:{KEY64}", "StoredKey of the verifier has 4 bytes"),
        (f"SCRAM-SHA-256$4096:{SALT64}${KEY64}:", "ServerKey of the verifier has 0 bytes"),
    ],
)
def test_parse_refuses_and_says_why_without_the_secret(text, error):
    with pytest.raises(ValueError, match=error) as caught:
        Verifier.parse(text)
    assert "WG5d" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(("iterations", "size"), [(1, 12), (2**31 - 1, 64)])
def test_verifiers_at_the_limits(iterations, size):
    made = Verifier(iterations, bytes(size), bytes(32), bytes(32))
    assert Verifier.parse(made.text()) == made


def test_from_password_refuses_a_salt_that_clients_refuse():
    for size in (11, 65):
        with pytest.raises(ValueError, match=f"salt of the verifier has {size} bytes"):
            Verifier.from_password(PASSWORD, salt=bytes(size), iterations=1)


@given(st.text(alphabet=st.characters()) | st.from_regex(r"SCRAM-SHA-256\$\d+:.*\$.*:.*"))
def test_parse_accepts_or_raises_value_error(text):
    try:
        parsed = Verifier.parse(text)
    except ValueError:
        return
    assert parsed.text() == text


def test_no_secret_in_a_repr():
    keys = derive(PASSWORD, SALT, ITERATIONS)
    connecting, accepting = client(binding=BINDING), server(binding=BINDING)
    log_in(connecting, accepting)
    secrets = [keys.client_key, keys.server_key, verifier().stored_key, MOCK_SECRET, BINDING]
    assert repr(keys) == "Keys()"
    for each in (keys, verifier(), connecting, accepting):
        shown = f"{each!r} {each}"
        assert PASSWORD not in shown
        for secret in secrets:
            assert repr(secret)[2:-1] not in shown
            assert secret.hex() not in shown
            assert base64.b64encode(secret).decode() not in shown


# --- the exchange -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("client_options", "server_options", "header"),
    [
        ({}, {}, "n,,"),
        ({}, {"binding": BINDING}, "n,,"),
        ({"can_bind": True}, {}, "y,,"),
        ({"binding": BINDING}, {"binding": BINDING}, "p=tls-server-end-point,,"),
        ({"binding": BINDING, "can_bind": True}, {"binding": BINDING}, "p=tls-server-end-point,,"),
    ],
)
def test_login(client_options, server_options, header):
    messages = []

    def note(step, text):
        messages.append(text)
        return text

    connecting = client(**client_options)
    assert log_in(connecting, server(**server_options), change=note) == USER
    assert messages[0].startswith(header)
    bound = client_options.get("binding", b"")
    assert base64.b64decode(messages[2][2:].split(",")[0]) == header.encode() + bound
    assert connecting.mechanism == (MECHANISM_PLUS if bound else MECHANISM)


@pytest.mark.parametrize(
    ("user", "escaped"),
    [
        ("a", "a"),
        ("anna", "anna"),
        ("a,b=c", "a=2Cb=3Dc"),
        ("=2C", "=3D2C"),
        ("=3D,", "=3D3D=2C"),
        ("e\u0301ve", "éve"),
        ("x" * 128, "x" * 128),
        ("e\u0301" * 64, "é" * 64),
    ],
)
def test_user_names(user, escaped):
    first = client(user).first()
    assert first == f"n,,n={escaped},r={CLIENT_NONCE}"
    assert server().start(MECHANISM, first) == unicodedata.normalize("NFC", user)


@given(st.text(alphabet=st.characters(), min_size=1, max_size=40))
def test_any_user_name_arrives_or_is_refused(user):
    try:
        side = client(user)
    except AuthenticationError as error:
        assert error.code == "bad_request"
        return
    assert server().start(MECHANISM, side.first()) == unicodedata.normalize("NFC", user)


UNUSABLE_USERS = ["", "x" * 129, "é" * 65, "a\nb", "a\0b", "a\x80b", "a\ud800", "e\u0301" * 10_000]


@pytest.mark.parametrize("user", UNUSABLE_USERS)
def test_user_names_that_are_refused(user):
    with pytest.raises(AuthenticationError, match="128 bytes without control") as caught:
        client(user)
    assert caught.value.code == "bad_request"
    assert str(caught.value).isascii()
    assert len(str(caught.value)) < 400
    with pytest.raises(AuthenticationError) as caught:
        server().start(MECHANISM, f"n,,n={user},r={CLIENT_NONCE}")
    assert caught.value.code == "bad_request"


def test_the_server_normalises_the_name_and_signs_what_it_received():
    decomposed = f"n,,n=e\u0301ve,r={CLIENT_NONCE}"
    accepting = server()
    assert accepting.start(MECHANISM, decomposed) == "éve"
    connecting = client("éve")
    connecting.first()
    connecting._bare = decomposed[3:]
    connecting.challenge(accepting.challenge(verifier(), None), None)
    connecting.verify(accepting.final(connecting.final(derive(PASSWORD, SALT, ITERATIONS))))


@pytest.mark.parametrize(
    "nonce", ["", "x" * 17, "x" * 20 + ",", "x" * 20 + " ", "ü" * 20, "x" * 257]
)
def test_a_nonce_that_cannot_be_used(nonce):
    with pytest.raises(ValueError, match="nonce"):
        ClientScram(USER, nonce)
    with pytest.raises(ValueError, match="nonce"):
        ServerScram(nonce, mock_secret=MOCK_SECRET)


def test_a_mock_secret_that_can_be_guessed():
    server(mock_secret=bytes(16))
    with pytest.raises(ValueError, match="15 bytes, fewer than 16"):
        server(mock_secret=bytes(15))


def test_steps_out_of_turn():
    connecting, accepting = client(), server()
    keys = derive(PASSWORD, SALT, ITERATIONS)
    for step in (
        lambda: connecting.challenge(SERVER_FIRST, DIGEST),
        lambda: connecting.final(keys),
        lambda: connecting.verify("v="),
        lambda: accepting.challenge(None, None),
        lambda: accepting.final(""),
    ):
        with pytest.raises(RuntimeError, match="out of turn"):
            step()
    log_in(connecting, accepting)
    for step in (
        connecting.first,
        lambda: connecting.verify("v="),
        lambda: accepting.start(MECHANISM, "n,,"),
        lambda: accepting.final(""),
    ):
        with pytest.raises(RuntimeError, match="out of turn"):
            step()


def test_a_step_that_failed_ends_the_exchange():
    connecting = client()
    connecting.first()
    with pytest.raises(AuthenticationError):
        connecting.challenge("nonsense", DIGEST)
    with pytest.raises(RuntimeError):
        connecting.challenge(SERVER_FIRST, DIGEST)

    _, proof = proved_client()
    accepting = challenged_server()
    with pytest.raises(AuthenticationError):
        accepting.final(proof.replace("c=biws", "c=eSws"))
    with pytest.raises(RuntimeError):
        accepting.final(proof)


# --- client-first -----------------------------------------------------------------------------

P = "p=tls-server-end-point"


@pytest.mark.parametrize(
    ("mechanism", "text", "code", "error"),
    [
        ("SCRAM-SHA-1", "n,,{}", "unsupported_mechanism", "'SCRAM-SHA-1' is not supported"),
        ("PLAIN\n\ud800" + "x" * 99, "n,,{}", "unsupported_mechanism", "is not supported"),
        (MECHANISM, "y,,{}", "invalid_credentials", "downgrade detected"),
        (MECHANISM_PLUS, "y,,{}", "invalid_credentials", "downgrade detected"),
        (MECHANISM_PLUS, "n,,{}", "bad_request", "gs2 flag 'n' does not fit"),
        (MECHANISM, P + ",,{}", "bad_request", "gs2 flag 'p=tls-server-end-point' does not fit"),
        (MECHANISM_PLUS, "p=tls-unique,,{}", "bad_request", "gs2 flag 'p=tls-unique'"),
        (MECHANISM_PLUS, "p,,{}", "bad_request", "gs2 flag"),
        (MECHANISM, "x,,{}", "bad_request", "gs2 flag"),
        (MECHANISM, "N,,{}", "bad_request", "gs2 flag"),
        (MECHANISM, ",,{}", "bad_request", "gs2 flag"),
        (MECHANISM, "", "bad_request", "gs2 flag"),
        (MECHANISM, "n", "bad_request", "malformed"),
        (MECHANISM, "n,", "bad_request", "malformed"),
        (MECHANISM, "n,,", "bad_request", "malformed"),
        (MECHANISM, "n,a=root,{}", "bad_request", "acting as another user, 'a=root'"),
        (MECHANISM, "n,,m=new,{}", "bad_request", "demands an extension"),
        (MECHANISM, "n,,{},m=new", "bad_request", "demands an extension"),
        (MECHANISM, f"n,,r={CLIENT_NONCE},n=user", "bad_request", "attributes are 'rn'"),
        (MECHANISM, "n,,n=user", "bad_request", "attributes are 'n'"),
        (MECHANISM, "n,,x=y,{}", "bad_request", "attributes are 'xnr'"),
        (MECHANISM, "n,,{},n=other", "bad_request", "malformed"),
        (MECHANISM, "n,,{},", "bad_request", "malformed"),
        (MECHANISM, "n,,{},x=", "bad_request", "malformed"),
        (MECHANISM, "n,,{},xx=y", "bad_request", "malformed"),
        (MECHANISM, "n,,{},ä=y", "bad_request", "malformed"),
        (MECHANISM, "n,,{},x=\0", "bad_request", "malformed"),
        (MECHANISM, "n,,{},x=\udfff", "bad_request", "malformed"),
        (MECHANISM, "n,,n=user,r=", "bad_request", "malformed"),
        (MECHANISM, "n,,n=user,r=a b" + CLIENT_NONCE, "bad_request", "nonce or user name"),
        (MECHANISM, "n,,n=user,r=" + "x" * 17, "bad_request", "nonce or user name"),
        (MECHANISM, "n,,n=user,r=" + "x" * 257, "bad_request", "nonce or user name"),
        (MECHANISM, "n,,n==,r=" + CLIENT_NONCE, "bad_request", "nonce or user name"),
        (MECHANISM, "n,,n=a=2cb,r=" + CLIENT_NONCE, "bad_request", "nonce or user name"),
        (MECHANISM, "n,,n=a=2,r=" + CLIENT_NONCE, "bad_request", "nonce or user name"),
    ],
)
def test_client_first_refused(mechanism, text, code, error):
    with pytest.raises(AuthenticationError, match=error) as caught:
        server(binding=BINDING).start(mechanism, text.replace("{}", f"n=user,r={CLIENT_NONCE}"))
    assert caught.value.code == code
    assert str(caught.value).isascii()


def test_plus_is_not_offered_without_a_binding():
    with pytest.raises(AuthenticationError) as caught:
        server().start(MECHANISM_PLUS, client(binding=BINDING).first())
    assert caught.value.code == "unsupported_mechanism"


def test_unknown_extensions_are_ignored_but_signed():
    connecting, accepting = client(), server()
    first = connecting.first() + ",x=new"
    connecting._bare += ",x=new"
    assert accepting.start(MECHANISM, first) == USER
    answer = accepting.challenge(verifier(), DIGEST) + ",z=new"
    accepting._server_first = answer
    connecting.challenge(answer, DIGEST)
    final = connecting.final(derive(PASSWORD, SALT, ITERATIONS))
    connecting.verify(accepting.final(final) + ",y=new")

    # One that somebody adds on the way is under the proof.
    with pytest.raises(AuthenticationError, match="wrong user name or password"):
        log_in(client(), server(), change=lambda step, text: text + ",x=new" * (step in (1, 2)))
    with pytest.raises(AuthenticationError, match="wrong user name or password"):
        log_in(client(), server(), change=lambda _, text: text.replace(",p=", ",x=new,p="))


# --- server-first -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "malformed"),
        ("e=other-error", "server refused the login: 'other-error'"),
        ("e=\n\x1b[2J\ud800" + "x" * 4000, "server refused the login"),
        (f"m=new,{SERVER_FIRST}", "demands an extension"),
        (f"{SERVER_FIRST},m=new", "demands an extension"),
        (f"{SERVER_FIRST},i=1", "malformed"),
        (f"{SERVER_FIRST},x=\udc80", "malformed"),
        (f"s={SALT64},r={NONCE},i=64,d={DIGEST}", "attributes are 'srid'"),
        (f"r={NONCE},i=64,s={SALT64},d={DIGEST}", "attributes are 'risd'"),
        (f"r={NONCE},s={SALT64},d={DIGEST},i=64", "attributes are 'rsdi'"),
        (f"r={NONCE},s={SALT64}", "attributes are 'rs'"),
        (f"r={NONCE},i=64", "attributes are 'ri'"),
        (f"s={SALT64},i=64", "attributes are 'si'"),
        (f"r={SERVER_NONCE}{CLIENT_NONCE},s={SALT64},i=64", "nonce"),
        (f"r={CLIENT_NONCE},s={SALT64},i=64", "nonce"),
        (f"r={CLIENT_NONCE}{'x' * 17},s={SALT64},i=64", "nonce"),
        (f"r={CLIENT_NONCE.lower()}{SERVER_NONCE},s={SALT64},i=64", "nonce"),
        (f"r={CLIENT_NONCE}{'x' * 17} ,s={SALT64},i=64", "nonce"),
        (f"r={CLIENT_NONCE}{'ä' * 18},s={SALT64},i=64", "nonce"),
        (f"r={CLIENT_NONCE}{'x' * 233},s={SALT64},i=64", "nonce"),
        (f"r={NONCE},s={SALT64},i=64", "downgrade detected"),
        (f"r={NONCE},s={SALT64},i=64,d=", "malformed"),
        (f"r={NONCE},s={SALT64},i=64,d=ä", "downgrade detected"),
        (f"r={NONCE},s={SALT64},i=64,d={DIGEST[:-1]}", "downgrade detected"),
        (f"r={NONCE},s={SALT64},i=64,D={DIGEST}", "downgrade detected"),
        (SERVER_FIRST.replace(DIGEST, transcript_digest(1, b"", b"")), "downgrade detected"),
        (SERVER_FIRST.replace("=64", "="), "malformed"),
        (SERVER_FIRST.replace("=64", "=0"), "asks for '0' iterations"),
        (SERVER_FIRST.replace("=64", "=064"), "asks for '064' iterations"),
        (SERVER_FIRST.replace("=64", "=+64"), "iterations"),
        (SERVER_FIRST.replace("=64", "=6_4"), "iterations"),
        (SERVER_FIRST.replace("=64", "= 64"), "iterations"),
        (SERVER_FIRST.replace("=64", "=64.0"), "iterations"),
        (SERVER_FIRST.replace("=64", "=٦٤"), "iterations"),
        (SERVER_FIRST.replace("=64", "=" + "9" * 5000), "iterations"),
        (SERVER_FIRST.replace("=64", "=2000001"), "max_iterations=2000000"),
        (SERVER_FIRST.replace("gQ==", "gR=="), "canonical base64"),
        (SERVER_FIRST.replace("gQ==", "gQ"), "canonical base64"),
        (SERVER_FIRST.replace("gQ==", "gQ=="[:-1]), "canonical base64"),
        (SERVER_FIRST.replace("W22Z", "W2 Z"), "canonical base64"),
        (SERVER_FIRST.replace("W22Z", "W2-_"), "canonical base64"),
        (SERVER_FIRST.replace("W22Z", "W2äZ"), "canonical base64"),
        (SERVER_FIRST.replace(SALT64, base64.b64encode(bytes(11)).decode()), "11 bytes"),
        (SERVER_FIRST.replace(SALT64, base64.b64encode(bytes(65)).decode()), "65 bytes"),
    ],
)
def test_server_first_refused(text, error):
    with pytest.raises(AuthenticationError, match=error) as caught:
        challenged_client(text)
    assert caught.value.code == ("refused" if text.startswith("e=") else "untrusted_server")
    assert str(caught.value).isascii()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("size", [18, 256 - len(CLIENT_NONCE)])
def test_nonces_at_the_limits(size):
    text = SERVER_FIRST.replace(SERVER_NONCE, "x" * size)
    assert challenged_client(text).iterations == ITERATIONS


@pytest.mark.parametrize("size", [12, 64])
def test_salts_at_the_limits(size):
    salt = base64.b64encode(bytes(size)).decode()
    assert challenged_client(SERVER_FIRST.replace(SALT64, salt)).salt == bytes(size)


@pytest.mark.parametrize("iterations", [100_000, 2_000_000])
def test_iterations_at_the_limits(iterations):
    text = SERVER_FIRST.replace("i=64", f"i={iterations}")
    side = ClientScram(USER, CLIENT_NONCE)
    side.first()
    side.challenge(text, DIGEST)
    assert side.iterations == iterations


@pytest.mark.parametrize("iterations", [4096, 99_999, 2_000_001])
def test_iterations_beyond_the_limits(iterations):
    side = ClientScram(USER, CLIENT_NONCE)
    side.first()
    with pytest.raises(AuthenticationError, match=f"asks for '{iterations}' iterations"):
        side.challenge(SERVER_FIRST.replace("i=64", f"i={iterations}"), DIGEST)


def test_the_limits_can_be_set_but_never_to_no_iterations():
    assert challenged_client(min_iterations=64, max_iterations=64).iterations == 64
    for low, high in ((65, 100), (1, 63)):
        with pytest.raises(AuthenticationError, match="asks for '64' iterations"):
            challenged_client(min_iterations=low, max_iterations=high)
    with pytest.raises(AuthenticationError, match="asks for 'x' iterations"):
        challenged_client(SERVER_FIRST.replace("i=64", "i=x"), min_iterations=0)


def test_digest_that_was_made_to_fit_fails_at_the_proof():
    """A man in the middle who changes the request has to change `d` as well."""
    forged = transcript_digest(1, b"another request", b"caps")

    def change(step, text):
        return text.replace(forged, DIGEST) if step == 2 else text

    connecting, accepting = client(), server()
    accepting.start(MECHANISM, connecting.first())
    connecting.challenge(change(2, accepting.challenge(verifier(), forged)), DIGEST)
    with pytest.raises(AuthenticationError, match="wrong user name or password"):
        accepting.final(connecting.final(derive(PASSWORD, SALT, ITERATIONS)))


# --- client-final -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda text: "", "bad_request"),
        (lambda text: text.rpartition(",p=")[0], "bad_request"),
        (lambda text: text.partition(",")[2], "bad_request"),
        (lambda text: text + ",x=y", "bad_request"),
        (lambda text: text + ",", "bad_request"),
        (lambda text: "m=new," + text, "bad_request"),
        (lambda text: text.replace(",p=", ",m=new,p="), "bad_request"),
        (lambda text: text.replace(",p=", ",r=other,p="), "bad_request"),
        (lambda text: ",".join(text.split(",")[i] for i in (1, 0, 2)), "bad_request"),
        (lambda text: text.replace("c=biws", "c=biw"), "bad_request"),
        (lambda text: text.replace("c=biws", "c="), "bad_request"),
        (lambda text: text[:-1], "bad_request"),
        (lambda text: text.rpartition(",p=")[0] + ",p=cHJvb2Y=", "bad_request"),
        (lambda text: text.rpartition(",p=")[0] + f",p={KEY64[:-4]}AAAAAA==", "bad_request"),
        (lambda text: text + "\udc00", "bad_request"),
        (lambda text: text.replace("c=biws", "c=eSws"), "invalid_credentials"),
        (lambda text: text.replace("c=biws", "c=biwsAA=="), "invalid_credentials"),
        (lambda text: text.replace(SERVER_NONCE, "x" * 24), "invalid_credentials"),
        (lambda text: text.replace(SERVER_NONCE, "ä"), "invalid_credentials"),
        (lambda text: text.replace(NONCE, CLIENT_NONCE), "invalid_credentials"),
        (lambda text: text.replace(NONCE, NONCE + "x"), "invalid_credentials"),
        (lambda text: text.rpartition(",p=")[0] + f",p={KEY64}", "invalid_credentials"),
        (lambda text: text.replace(",p=", ",x=y,p="), "invalid_credentials"),
    ],
)
def test_client_final_refused(change, code):
    _, text = proved_client()
    with pytest.raises(AuthenticationError) as caught:
        challenged_server().final(change(text))
    assert caught.value.code == code
    if code == "invalid_credentials":
        assert str(caught.value) == "wrong user name or password"


def test_a_proof_for_another_nonce_is_refused_although_it_is_right():
    """The server must compare the nonce, and not only the proof over it (CVE-2024-56128)."""
    _, text = proved_client()
    accepting = challenged_server()
    accepting._nonce = CLIENT_NONCE + "y" * 24  # all that is left of the check is the comparison
    with pytest.raises(AuthenticationError, match="wrong user name or password"):
        accepting.final(text)


def test_a_proof_is_not_good_for_a_second_login():
    _, text = proved_client()
    assert challenged_server().final(text).startswith("v=")
    again = ServerScram("z" * 24, mock_secret=MOCK_SECRET)
    again.start(MECHANISM, client().first())
    again.challenge(verifier(), DIGEST)
    with pytest.raises(AuthenticationError, match="wrong user name or password"):
        again.final(text)


def test_another_binding_is_a_wrong_password():
    """Somebody with another certificate is in between."""
    with pytest.raises(AuthenticationError) as caught:
        log_in(client(binding=bytes(32)), server(binding=BINDING))
    assert str(caught.value) == "wrong user name or password"
    assert caught.value.code == "invalid_credentials"


def test_the_offer_of_a_binding_was_taken_away():
    with pytest.raises(AuthenticationError, match="downgrade detected") as caught:
        log_in(client(can_bind=True), server(binding=BINDING))
    assert caught.value.code == "invalid_credentials"
    # Whoever rewrites the flag as well breaks the proof.
    with pytest.raises(AuthenticationError, match="wrong user name or password"):
        log_in(
            client(can_bind=True),
            server(binding=BINDING),
            change=lambda step, text: "n" + text[1:] if step == 1 else text,
        )


# --- users who do not exist -------------------------------------------------------------------


def mock_challenge(user: str, **options) -> str:
    side = server(**options)
    side.start(MECHANISM, client(user).first())
    return side.challenge(None, None)


def test_a_mock_user_has_a_stable_salt():
    assert mock_challenge("nobody") == mock_challenge("nobody")
    others = {
        mock_challenge("nobody"),
        mock_challenge("somebody"),
        mock_challenge("nobody", mock_secret=b"n" * 32),
        mock_challenge("nobody", mock_iterations=65),
    }
    assert len(others) == 4
    assert mock_challenge("e\u0301ve") == mock_challenge("éve")


def test_a_mock_user_keeps_the_salt_when_the_library_is_renewed():
    """Who does not exist would be told apart by a salt that changes."""
    assert mock_challenge("nobody").split(",")[1] == "s=7gDDIdeyXMIS+rgExqKtBw=="


@pytest.mark.parametrize("mock", [{}, {"mock_iterations": 600_000, "mock_salt_bytes": 24}])
def test_a_mock_token_is_asked_for_what_a_token_is(mock):
    _, salt, iterations = mock_challenge("cnd_nobody", **mock).split(",")
    assert (len(base64.b64decode(salt[2:])), iterations) == (16, "i=4096")


def test_a_mock_user_looks_like_a_real_one():
    known = server()
    known.start(MECHANISM, client().first())
    real, mock = known.challenge(verifier(), None), mock_challenge("nobody")
    assert [len(part) for part in real.split(",")] == [len(part) for part in mock.split(",")]
    assert real.split(",")[::2] == mock.split(",")[::2]


def test_an_unknown_user_fails_like_a_wrong_password():
    def failure(user: str, password: str) -> tuple[str, str]:
        with pytest.raises(AuthenticationError) as caught:
            log_in(client(user), server(), password=password)
        return str(caught.value), caught.value.code

    wrong = failure(USER, "pencils")
    assert wrong == ("wrong user name or password", "invalid_credentials")
    assert failure("nobody", PASSWORD) == wrong
    assert failure("nobody", "pencils") == wrong


def test_an_unknown_user_fails_even_with_a_right_proof(monkeypatch):
    monkeypatch.setattr(ServerScram, "_mock_verifier", lambda self: verifier())
    with pytest.raises(AuthenticationError, match="wrong user name or password"):
        log_in(client("nobody"), server())


# --- server-final -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "error", "code"),
    [
        ("", "malformed", "untrusted_server"),
        ("v=", "malformed", "untrusted_server"),
        ("v=AAAA", "did not prove", "untrusted_server"),
        (f"v={KEY64}", "did not prove", "untrusted_server"),
        (f"v={KEY64[:-1]}", "canonical base64", "untrusted_server"),
        (f"x=y,v={KEY64}", "attributes are 'xv'", "untrusted_server"),
        (f"v={KEY64},m=new", "demands an extension", "untrusted_server"),
        (f"v={KEY64},v={KEY64}", "malformed", "untrusted_server"),
        ("v=\ud912", "malformed", "untrusted_server"),
        ("e=invalid-proof", "server refused the login: 'invalid-proof'", "refused"),
    ],
)
def test_server_final_refused(text, error, code):
    side, _ = proved_client()
    with pytest.raises(AuthenticationError, match=error) as caught:
        side.verify(text)
    assert caught.value.code == code


def test_a_server_that_only_repeats_the_proof_is_refused():
    side, text = proved_client()
    with pytest.raises(AuthenticationError, match="did not prove"):
        side.verify("v=" + text.rpartition(",p=")[2])


# --- everything else --------------------------------------------------------------------------


@pytest.mark.parametrize("binding", [None, BINDING], ids=["plain", "bound"])
@pytest.mark.parametrize("digest", [None, DIGEST], ids=["without", "with"])
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_every_changed_bit_is_refused(step, binding, digest):
    sent = {}

    def note(number, text):
        sent[number] = text.encode()
        return text

    log_in(client(binding=binding), server(binding=binding), digest=digest, change=note)
    bits = 8 * len(sent[step])
    for bit in range(bits):
        changed = bytearray(sent[step])
        changed[bit // 8] ^= 1 << bit % 8
        try:
            text = changed.decode()
        except UnicodeDecodeError:
            continue  # no text at all: it never comes as far as this module

        def change(number, original, text=text):
            return text if number == step else original

        with pytest.raises(AuthenticationError):
            log_in(client(binding=binding), server(binding=binding), digest=digest, change=change)


ANYTHING = st.text(alphabet=st.characters())
VALUES = ANYTHING | st.sampled_from(
    [USER, CLIENT_NONCE, NONCE, SALT64, KEY64, DIGEST, "biws", "64", "a=2Cb", ""]
)
LISTS = st.lists(st.tuples(st.sampled_from("nrsicpvdemaxA"), VALUES), max_size=6).map(
    lambda pairs: ",".join(f"{name}={value}" for name, value in pairs)
)
HEADERS = st.sampled_from(["n,,", "y,,", P + ",,", "p=x,,", "n,a=b,", "n,", ""])


def edited(original: str):
    """Texts that differ from `original` in one stretch."""
    places = st.integers(0, len(original))
    return st.builds(
        lambda start, stop, put: original[:start] + put + original[stop:], places, places, VALUES
    )


def accepts_or_refuses(step: Callable[..., object], *arguments: object) -> None:
    try:
        step(*arguments)
    except AuthenticationError as error:
        assert str(error).isascii()
        assert PASSWORD not in str(error)


@settings(deadline=None)
@given(
    st.sampled_from([MECHANISM, MECHANISM_PLUS]) | ANYTHING,
    ANYTHING | edited(client().first()) | st.builds(str.__add__, HEADERS, LISTS),
    st.sampled_from([None, BINDING]),
)
def test_start_with_any_text(mechanism, text, binding):
    accepts_or_refuses(server(binding=binding).start, mechanism, text)


@settings(deadline=None)
@given(ANYTHING | edited(SERVER_FIRST) | LISTS, st.sampled_from([None, DIGEST]))
def test_challenge_with_any_text(text, digest):
    side = client()
    side.first()
    accepts_or_refuses(side.challenge, text, digest)


@settings(deadline=None)
@given(ANYTHING | edited(proved_client()[1]) | LISTS)
def test_final_with_any_text(text):
    accepts_or_refuses(challenged_server().final, text)


@settings(deadline=None)
@given(ANYTHING | edited(f"v={KEY64}") | LISTS)
def test_verify_with_any_text(text):
    accepts_or_refuses(proved_client()[0].verify, text)


@settings(deadline=None, max_examples=50)
@given(
    password=st.text(min_size=1, max_size=20),
    binding=st.none() | st.binary(min_size=1, max_size=64),
    iterations=st.integers(1, 50),
)
def test_any_password_logs_in_and_another_does_not(password, binding, iterations):
    try:
        made = Verifier.from_password(password, salt=SALT, iterations=iterations)
    except ValueError:
        return
    for tried, succeeds in ((password, True), (password + "x", False)):
        connecting, accepting = client(binding=binding), server(binding=binding)
        accepting.start(connecting.mechanism, connecting.first())
        connecting.challenge(accepting.challenge(made, DIGEST), DIGEST)
        proof = connecting.final(derive_keys(tried, connecting.salt, connecting.iterations))
        if succeeds:
            connecting.verify(accepting.final(proof))
        else:
            with pytest.raises(AuthenticationError):
                accepting.final(proof)


def test_keys_of_another_password_do_not_verify_the_server():
    """A client with the right ClientKey alone: the server's signature needs the other key."""
    right = derive(PASSWORD, SALT, ITERATIONS)
    connecting, accepting = client(), server()
    accepting.start(MECHANISM, connecting.first())
    connecting.challenge(accepting.challenge(verifier(), DIGEST), DIGEST)
    answer = accepting.final(connecting.final(Keys(right.client_key, bytes(32))))
    with pytest.raises(AuthenticationError, match="did not prove"):
        connecting.verify(answer)
