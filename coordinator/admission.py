"""Who may take part now: by the chain, by what it shows, by what the organizer decided, and by the time.

The chain says for ever who is admitted (`roll`); this says who still is. A ban, a membership that is over and a
delegation that ended hold at once for whoever gives seats, so an honest leader leaves those peers out of the round
under way. Voters object to a block that counts them only once every leader has had the time to hear of it: a leader
that could not know costs no view.

Leaders and voters ask the same questions here, and differ only in `for_s`: for how long the answer must have been so.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from dugnad.coordinator.messages import ADMISSIONS_BYTES, Block
from dugnad.coordinator.roll import ALLOW_LIST, OPEN, Admitted, Gate, Roll, RollError
from dugnad.dht import hello
from dugnad.dht.decisions import Decision, Decisions
from dugnad.dht.delegation import Delegation, ends
from dugnad.dht.hello import BANNED, NOT_ADMITTED
from dugnad.dht.identity import PeerId
from dugnad.dht.ticket import day_of
from dugnad.dht.wire import WireError

GRACE_S = 15.0
"""How long a decision may take to reach whoever leads, before voters object to what goes against it."""

OVER = "E102"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a peer may not take part, as it is told itself."""

    code: str
    """E401 not admitted, E102 expired, E403 banned."""
    reason: str
    """In one or a few words, to be counted."""
    sentence: str
    why: str = ""
    """What the organizer said of it."""

    def __str__(self) -> str:
        return f"{self.code} {self.sentence}"


