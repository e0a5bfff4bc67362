"""The host on real daemons, on loopback: what it carries, whom it names when it can't, and what it leaves behind."""

import asyncio
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest

from dugnad.dht import control, daemon, outside, streams
from dugnad.dht import host as hosts
from dugnad.dht.host import Host
from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.multiaddrs import host_of, ip_of, port_of
from dugnad.dht.transport import (
    REQUEST_BYTES,
    BootstrapError,
    ListenError,
    NetworkDown,
    PortInUse,
    RequestRefused,
    Stream,
    Unreachable,
)
from dugnad.dht.wire import WireError
from dugnad.peer import place as places
from dugnad.peer import roles
from dugnad.peer.errors import sentence_of
from dugnad.peer.folder import Folder
from tests.net.hosts import ignore, owner_of

pytestmark = pytest.mark.net

CHANNEL = "test/requests/1"
STREAMS = "test/streams/1"
RUN = b"r" * 32

DOCKER = [
    "/ip4/127.0.0.1/tcp/4001",
    "/ip6/::1/tcp/4001",
    "/ip6/fe80::1/tcp/4001",
    "/ip4/169.254.0.7/tcp/4001",
    *(f"/ip4/172.{number}.0.1/tcp/4001" for number in range(16, 32)),
    "/ip4/8.8.8.8/tcp/4001",
]
"""Of a machine with many networks of its own."""

Start = Callable[..., Awaitable[Host]]


def host(tmp_path: Path, identity: Identity | None = None, **settings: Any) -> Host:
    identity = identity or Identity.generate()
    settings = {"meter": ignore, "owner_of": owner_of, "state_dir": tmp_path / identity.peer_id, **settings}
    return Host(identity, **settings)


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts hosts that live until the test's end."""
    async with AsyncExitStack() as stack:

        async def start_one(identity: Identity | None = None, **settings: Any) -> Host:
            return await stack.enter_async_context(host(tmp_path, identity, **settings))

        yield start_one


async def echo(sender: PeerId, payload: bytes) -> bytes:
    return payload


