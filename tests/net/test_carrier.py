"""Direct connections between real sockets: who is let in, what travels, and what happens when they break."""

import asyncio
import contextlib
import os
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from blake3 import blake3

from dugnad.dht import bulk, meeting, mux, observers, rendezvous
from dugnad.dht.budget import Budget
from dugnad.dht.carrier import Carrier, NoConnection, Refused
from dugnad.dht.certificate import LASTS, Certificate
from dugnad.dht.connection import Connection
from dugnad.dht.direct import Direct
from dugnad.dht.endpoint import Endpoint
from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.meeting import Meet
from dugnad.dht.paths import Path as Way
from dugnad.dht.paths import Reach
from dugnad.dht.rendezvous import Acquaintances, Rendezvous
from dugnad.dht.transport import Stream, TransportError, Unreachable
from tests.unit.memory_transport import MemoryTransport, Net, network

ANN, BOB, EVE, JOE = (Identity.from_seed(bytes([k]) * 32) for k in (1, 2, 3, 4))
ANYWHERE = Endpoint("127.0.0.1", 0)
CHANNEL = "test/bulk/1"


# -- carriers alone: who is let in


@dataclass
class End:
    """A carrier, whom it expects, and what came of it."""

    carrier: Carrier
    certificate: Certificate
    expected: dict[PeerId, bytes] = field(default_factory=dict)
    there: list[Connection] = field(default_factory=list)
    served: list[PeerId] = field(default_factory=list)

    @property
    def place(self) -> Endpoint:
        return Endpoint("127.0.0.1", self.carrier.port)

    async def sends(self, peer: PeerId, place: Endpoint) -> None:
        """Connect to `peer` there, and send it something."""
        connection = await self.carrier.dial(peer, place, keep_port=False)
        await connection.open(CHANNEL, kind="upload").write(b"something")


@asynccontextmanager
async def end(who: Identity, certificate: Certificate) -> AsyncIterator[End]:
    expected: dict[PeerId, bytes] = {}
    there: list[Connection] = []
    carrier = Carrier(
        who, certificate, listen=ANYWHERE, meter=lambda direction, kind, count: None,
        expects=expected.get, established=there.append, over=lambda connection, why: None,
    )  # fmt: skip
    async with carrier:
        made = End(carrier, certificate, expected, there)

        async def serve(peer: PeerId, stream: Stream) -> None:
            made.served.append(peer)

        carrier.handlers[CHANNEL] = serve
        try:
            yield made
        finally:
            for connection in there:
                await connection.close()


def certificate(directory: Path, who: Identity, name: str = "own", *, age: timedelta = timedelta()) -> Certificate:
    return Certificate.load_or_create(directory / name, who.peer_id, now=datetime.now(UTC) - age)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[Identity], Path]:
    def of(who: Identity) -> Path:
        path = tmp_path / who.peer_id[-6:]
        path.mkdir(exist_ok=True)
        return path

    return of


Folders = Callable[[Identity], Path]


async def test_two_who_expect_each_other_are_connected_and_know_how_they_are_seen(folder: Folders) -> None:
    async with end(ANN, certificate(folder(ANN), ANN)) as ann, end(BOB, certificate(folder(BOB), BOB)) as bob:
        ann.expected[BOB.peer_id], bob.expected[ANN.peer_id] = bob.certificate.der, ann.certificate.der
        connection = await ann.carrier.dial(BOB.peer_id, bob.place, keep_port=True)
        assert connection.seen_as == f"127.0.0.1:{ann.carrier.port}"
        async with asyncio.timeout(5):
            while not bob.there:
                await asyncio.sleep(0)
        (accepted,) = bob.there
        assert (accepted.peer, accepted.seen_as) == (ANN.peer_id, str(bob.place))
        await ann.sends(BOB.peer_id, bob.place)
        async with asyncio.timeout(5):
            while bob.served != [ANN.peer_id]:
                await asyncio.sleep(0)


