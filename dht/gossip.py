"""Spreading signed records: each second with one partner what changed lately, now and then a comparison of everything.

    exchange (every 1 s)          A: Summary(what changed in the last 8 s)
                                  B: Want(what it lacks), Push(what it has newer), Summary(its own recent, answer)
                                  A: Want, Push
    repair (every 30 s, and       A: Buckets(256 hashes)
    with peers just connected)    B: Summary(all of the buckets that differ)
                                  A: Want, Push(also what it has in these buckets and B does not)

Silence means nothing: no message awaits another, none is sent twice, the next exchange or repair makes up for a lost
one. A sender may say anything; records carry their owner's signature, and what one peer says and is answered is limited
in bytes, where each message and each look at the whole map has a price; what goes beyond that is not even looked at.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol, TypeVar

from msgspec import Meta, Struct

from dugnad.dht.crdt import BUCKET_HASH_BYTES, NUM_BUCKETS, RecordMap, bucket_hashes
from dugnad.dht.identity import PeerId
from dugnad.dht.records import MAX_RECORD_BYTES, Record
from dugnad.dht.wire import Kind, WireError

EXCHANGE_S = 1.0
RECENT_S = 8.0
REPAIR_S = 30.0
PEER_BYTES = 16 * 2**20
"""What one peer may say and is answered from one repair of ours to the next: two copies of a large map."""
MESSAGE_BYTES = 4096
"""What a message counts besides its contents: a signature and a stream of its own cost us as much."""
MAX_ITEMS = 4096
MAX_REPAIRS_OF_NEW = 3
"""Repairs for peers that connected at the same time: what these bring then spreads as recent changes."""
_HASH_BYTES = 16  # 8 would do against chance, but an owner could find two records of its own that share those
_ITEM_BYTES = 48
_PUSH_BYTES = 256 * 1024

_Slot = Annotated[bytes, Meta(min_length=16, max_length=16)]
_Raw = Annotated[bytes, Meta(max_length=MAX_RECORD_BYTES)]
_BUCKETS_BYTES = NUM_BUCKETS * BUCKET_HASH_BYTES


class Item(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """That a peer holds a record: its slot, its seq, the first 16 bytes of its hash."""

    slot: _Slot
    seq: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    hash: Annotated[bytes, Meta(min_length=_HASH_BYTES, max_length=_HASH_BYTES)]


class Summary(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What its sender holds: of late, or all that falls into `buckets` (one byte each)."""

    items: Annotated[tuple[Item, ...], Meta(max_length=MAX_ITEMS)]
    buckets: Annotated[bytes, Meta(max_length=NUM_BUCKETS)]
    answer: bool
    """Whether it answers another summary, and so is not itself answered by one."""


