"""Gossip: everyone soon knows what everyone says, over a network that loses messages and falls apart."""

import heapq
import random
from collections.abc import Callable, Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec import Struct

from dugnad.dht import gossip
from dugnad.dht.crdt import RecordMap
from dugnad.dht.evidence import EVIDENCE_BYTES, Evidence, Proofs, is_evidence, of_records
from dugnad.dht.gossip import (
    ASK_AGAIN_S,
    EXCHANGE_S,
    GOSSIP_KINDS,
    MAX_REPAIRS_OF_NEW,
    MAX_TAGS,
    MESSAGE_BYTES,
    PEER_BYTES,
    REPAIR_S,
    Buckets,
    Changed,
    Effect,
    Gossip,
    Push,
    Send,
    Summary,
    Want,
    refresh_s,
)
from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.records import MemberBody, Record, issue, parse
from dugnad.dht.wire import Codec, WireError

RUN = b"r" * 32
NOW = 1_700_000_000.0
CODEC = Codec(GOSSIP_KINDS)
IDENTITIES = [Identity.from_seed(number.to_bytes(32)) for number in range(50)]
ME, YOU, THIRD = (identity.peer_id for identity in IDENTITIES[:3])


def member(owner: int, seq: int = 1, *, says: str = "", now: float = NOW, lifetime_s: float = 600.0) -> Record:
    body = MemberBody((), "volunteer", says, "")
    return issue(IDENTITIES[owner], RUN, "member", "", seq, body, now=now, lifetime_s=lifetime_s)


def checked(raw: bytes, now: float) -> Record | Evidence:
    return Proofs().parse(raw, RUN) if is_evidence(raw) else parse(raw, RUN, now=now)


def peer_with(*held: Record | Evidence, me: PeerId = ME, peers: Sequence[PeerId] = ()) -> tuple[Gossip, RecordMap]:
    records = RecordMap()
    for record in held:
        records.merge(record)
    made = Gossip(me, records, checked)
    made.set_peers(tuple(peers))
    return made, records


def tags(*entries: Record | Evidence) -> bytes:
    return b"".join(entry.tag for entry in entries)