@pytest.mark.parametrize("fault", ["wrong", "expired", "swapped", "unknown", "another peer"])
async def test_who_is_not_what_is_expected_gets_no_byte_through(folder: Folders, fault: str) -> None:
    age = LASTS + timedelta(1) if fault == "expired" else timedelta()
    anns = certificate(folder(ANN), ANN, age=age)
    async with end(ANN, anns) as ann, end(BOB, certificate(folder(BOB), BOB)) as bob:
        ann.expected[BOB.peer_id] = bob.certificate.der
        expected = {
            "wrong": certificate(folder(ANN), ANN, "another").der,
            "expired": anns.der,
            "swapped": certificate(folder(EVE), EVE).der,
            "another peer": anns.der,
        }
        if fault != "unknown":
            bob.expected[ANN.peer_id] = expected[fault]
        asked = EVE.peer_id if fault == "another peer" else BOB.peer_id
        with pytest.raises(NoConnection):
            await ann.sends(asked, bob.place)
        assert bob.there == []
        assert bob.served == []


@pytest.mark.parametrize(
    ("age", "words"), [(LASTS + timedelta(1), "expired"), (timedelta(), "self-signed certificate")]
)
async def test_a_certificate_that_is_not_good_is_refused_by_name(folder: Folders, age: timedelta, words: str) -> None:
    bobs = certificate(folder(BOB), BOB, age=age)
    async with end(ANN, certificate(folder(ANN), ANN)) as ann, end(BOB, bobs) as bob:
        bob.expected[ANN.peer_id] = ann.certificate.der
        ann.expected[BOB.peer_id] = bobs.der if age else certificate(folder(BOB), BOB, "another").der
        with pytest.raises(Refused, match=words):
            await ann.carrier.dial(BOB.peer_id, bob.place, keep_port=False)


async def test_a_stranger_who_says_nothing_or_nonsense_is_hung_up_on(folder: Folders) -> None:
    async with end(BOB, certificate(folder(BOB), BOB)) as bob:
        loop = asyncio.get_running_loop()
        for words in (b"GET / HTTP/1.1\r\n" + bytes(64), b"dugnad-bulk/1" + EVE.public_key):
            with socket.socket() as sock:
                sock.setblocking(False)
                await loop.sock_connect(sock, (bob.place.host, bob.place.port))
                await loop.sock_sendall(sock, words)
                with contextlib.suppress(ConnectionResetError):
                    async with asyncio.timeout(2):
                        while await loop.sock_recv(sock, 1024):
                            pass
        assert bob.there == []


# -- peers that meet


@dataclass
class Peer:
    """One that meets others over a transport in memory, and then directly."""

    libp2p: MemoryTransport
    rendezvous: Rendezvous
    direct: Direct
    moved: Counter[tuple[str, str]]
    refused: set[PeerId]
    taken: list[bytes] = field(default_factory=list)


@asynccontextmanager
async def peers(
    net: Net, folder: Folders, *who: Identity, open_ones: Sequence[Identity] = ()
) -> AsyncIterator[list[Peer]]:
    """open_ones: those of them that are open, as all know."""
    async with AsyncExitStack() as stack:
        made = []
        for identity in who:
            moved: Counter[tuple[str, str]] = Counter()

            def meter(direction: str, kind: str, count: int, moved: Counter[tuple[str, str]] = moved) -> None:
                moved[direction, kind] += count

            met = Rendezvous(identity, listen=ANYWHERE, folder=folder(identity), meter=meter)
            await stack.enter_async_context(met)
            libp2p = net.join(identity.peer_id)
            peer = Peer(libp2p, met, Direct(libp2p, met), moved, set())
            await bulk.serve_push(peer.direct, CHANNEL, lambda *_: None, taking(peer), header_cap=64, total_cap=2**30)
            made.append(peer)
        for identity, peer in sorted(zip(who, made, strict=True), key=lambda one: one[0] not in open_ones):
            others = [one.peer_id for one in open_ones if one is not identity]
            acquaintances = known(peer.refused, is_open=identity in open_ones, open_peers=others)
            await peer.rendezvous.begin(peer.libp2p, acquaintances)
        yield made


