"""The checks can fail: the same chaos, with one rule of the protocol taken out, is caught at what the rule prevents.

A certificate by too few votes is a fault by itself; here that check is off, to see what such certificates lead to.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import pytest
from msgspec import structs

from dugnad.coordinator import effects
from dugnad.coordinator.follower import Follower
from dugnad.coordinator.messages import Block, Commit, Proposal, Voter
from dugnad.coordinator.replica import Replica
from dugnad.coordinator.votes import QuorumRule, weight_of
from dugnad.dht.identity import PeerId
from dugnad.peer.invariants import InvariantBroken, Invariants
from dugnad.peer.nodes import Node
from dugnad.peer.stage import Disk
from dugnad.peer.world import World
from tests.sim.chaos import Chaos

SEEDS = 100
Rule = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True, slots=True)
class LeaderAnnounces(QuorumRule):
    """No votes: whoever leads has decided."""

    def needed(self, committee: Sequence[Voter]) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class MostOfThoseHeard(QuorumRule):
    """More than half of those whom `node` hears now: one side of a partition is all there is, to itself."""

    node: Node | None = None

    def decided(self, committee: Sequence[Voter], peers: Iterable[PeerId]) -> bool:
        assert self.node is not None
        me, world = self.node.peer, self.node.world
        heard = [voter.peer for voter in committee if voter.peer == me or world.reaches(me, voter.peer)]
        return 2 * weight_of(committee, peers) > weight_of(committee, heard)


def _with_rule(patch: pytest.MonkeyPatch, rule: Callable[[Node], QuorumRule]) -> None:
    honest = Node.__init__

    def weak(self: Node, world: World, peer: PeerId, disk: Disk) -> None:
        honest(self, world, peer, disk)
        self.follower.ledger.charter = replace(world.charter, rule=rule(self))

    patch.setattr(Node, "__init__", weak)


def leader_announces(patch: pytest.MonkeyPatch) -> None:
    _with_rule(patch, lambda node: LeaderAnnounces())


def most_of_those_heard(patch: pytest.MonkeyPatch) -> None:
    _with_rule(patch, lambda node: MostOfThoseHeard(node=node))


def lock_is_not_carried_over(patch: pytest.MonkeyPatch) -> None:
    honest = Follower._say_pledge

    def unbound(self: Follower, now: float) -> list[effects.Effect]:
        self.promises = structs.replace(self.promises, lock=None)
        return honest(self, now)

    patch.setattr(Follower, "_say_pledge", unbound)


def applied_before_commit(patch: pytest.MonkeyPatch) -> None:
    honest = Follower._on_proposal

    def hasty(self: Follower, sender: PeerId, said: Proposal, now: float) -> list[effects.Effect]:
        out = honest(self, sender, said, now)
        if self.at_head and self.replica.next is None and said.block.round == self.ledger.head.round + 1:
            self.replica.follow(Commit(said.block, 0, ()))
            out += self._advance(now)
        return out

    patch.setattr(Follower, "_on_proposal", hasty)


def voted_without_bytes(patch: pytest.MonkeyPatch) -> None:
    honest = Replica.missing

    def blind(self: Replica, block: Block) -> tuple[tuple[int, bytes], ...]:
        return () if self.next is None else honest(self, block)  # nothing to apply: it is asked for a proposal

    patch.setattr(Replica, "missing", blind)


def breaks(volunteers: int, rule: str) -> bool:
    """Whether one of the seeds breaks that rule."""
    for seed in range(SEEDS):
        try:
            Chaos(seed, volunteers).run()
        except InvariantBroken as broken:
            if rule in str(broken):
                return True
    return False


@pytest.mark.parametrize(
    ("taken_out", "broken"),
    [
        (leader_announces, "two blocks were committed for round"),
        (most_of_those_heard, "two blocks were committed for round"),
        (lock_is_not_carried_over, "two blocks were committed for round"),
        (applied_before_commit, "applies a block that was not committed"),
        (voted_without_bytes, "votes for bytes that it does not hold"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_rule_taken_out_is_caught(taken_out: Rule, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Invariants, "_check_certificate", lambda self, commit, committee: None)
    taken_out(monkeypatch)
    assert breaks(3, broken)


def test_a_certificate_by_too_few_votes_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    leader_announces(monkeypatch)
    assert breaks(3, "too few")
