"""Invites: read back as written; a damaged one says what happened to it."""

import base64

import msgspec
import pytest
from blake3 import blake3
from hypothesis import example, given
from hypothesis import strategies as st

from dugnad.dht.identity import Identity, verify
from dugnad.dht.invite import Invite, InviteError, Pass, check, encode_invite, parse_invite
from dugnad.dht.ticket import Terms, parse_claim

PEER = Identity.from_seed(b"p" * 32)
ADDRESS = f"/ip4/203.0.113.7/tcp/4001/p2p/{PEER.peer_id}"
ORGANIZER = Identity.from_seed(b"o" * 32)


def a_pass(run: bytes = b"r" * 32, *, by: Identity = ORGANIZER, **terms: object) -> Pass:
    return Pass.issue(by, run, b"t" * 32, Terms(**terms))  # type: ignore[arg-type]


EXPIRING = a_pass(expires=1_795_132_800)
INVITE = Invite(b"r" * 32, ORGANIZER.public_key, (ADDRESS,), "tiny-books", EXPIRING)
TEXT = encode_invite(INVITE)
keys = st.binary(min_size=32, max_size=32)
names = st.from_regex(r"\A[a-z0-9]{1,9}(-[a-z0-9]{1,9}){0,3}\Z")
addresses = st.lists(st.sampled_from([ADDRESS, f"/dns4/example.org/tcp/1{ADDRESS}"]), min_size=1, max_size=16)


def failure(text: str) -> InviteError:
    with pytest.raises(InviteError) as caught:
        parse_invite(text)
    return caught.value


def text_of(body: bytes) -> str:
    """The text of an invite with any content, its length and checksum right."""
    num_characters = 8 + -(-(len(body) + 6) * 8 // 5)
    checked = num_characters.to_bytes(2) + body
    return "dugnad1:" + base64.b32encode(checked + blake3(checked).digest(length=4)).decode().lower().rstrip("=")


@given(keys, keys, addresses, names, st.none() | st.integers(0, 253_402_300_799))
def test_what_was_written_is_what_is_read(
    run: bytes, organizer: bytes, at: list[str], name: str, until: int | None
) -> None:
    ticket = None if until is None else a_pass(run, until=until, uses=3, bound=PEER.peer_id)
    invite = Invite(run, organizer, tuple(at), name, ticket)
    assert parse_invite(encode_invite(invite)) == invite


def test_case_and_white_space_do_not_matter() -> None:
    wrapped = "\n ".join(TEXT[start : start + 60] for start in range(0, len(TEXT), 60))
    assert parse_invite(f"  {wrapped}\r\n") == INVITE
    assert parse_invite(TEXT.upper()) == INVITE
    assert parse_invite(f"dugnad join {TEXT}") == INVITE


def test_an_invite_cut_off_anywhere_says_so_and_how_much_is_missing() -> None:
    for end in range(len("dugnad1:"), len(TEXT)):
        error = failure(TEXT[:end])
        assert error.code == "E101"
        assert "it ends early (" in str(error)
        if end >= 12:  # the length is in the first four characters
            assert f"({end} of {len(TEXT)} characters)" in str(error)


def test_the_message_of_a_cut_off_invite_is_word_for_word_what_users_were_promised() -> None:
    assert str(failure(TEXT[:137])) == (
        f"E101 invite not readable: it ends early (137 of {len(TEXT)} characters). "
        "Copy it again; it starts with dugnad1: and ends with a checksum."
    )


def test_an_expired_invite_says_when_it_expired() -> None:
    assert EXPIRING.expires == 1_795_132_800
    check(INVITE, PEER.peer_id, now=1_795_132_799.9)
    with pytest.raises(InviteError) as caught:
        check(INVITE, PEER.peer_id, now=1_795_132_800.0)
    assert caught.value.code == "E102"
    assert str(caught.value) == "E102 invite expired on 2026-11-20. Ask the organizer for a new one."


def test_an_invite_without_expiry_never_expires() -> None:
    check(msgspec.structs.replace(INVITE, ticket=a_pass()), PEER.peer_id, now=1e12)
    check(msgspec.structs.replace(INVITE, ticket=None), PEER.peer_id, now=1e12)


def test_whoever_has_the_invite_claims_its_ticket_in_its_own_name() -> None:
    said = parse_claim(parse_invite(TEXT).claim(PEER.peer_id), INVITE.run, ORGANIZER.peer_id, verify)
    assert (said.peer, said.ticket.expires) == (PEER.peer_id, 1_795_132_800)
    assert msgspec.structs.replace(INVITE, ticket=None).claim(PEER.peer_id) == b""


@pytest.mark.parametrize(
    ("ticket", "why"),
    [
        (a_pass(bound=ORGANIZER.peer_id), "this invite is for another key, "),
        (a_pass(by=PEER), "altered ticket"),
        (msgspec.structs.replace(a_pass(uses=1), uses=0), "altered ticket"),
        (a_pass(b"s" * 32), "altered ticket"),
    ],
)
def test_an_invite_with_a_ticket_that_is_not_for_us_is_refused_before_we_join(ticket: Pass, why: str) -> None:
    with pytest.raises(InviteError, match=why) as caught:
        check(msgspec.structs.replace(INVITE, ticket=ticket), PEER.peer_id, now=0.0)
    assert caught.value.code == "E401"
    assert PEER.peer_id in str(caught.value), "to be sent to the organizer"


def test_any_changed_character_is_noticed() -> None:
    for position in range(len(TEXT)):
        for other in "a7":
            if TEXT[position] != other:
                assert failure(TEXT[:position] + other + TEXT[position + 1 :]).code == "E101"


def test_a_changed_character_is_called_that() -> None:
    changed = TEXT[:-30] + ("a" if TEXT[-30] != "a" else "b") + TEXT[-29:]
    assert "its checksum is wrong, so a character was changed" in str(failure(changed))


def test_extra_characters_are_counted() -> None:
    assert f"too long ({len(TEXT) + 5} characters instead of {len(TEXT)})" in str(failure(TEXT + "abcde"))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is empty"),
        (" \n", "it is empty"),
        ("https://example.org", "it starts with 'https://'"),
        ("dugnad2:aaaa", "it starts with 'dugnad2:'"),
        ("dugnad1:", "it ends early (after 8 characters)"),
        (TEXT[:20] + "!" + TEXT[21:], "character 21 is '!', which no invite contains"),
        (TEXT[:20] + "é" + TEXT[21:], "character 21 is 'é', which no invite contains"),
    ],
)
def test_what_is_no_invite_is_told_why(text: str, why: str) -> None:
    error = failure(text)
    assert error.code == "E101"
    assert f"E101 invite not readable: {why}. Copy it again" in str(error)


