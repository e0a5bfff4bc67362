"""What large swarms cost, with one in a hundred dying in each round: rounds commit, and messages stay cheap."""

from collections import Counter

import pytest

from dugnad.configs.recipe import load
from dugnad.coordinator.messages import MAX_VOTERS, Plan
from dugnad.peer.nodes import Node
from dugnad.peer.simulate import Asked, Found, Simulation
from dugnad.peer.simulate_gossip import GossipCost, simulate_gossip
from dugnad.peer.stage import COORDINATOR
from dugnad.peer.traffic import BULK
from dugnad.peer.world import World

RECIPE = load("tiny-books")
PART_BYTES = (66_000,) * 14
MOST_BYTES_S = 30_000
"""Sent by a peer, on average, of all that is neither work, averages nor models."""
MOST_EXCHANGES = 13
"""Until everyone has what one has said: design/round, "Gossip"."""


def simulated(peers: int, *, rounds: int) -> tuple[Simulation, Found]:
    asked = Asked(recipe="tiny-books", peers=peers, churn=0.01, uplink="100mbit", seed=1, rounds=rounds)
    simulation = Simulation(RECIPE.cut(rounds), asked, PART_BYTES)
    return simulation, simulation.run()


def check_run(peers: int, *, rounds: int) -> None:
    simulation, found = simulated(peers, rounds=rounds)
    print(found.text())
    assert (found.invariants_broken, found.stood_still, found.rounds_committed) == ((), None, rounds)
    by_kind = {kind: round(n) for kind, n in found.bytes_per_peer_s.items() if kind not in BULK}
    assert sum(by_kind.values()) <= MOST_BYTES_S, by_kind
    counted = [len(commit.block.entries) for commit in simulation.world.chain() if commit.block.parts]
    assert min(counted[-(rounds // 2) :]) >= 0.9 * peers, counted


def check_gossip(cost: GossipCost) -> None:
    print(cost)
    assert cost.bytes_per_s <= MOST_BYTES_S, cost.mean_bytes_per_s
    assert cost.max_exchanges <= MOST_EXCHANGES
    assert cost.heal_exchanges <= MOST_EXCHANGES


def test_two_hundred_of_whom_one_in_a_hundred_dies_in_each_round_commit_rounds_at_little_cost() -> None:
    check_run(200, rounds=8)


def test_gossip_of_two_hundred_is_cheap_and_everyone_soon_knows() -> None:
    check_gossip(simulate_gossip(200, seed=1))


@pytest.mark.soak
def test_a_thousand_of_whom_one_in_a_hundred_dies_in_each_round_commit_rounds_at_little_cost() -> None:
    check_run(1000, rounds=12)


@pytest.mark.soak
@pytest.mark.parametrize("peers", [1000, 10_000])
def test_gossip_of_many_is_cheap_and_everyone_soon_knows(peers: int) -> None:
    check_gossip(simulate_gossip(peers, seed=1, partition_s=0.0))


# -- how a leader of many spares its line


def heard(peers: int, *, rounds: int, monkeypatch: pytest.MonkeyPatch) -> tuple[World, dict[str, Counter[str]]]:
    """A run in which nobody dies, and how many of each kind of message everyone got; plans with fewer seats apart."""
    got: dict[str, Counter[str]] = {}
    take = Node.take

    def taken(node: Node, sender: str, message: object) -> None:
        kind = type(message).__name__
        if isinstance(message, Plan) and len(message.seats) <= MAX_VOTERS < peers:
            kind = "cut plan"
        got.setdefault(node.peer, Counter())[kind] += 1
        take(node, sender, message)  # type: ignore[arg-type]

    monkeypatch.setattr(Node, "take", taken)
    world = World(1, RECIPE, part_bytes=PART_BYTES)
    world.start_coordinator()
    for number in range(peers):
        world.start_volunteer(f"p{number:03}")
    world.run(600, until=lambda: bool(world.chain()) and len(world.chain()[-1].block.entries) == peers)
    got.clear()
    target = world.rounds() + rounds
    world.run(600, until=lambda: all(len(disk.commits) >= target for disk in world.disks.values()))
    return world, got


def test_the_long_lists_go_to_voters_and_owners_and_voters_pass_commits_on(monkeypatch: pytest.MonkeyPatch) -> None:
    world, got = heard(100, rounds=3, monkeypatch=monkeypatch)
    voters = {voter.peer for voter in world.chain()[-1].block.committee}
    assert len(voters) == MAX_VOTERS
    others = [peer for peer in world.nodes if peer not in voters and not got[peer]["Freeze"]]
    assert len(others) > 20
    for peer in others:
        assert got[peer]["cut plan"] >= 3
        assert (got[peer]["Plan"], got[peer]["Proposal"], got[peer]["Lock"]) == (0, 0, 0)
        assert got[peer]["Commit"] >= 3
    told = world.traffic.sent[COORDINATOR]["commit"]
    assert told < 0.7 * sum(sent["commit"] for sent in world.traffic.sent.values())
    assert all(len(commit.block.entries) == 100 for commit in world.chain()[-3:])


def test_up_to_a_committee_everyone_is_told_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    world, got = heard(12, rounds=2, monkeypatch=monkeypatch)
    for peer in world.nodes.keys() - {COORDINATOR}:
        assert got[peer]["Plan"] >= 2
        assert got[peer]["Freeze"] >= 2
        assert got[peer]["Proposal"] >= 2


def test_whom_a_dead_voter_should_have_told_of_a_commit_hears_of_it_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, _ = heard(100, rounds=1, monkeypatch=monkeypatch)
    voters = sorted(voter.peer for voter in world.chain()[-1].block.committee if voter.peer != COORDINATOR)
    leader = world.nodes[COORDINATOR].leader()
    for victim in voters[:8]:
        world.when(lambda: str(leader.phase) == "vote", lambda victim=victim: world.crash(victim), every_s=0.001)  # type: ignore[misc]
    target = world.rounds() + 1
    up = [disk for peer, disk in world.disks.items() if peer not in voters[:8]]
    world.run(world.now + 60, until=lambda: all(len(disk.commits) >= target for disk in up))
    assert all(len(disk.commits) >= target for disk in up)
