"""What a chain proves about its run, accounted for anew from the bottom.

Nothing here relies on the checks that `ledger` made when the blocks were appended: an audit that shared their code
would share their mistakes.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dugnad.coordinator import ranges
from dugnad.coordinator.messages import Block, Commit, Voter, vote_payload
from dugnad.coordinator.votes import Signer, certified_by, committee_of, has_quorum
from dugnad.dht.identity import PeerId

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


def audit(run: bytes, founder: PeerId, commits: Iterable[Commit], applied: Applieds, signer: Signer) -> Audit:
    """Walk a chain from genesis: links, certificates, steps, voters, samples, and the model digests peers reported."""
    found = Audit()
    parent, committee = run, committee_of(founder, ())
    done: list[ranges.Range] = []
    digest_after: set[bytes] = set()
    cursor = step = 0
    for commit in commits:
        block = commit.block
        if block.parent != parent or block.round != found.rounds + 1:
            found.faults.append(f"round {block.round} does not follow round {found.rounds}")
        if not _certified(run, commit, committee, signer):
            found.faults.append(f"round {block.round} has no quorum of its committee")
        found.faults.extend(_faults(block, step, committee))
        if digest_after and digest_after != {block.model_before}:
            found.digests_agree = False
            found.faults.append(f"model digests after round {found.rounds} differ")
        done.extend(r for entry in block.entries for r in entry.ranges)
        for entry in block.entries:
            found.credit[entry.peer] += entry.tokens
        cursor, found.ranges_to_redo = block.cursor, block.redo
        found.rounds, parent, committee, step = block.round, block.hash, block.committee, block.global_step
        digest_after = set(applied.get(block.round, {}).values())
    if len(digest_after) > 1:
        found.digests_agree = False
        found.faults.append(f"model digests after round {found.rounds} differ")
    found.ranges_doubled = _overlaps((*done, *found.ranges_to_redo))
    found.ranges_lost = _missing((*done, *found.ranges_to_redo), cursor)
    found.samples_done = ranges.count(ranges.normal(done))
    return found


def _certified(run: bytes, commit: Commit, committee: tuple[Voter, ...], signer: Signer) -> bool:
    block = commit.block
    payload = vote_payload(run, block.epoch, block.round, block.term, block.view, block.hash)
    return has_quorum(committee, certified_by(signer, payload, commit.ballots))


def _faults(block: Block, step: int, committee: tuple[Voter, ...]) -> list[str]:
    """What is wrong with a block by itself, after a round that ended at `step` with `committee`."""
    out: list[str] = []
    if block.global_step != step + block.steps:
        out.append(f"round {block.round} says step {block.global_step}; {step} + {block.steps} was expected")
    named = (*block.redo, *(r for entry in block.entries for r in entry.ranges))
    if any(end > block.cursor for _, end in named):
        out.append(f"round {block.round} names samples beyond its data cursor {block.cursor}")
    voters = [voter.peer for voter in block.committee]
    if not set(voters) <= {entry.peer for entry in block.entries} | {voter.peer for voter in committee}:
        out.append(f"round {block.round} gives a vote to someone who neither contributed nor voted before")
    if block.committee != committee_of(voters[0], voters):
        out.append(f"round {block.round} gives votes that do not weigh as the quorum rule says")
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
