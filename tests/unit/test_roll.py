"""Whom the chain admits: those who prove that they may, once each, and by a ticket no more than it has uses."""

import dataclasses
from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from dugnad.coordinator import admission
from dugnad.coordinator.admission import GRACE_S, Admission
from dugnad.coordinator.audit import audit
from dugnad.coordinator.follower import Follower
from dugnad.coordinator.ledger import Charter, Ledger, LedgerError
from dugnad.coordinator.messages import ADMISSIONS_BYTES, Block, Commit
from dugnad.coordinator.patience import Patience
from dugnad.coordinator.roll import Gate
from dugnad.dht.decisions import Decision, Decisions, decide
from dugnad.dht.identity import Identity, PeerId, verify
from dugnad.dht.ticket import Terms, Ticket, claim, issue
from tests.unit.chains import (
    CHARTER,
    FOUNDER,
    ORGANIZER,
    RUN,
    SIGNER,
    FakeSigner,
    a_block,
    an_entry,
    an_epoch,
    certify,
    delegation,
    relinked,
)

INVITED = dataclasses.replace(CHARTER, admission="invited")
KEY = FakeSigner(PeerId("ticket"))
REAL_ORGANIZER, ANN, EVE = (Identity.from_seed(bytes([k]) * 32) for k in range(1, 4))
NOW = 1_700_000_000


def a_ticket(*, key: FakeSigner = KEY, **terms: object) -> Ticket:
    return issue(FakeSigner(ORGANIZER), RUN, key.peer_id, Terms(**terms))  # type: ignore[arg-type]


def shown(peer: str, ticket: Ticket | None = None) -> bytes:
    return claim(ticket or a_ticket(), KEY, PeerId(peer))


def a_round(ledger: Ledger, peers: str, *admissions: bytes) -> Block:
    """A block in which these peers, one letter each, contribute."""
    start = ledger.head.cursor
    entries = [an_entry(peer, (start + 10 * k, start + 10 * k + 10)) for k, peer in enumerate(peers)]
    return replace(
        a_block(ledger.head, *entries, seat=delegation(FOUNDER, ledger.head.term or 1)), admissions=admissions
    )


def grow(ledger: Ledger, peers: str, *admissions: bytes) -> Commit:
    commit = certify(a_round(ledger, peers, *admissions), ledger.head.voters)
    ledger.check_commit(commit)
    ledger.append(commit)
    return commit


def refused(ledger: Ledger, peers: str, *admissions: bytes) -> str:
    with pytest.raises(LedgerError) as caught:
        ledger.check(a_round(ledger, peers, *admissions))
    return str(caught.value)


def members(ledger: Ledger) -> str:
    return "".join(sorted(ledger.head.roll.members))


@pytest.fixture
def ledger() -> Ledger:
    """An invited run in which a and b came by one ticket."""
    ledger = Ledger(INVITED, SIGNER)
    grow(ledger, "ab", shown("a"), shown("b"))
    return ledger


def test_who_proves_it_is_admitted_and_from_then_on_contributes_without_a_word(ledger: Ledger) -> None:
    assert members(ledger) == "ab"
    grow(ledger, "ab")
    grow(ledger, "abc", shown("c"))
    assert members(ledger) == "abc"
    assert ledger.head.roll.uses == {a_ticket().id: 3}


def test_nobody_contributes_who_is_not_admitted(ledger: Ledger) -> None:
    assert "c contributed, and is not admitted" in refused(ledger, "abc")
    assert "c contributed, and is not admitted" in refused(ledger, "abcd", shown("d"))


def test_the_founder_needs_no_ticket() -> None:
    ledger = Ledger(INVITED, SIGNER)
    commit = certify(a_block(ledger.head, an_entry(FOUNDER, (0, 10))), [FOUNDER])
    ledger.check_commit(commit)


def test_in_an_open_run_nobody_is_asked_and_nobody_is_admitted() -> None:
    ledger = Ledger(CHARTER, SIGNER)
    grow(ledger, "ab")
    assert members(ledger) == ""
    assert "nobody needs to be admitted" in refused(ledger, "abc", shown("c"))


def test_a_block_that_admits_more_members_than_a_ticket_has_uses_is_refused(ledger: Ledger) -> None:
    two = a_ticket(uses=2)
    assert "used up" in refused(ledger, "abcde", *(shown(peer, two) for peer in "cde"))
    grow(ledger, "abc", shown("c", two))
    grow(ledger, "abd", shown("d", two))
    assert "used up" in refused(ledger, "abe", shown("e", two))
    grow(ledger, "abe", shown("e"))


