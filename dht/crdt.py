"""A map of signed records that merges to the same contents everywhere, in whatever order and how often they arrive.

One record stands for each (kind, owner, key): the one with the higher (seq, hash of its bytes). That is a join of total
orders, so merging is commutative, associative and idempotent; and since a record is signed, only its owner can replace
it. No clock takes part: an expired record keeps its place, unseen by readers and never sent, so that older ones can't
come back. Two records with one seq prove that their owner equivocates; the pair is kept as evidence.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from blake3 import blake3

from dugnad.dht.identity import PeerId
from dugnad.dht.records import KINDS, MAX_AHEAD_S, Record, slot_of

NUM_BUCKETS = 256
BUCKET_HASH_BYTES = 8


@dataclass(frozen=True, slots=True)
class Equivocation:
    """Two records of one owner, kind, key and seq: signed proof that the owner says two things. Lower hash first."""

    first: Record
    second: Record


class RecordMap:
    """The newest record of each owner, kind and key; at most max_owners x the keys of all kinds.

    A full map takes no further owners, until `prune` makes room: the order of arrival matters in that case only.
    """

    def __init__(self, *, max_owners: int = 10_000) -> None:
        self._max_owners = max_owners
        self._by_slot: dict[bytes, tuple[int, Record]] = {}  # with the number of its change; in that order
        self._raws: set[bytes] = set()
        self._slots_of: Counter[PeerId] = Counter()
        self.changes = 0
        """How many merges have changed the map."""
        self.evidence: dict[PeerId, Equivocation] = {}
        """The first proof against each owner that equivocated, of at most max_owners; it stays where it was found."""

    def __len__(self) -> int:
        return len(self._by_slot)

    def merge(self, record: Record) -> bool:
        """Take in a record; whether it changed the map."""
        held = self._held(record.slot)
        if held is None:
            if record.owner not in self._slots_of and len(self._slots_of) >= self._max_owners:
                return False
            self._slots_of[record.owner] += 1
        elif held.seq == record.seq and held.hash != record.hash:
            self._note(held, record)
        if held is not None and (record.seq, record.hash) <= (held.seq, held.hash):
            return False
        self.changes += 1
        self._by_slot.pop(record.slot, None)  # else it would keep its old place in the order
        self._by_slot[record.slot] = self.changes, record
        if held is not None:
            self._raws.discard(held.raw)
        self._raws.add(record.raw)
        return True

    def holds(self, raw: bytes) -> bool:
        """Whether a record of just these bytes stands in the map, expired or not."""
        return raw in self._raws

    def get(self, kind: str, owner: PeerId, key: str = "", *, now: float) -> Record | None:
        """What `owner` says, or None if it has said nothing that still holds at `now` (unix seconds)."""
        return self.at(slot_of(kind, owner, key), now=now)

    def at(self, slot: bytes, *, now: float) -> Record | None:
        """The record in a slot, or None if it is empty or what is there has expired."""
        held = self._held(slot)
        return None if held is None or held.expired(now) else held

    def items(self, kind: str, *, now: float) -> list[Record]:
        """All records of a kind that hold at `now`, in the order of owners and keys."""
        return sorted(
            (record for record in self._living(now) if record.kind == kind),
            key=lambda record: (record.owner, record.key),
        )

    def seq_of(self, kind: str, owner: PeerId, key: str = "") -> int:
        """The highest seq seen, expired or not; 0 if none. The owner's next record takes one more."""
        held = self._held(slot_of(kind, owner, key))
        return 0 if held is None else held.seq

    def standing(self, slot: bytes) -> tuple[int, bytes]:
        """The (seq, hash) that a record must exceed to change this slot, expired or not; (0, b"") if it is empty."""
        held = self._held(slot)
        return (0, b"") if held is None else (held.seq, held.hash)

    def changed_since(self, change: int, *, now: float) -> list[Record]:
        """The records that came after the map's `changes` had that value and still hold, newest first."""
        found = []
        for number, record in reversed(self._by_slot.values()):
            if number <= change:
                break
            if not record.expired(now):
                found.append(record)
        return found

    def buckets(self, *, now: float) -> list[list[Record]]:
        """All records that hold at `now`, in 256 lists by the first byte of their slot, each in the slots' order."""
        buckets: list[list[Record]] = [[] for _ in range(NUM_BUCKETS)]
        for record in self._living(now):
            buckets[record.slot[0]].append(record)
        for bucket in buckets:
            bucket.sort(key=lambda record: record.slot)
        return buckets

    def prune(self, *, now: float) -> None:
        """Forget what expired longer ago than a record of its kind can last.

        By then every earlier record of the same slot has expired as well, so none can come back to readers.
        """
        for slot, (_, record) in list(self._by_slot.items()):
            if now > record.expires_ms / 1000 + KINDS[record.kind].max_lifetime_s + MAX_AHEAD_S:
                del self._by_slot[slot]
                self._raws.discard(record.raw)
                self._slots_of[record.owner] -= 1
                if not self._slots_of[record.owner]:
                    del self._slots_of[record.owner]

    def _held(self, slot: bytes) -> Record | None:
        entry = self._by_slot.get(slot)
        return None if entry is None else entry[1]

    def _living(self, now: float) -> Iterator[Record]:
        return (record for _, record in self._by_slot.values() if not record.expired(now))

    def _note(self, held: Record, other: Record) -> None:
        first, second = sorted((held, other), key=lambda record: record.hash)
        self.evidence.setdefault(held.owner, Equivocation(first, second))
        if len(self.evidence) > self._max_owners:
            del self.evidence[next(iter(self.evidence))]


def bucket_hashes(buckets: list[list[Record]]) -> bytes:
    """8 bytes for each of the 256 buckets: equal in two maps if the same records stand in it."""
    digests = (blake3(b"".join(record.hash for record in bucket)) for bucket in buckets)
    return b"".join(digest.digest(length=BUCKET_HASH_BYTES) for digest in digests)
