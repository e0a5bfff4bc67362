"""How a host is reached and how fast its line is: what it takes members of the run to find out."""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from dugnad.dht import speed
from dugnad.dht.direct import Direct
from dugnad.dht.host import Host
from dugnad.dht.identity import PeerId
from dugnad.dht.paths import Path as Way
from dugnad.dht.paths import Reach
from dugnad.dht.rendezvous import Acquaintances, Rendezvous
from dugnad.dht.transport import TransportError

REACH_S = 4.0
"""How long to wait until a member has said how it sees us."""
SPEED_S = 6.0
"""How long measuring may take, whoever answers: one measurement takes half of that."""
_LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class Reached:
    """How others reach a host, and how fast. None: not measured.

    path: the way on which the rates were measured.
    """

    reach: Reach | None = None
    inbound: bool | None = None
    path: Way | None = None
    up_mbit: float | None = None
    down_mbit: float | None = None


async def probe(host: Host, rendezvous: Rendezvous, members: Sequence[PeerId], claim: bytes) -> Reached:
    """What members that `host` is connected to find out about it, in REACH_S and SPEED_S; claim: for them to let us in.

    rendezvous: on one of the host's `extra_ports`, not begun yet. Within one machine or network nobody judges.
    """
    await rendezvous.begin(host, _acquaintances(host, rendezvous, members, claim))
    seen = host.seen_ip is not None
    if seen:
        await _until_known(rendezvous)
    found = await _measured(Direct(host, rendezvous), members)
    known = rendezvous.reach is not Reach.UNKNOWN
    return Reached(
        rendezvous.reach if known else None,
        bool(host.open_ports) if seen else None,
        *found,
    )


def _acquaintances(host: Host, rendezvous: Rendezvous, members: Sequence[PeerId], claim: bytes) -> Acquaintances:
    return Acquaintances(
        refuses=lambda peer, shown: None if peer in members else "we only look in",
        pinned=lambda peer: None,  # their records are not read: libp2p has shown who they are
        open_peers=lambda: members,
        open_hosts=lambda: host.open_hosts(rendezvous.carrier.port),
        is_open=lambda: host.is_open_at(rendezvous.carrier.port),
        claim=lambda: claim,
    )


async def _until_known(rendezvous: Rendezvous) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(REACH_S):
            while rendezvous.reach is Reach.UNKNOWN:
                await asyncio.sleep(_LOOK_S)


async def _measured(direct: Direct, members: Sequence[PeerId]) -> tuple[Way | None, float | None, float | None]:
    """(path, up, down) to the first member that takes part in measuring, in Mbit/s."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SPEED_S):
            for peer in members:
                with contextlib.suppress(TransportError):
                    speeds = await speed.measure(direct, peer)
                    path = next((pair.path for pair in direct.paths() if pair.peer == peer), None)
                    return path, speeds.up_mbit, speeds.down_mbit
    return None, None, None