class Want(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A request for the records in these slots."""

    slots: Annotated[tuple[_Slot, ...], Meta(max_length=MAX_ITEMS)]


class Push(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Records, each as its owner signed it."""

    raws: Annotated[tuple[_Raw, ...], Meta(max_length=MAX_ITEMS)]


class Buckets(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The hashes of all that its sender holds, 8 bytes for each of 256 buckets."""

    hashes: Annotated[bytes, Meta(min_length=_BUCKETS_BYTES, max_length=_BUCKETS_BYTES)]


Message = Summary | Want | Push | Buckets

GOSSIP_KINDS: tuple[Kind, ...] = (
    Kind("summary", Summary, MAX_ITEMS * _ITEM_BYTES + 512),
    Kind("want", Want, MAX_ITEMS * 18 + 16),
    Kind("push", Push, _PUSH_BYTES + MAX_RECORD_BYTES + 16),
    Kind("buckets", Buckets, _BUCKETS_BYTES + 16),
)


@dataclass(frozen=True, slots=True)
class Send:
    """Send `message` to `to`; if it is lost, nothing need be done."""

    to: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class Changed:
    """The map has a new record, from elsewhere."""

    record: Record


Effect = Send | Changed
T = TypeVar("T")


class Chance(Protocol):
    """What gossip uses of a random.Random."""

    def choice(self, seq: Sequence[T], /) -> T:
        """Any one of them."""
        ...

    def sample(self, population: Sequence[T], k: int) -> list[T]:
        """Any k of them."""
        ...


class Gossip:
    """Keeps `records` the same as those of the peers it talks to; all times are unix seconds.

    parse(raw, now) makes a record of a stranger's bytes or raises WireError. Our own records are merged into `records`
    by whoever issues them, and go out with the next exchanges.
    """

    def __init__(self, me: PeerId, records: RecordMap, parse: Callable[[bytes, float], Record]) -> None:
        self._me = me
        self._records = records
        self._parse = parse
        self._peers: frozenset[PeerId] = frozenset()
        self._new: frozenset[PeerId] = frozenset()
        self._to_repair: list[PeerId] = []
        self._marks: deque[tuple[float, int]] = deque()
        self._next_exchange, self._next_repair = 0.0, 0.0
        self._spent: Counter[PeerId] = Counter()
        self.refused: Counter[str] = Counter()
        """How many records were refused, by the reason of their WireError."""

    def set_peers(self, peers: Iterable[PeerId]) -> None:
        """Name the peers to choose partners from; with some of those that are new there will be a repair at once."""
        now_there = frozenset(peers) - {self._me}
        self._new = (self._new | (now_there - self._peers)) & now_there
        self._peers = now_there

    def wake_at(self) -> float:
        """When `tick` is due next."""
        return 0.0 if self._new else min(self._next_exchange, self._next_repair)

    def tick(self, *, now: float, rng: Chance) -> list[Effect]:
        """Begin what is due: an exchange, a repair, or nothing."""
        effects = self._repair_new(now, rng)
        if now >= self._next_exchange or now < self._next_exchange - EXCHANGE_S:  # or the clock was set back
            self._next_exchange = now + EXCHANGE_S
            effects += self._exchange(now, rng)
        if now >= self._next_repair or now < self._next_repair - REPAIR_S:
            self._next_repair = now + REPAIR_S
            self._records.prune(now=now)
            self._spent.clear()
            effects += self._repair(now, rng)
        return effects

    def receive(self, sender: PeerId, message: Struct, *, now: float) -> list[Effect]:
        """Take in what `sender` says and answer it, within its limit. Raises WireError for what is not gossip."""
        if not isinstance(message, Message):
            raise WireError("unknown kind", f"a {type(message).__name__} is no gossip")
        if not self._afford(sender, self._price(message)):
            return []
        match message:
            case Push():
                return self._take(message.raws, now)
            case Want():
                answers: Iterable[Message] = _pushes(self._living(message.slots, now))
            case Buckets():
                answers = self._differences(message.hashes, now)
            case Summary():
                answers = self._compared(message, now)
        return list(self._within_limit(sender, answers))

    def _exchange(self, now: float, rng: Chance) -> list[Effect]:
        # at first everything is news: what was merged before we had anyone to tell it to, too
        self._marks.append((now, self._records.changes if self._marks else 0))
        while len(self._marks) > 1 and not now - RECENT_S <= self._marks[0][0] <= now:
            self._marks.popleft()
        if not self._peers:
            return []
        return [Send(rng.choice(sorted(self._peers)), Summary(_items(self._recent(now)), b"", False))]

    def _repair(self, now: float, rng: Chance) -> list[Effect]:
        return [self._compare_all(rng.choice(sorted(self._peers)), now)] if self._peers else []

    def _repair_new(self, now: float, rng: Chance) -> list[Effect]:
        """With a few peers that have just connected: after a partition all of them tell the same news."""
        chosen = rng.sample(sorted(self._new), min(len(self._new), MAX_REPAIRS_OF_NEW))
        self._new = frozenset()
        return [self._compare_all(peer, now) for peer in chosen]

    def _compare_all(self, peer: PeerId, now: float) -> Send:
        return Send(peer, Buckets(bucket_hashes(self._records.buckets(now=now))))

    def _recent(self, now: float) -> list[Record]:
        since = self._marks[0][1] if self._marks else self._records.changes
        return self._records.changed_since(since, now=now)[:MAX_ITEMS]

    def _take(self, raws: Iterable[bytes], now: float) -> list[Effect]:
        changed: list[Effect] = []
        for raw in raws:
            if self._records.holds(raw):  # its signature was verified when it came first
                continue
            try:
                record = self._parse(raw, now)
            except WireError as error:  # not the sender's fault for certain: its clock or ours may be wrong
                self.refused[error.reason] += 1
                continue
            if self._records.merge(record):
                changed.append(Changed(record))
        return changed

    def _living(self, slots: Iterable[bytes], now: float) -> Iterator[Record]:
        found = (self._records.at(slot, now=now) for slot in dict.fromkeys(slots))
        return (record for record in found if record is not None)

    def _differences(self, theirs: bytes, now: float) -> Iterator[Message]:
        """Summaries of whole buckets, as many buckets in each as fit."""
        mine = self._records.buckets(now=now)
        hashes = bucket_hashes(mine)
        items: tuple[Item, ...] = ()
        buckets = b""
        for index, records in enumerate(mine):
            at = slice(index * BUCKET_HASH_BYTES, (index + 1) * BUCKET_HASH_BYTES)
            if hashes[at] == theirs[at]:
                continue
            if buckets and len(items) + len(records) > MAX_ITEMS:
                yield Summary(items, buckets, True)
                items, buckets = (), b""
            # one bucket that alone is too large is cut: the rest is pushed here in vain, and theirs comes the other way
            items, buckets = items + _items(records[: MAX_ITEMS - len(items)]), buckets + bytes([index])
        if buckets:
            yield Summary(items, buckets, True)

    def _compared(self, theirs: Summary, now: float) -> Iterator[Message]:
        """What of theirs we lack, and what of ours they do."""
        lacking, newer, same = [], [], set()
        for item in theirs.items:
            seq, digest = self._records.standing(item.slot)
            if (item.seq, item.hash) == (seq, digest[:_HASH_BYTES]):
                same.add(item.slot)
            if item.seq >= seq and item.slot not in same:  # at the same seq both get both: that is evidence
                lacking.append(item.slot)
            if item.seq <= seq and item.slot not in same:
                newer.append(item.slot)
        if lacking:
            yield Want(tuple(lacking))
        yield from _pushes(self._living(newer, now))
        if theirs.buckets:
            yield from self._unlisted(theirs, now)
        elif not theirs.answer:
            told = same | set(newer)
            rest = [record for record in self._recent(now) if record.slot not in told]
            yield Summary(_items(rest), b"", True)

    def _unlisted(self, theirs: Summary, now: float) -> Iterator[Message]:
        listed = {item.slot for item in theirs.items}
        mine = self._records.buckets(now=now)
        ours = (record for index in sorted(set(theirs.buckets)) for record in mine[index])
        return _pushes(record for record in ours if record.slot not in listed)

    def _within_limit(self, sender: PeerId, answers: Iterable[Message]) -> Iterator[Effect]:
        for message in answers:
            if not self._afford(sender, MESSAGE_BYTES + _bytes_of(message)):
                return
            yield Send(sender, message)

    def _afford(self, peer: PeerId, num_bytes: int) -> bool:
        self._spent[peer] += num_bytes
        return self._spent[peer] <= PEER_BYTES

    def _price(self, message: Message) -> int:
        """What a message of another's counts; one that has us sort the whole map counts by the map's size."""
        whole = isinstance(message, Buckets) or (isinstance(message, Summary) and message.buckets)
        return MESSAGE_BYTES + _bytes_of(message) + (_ITEM_BYTES * len(self._records) if whole else 0)


def refresh_s(num_members: int) -> float:
    """How often each of that many members should renew what it says of itself, for a steady traffic of news."""
    return max(5.0, num_members / 50.0)


def _items(records: Iterable[Record]) -> tuple[Item, ...]:
    return tuple(Item(record.slot, record.seq, record.hash[:_HASH_BYTES]) for record in records)


def _pushes(records: Iterable[Record]) -> Iterator[Push]:
    raws: list[bytes] = []
    num_bytes = 0
    for record in records:
        raws.append(record.raw)
        num_bytes += len(record.raw) + 3
        if num_bytes >= _PUSH_BYTES or len(raws) == MAX_ITEMS:
            yield Push(tuple(raws))
            raws, num_bytes = [], 0
    if raws:
        yield Push(tuple(raws))


def _bytes_of(message: Message) -> int:
    match message:
        case Push():
            return sum(len(raw) for raw in message.raws)
        case Summary():
            return _ITEM_BYTES * len(message.items)
        case Want():
            return len(message.slots) * 16
        case Buckets():
            return _BUCKETS_BYTES
