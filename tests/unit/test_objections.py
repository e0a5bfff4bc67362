"""What voters object to; and that an honest leader makes nothing such of any claims, if each step keeps to its time."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from dugnad.coordinator.admission import GRACE_S
from dugnad.coordinator.ledger import Ledger
from dugnad.coordinator.messages import Block
from dugnad.dht.delegation import Delegation, delegate
from dugnad.dht.identity import PeerId
from tests.unit.chains import FOUNDER, ORGANIZER, RUN, SEAT, SIGNER, FakeSigner, a_block, committee
from tests.unit.test_roll import INVITED, NOW, Now, a_round, a_ticket, grow, shown

ROUND_S = 100.0
"""What `Now` allows for a round."""
PEERS = [PeerId(peer) for peer in "abcdef"]
TICKETS = st.builds(
    a_ticket,
    until=st.sampled_from([0, NOW + 5, NOW + 20, NOW + 110, NOW + 1000]),
    expires=st.sampled_from([0, NOW - 1000, NOW + 5, NOW + 20, NOW + 1000]),
    uses=st.sampled_from([0, 1, 3]),
)
DECISIONS = st.tuples(
    st.sampled_from([-1000.0, -116.0, -16.0, -1.0, 1.0, 10.0, 50.0, 110.0]),
    st.sampled_from(["ban", "unban", "revoke"]),
    st.sampled_from([5.0, 130.0, float("inf")]),
)
"""How long after `NOW`, what, and for how long."""


class Knowledge:
    """What all know at a moment, and the block that a leader makes of it."""

    def __init__(self, ledger: Ledger, claims: dict[PeerId, bytes], decisions: Sequence[tuple[float, str, str, float]]):
        self.now = Now(ledger)
        self.ledger, self.claims, self.to_come = ledger, claims, sorted(decisions)

    def at(self, after_s: float) -> None:
        """It is so long after `NOW`, and all that was decided until then is known."""
        while self.to_come and self.to_come[0][0] <= after_s:
            moment, verdict, subject, lasts_s = self.to_come.pop(0)
            self.now.at_s = NOW + moment
            self.now.decide(verdict, subject, lasts_s=lasts_s)
        self.now.at_s = NOW + after_s

    def barred(self) -> frozenset[PeerId]:
        return self.now.admission.barred(None, lambda peer: self.claims.get(peer, b""))


# -- who is to vote next


def a_block_of(ledger: Ledger, *, works: str, votes: str, seat: Delegation | None = SEAT) -> Block:
    block = a_round(ledger, works) if works else a_block(ledger.head, seat=seat)
    return replace(block, committee=committee(*votes, seat=seat), coordinator=seat)


@pytest.fixture
def now() -> Now:
    """In an invited run of a, b and c, in which nobody's time is over."""
    ledger = Ledger(INVITED, SIGNER)
    grow(ledger, "abc", *(shown(peer) for peer in "abc"))
    return Now(ledger)


@pytest.mark.parametrize("works", ["a", ""])
def test_nobody_votes_next_who_was_banned_before_every_leader_heard_of_it(now: Now, works: str) -> None:
    kept, alone = (a_block_of(now.ledger, works=works, votes=votes, seat=None) for votes in ("ab", "b"))
    now.decide("ban", "b")
    now.at_s += GRACE_S - 1
    assert now.objects(alone, PeerId("b")) is None
    now.at_s += 1
    assert now.objects(kept) == now.objects(alone, PeerId("b")) == "b is to vote next, and is banned"


def test_nobody_gets_the_coordinators_seat_whose_delegation_is_over(now: Now) -> None:
    seat = delegate(FakeSigner(ORGANIZER), RUN, FOUNDER, 2, NOW)
    blocks = [a_block_of(now.ledger, works=works, votes="a", seat=seat) for works in ("a", "")]
    now.at_s += GRACE_S - 1
    assert [now.objects(block) for block in blocks] == [None, None]
    now.at_s += 1
    assert all("its delegation was over on 2023-11-14" in str(now.objects(block)) for block in blocks)


def test_with_a_round_only_those_stay_who_worked_the_coordinator_or_the_last_leader(now: Now) -> None:
    assert now.objects(a_block_of(now.ledger, works="ab", votes="a")) is None
    why = "c is to vote next, and did not contribute"
    assert now.objects(a_block_of(now.ledger, works="ab", votes="abc")) == why
    alone = a_block_of(now.ledger, works="ab", votes="c", seat=None)
    assert now.objects(alone, PeerId("c")) is None
    assert now.objects(alone, FOUNDER) == why


def test_between_rounds_whose_membership_is_over_may_stay_for_it_may_show_a_claim(now: Now) -> None:
    grow(now.ledger, "abd", shown("d", a_ticket(until=NOW)))
    now.at_s += 1000
    assert now.objects(a_block_of(now.ledger, works="", votes="ad")) is None


# -- any claims


@given(st.data())
def test_no_voter_objects_to_what_an_honest_leader_makes_of_any_claims(data: st.DataObject) -> None:
    tickets = data.draw(st.lists(TICKETS, min_size=3, max_size=3, unique_by=lambda ticket: ticket.id))
    by_ticket = st.dictionaries(st.sampled_from(PEERS), st.sampled_from(tickets))
    ledger = Ledger(INVITED, SIGNER)
    for peer, ticket in sorted(data.draw(by_ticket).items()):
        if not ticket.uses or ledger.head.roll.uses.get(ticket.id, 0) < ticket.uses:
            grow(ledger, peer, shown(peer, ticket))
    claims = {peer: shown(peer, ticket) for peer, ticket in data.draw(by_ticket).items()}
    subjects = st.sampled_from([*PEERS, *(ticket.id.hex() for ticket in tickets)])
    said = data.draw(st.lists(st.tuples(DECISIONS, subjects), max_size=4, unique_by=lambda one: (one[0][0], one[1])))
    world = Knowledge(ledger, claims, [(at_s, verdict, on, lasts_s) for (at_s, verdict, lasts_s), on in said])

    frozen_s = data.draw(st.sampled_from([0.0, 4.0, 19.0]))
    world.at(frozen_s)
    working = sorted(set(PEERS) - world.barred())
    proofs = world.now.admission.proofs((peer, claims.get(peer, b"")) for peer in working)
    proposed_s = frozen_s + data.draw(st.sampled_from([0.0, 1.0, GRACE_S, GRACE_S + 2, ROUND_S]))
    world.at(proposed_s)
    if not proofs or world.barred() & proofs.keys():
        return  # it plans anew
    block = a_round(ledger, "".join(proofs), *(proof for proof in proofs.values() if proof))
    ledger.check(block)
    if world.now.admission.outdated(block) is not None:
        assert proposed_s > frozen_s, "else it would plan anew for ever"
        return
    world.at(proposed_s + data.draw(st.sampled_from([0.0, 1.0, GRACE_S - 1])))
    assert world.now.objects(block) is None
