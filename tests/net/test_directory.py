"""The DHT node against strangers: what it keeps, for how long, and what it answers and believes."""

import asyncio
import gc
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from dugnad.dht import directory
from dugnad.dht.directory import LIFETIME_S, MAX_OWNERS, Directory, import_hivemind
from dugnad.dht.host import Host
from dugnad.dht.identity import Identity
from tests.net.hosts import ignore, owner_of

pytestmark = pytest.mark.net

RUN, OTHER_RUN = b"r" * 32, b"s" * 32
KEY = b"k" * 20
FIND, PING = "DHTProtocol.rpc_find", "DHTProtocol.rpc_ping"

Start = Callable[..., Awaitable[Host]]


@pytest.fixture(autouse=True, scope="module")
def hivemind() -> None:
    """Imported before any test imports a part of it, so that its warnings are none of ours in whatever order."""
    import_hivemind()


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts hosts that live until the test's end."""
    async with AsyncExitStack() as stack:

        async def start_one(**settings: Any) -> Host:
            identity = Identity.generate()
            state_dir = tmp_path / identity.peer_id
            host = Host(identity, meter=ignore, owner_of=owner_of, state_dir=state_dir, **settings)
            return await stack.enter_async_context(host)

        yield start_one


@pytest.fixture
def storage() -> Any:
    """What a node keeps, empty."""
    from hivemind.dht.storage import DHTLocalStorage

    return DHTLocalStorage()


def place_of(run: bytes) -> bytes:
    """The DHT's key of a run, hashed."""
    from hivemind.dht.routing import DHTID

    return bytes(DHTID.generate(source=b"dugnad/announcement/1" + run))


def test_only_our_runs_announcements_that_end_soon_are_kept() -> None:
    identity = Identity.generate()
    ownership = Directory(None, identity, owner_of, time.time)._ownership  # type: ignore[arg-type]

    def kept(run: bytes, ahead_s: float) -> bool:
        value = msgspec.msgpack.encode(identity.peer_id.encode())
        record = SimpleNamespace(
            key=place_of(run),
            subkey=msgspec.msgpack.encode(identity.peer_id),
            value=value,
            expiration_time=time.time() + ahead_s,
        )
        record.value = ownership.sign_value(record)
        return ownership.validate(record)

    assert kept(OTHER_RUN, 60)  # no run is known yet
    Directory._key(SimpleNamespace(_ownership=ownership), RUN)  # type: ignore[arg-type]
    assert kept(RUN, 60)
    assert kept(RUN, LIFETIME_S + 50)  # by a clock that is fast
    assert not kept(OTHER_RUN, 60)
    for ahead_s in (math.nan, math.inf, -math.inf, LIFETIME_S + 120, 86400):
        assert not kept(RUN, ahead_s)


def test_of_a_run_so_many_announcements_are_kept_and_their_renewals_still_pass(storage: Any) -> None:
    expiry = time.time() + 60
    stored = [storage.store_subkey(KEY, f"peer {number}", b"x", expiry) for number in range(MAX_OWNERS + 10)]
    assert stored == [True] * MAX_OWNERS + [False] * 10
    assert storage.store_subkey(KEY, "peer 0", b"y", expiry + 1)
    assert len(storage.get(KEY).value) == MAX_OWNERS


