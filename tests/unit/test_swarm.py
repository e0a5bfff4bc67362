"""A swarm at its ends: what it knows before it speaks, and that gossip which still arrives afterwards is ignored."""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dugnad.dht import records, timekeeping
from dugnad.dht import swarm as swarms
from dugnad.dht.clock import Clock, Time, encode_time
from dugnad.dht.decisions import decide
from dugnad.dht.evidence import RECORDS, Evidence, Proofs, of_records
from dugnad.dht.gossip import Push, Summary
from dugnad.dht.identity import Identity, PeerId, nickname
from dugnad.dht.records import KINDS, MemberBody, ProgressBody
from dugnad.dht.swarm import (
    CHANNEL,
    CODEC,
    MINE_CHANNEL,
    Swarm,
    lifetime_s,
    member_period_s,
    progress_period_s,
)
from dugnad.dht.transport import Unreachable
from dugnad.dht.twin import KeyInUse
from dugnad.dht.wire import open_sealed, seal

ME, OTHER = Identity.from_seed(bytes(32)), Identity.from_seed(bytes([1] * 32))
RUN = b"r" * 32
NO_RECORDS = msgspec.msgpack.encode([])
GOSSIP = seal(OTHER, RUN, CODEC, Summary(b"", b"", answer=False))


class QuietHost:
    """Nobody else is there; `heard` is who takes messages."""

    def __init__(self) -> None:
        self.heard: Any = None
        self.clock = Clock(ME.peer_id)
        self.announced: list[bytes] = []

    def now(self) -> float:
        return self.clock.now(time.time())

    async def discover(self, run: bytes) -> list[bytes]:
        return []

    def addresses(self) -> tuple[str, ...]:
        return ("/ip4/127.0.0.1/tcp/1",)

    async def addresses_changed(self) -> None:
        await asyncio.Event().wait()

    async def announce(self, run: bytes, raw: bytes, *, expires_s: float) -> bool:
        self.announced.append(raw)
        return True

    async def peers(self) -> list[str]:
        return []

    async def learn(self, peer: str, addresses: tuple[str, ...]) -> None:
        pass

    async def request(self, peer: str, channel: str, payload: bytes, *, timeout_s: float) -> bytes:
        return NO_RECORDS if channel == MINE_CHANNEL else b""

    async def serve(self, channel: str, handler: Any) -> None:
        if channel == CHANNEL:
            self.heard = handler


def broken() -> ProgressBody | None:
    raise ArithmeticError("a bug")


Enter = Callable[..., Swarm]


@pytest.fixture
def swarm(tmp_path: Path) -> Enter:
    """Makes swarms that live in one folder."""

    def made(host: Any, progress: Any = lambda: None, **settings: Any) -> Swarm:
        given: dict[str, Any] = {"role": "volunteer", "directory": tmp_path, "refused": pytest.fail} | settings
        return Swarm(host, ME, RUN, progress=progress, **given)

    return made


async def test_gossip_that_arrives_after_the_end_is_ignored(swarm: Enter) -> None:
    host = QuietHost()
    async with swarm(host):
        assert await host.heard(OTHER.peer_id, GOSSIP) == b""
    assert await host.heard(OTHER.peer_id, GOSSIP) == b""


async def test_gossip_that_arrives_while_a_failure_ends_the_swarm_is_ignored(swarm: Enter) -> None:
    host = QuietHost()

    async def take_part() -> None:
        async with swarm(host, broken):
            try:
                await asyncio.Event().wait()
            finally:
                assert await host.heard(OTHER.peer_id, GOSSIP) == b""

    with pytest.raises(ExceptionGroup) as raised:
        await take_part()
    assert [type(error) for error in raised.value.exceptions] == [ArithmeticError]


async def test_the_addresses_of_members_name_them_so_that_they_can_be_dialled_after_a_restart(
    swarm: Enter, tmp_path: Path
) -> None:
    class OtherHost(QuietHost):
        def addresses(self) -> tuple[str, ...]:
            relayed = f"/ip4/8.8.8.8/tcp/3/p2p/{ME.peer_id}/p2p-circuit"
            places = ("/ip4/192.168.1.5/tcp/2", relayed, "/dns4/a..b/tcp/1")
            return tuple(f"{place}/p2p/{OTHER.peer_id}" for place in places)

    theirs: Any = OtherHost()
    (tmp_path / "other").mkdir()
    other = Swarm(
        theirs, OTHER, RUN, role="volunteer", directory=tmp_path / "other", refused=pytest.fail, progress=lambda: None
    )
    async with other, swarm(QuietHost()) as mine:
        mine.records.merge(records.parse(theirs.announced[0], RUN, now=mine.now()))
        assert mine.addresses() == set(theirs.addresses()[:2]), "the last one can't be"


