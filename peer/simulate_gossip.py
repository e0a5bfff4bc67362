"""What gossip costs, and how fast it is, among so many peers: the machines of production in virtual time.

Real records in real messages, each counted as it would travel: encoded and sealed. Two things are short cuts, for ten
thousand maps of twenty thousand records fit in no memory: a record is parsed once for everyone, and what is not renewed
while we look stands in nobody's map. In a real swarm it stands in everyone's, where it costs its tag whenever a repair
lists its bucket; that is added to the bytes.
"""

import heapq
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from dugnad.dht import records
from dugnad.dht.crdt import MAX_BUCKETS, Entry, RecordMap
from dugnad.dht.evidence import Proofs, is_evidence
from dugnad.dht.gossip import EXCHANGE_S, GOSSIP_KINDS, Changed, Effect, Gossip, Message, Send, Summary
from dugnad.dht.identity import Identity, nickname
from dugnad.dht.records import MEMBER_KINDS, TAG_BYTES, MemberBody, ProgressBody, slot_of
from dugnad.dht.swarm import lifetime_s, member_period_s, progress_period_s
from dugnad.dht.wire import Codec, seal

LATENCY_S = (0.02, 0.2)
"""The least and the most that a message takes."""
WARM_UP_S = 15.0
HEAL_WITHIN_S = 60.0
_RUN = b"r" * 32
_START = 1_700_000_000.0
_CODEC = Codec(GOSSIP_KINDS)
_ADDRESSES = ("/ip4/203.0.113.77/tcp/41234", "/ip4/192.168.178.23/tcp/41234", "/ip4/127.0.0.1/tcp/41234")


@dataclass(frozen=True, kw_only=True, slots=True)
class GossipCost:
    """What a swarm of `peers` sent in `seconds`, by kind of message, and how fast news went."""

    peers: int
    seconds: float
    mean_bytes_per_s: dict[str, float]
    """Sent by a peer, on average over all."""
    max_bytes_per_s: float
    """Sent by the one that sent most."""
    renewals_per_s: float
    """Records that all together renewed."""
    mean_exchanges: float
    """From a renewal until everyone has it, on average over the renewals that all had time to get."""
    max_exchanges: float
    heal_exchanges: float
    """From the end of a partition into halves until everyone has what was said during it."""

    @property
    def bytes_per_s(self) -> float:
        """Sent by a peer, of all kinds, on average."""
        return sum(self.mean_bytes_per_s.values())


def simulate_gossip(peers: int, *, seed: int, measure_s: float = 30.0, partition_s: float = 10.0) -> GossipCost:
    """Let `peers` gossip, count for `measure_s` virtual seconds, then part them in halves for a while and heal them."""
    world = _World(peers, seed)
    world.connect(range(peers))
    world.run(WARM_UP_S)
    world.sent = [Counter() for _ in range(peers)]
    world.spreads.clear()
    before = world.renewals
    world.run(measure_s)
    sent, renewals = world.sent, world.renewals - before
    world.sent = [Counter() for _ in range(peers)]
    world.run(WARM_UP_S)  # so that the last of the renewals get everywhere
    took = [spread.took_s / EXCHANGE_S for spread in world.spreads.values() if spread.took_s]
    world.spreads.clear()
    half = peers // 2
    world.connect(range(half), range(half, peers))
    world.run(partition_s)
    world.renewing = False
    world.connect(range(peers))
    healed_s = world.run(HEAL_WITHIN_S, until_all_spread=True)
    kinds = sorted(kind.tag for kind in GOSSIP_KINDS)
    return GossipCost(
        peers=peers,
        seconds=measure_s,
        mean_bytes_per_s={kind: sum(one[kind] for one in sent) / peers / measure_s for kind in kinds},
        max_bytes_per_s=max(one.total() for one in sent) / measure_s,
        renewals_per_s=renewals / measure_s,
        mean_exchanges=sum(took) / len(took),
        max_exchanges=max(took),
        heal_exchanges=healed_s / EXCHANGE_S,
    )


class _Map(RecordMap):
    """The part of a large map that changes while we look; it is divided like the whole."""

    def __init__(self, num_records: int) -> None:
        super().__init__()
        self._num_records = num_records

    def __len__(self) -> int:
        return self._num_records


@dataclass(slots=True)
class _Spread:
    """How far one renewal has come."""

    since: float
    holders: int
    took_s: float = 0.0


