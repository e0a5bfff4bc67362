"""Valid chains to test with, and the means to forge others; a chain here is a list of commits from genesis."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
from blake3 import blake3
from hypothesis import strategies as st

from dugnad.coordinator import ranges
from dugnad.coordinator.effects import Cost
from dugnad.coordinator.ledger import Charter, Head, Ledger
from dugnad.coordinator.messages import (
    PRECOMMIT,
    PREVOTE,
    Applied,
    Ballot,
    Block,
    Commit,
    Entry,
    Genesis,
    Lock,
    NewView,
    Pledge,
    ViewChange,
    Voter,
    applied_payload,
    epoch_payload,
    pledge_payload,
    vote_payload,
)
from dugnad.coordinator.votes import QuorumRule
from dugnad.dht.delegation import Delegation, delegate
from dugnad.dht.identity import PeerId

FOUNDER, ORGANIZER = PeerId("founder"), PeerId("organizer")
STEPS = 10
"""Inner steps in every round."""


def digest(text: str) -> bytes:
    """32 bytes that stand for something."""
    return blake3(text.encode()).digest()


def disk_of(peer: PeerId) -> bytes:
    """The incarnation of `peer`, unless a test gives it another disk."""
    return digest(f"disk of {peer}")[:8]


GENESIS = Genesis(b"{}", ORGANIZER, FOUNDER, disk_of(FOUNDER), digest("model after round 0"))
RUN = GENESIS.run
CHARTER = dataclasses.replace(Charter.of(GENESIS, "invited"), admission="open")
"""Of a run with the quorum of invited ones, in which a test need not say by what ticket each peer came in."""


@dataclass(frozen=True, slots=True)
class FakeSigner:
    """A keyed hash for a signature: anyone can forge it, and no test does so by chance."""

    peer_id: PeerId

    def sign(self, payload: bytes) -> bytes:
        """64 bytes that `verify` takes."""
        return blake3(self.peer_id.encode() + b"\0" + payload).digest(length=64)

    def verify(self, peer: PeerId, payload: bytes, signature: bytes) -> bool:
        """Whether `peer` signed."""
        return signature == FakeSigner(peer).sign(payload)


SIGNER = FakeSigner(FOUNDER)
NO_COST = Cost(0.0, 0.0, {})


def delegation(peer: PeerId, term: int, *, by: PeerId = ORGANIZER) -> Delegation:
    """The organizer's word that `peer` may have the coordinator's seat."""
    return delegate(FakeSigner(by), RUN, peer, term)


SEAT = delegation(FOUNDER, 1)


def committee(
    *peers: str, seat: Delegation | None = SEAT, rule: QuorumRule | None = None, credit: Mapping[PeerId, int] = {}
) -> tuple[Voter, ...]:
    """Those peers, and the coordinator if there is a seat for one, as the quorum rule weighs them."""
    coordinator = None if seat is None else seat.coordinator
    members = {PeerId(peer): disk_of(PeerId(peer)) for peer in (*peers, *([coordinator] if coordinator else []))}
    return (rule or CHARTER.rule).weigh(members, coordinator, credit)


def model_after(round_: int) -> bytes:
    """The digest of the model that everyone has after that round."""
    return digest(f"model after round {round_}")


def an_entry(peer: str, *samples: ranges.Range, loss: float = 2.0) -> Entry:
    """A contribution trained on `samples`, of 7 tokens each."""
    return Entry(PeerId(peer), digest(f"root {peer}"), 7 * ranges.count(samples), loss, samples)


def a_block(
    head: Head,
    *entries: Entry,
    redo: ranges.Ranges = (),
    cursor: int | None = None,
    seat: Delegation | None = SEAT,
) -> Block:
    """The block that follows `head` with these contributions; its contributors vote on the next, and who has the seat.

    cursor: where new samples begin after it; unless told, right after the last one named in the block.
    """
    ends = [end for _, end in (*redo, *(r for entry in entries for r in entry.ranges))]
    steps = STEPS if entries else 0
    return Block(
        epoch=head.epoch,
        round=head.round + 1,
        parent=head.hash,
        model_before=model_after(head.round),
        global_step=head.global_step + steps,
        steps=steps,
        entries=entries,
        parts=(digest(f"average of round {head.round + 1}"),) if entries else (),
        redo=redo,
        cursor=max([head.cursor, *ends]) if cursor is None else cursor,
        committee=committee(*(entry.peer for entry in entries), seat=seat),
        coordinator=seat,
    )


def ballots(block: Block, voters: Iterable[PeerId], *, phase: int, view: int = 0) -> tuple[Ballot, ...]:
    """True ballots of `voters`, as the incarnations that `disk_of` names."""
    place = (RUN, block.epoch, block.round, view, phase, block.hash)
    return tuple(Ballot(peer, FakeSigner(peer).sign(vote_payload(*place, disk_of(peer)))) for peer in sorted(voters))


def certify(block: Block, voters: Iterable[PeerId], *, view: int = 0) -> Commit:
    """The block with a true precommit of each of `voters`."""
    return Commit(block, view, ballots(block, voters, phase=PRECOMMIT, view=view))


def locked(block: Block, voters: Iterable[PeerId], *, view: int = 0) -> Lock:
    """The block with a true prevote of each of `voters`."""
    return Lock(view, block, ballots(block, voters, phase=PREVOTE, view=view))


def pledged(peer: PeerId, head: Head, view: int, lock: Lock | None = None) -> ViewChange:
    """What `peer` says to give up the view before `view` of the round after `head`."""
    at, block = (0, b"") if lock is None else (lock.view + 1, lock.block.hash)
    payload = pledge_payload(RUN, head.epoch, head.round + 1, view, at, block, disk_of(peer))
    return ViewChange(head.epoch, head.round + 1, view, Pledge(peer, at, block, FakeSigner(peer).sign(payload)), lock)


def new_view(said: Iterable[ViewChange]) -> NewView:
    """The proof that those pledges are of a view, with the highest of their locks."""
    changes = sorted(said, key=lambda one: one.pledge.peer)
    locks = [one.lock for one in changes if one.lock is not None]
    highest = max(locks, key=lambda lock: lock.view, default=None)
    first = changes[0]
    return NewView(first.epoch, first.round, first.view, tuple(one.pledge for one in changes), highest)


def an_epoch(head: Head, *voters: str, epoch: int | None = None, by: PeerId = ORGANIZER) -> Commit:
    """The organizer's word that another epoch begins on `head`, with the founder and `voters` to decide in it."""
    seat = delegation(FOUNDER, head.term + 1)
    block = msgspec.structs.replace(
        a_block(head, redo=head.redo, seat=seat),
        epoch=head.epoch + 1 if epoch is None else epoch,
        committee=committee(*voters, seat=seat),
    )
    return Commit(block, 0, (Ballot(by, FakeSigner(by).sign(epoch_payload(RUN, block.hash))),))


