"""What a chain proves about its run, accounted for anew from the bottom.

Nothing here relies on the checks that `ledger` made when the blocks were appended: an audit that shared their code
would share their mistakes.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dugnad.coordinator import ranges
from dugnad.coordinator.ledger import Charter
from dugnad.coordinator.messages import PRECOMMIT, Block, Commit, Voter, epoch_payload, vote_payload
from dugnad.coordinator.roll import ALLOW_LIST, OPEN
from dugnad.coordinator.votes import Signer
from dugnad.dht import decisions
from dugnad.dht.delegation import Delegation, delegation_payload
from dugnad.dht.identity import PeerId
from dugnad.dht.records import parse_of_any_time
from dugnad.dht.ticket import parse_claim
from dugnad.dht.wire import WireError

Applieds = Mapping[int, Mapping[PeerId, bytes]]
"""round -> peer -> model digest that the peer said it has after it."""


@dataclass(slots=True)
class Audit:
    """What was found; `faults` are sentences, and an honest run has none."""

    rounds: int = 0
    samples_done: int = 0
    ranges_lost: ranges.Ranges = ()
    ranges_doubled: ranges.Ranges = ()
    ranges_to_redo: ranges.Ranges = ()
    digests_agree: bool = True
    credit: Counter[PeerId] = field(default_factory=Counter)
    """Committed tokens per peer."""
    faults: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether the chain holds everything it should."""
        return not (self.faults or self.ranges_lost or self.ranges_doubled) and self.digests_agree


def audit(charter: Charter, commits: Iterable[Commit], applied: Applieds, signer: Signer) -> Audit:
    """Walk a chain from genesis: links, certificates, steps, voters, members, samples, and the digests peers reported.

    commits: of one chain, which holds what the newest epoch kept.
    """
    found, members = Audit(), _Members(charter, signer)
    parent, epoch, committee = charter.run, 0, charter.first_head().committee
    done: list[ranges.Range] = []
    digest_after: set[bytes] = set()
    cursor = step = term = 0
    for commit in commits:
        block = commit.block
        if block.parent != parent or block.round != found.rounds + 1 or block.epoch < epoch:
            found.faults.append(f"round {block.round} does not follow round {found.rounds}")
        if block.epoch > epoch and not _begun(charter, commit, signer):
            found.faults.append(f"epoch {block.epoch} was not begun by the organizer")
        if block.epoch == epoch and not _certified(charter, commit, committee, signer):
            found.faults.append(f"round {block.round} has no quorum of its committee")
        found.faults.extend(_faults(block, step, None if block.epoch > epoch else committee))
        found.faults.extend(members.faults(block))
        weights = charter.rule.weigh(
            {voter.peer: voter.incarnation for voter in block.committee},
            block.coordinator.coordinator if block.coordinator is not None else None,
            found.credit,
        )
        if block.committee != weights and block.epoch == epoch:
            found.faults.append(f"round {block.round} gives votes that do not weigh as the quorum rule says")
        seat = block.coordinator
        if seat is not None:
            oldest = term if block.epoch == epoch else 0
            if seat.term < oldest or not _delegated(charter, seat, signer):
                said = f"term {seat.term}, unsigned or older than {oldest}"
                found.faults.append(f"round {block.round} gives the coordinator's seat to {said}")
            term = seat.term
        if digest_after and digest_after != {block.model_before}:
            found.digests_agree = False
            found.faults.append(f"model digests after round {found.rounds} differ")
        done.extend(r for entry in block.entries for r in entry.ranges)
        for entry in block.entries:
            found.credit[entry.peer] += entry.tokens
        cursor, found.ranges_to_redo = block.cursor, block.redo
        found.rounds, parent, committee, step = block.round, block.hash, block.committee, block.global_step
        epoch = block.epoch
        digest_after = set(applied.get(block.round, {}).values())
    if len(digest_after) > 1:
        found.digests_agree = False
        found.faults.append(f"model digests after round {found.rounds} differ")
    found.ranges_doubled = _overlaps((*done, *found.ranges_to_redo))
    found.ranges_lost = _missing((*done, *found.ranges_to_redo), cursor)
    found.samples_done = ranges.count(ranges.normal(done))
    return found