def known(refused: set[PeerId], *, is_open: bool = False, open_peers: Sequence[PeerId] = ()) -> Acquaintances:
    return Acquaintances(
        refuses=lambda peer, claim: "it is banned" if peer in refused else None,
        pinned=lambda peer: None,
        open_peers=lambda: open_peers,
        open_hosts=lambda: ("127.0.0.1",) if is_open else (),
        is_open=lambda: is_open,
    )


def taking(peer: Peer) -> bulk.Take:
    async def take(sender: PeerId, header: bytes, buffers: list[memoryview]) -> bytes:
        peer.taken += [bytes(buffer) for buffer in buffers]
        return b"taken"

    return take


async def give(peer: Peer, to: Identity, data: bytes) -> bytes:
    return await bulk.push(peer.direct, to.peer_id, CHANNEL, b"", [data], kind="upload", timeout_s=5)


async def test_bytes_go_directly_and_are_counted_and_shown(folder: Folders) -> None:
    data = os.urandom(3 * 2**20)
    async with network() as net, peers(net, folder, ANN, BOB) as (ann, bob):
        assert await give(ann, BOB, data) == b"taken"
        assert bob.taken == [data]
        assert await give(bob, ANN, data[:1000]) == b"taken"
        (path,) = ann.direct.paths()
        assert (path.peer, path.path) == (BOB.peer_id, Way.DIRECT)
        assert path.sent_bytes_per_s > 0
        assert ann.moved["sent", "upload"] >= len(data)
        assert bob.moved["received", "upload"] >= len(data)


async def test_both_ways_and_many_at_once_nothing_gets_mixed_up(folder: Folders) -> None:
    async with network() as net, peers(net, folder, ANN, BOB) as (ann, bob):
        big = [os.urandom(2**20) for _ in range(2)]
        fetched: list[bytes] = []
        blobs = [os.urandom(2**18) for _ in range(8)]
        by_hash = {blake3(blob).digest(): blob for blob in blobs}
        budget = Budget(1e9)
        await bulk.serve_blobs(bob.direct, by_hash.get, budget=budget)
        wanted = {digest: len(blob) for digest, blob in by_hash.items()}
        await asyncio.gather(
            give(ann, BOB, big[0]),
            give(bob, ANN, big[1]),
            bulk.fetch_all(
                ann.direct, [BOB.peer_id], wanted, kind="state", timeout_s=5,
                on_blob=lambda digest, blob: fetched.append(bytes(blob)),
            ),
        )  # fmt: skip
        assert (bob.taken, ann.taken) == ([big[0]], [big[1]])
        assert sorted(fetched) == sorted(blobs)


async def test_who_is_not_in_the_roster_is_served_over_libp2p_alone(folder: Folders) -> None:
    async with network() as net, peers(net, folder, ANN, BOB) as (ann, bob):
        bob.refused.add(ANN.peer_id)
        assert await give(ann, BOB, b"x" * 1000) == b"taken", "what may be sent there is not for the carrier to say"
        assert ann.rendezvous.connection(BOB.peer_id) is None
        assert "it is banned" not in ann.rendezvous.why_not(BOB.peer_id), "a reason is for the log of who refuses"
        assert "not expected" in ann.rendezvous.why_not(BOB.peer_id)


async def test_a_peer_that_is_banned_loses_its_connection(folder: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "LOOK_S", 0.05)
    async with network() as net, peers(net, folder, ANN, BOB) as (ann, bob):
        await give(ann, BOB, b"x")
        bob.refused.add(ANN.peer_id)
        async with asyncio.timeout(5):
            while ann.rendezvous.connection(BOB.peer_id) is not None:
                await asyncio.sleep(0.01)