def extend(ledger: Ledger, *entries: Entry, redo: ranges.Ranges = (), seat: Delegation | None = SEAT) -> Commit:
    """Append one valid round, certified by the whole committee."""
    commit = certify(a_block(ledger.head, *entries, redo=redo, seat=seat), ledger.head.voters)
    ledger.append(commit)
    return commit


def a_ledger() -> Ledger:
    """A chain without blocks, as the founder keeps it."""
    return Ledger(CHARTER, SIGNER)


def honest_chain() -> list[Commit]:
    """Four rounds: two peers work, a third comes, leaves samples undone that another does, and someone leaves."""
    ledger = a_ledger()
    return [
        extend(ledger, an_entry("a", (0, 10)), an_entry("b", (10, 20))),
        extend(ledger, an_entry("a", (20, 30)), an_entry("b", (30, 40)), an_entry("c", (40, 43)), redo=((43, 50),)),
        extend(ledger, an_entry("a", (43, 50), (50, 53)), an_entry("c", (53, 63))),
        extend(ledger),
    ]


def relinked(blocks: Sequence[Block]) -> list[Commit]:
    """The blocks, changed at will, as a chain whose links and votes hold: what a committee of liars could make."""
    parent, voters = RUN, [FOUNDER]
    out: list[Commit] = []
    for block in blocks:
        out.append(certify(msgspec.structs.replace(block, parent=parent), voters))
        parent, voters = out[-1].block.hash, [voter.peer for voter in block.committee]
    return out


def ledger_of(commits: Iterable[Commit]) -> Ledger:
    """The ledger of one who received these commits, every one checked. Raises LedgerError."""
    ledger = a_ledger()
    for commit in commits:
        ledger.check_commit(commit)
        ledger.append(commit)
    return ledger


def applied(
    peer: str, round_: int, *, model: bytes | None = None, wall_s: float = 2.0, sent: Mapping[str, int] | None = None
) -> Applied:
    """What `peer` says after a round; unless told, that it has the model that everyone has."""
    said = model_after(round_) if model is None else model
    block = digest(f"block {round_}")
    signature = FakeSigner(PeerId(peer)).sign(applied_payload(RUN, round_, block, said))
    return Applied(round_, block, said, signature, wall_s / 2, wall_s, tuple(sorted((sent or {}).items())))


@st.composite
def honest_chains(draw: st.DrawFn) -> list[Commit]:
    """Chains of one to six rounds in which peers come, go, and do a part of their samples, or none."""
    ledger = a_ledger()
    return [_honest_round(draw, ledger) for _ in range(draw(st.integers(1, 6)))]


def _honest_round(draw: st.DrawFn, ledger: Ledger) -> Commit:
    """One round, allotted as a leader does: first what was left undone, then new samples."""
    left, cursor = ledger.head.redo, ledger.head.cursor
    entries: list[Entry] = []
    undone: list[ranges.Range] = []
    for peer in sorted(draw(st.sets(st.sampled_from("abcde"), min_size=1))):
        allotted, left = ranges.take(left, 8)
        fresh = 8 - ranges.count(allotted)
        done, rest = ranges.take((*allotted, (cursor, cursor + fresh)), draw(st.integers(0, 8)))
        cursor += fresh
        undone += rest
        entries += [an_entry(peer, *done)] if done else []
    return extend(ledger, *entries, redo=ranges.normal((*left, *undone)))
