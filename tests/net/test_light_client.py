"""The wire is libp2p's and these bytes', not one library's: a peer of another make takes part, through a relay."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dugnad.dht import hello
from dugnad.dht.host import Host
from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.records import ProgressBody, owner_of
from dugnad.dht.swarm import Swarm
from dugnad.dht.wire import PROTOCOL
from tests.net.hosts import ignore

pytestmark = [
    pytest.mark.net,
    # found, not imported: in one process with hivemind, each has a crypto.proto of its own
    pytest.mark.skipif(find_spec("libp2p") is None, reason="py-libp2p is not installed: pip install 'dugnad[libp2p]'"),
]

RUN = b"r" * 32
CLIENT = Path(__file__).parent / "light_client.py"
DOING = ProgressBody(7, "training", "round 7: training", 3, 410.5, 2.5, bytes(32))


@asynccontextmanager
async def member(tmp_path: Path, name: str, bootstrap: Sequence[str] = ()) -> AsyncIterator[Host]:
    identity = Identity.generate()
    host = Host(identity, meter=ignore, owner_of=owner_of, state_dir=tmp_path / name, bootstrap=bootstrap)
    (tmp_path / name).mkdir()
    swarm = Swarm(
        host,
        identity,
        RUN,
        role="volunteer",
        directory=tmp_path / name,
        refused=lambda why: None,
        progress=lambda: DOING,
    )
    async with host:
        await hello.serve(host, RUN, "tiny", seen=host.seen_at)
        async with swarm:
            yield host


async def take_place(hidden: Host, relay: PeerId) -> None:
    """Be reachable through `relay`: a reservation by circuit v2, its protobufs written by hand."""
    stream = await hidden.open(relay, "/libp2p/circuit/relay/0.2.0/hop", kind="message")
    await stream.write(bytes([2, 0x08, 0]))  # {type: RESERVE}, with its length before it
    (first,) = await stream.read_exactly(1)
    (second,) = await stream.read_exactly(1) if first & 0x80 else (0,)
    answer = await stream.read_exactly((first & 0x7F) | second << 7)
    assert answer[:2] == bytes([0x08, 2])  # {type: STATUS
    assert answer[-2:] == bytes([0x28, 100])  # status: OK}
    await stream.close()


def ask(relay: str, target: PeerId, num_records: int) -> dict[str, Any]:
    command = [sys.executable, str(CLIENT), relay, target, RUN.hex(), str(num_records)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


async def test_another_implementation_says_hello_and_reads_the_records_of_a_run_through_a_relay(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        relay = await stack.enter_async_context(member(tmp_path, "relay"))
        hidden = await stack.enter_async_context(member(tmp_path, "hidden", relay.addresses()))
        await take_place(hidden, relay.peer_id)
        said = await asyncio.to_thread(ask, relay.addresses()[0], hidden.peer_id, 4)
        assert said["hello"][0] == PROTOCOL
        assert said["hello"][2:5] == ["tiny", "", ""]
        assert "p2p-circuit" in said["hello"][5], "it came another way than through the relay"
        keys = {host._identity.public_key.hex() for host in (relay, hidden)}
        assert [kind for kind, *_ in said["records"]] == ["member", "member", "progress", "progress"]
        assert {owner for _, owner, *_ in said["records"]} == keys
        bodies = [body for kind, _, _, body in said["records"] if kind == "progress"]
        assert bodies == [[7, "training", "round 7: training", 3, 410.5, 2.5, bytes(32).hex()]] * 2