class _World:
    def __init__(self, size: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = _START
        self.identities = [Identity.from_seed(number.to_bytes(32)) for number in range(size)]
        self.ids = tuple(identity.peer_id for identity in self.identities)
        self.index = {peer: number for number, peer in enumerate(self.ids)}
        self.maps = [_Map(size * len(MEMBER_KINDS)) for _ in range(size)]
        self.peers = [Gossip(peer, held, self._parse) for peer, held in zip(self.ids, self.maps, strict=True)]
        self.sent: list[Counter[str]] = [Counter() for _ in range(size)]
        self.spreads: dict[bytes, _Spread] = {}
        self.renewals = 0
        self.renewing = True
        self._group = [0] * size
        self._parsed: dict[bytes, Entry] = {}
        self._proofs = Proofs(verify=lambda peer, payload, signature: True)
        self._overhead = _sealed_bytes()
        # how many of the records that stand in nobody's map would stand in each of the most buckets
        self._unchanged = Counter(_leaf(slot_of(kind, peer, "")) for peer in self.ids for kind in MEMBER_KINDS)
        self._events: list[tuple[float, int, int, int, Message | None]] = []
        self._count = 0
        self._due: list[tuple[float, int, str, int]] = []
        for one in range(size):
            self._at(self.now + self.rng.random() * EXCHANGE_S, one)
            for kind in MEMBER_KINDS:
                heapq.heappush(self._due, (self.now + self.rng.random() * self._period_s(kind), one, kind, 1))

    def connect(self, *groups: range) -> None:
        """Let the members of each group gossip with each other only."""
        for number, group in enumerate(groups):
            members = tuple(self.ids[one] for one in group)
            for one in group:
                self._group[one] = number
                self.peers[one].set_peers(members)

    def run(self, duration_s: float, *, until_all_spread: bool = False) -> float:
        """Let time pass, or until everyone has all that is being counted; how much has passed."""
        start, end = self.now, self.now + duration_s
        while not (until_all_spread and all(spread.took_s for spread in self.spreads.values())):
            at = min(self._events[0][0], self._due[0][0] if self.renewing else end)
            if at >= end:
                self.now = end
                break
            self.now = at
            if self.renewing and self._due[0][0] <= at:
                self._renew(*heapq.heappop(self._due)[1:])
                continue
            _, _, sender, to, message = heapq.heappop(self._events)
            if message is None:
                self._do(to, self.peers[to].tick(now=self.now, rng=self.rng))
                self._at(self.now + EXCHANGE_S, to)
            elif self._group[sender] == self._group[to]:
                self._do(to, self.peers[to].receive(self.ids[sender], message, now=self.now))
        return self.now - start

    def _period_s(self, kind: str) -> float:
        size = len(self.ids)
        return member_period_s(size) if kind == "member" else progress_period_s(size)

    def _renew(self, one: int, kind: str, seq: int) -> None:
        """Have a peer issue its next record of a kind, like a typical one in production."""
        identity, period_s = self.identities[one], self._period_s(kind)
        body: MemberBody | ProgressBody
        if kind == "member":
            body = MemberBody(_ADDRESSES, "volunteer", nickname(identity.peer_id), "0.1.0")
        else:
            body = ProgressBody(seq, "training", "training on 512 samples", seq, 10240.0, 2.5, identity.public_key)
        record = records.issue(
            identity, _RUN, kind, "", seq + 1_700_000_000_000, body, now=self.now, lifetime_s=lifetime_s(kind, period_s)
        )
        if seq == 1:
            self._unchanged[_leaf(record.slot)] -= 1
        self.maps[one].merge(record)
        self._parsed[record.raw] = record
        self.renewals += 1
        if kind == "member":  # renewed so rarely that everyone gets each, before the next replaces it
            self.spreads[record.tag] = _Spread(self.now, 1)
        heapq.heappush(self._due, (self.now + period_s, one, kind, seq + 1))

    def _do(self, one: int, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(to, message):
                    tag = _CODEC.tag_of(message)
                    self.sent[one][tag] += len(_CODEC.encode(message)) + self._overhead[tag] + self._unlisted(message)
                    self._at(self.now + self.rng.uniform(*LATENCY_S), self.index[to], sender=one, message=message)
                case Changed(entry):
                    self._spread(entry)

    def _spread(self, entry: Entry) -> None:
        spread = self.spreads.get(entry.tag)
        if spread is not None:
            spread.holders += 1
            if spread.holders == len(self.ids):
                spread.took_s = self.now - spread.since

    def _unlisted(self, message: Message) -> int:
        """The bytes of the tags that a summary of whole buckets lacks since what never changes is in no map."""
        if not isinstance(message, Summary) or not message.buckets:
            return 0
        width = MAX_BUCKETS // (8 * len(message.buckets))
        listed = (leaf for bucket in _ones(message.buckets) for leaf in range(bucket * width, (bucket + 1) * width))
        return TAG_BYTES * sum(self._unchanged[leaf] for leaf in listed)

    def _at(self, when: float, to: int, *, sender: int = 0, message: Message | None = None) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, sender, to, message))

    def _parse(self, raw: bytes, now: float) -> Entry:
        entry = self._parsed.get(raw)
        if entry is None:
            entry = self._proofs.parse(raw, _RUN) if is_evidence(raw) else records.parse(raw, _RUN, now=now)
            self._parsed[raw] = entry
        return entry


def _sealed_bytes() -> dict[str, int]:
    """What a seal adds to a body of each kind, in bytes."""
    sample = Summary(b"", b"", False)
    sealed = seal(Identity.from_seed(bytes(32)), _RUN, _CODEC, sample)
    without_tag = len(sealed) - len(_CODEC.encode(sample)) - len(_CODEC.tag_of(sample))
    return {kind.tag: without_tag + len(kind.tag) for kind in GOSSIP_KINDS}


def _leaf(slot: bytes) -> int:
    """Which of the most buckets a slot falls into."""
    return int.from_bytes(slot[:2]) * MAX_BUCKETS >> 16


def _ones(bits: bytes) -> Iterator[int]:
    """The places of the bits that are set."""
    number = int.from_bytes(bits)
    return (place for place in range(8 * len(bits)) if number >> (8 * len(bits) - 1 - place) & 1)