class Admission:
    """What one peer knows of who may take part in a run.

    gate, roll: what admits there, and whom the chain has admitted so far. quarantined: who is proven to lie. clock:
    the run's time, unix seconds. round_s: for how long a seat may be worked on.
    """

    def __init__(
        self,
        gate: Gate,
        roll: Callable[[], Roll],
        *,
        decisions: Decisions | None = None,
        quarantined: Callable[[], frozenset[PeerId]] = frozenset,
        clock: Callable[[], float] = lambda: 0.0,
        round_s: float = 3600.0,
    ) -> None:
        self.decisions = decisions or Decisions()
        self._gate = gate
        self._roll = roll
        self._quarantined = quarantined
        self._clock = clock
        self._round_s = round_s
        self._ending: tuple[Roll, tuple[tuple[int, PeerId], ...]] | None = None
        """A roll, and whose membership ends by it, when."""

    @property
    def is_open(self) -> bool:
        """Whether anyone may take part who is not banned."""
        return self._gate.kind == OPEN

    # -- whom to leave out

    def barred(
        self, seat: Delegation | None = None, claim_of: Callable[[PeerId], bytes] = lambda peer: b""
    ) -> frozenset[PeerId]:
        """Who gets no seat and no vote now.

        seat: the newest delegation. claim_of: what someone shows, by which its membership may go on.
        """
        now, roll = self._clock(), self._roll()
        out = self._quarantined() | self.decisions.banned(now=now).keys()
        over = [peer for until, peer in self._endings(roll) if until <= now]
        out |= {peer for peer in over if not self._renews(peer, claim_of(peer), roll)}
        if seat is not None and seat.over(now):
            out |= {seat.coordinator}
        return frozenset(out)

    def is_banned(self, peer: PeerId) -> bool:
        """Whether `peer` is banned now."""
        return self._decided(peer, "ban") is not None

    def is_over(self, seat: Delegation) -> bool:
        """Whether that delegation has ended."""
        return seat.over(self._clock())

    def _endings(self, roll: Roll) -> tuple[tuple[int, PeerId], ...]:
        """Whose membership ends, when: the same for as long as the roll is."""
        if self._ending is None or self._ending[0] is not roll:
            self._ending = roll, tuple((one.until, peer) for peer, one in roll.members.items() if one.until)
        return self._ending[1]

    def _renews(self, peer: PeerId, claim: bytes, roll: Roll) -> bool:
        return bool(claim) and self._refuses_claim(peer, claim, roll) is None

    def distrusts(self, peer: PeerId, seat: Delegation | None) -> bool:
        """Whether what `peer` says as a leader counts no more: everyone has had the time to hear that it is out."""
        known = self._roll().members.get(peer)
        return (
            self._decided(peer, "ban", for_s=GRACE_S) is not None
            or (known is not None and self._is_past(known.until, for_s=GRACE_S))
            or (seat is not None and seat.coordinator == peer and self._is_past(seat.until, for_s=GRACE_S))
        )

    def objects(self, block: Block, leader: PeerId) -> str | None:
        """Why a voter should not vote for a block of `leader`, if by now that must know better."""
        return self._fault_of_work(block, GRACE_S) or self._fault_of_committee(block, leader)

    def outdated(self, block: Block) -> str | None:
        """Why who made `block` should not propose it any more: what its voters will object to, if they don't yet."""
        return self._fault_of_work(block, 0.0)

    def _fault_of_work(self, block: Block, grace_s: float) -> str | None:
        before = self._roll()
        try:
            self._gate.after(before, block)
        except RollError as error:
            return str(error)
        admitted = {one.peer: one for one in map(self._gate.read, block.admissions)}
        for entry in block.entries:
            if self._decided(entry.peer, "ban", for_s=grace_s) is not None:
                return f"{entry.peer} contributed, and is banned"
            known = before.members.get(entry.peer)
            if known is not None and entry.peer not in admitted and self._is_past(known.until, for_s=grace_s):
                return f"{entry.peer} contributed, and its membership was over on {day_of(known.until)}"
        for one in admitted.values():
            # the proof was good when the set was frozen, and the round may have taken its time since
            ended = self._ended(one, for_s=grace_s + self._round_s)
            if ended is not None:
                return f"{one.peer} was admitted by what was good no more: {ended.reason}"
        return None

    def _fault_of_committee(self, block: Block, leader: PeerId) -> str | None:
        """What shows that `leader` does not choose the next voters as `committee` does.

        Between rounds those stay whose membership is over and who show a claim to a longer one: only leaders see it.
        """
        voters, seat = {voter.peer for voter in block.committee}, block.coordinator
        for peer in sorted(voters):
            if self._decided(peer, "ban", for_s=GRACE_S) is not None:
                return f"{peer} is to vote next, and is banned"
        if seat is not None and self._is_past(seat.until, for_s=GRACE_S):
            return f"{seat.coordinator} is to be the coordinator, and its delegation was over on {day_of(seat.until)}"
        stay = {entry.peer for entry in block.entries} | ({seat.coordinator} if seat is not None else set())
        # a leader that all others leave is the last, whoever it is
        if block.entries and voters != {leader} and not voters <= stay:
            return f"{min(voters - stay)} is to vote next, and did not contribute"
        return None

    def _decided(self, subject: str, verdict: str, *, for_s: float = 0.0) -> Decision | None:
        """What was decided last about `subject`, if it is that."""
        now = self._clock()
        said = self.decisions.on(verdict, subject, now=now)
        # whoever gives a seat takes the organizer's word at once, even of a clock that is ahead
        holds = said is not None and said.verdict == verdict and min(said.at_s, now) <= now - for_s
        return said if holds else None

    def _is_past(self, until: int, *, for_s: float = 0.0) -> bool:
        return ends(until) <= self._clock() - for_s

    def _ended(self, one: Admitted, *, for_s: float = 0.0) -> Refusal | None:
        """Why that proof, which the chain would take, admits nobody any more."""
        if self._is_past(one.expires, for_s=for_s):
            return Refusal(OVER, "expired ticket", f"your invite expired on {day_of(one.expires)}. {_ASK}")
        if self._is_past(one.until, for_s=for_s):
            return Refusal(OVER, "membership over", f"your membership ended on {day_of(one.until)}. {_ASK}")
        if self._decided(one.ticket.hex(), "revoke", for_s=for_s) is not None:
            return Refusal(NOT_ADMITTED, "ticket revoked", f"your invite was revoked by the organizer. {_ASK}")
        return None

    # -- whom to let in

    def refuses(self, peer: PeerId, claim: bytes = b"") -> Refusal | None:
        """Why `peer`, who shows this claim, may not take part now, or None; quarantine is not looked at."""
        roll, banned = self._roll(), self._decided(peer, "ban")
        if banned is not None:
            return Refusal(BANNED, "banned", hello.banned(banned.reason), banned.reason)
        known = roll.members.get(peer)
        if self._is_in(peer, roll) or (known is not None and self._renews(peer, claim, roll)):
            return None
        if known is not None:
            return Refusal(OVER, "membership over", f"your membership ended on {day_of(known.until)}. {_ASK}")
        return self._refuses_claim(peer, claim, roll)

    def _refuses_claim(self, peer: PeerId, claim: bytes, roll: Roll) -> Refusal | None:
        if self._gate.kind == ALLOW_LIST:
            if self._decided(peer, "allow") is not None:
                return None
            return Refusal(NOT_ADMITTED, "not on the allow-list", hello.not_admitted("", peer))
        if not claim:
            asks = hello.not_admitted("members come by invitation, and your invite holds no ticket", peer)
            return Refusal(NOT_ADMITTED, "no ticket", asks)
        try:
            one = self._gate.read(claim)
        except WireError as error:
            return Refusal(NOT_ADMITTED, error.reason, f"your invite is not good here: {error}. {_ASK}")
        if one.peer != peer:
            return Refusal(NOT_ADMITTED, "bad claim", f"that claim is the one of {one.peer}")
        return self._refuses_ticket(one, roll)

    def _refuses_ticket(self, one: Admitted, roll: Roll) -> Refusal | None:
        ended = self._ended(one)
        if ended is not None:
            return ended
        if roll.refuses(one) is not None:
            taken = (
                f"all {one.uses} places of your invite are taken" if one.uses > 1 else "your invite was used already"
            )
            return Refusal(NOT_ADMITTED, "ticket used up", f"{taken}. {_ASK}")
        return None

    def has_places(self, claim: bytes) -> bool:
        """Whether others may come in by the ticket that this claim is to."""
        try:
            one = self._gate.read(claim) if claim else None
        except WireError:
            return False
        if one is None or one.bound:
            return False
        stranger = replace(one, peer=PeerId(""))
        return self._refuses_ticket(stranger, self._roll()) is None

    def shows(self, peer: PeerId, claim: bytes) -> bytes:
        """What `peer` should show of its claim: all of it, until the chain knows what it gives, then nothing."""
        return claim if claim and self._proof(peer, claim, self._roll()) is not None else b""

    def proofs(self, claims: Iterable[tuple[PeerId, bytes]]) -> dict[PeerId, bytes]:
        """Who of these, with the claims that they show, may contribute to the next block: {peer: proof}.

        The proof is what the block has to show; empty for who is admitted, be it only for now. In the order in which
        they come: of more claims to a ticket than it has uses, or than a block has room for, the first count.
        """
        roll, out, nbytes = self._roll(), dict[PeerId, bytes](), 0
        uses: Counter[bytes] = Counter()
        for peer, claim in claims:
            if self.refuses(peer, claim) is not None:
                continue
            proof = self._proof(peer, claim, roll)
            if proof is not None:
                one = self._gate.read(proof)
                has_place = not one.uses or roll.uses.get(one.ticket, 0) + uses[one.ticket] < one.uses
                has_room = nbytes + len(proof) <= ADMISSIONS_BYTES
                if has_place and has_room and self._ended(one) is None:
                    uses[one.ticket] += 1
                    nbytes += len(proof)
                    out[peer] = proof
                    continue
            if self._is_in(peer, roll):
                out[peer] = b""
        return out

    def _is_in(self, peer: PeerId, roll: Roll) -> bool:
        """Whether `peer` has nothing to prove now."""
        known = roll.members.get(peer)
        return not self._gate.needs_proof(peer) if known is None else not self._is_past(known.until)

    def _proof(self, peer: PeerId, claim: bytes, roll: Roll) -> bytes | None:
        """What would admit `peer`, or its membership longer, after that roll."""
        if not self._gate.needs_proof(peer):
            return None
        if self._gate.kind == ALLOW_LIST:
            said = self.decisions.on("allow", peer, now=self._clock())
            raw = said.raw if said is not None and said.verdict == "allow" else b""
        else:
            raw = claim
        try:
            one = self._gate.read(raw) if raw else None
        except WireError:
            return None
        return raw if one is not None and one.peer == peer and roll.refuses(one) is None else None


_ASK = "Ask the organizer for a new one."