def test_an_older_announcement_told_again_does_not_shorten_the_life_of_the_new_one(
    storage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    assert storage.store_subkey(KEY, "peer", b"old", now + 60)
    assert storage.store_subkey(KEY, "peer", b"new", now + 120)
    assert not storage.store_subkey(KEY, "peer", b"old", now + 60)
    assert not storage.store_subkey(KEY, "peer", b"other", now + 120)
    assert storage.store_subkey(KEY, "peer", b"new", now + 120)
    monkeypatch.setattr("hivemind.utils.timed_storage.get_dht_time", lambda: now + 90)
    assert storage.get(KEY).value.get("peer").value == b"new"


async def test_requests_that_no_peer_of_ours_sends_are_refused_and_nothing_is_printed(
    start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    from hivemind.p2p import PeerID
    from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError
    from hivemind.proto import dht_pb2

    a = await start()
    b = await start(bootstrap=a.addresses())
    stranger, victim = b._directory._control, PeerID.from_base58(a.peer_id)
    failures: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))

    def node(num_bytes: int) -> Any:
        return dht_pb2.NodeInfo(node_id=b"\xff" * num_bytes)

    many = dht_pb2.FindRequest(keys=[place_of(RUN)] * 2)
    too_long = dht_pb2.FindRequest(keys=[bytes(2000)])
    cases = [
        (FIND, many.SerializeToString(), "2 keys"),
        (FIND, too_long.SerializeToString(), "at most 1024"),
        (FIND, b"\xff\xff", "DecodeError"),
        (FIND, dht_pb2.FindRequest(keys=[place_of(RUN)], peer=node(40)).SerializeToString(), "node id of 40 bytes"),
        (PING, dht_pb2.PingRequest(peer=node(19)).SerializeToString(), "node id of 19 bytes"),
        ("DHTProtocol.rpc_store", dht_pb2.StoreRequest(peer=node(40)).SerializeToString(), "node id of 40 bytes"),
    ]
    for service, raw, reason in cases:
        with pytest.raises(P2PHandlerError, match=reason):
            await stranger.call_unary_handler(victim, service, raw)
    fair = dht_pb2.FindRequest(keys=[place_of(RUN)]).SerializeToString()
    assert dht_pb2.FindResponse.FromString(await stranger.call_unary_handler(victim, FIND, fair)).results
    await asyncio.sleep(0)
    gc.collect()
    assert not failures
    assert capfd.readouterr() == ("", "")


async def test_an_answer_that_says_to_hold_for_ever_does_not_end_the_search(start: Start) -> None:
    from hivemind.dht.protocol import DHTProtocol
    from hivemind.dht.storage import DictionaryDHTValue
    from hivemind.proto import dht_pb2

    a = await start()
    honest, liar = await start(bootstrap=a.addresses()), await start(bootstrap=a.addresses())
    genuine = f"{honest.peer_id} here".encode()
    assert await honest.announce(RUN, genuine, expires_s=60)
    a._directory._node.protocol.storage.clear()
    lie = dht_pb2.FindResult(
        type=dht_pb2.FOUND_DICTIONARY,
        value=DHTProtocol.serializer.dumps(DictionaryDHTValue()),
        expiration_time=math.inf,
    )
    told = asyncio.Event()
    answer = honest._directory._control.unary_handlers[FIND]

    async def lying(request: bytes, sender: Any) -> bytes:
        told.set()
        return bytes(dht_pb2.FindResponse(results=[lie]).SerializeToString())

    async def slow(request: bytes, sender: Any) -> bytes:
        await told.wait()
        await asyncio.sleep(0.2)
        return bytes(await answer(request, sender))

    dict.__setitem__(liar._directory._control.unary_handlers, FIND, lying)
    dict.__setitem__(honest._directory._control.unary_handlers, FIND, slow)
    assert await a.discover(RUN) == [genuine]


async def test_a_full_run_fits_into_one_answer(start: Start) -> None:
    from hivemind.dht.routing import DHTID

    a = await start()
    b = await start(bootstrap=a.addresses())
    b._directory._ownership.validate = lambda record: True  # type: ignore[method-assign]
    raw = msgspec.msgpack.encode(bytes(directory.RECORD_BYTES)) + bytes(64)
    held, key = a._directory._node.protocol.storage, DHTID.from_bytes(place_of(RUN))
    for _ in range(MAX_OWNERS):
        held.store_subkey(key, Identity.generate().peer_id, raw, time.time() + 60)
    assert len(await b.discover(RUN)) == MAX_OWNERS