def test_nobody_is_admitted_twice_by_one_ticket_nor_by_another_for_no_longer(ledger: Ledger) -> None:
    assert "admitted already" in refused(ledger, "ab", shown("a"))
    assert "peer-id order" in refused(ledger, "abc", shown("c"), shown("c"))
    assert "admitted already" in refused(ledger, "ab", shown("a", a_ticket(uses=7)))


def test_a_membership_that_ends_is_renewed_by_a_ticket_that_lasts_longer(ledger: Ledger) -> None:
    short, long = a_ticket(until=NOW), a_ticket(until=NOW + 100)
    grow(ledger, "abc", shown("c", short))
    assert "admitted already" in refused(ledger, "abc", shown("c", a_ticket(until=NOW - 5)))
    grow(ledger, "abc", shown("c", long))
    assert ledger.head.roll.members[PeerId("c")].until == NOW + 100


BAD = {
    "expired": (shown("c", a_ticket(expires=1)), None),  # no clock takes part: whoever gives a seat looks at that
    "altered": (shown("c", replace(a_ticket(uses=1), uses=9)), "altered ticket"),
    "foreign": (shown("c", replace(a_ticket(), run=b"x" * 32)), "foreign ticket"),
    "bound": (shown("c", a_ticket(bound=PeerId("d"))), "bound to another key"),
    "for another role": (shown("c", a_ticket(roles=("keeper",))), "for keeper"),
    "another's": (claim(a_ticket(), FakeSigner(PeerId("c")), PeerId("c")), "bad claim"),
    "nonsense": (b"nonsense", "malformed"),
}


@pytest.mark.parametrize(("raw", "why"), BAD.values(), ids=BAD.keys())
def test_a_block_with_a_claim_that_is_not_right_is_refused_and_says_why(
    ledger: Ledger, raw: bytes, why: str | None
) -> None:
    if why is None:
        grow(ledger, "abc", raw)
    else:
        assert why in refused(ledger, "abc", raw)