def bits(*buckets: int, of: int = 256) -> bytes:
    return sum(1 << (of - 1 - bucket) for bucket in buckets).to_bytes(of // 8)


ALL = bits(*range(256))


def said(effects: list[Effect]) -> list[Struct]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


class World:
    """Peers in virtual time, over links that take 20-200 ms and lose what `lost` says."""

    def __init__(self, size: int, *, seed: int) -> None:
        self.now = NOW
        self.rng = random.Random(seed)
        self.records = [RecordMap() for _ in range(size)]
        self.ids = [identity.peer_id for identity in IDENTITIES[:size]]
        self.peers = [Gossip(one, held, checked) for one, held in zip(self.ids, self.records, strict=True)]
        self.lost: Callable[[int, int], bool] = lambda sender, to: False
        self.sent_bytes = self.delivered = 0
        self._mail: list[tuple[float, int, int, int, str, bytes]] = []
        self._sent = 0

    def connect(self, *groups: Sequence[int]) -> None:
        for group in groups:
            for one in group:
                self.peers[one].set_peers(tuple(self.ids[other] for other in group))

    def run(self, duration_s: float, *, until: Callable[[], bool] = lambda: False) -> float:
        """Let time pass, for a given time or until a condition holds; how much has passed."""
        start = self.now
        while self.now < start + duration_s and not until():
            self.now = round(self.now + 0.1, 1)
            while self._mail and self._mail[0][0] <= self.now:
                _, _, sender, to, tag, body = heapq.heappop(self._mail)
                self.delivered += 1
                self._do(to, self.peers[to].receive(self.ids[sender], CODEC.decode(tag, body), now=self.now))
            for one, peer in enumerate(self.peers):
                if self.now >= peer.wake_at():
                    self._do(one, peer.tick(now=self.now, rng=self.rng))
        return self.now - start

    def agree(self) -> bool:
        """Whether all hold the same records, each of everyone."""
        views = [[record.raw for record in held.items("member", now=self.now)] for held in self.records]
        return len(views[0]) == len(self.ids) and all(view == views[0] for view in views)

    def _do(self, one: int, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._send(one, self.ids.index(effect.to), effect.message)

    def _send(self, sender: int, to: int, message: Struct) -> None:
        self._sent += 1
        body = CODEC.encode(message)
        self.sent_bytes += len(body)
        if not self.lost(sender, to):
            arrives = self.now + self.rng.uniform(0.02, 0.2)
            heapq.heappush(self._mail, (arrives, self._sent, sender, to, CODEC.tag_of(message), body))


def swarm(*, seed: int, loss_rate: float) -> World:
    world = World(50, seed=seed)
    world.lost = lambda sender, to: world.rng.random() < loss_rate
    for one in range(50):
        world.records[one].merge(member(one, now=world.now))
    return world


@pytest.mark.parametrize(
    ("loss_rate", "within_s"),
    [(0.0, 8 * EXCHANGE_S), (0.1, 15 * EXCHANGE_S), (0.2, 10 * REPAIR_S)],  # at 0.2 the last few need a repair
)
def test_fifty_peers_soon_know_each_other_though_messages_are_lost(loss_rate: float, within_s: float) -> None:
    world = swarm(seed=1, loss_rate=loss_rate)
    world.connect(range(50))
    took_s = world.run(within_s, until=world.agree)
    assert world.agree()
    assert world.delivered <= 50 * (60 + 2 * took_s)


def test_one_update_reaches_fifty_peers_within_thirteen_exchanges() -> None:
    world = swarm(seed=2, loss_rate=0.1)
    world.connect(range(50))
    world.run(REPAIR_S, until=world.agree)
    world.run(20.0)
    news = member(7, seq=2, now=world.now)
    world.records[7].merge(news)
    world.run(13 * EXCHANGE_S, until=world.agree)
    assert world.agree()
    assert all(held.seq_of("member", news.owner) == 2 for held in world.records)


def test_a_swarm_without_news_is_quiet() -> None:
    world = swarm(seed=3, loss_rate=0.0)
    world.connect(range(50))
    world.run(REPAIR_S, until=world.agree)
    world.run(20.0)
    before = world.sent_bytes
    world.run(60.0)
    assert (world.sent_bytes - before) / 60.0 / 50 < 200.0  # bytes a second and peer


def test_the_halves_of_a_healed_partition_agree_within_a_few_exchanges() -> None:
    world = swarm(seed=4, loss_rate=0.0)
    halves = range(25), range(25, 50)
    world.connect(range(50))
    world.run(REPAIR_S, until=world.agree)
    world.lost = lambda sender, to: (sender < 25) != (to < 25)
    world.connect(*halves)
    for one in range(50):
        world.records[one].merge(member(one, seq=2, now=world.now))
    world.run(60.0)
    assert not world.agree()
    world.lost = lambda sender, to: False
    world.connect(range(50))
    assert world.run(5 * EXCHANGE_S, until=world.agree) <= 4 * EXCHANGE_S
    assert world.agree()


def test_what_all_exchanges_missed_comes_with_a_repair() -> None:
    world = World(2, seed=5)
    world.connect(range(2))
    world.run(5.0)
    world.lost = lambda sender, to: True
    for one in range(2):
        world.records[one].merge(member(one))
    world.run(20.0)
    world.lost = lambda sender, to: False
    assert world.run(2 * REPAIR_S, until=world.agree) <= REPAIR_S
    assert world.agree()


def test_an_owner_that_says_two_things_is_soon_quarantined_by_all_and_what_it_says_is_gone() -> None:
    world = swarm(seed=6, loss_rate=0.1)
    world.connect(range(50))
    liar = IDENTITIES[0].peer_id
    world.run(REPAIR_S, until=world.agree)
    for one in (3, 4):
        world.records[one].merge(member(0, seq=9, says=str(one)))

    def all_know() -> bool:
        return all(held.quarantined() == {liar} for held in world.records)

    assert world.run(2 * REPAIR_S, until=all_know) <= 20 * EXCHANGE_S
    assert all_know()
    assert all(held.get("member", liar, now=world.now) is None for held in world.records)
    before = world.sent_bytes
    world.records[0].merge(member(0, seq=10))  # it goes on, and nobody passes it on
    world.run(3 * REPAIR_S)
    assert (world.sent_bytes - before) / 90.0 / 50 < 200.0


def test_evidence_reaches_those_who_join_long_after_who_found_it_has_left() -> None:
    world = World(4, seed=8)
    world.connect(range(2))
    world.records[0].merge(of_records(member(9, says="a"), member(9, says="b")))
    world.run(5.0)
    world.now += 7 * 86400.0
    world.connect(range(1, 4))
    world.run(REPAIR_S)
    assert [held.quarantined() for held in world.records] == [{IDENTITIES[9].peer_id}] * 4


def test_the_same_seed_tells_the_same_story() -> None:
    stories = []
    for _ in range(2):
        world = swarm(seed=7, loss_rate=0.2)
        world.connect(range(50))
        world.run(5.0)
        stories.append((world.sent_bytes, world.delivered))
    assert stories[0] == stories[1]


def test_an_exchange_tells_what_changed_in_the_last_eight_seconds() -> None:
    mine = member(0)
    peer, records = peer_with(mine, peers=[YOU])
    rng = random.Random(1)
    for passed_s in range(30):
        if passed_s == 15:
            records.merge(member(2))
        summaries = [one for one in said(peer.tick(now=NOW + passed_s, rng=rng)) if isinstance(one, Summary)]
        assert len(summaries) == 1
        assert (mine.tag in summaries[0].tags) == (passed_s <= 8)
        assert (member(2).tag in summaries[0].tags) == (15 <= passed_s <= 22)


def test_a_summary_is_answered_with_what_either_side_lacks() -> None:
    held = [member(0, seq=2), member(1), member(3)]
    peer, _ = peer_with(*held, peers=[YOU])
    peer.tick(now=NOW, rng=random.Random(1))
    theirs = [member(1), member(2), member(0, seq=3)]
    want, summary = said(peer.receive(YOU, Summary(tags(*theirs), b"", False), now=NOW))
    assert want == Want(tags(theirs[1], theirs[2]))
    assert summary == Summary(tags(held[2], held[0]), b"", True)


def test_what_was_replaced_here_is_not_wanted_again() -> None:
    old = member(0)
    peer, records = peer_with(old)
    records.merge(member(0, seq=2))
    assert peer.receive(YOU, Summary(tags(old), b"", True), now=NOW) == []


def test_what_one_peer_is_asked_for_is_asked_of_another_only_later_and_never_of_itself_at_once() -> None:
    peer, _ = peer_with()
    named = Summary(tags(member(0)), b"", True)
    asked = said(peer.receive(YOU, named, now=NOW))
    assert asked == [Want(tags(member(0)))]
    assert peer.receive(THIRD, named, now=NOW + ASK_AGAIN_S - 0.1) == []
    for passed_s in (ASK_AGAIN_S, 2 * ASK_AGAIN_S - 0.1):
        assert peer.receive(YOU, named, now=NOW + passed_s) == []
    assert said(peer.receive(THIRD, named, now=NOW + ASK_AGAIN_S)) == asked
    peer.tick(now=NOW + 2 * ASK_AGAIN_S, rng=random.Random(1))
    assert said(peer.receive(YOU, named, now=NOW + 2 * ASK_AGAIN_S)) == asked


def test_two_records_with_one_seq_make_evidence_that_is_told_like_any_news() -> None:
    here, there = member(0, seq=3, says="a"), member(0, seq=3, says="b")
    peer, records = peer_with(here, peers=[YOU])
    peer.tick(now=NOW, rng=random.Random(1))
    assert said(peer.receive(YOU, Summary(tags(there), b"", True), now=NOW)) == [Want(tags(there))]
    evidence = of_records(here, there)
    assert peer.receive(YOU, Push((there.raw,)), now=NOW) == [Changed(evidence)]
    (answer,) = said(peer.receive(THIRD, Summary(b"", b"", False), now=NOW))
    assert answer == Summary(tags(evidence), b"", True)
    (push,) = said(peer.receive(THIRD, Want(tags(evidence)), now=NOW))
    other, records = peer_with(here, me=THIRD)
    assert other.receive(ME, push, now=NOW) == [Changed(evidence)]
    assert records.quarantined() == {ME}


def test_an_answer_is_never_answered_by_a_summary() -> None:
    peer, _ = peer_with(member(0), peers=[YOU])
    peer.tick(now=NOW, rng=random.Random(1))
    for buckets in (b"", ALL):
        answers = said(peer.receive(YOU, Summary(tags(member(2)), buckets, True), now=NOW))
        assert not [one for one in answers if isinstance(one, Summary | Buckets)]
    assert peer.receive(YOU, Summary(tags(member(0)), ALL, True), now=NOW) == []


def test_a_repair_lists_exactly_the_buckets_that_differ() -> None:
    shared, only_here, only_there = member(0), member(1), member(2)
    here, _ = peer_with(shared, only_here)
    there, records_there = peer_with(shared, only_there, me=YOU, peers=[ME])
    (hashes,) = [one for one in said(there.tick(now=NOW, rng=random.Random(1))) if isinstance(one, Buckets)][:1]
    (summary,) = said(here.receive(YOU, hashes, now=NOW))
    assert summary == Summary(tags(only_here), bits(only_here.slot[0], only_there.slot[0]), False)
    want, rest = said(there.receive(ME, summary, now=NOW))
    assert (want, rest) == (Want(tags(only_here)), Summary(tags(only_there), b"", True))
    assert said(here.receive(YOU, rest, now=NOW)) == [Want(tags(only_there))]
    (push,) = said(here.receive(YOU, want, now=NOW))
    assert there.receive(ME, push, now=NOW) == [Changed(only_here)]
    assert records_there.get("member", only_here.owner, now=NOW) == only_here


def test_maps_of_different_sizes_are_compared_in_the_buckets_of_who_begins() -> None:
    here, _ = peer_with(member(0))
    for num_buckets in (256, 1024, 4096):
        (summary,) = said(here.receive(YOU, Buckets(bytes(8 * num_buckets)), now=NOW))
        place = int.from_bytes(member(0).slot[:2]) * num_buckets >> 16
        assert summary == Summary(tags(member(0)), bits(place, of=num_buckets), False)


@pytest.mark.parametrize("num_bytes", [0, 8, 2047, 8 * 128, 8 * 300, 8 * 8192])
def test_another_number_of_buckets_is_a_wire_error(num_bytes: int) -> None:
    with pytest.raises(WireError):
        CODEC.decode("buckets", msgspec.msgpack.encode((bytes(num_bytes),)))
    with pytest.raises(WireError):
        CODEC.decode("summary", msgspec.msgpack.encode((b"", bytes(num_bytes // 64 or 1), False)))


def test_expired_records_are_not_sent() -> None:
    over = member(0, lifetime_s=5.0)
    peer, _ = peer_with(over, peers=[YOU])
    later = NOW + 6.0
    (summary,) = [one for one in said(peer.tick(now=later, rng=random.Random(1))) if isinstance(one, Summary)]
    assert summary.tags == b""
    assert peer.receive(YOU, Want(tags(over)), now=later) == []
    assert peer.receive(YOU, Summary(b"", ALL, False), now=later) == []
    assert peer.receive(YOU, Summary(tags(over), b"", True), now=later) == []
    assert said(peer.receive(YOU, Buckets(b"x" * 2048), now=later)) == [Summary(b"", ALL, False)]


def test_a_bad_record_in_a_push_is_counted_and_the_others_are_taken() -> None:
    peer, records = peer_with()
    good, forged = member(1), member(2).raw[:-1] + b"\0"
    foreign = issue(
        IDENTITIES[3], b"s" * 32, "member", "", 1, MemberBody((), "volunteer", "", ""), now=NOW, lifetime_s=9.0
    )
    assert peer.receive(YOU, Push((forged, foreign.raw, b"nonsense", good.raw, good.raw)), now=NOW) == [Changed(good)]
    assert len(records) == 1
    assert peer.refused == {"bad signature": 1, "foreign run": 1, "malformed": 1}


def test_a_message_that_is_no_gossip_is_a_wire_error() -> None:
    class Other(Struct):
        pass

    peer, _ = peer_with()
    with pytest.raises(WireError):
        peer.receive(YOU, Other(), now=NOW)


def test_one_peer_gets_only_so_many_bytes_between_two_repairs(monkeypatch: pytest.MonkeyPatch) -> None:
    want = Want(tags(member(0)))
    monkeypatch.setattr(gossip, "PEER_BYTES", 10 * (2 * MESSAGE_BYTES + 16 + len(member(0).raw)))
    peer, _ = peer_with(member(0), peers=[YOU])
    rng = random.Random(1)
    peer.tick(now=NOW, rng=rng)
    assert sum(len(peer.receive(YOU, want, now=NOW)) for _ in range(100)) == 10
    assert len(peer.receive(THIRD, want, now=NOW)) == 1
    peer.tick(now=NOW + REPAIR_S, rng=rng)
    assert len(peer.receive(YOU, want, now=NOW + REPAIR_S)) == 1


def test_empty_summaries_without_end_are_not_all_answered() -> None:
    peer, _ = peer_with(member(0), peers=[YOU])
    peer.tick(now=NOW, rng=random.Random(1))
    empty = Summary(b"", b"", False)
    answered = sum(len(peer.receive(YOU, empty, now=NOW)) for _ in range(20_000))
    assert 0 < answered <= PEER_BYTES // (2 * MESSAGE_BYTES)


def test_what_is_pushed_counts_and_beyond_the_limit_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    peer, records = peer_with()
    monkeypatch.setattr(gossip, "PEER_BYTES", MESSAGE_BYTES + len(member(1).raw))
    assert peer.receive(YOU, Push((member(1).raw,)), now=NOW) == [Changed(member(1))]
    monkeypatch.setattr(records, "in_buckets", None)
    monkeypatch.setattr(peer, "_parse", None)
    for message in (Push((member(2).raw,)), Buckets(bytes(2048)), Summary(b"", bytes(32), False)):
        assert peer.receive(YOU, message, now=NOW) == []


def test_the_signature_of_a_record_that_is_held_is_not_verified_again(monkeypatch: pytest.MonkeyPatch) -> None:
    peer, _ = peer_with(member(1))
    monkeypatch.setattr(peer, "_parse", None)
    assert peer.receive(YOU, Push((member(1).raw,) * 1200), now=NOW) == []


def test_asking_for_one_record_many_times_gets_it_once() -> None:
    peer, _ = peer_with(member(0))
    assert said(peer.receive(YOU, Want(tags(member(0)) * MAX_TAGS), now=NOW)) == [Push((member(0).raw,))]


def test_peers_that_connect_are_repaired_with_at_once_but_only_a_few_of_many() -> None:
    peer, _ = peer_with()
    rng = random.Random(1)
    peer.tick(now=NOW, rng=rng)
    assert peer.wake_at() == NOW + EXCHANGE_S
    others = tuple(identity.peer_id for identity in IDENTITIES[1:])
    peer.set_peers(others)
    assert peer.wake_at() <= NOW
    effects = peer.tick(now=NOW + 0.1, rng=rng)
    assert len(effects) == MAX_REPAIRS_OF_NEW
    assert all(isinstance(one, Buckets) for one in said(effects))
    peer.set_peers(others)
    assert peer.tick(now=NOW + 0.2, rng=rng) == []


def test_nobody_gossips_with_itself_or_with_those_who_left() -> None:
    peer, _ = peer_with(peers=[ME, YOU])
    peer.set_peers((ME, THIRD))
    rng = random.Random(1)
    partners = {e.to for s in range(70) for e in peer.tick(now=NOW + s, rng=rng) if isinstance(e, Send)}
    assert partners == {THIRD}
    peer.set_peers((ME,))
    assert [peer.tick(now=NOW + s, rng=rng) for s in range(70, 140)] == [[]] * 70


def test_a_clock_that_was_set_back_does_not_silence_gossip() -> None:
    peer, _ = peer_with(peers=[YOU])
    rng = random.Random(1)
    peer.tick(now=NOW, rng=rng)
    effects = peer.tick(now=NOW - 3600.0, rng=rng)
    assert {type(one) for one in said(effects)} == {Summary, Buckets}
    assert peer.wake_at() == NOW - 3600.0 + EXCHANGE_S


def test_large_maps_travel_in_messages_under_their_caps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gossip, "MAX_TAGS", 7)
    monkeypatch.setattr(gossip, "_PUSH_BYTES", 1500)
    held = [member(owner) for owner in range(50)]
    here, _ = peer_with(*held)
    there, records = peer_with(me=YOU, peers=[ME])
    summaries = said(here.receive(YOU, said(there.tick(now=NOW, rng=random.Random(1)))[0], now=NOW))
    assert all(isinstance(one, Summary) and len(one.tags) <= 7 * 16 for one in summaries)
    for summary in summaries:
        for want in said(there.receive(ME, summary, now=NOW)):
            for push in said(here.receive(YOU, want, now=NOW)):
                assert len(CODEC.encode(push)) <= 1500 + len(held[0].raw) + 16
                there.receive(ME, push, now=NOW)
    assert records.items("member", now=NOW) == sorted(held, key=lambda one: one.owner)


def test_the_largest_messages_fit_under_their_caps() -> None:
    CODEC.encode(Summary(b"t" * 16 * MAX_TAGS, bytes(512), False))
    CODEC.encode(Want(b"t" * 16 * MAX_TAGS))
    CODEC.encode(Buckets(b"b" * 8 * 4096))
    raws = (b"x" * (EVIDENCE_BYTES - 1),) * (gossip._PUSH_BYTES // EVIDENCE_BYTES + 1)
    CODEC.encode(Push(raws))


@given(st.binary(max_size=300), st.sampled_from([kind.tag for kind in GOSSIP_KINDS]))
@settings(max_examples=200)
def test_garbage_is_a_wire_error_or_harmless(body: bytes, tag: str) -> None:
    peer, records = peer_with(member(0))
    try:
        message = CODEC.decode(tag, body)
    except WireError:
        return
    peer.receive(YOU, message, now=NOW)
    assert len(records) == 1


some_tags = st.lists(
    st.sampled_from([member(owner).tag for owner in range(5)]) | st.binary(min_size=16, max_size=16), max_size=9
).map(b"".join)
some_buckets = st.sampled_from([0, 32, 64, 512]).flatmap(lambda size: st.binary(min_size=size, max_size=size))
messages = (
    st.builds(Summary, some_tags, some_buckets, st.booleans())
    | st.builds(Want, some_tags)
    | st.builds(Push, st.lists(st.binary(max_size=99), max_size=9).map(tuple))
    | st.builds(Buckets, st.binary(min_size=2048, max_size=2048))
)


@given(st.lists(messages, max_size=5))
@settings(max_examples=100)
def test_false_summaries_change_nothing_and_are_answered_to_their_sender_only(sent: list[Struct]) -> None:
    peer, records = peer_with(*(member(owner) for owner in range(5)), peers=[THIRD])
    before = records.changes
    for message in sent:
        for effect in peer.receive(YOU, message, now=NOW):
            assert isinstance(effect, Send)
            assert effect.to == YOU
            CODEC.encode(effect.message)
    assert records.changes == before


@pytest.mark.parametrize(("num_records", "seconds"), [(0, 5.0), (250, 5.0), (1_000, 20.0), (10_000, 200.0)])
def test_records_are_renewed_more_rarely_the_more_there_are(num_records: int, seconds: float) -> None:
    assert refresh_s(num_records) == seconds


# -- every order of everything

FEW = 4


class Gossiping(RuleBasedStateMachine):
    """Four who gossip over links that lose, double, delay and overtake; one of them may sign two things at once.

    Nobody's map ever goes back or holds what its owner did not sign, and nobody is accused who signs one thing at a
    time. Left in peace, all hold the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.rng = random.Random(0)
        self.ids = [identity.peer_id for identity in IDENTITIES[:FEW]]
        self.maps = [RecordMap() for _ in range(FEW)]
        self.peers = [Gossip(one, held, checked) for one, held in zip(self.ids, self.maps, strict=True)]
        self.seqs = [0] * FEW
        self.signed: set[bytes] = set()
        self.liars: set[PeerId] = set()
        self.mail: list[tuple[int, int, str, bytes]] = []
        """(from, to, tag, body) that is under way."""
        self.before: list[list[int]] = [[0] * FEW for _ in range(FEW)]
        """[holder][owner] -> the seq that was held when we looked last."""
        self.connect([set(range(FEW))])

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def connect(self, groups: Sequence[set[int]]) -> None:
        for group in groups:
            for one in group:
                self.peers[one].set_peers(tuple(self.ids[other] for other in sorted(group)))

    def take(self, one: int, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                assert effect.to != self.ids[one], "nobody gossips with itself"
                body = CODEC.encode(effect.message)
                self.mail.append((one, self.ids.index(effect.to), CODEC.tag_of(effect.message), body))

    def sign(self, owner: int, says: str) -> Record:
        record = member(owner, self.seqs[owner], says=says, now=self.now, lifetime_s=1800.0)
        self.signed.add(record.raw)
        return record

    @rule(owner=st.integers(0, FEW - 1))
    def someone_has_news(self, owner: int) -> None:
        self.seqs[owner] += 1
        self.maps[owner].merge(self.sign(owner, "news"))

    @rule(one=st.integers(0, FEW - 1), other=st.integers(0, FEW - 1))
    def one_signs_two_things_at_once(self, one: int, other: int) -> None:
        """And shows each to another peer."""
        self.seqs[0] += 1
        self.liars.add(self.ids[0])
        self.maps[one].merge(self.sign(0, "this"))
        self.maps[other].merge(self.sign(0, "that"))

    @precondition(lambda self: self.mail)
    @rule(data=st.data(), again=st.booleans())
    def a_message_comes(self, data: st.DataObject, again: bool) -> None:
        at = data.draw(st.integers(0, len(self.mail) - 1))
        sender, to, tag, body = self.mail[at] if again else self.mail.pop(at)
        self.deliver(sender, to, tag, body)

    def deliver(self, sender: int, to: int, tag: str, body: bytes) -> None:
        self.take(to, self.peers[to].receive(self.ids[sender], CODEC.decode(tag, body), now=self.now))

    @rule()
    def all_that_is_under_way_is_lost(self) -> None:
        self.mail.clear()

    @rule(half=st.sets(st.integers(0, FEW - 1)))
    def the_net_falls_in_two(self, half: set[int]) -> None:
        self.connect([half, set(range(FEW)) - half])

    @rule(seconds=st.sampled_from([0.2, EXCHANGE_S, 3.0, REPAIR_S]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for one, peer in enumerate(self.peers):
            self.take(one, peer.tick(now=self.now, rng=self.rng))
            assert peer.wake_at() > self.now, "what is due was done"

    @invariant()
    def nobody_holds_what_its_owner_did_not_sign_or_goes_back(self) -> None:
        for holder, held in enumerate(self.maps):
            for owner, peer in enumerate(self.ids):
                record = held.get("member", peer, now=self.now)
                if peer in held.quarantined():
                    assert record is None
                    continue
                seq = 0 if record is None else record.seq
                assert record is None or record.raw in self.signed
                assert seq >= self.before[holder][owner]
                self.before[holder][owner] = seq

    @invariant()
    def only_who_said_two_things_is_accused_and_that_never_ends(self) -> None:
        assert all(held.quarantined() <= self.liars for held in self.maps)

    def teardown(self) -> None:
        """Connected, with nothing lost, all soon hold the same, the newest of everyone who is honest."""
        self.connect([set(range(FEW))])
        for _ in range(int(3 * REPAIR_S)):
            self.time_passes(1.0)
            while self.mail:
                self.deliver(*self.mail.pop(0))
        said_by_all = [{peer: held.get("member", peer, now=self.now) for peer in self.ids} for held in self.maps]
        assert said_by_all == [said_by_all[0]] * FEW
        assert len({held.quarantined() for held in self.maps}) == 1
        for owner, peer in enumerate(self.ids):
            record = said_by_all[0][peer]
            if peer not in self.liars:
                assert (0 if record is None else record.seq) == self.seqs[owner]


Gossiping.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestGossiping = Gossiping.TestCase
