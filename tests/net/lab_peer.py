"""A peer of the lab as a process of its own: what `dugnad join` is before it has a role, and tensors to give away.

    python -m tests.net.lab_peer FOLDER SEED [--listen HOST] [--port PORT] [--give-mbit RATE] [BOOTSTRAP ...]

Says one line of JSON once it is there, {peer, addresses, reach, outside, ready_s}, and answers one line for each line:

    {"do": "state"}                          -> the same, as it is now
    {"do": "connect", "to": [peer, ...], "within_s": s}      -> {peer: {"path", "seconds", "why"}}: ways for bulk bytes,
                                                                seconds after the start of this process
    {"do": "meet", "to": peer}               -> {"path", "seconds"}: of a direct connection, from now on
    {"do": "give", "to": peer, "bytes": n, "relayed": false}   -> {"path", "seconds", "cpu_s"}
    {"do": "cpu"}                            -> {"cpu_s"}: of this process and its daemon, since it began
"""

import argparse
import asyncio
import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from dugnad.dht import bulk
from dugnad.dht.budget import GIVE_MBIT
from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.paths import Path as Way
from dugnad.dht.paths import Reach
from dugnad.dht.transport import Transport, TransportError
from dugnad.peer.folder import Folder
from dugnad.peer.network import Network
from dugnad.peer.place import Place, placed
from dugnad.peer.place import Way as WayIn

RUN = bytes(range(32))
CHANNEL, WORD = "lab/give/1", "lab/word/1"
SEEN_BY_S = 20.0
MOST_BYTES = 256 * 2**20


def identity(seed: int) -> Identity:
    """The key of the peer with that number."""
    return Identity.from_seed(bytes([seed]) * 32)


@functools.cache
def _payload(num_bytes: int) -> bytes:
    return os.urandom(num_bytes)


def _cpu_s() -> float:
    me = psutil.Process()
    return sum(sum(one.cpu_times()[:2]) for one in (me, *me.children(recursive=True)))


def _state(place: Place) -> dict[str, Any]:
    return {
        "peer": place.identity.peer_id,
        "addresses": place.host.addresses(),
        "reach": place.rendezvous.reach,
        "outside": place.rendezvous.outside,
        "ready_s": _age_s(),
    }


def _age_s() -> float:
    return time.time() - psutil.Process().create_time()


async def _connect(place: Place, to: PeerId, within_s: float) -> dict[str, Any]:
    deadline = time.monotonic() + within_s
    while True:
        try:
            return await _way_to(place, to)
        except TransportError as error:  # we have not heard of it yet
            if time.monotonic() > deadline:
                return {"path": None, "seconds": _age_s(), "why": str(error)}
        await asyncio.sleep(0.1)


async def _way_to(place: Place, to: PeerId) -> dict[str, Any]:
    await place.host.request(to, WORD, b"", timeout_s=5)  # libp2p's way, which always works
    while place.rendezvous.reach is Reach.UNKNOWN and _age_s() < SEEN_BY_S:
        await asyncio.sleep(0.05)  # nobody has told yet how this peer is seen
    connection = await place.rendezvous.connect(to, within_s=5)
    path = connection.path if connection is not None else await _libp2p_path(place, to)
    return {"path": path, "seconds": _age_s(), "why": place.rendezvous.why_not(to)}


async def _libp2p_path(place: Place, to: PeerId) -> Way | None:
    route = await place.host.route_to(to)
    return route.path if route is not None else None


async def _meet(place: Place, to: PeerId) -> dict[str, Any]:
    while True:
        try:
            await place.host.request(to, WORD, b"", timeout_s=5)  # once it has heard of it
            break
        except TransportError:
            await asyncio.sleep(0.05)
    since = time.monotonic()
    connection = await place.rendezvous.connect(to, within_s=10)
    return {"path": connection.path if connection is not None else None, "seconds": time.monotonic() - since}


async def _give(place: Place, to: PeerId, num_bytes: int, *, relayed: bool) -> dict[str, Any]:
    transport: Transport = place.host if relayed else place.direct
    payload = _payload(num_bytes)
    since, cpu_s = time.monotonic(), _cpu_s()
    await bulk.push(transport, to, CHANNEL, b"", [payload], kind="upload", timeout_s=bulk.SILENCE_S)
    paths = {pair.peer: pair.path for pair in place.direct.paths()}
    path = await _libp2p_path(place, to) if relayed else paths[to]
    return {"path": path, "seconds": time.monotonic() - since, "cpu_s": _cpu_s() - cpu_s}


async def _answer(place: Place, asked: dict[str, Any]) -> dict[str, Any]:
    match asked:
        case {"do": "state"}:
            return _state(place)
        case {"do": "cpu"}:
            return {"cpu_s": _cpu_s()}
        case {"do": "connect", "to": others, "within_s": within_s}:
            found = await asyncio.gather(*(_connect(place, to, within_s) for to in others))
            return dict(zip(others, found, strict=True))
        case {"do": "meet", "to": to}:
            return await _meet(place, to)
        case {"do": "give", "to": to, "bytes": num_bytes}:
            return await _give(place, to, num_bytes, relayed=asked.get("relayed", False))
    raise ValueError(f"{asked} is nothing that we do")


async def _take(sender: PeerId, header: bytes, buffers: list[memoryview]) -> bytes:
    return b""


async def _word(sender: PeerId, payload: bytes) -> bytes:
    return b"word"


async def _serve(options: argparse.Namespace) -> None:
    folder = Folder(options.folder)
    folder.create()
    (folder.path / "identity.key").write_text((bytes([options.seed]) * 32).hex())
    way = WayIn(RUN, "lab", identity(0).peer_id, tuple(options.bootstrap))
    network = Network(host=options.listen, port=options.port, give_mbit=options.give_mbit)
    first = not options.bootstrap
    async with placed("volunteer", folder, way, network, may_wait=first) as place:
        await place.host.serve(WORD, _word)
        await bulk.serve_push(place.direct, CHANNEL, lambda *_: None, _take, header_cap=64, total_cap=MOST_BYTES)
        print(json.dumps(_state(place)), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            try:
                answer = await _answer(place, json.loads(line))
            except TransportError as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("--listen", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=4001)
    parser.add_argument("--give-mbit", type=float, default=GIVE_MBIT)
    parser.add_argument("bootstrap", nargs="*")
    asyncio.run(_serve(parser.parse_args()))