def running(group: int) -> list[str]:
    """The processes of a process group, the dead that nobody has buried left out."""
    table = subprocess.run(["ps", "-axo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in table.splitlines()]
    return [row[2] for row in rows if int(row[0]) == group and not row[1].startswith("Z")]


async def gone_within(group: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while running(group) and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    return not running(group)


async def test_requests_are_answered_both_ways_and_know_their_sender(start: Start) -> None:
    a = await start()
    b = await start(bootstrap=a.addresses())

    async def greet(sender: PeerId, payload: bytes) -> bytes:
        return sender.encode() + payload

    await a.serve(CHANNEL, greet)
    await b.serve(CHANNEL, greet)
    assert await a.request(b.peer_id, CHANNEL, b" one", timeout_s=5) == f"{a.peer_id} one".encode()
    assert await b.request(a.peer_id, CHANNEL, b" two", timeout_s=5) == f"{b.peer_id} two".encode()
    assert await a.peers() == [b.peer_id]


async def test_a_request_of_the_largest_size_passes(start: Start) -> None:
    a = await start()
    b = await start(bootstrap=a.addresses())
    await a.serve(CHANNEL, echo)
    payload = os.urandom(REQUEST_BYTES)
    assert await b.request(a.peer_id, CHANNEL, payload, timeout_s=10) == payload


async def test_sixty_requests_at_once_get_their_own_replies(start: Start) -> None:
    a = await start()
    b = await start(bootstrap=a.addresses())
    await a.serve(CHANNEL, echo)
    payloads = [b"%d" % number for number in range(60)]
    replies = await asyncio.gather(*(b.request(a.peer_id, CHANNEL, each, timeout_s=10) for each in payloads))
    assert replies == payloads


async def test_a_stream_echoes_eight_megabytes_and_both_sides_count_every_byte(start: Start) -> None:
    counts: dict[str, Counter[tuple[str, str]]] = {"a": Counter(), "b": Counter()}
    a = await start(meter=lambda direction, kind, n: counts["a"].update({(direction, kind): n}))
    b = await start(
        bootstrap=a.addresses(), meter=lambda direction, kind, n: counts["b"].update({(direction, kind): n})
    )
    data = os.urandom(8 * 2**20)

    async def send_back(sender: PeerId, stream: Stream) -> None:
        stream.kind = "download"
        buffer = memoryview(bytearray(len(data)))
        await stream.read_into(buffer)
        await stream.write(buffer)
        buffer[:] = bytes(len(data))  # what was written must not depend on the buffer any more

    await a.serve_stream(STREAMS, send_back)
    stream = await b.open(a.peer_id, STREAMS, kind="upload")
    await stream.write(memoryview(data))
    assert await stream.read_exactly(len(data)) == data
    await stream.close()
    assert counts["a"] == {("received", "download"): len(data), ("sent", "download"): len(data)}
    assert counts["b"] == {("sent", "upload"): len(data), ("received", "upload"): len(data)}


async def test_requests_count_as_messages_without_their_frames(start: Start) -> None:
    count: Counter[tuple[str, str]] = Counter()
    a = await start()
    b = await start(bootstrap=a.addresses(), meter=lambda direction, kind, n: count.update({(direction, kind): n}))
    await a.serve(CHANNEL, echo)
    await b.request(a.peer_id, CHANNEL, b"x" * 1000, timeout_s=5)
    assert count == {("sent", "message"): 1000, ("received", "message"): 1000}


async def test_the_end_of_a_reply_arrives_although_the_handler_has_returned(start: Start) -> None:
    a = await start()
    b = await start(bootstrap=a.addresses())

    async def say(sender: PeerId, stream: Stream) -> None:
        await stream.write(bytes(1_500_000))

    await a.serve_stream(STREAMS, say)
    for _ in range(5):
        stream = await b.open(a.peer_id, STREAMS, kind="download")
        await asyncio.sleep(0.1)
        assert len(await stream.read_exactly(1_500_000)) == 1_500_000
        await stream.close()


async def test_streams_that_come_while_the_loop_stands_still_are_kept(start: Start) -> None:
    a = await start()
    with ExitStack() as stack:
        for _ in range(120):  # some systems have room for 128
            one = stack.enter_context(socket.socket(socket.AF_UNIX))
            one.setblocking(False)
            one.connect(a._daemon.streams)


async def test_who_has_many_streams_open_is_turned_away_until_one_ends_and_others_are_served(start: Start) -> None:
    refused, over, num_served = list[str](), asyncio.Event(), 0
    a = await start(refused=refused.append)
    b, c = await start(bootstrap=a.addresses()), await start(bootstrap=a.addresses())

    async def wait(sender: PeerId, stream: Stream) -> None:
        nonlocal num_served
        num_served += 1
        await stream.write(b"x")
        await over.wait()

    async def is_served(host: Host) -> bool:
        opened.append(stream := await host.open(a.peer_id, STREAMS, kind="download"))
        try:
            return await stream.read_exactly(1) == b"x"
        except Unreachable:
            return False

    await a.serve_stream(STREAMS, wait)
    async with asyncio.timeout(30):
        opened = list[Stream]()
        outcomes = Counter(await asyncio.gather(*(is_served(b) for _ in range(70))))
        assert outcomes == {True: 64, False: 6}
        assert refused == ["busy"] * 6
        assert num_served == 64, "no handler hears of the others"
        assert await is_served(c)
        over.set()
        for stream in opened:
            await stream.close()
        while not await is_served(b):
            await asyncio.sleep(0.05)
        for stream in opened:
            await stream.close()


async def test_a_stream_that_ends_early_is_unreachable(start: Start) -> None:
    a = await start()
    b = await start(bootstrap=a.addresses())

    async def say_little(sender: PeerId, stream: Stream) -> None:
        await stream.write(b"abc")
        await stream.close()

    await a.serve_stream(STREAMS, say_little)
    stream = await b.open(a.peer_id, STREAMS, kind="download")
    with pytest.raises(Unreachable, match=a.peer_id):
        await stream.read_exactly(4)
    await stream.close()


async def test_an_unknown_peer_is_unreachable_at_once(start: Start) -> None:
    a = await start()
    began = time.monotonic()
    with pytest.raises(Unreachable, match="nobody knows an address"):
        await a.request(Identity.generate().peer_id, CHANNEL, b"", timeout_s=5)
    with pytest.raises(Unreachable):
        await a.request(PeerId("junk"), CHANNEL, b"", timeout_s=5)
    assert time.monotonic() - began < 1


async def test_a_learned_address_makes_a_peer_reachable_and_junk_beside_it_does_not_matter(start: Start) -> None:
    a, b = await start(), await start()
    await a.serve(CHANNEL, echo)
    with pytest.raises(Unreachable):
        await b.request(a.peer_id, CHANNEL, b"hello", timeout_s=5)
    await b.learn(a.peer_id, ["junk", "/ip4/999.1.1.1/tcp/1", "/ip4/x/tcp/99999999", "/tcp/", "/x\0/tcp/\udcff"])
    with pytest.raises(Unreachable):
        await b.request(a.peer_id, CHANNEL, b"hello", timeout_s=5)
    await b.learn(a.peer_id, ["junk", *a.addresses()])
    assert await b.request(a.peer_id, CHANNEL, b"hello", timeout_s=5) == b"hello"


async def test_who_does_not_take_its_reply_is_not_waited_for(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "REPLY_S", 0.3)
    monkeypatch.setattr(streams, "CLOSE_S", 0.3)
    a = await start()
    b = await start(bootstrap=a.addresses())
    asked = asyncio.Event()

    async def say_much(sender: PeerId, payload: bytes) -> bytes:
        asked.set()
        return bytes(REQUEST_BYTES)

    await a.serve(CHANNEL, say_much)
    stream = await b.open(a.peer_id, CHANNEL, kind="message")
    taking: Any = stream._writer.transport
    taking.pause_reading()
    await stream.write_message(b"", b"much, please")
    async with asyncio.timeout(10):
        await asked.wait()
        while a._serving:
            await asyncio.sleep(0.05)
    await stream.close()


async def test_of_peers_dialled_no_more_are_kept_than_of_those_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, peers = host(tmp_path), [Identity.generate().peer_id for _ in range(20)]
    monkeypatch.setattr(hosts, "_PEERS_REMEMBERED", 4)
    monkeypatch.setattr(control, "connect", AsyncMock())
    for peer in peers:
        await a.learn(peer, ["/ip4/127.0.0.1/tcp/1"])
        await a._connect(peer, ())
    assert a._dialled == set(peers[-4:])


async def test_a_service_that_is_not_offered_is_named(start: Start) -> None:
    a = await start()
    b = await start(bootstrap=a.addresses())
    with pytest.raises(Unreachable, match="does not offer this service"):
        await b.request(a.peer_id, CHANNEL, b"", timeout_s=5)


async def test_a_slow_answer_is_unreachable_after_the_time_given_and_the_next_request_passes(start: Start) -> None:
    a = await start()
    b = await start(bootstrap=a.addresses())

    async def ponder(sender: PeerId, payload: bytes) -> bytes:
        if payload == b"hard":
            await asyncio.sleep(60)
        return payload

    await a.serve(CHANNEL, ponder)
    with pytest.raises(Unreachable, match=r"no answer in 0\.3 s"):
        await b.request(a.peer_id, CHANNEL, b"hard", timeout_s=0.3)
    assert await b.request(a.peer_id, CHANNEL, b"easy", timeout_s=5) == b"easy"


async def test_a_refusal_carries_the_reason_and_a_handlers_bug_carries_no_secret(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    a = await start()
    b = await start(bootstrap=a.addresses())

    async def refuse(sender: PeerId, payload: bytes) -> bytes:
        if payload == b"nonsense":
            raise WireError("bad signature")
        raise KeyError("/home/me/secret")

    await a.serve(CHANNEL, refuse)
    with pytest.raises(RequestRefused, match="bad signature"):
        await b.request(a.peer_id, CHANNEL, b"nonsense", timeout_s=5)
    with pytest.raises(RequestRefused, match="internal error"):
        await b.request(a.peer_id, CHANNEL, b"", timeout_s=5)
    assert "secret" in caplog.text


async def test_three_hosts_find_each_others_announcements(start: Start) -> None:
    a = await start()
    hosts = [a, await start(bootstrap=a.addresses()), await start(bootstrap=a.addresses())]
    records = {f"{each.peer_id} here".encode() for each in hosts}
    for each in hosts:
        assert await each.announce(RUN, f"{each.peer_id} here".encode(), expires_s=60)
    for each in hosts:
        assert set(await each.discover(RUN)) == records
        assert await each.discover(b"s" * 32) == []


async def test_a_new_announcement_replaces_the_old_one(start: Start) -> None:
    a = await start()
    b = await start(bootstrap=a.addresses())
    for number in range(3):
        await b.announce(RUN, f"{b.peer_id} {number}".encode(), expires_s=60)
    assert await a.discover(RUN) == [f"{b.peer_id} 2".encode()]


class Forger:
    """A validator for a node that accepts everything and puts what it likes behind a value."""

    def __init__(self, tail: Callable[[Any], bytes]) -> None:
        self.tail = tail

    def validate(self, record: Any) -> bool:
        return True

    def sign_value(self, record: Any) -> bytes:
        return bytes(record.value) + self.tail(record)

    def strip_value(self, record: Any) -> bytes:
        return bytes(record.value[:-64])


async def test_nobody_can_write_under_anothers_name_not_even_its_own_old_record_with_a_new_expiry(
    start: Start,
) -> None:
    a = await start()
    victim = await start(bootstrap=a.addresses())
    thief_identity = Identity.generate()
    thief = await start(thief_identity, bootstrap=a.addresses())
    genuine = f"{victim.peer_id} here".encode()
    await victim.announce(RUN, genuine, expires_s=60)
    node, key = thief._directory._node, b"dugnad/announcement/1" + RUN
    signed = a._directory._node.protocol.storage.get(type(node.node_id).generate(source=key)).value
    (entry,) = [item.value for _, item in signed.items()]
    tails: Sequence[Callable[[Any], bytes]] = [
        lambda record: thief_identity.sign(record.value),
        lambda record: entry[-64:],
        lambda record: b"",
    ]
    for tail in tails:
        node.protocol.record_validator = Forger(tail)
        for value in (genuine, f"{thief.peer_id} here".encode(), b"junk", 17):
            await node.store(key, value, time.time() + 3600, subkey=victim.peer_id)
            await node.store(key, value, time.time() + 3600)
            assert await a.discover(RUN) == [genuine]
            assert await victim.discover(RUN) == [genuine]
    news = f"{victim.peer_id} elsewhere".encode()
    await victim.announce(RUN, news, expires_s=120)  # a record that expires later would stand in its way
    assert await a.discover(RUN) == await victim.discover(RUN) == [news]


async def test_a_port_in_use_is_named_whether_by_a_stranger_or_by_another_host(tmp_path: Path, start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        address = f"/ip4/127.0.0.1/tcp/{stranger.getsockname()[1]}"
        with pytest.raises(PortInUse, match="another program already listens") as caught:
            await host(tmp_path, listen=[address]).__aenter__()
    assert caught.value.address == address
    taken = (await start()).addresses()[0].partition("/p2p/")[0]
    with pytest.raises(PortInUse, match=f"{host_of(taken)}:{port_of(taken)}"):
        await host(tmp_path, listen=[taken]).__aenter__()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("junk", "junk"),
        ("/ip4/127.0.0.1/udp/4001/quic-v1", "/ip4/127.0.0.1/udp/4001/quic-v1"),
        ("/ip4/192.0.2.1/tcp/4001", "192.0.2.1:4001: not an address of this machine. Choose another --host"),
    ],
)
async def test_an_address_that_cannot_be_listened_on_is_named(tmp_path: Path, address: str, said: str) -> None:
    with pytest.raises(ListenError, match=said):
        await host(tmp_path, listen=[address]).__aenter__()


async def test_each_bootstrap_address_that_fails_gets_its_own_reason(tmp_path: Path, start: Start) -> None:
    a, nobody = await start(), Identity.generate().peer_id
    with socket.create_server(("127.0.0.1", 0)) as closed:
        free_port = closed.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as mute:
        there = a.addresses()[0].partition("/p2p/")[0]
        cases = {
            f"/ip4/127.0.0.1/tcp/{free_port}/p2p/{nobody}": "refused (host up, nothing listening)",
            f"{there}/p2p/{nobody}": f"answered as {a.peer_id}, the invite says {nobody}",
            f"/ip4/127.0.0.1/tcp/{mute.getsockname()[1]}/p2p/{nobody}": "answered, but not as a dugnad peer",
            f"/dns4/no.such.host.invalid/tcp/4001/p2p/{nobody}": "cannot resolve no.such.host.invalid",
            "junk": "not the address of a peer",
        }
        with pytest.raises(BootstrapError) as caught:
            await host(tmp_path, bootstrap=list(cases)).__aenter__()
    for (_, reason), expected in zip(caught.value.failures, cases.values(), strict=True):
        assert reason.startswith(expected)
    assert caught.value.failures[0][0] == f"127.0.0.1:{free_port}"
    assert "each of the 5 known addresses of the run leads to nobody." in str(caught.value)
    assert str(caught.value).endswith("any peer of the run prints one with dugnad invite.")


async def test_a_peer_that_comes_back_on_its_port_is_reached_again(start: Start, tmp_path: Path) -> None:
    identity, other = Identity.generate(), await start()
    async with host(tmp_path, identity) as first:
        await first.serve(CHANNEL, echo)
        addresses = first.addresses()
        await other.learn(identity.peer_id, addresses)
        await other.request(identity.peer_id, CHANNEL, b"", timeout_s=5)
    with pytest.raises(Unreachable):
        await other.request(identity.peer_id, CHANNEL, b"", timeout_s=5)
    second = await start(identity, listen=[addresses[0].partition("/p2p/")[0]])
    await second.serve(CHANNEL, echo)
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        try:
            assert await other.request(identity.peer_id, CHANNEL, b"back", timeout_s=5) == b"back"
            break
        except Unreachable:
            await asyncio.sleep(0.2)
    else:
        pytest.fail("still unreachable after 15 s")


async def test_one_good_bootstrap_address_suffices_and_our_own_does_no_harm(start: Start) -> None:
    a = await start()
    identity = Identity.generate()
    ours = f"/ip4/127.0.0.1/tcp/9/p2p/{identity.peer_id}"
    b = await start(identity, bootstrap=["junk", ours, *a.addresses()])
    assert await b.peers() == [a.peer_id]
    await start(Identity.generate(), bootstrap=())


async def test_a_dead_daemon_is_our_failure_not_the_peers_and_leaving_still_works(start: Start, tmp_path: Path) -> None:
    a = await start()
    began = time.monotonic()
    async with host(tmp_path, bootstrap=a.addresses()) as b:
        os.kill(b.daemon_pid, signal.SIGKILL)
        assert await gone_within(b.daemon_pid, 3)
        with pytest.raises(NetworkDown, match=r"p2pd\.log"):
            await b.request(a.peer_id, CHANNEL, b"", timeout_s=5)
        with pytest.raises(NetworkDown):
            await b.discover(RUN)
    assert time.monotonic() - began < 6


async def test_a_role_whose_daemon_is_killed_ends_with_a_sentence(tmp_path: Path) -> None:
    async def wait() -> None:
        await asyncio.Event().wait()

    anything: Any = SimpleNamespace(serve=wait, keep_looking=wait, line=str)

    async def serve() -> None:
        async with host(tmp_path) as entered, asyncio.timeout(10):
            asyncio.get_running_loop().call_later(0.1, os.kill, entered.daemon_pid, signal.SIGKILL)
            place = places.Place(entered._identity, entered, anything, anything, anything, anything, anything, "")
            await roles._until_done(anything, place, Folder(tmp_path), lambda: None, "")

    with pytest.raises(ExceptionGroup) as raised:
        await serve()
    said = sentence_of(raised.value)
    assert said is not None
    assert said[0].startswith("the network daemon has ended (status -9)")
    assert said[1] == 1


def stop(a: Host) -> None:
    os.kill(a.daemon_pid, signal.SIGSTOP)


def sweep(a: Host) -> None:
    shutil.rmtree(a._daemon._directory)


@pytest.mark.parametrize(("harm", "why"), [(stop, "no answer in"), (sweep, "No such file")])
async def test_a_daemon_that_does_not_answer_is_noticed(
    harm: Callable[[Host], None], why: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "ASK_EVERY_S", 0.1)
    monkeypatch.setattr(daemon, "ANSWER_S", 1.0)
    a = await start()
    await asyncio.sleep(0.5)
    a.check_alive()
    harm(a)

    async def watch() -> None:
        async with asyncio.timeout(20):
            while True:
                a.check_alive()
                await asyncio.sleep(0.05)

    with pytest.raises(NetworkDown, match=rf"does not answer any more \(.*{why}"):
        await watch()


async def test_for_want_of_files_the_daemon_is_not_taken_for_gone(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, asked = await start(), 0

    async def cannot(*_: object, **__: object) -> None:
        nonlocal asked
        asked += 1
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(daemon, "ASK_EVERY_S", 0)
    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "open_unix_connection", cannot)
        keeping = asyncio.create_task(a._daemon.keep_asking())
        while asked < 10:
            await asyncio.sleep(0)
        a.check_alive()
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


async def test_the_sockets_lie_in_the_roles_folder_unless_its_path_is_too_long() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder, left = Path(name), Path(name, "p2pd-abcdefgh")
        left.mkdir()
        (left / "control").touch()
        async with host(folder, state_dir=folder) as short, host(folder, state_dir=folder / ("x" * 100)) as long:
            inside, outside = Path(short._daemon._directory), Path(long._daemon._directory)
            assert inside.parent == folder
            assert inside.stat().st_mode & 0o777 == outside.stat().st_mode & 0o777 == 0o700
            assert folder not in outside.parents
            assert list(folder.glob("p2pd-*")) == [inside], "what an earlier one left behind is gone"
            assert not list(folder.glob("*/p2pd-*"))
        assert not inside.exists()
        assert not outside.exists()


@pytest.mark.parametrize("seen", [DOCKER, list(reversed(DOCKER))])
async def test_of_many_addresses_those_are_told_that_others_can_dial(
    start: Start, monkeypatch: pytest.MonkeyPatch, seen: list[str]
) -> None:
    a = await start()
    monkeypatch.setattr(control, "identify", AsyncMock(return_value=seen))
    monkeypatch.setattr(outside, "card_addresses", lambda: [ip for each in seen if (ip := ip_of(each)) is not None])
    await a._outside.look_up()
    told = [address.partition("/p2p/")[0] for address in a.addresses()]
    assert len(told) == 16
    assert "/ip4/8.8.8.8/tcp/4001" not in told, "nobody has reached us there"
    assert not any(address.startswith(("/ip4/127.", "/ip6/::1", "/ip6/fe80:", "/ip4/169.254.")) for address in told)


async def test_nothing_is_left_after_leaving_or_failing(tmp_path: Path) -> None:
    entered = host(tmp_path)

    async def fail() -> None:
        async with entered:
            assert len(running(entered.daemon_pid)) == 2
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        await fail()
    assert await gone_within(entered.daemon_pid, 1)
    directory = Path(entered._daemon._directory)
    assert not directory.exists()
    failing = host(tmp_path, bootstrap=["junk"])
    with pytest.raises(BootstrapError):
        await failing.__aenter__()
    assert failing.daemon_pid
    assert await gone_within(failing.daemon_pid, 1)


async def test_the_key_file_is_ours_alone_and_nothing_reaches_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    identity = Identity.generate()
    async with host(tmp_path, identity) as entered:
        assert (tmp_path / identity.peer_id / "libp2p.key").stat().st_mode & 0o777 == 0o600
        assert identity.peer_id in entered.addresses()[0]
    assert capfd.readouterr() == ("", "")


CHILD = """
import asyncio, sys
from pathlib import Path
from dugnad.dht.host import Host
from dugnad.dht.identity import Identity

async def main():
    async with Host(Identity.generate(), meter=print, state_dir=Path(sys.argv[1]), owner_of=lambda raw: None) as host:
        print(host.daemon_pid, host._daemon._directory, flush=True)
        try:
            await asyncio.sleep(60)
        finally:
            print(await host.peers(), flush=True)

asyncio.run(main())
"""


@contextmanager
def child_host(tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", int, Path]]:
    """A host in a Python process of its own: (that process, its daemon's number, its sockets' directory)."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        daemon, directory = child.stdout.readline().split()
        try:
            yield child, int(daemon), Path(directory)
        finally:
            child.kill()
            if running(int(daemon)):  # only after a failure
                os.killpg(int(daemon), signal.SIGKILL)


@pytest.mark.parametrize("hung", [False, True])
async def test_the_daemon_dies_with_a_parent_that_is_killed_outright_even_when_it_hangs(
    tmp_path: Path, hung: bool
) -> None:
    with child_host(tmp_path) as (child, daemon, directory):
        assert len(running(daemon)) == 2
        if hung:
            os.kill(daemon, signal.SIGSTOP)
        child.kill()
        assert await gone_within(daemon, 3)
        assert not directory.exists()


async def test_ctrl_c_in_the_terminal_leaves_the_daemon_up_for_the_goodbye(tmp_path: Path) -> None:
    with child_host(tmp_path) as (child, daemon, directory):
        os.killpg(child.pid, signal.SIGINT)
        assert child.stdout is not None
        assert child.stdout.read() == "[]\n"
        assert await gone_within(daemon, 3)
        assert not directory.exists()
