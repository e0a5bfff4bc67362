"""Who may take part, in whole runs of virtual time: bans, places, ends of memberships, and those who ignore them."""

from collections.abc import Callable, Iterable

import pytest

from dugnad.coordinator.admission import GRACE_S, Admission
from dugnad.coordinator.committee import Succession
from dugnad.coordinator.messages import Block
from dugnad.coordinator.patience import Patience
from dugnad.dht.identity import PeerId
from dugnad.dht.ticket import Terms
from dugnad.peer.invariants import InvariantBroken
from dugnad.peer.lifecycle import REFUSED_S
from dugnad.peer.stage import COORDINATOR, TICKET, WALL_S
from dugnad.peer.world import World
from tests.sim.test_rounds import RECIPE, committed, contributors, goes_on, leading, started, volunteer, voters

BANNED = PeerId("p01")


def rounds_with(world: World, peer: PeerId, since: int) -> list[int]:
    """In which rounds after that one the work of `peer` counted."""
    blocks = [commit.block for commit in world.chain()[since:]]
    return [block.round for block in blocks if peer in contributors(block)]


def has_left(world: World, peer: str) -> Callable[[], bool]:
    return lambda: PeerId(peer) in world.left


@pytest.mark.parametrize("phase", ["gather", "reduce", "vote", "idle"])
def test_who_is_banned_is_out_from_the_round_under_way_or_the_next(phase: str) -> None:
    world, _ = started(21, 4)
    world.run(world.now + 60, until=lambda: leading(world).phase == phase)
    at = world.rounds()
    world.decide("ban", BANNED, "poison")
    goes_on(world, 3, within_s=60)
    allowed = {"gather": [], "idle": [], "reduce": [], "vote": [at + 1]}[phase]
    assert rounds_with(world, BANNED, at) == allowed
    assert BANNED not in voters(world)
    assert (
        world.left[BANNED] == "E403 the organizer has banned your key (poison). Only the organizer can take that back."
    )


def test_a_ban_costs_the_others_nothing() -> None:
    plain, _ = started(22, 4)
    world, _ = started(22, 4)
    world.decide("ban", BANNED)
    since = world.now
    goes_on(plain, 4, within_s=60)
    goes_on(world, 4, within_s=60)
    assert world.now - since < plain.now - since + 2.0
    assert all(node.follower.view == 0 for node in world.nodes.values())


def test_who_is_banned_does_not_come_back_until_it_is_unbanned() -> None:
    world, _ = started(23, 3)
    world.decide("ban", BANNED)
    world.run(world.now + 60, until=has_left(world, BANNED))
    world.start_volunteer(BANNED)
    at = world.rounds()
    world.run(world.now + 60, until=has_left(world, BANNED))
    assert world.left[BANNED].startswith("E403")
    assert rounds_with(world, BANNED, at) == []
    world.decide("unban", BANNED)
    world.start_volunteer(BANNED)
    world.run(world.now + 60, until=lambda: bool(rounds_with(world, BANNED, at)))
    assert rounds_with(world, BANNED, at), world.reason()
    assert world.audit().clean


def test_the_coordinator_itself_can_be_banned_and_the_volunteers_go_on() -> None:
    world, _ = started(24, 3)
    world.decide("ban", COORDINATOR)
    goes_on(world, 3, within_s=60)
    assert COORDINATOR not in voters(world)


def test_a_leader_that_does_not_hear_of_a_ban_costs_a_view_and_no_more() -> None:
    world, _ = started(25, 4)
    world.decide("ban", BANNED, unheard_by=[COORDINATOR, BANNED])
    at = world.rounds()
    world.run(world.now + GRACE_S)
    late = world.rounds()
    assert late > at + 3, "nobody held up a round whose leader could not know"
    rounds = RECIPE.rounds
    goes_on(world, 3, within_s=3 * (Patience.of(rounds).vote_s + rounds.train_s + rounds.exchange_s))
    assert [k for k in rounds_with(world, BANNED, at) if k > late + 1] == [], "voters who know see to it"
    assert max(node.follower.view for node in world.nodes.values()) <= 1
    assert any(said.reason == "not admitted" for said in world.refusals)
    assert world.audit().clean


def test_a_banned_peer_that_does_not_heed_it_and_leads_is_given_up() -> None:
    world, _ = started(26, 3)
    world.crash(COORDINATOR)
    world.run(world.now + 60, until=lambda: world.leader() is not None)
    leader = leading(world).follower.leader
    world.decide("ban", leader, unheard_by=[leader])
    at = world.rounds()
    world.run(world.now + 120, until=committed(world, at + 6))
    assert leader not in voters(world), world.reason()
    assert world.audit().clean


