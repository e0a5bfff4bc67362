"""Spreading signed records: each second with one partner what changed lately, now and then a comparison of everything.

    exchange (every 1 s)          A: Summary(tags of what changed in the last 8 s)
                                  B: Want(what it lacks), Summary(its own recent that A has not named; an answer)
                                  A: Push, Want          B: Push
    repair (every 30 s, and       A: Buckets(256 to 4096 hashes)
    with peers just connected)    B: Summary(tags of all in the buckets that differ)
                                  A: Want, Summary(what it has in these buckets and B has not named; an answer)
                                  B: Push, Want          A: Push

A tag is a hash of a whole record: who has not met it wants it, and then sees whether it is news. What was replaced is
remembered for a while, so that it is not asked for again; and what one peer is asked for is not asked of another at the
same time.

Silence means nothing: no message awaits another, none is sent twice, the next exchange or repair makes up for a lost
one. A sender may say anything; records carry their owner's signature, and what one peer says and is answered is limited
in bytes, where each message and each look at the whole map has a price; what goes beyond that is not even looked at.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol, TypeVar

from msgspec import Meta, Struct

from dugnad.dht.crdt import BUCKET_HASH_BYTES, MAX_BUCKETS, MIN_BUCKETS, Entry, RecordMap
from dugnad.dht.evidence import EVIDENCE_BYTES, Evidence, tag_of
from dugnad.dht.identity import PeerId
from dugnad.dht.records import TAG_BYTES
from dugnad.dht.wire import Kind, WireError

EXCHANGE_S = 1.0
RECENT_S = 8.0
REPAIR_S = 30.0
ASK_AGAIN_S = 1.0
"""How long what one peer was asked for is not asked of another, and half as long as it is not asked of itself again."""
NEWS_PER_S = 50.0
"""How many records all members together renew in a second, at most, but for a small run's."""
PEER_BYTES = 16 * 2**20
"""What one peer may say and is answered from one repair of ours to the next: two copies of a large map."""
MESSAGE_BYTES = 4096
"""What a message counts besides its contents: a signature and a stream of its own cost us as much."""
MAX_TAGS = 4096
MAX_REPAIRS_OF_NEW = 3
"""Repairs for peers that connected at the same time: what these bring then spreads as recent changes."""
_PUSH_BYTES = 256 * 1024
_MAX_ASKED = 100_000

_Raw = Annotated[bytes, Meta(max_length=EVIDENCE_BYTES)]
_NUMBERS_OF_BUCKETS = tuple(1 << power for power in range(MAX_BUCKETS.bit_length()) if 1 << power >= MIN_BUCKETS)