class SilentHost(QuietHost):
    """Another peer is connected, and never replies."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.anyone_asked = asyncio.Event()

    async def peers(self) -> list[str]:
        return [OTHER.peer_id]

    async def request(self, peer: str, channel: str, payload: bytes, *, timeout_s: float) -> bytes:
        if channel != CHANNEL:
            raise Unreachable(PeerId(peer), "it does not offer this service")
        self.asked.append(peer)
        self.anyone_asked.set()
        await asyncio.Event().wait()
        return b""


async def test_a_peer_that_never_replies_is_answered_once_at_a_time_and_does_not_hold_up_the_end(
    swarm: Enter,
) -> None:
    host, stranger = SilentHost(), Identity.from_seed(bytes([2] * 32))
    gossip = seal(stranger, RUN, CODEC, Summary(b"t" * 16, b"", answer=False))
    async with asyncio.timeout(5.0), swarm(host):
        for _ in range(1000):
            await host.heard(stranger.peer_id, gossip)
        await host.anyone_asked.wait()
        for _ in range(10):
            await asyncio.sleep(0)
        assert host.asked.count(stranger.peer_id) == 1


async def test_who_is_connected_is_gossiped_with_though_no_record_names_it(swarm: Enter) -> None:
    host = SilentHost()
    async with asyncio.timeout(5.0), swarm(host):
        await host.anyone_asked.wait()
    assert host.asked == [OTHER.peer_id]


async def test_each_message_of_gossip_is_counted(swarm: Enter) -> None:
    host, passed = SilentHost(), list[tuple[str, str]]()
    async with swarm(host, passed=lambda *what: passed.append(what)):
        await host.heard(OTHER.peer_id, GOSSIP)
        await host.anyone_asked.wait()
    assert ("received", "summary") in passed
    assert ("sent", "summary") in passed or ("sent", "buckets") in passed


# -- what time it is


class HostWithAClock(QuietHost):
    """Another peer is connected, whose clock is ahead of ours, and says since when it has been there."""

    def __init__(self, ahead_s: float, age_s: int) -> None:
        super().__init__()
        self.ahead_s, self.age_s = ahead_s, age_s

    async def peers(self) -> list[str]:
        return [OTHER.peer_id]

    async def request(self, peer: str, channel: str, payload: bytes, *, timeout_s: float) -> bytes:
        if channel != timekeeping.CHANNEL:
            return await super().request(peer, channel, payload, timeout_s=timeout_s)
        return encode_time(Time(round((time.time() + self.ahead_s) * 1000), 0, self.age_s))


@pytest.mark.parametrize(("ahead_s", "words"), [(3720.0, "1 h 2 min slow"), (-3720.0, "1 h 2 min fast")])
async def test_what_a_peer_says_first_it_says_by_the_corrected_clock(
    swarm: Enter, caplog: pytest.LogCaptureFixture, ahead_s: float, words: str
) -> None:
    host = HostWithAClock(ahead_s, age_s=600)
    async with swarm(host) as made:
        (raw,) = host.announced
        assert records.parse(raw, RUN, now=time.time() + ahead_s).issued_ms / 1000 == pytest.approx(made.now(), abs=30)
        assert made.now() - time.time() == pytest.approx(ahead_s, abs=1.0)
        assert made.roles() == {}
    (warning,) = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert warning == f"this machine's clock is {words}; corrected against 1 peer"


async def test_who_was_there_first_keeps_its_time(swarm: Enter, caplog: pytest.LogCaptureFixture) -> None:
    host = HostWithAClock(3720.0, age_s=0)
    host.clock.begin(at_s=0.0)
    async with swarm(host) as made:
        assert made.now() == pytest.approx(time.time(), abs=1.0)
    assert not caplog.records


async def test_numbers_grow_over_restarts_and_corrections(swarm: Enter) -> None:
    seqs = []
    for ahead_s in (0.0, 3720.0, -3720.0, 0.0):
        host = HostWithAClock(ahead_s, age_s=600)
        async with swarm(host):
            (raw,) = host.announced
            seqs.append(records.parse_of_any_time(raw, RUN).seq)
    assert seqs == sorted(set(seqs))


# -- whether it is we who say it

NOTHING = ProgressBody(0, "syncing", "", 0, 0.0, None, b"")


def said_by_us(seq: int, *, ago_s: float = 0.0) -> bytes:
    """What someone with our key says, or said, that it does."""
    return records.issue(ME, RUN, "progress", "", seq, NOTHING, now=time.time() - ago_s, lifetime_s=60.0).raw


class HostWhereWeAreKnown(QuietHost):
    """Another peer is connected, which holds records of ours: `held` at the first question, and what `next` makes."""

    def __init__(self, *held: bytes, then: Callable[[], bytes] | None = None) -> None:
        super().__init__()
        self.held, self.then, self.asked = held, then, 0

    async def peers(self) -> list[str]:
        return [OTHER.peer_id]

    async def request(self, peer: str, channel: str, payload: bytes, *, timeout_s: float) -> bytes:
        if channel != MINE_CHANNEL:
            raise Unreachable(PeerId(peer), "it does not offer this service")
        self.asked += 1
        return msgspec.msgpack.encode([*self.held] if self.then is None or self.asked == 1 else [self.then()])


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listen for a moment instead of 12 s, and ask again at once."""
    monkeypatch.setattr(swarms, "WATCH_S", 0.2)
    monkeypatch.setattr(swarms, "ASK_AGAIN_S", 0.01)


