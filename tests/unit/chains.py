"""Valid chains to test with, and the means to forge others; a chain here is a list of commits from genesis."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
from blake3 import blake3
from hypothesis import strategies as st

from dugnad.coordinator import ranges
from dugnad.coordinator.follower import Cost
from dugnad.coordinator.ledger import Head, Ledger
from dugnad.coordinator.messages import Applied, Ballot, Block, Commit, Entry, Genesis, applied_payload, vote_payload
from dugnad.coordinator.votes import committee_of
from dugnad.dht.identity import PeerId

FOUNDER = PeerId("founder")
STEPS = 10
"""Inner steps in every round."""


def digest(text: str) -> bytes:
    """32 bytes that stand for something."""
    return blake3(text.encode()).digest()


GENESIS = Genesis(b"{}", PeerId("organizer"), FOUNDER, digest("model after round 0"))
RUN = GENESIS.run


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


def model_after(round_: int) -> bytes:
    """The digest of the model that everyone has after that round."""
    return digest(f"model after round {round_}")


def an_entry(peer: str, *samples: ranges.Range, loss: float = 2.0) -> Entry:
    """A contribution trained on `samples`, of 7 tokens each."""
    return Entry(PeerId(peer), digest(f"root {peer}"), 7 * ranges.count(samples), loss, samples)


def a_block(head: Head, *entries: Entry, redo: ranges.Ranges = (), cursor: int | None = None) -> Block:
    """The block that follows `head` with these contributions; its contributors vote on the next.

    cursor: where new samples begin after it; unless told, right after the last one named in the block.
    """
    ends = [end for _, end in (*redo, *(r for entry in entries for r in entry.ranges))]
    steps = STEPS if entries else 0
    return Block(
        epoch=head.epoch,
        round=head.round + 1,
        term=1,
        view=0,
        parent=head.hash,
        model_before=model_after(head.round),
        global_step=head.global_step + steps,
        steps=steps,
        entries=entries,
        parts=(digest(f"average of round {head.round + 1}"),) if entries else (),
        redo=redo,
        cursor=max([head.cursor, *ends]) if cursor is None else cursor,
        committee=committee_of(FOUNDER, (entry.peer for entry in entries)),
    )


def certify(block: Block, voters: Iterable[PeerId]) -> Commit:
    """The block with a true ballot of each of `voters`."""
    payload = vote_payload(RUN, block.epoch, block.round, block.term, block.view, block.hash)
    return Commit(block, tuple(Ballot(peer, FakeSigner(peer).sign(payload)) for peer in sorted(voters)))


def extend(ledger: Ledger, *entries: Entry, redo: ranges.Ranges = ()) -> Commit:
    """Append one valid round, certified by the whole committee."""
    commit = certify(a_block(ledger.head, *entries, redo=redo), (voter.peer for voter in ledger.head.committee))
    ledger.append(commit)
    return commit


def honest_chain() -> list[Commit]:
    """Four rounds: two peers work, a third comes, leaves samples undone that another does, and someone leaves."""
    ledger = Ledger(RUN, FOUNDER)
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
    ledger = Ledger(RUN, FOUNDER)
    for commit in commits:
        ledger.check_commit(commit, SIGNER)
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
    ledger = Ledger(RUN, FOUNDER)
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
