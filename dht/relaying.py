"""Being a good relay for others: the daemon is started anew until it is one, as another daemon sees it.

p2pd starts two relay services at once, one with its own limits and one with libp2p's, 128 KiB in 2 minutes; whichever
comes last answers. There is no telling from within.
"""

import contextlib
import logging
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from dugnad.dht import circuit, control
from dugnad.dht.circuit import RelayRefused
from dugnad.dht.daemon import Daemon, DaemonRefused
from dugnad.dht.identity import Identity, PeerId, write_private
from dugnad.dht.transport import TransportError
from dugnad.dht.wire import WireError

logger = logging.getLogger(__name__)

TRIES = 8
"""Each succeeds with at least one in two."""


async def restart_as_relay(daemon: Daemon, peer: PeerId, listen: Sequence[str]) -> None:
    """Restart `daemon`, which is called `peer`, on `listen` as one that relays; at worst it does so a little only.

    Raises NetworkDown, PortInUse or ListenError.
    """
    fault: str | None = None
    async with _another_daemon() as probe:
        for _ in range(TRIES):
            await daemon.restart(listen, is_open=True)
            fault = await _fault(daemon, peer, probe)
            if fault is None:
                return
            logger.debug("the network daemon is started anew: as a relay %s", fault)
    logger.warning("this peer can't relay well for others (%s); all else works", fault)


async def _fault(daemon: Daemon, peer: PeerId, probe: Daemon) -> str | None:
    """What is wrong with it as a relay; None for nothing."""
    try:
        await control.connect(probe, peer, await control.identify(daemon))
        place = await circuit.reserve(probe, peer)
        await control.disconnect(probe, peer)
    except (TransportError, DaemonRefused, RelayRefused, WireError) as error:
        return f"it failed: {error}"
    return "it lets only little through" if place.is_small else None


@contextlib.asynccontextmanager
async def _another_daemon() -> AsyncIterator[Daemon]:
    """A daemon for a moment, that is nobody in particular."""
    with tempfile.TemporaryDirectory(prefix="dugnad-") as folder:
        key = Path(folder, "key")
        write_private(key, Identity.generate().libp2p_private_key())
        async with Daemon(identity_file=key, listen=("/ip4/127.0.0.1/tcp/0",), log=Path(folder, "log")) as daemon:
            yield daemon
