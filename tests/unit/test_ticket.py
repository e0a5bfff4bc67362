"""Tickets and claims: whoever holds a ticket can claim it for itself, and nothing else is taken for a claim."""

from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dugnad.dht.delegation import Delegation, delegate
from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.identity import verify as verify
from dugnad.dht.ticket import CLAIM_BYTES, Claim, Terms, Ticket, claim, expired, issue, parse_claim
from dugnad.dht.wire import WireError

RUN, OTHER_RUN = b"r" * 32, b"s" * 32
ORGANIZER, STRANGER, COORDINATOR, KEY, ANN, EVE = (Identity.from_seed(bytes([k]) * 32) for k in range(1, 7))


def a_ticket(
    by: Identity = ORGANIZER, *, run: bytes = RUN, delegation: Delegation | None = None, **terms: object
) -> Ticket:
    return issue(by, run, KEY.peer_id, Terms(**terms), delegation)  # type: ignore[arg-type]


def read(raw: bytes) -> Claim:
    return parse_claim(raw, RUN, ORGANIZER.peer_id, verify)


def reason(raw: bytes) -> str:
    with pytest.raises(WireError) as caught:
        read(raw)
    return caught.value.reason


def forged(ticket: Ticket, peer: Identity = ANN, **changed: object) -> bytes:
    """A claim to a ticket that was changed after it was signed; the claim itself is signed by the ticket's key."""
    return claim(msgspec.structs.replace(ticket, **changed), KEY, peer.peer_id)


def test_who_holds_a_ticket_claims_it_for_itself() -> None:
    ticket = a_ticket(expires=1_800_000_000, until=1_900_000_000, uses=20)
    said = read(claim(ticket, KEY, ANN.peer_id))
    assert (said.ticket, said.peer) == (ticket, ANN.peer_id)
    assert said.ticket.terms == Terms(expires=1_800_000_000, until=1_900_000_000, uses=20)


def test_a_delegate_gives_out_tickets_that_end_before_its_delegation() -> None:
    seat = delegate(ORGANIZER, RUN, COORDINATOR.peer_id, 1, 1_800_000_000)
    ticket = a_ticket(COORDINATOR, delegation=seat, expires=1_700_000_000)
    assert read(claim(ticket, KEY, ANN.peer_id)).ticket == ticket
    with pytest.raises(ValueError, match="longer than the delegation"):
        a_ticket(COORDINATOR, delegation=seat)
    assert reason(forged(ticket, expires=1_900_000_000)) == "altered ticket"


@dataclass(frozen=True)
class Case:
    raw: bytes
    reason: str


SEAT = delegate(ORGANIZER, RUN, COORDINATOR.peer_id, 1, 1_800_000_000)
NOT_HIS = delegate(STRANGER, RUN, COORDINATOR.peer_id, 1, 1_800_000_000)
BOUND = a_ticket(bound=ANN.peer_id)
GOOD = claim(a_ticket(uses=2), KEY, ANN.peer_id)
REPLAYED = msgspec.msgpack.encode(msgspec.structs.replace(read(GOOD), peer=EVE.peer_id))
CASES = {
    "of another run": Case(claim(a_ticket(run=OTHER_RUN), KEY, ANN.peer_id), "foreign ticket"),
    "of another organizer": Case(claim(a_ticket(STRANGER), KEY, ANN.peer_id), "altered ticket"),
    "more uses": Case(forged(a_ticket(uses=1), uses=0), "altered ticket"),
    "a later expiry": Case(forged(a_ticket(expires=5), expires=6), "altered ticket"),
    "a longer membership": Case(forged(a_ticket(until=5), until=0), "altered ticket"),
    "another role": Case(forged(a_ticket(roles=("keeper",)), roles=("volunteer",)), "altered ticket"),
    "unbound": Case(forged(BOUND, bound=PeerId("")), "altered ticket"),
    "bound to another": Case(claim(BOUND, KEY, EVE.peer_id), "ticket bound to another key"),
    "a stranger's delegate": Case(
        claim(a_ticket(COORDINATOR, delegation=NOT_HIS, expires=5), KEY, ANN.peer_id), "altered ticket"
    ),
    "not the delegate": Case(claim(a_ticket(STRANGER, delegation=SEAT, expires=5), KEY, ANN.peer_id), "altered ticket"),
    "claimed by another's claim": Case(REPLAYED, "bad claim"),
    "claimed without its key": Case(claim(a_ticket(), EVE, EVE.peer_id), "bad claim"),
    "too large": Case(b"x" * (CLAIM_BYTES + 1), "too large"),
    "nothing": Case(b"", "malformed"),
    "in another encoding": Case(b"\xdc\x00\x03" + GOOD[1:], "malformed"),
    "cut off": Case(GOOD[:-1], "malformed"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_is_not_right_is_refused_with_its_own_reason(case: Case) -> None:
    assert reason(case.raw) == case.reason


def test_a_ticket_is_one_however_often_and_by_whom_it_was_signed() -> None:
    seat = delegate(ORGANIZER, RUN, COORDINATOR.peer_id, 1)
    assert a_ticket(uses=2).id == a_ticket(COORDINATOR, delegation=seat, uses=2).id != a_ticket(uses=3).id


def test_a_ticket_expires_at_its_moment_or_never() -> None:
    assert not expired(a_ticket(expires=100), 99.9)
    assert expired(a_ticket(expires=100), 100.0)
    assert not expired(a_ticket(), 1e12)


@pytest.mark.parametrize("terms", [{"uses": -1}, {"roles": ()}, {"roles": ("A B",)}, {"expires": -5}])
def test_terms_that_nobody_would_accept_are_not_signed(terms: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="no such ticket"):
        a_ticket(ORGANIZER, **terms)  # type: ignore[arg-type]


@given(st.binary(max_size=CLAIM_BYTES + 10))
def test_bytes_of_a_stranger_are_refused_and_nothing_else_happens(raw: bytes) -> None:
    with pytest.raises(WireError):
        read(raw)


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_claim_of_which_one_byte_was_changed_is_refused(at: int, by: int) -> None:
    changed = GOOD[:at] + bytes([GOOD[at] ^ by]) + GOOD[at + 1 :]
    with pytest.raises(WireError):
        read(changed)