FAR = 2**61  # above any number that this folder can have taken


@pytest.mark.usefixtures("quickly")
async def test_who_finds_that_another_speaks_with_its_key_leaves_before_it_says_anything(
    swarm: Enter, tmp_path: Path
) -> None:
    host = HostWhereWeAreKnown(said_by_us(FAR), then=lambda: said_by_us(FAR + 1, ago_s=-5.0))
    with pytest.raises(KeyInUse) as raised:
        await swarm(host).__aenter__()
    assert str(raised.value) == (
        f"E402 your key is in use by another running peer. A copied key?  dugnad identity new --force --dir {tmp_path}"
    )
    assert host.announced == []


@pytest.mark.usefixtures("quickly")
async def test_what_someone_said_once_with_our_key_keeps_nobody_out(
    swarm: Enter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    old = said_by_us(FAR, ago_s=20.0)
    host = HostWhereWeAreKnown(old, then=lambda: old)
    async with swarm(host) as made:
        assert len(host.announced) == 1
        assert not made.key_in_use
    assert host.asked > 1
    assert "listening" in caplog.text


async def test_who_starts_again_in_its_own_folder_is_not_held_up(swarm: Enter) -> None:
    async with swarm(QuietHost()):
        pass
    host = HostWhereWeAreKnown(said_by_us(int(time.time() * 1000), ago_s=0.5))  # killed half a second ago
    async with swarm(host):
        assert len(host.announced) == 1
    assert host.asked == 1


@pytest.mark.usefixtures("quickly")
async def test_a_copy_of_the_whole_folder_hears_the_original_though_all_numbers_could_be_its_own(
    swarm: Enter, tmp_path: Path
) -> None:
    async with swarm(QuietHost()):
        pass
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "sequence").write_bytes((tmp_path / "sequence").read_bytes())
    now_ms = int(time.time() * 1000)
    host = HostWhereWeAreKnown(said_by_us(now_ms), then=lambda: said_by_us(now_ms + 1, ago_s=-5.0))
    with pytest.raises(KeyInUse):
        await swarm(host, directory=copy).__aenter__()
    assert host.announced == []


async def hears_its_double(host: QuietHost, seq: int = FAR) -> None:
    push = Push((said_by_us(seq, ago_s=-5.0),))
    await host.heard(OTHER.peer_id, seal(OTHER, RUN, CODEC, push))
    for _ in range(10):
        await asyncio.sleep(0)


async def test_the_newcomer_of_two_with_one_key_goes(swarm: Enter) -> None:
    host = QuietHost()

    async def take_part() -> None:
        async with swarm(host):
            await hears_its_double(host)
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as raised:
        await take_part()
    assert [type(error) for error in raised.value.exceptions] == [KeyInUse]