def test_by_a_ticket_of_two_uses_two_come_in_and_the_third_is_told_why() -> None:
    world = World(27, RECIPE)
    world.start_coordinator()
    world.ticket = world.issue(Terms(uses=2))
    for name in ("p00", "p01", "p02"):
        world.start_volunteer(name)
    world.run(300, until=lambda: world.rounds() >= 4 and bool(world.left))
    assert world.left == {"p02": "E401 all 2 places of your invite are taken. Ask the organizer for a new one."}
    assert [contributors(commit.block) for commit in world.chain()[:4]] == [["p00", "p01"]] * 4
    assert world.audit().clean


def test_all_who_come_at_once_by_one_ticket_are_admitted_in_one_block_each_once() -> None:
    world, _ = started(28, 6)
    world.run(world.now + 30, until=committed(world, 6))
    blocks: list[Block] = [commit.block for commit in world.chain()]
    assert sum(len(block.admissions) for block in blocks) == 6
    assert world.audit().clean


def test_who_has_no_ticket_or_an_expired_one_is_told_and_the_others_do_not_wait_for_it() -> None:
    world, _ = started(29, 2)
    world.ticket = world.issue(Terms(expires=int(WALL_S)))
    world.start_volunteer("late")
    goes_on(world, 3, within_s=60)
    world.run(world.now + 2 * REFUSED_S, until=has_left(world, "late"))
    assert world.left[PeerId("late")].startswith("E102 your invite expired on 2023-11-1")
    assert rounds_with(world, PeerId("late"), 0) == []


def test_a_membership_ends_in_the_midst_of_the_run_and_a_new_ticket_renews_it() -> None:
    world, _ = started(30, 2)
    ends = int(WALL_S + world.now + 30)
    world.ticket = world.issue(Terms(until=ends))
    world.start_volunteer("guest")
    guest = PeerId("guest")
    world.run(world.now + 60, until=lambda: bool(rounds_with(world, guest, 0)))
    assert rounds_with(world, guest, 0), world.reason()
    world.run(ends - WALL_S)
    at = world.rounds()
    world.run(world.now + REFUSED_S + 30, until=has_left(world, guest))
    assert world.left[guest].startswith("E102 your membership ended on")
    goes_on(world, 2, within_s=60)
    assert [k for k in rounds_with(world, guest, at) if k > at + 1] == []
    assert guest not in voters(world)
    world.ticket = world.issue(Terms(until=ends + 10_000))
    at = world.rounds()
    world.start_volunteer("guest")
    world.run(world.now + 60, until=lambda: bool(rounds_with(world, guest, at)))
    assert rounds_with(world, guest, at), world.reason()
    assert world.audit().clean


def test_who_was_admitted_in_rounds_that_an_epoch_undid_shows_its_claim_again() -> None:
    world, names = started(31, 3)
    world.partition([COORDINATOR], names)
    cut_at = world.rounds()
    world.run(world.now + 60, until=committed(world, cut_at + 2))
    world.start_volunteer("newcomer")
    world.partition([COORDINATOR], ["newcomer"])
    world.run(world.now + 60, until=lambda: bool(rounds_with(world, PeerId("newcomer"), 0)))
    assert rounds_with(world, PeerId("newcomer"), 0), world.reason()
    world.crash(COORDINATOR)
    world.recover(COORDINATOR)
    world.heal()
    world.start_coordinator()
    world.run(world.now + 60, until=lambda: world.chain()[-1].block.epoch == 1 and world.rounds() > cut_at + 3)
    assert rounds_with(world, PeerId("newcomer"), 0), world.reason()
    assert world.audit().clean


def test_a_leader_that_admits_whom_it_likes_gets_no_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    world, _ = started(32, 4)
    world.ticket = world.issue(Terms(bound=PeerId("someone else")))
    honest = Admission.proofs
    of_coordinator = world.nodes[COORDINATOR].follower.admission

    def lax(self: Admission, claims: object) -> dict[PeerId, bytes]:
        if self is not of_coordinator:
            return honest(self, claims)  # type: ignore[arg-type]
        return {peer: b"" for peer, _ in claims}  # type: ignore[attr-defined]

    monkeypatch.setattr(Admission, "proofs", lax)
    world.start_volunteer("stranger")
    at = world.rounds()
    world.run(world.now + 90, until=committed(world, at + 8))
    assert rounds_with(world, PeerId("stranger"), 0) == []
    assert world.rounds() > at, world.reason()


def test_the_world_sees_whom_nobody_admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    world, _ = started(33, 2)
    monkeypatch.setattr(type(world.gate), "needs_proof", lambda self, peer: False)
    world.ticket = world.issue(Terms(bound=PeerId("someone else")))
    world.start_volunteer("stranger")
    with pytest.raises(InvariantBroken, match="the work of stranger, who was never admitted"):
        world.run(world.now + 60)


def test_whose_key_is_the_tickets_is_nobody() -> None:
    world, _ = started(34, 2)
    assert TICKET not in world.nodes
    assert volunteer(world, "p00").follower.refuses(TICKET) is not None


