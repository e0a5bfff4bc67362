"""A map of signed records that merges to the same contents everywhere, in whatever order and how often they arrive.

One record stands for each (kind, owner, key): the one with the higher (seq, hash of its bytes). Evidence against an
owner stands above all that it says and takes its place. That is a join of total orders, so merging is commutative,
associative and idempotent; and since records are signed and evidence is made of what its owner signed, only the owner
can change what stands for it. No clock takes part: an expired record keeps its place, unseen by readers and never sent,
so that older ones can't come back.
"""

from array import array
from collections import Counter
from collections.abc import Iterator

from dugnad.dht.evidence import Evidence, contradict, of_records
from dugnad.dht.identity import PeerId
from dugnad.dht.records import KINDS, MAX_AHEAD_S, DecisionBody, Record, slot_of

Entry = Record | Evidence

MIN_BUCKETS, MAX_BUCKETS = 256, 4096
"""Into how many buckets, by the first bits of their slots, two maps are divided to be compared: a power of two."""
BUCKET_HASH_BYTES = 8
MAX_EVIDENCE = 1024
MAX_DECISIONS = 8192
"""How many decisions of the organizer itself stand: of more, the newest."""
MAX_DELEGATED = 1024
"""How many decisions of its delegates stand beside those, whose keys are more easily stolen."""
_LEAF_SHIFT = 16 - 12  # a leaf is one of 4096 buckets: the first 12 bits of a slot
_RECORDS_PER_BUCKET = 4
_WORD = 2**64 - 1
_MAX_PAST = 100_000