async def test_a_certificate_that_the_record_does_not_name_is_refused(folder: Folders) -> None:
    async with network() as net, peers(net, folder, ANN, BOB) as (ann, bob):
        assert bob.rendezvous._known is not None
        pins = {ANN.peer_id: bytes(32)}
        bob.rendezvous._known = Acquaintances(
            refuses=lambda peer, claim: None, pinned=pins.get, open_peers=tuple, open_hosts=tuple, is_open=lambda: False
        )
        await give(ann, BOB, b"x")
        assert ann.rendezvous.connection(BOB.peer_id) is None


async def test_a_connection_cut_in_the_middle_costs_a_stream_and_the_next_one_gets_through(folder: Folders) -> None:
    data = os.urandom(16 * 2**20)
    async with network() as net, peers(net, folder, ANN, BOB) as (ann, bob):
        await give(ann, BOB, b"first")
        connection = ann.rendezvous.connection(BOB.peer_id)
        assert connection is not None
        giving = asyncio.create_task(give(ann, BOB, data))
        while bob.moved["received", "upload"] < 2**20:
            await asyncio.sleep(0)
        with socket.socket(fileno=os.dup(connection._wire._sock.fileno())) as line:  # below TLS, which must notice
            line.shutdown(socket.SHUT_RDWR)
        with pytest.raises(TransportError):
            await giving
        assert await give(ann, BOB, data) == b"taken"
        assert bob.taken == [b"first", data]


async def test_who_does_not_read_is_sent_no_more_than_a_window(folder: Folders) -> None:
    async with network() as net, peers(net, folder, ANN, BOB) as (ann, bob):
        stopped = asyncio.Event()

        async def ignore(peer: PeerId, stream: Stream) -> None:
            await stopped.wait()

        await bob.direct.serve_stream("test/ignore/1", ignore)
        assert await ann.rendezvous.connect(BOB.peer_id, within_s=5) is not None
        stream = await ann.direct.open(BOB.peer_id, "test/ignore/1", kind="upload")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await stream.write(bytes(64 * 2**20))
        assert ann.moved["sent", "upload"] <= mux.WINDOW_BYTES
        stopped.set()
        with pytest.raises(Unreachable):
            await stream.read_exactly(1)
        await stream.close()


async def test_of_too_many_connections_the_one_that_was_idle_longest_goes(
    folder: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "MAX_CONNECTIONS", 1)
    async with network() as net, peers(net, folder, ANN, BOB, EVE) as (ann, *_):
        await give(ann, BOB, b"x")
        (one,) = ann.rendezvous._observers._dialled.values()
        await ann.rendezvous.carrier.dial(BOB.peer_id, one, keep_port=False)
        await give(ann, EVE, b"x")
        async with asyncio.timeout(5):
            while ann.rendezvous.connection(BOB.peer_id) is not None:
                await asyncio.sleep(0.01)
        assert ann.rendezvous.connection(EVE.peer_id) is not None


async def test_where_no_connection_comes_about_bytes_go_over_libp2p(folder: Folders) -> None:
    async with network() as net, peers(net, folder, ANN) as (ann,):
        bob = net.join(BOB.peer_id)
        taken: list[bytes] = []

        async def take(sender: PeerId, header: bytes, buffers: list[memoryview]) -> bytes:
            taken.extend(map(bytes, buffers))
            return b"taken"

        await bulk.serve_push(bob, CHANNEL, lambda *_: None, take, header_cap=64, total_cap=2**20)
        assert await give(ann, BOB, b"over libp2p") == b"taken"
        assert taken == [b"over libp2p"]
        assert "can't be met" in ann.rendezvous.why_not(BOB.peer_id)


