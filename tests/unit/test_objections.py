"""Honest voters vote for whatever an honest leader makes of any claims, if each step keeps to its time."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from dugnad.coordinator.admission import GRACE_S
from dugnad.coordinator.ledger import Ledger
from dugnad.dht.identity import PeerId
from tests.unit.chains import SIGNER
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
    if world.now.admission.objects(block, grace_s=0.0) is not None:
        assert proposed_s > frozen_s, "else it would plan anew for ever"
        return
    world.at(proposed_s + data.draw(st.sampled_from([0.0, 1.0, GRACE_S - 1])))
    assert world.now.admission.objects(block) is None