class RecordMap:
    """The newest record of each owner, kind and key; at most max_owners x the keys of all kinds, and max_evidence.

    A full map takes no further owners, until `prune` makes room: the order of arrival matters in that case only.
    Decisions count by themselves: max_decisions of the organizer's own and max_delegated of others, and of more those
    with the greatest (seq, hash). A record that replaces another is greater than it, so what is among the greatest of
    all is so in every map that it ever meets: maps with different ones take over from each other until all hold the
    same, whatever the order. What has expired leaves with the next `prune`, here or there first; what it had pushed
    out comes back, if anyone still has it.
    """

    def __init__(
        self,
        *,
        max_owners: int = 10_000,
        max_evidence: int = MAX_EVIDENCE,
        max_decisions: int = MAX_DECISIONS,
        max_delegated: int = MAX_DELEGATED,
    ) -> None:
        self._max_owners, self._max_evidence = max_owners, max_evidence
        self._max_decisions = {False: max_decisions, True: max_delegated}
        self._decisions: dict[bool, dict[bytes, Record]] = {False: {}, True: {}}  # of delegates or not, by their slots
        self._by_slot: dict[bytes, tuple[int, Entry]] = {}  # with the number of its change; in that order
        self._slot_of_tag: dict[bytes, bytes] = {}
        self._slots_of: Counter[PeerId] = Counter()
        self._evidence: dict[PeerId, Evidence] = {}
        self._sums = array("Q", bytes(8 * MAX_BUCKETS))  # of the tags in each leaf, but for what is hidden
        self._hidden: set[bytes] = set()  # the slots of what had expired at the last pruning
        self._past: set[bytes] = set()  # the tags of what no longer stands, or never could, since the last pruning
        self._past_before: set[bytes] = set()
        self.changes = 0
        """How many merges have changed the map."""

    def __len__(self) -> int:
        return len(self._by_slot)

    def learn(self, record: Record) -> list[Entry]:
        """Merge a record, and the evidence that it makes with the one in its place; what of it changed the map.

        What is found here depends on what meets here; wherever it is found, the evidence then spreads like a record.
        """
        held = self._held(record.slot)
        news: list[Entry] = [record] if self.merge(record) else []
        if isinstance(held, Record) and contradict(held, record):
            evidence = of_records(held, record)
            return [evidence] if self.merge(evidence) else news
        return news

    def merge(self, entry: Entry) -> bool:
        """Take in a record or evidence; whether it changed the map."""
        if not self._stands(entry):
            self._pass(entry.tag)
            return False
        if isinstance(entry, Evidence):
            self._evidence[entry.owner] = entry
            listed = (slot_of(kind, entry.owner, key) for kind, rules in KINDS.items() for key in rules.keys or ())
            for slot in (*listed, *[one.slot for one in self.decisions() if one.owner == entry.owner]):
                self._drop(slot)
        self._drop(entry.slot)
        self.changes += 1
        self._by_slot[entry.slot] = self.changes, entry  # at the end, as the newest
        self._slot_of_tag[entry.tag] = entry.slot
        if isinstance(entry, Record):
            if isinstance(entry.body, DecisionBody):
                self._make_room(entry)
                self._alike(entry)[entry.slot] = entry
            else:
                self._slots_of[entry.owner] += 1
        self._count(entry, 1)
        return True

    def known(self, tag: bytes) -> bool:
        """Whether what has this tag stands in the map, expired or not, or lately did or could not."""
        return tag in self._slot_of_tag or tag in self._past or tag in self._past_before

    def tagged(self, tag: bytes, *, now: float) -> Entry | None:
        """What has this tag, if it stands in the map and holds at `now` (unix seconds)."""
        slot = self._slot_of_tag.get(tag)
        held = None if slot is None else self._held(slot)
        return None if held is None or held.expired(now) else held

    def get(self, kind: str, owner: PeerId, key: str = "", *, now: float) -> Record | None:
        """What `owner` says, or None if it has said nothing that still holds at `now`, or is quarantined."""
        held = self._held(slot_of(kind, owner, key))
        return held if isinstance(held, Record) and not held.expired(now) else None

    def items(self, kind: str, *, now: float) -> list[Record]:
        """All records of a kind that hold at `now`, in the order of owners and keys."""
        found = (entry for entry in self._living(now) if isinstance(entry, Record) and entry.kind == kind)
        return sorted(found, key=lambda record: (record.owner, record.key))

    def decisions(self) -> list[Record]:
        """All decisions that stand, expired or not."""
        return [one for some in self._decisions.values() for one in some.values()]

    def seq_of(self, kind: str, owner: PeerId, key: str = "") -> int:
        """The highest seq seen, expired or not; 0 if none. The owner's next record takes one more."""
        held = self._held(slot_of(kind, owner, key))
        return held.seq if isinstance(held, Record) else 0

    def evidence_against(self, owner: PeerId) -> Evidence | None:
        """The proof that `owner` said two things, if there is one."""
        return self._evidence.get(owner)

    def quarantined(self) -> frozenset[PeerId]:
        """Those who were proven to say two things: nothing that they say stands here any more."""
        return frozenset(self._evidence)

    def changed_since(self, change: int, *, now: float) -> list[Entry]:
        """What came after the map's `changes` had that value and still holds, newest first."""
        found, now_ms = [], now * 1000
        for number, entry in reversed(self._by_slot.values()):
            if number <= change:
                break
            if (
                entry.expires_ms > now_ms
            ):  # not by a call: this is done for every record of the last seconds, each second
                found.append(entry)
        return found

    def num_buckets(self) -> int:
        """Into how many buckets a map of this size is best divided."""
        wanted = 1 << (len(self) // _RECORDS_PER_BUCKET).bit_length()
        return max(MIN_BUCKETS, min(MAX_BUCKETS, wanted))

    def bucket_hashes(self, num_buckets: int) -> bytes:
        """8 bytes for each of so many buckets (a power of two, 256 to 4096): equal in two maps where the same stands.

        What had expired at the last `prune` does not count, what has since then does.
        """
        width = MAX_BUCKETS // num_buckets
        sums = (sum(self._sums[start : start + width]) & _WORD for start in range(0, MAX_BUCKETS, width))
        return b"".join(one.to_bytes(BUCKET_HASH_BYTES) for one in sums)

    def in_buckets(self, buckets: frozenset[int], num_buckets: int, *, now: float) -> dict[int, list[Entry]]:
        """What holds at `now` in some of so many buckets, each bucket in the slots' order, the buckets in theirs."""
        found: dict[int, list[Entry]] = {index: [] for index in sorted(buckets)}
        shift = 16 - (num_buckets.bit_length() - 1)
        for slot, (_, entry) in self._by_slot.items():
            into = found.get((slot[0] << 8 | slot[1]) >> shift)
            if into is not None and not entry.expired(now):
                into.append(entry)
        for entries in found.values():
            entries.sort(key=lambda entry: entry.slot)
        return found

    def prune(self, *, now: float) -> None:
        """Forget what expired longer ago than a record of its kind can last; what has expired leaves the bucket hashes.

        By then every earlier record of the same slot has expired as well, so none can come back to readers. Decisions
        go as soon as they have expired: they are as if never said.
        """
        self._past_before, self._past = self._past, set()
        for slot, (_, entry) in list(self._by_slot.items()):
            if isinstance(entry, Evidence):
                continue
            lasts_s = 0.0 if isinstance(entry.body, DecisionBody) else KINDS[entry.kind].max_lifetime_s
            if now > entry.expires_ms / 1000 + lasts_s + MAX_AHEAD_S:
                self._drop(slot)
            elif entry.expired(now) != (slot in self._hidden):  # expired since then, or the clock was set back
                self._hide(entry) if entry.expired(now) else self._show(entry)

    def _held(self, slot: bytes) -> Entry | None:
        held = self._by_slot.get(slot)
        return None if held is None else held[1]

    def _living(self, now: float) -> Iterator[Entry]:
        return (entry for _, entry in self._by_slot.values() if not entry.expired(now))

    def _stands(self, entry: Entry) -> bool:
        """Whether an entry is above all that is held in its place."""
        if entry.owner in self._evidence:
            return False
        if isinstance(entry, Evidence):
            return len(self._evidence) < self._max_evidence
        held = self._held(entry.slot)
        if isinstance(held, Record):
            return _rank(entry) > _rank(held)
        if isinstance(entry.body, DecisionBody):
            least = self._least_if_full(entry)
            return least is None or _rank(entry) > _rank(least)
        return entry.owner in self._slots_of or len(self._slots_of) < self._max_owners

    def _drop(self, slot: bytes) -> None:
        number_and_entry = self._by_slot.pop(slot, None)
        if number_and_entry is None:
            return
        entry = number_and_entry[1]
        if slot in self._hidden:
            self._hidden.discard(slot)
        else:
            self._count(entry, -1)
        del self._slot_of_tag[entry.tag]
        self._pass(entry.tag)
        if isinstance(entry, Record) and isinstance(entry.body, DecisionBody):
            del self._alike(entry)[slot]
            return
        self._slots_of[entry.owner] -= 1
        if not self._slots_of[entry.owner]:
            del self._slots_of[entry.owner]

    def _alike(self, decision: Record) -> dict[bytes, Record]:
        """The decisions with which it shares its room, by their slots."""
        assert isinstance(decision.body, DecisionBody)
        return self._decisions[decision.body.delegation is not None]

    def _least_if_full(self, decision: Record) -> Record | None:
        """Which of those goes if this one comes; None while there is room."""
        assert isinstance(decision.body, DecisionBody)
        alike = self._alike(decision)
        full = len(alike) >= self._max_decisions[decision.body.delegation is not None]
        return min(alike.values(), key=_rank) if full and alike else None

    def _make_room(self, decision: Record) -> None:
        least = self._least_if_full(decision)
        if least is not None:
            self._drop(least.slot)

    def _pass(self, tag: bytes) -> None:
        if tag not in self._slot_of_tag and len(self._past) < _MAX_PAST:
            self._past.add(tag)

    def _hide(self, entry: Entry) -> None:
        self._hidden.add(entry.slot)
        self._count(entry, -1)

    def _show(self, entry: Entry) -> None:
        self._hidden.discard(entry.slot)
        self._count(entry, 1)

    def _count(self, entry: Entry, sign: int) -> None:
        # a sum is kept up to date at little cost, and makes those of coarser buckets; who makes two of his own tags
        # collide in it hides nothing but what he says himself
        leaf = (entry.slot[0] << 8 | entry.slot[1]) >> _LEAF_SHIFT
        self._sums[leaf] = (self._sums[leaf] + sign * int.from_bytes(entry.tag[:8])) & _WORD


def _rank(record: Record) -> tuple[int, bytes]:
    return record.seq, record.hash
