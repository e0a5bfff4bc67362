from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dugnad.dht.identity import PeerId
from dugnad.optim.plan import PlanError, assign_parts


def swarm(**uplinks: float) -> list[tuple[PeerId, float]]:
    return [(PeerId(name), uplink) for name, uplink in uplinks.items()]


names = st.sampled_from([PeerId(f"p{i}") for i in range(12)])
uplink_maps = st.dictionaries(names, st.floats(0, 1e12), min_size=1).filter(lambda uplinks: any(uplinks.values()))


def test_parts_are_proportional_to_uplinks() -> None:
    owners = assign_parts(10, swarm(a=1.0, b=3.0, c=1.0), previous=None)
    assert Counter(owners) == {"a": 2, "b": 6, "c": 2}


def test_a_member_without_uplink_owns_nothing() -> None:
    assert set(assign_parts(5, swarm(a=0.0, b=1.0), previous=(PeerId("a"),) * 5)) == {"b"}


def test_the_parts_of_a_lost_owner_move_and_no_others() -> None:
    before = assign_parts(12, swarm(a=1.0, b=1.0, c=1.0, d=1.0), previous=None)
    after = assign_parts(12, swarm(a=1.0, b=1.0, d=1.0), previous=before)
    assert Counter(after) == {"a": 4, "b": 4, "d": 4}
    assert all(new == old for new, old in zip(after, before, strict=True) if old != "c")


def test_a_newcomer_takes_its_share_and_nobody_else_gains() -> None:
    before = assign_parts(12, swarm(a=1.0, b=1.0, c=1.0), previous=None)
    after = assign_parts(12, swarm(a=1.0, b=1.0, c=1.0, d=1.0), previous=before)
    moved = [new for new, old in zip(after, before, strict=True) if new != old]
    assert moved == ["d"] * 3


def test_the_same_members_again_move_nothing_when_the_parts_do_not_divide_evenly() -> None:
    previous = (PeerId("c"), PeerId("c"), PeerId("a"), PeerId("b"))
    assert assign_parts(4, swarm(a=1.0, b=1.0, c=1.0), previous=previous) == previous


@given(st.integers(1, 40), uplink_maps, st.none() | st.lists(names, min_size=40, max_size=40), st.randoms())
def test_every_part_has_one_owner_within_one_of_its_share_and_the_fewest_parts_move(
    num_parts: int, uplinks: dict[PeerId, float], past: list[PeerId] | None, chance: object
) -> None:
    previous = None if past is None else tuple(past[:num_parts])
    members = list(uplinks.items())
    owners = assign_parts(num_parts, members, previous=previous)
    chance.shuffle(members)  # type: ignore[attr-defined]
    assert assign_parts(num_parts, members, previous=previous) == owners
    assert len(owners) == num_parts
    owned = Counter(owners)
    total = sum(uplinks.values())
    for peer, uplink in uplinks.items():
        assert abs(owned[peer] - num_parts * uplink / total) < 1 + 1e-9
        assert uplink > 0 or not owned[peer]
    if previous is not None:
        kept = sum(new == old for new, old in zip(owners, previous, strict=True))
        held = Counter(previous)
        assert kept == sum(min(held[peer], owned[peer]) for peer in owned)


@given(st.integers(1, 40), uplink_maps)
def test_planning_again_with_nothing_changed_moves_nothing(num_parts: int, uplinks: dict[PeerId, float]) -> None:
    owners = assign_parts(num_parts, list(uplinks.items()), previous=None)
    assert assign_parts(num_parts, list(uplinks.items()), previous=owners) == owners


@pytest.mark.parametrize(
    ("num_parts", "members", "previous", "said"),
    [
        (0, swarm(a=1.0), None, "0 parts"),
        (3, [], None, "none of 0 members"),
        (3, swarm(a=0.0, b=0.0), None, "all uplinks are 0"),
        (3, swarm(a=-1.0), None, "a has an uplink of -1"),
        (3, swarm(a=float("nan")), None, "a has an uplink of nan"),
        (3, swarm(a=float("inf"), b=1.0), None, "a has an uplink of inf"),
        (3, [*swarm(a=1.0), *swarm(a=2.0)], None, "listed twice"),
        (3, swarm(a=1.0), (PeerId("a"),) * 4, "4 parts, this one 3"),
    ],
)
def test_impossible_plans_are_refused(
    num_parts: int, members: list[tuple[PeerId, float]], previous: tuple[PeerId, ...] | None, said: str
) -> None:
    with pytest.raises(PlanError, match=said):
        assign_parts(num_parts, members, previous=previous)