def test_a_coordinator_whose_delegation_ended_is_out_within_a_round_and_with_a_new_one_it_leads_again() -> None:
    world = World(35, RECIPE)
    keeper = world.start_coordinator(until_s=40.0).machine
    for name in ("p00", "p01", "p02"):
        world.start_volunteer(name)
    world.run(40)
    at = world.rounds()
    goes_on(world, 3, within_s=60)
    assert all(COORDINATOR not in {v.peer for v in commit.block.committee} for commit in world.chain()[at + 1 :])
    assert keeper.reason == "its delegation is over: it takes the run's key to renew it"
    world.starts += 1
    world.nodes[COORDINATOR].do(lambda node: node.perform(keeper.renew(world.delegation(COORDINATOR), now=world.now)))
    world.run(world.now + 60, until=lambda: world.nodes[COORDINATOR].follower.leads)
    assert COORDINATOR in voters(world), world.reason()
    assert world.audit().clean


def test_a_coordinator_that_renews_its_delegation_in_time_leads_on() -> None:
    world = World(36, RECIPE)
    keeper = world.start_coordinator(until_s=40.0).machine
    for name in ("p00", "p01", "p02"):
        world.start_volunteer(name)

    def renew() -> None:
        world.starts += 1
        fresh = world.delegation(COORDINATOR, 1e6)
        world.nodes[COORDINATOR].do(lambda node: node.perform(keeper.renew(fresh, now=world.now)))

    world.at(20, renew)
    world.run(120)
    assert COORDINATOR in voters(world)
    assert all(node.follower.view == 0 for node in world.nodes.values())
    assert {commit.block.coordinator.term for commit in world.chain() if commit.block.coordinator} == {1, 2}
    assert world.audit().clean


@pytest.mark.parametrize("fault", ["expired", "revoked"])
def test_a_member_that_shows_a_longer_ticket_which_is_good_no_more_costs_the_others_nothing(fault: str) -> None:
    world = World(37, RECIPE)
    world.start_coordinator()
    world.ticket = world.issue(Terms(until=int(WALL_S + 100_000)))
    for name in ("p00", "p01", "p02"):
        world.start_volunteer(name)
    world.run(60)
    at = world.rounds()
    expires = int(WALL_S - 100_000) if fault == "expired" else 0
    world.ticket = world.issue(Terms(until=int(WALL_S + 200_000), expires=expires))
    if fault == "revoked":
        world.decide("revoke", world.ticket.id.hex())
    world.crash("p01")
    world.start_volunteer("p01")
    world.run(360)
    assert world.rounds() > at + 60, world.reason()
    assert len(rounds_with(world, PeerId("p01"), at)) > 50, "it goes on by the membership that it has"
    assert not [raw for commit in world.chain()[at:] for raw in commit.block.admissions]
    assert all(node.follower.view == 0 for node in world.nodes.values())
    assert world.refusals == []
    assert world.audit().clean


def committees_with(world: World, peer: PeerId, since: int) -> list[int]:
    """Which blocks after that round name `peer` in the committee."""
    blocks = [commit.block for commit in world.chain()[since:]]
    return [block.round for block in blocks if peer in {voter.peer for voter in block.committee}]


def test_a_leader_that_keeps_who_is_banned_in_the_committee_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    world, _ = started(38, 4)
    honest, disk = Succession.members, world.disks[BANNED].incarnation

    def lax(self: Succession, stay: Iterable[PeerId]) -> dict[PeerId, bytes]:
        return honest(self, stay) | ({BANNED: disk} if self.leader == COORDINATOR else {})

    monkeypatch.setattr(Succession, "members", lax)
    world.decide("ban", BANNED)
    world.run(world.now + GRACE_S)
    at = world.rounds()
    world.run(world.now + 120, until=committed(world, at + 3))
    assert committees_with(world, BANNED, at + 1) == []
    assert world.rounds() >= at + 3, world.reason()


def test_a_coordinator_that_keeps_its_seat_when_its_delegation_ended_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(39, RECIPE)
    world.start_coordinator(until_s=40.0)
    for name in ("p00", "p01", "p02"):
        world.start_volunteer(name)
    honest, of_coordinator = Admission.barred, world.nodes[COORDINATOR].follower.admission

    def lax(self: Admission, *args: object) -> frozenset[PeerId]:
        barred = honest(self, *args)  # type: ignore[arg-type]
        return barred - {COORDINATOR} if self is of_coordinator else barred

    monkeypatch.setattr(Admission, "barred", lax)
    world.run(40 + GRACE_S)
    at = world.rounds()
    assert committees_with(world, COORDINATOR, at - 1) == [at], "others wait for the grace to pass"
    world.run(world.now + 120, until=committed(world, at + 3))
    assert committees_with(world, COORDINATOR, at + 1) == []
    assert world.rounds() >= at + 3, world.reason()
