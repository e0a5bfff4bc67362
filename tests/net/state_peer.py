"""A peer that gives or takes a model, as a process of its own: python -m tests.net.state_peer give|take JSON

give    writes the manifest, says {"address"}, and gives until its stdin ends; then says {"given_bytes"}
take    says {"chunks"} with each chunk, and at last {"seconds", "digest", "donors", "received_bytes"} or {"error"}
"""

import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dugnad.dht.budget import GIVE_MBIT, Budget
from dugnad.dht.bulk import Unavailable, serve_blobs
from dugnad.dht.download import Incoming, Progress, download
from dugnad.dht.host import Host
from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.transport import Direction
from dugnad.optim.layout import Layout
from dugnad.optim.outer import SharedModel, wanted_blobs
from tests.net.hosts import owner_of

STALLED_S = 5.0


@dataclass(frozen=True, slots=True)
class Peer:
    """What a process is told to be."""

    ip: str
    folder: str
    """Of its own."""
    manifest: str
    """The file that the manifest is in, for all of them."""
    rows: int
    """A row of the model has 4096 parameters, and so 32 KiB of state."""
    give_mbit: float = GIVE_MBIT
    flips_a_byte: bool = False
    """In each chunk that it gives."""
    donors: tuple[str, ...] = ()
    """Addresses of those to take from."""

    @property
    def layout(self) -> Layout:
        """Of the model that is given and taken."""
        return Layout([("embed", (self.rows // 2, 4096)), ("head", (self.rows - self.rows // 2, 4096))], 1024, 2**20)

    def arguments(self, what: str) -> list[str]:
        """Of the interpreter that is to be this peer."""
        return ["-m", "tests.net.state_peer", what, json.dumps(asdict(self))]


class Meter:
    """Counts what passes."""

    def __init__(self) -> None:
        self.bytes: Counter[tuple[Direction, str]] = Counter()

    def __call__(self, direction: Direction, kind: str, num_bytes: int) -> None:
        self.bytes[direction, kind] += num_bytes


def say(**said: object) -> None:
    """One line for whoever started us."""
    print(json.dumps(said), flush=True)


def host_of(me: Peer, meter: Meter) -> Host:
    """Our place in the network."""
    listen = (f"/ip4/{me.ip}/tcp/0",)
    return Host(Identity.generate(), listen=listen, meter=meter, state_dir=Path(me.folder), owner_of=owner_of)


def model_of(layout: Layout) -> SharedModel:
    """The same for all donors, and no two of its chunks alike."""
    chance = np.random.default_rng(1)
    return SharedModel(layout, *(chance.standard_normal(layout.total_elements, dtype=np.float32) for _ in range(2)))


async def give(me: Peer) -> None:
    """Serve the model until our stdin ends."""
    model, meter = model_of(me.layout), Meter()
    Path(me.manifest).write_bytes(model.manifest())

    def lookup(digest: bytes) -> bytes | memoryview | None:
        blob = model.blob(digest)
        if blob is None or not me.flips_a_byte:
            return blob
        flipped = bytearray(blob)
        flipped[len(flipped) // 2] ^= 1
        return bytes(flipped)

    async with host_of(me, meter) as host:
        await serve_blobs(host, lookup, budget=Budget.of_mbit(me.give_mbit))
        say(address=host.addresses()[0])
        await asyncio.to_thread(sys.stdin.read)
    say(given_bytes=meter.bytes["sent", "state"])


async def take(me: Peer) -> None:
    """Download the model, and say how that went."""
    manifest, meter = Path(me.manifest).read_bytes(), Meter()
    wanted = wanted_blobs(me.layout, manifest)
    incoming = Incoming(Path(me.folder) / "incoming", lambda digest: None)
    donors = {PeerId(address.rpartition("/p2p/")[2]): address for address in me.donors}
    progress: list[Progress] = []

    def told(now: Progress) -> None:
        progress.append(now)
        say(chunks=now.num_chunks)

    async with host_of(me, meter) as host:
        for peer, address in donors.items():
            await host.learn(peer, (address,))
        since = time.perf_counter()
        try:
            await download(host, tuple(donors), wanted, incoming, timeout_s=STALLED_S, told=told)
        except Unavailable as error:
            say(error=str(error))
            return
        seconds = time.perf_counter() - since
    model = SharedModel.from_manifest(me.layout, manifest, incoming.chunk)
    received = meter.bytes["received", "state"]
    say(seconds=seconds, digest=model.digest().hex(), donors=progress[-1].num_donors, received_bytes=received)


if __name__ == "__main__":
    what, told = sys.argv[1], json.loads(sys.argv[2])
    asyncio.run({"give": give, "take": take}[what](Peer(**{**told, "donors": tuple(told["donors"])})))