async def test_who_meets_us_while_we_ask_it_in_vain_is_not_left_waiting(
    folder: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with network() as net, peers(net, folder, ANN, BOB, open_ones=(ANN,)) as (ann, bob):
        bob.rendezvous._known = known(set())
        lost = asyncio.Event()

        async def request(peer: PeerId, channel: str, payload: bytes, *, timeout_s: float) -> bytes:
            await lost.wait()
            raise Unreachable(peer, "no answer")

        monkeypatch.setattr(bob.libp2p, "request", request)
        asking = asyncio.create_task(bob.rendezvous.connect(ANN.peer_id, within_s=5))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(ann.rendezvous.connect(BOB.peer_id, within_s=5))
        await until(lambda: BOB.peer_id in ann.rendezvous._arrivals)
        lost.set()
        assert await waiting is not None
        assert await asking is not None
        await until(lambda: not bob.rendezvous._attempts)
        assert not bob.rendezvous._heard


async def test_who_came_to_us_while_we_went_to_it_in_vain_is_sought_as_before(folder: Folders) -> None:
    async with network() as net, peers(net, folder, ANN, BOB) as (ann, bob):
        connection = await ann.rendezvous.connect(BOB.peer_id, within_s=5)
        await until(lambda: bob.rendezvous.connection(ANN.peer_id) is not None)
        said = Meet(b"c", Reach.OPEN, ("127.0.0.1:1",), (), "", "")
        await bob.rendezvous._act(ANN.peer_id, said, meeting.Dial((Endpoint("127.0.0.1", 1),)))
        assert bob.rendezvous.why_not(ANN.peer_id) == ""
        assert connection is not None
        await connection.close()
        await until(lambda: bob.rendezvous.connection(ANN.peer_id) is None)
        assert await bob.rendezvous.connect(ANN.peer_id, within_s=5) is not None


# -- how they are seen


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("lie", ["garbage", "9.9.9.9:1", "[2a00::9]:4002"])
async def test_one_observer_that_lies_changes_nothing(
    folder: Folders, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    monkeypatch.setattr(observers, "OBSERVERS", 3)  # so that it is among them
    honest = Connection.tell_seen
    async with network() as net, peers(net, folder, ANN, BOB, EVE, JOE, open_ones=(BOB, EVE, JOE)) as (ann, _, eve, _):
        monkeypatch.setattr(
            Connection, "tell_seen",
            lambda self, seen: honest(self, lie if self._handlers is eve.rendezvous.carrier.handlers else seen),
        )  # fmt: skip
        await until(lambda: len(ann.rendezvous._observers.watching) >= 2)
        await until(lambda: ann.rendezvous.reach is not Reach.UNKNOWN)
        assert ann.rendezvous.reach is Reach.CONE
        assert ann.rendezvous.outside == f"127.0.0.1:{ann.rendezvous.carrier.port}"


@pytest.mark.parametrize(("num_others", "reach"), [(1, Reach.SYMMETRIC), (2, Reach.CONE)])
async def test_where_two_observers_disagree_a_third_is_asked_if_there_is_one(
    folder: Folders, monkeypatch: pytest.MonkeyPatch, num_others: int, reach: Reach
) -> None:
    honest, others = Connection.tell_seen, (BOB, JOE)[:num_others]
    async with network() as net, peers(net, folder, ANN, EVE, *others, open_ones=(EVE, *others)) as (ann, eve, *_):
        monkeypatch.setattr(
            Connection, "tell_seen",
            lambda self, seen: honest(self, "9.9.9.9:1" if self._handlers is eve.rendezvous.carrier.handlers else seen),
        )  # fmt: skip
        await ann.rendezvous.connect(EVE.peer_id, within_s=5)
        await until(
            lambda: ann.rendezvous.reach is not Reach.UNKNOWN and len(ann.rendezvous._observers.watching) > num_others
        )
        assert ann.rendezvous.reach is reach


def opens(peer: Peer, other: Peer) -> None:
    """From now on all reach `peer`, and `other` knows."""
    peer.rendezvous._known = known(set(), is_open=True)
    other.rendezvous._known = known(set(), open_peers=[peer.libp2p.peer_id])


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "LOOK_S", 0.05)
    monkeypatch.setattr(observers, "DIAL_AGAIN_S", 0.1)


@pytest.mark.usefixtures("_soon")
async def test_an_observer_that_sees_another_port_is_dialled_again_until_ours_can_be_had(folder: Folders) -> None:
    async with network() as net, peers(net, folder, ANN, BOB) as (ann, bob):
        mine, there = (("127.0.0.1", one.rendezvous.carrier.port) for one in (ann, bob))
        with socket.socket() as in_the_way:  # as one that ended in an outage is for minutes
            in_the_way.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            in_the_way.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            in_the_way.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            in_the_way.bind(mine)
            in_the_way.connect(there)
            opens(bob, ann)
            await until(lambda: ann.rendezvous.connection(BOB.peer_id) is not None)
            assert ann.rendezvous.outside == ""
        await until(lambda: ann.rendezvous.outside == f"{mine[0]}:{mine[1]}")
        await until(lambda: len(ann.rendezvous._connections[BOB.peer_id]) == 1)
        assert ann.rendezvous.reach is Reach.CONE


@pytest.mark.usefixtures("_soon")
async def test_a_peer_that_was_not_open_yet_when_it_was_dialled_becomes_an_observer(folder: Folders) -> None:
    async with network() as net, peers(net, folder, ANN, BOB) as (ann, bob):
        assert await ann.rendezvous.connect(BOB.peer_id, within_s=5) is not None
        opens(bob, ann)
        await until(lambda: ann.rendezvous.outside == f"127.0.0.1:{ann.rendezvous.carrier.port}")


# -- who takes more than its share


async def test_any_number_of_strangers_costs_nobody_its_connection(
    folder: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "MAX_TRUSTED", 3)
    async with network() as net, peers(net, folder, ANN, BOB) as (ann, _):
        connection = await ann.rendezvous.connect(BOB.peer_id, within_s=5)
        for k in range(10, 20):
            ann.rendezvous._trust(
                Identity.from_seed(bytes([k]) * 32).peer_id, Meet(b"c", Reach.UNKNOWN, (), (), "", "")
            )
        await ann.rendezvous._cut_refused()
        assert connection is not None
        assert connection.alive
        newest = [Identity.from_seed(bytes([k]) * 32).peer_id for k in (18, 19)]
        assert list(ann.rendezvous._trusted) == [BOB.peer_id, *newest]


async def test_of_more_connections_than_one_peer_may_have_the_oldest_go(folder: Folders) -> None:
    async with network() as net, peers(net, folder, ANN, EVE) as (ann, eve):
        assert await eve.rendezvous.connect(ANN.peer_id, within_s=5) is not None
        place = Endpoint("127.0.0.1", ann.rendezvous.carrier.port)
        made = []
        for _ in range(2 * rendezvous.MAX_PER_PEER):
            with contextlib.suppress(NoConnection):
                made.append(await eve.rendezvous.carrier.dial(ANN.peer_id, place, keep_port=False))
        await until(lambda: sum(one.alive for one in made) == rendezvous.MAX_PER_PEER)
        assert all(one.alive for one in made[-rendezvous.MAX_PER_PEER :])
        assert len(ann.rendezvous._connections[EVE.peer_id]) == rendezvous.MAX_PER_PEER


async def test_who_is_refused_a_favour_is_sought_as_before(folder: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "PLACES_FOR_STRANGERS", 0)
    monkeypatch.setattr(rendezvous, "WAIT_S", 0.1)
    async with network() as net, peers(net, folder, ANN, BOB, open_ones=(ANN,)) as (ann, bob):
        bob.rendezvous._known = known(set())
        assert await ann.rendezvous.connect(BOB.peer_id, within_s=5) is None, "it would have to dial"
        assert bob.rendezvous.why_not(ANN.peer_id) == ""
        assert await bob.rendezvous.connect(ANN.peer_id, within_s=5) is not None