async def test_the_older_of_two_with_one_key_goes_on_and_says_so_once(
    swarm: Enter, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = QuietHost()
    async with swarm(host) as made:
        monkeypatch.setattr(made._twin, "newcomer", lambda now: False)
        for seq in (FAR, FAR + 1):
            await hears_its_double(host, seq)
        assert made.key_in_use
    (error,) = [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]
    assert error.startswith("E402 another running peer signs with this peer's key")


async def test_a_peer_is_told_what_others_hold_of_it(swarm: Enter) -> None:
    handlers = dict[str, Any]()

    class OpenHost(QuietHost):
        async def serve(self, channel: str, handler: Any) -> None:
            handlers[channel] = handler
            await super().serve(channel, handler)

    host = OpenHost()
    theirs = records.issue(OTHER, RUN, "progress", "", 7, NOTHING, now=time.time(), lifetime_s=60.0)
    async with swarm(host):
        assert await handlers[MINE_CHANNEL](OTHER.peer_id, b"") == NO_RECORDS
        await host.heard(OTHER.peer_id, seal(OTHER, RUN, CODEC, Push((theirs.raw,))))
        assert msgspec.msgpack.decode(await handlers[MINE_CHANNEL](OTHER.peer_id, b"")) == [theirs.raw]


@pytest.mark.parametrize("raw", [b"", b"nonsense", msgspec.msgpack.encode(["text"]), bytes(swarms.MINE_BYTES + 1)])
async def test_nonsense_about_us_is_refused_and_keeps_nobody_out(swarm: Enter, raw: bytes) -> None:
    class Babbler(HostWhereWeAreKnown):
        async def request(self, peer: str, channel: str, payload: bytes, *, timeout_s: float) -> bytes:
            await super().request(peer, channel, payload, timeout_s=timeout_s)
            return raw

    host, refused = Babbler(), list[str]()
    async with swarm(host, refused=refused.append):
        assert len(host.announced) == 1
    assert refused == ["too large" if len(raw) > swarms.MINE_BYTES else "malformed"]


# -- who said two things


def two_things(liar: Identity) -> tuple[records.Record, records.Record]:
    now = time.time()
    a, b = (
        records.issue(liar, RUN, "member", "", 7, MemberBody((), "volunteer", says, ""), now=now, lifetime_s=60.0)
        for says in "ab"
    )
    return a, b


async def test_who_is_convicted_is_named_once_with_the_reason_and_known_after_a_restart(
    swarm: Enter, caplog: pytest.LogCaptureFixture
) -> None:
    host, heard = QuietHost(), list[tuple[PeerId, str]]()
    liar = Identity.from_seed(bytes([9] * 32))
    a, b = two_things(liar)
    async with swarm(host, accused=lambda *what: heard.append(what)) as made:
        for raws in ((a.raw,), (b.raw,), (a.raw, b.raw), (of_records(a, b).raw,)):
            await host.heard(OTHER.peer_id, seal(OTHER, RUN, CODEC, Push(raws)))
        assert made.quarantined() == {liar.peer_id}
        assert made.roles() == {}
    assert heard == [(liar.peer_id, "it signed two contradicting records")]
    (warning,) = [one.getMessage() for one in caplog.records]
    assert warning.startswith(f"{nickname(liar.peer_id)} ({liar.peer_id}) is quarantined: it signed two")
    async with swarm(QuietHost(), accused=lambda *what: heard.append(what)) as made:
        assert made.quarantined() == {liar.peer_id}
    assert len(heard) == 2


async def test_what_an_upper_floor_has_found_spreads_if_it_is_proof(swarm: Enter) -> None:
    liar = Identity.from_seed(bytes([9] * 32))
    host, heard = QuietHost(), list[PeerId]()
    proofs = Proofs({"words": lambda run, first, second: liar.peer_id if first[:1] == second[:1] else None})
    async with swarm(host, proofs=proofs, accused=lambda peer, why: heard.append(peer)) as made:
        assert not made.accuse("words", b"on", b"at")
        assert not made.accuse("unknown", b"on", b"off")
        assert made.accuse("words", b"on", b"off")
        assert not made.accuse(RECORDS, *(one.raw for one in two_things(liar)))
        (entry,) = (one for one in made.records.changed_since(0, now=made.now()) if isinstance(one, Evidence))
    assert heard == [liar.peer_id] == [entry.owner]


async def test_a_peer_whose_key_is_used_twice_is_told_what_to_do(
    swarm: Enter, caplog: pytest.LogCaptureFixture
) -> None:
    async with swarm(QuietHost()) as made:
        assert made.accuse(RECORDS, *(one.raw for one in two_things(ME)))
    (error,) = [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]
    assert error.startswith("someone signed two contradicting records with our key")
    assert "move identity.key away" in error


async def test_a_damaged_file_of_evidence_does_not_keep_a_peer_out(
    swarm: Enter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "evidence").write_bytes(b"nonsense")
    async with swarm(QuietHost()) as made:
        assert made.quarantined() == frozenset()
    assert "has to come from others" in caplog.text


# -- what the organizer decides

ORGANIZER, PEER = (Identity.from_seed(bytes([k]) * 32) for k in (5, 6))


def decision(verdict: str = "ban", *, on: Identity = PEER, by: Identity = ORGANIZER, after_s: float = 0.0) -> bytes:
    return decide(by, RUN, on.peer_id, verdict, "poison", now=time.time(), after_s=after_s).raw


async def test_a_decision_by_whatever_way_it_comes_holds_and_is_known_after_a_restart(
    swarm: Enter, caplog: pytest.LogCaptureFixture
) -> None:
    host = QuietHost()
    async with swarm(host, organizer=ORGANIZER.peer_id) as made:
        await host.heard(OTHER.peer_id, seal(OTHER, RUN, CODEC, Push((decision(),))))
        assert made.decisions.banned(now=made.now()).keys() == {PEER.peer_id}
    assert f"({PEER.peer_id}) is banned by the organizer: poison" in caplog.text
    async with swarm(QuietHost(), organizer=ORGANIZER.peer_id) as made:
        (said,) = made.decisions.all()
        assert made.decide(decision("unban", after_s=said.at_s)) is None
        assert not made.decisions.banned(now=made.now())
        assert made.decide(said.raw) == "there is a newer decision on that, or no room for another"
        spread = [one.raw for one in made.records.items("ban", now=made.now())]
    assert len(spread) == 1


async def test_nobody_but_the_organizer_is_heard(swarm: Enter) -> None:
    host, refused = QuietHost(), list[str]()
    async with swarm(host, organizer=ORGANIZER.peer_id, refused=refused.append) as made:
        await host.heard(OTHER.peer_id, seal(OTHER, RUN, CODEC, Push((decision(by=OTHER),))))
        assert "not the organizer" in str(made.decide(decision(by=PEER)))
        assert "no decision" in str(made.decide(two_things(OTHER)[0].raw))
        assert "malformed" in str(made.decide(b""))
        assert made.decisions.all() == []
    assert refused == ["not the organizer"]


async def test_where_the_organizer_is_unknown_nobody_is_heard(swarm: Enter) -> None:
    async with swarm(QuietHost()) as made:
        assert "not known here" in str(made.decide(decision()))


async def test_who_was_banned_is_so_after_a_restart_unless_others_have_heard_better(swarm: Enter) -> None:
    async with swarm(QuietHost(), organizer=ORGANIZER.peer_id) as made:
        assert made.decide(decision(on=ME)) is None
        (said,) = made.decisions.all()
    async with swarm(QuietHost(), organizer=ORGANIZER.peer_id) as made:
        assert made.decisions.banned(now=made.now()).keys() == {ME.peer_id}
    knowing = HostWhereWeAreKnown(decision("unban", on=ME, after_s=said.at_s))
    async with swarm(knowing, organizer=ORGANIZER.peer_id) as made:
        assert not made.decisions.banned(now=made.now()), "before we have said anything"


async def test_who_asks_what_we_hold_of_it_hears_what_was_decided_about_it(swarm: Enter) -> None:
    class AskedHost(QuietHost):
        mine: Any = None

        async def serve(self, channel: str, handler: Any) -> None:
            await super().serve(channel, handler)
            self.mine = handler if channel == MINE_CHANNEL else self.mine

    host = AskedHost()
    async with swarm(host, organizer=ORGANIZER.peer_id) as made:
        said = [decision(verdict, on=OTHER) for verdict in ("allow", "ban")]
        assert [made.decide(raw) for raw in (*said, decision(on=PEER))] == [None, None, None]
        assert msgspec.msgpack.decode(await host.mine(OTHER.peer_id, b"")) == said


async def test_what_someone_brings_is_with_another_before_we_leave(swarm: Enter) -> None:
    class FarHost(SilentHost):
        def __init__(self) -> None:
            super().__init__()
            self.handed: list[tuple[bytes, ...]] = []

        async def request(self, peer: str, channel: str, payload: bytes, *, timeout_s: float) -> bytes:
            if channel == CHANNEL and isinstance(message := open_sealed(payload, RUN, CODEC)[1], Push):
                for _ in range(100):
                    await asyncio.sleep(0)
                self.handed.append(message.raws)
                return b""
            return await super().request(peer, channel, payload, timeout_s=timeout_s)

    host, raw = FarHost(), decision(on=ME)
    async with swarm(host, organizer=ORGANIZER.peer_id) as made:
        assert made.decide(raw) is None
    assert host.handed == [(raw,)]


@pytest.mark.parametrize("num_members", [1, 100, 1000, 10_000])
def test_what_is_said_holds_until_it_is_renewed_and_longer(num_members: int) -> None:
    for kind, period_s in (("member", member_period_s(num_members)), ("progress", progress_period_s(num_members))):
        assert 3 * period_s <= lifetime_s(kind, period_s) <= KINDS[kind].max_lifetime_s
