"""Signatures, weights and quorums: when enough of a committee has spoken."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from dugnad.coordinator.messages import Ballot, Voter
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


def committee_of(coordinator: PeerId, others: Iterable[PeerId]) -> tuple[Voter, ...]:
    """The committee of an invited run: one vote each, and the coordinator's worth a third of the others', at least one.

    With a single other the coordinator weighs two, so that it can go on alone when that one vanishes.
    """
    members = sorted(set(others) - {coordinator})
    weight = 2 if len(members) == 1 else max(1, len(members) // 3)
    return (Voter(coordinator, weight), *(Voter(peer, 1) for peer in members))


def quorum_weight(committee: Sequence[Voter]) -> int:
    """The least weight that is more than half of the committee's: any two quorums share a voter."""
    return sum(voter.weight for voter in committee) // 2 + 1


def weight_of(committee: Sequence[Voter], peers: Iterable[PeerId]) -> int:
    """What the votes of `peers` weigh together; a stranger's weighs nothing, a repeated one counts once."""
    said = set(peers)
    return sum(voter.weight for voter in committee if voter.peer in said)


def has_quorum(committee: Sequence[Voter], peers: Iterable[PeerId]) -> bool:
    """Whether `peers` are a quorum of `committee`."""
    return weight_of(committee, peers) >= quorum_weight(committee)


def certified_by(signer: Signer, payload: bytes, ballots: Iterable[Ballot]) -> set[PeerId]:
    """Those whose ballot over `payload` is truly theirs."""
    return {ballot.peer for ballot in ballots if signer.verify(ballot.peer, payload, ballot.signature)}