def test_only_who_contributes_is_admitted_in_peer_id_order_and_within_the_cap(ledger: Ledger) -> None:
    assert "did not contribute" in refused(ledger, "ab", shown("c"))
    assert "peer-id order" in refused(ledger, "abcd", shown("d"), shown("c"))
    many = [shown("c")] * (ADMISSIONS_BYTES // len(shown("c")) + 1)
    assert "bytes of admissions" in refused(ledger, "abc", *many)


def test_what_an_epoch_undoes_is_undone_for_tickets_and_members_too(ledger: Ledger) -> None:
    base = ledger.head
    two = a_ticket(uses=2)
    grow(ledger, "abcd", shown("c", two), shown("d", two))
    commit = an_epoch(base, "a")
    ledger.check_commit(commit)
    ledger.rewind(base.hash)
    ledger.append(commit)
    assert members(ledger) == "ab"
    grow(ledger, "aef", shown("e", two), shown("f", two))
    assert members(ledger) == "abef"


def test_an_epoch_admits_nobody(ledger: Ledger) -> None:
    commit = an_epoch(ledger.head, "a")
    block = replace(commit.block, admissions=(shown("c"),))
    with pytest.raises(LedgerError, match="holds no work"):
        ledger.check_commit(replace(commit, block=block))


def test_who_takes_up_a_chain_from_its_disk_knows_whom_it_admitted(ledger: Ledger) -> None:
    again = Ledger(INVITED, SIGNER)
    commits = [commit for _, commit in ledger._recent]
    for commit in commits:
        again.append(commit)
    assert again.head.roll == ledger.head.roll


# -- the list of an allow-list run


def listed(*verdicts: tuple[Identity, Identity, str]) -> list[bytes]:
    """Decisions: by whom, on whom, and what."""
    return [decide(by, RUN, on.peer_id, verdict, "", now=NOW + k).raw for k, (by, on, verdict) in enumerate(verdicts)]


def a_gate() -> Gate:
    return Gate(RUN, REAL_ORGANIZER.peer_id, FOUNDER, "allow-list", verify)


def test_an_allow_list_admits_whom_the_organizer_allowed() -> None:
    (raw,) = listed((REAL_ORGANIZER, ANN, "allow"))
    assert a_gate().read(raw).peer == ANN.peer_id


@pytest.mark.parametrize(
    ("by", "verdict", "why"),
    [(EVE, "allow", "not the organizer"), (REAL_ORGANIZER, "ban", "does not allow"), (EVE, "unban", "does not allow")],
)
def test_and_nobody_else(by: Identity, verdict: str, why: str) -> None:
    (raw,) = listed((by, ANN, verdict))
    with pytest.raises(Exception, match=why):
        a_gate().read(raw)
    with pytest.raises(Exception, match="malformed"):
        a_gate().read(shown("a"))


# -- the audit finds what a committee of liars let through


def found(peers: str, admissions: Sequence[bytes], charter: Charter = INVITED) -> list[str]:
    ledger = Ledger(CHARTER, SIGNER)  # which asks nobody for anything
    first = replace(a_round(ledger, "a"), admissions=())
    ledger.append(certify(first, [FOUNDER]))
    second = a_round(ledger, peers)
    blocks = [replace(first, admissions=(shown("a"),)), replace(second, admissions=tuple(admissions))]
    return audit(charter, relinked(blocks), {}, SIGNER).faults


def test_an_audit_finds_strangers_and_tickets_that_were_used_too_often() -> None:
    one = a_ticket(uses=1)
    assert any("b, who was never admitted" in fault for fault in found("ab", ()))
    assert any("used up" in fault for fault in found("abc", [shown("b", one), shown("c", one)]))
    assert any("member already" in fault for fault in found("a", [shown("a")]))
    assert any("bad claim" in fault for fault in found("ab", [claim(a_ticket(), SIGNER, PeerId("b"))]))
    assert not [fault for fault in found("ab", [shown("b")]) if "admit" in fault]


# -- who may take part now


class Now:
    """An admission of an invited run at a moment that a test sets."""

    def __init__(self, ledger: Ledger) -> None:
        self.at_s = float(NOW)
        self.ledger = ledger
        self.decisions = Decisions()
        self.admission = Admission(
            ledger.gate,
            lambda: ledger.head.roll,
            decisions=self.decisions,
            clock=lambda: self.at_s,
            round_s=100.0,
        )

    def decide(self, verdict: str, subject: str, *, lasts_s: float = float("inf")) -> None:
        said = Decision(subject, verdict, "poison", self.at_s, self.at_s + lasts_s, f"{self.at_s}".encode())
        assert self.decisions.take(said)

    def objects(self, block: Block, leader: PeerId = FOUNDER) -> str | None:
        return self.admission.objects(block, leader)

    def why(self, peer: str, raw: bytes = b"") -> str:
        refusal = self.admission.refuses(PeerId(peer), raw)
        return "" if refusal is None else f"{refusal.code} {refusal.reason}"


def test_each_reason_not_to_take_part_has_its_code_and_words(ledger: Ledger) -> None:
    now = Now(ledger)
    one, ending = a_ticket(uses=1), a_ticket(until=NOW + 50)
    grow(ledger, "abcd", shown("c", one), shown("d", ending))
    assert now.why("a") == now.why("e", shown("e")) == now.why(FOUNDER) == ""
    assert now.why("e") == "E401 no ticket"
    assert now.why("e", shown("e", one)) == "E401 ticket used up"
    assert now.why("e", shown("e", a_ticket(expires=NOW))) == "E102 expired ticket"
    assert now.why("e", shown("e", a_ticket(until=NOW))) == "E102 membership over"
    assert now.why("e", shown("e", replace(one, uses=2))) == "E401 altered ticket"
    assert now.why("e", shown("f")) == "E401 bad claim"
    assert now.why("d") == ""
    now.decide("revoke", a_ticket().id.hex())
    assert now.why("e", shown("e")) == "E401 ticket revoked"
    assert now.why("a") == "", "who came by it stays"
    now.decide("ban", "a")
    assert now.why("a") == "E403 banned"
    now.at_s += 50
    assert now.why("d") == "E102 membership over"
    assert now.why("d", shown("d", a_ticket(until=NOW + 500))) == ""
    now.decide("unban", "a")
    assert now.why("a") == ""


def test_who_is_banned_or_whose_membership_is_over_is_barred_at_once(ledger: Ledger) -> None:
    now = Now(ledger)
    grow(ledger, "abc", shown("c", a_ticket(until=NOW + 50)))
    assert now.admission.barred() == set()
    now.decide("ban", "b")
    assert now.admission.barred() == {"b"}
    now.at_s += 50
    assert now.admission.barred() == {"b", "c"}
    renewed = shown("c", a_ticket(until=NOW + 500))
    assert now.admission.barred(None, lambda peer: renewed) == {"b"}


def test_voters_object_once_every_leader_must_know_better(ledger: Ledger) -> None:
    now = Now(ledger)
    late = a_ticket(expires=NOW + 50)
    block = a_round(ledger, "abc", shown("c", late))
    now.decide("ban", "b")
    now.at_s += GRACE_S - 1
    assert now.objects(block) is None
    now.at_s += 1
    assert "b contributed, and is banned" in str(now.objects(block))
    now.decide("unban", "b")
    now.at_s = NOW + 50 + 100 + GRACE_S - 1
    assert now.objects(block) is None, "its seat may have been given before the ticket expired"
    now.at_s += 1
    assert "c was admitted by what was good no more: expired ticket" in str(now.objects(block))


def test_voters_object_to_a_ticket_that_was_revoked_before_the_round_began(ledger: Ledger) -> None:
    now = Now(ledger)
    one = a_ticket(uses=3)
    block = a_round(ledger, "abc", shown("c", one))
    now.decide("revoke", one.id.hex())
    now.at_s += 100 + GRACE_S - 1
    assert now.objects(block) is None
    now.at_s += 1
    assert "ticket revoked" in str(now.objects(block))


def test_a_ban_that_has_ended_is_no_reason_to_object(ledger: Ledger) -> None:
    now = Now(ledger)
    now.decide("ban", "b", lasts_s=GRACE_S + 5)
    now.at_s += GRACE_S + 4
    assert now.objects(a_round(ledger, "ab")) is not None
    now.at_s += 1
    assert now.why("b") == ""
    assert now.objects(a_round(ledger, "ab")) is None


@pytest.mark.parametrize("fault", ["expired", "revoked"])
def test_a_member_whose_longer_ticket_is_good_no_more_contributes_without_it(ledger: Ledger, fault: str) -> None:
    now = Now(ledger)
    grow(ledger, "abc", shown("c", a_ticket(until=NOW + 50)))
    longer = a_ticket(until=NOW + 500, expires=NOW - 500 if fault == "expired" else 0)
    if fault == "revoked":
        now.decide("revoke", longer.id.hex())
    assert now.admission.proofs([(PeerId("c"), shown("c", longer))]) == {"c": b""}
    now.at_s += 50
    assert now.admission.proofs([(PeerId("c"), shown("c", longer))]) == {}


def test_on_an_allow_list_voters_and_the_coordinator_stand_whoever_is_on_it_or_not() -> None:
    charter = dataclasses.replace(CHARTER, admission="allow-list")
    ledger = Ledger(charter, SIGNER)
    now = Now(ledger)
    follower = Follower(SIGNER, ledger, Patience(1.0, 1.0, 1.0), bytes(8), now.admission)

    def code(peer: str) -> str:
        refusal = follower.refuses(PeerId(peer))
        return "" if refusal is None else refusal.code

    assert [code(FOUNDER), code("e"), code("new coordinator")] == ["", "E401", "E401"]
    follower.receive(PeerId("new coordinator"), delegation(PeerId("new coordinator"), 2), now=0.0)
    assert code("new coordinator") == "", "its delegation says that it may act for the organizer"
    now.decide("allow", "e")
    assert code("e") == ""
    for verdict, wanted in (("ban", "E403"), ("unban", "")):
        now.at_s += 1
        now.decide(verdict, "e")
        now.decide(verdict, "new coordinator")
        assert [code("e"), code("new coordinator")] == [wanted, wanted]


def test_a_claim_is_shown_until_the_chain_has_it(ledger: Ledger) -> None:
    shows, raw = Now(ledger).admission.shows, shown("c")
    assert shows(PeerId("c"), raw) == raw
    grow(ledger, "abc", raw)
    assert shows(PeerId("c"), raw) == b""


def test_of_more_claims_than_places_the_first_count(ledger: Ledger) -> None:
    now, two = Now(ledger), a_ticket(uses=2)
    claims = [(PeerId(peer), shown(peer, two)) for peer in "cde"]
    assert now.admission.proofs([(PeerId("a"), b""), *claims, (PeerId("f"), b"")]) == {
        "a": b"", "c": claims[0][1], "d": claims[1][1],
    }  # fmt: skip


def test_a_member_whose_longer_ticket_found_no_place_is_in_until_its_membership_ends(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, two = Now(ledger), a_ticket(uses=2)
    ending = a_ticket(until=NOW + 50)
    grow(ledger, "abcde", *(shown(peer, ending) for peer in "cde"))
    claims = [(PeerId(peer), shown(peer, two)) for peer in "cde"]
    assert now.admission.proofs(claims) == {"c": claims[0][1], "d": claims[1][1], "e": b""}
    monkeypatch.setattr(admission, "ADMISSIONS_BYTES", len(claims[0][1]))
    assert now.admission.proofs(claims) == {"c": claims[0][1], "d": b"", "e": b""}
    now.at_s += 50
    assert now.admission.proofs(claims) == {"c": claims[0][1]}
