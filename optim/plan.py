"""Who reduces which part: a pure function of the members' uplinks and of who owned what before."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from dugnad.dht.identity import PeerId


class PlanError(ValueError):
    """No plan can be made of these parts and members."""


def assign_parts(
    num_parts: int, members: Sequence[tuple[PeerId, float]], *, previous: tuple[PeerId, ...] | None
) -> tuple[PeerId, ...]:
    """Return the owner of each part, in numbers proportional to the members' uplinks (any one unit, >= 0).

    A member with uplink 0 owns nothing. `previous` are the owners in the last plan, one per part: those still here
    keep their parts, and only what somebody has too many of, or has left behind, moves. The order of `members` does
    not matter. Raises PlanError for no parts, no uplink at all, an impossible uplink, a member listed twice, or a
    `previous` of another number of parts.
    """
    uplinks = _checked(num_parts, members, previous)
    held: dict[PeerId, int] = dict.fromkeys(uplinks, 0)
    for owner in previous or ():
        if owner in held:
            held[owner] += 1
    room = _shares(num_parts, uplinks, held)
    owners: list[PeerId | None] = [None] * num_parts
    for part, owner in enumerate(previous or ()):
        if room.get(owner, 0) > 0:
            owners[part] = owner
            room[owner] -= 1
    # sorted: the same members make the same plan, in whatever order they were heard of
    receivers = (peer for peer in sorted(room) for _ in range(room[peer]))
    return tuple(next(receivers) if owner is None else owner for owner in owners)


def _checked(
    num_parts: int, members: Sequence[tuple[PeerId, float]], previous: tuple[PeerId, ...] | None
) -> dict[PeerId, float]:
    uplinks = dict(members)
    if num_parts < 1:
        raise PlanError(f"there are {num_parts} parts to own")
    if len(uplinks) != len(members):
        raise PlanError("a member is listed twice")
    for peer, uplink in uplinks.items():
        if not math.isfinite(uplink) or uplink < 0:
            raise PlanError(f"{peer} has an uplink of {uplink}")
    if not any(uplinks.values()):
        raise PlanError(f"none of {len(uplinks)} members can own a part: all uplinks are 0")
    if previous is not None and len(previous) != num_parts:
        raise PlanError(f"the last plan has {len(previous)} parts, this one {num_parts}: borders never move")
    return uplinks


def _shares(num_parts: int, uplinks: Mapping[PeerId, float], held: Mapping[PeerId, int]) -> dict[PeerId, int]:
    """Return how many parts each member owns: its exact share rounded down, what is left by largest remainder."""
    total = sum(Fraction(uplink) for uplink in uplinks.values())  # exact: a float sum depends on the order
    exact = {peer: Fraction(uplink) * num_parts / total for peer, uplink in uplinks.items()}
    shares = {peer: math.floor(share) for peer, share in exact.items()}
    left = num_parts - sum(shares.values())
    # of equal remainders the one that owns more goes first, so that fewer parts move
    order = sorted(exact, key=lambda peer: (shares[peer] - exact[peer], -held[peer], peer))
    for peer in order[:left]:
        shares[peer] += 1
    return shares
