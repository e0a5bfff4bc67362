"""Signatures, weights and quorums: when enough of a committee has spoken, and who of it leads in which view."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from blake3 import blake3

from dugnad.coordinator.messages import MAX_VOTERS, Voter
from dugnad.dht.identity import PeerId


class Signer(Protocol):
    """Signs as one peer and checks the signatures of all; the simulator injects a cheap one."""

    @property
    def peer_id(self) -> PeerId:
        """Who signs."""

    def sign(self, payload: bytes) -> bytes:
        """The 64-byte signature of `payload` (which begins with its own domain tag)."""

    def verify(self, peer: PeerId, payload: bytes, signature: bytes) -> bool:
        """Whether `peer` signed `payload`."""


@dataclass(frozen=True, slots=True)
class QuorumRule:
    """How votes weigh and how many decide; `open`: in a run that anyone may join.

    By invitation, members are trusted to fail by stopping only: one vote each, the coordinator's worth a third of the
    others' (at least one; two beside a single other, so that it can go on alone when that one vanishes), and more than
    half decides. In an open run of at least MIN_EARNERS who have earned credit a vote weighs what its voter has earned,
    and more than two thirds decide: less than a third of the weight may lie.
    """

    open: bool = False

    def weigh(
        self, members: Mapping[PeerId, bytes], coordinator: PeerId | None, credit: Mapping[PeerId, int]
    ) -> tuple[Voter, ...]:
        """The committee of `members`, {peer: incarnation}, in peer-id order; credit: tokens that each has earned."""
        earned = {peer: credit.get(peer, 0) for peer in members}
        if self.open and sum(tokens > 0 for tokens in earned.values()) >= MIN_EARNERS:
            return tuple(Voter(peer, earned[peer], members[peer]) for peer in sorted(members))
        others = len(members) - 1
        heavy = 2 if others == 1 else max(1, others // 3)
        return tuple(
            Voter(peer, heavy if peer == coordinator else 1, incarnation)
            for peer, incarnation in sorted(members.items())
        )

    def needed(self, committee: Sequence[Voter]) -> int:
        """The least weight that decides: any two quorums share a voter, in an open run one who does not lie."""
        total = sum(voter.weight for voter in committee)
        return total * 2 // 3 + 1 if self._by_credit(committee) else total // 2 + 1

    def decided(self, committee: Sequence[Voter], peers: Iterable[PeerId]) -> bool:
        """Whether `peers` are a quorum of `committee`."""
        return weight_of(committee, peers) >= self.needed(committee)

    def faulty(self, committee: Sequence[Voter]) -> int:
        """The most weight that may say anything at all: one more than this holds a voter who tells the truth."""
        return (sum(voter.weight for voter in committee) - 1) // 3 if self._by_credit(committee) else 0

    def blocks(self, committee: Sequence[Voter], peers: Iterable[PeerId]) -> bool:
        """Whether no quorum can do without `peers`."""
        total = sum(voter.weight for voter in committee)
        return weight_of(committee, peers) > total - self.needed(committee)

    def _by_credit(self, committee: Sequence[Voter]) -> bool:
        return self.open and sum(voter.weight > 0 for voter in committee) >= MIN_EARNERS


MIN_EARNERS = 4
"""So many who have earned credit can bear one who lies."""


def weight_of(committee: Sequence[Voter], peers: Iterable[PeerId]) -> int:
    """What the votes of `peers` weigh together; a stranger's weighs nothing, a repeated one counts once."""
    said = set(peers)
    return sum(voter.weight for voter in committee if voter.peer in said)


def leaders(head: bytes, committee: Sequence[Voter], coordinator: PeerId | None) -> tuple[PeerId, ...]:
    """Who leads the round after the block `head`, view by view: the coordinator, then the others by its hash."""
    others = (voter.peer for voter in committee if voter.peer != coordinator)
    rest = sorted(others, key=lambda peer: blake3(head + peer.encode()).digest())
    return (*(() if coordinator is None else (coordinator,)), *rest)


def chosen(
    candidates: Mapping[PeerId, bytes], voted: Iterable[PeerId], coordinator: PeerId | None, head: bytes
) -> dict[PeerId, bytes]:
    """Who of `candidates`, {peer: incarnation}, makes the next committee: at most MAX_VOTERS.

    The coordinator first, then those who `voted` before, so that a committee changes slowly; then by chance.
    """
    before = set(voted)
    order = sorted(
        candidates,
        key=lambda peer: (peer != coordinator, peer not in before, blake3(head + peer.encode()).digest()),
    )
    return {peer: candidates[peer] for peer in order[:MAX_VOTERS]}