class _Members:
    """Who was admitted so far, until when, and how often each ticket was used."""

    def __init__(self, charter: Charter, signer: Signer) -> None:
        self._charter, self._signer = charter, signer
        self._until = {charter.founder: float("inf")}
        self._used: Counter[bytes] = Counter()

    def faults(self, block: Block) -> list[str]:
        """What is wrong with whom `block` admits and counts."""
        if self._charter.admission == OPEN:
            return []
        out: list[str] = []
        for raw in block.admissions:
            try:
                self._admit(raw)
            except (WireError, ValueError) as error:
                out.append(f"round {block.round} admits someone who may not be: {error}")
        strangers = sorted({entry.peer for entry in block.entries} - self._until.keys())
        out.extend(f"round {block.round} counts the work of {peer}, who was never admitted" for peer in strangers)
        return out

    def _admit(self, raw: bytes) -> None:
        charter, verify = self._charter, self._signer.verify
        if charter.admission == ALLOW_LIST:
            record = parse_of_any_time(raw, charter.run, verify=verify)
            decisions.check(record, charter.organizer, verify)
            if record.kind != "allow":
                raise ValueError(f"a {record.kind} record lets nobody in")
            self._until[PeerId(record.key)] = float("inf")
            return
        said = parse_claim(raw, charter.run, charter.organizer, verify)
        until = said.ticket.until or float("inf")
        if self._until.get(said.peer, -1.0) >= until:
            raise ValueError(f"{said.peer} is a member already, for as long")
        self._used[said.ticket.id] += 1
        if 0 < said.ticket.uses < self._used[said.ticket.id]:
            raise ValueError(f"{said.peer} came by a ticket that was used up")
        self._until[said.peer] = until


def _certified(charter: Charter, commit: Commit, committee: tuple[Voter, ...], signer: Signer) -> bool:
    block, voters = commit.block, {voter.peer: voter.incarnation for voter in committee}
    place = (charter.run, block.epoch, block.round, commit.view, PRECOMMIT, block.hash)
    true = [
        ballot.peer
        for ballot in commit.ballots
        if ballot.peer in voters
        and signer.verify(ballot.peer, vote_payload(*place, voters[ballot.peer]), ballot.signature)
    ]
    return charter.rule.decided(committee, true)


def _begun(charter: Charter, commit: Commit, signer: Signer) -> bool:
    payload = epoch_payload(charter.run, commit.block.hash)
    return any(
        ballot.peer == charter.organizer and signer.verify(charter.organizer, payload, ballot.signature)
        for ballot in commit.ballots
    )


def _delegated(charter: Charter, seat: Delegation, signer: Signer) -> bool:
    payload = delegation_payload(charter.run, seat.coordinator, seat.term, seat.until)
    return signer.verify(charter.organizer, payload, seat.signature)


def _faults(block: Block, step: int, committee: tuple[Voter, ...] | None) -> list[str]:
    """What is wrong with a block by itself, after a round that ended at `step`; `committee`: who could vote on it."""
    out: list[str] = []
    if block.global_step != step + block.steps:
        out.append(f"round {block.round} says step {block.global_step}; {step} + {block.steps} was expected")
    named = (*block.redo, *(r for entry in block.entries for r in entry.ranges))
    if any(end > block.cursor for _, end in named):
        out.append(f"round {block.round} names samples beyond its data cursor {block.cursor}")
    if committee is None:
        return out
    known = {entry.peer for entry in block.entries} | {voter.peer for voter in committee}
    if block.coordinator is not None:
        known.add(block.coordinator.coordinator)
    if not {voter.peer for voter in block.committee} <= known:
        out.append(f"round {block.round} gives a vote to someone who neither contributed nor voted before")
    return out


def _overlaps(done: Iterable[ranges.Range]) -> ranges.Ranges:
    out: list[ranges.Range] = []
    reached = 0
    for start, end in sorted(done):
        if start < reached:
            out.append((start, min(end, reached)))
        reached = max(reached, end)
    return ranges.normal(out)


def _missing(covered: Iterable[ranges.Range], cursor: int) -> ranges.Ranges:
    out: list[ranges.Range] = []
    reached = 0
    for start, end in ranges.normal(covered):
        if reached < start:
            out.append((reached, start))
        reached = max(reached, end)
    if reached < cursor:
        out.append((reached, cursor))
    return tuple(out)