PASS = [b"t" * 32, ["volunteer"], 0, 0, 0, "", None, b"s" * 64]
FIELDS: list[object] = [b"r" * 32, b"o" * 32, [ADDRESS], "tiny-books", PASS]


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0, b"r" * 31),
        (1, b"o" * 33),
        (2, []),
        (2, [ADDRESS] * 17),
        (2, ["/ip4/203.0.113.7/tcp/4001"]),
        (2, ["/ip4/203.0.113.7/tcp/4001/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"]),
        (2, [f"/dns4/{'a' * 256}{ADDRESS}"]),
        (2, [ADDRESS.replace("/tcp", " /tcp")]),
        (3, "../../home"),
        (3, ""),
        (3, "a" * 65),
        (4, 0),
        (4, PASS[:-1]),
        (4, [b"t" * 31, *PASS[1:]]),
        (4, [b"t" * 32, [], *PASS[2:]]),
        (4, [b"t" * 32, ["volunteer"], -1, *PASS[3:]]),
        (4, [b"t" * 32, ["volunteer"], 0, 2**60, *PASS[4:]]),
    ],
)
def test_fields_out_of_their_bounds_are_refused_though_the_checksum_is_right(index: int, value: object) -> None:
    fields = [*FIELDS[:index], value, *FIELDS[index + 1 :]]
    assert failure(text_of(msgspec.msgpack.encode(fields))).code == "E101"


def test_an_invite_has_one_text_only() -> None:
    body = msgspec.msgpack.encode(FIELDS)
    assert parse_invite(text_of(body)).name == "tiny-books"
    assert failure(text_of(body.replace(b"volunteer\0", b"volunteer\xcc\0"))).code == "E101"  # zero in two bytes
    assert failure(text_of(msgspec.msgpack.encode([*FIELDS, 1]))).code == "E101"


@given(st.text(max_size=300), st.booleans())
@example("\x00" * 20_000, True)
@example("a" * 20_000, True)
def test_garbage_is_an_invite_error(text: str, with_prefix: bool) -> None:
    assert failure("dugnad1:" * with_prefix + text).code == "E101"


@given(st.text("abcdefghijklmnopqrstuvwxyz234567", max_size=300))
def test_garbage_in_the_right_alphabet_is_an_invite_error(text: str) -> None:
    assert failure(f"dugnad1:{text}").code == "E101"


def test_writing_an_invite_that_none_could_read_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="not an invite"):
        encode_invite(Invite(b"short", b"o" * 32, (ADDRESS,), "tiny-books"))
    with pytest.raises(ValueError, match="peer id"):
        Invite(b"r" * 32, b"o" * 32, ("/ip4/203.0.113.7/tcp/4001",), "tiny-books")