class Summary(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What its sender holds: of late, or all that falls into `buckets`. Raises ValueError for other lengths."""

    tags: Annotated[bytes, Meta(max_length=MAX_TAGS * TAG_BYTES)]
    """16 bytes each."""
    buckets: Annotated[bytes, Meta(max_length=MAX_BUCKETS // 8)]
    """One bit for each bucket, the first the highest of the first byte; empty for what changed of late."""
    answer: bool
    """Whether it answers another summary, and so is not itself answered by one."""

    def __post_init__(self) -> None:
        if len(self.tags) % TAG_BYTES or (self.buckets and 8 * len(self.buckets) not in _NUMBERS_OF_BUCKETS):
            raise ValueError("no whole tags, or no number of buckets")


class Want(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A request for what has these tags. Raises ValueError for tags that are not whole."""

    tags: Annotated[bytes, Meta(max_length=MAX_TAGS * TAG_BYTES)]

    def __post_init__(self) -> None:
        if len(self.tags) % TAG_BYTES:
            raise ValueError("no whole tags")


class Push(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Records, each as its owner signed it, and evidence."""

    raws: Annotated[tuple[_Raw, ...], Meta(max_length=MAX_TAGS)]


class Buckets(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The hashes of all that its sender holds, 8 bytes for each bucket. Raises ValueError for an odd number of them."""

    hashes: Annotated[bytes, Meta(max_length=MAX_BUCKETS * BUCKET_HASH_BYTES)]

    def __post_init__(self) -> None:
        if len(self.hashes) not in [number * BUCKET_HASH_BYTES for number in _NUMBERS_OF_BUCKETS]:
            raise ValueError("no number of buckets")


Message = Summary | Want | Push | Buckets

GOSSIP_KINDS: tuple[Kind, ...] = (
    Kind("summary", Summary, MAX_TAGS * TAG_BYTES + MAX_BUCKETS // 8 + 16),
    Kind("want", Want, MAX_TAGS * TAG_BYTES + 16),
    Kind("push", Push, _PUSH_BYTES + EVIDENCE_BYTES + 16),
    Kind("buckets", Buckets, MAX_BUCKETS * BUCKET_HASH_BYTES + 16),
)


@dataclass(frozen=True, slots=True)
class Send:
    """Send `message` to `to`; if it is lost, nothing need be done."""

    to: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class Changed:
    """The map has a new record or evidence, from elsewhere."""

    entry: Entry


Effect = Send | Changed


@dataclass(frozen=True, slots=True)
class _Asked:
    """Whom we asked for one thing, first and last when: a peer that names what it does not send holds us up once."""

    first: float
    last: float
    peers: tuple[PeerId, ...]


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

    parse(raw, now) makes a record or evidence of a stranger's bytes or raises WireError. Our own records are merged
    into `records` by whoever issues them, and go out with the next exchanges.
    """

    def __init__(self, me: PeerId, records: RecordMap, parse: Callable[[bytes, float], Entry]) -> None:
        self._me = me
        self._records = records
        self._parse = parse
        self._peers: Sequence[PeerId] = ()
        self._new: Sequence[PeerId] = ()
        self._marks: deque[tuple[float, int]] = deque()
        self._next_exchange, self._next_repair = 0.0, 0.0
        self._spent: Counter[PeerId] = Counter()
        self._asked: dict[bytes, _Asked] = {}
        """Who was asked for what has a tag; the longest ago first."""
        self.refused: Counter[str] = Counter()
        """How many records were refused, by the reason of their WireError."""

    def set_peers(self, peers: tuple[PeerId, ...]) -> None:
        """Name the peers to choose partners from (we may be one); with some that are new there is a repair at once."""
        if peers == self._peers:
            return
        before, there = set(self._peers), set(peers)
        waiting = [peer for peer in self._new if peer in there]
        self._new = (*waiting, *(peer for peer in peers if peer not in before)) if before or waiting else peers
        self._peers = peers

    def wake_at(self) -> float:
        """When `tick` is due next."""
        return 0.0 if self._new else min(self._next_exchange, self._next_repair)

    def tick(self, *, now: float, rng: Chance) -> list[Effect]:
        """Begin what is due: an exchange, a repair, or nothing."""
        effects = self._repair_new(rng)
        if now >= self._next_exchange or now < self._next_exchange - EXCHANGE_S:  # or the clock was set back
            self._next_exchange = now + EXCHANGE_S
            effects += self._exchange(now, rng)
        if now >= self._next_repair or now < self._next_repair - REPAIR_S:
            self._next_repair = now + REPAIR_S
            self._records.prune(now=now)
            self._spent.clear()
            effects += [self._compare_all(partner) for partner in self._partners(1, rng)]
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
                answers: Iterable[Message] = _pushes(self._living(message.tags, now))
            case Buckets():
                answers = self._differences(message.hashes, now)
            case Summary():
                answers = self._compared(sender, message, now)
        return list(self._within_limit(sender, answers))

    def _exchange(self, now: float, rng: Chance) -> list[Effect]:
        # at first everything is news: what was merged before we had anyone to tell it to, too
        self._marks.append((now, self._records.changes if self._marks else 0))
        while len(self._marks) > 1 and not now - RECENT_S <= self._marks[0][0] <= now:
            self._marks.popleft()
        self._forget_asked(now)
        return [Send(partner, Summary(_tags(self._recent(now)), b"", False)) for partner in self._partners(1, rng)]

    def _repair_new(self, rng: Chance) -> list[Effect]:
        """With a few peers that have just connected: after a partition all of them tell the same news."""
        new = rng.sample(self._new, min(len(self._new), MAX_REPAIRS_OF_NEW))
        self._new = ()
        return [self._compare_all(peer) for peer in new if peer != self._me]

    def _partners(self, number: int, rng: Chance) -> list[PeerId]:
        chosen = rng.sample(self._peers, min(len(self._peers), number + 1))  # one more: we may be among them
        return [peer for peer in chosen if peer != self._me][:number]

    def _compare_all(self, peer: PeerId) -> Send:
        return Send(peer, Buckets(self._records.bucket_hashes(self._records.num_buckets())))

    def _recent(self, now: float) -> list[Entry]:
        since = self._marks[0][1] if self._marks else self._records.changes
        return self._records.changed_since(since, now=now)[:MAX_TAGS]

    def _take(self, raws: Iterable[bytes], now: float) -> list[Effect]:
        changed: list[Effect] = []
        for raw in raws:
            if self._records.known(tag_of(raw)):  # its signature was verified when it came first
                continue
            try:
                entry = self._parse(raw, now)
            except WireError as error:  # not the sender's fault for certain: its clock or ours may be wrong
                self.refused[error.reason] += 1
                continue
            if isinstance(entry, Evidence):
                changed += [Changed(entry)] if self._records.merge(entry) else []
            else:
                changed += map(Changed, self._records.learn(entry))
        return changed

    def _living(self, tags: bytes, now: float) -> Iterator[Entry]:
        found = (self._records.tagged(tag, now=now) for tag in dict.fromkeys(_split(tags)))
        return (entry for entry in found if entry is not None)

    def _differences(self, theirs: bytes, now: float) -> Iterator[Message]:
        """Summaries of whole buckets, as many buckets in each as fit."""
        num_buckets = len(theirs) // BUCKET_HASH_BYTES
        mine = self._records.bucket_hashes(num_buckets)
        places = (slice(at, at + BUCKET_HASH_BYTES) for at in range(0, len(mine), BUCKET_HASH_BYTES))
        differing = frozenset(index for index, at in enumerate(places) if mine[at] != theirs[at])
        told: list[Entry] = []
        buckets: list[int] = []
        for index, entries in self._records.in_buckets(differing, num_buckets, now=now).items():
            if buckets and len(told) + len(entries) > MAX_TAGS:
                yield Summary(_tags(told), _bits(buckets, num_buckets), False)
                told, buckets = [], []
            # one bucket that alone is too large is cut: they answer with the rest in vain
            told += entries[: MAX_TAGS - len(told)]
            buckets.append(index)
        if buckets:
            yield Summary(_tags(told), _bits(buckets, num_buckets), False)

    def _compared(self, sender: PeerId, theirs: Summary, now: float) -> Iterator[Message]:
        """What of theirs we lack, and what of ours they did not name."""
        named = dict.fromkeys(_split(theirs.tags))
        lacking = [tag for tag in named if not self._records.known(tag) and self._ask(tag, sender, now)]
        if lacking:
            yield Want(b"".join(lacking))
        if theirs.answer:
            return
        rest = [entry for entry in self._told_against(theirs, now) if entry.tag not in named]
        for start in range(0, len(rest), MAX_TAGS):
            yield Summary(_tags(rest[start : start + MAX_TAGS]), b"", True)

    def _told_against(self, theirs: Summary, now: float) -> Iterable[Entry]:
        if not theirs.buckets:
            return self._recent(now)
        num_buckets = 8 * len(theirs.buckets)
        bits = int.from_bytes(theirs.buckets)
        chosen = frozenset(index for index in range(num_buckets) if bits >> (num_buckets - 1 - index) & 1)
        found = self._records.in_buckets(chosen, num_buckets, now=now)
        return (entry for entries in found.values() for entry in entries)

    def _ask(self, tag: bytes, peer: PeerId, now: float) -> bool:
        """Whether to ask `peer` for what has this tag; if so, it counts as asked."""
        asked = self._asked.get(tag)
        if asked is None:
            if len(self._asked) < _MAX_ASKED:
                self._asked[tag] = _Asked(now, now, (peer,))
            return True
        if peer in asked.peers or asked.last <= now < asked.last + ASK_AGAIN_S:
            return False
        self._asked[tag] = _Asked(asked.first, now, (*asked.peers, peer))
        return True

    def _forget_asked(self, now: float) -> None:
        while self._asked:
            tag, asked = next(iter(self._asked.items()))
            if asked.first <= now < asked.first + 2 * ASK_AGAIN_S:
                return
            del self._asked[tag]

    def _within_limit(self, sender: PeerId, answers: Iterable[Message]) -> Iterator[Effect]:
        for message in answers:
            if not self._afford(sender, MESSAGE_BYTES + _bytes_of(message)):
                return
            yield Send(sender, message)

    def _afford(self, peer: PeerId, num_bytes: int) -> bool:
        self._spent[peer] += num_bytes
        return self._spent[peer] <= PEER_BYTES

    def _price(self, message: Message) -> int:
        """What a message of another's counts; one that has us search the whole map counts by the map's size."""
        whole = isinstance(message, Buckets) or (isinstance(message, Summary) and message.buckets)
        return MESSAGE_BYTES + _bytes_of(message) + (TAG_BYTES * len(self._records) if whole else 0)


def refresh_s(num_records: int) -> float:
    """How often each of that many records should be renewed by its owner, for a steady traffic of news."""
    return max(5.0, num_records / NEWS_PER_S)


def _tags(entries: Iterable[Entry]) -> bytes:
    return b"".join([entry.tag for entry in entries])


def _split(tags: bytes) -> list[bytes]:
    return [tags[at : at + TAG_BYTES] for at in range(0, len(tags), TAG_BYTES)]


def _bits(buckets: Iterable[int], num_buckets: int) -> bytes:
    return sum(1 << (num_buckets - 1 - index) for index in buckets).to_bytes(num_buckets // 8)


def _pushes(entries: Iterable[Entry]) -> Iterator[Push]:
    raws: list[bytes] = []
    num_bytes = 0
    for entry in entries:
        raws.append(entry.raw)
        num_bytes += len(entry.raw) + 3
        if num_bytes >= _PUSH_BYTES or len(raws) == MAX_TAGS:
            yield Push(tuple(raws))
            raws, num_bytes = [], 0
    if raws:
        yield Push(tuple(raws))


def _bytes_of(message: Message) -> int:
    match message:
        case Push():
            return sum(len(raw) for raw in message.raws)
        case Summary() | Want():
            return len(message.tags)
        case Buckets():
            return len(message.hashes)
