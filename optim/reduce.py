"""One member's part in the all-reduce of one round, as a machine over part ids: no tensors, no network.

    contribute   own parts are encoded        -> Upload each owner its parts            (again after a failure)
    received     others' parts, checked       -> Holds, once all of ours of one peer are here
    freeze       the one set that counts      -> Fold each of our parts from exactly that set
    folded       our averages are encoded     -> Deliver the same bytes to everyone     (again after a failure)
    plan         owners changed (a new view)  -> upload only what the new owners lack; what is held stays held
                                              -> Drop what can no longer count: of each peer, all but its newest vector

Within a view nothing that is held is dropped, since the leader may have frozen it; of one peer two vectors are held at
most (`takes`), the second being that of a seat that changed. Contributors keep their bytes until the round is
committed, so that any new owner can ask for them.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dugnad.dht.identity import PeerId

RETRY_S = 1.0
"""How long after a failure an upload or a delivery is tried again, and how often a Holds is said again."""
FEW_VECTORS = 64
"""With more of them, what is held is not said of each at once, and all of it is said again less often."""


@dataclass(frozen=True, slots=True)
class Upload:
    """Send `parts` of our own contribution `root` to their `owner`, and say `uploaded` or `upload_failed`."""

    owner: PeerId
    root: bytes
    parts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Holds:
    """Tell the leader that all our parts of these vectors, (contributor, root) each, are here."""

    vectors: tuple[tuple[PeerId, bytes], ...]


@dataclass(frozen=True, slots=True)
class Weighed:
    """A contribution in the frozen set: its fold weight is `tokens`."""

    peer: PeerId
    root: bytes
    tokens: int


@dataclass(frozen=True, slots=True)
class Fold:
    """Average `parts` over exactly `entries`, in that order, encode each once, and say `folded`."""

    parts: tuple[int, ...]
    entries: tuple[Weighed, ...]


@dataclass(frozen=True, slots=True)
class Deliver:
    """Send our averages, {part: digest}, to `to`, and say `delivered` or `deliver_failed`."""

    to: PeerId
    parts: Mapping[int, bytes]


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget the bytes of that vector of `contributor`."""

    contributor: PeerId
    root: bytes


Effect = Upload | Holds | Fold | Deliver | Drop

MAX_VECTORS = 2
"""How many vectors of one peer are held at most."""


class Reducer:
    """The all-reduce of one round as `me` sees it; parts are numbered from 0."""

    def __init__(self, me: PeerId) -> None:
        self._me = me
        self._root: bytes | None = None
        self._owners: tuple[PeerId, ...] = ()
        self._parts_of: dict[PeerId, tuple[int, ...]] = {}
        """The parts of each owner, who stand in peer-id order."""
        self._receivers: tuple[PeerId, ...] = ()
        self._sent: dict[PeerId, set[int]] = defaultdict(set)
        """Own parts that an owner has acknowledged."""
        self._uploading: dict[PeerId, tuple[int, ...]] = {}
        self._held: dict[PeerId, dict[bytes, set[int]]] = defaultdict(dict)
        """contributor -> root -> parts that are here; roots in the order in which they were last added to."""
        self._entries: tuple[Weighed, ...] | None = None
        self._folding = False
        self._results: dict[int, bytes] = {}
        self._undelivered: set[PeerId] = set()
        self._upload_at: dict[PeerId, float] = {}
        self._deliver_at: dict[PeerId, float] = {}
        """When what failed is tried again: apart, since to one peer one may rest while the other is under way."""
        self._holds_at = float("inf")
        self._unsaid: dict[tuple[PeerId, bytes], None] = {}
        """What we hold whole and have not said yet."""
        self._all_at = 0.0
        """When all that we hold is to be said again."""

    @property
    def contributed(self) -> bool:
        """Whether our own work is encoded and promised."""
        return self._root is not None

    @property
    def frozen(self) -> bool:
        """Whether the set of this view is known."""
        return self._entries is not None

    @property
    def own_parts(self) -> tuple[int, ...]:
        """The parts that we reduce."""
        return self._parts_of.get(self._me, ())

    def plan(self, owners: tuple[PeerId, ...], receivers: tuple[PeerId, ...], *, now: float) -> list[Effect]:
        """A view begins: `owners[k]` reduces part k, and `receivers` get our averages."""
        for newcomer in set(owners) - set(self._owners):
            self._sent[newcomer].clear()  # it may have restarted, and lost what it once acknowledged
        self._owners, self._receivers = owners, tuple(peer for peer in receivers if peer != self._me)
        parts_of: dict[PeerId, list[int]] = {owner: [] for owner in sorted(set(owners))}
        for part, owner in enumerate(owners):
            parts_of[owner].append(part)
        self._parts_of = {owner: tuple(parts) for owner, parts in parts_of.items()}
        self._entries, self._folding = None, False
        self._results = {}  # a new one: deliveries under way still read the old
        self._undelivered.clear()
        self._uploading.clear()
        self._upload_at.clear()
        self._deliver_at.clear()
        return [*self._drop(), *self._upload(self._parts_of, now), *self._holds(now, everything=True)]

    def doubt(self) -> None:
        """Owners may have lost meanwhile what they acknowledged: `plan`, which follows, offers all of it again."""
        self._sent.clear()

    def contribute(self, root: bytes, *, now: float) -> list[Effect]:
        """Our own parts are encoded; their digests hash to `root`."""
        self._root = root
        self._held[self._me][root] = set(range(len(self._owners)))
        return [*self._upload(self._parts_of, now), *self._holds(now, everything=True)]

    def restart(self) -> None:
        """Our own work is void, as the `plan` that follows says; what others sent us stays held."""
        self._root = None
        self._sent.clear()

    def uploaded(self, owner: PeerId, root: bytes, parts: tuple[int, ...], *, now: float) -> list[Effect]:
        """`owner` has acknowledged `parts` of our vector `root`."""
        if root != self._root:
            return []  # of work that is void
        self._sent[owner].update(parts)
        if self._uploading.get(owner) == parts:
            del self._uploading[owner]
        return self._upload((owner,), now)

    def upload_failed(self, owner: PeerId, root: bytes, parts: tuple[int, ...], *, now: float) -> list[Effect]:
        """The upload of `parts` to `owner` broke; it is tried again while the plan says so."""
        if root == self._root and self._uploading.get(owner) == parts:
            del self._uploading[owner]
            self._upload_at[owner] = now + RETRY_S
        return []

    def takes(self, contributor: PeerId, root: bytes) -> bool:
        """Whether there is room for this vector of `contributor`."""
        held = self._held.get(contributor, ())
        return root in held or len(held) < MAX_VECTORS

    def received(self, contributor: PeerId, root: bytes, parts: tuple[int, ...], *, now: float) -> list[Effect]:
        """`parts` of `contributor` are here, checked against the digests that hash to `root`."""
        before = self._held[contributor].pop(root, set())
        self._held[contributor][root] = held = before | set(parts)
        if not self._holds_all(held) or self._holds_all(before) or self.frozen:
            return self._fold()
        if len(self._held) > FEW_VECTORS:
            self._unsaid[contributor, root] = None
            self._holds_at = min(self._holds_at, now + RETRY_S)
            return self._fold()
        return [Holds(((contributor, root),)), *self._fold()]

    def freeze(self, entries: tuple[Weighed, ...], *, now: float) -> list[Effect]:
        """The leader froze the set that every part of this view is folded from."""
        if self._entries is None:
            self._entries = entries
            self._holds_at = float("inf")
        return self._fold()

    def folded(self, results: Mapping[int, bytes], *, now: float) -> list[Effect]:
        """Our parts are averaged and encoded: {part: digest}."""
        if not self._folding or set(results) != set(self.own_parts):
            return []  # of a view that is over
        self._folding = False
        self._results = dict(results)
        self._undelivered = set(self._receivers)
        return [Deliver(peer, self._results) for peer in self._receivers]

    def delivered(self, to: PeerId) -> None:
        """`to` has acknowledged our averages."""
        self._undelivered.discard(to)

    def deliver_failed(self, to: PeerId, *, now: float) -> None:
        """The delivery to `to` broke; it is tried again until the round is over."""
        if to in self._undelivered:
            self._deliver_at[to] = now + RETRY_S

    def tick(self, *, now: float) -> list[Effect]:
        """Try again what failed, and repeat what may have been lost."""
        undelivered = [peer for peer in _take_due(self._deliver_at, now) if peer in self._undelivered]
        return [
            *(Deliver(peer, self._results) for peer in undelivered),
            *self._upload(_take_due(self._upload_at, now), now),
            *(self._holds(now) if now >= self._holds_at else []),
        ]

    def wake_at(self) -> float:
        """When `tick` has something to do."""
        return min(self._holds_at, *self._upload_at.values(), *self._deliver_at.values(), float("inf"))

    def _upload(self, owners: Iterable[PeerId], now: float) -> list[Effect]:
        """Upload to those of `owners` what they lack."""
        if self._root is None:
            return []
        out: list[Effect] = []
        for owner in owners:
            if owner == self._me or owner in self._uploading or now < self._upload_at.get(owner, 0.0):
                continue
            sent = self._sent[owner]
            parts = tuple(part for part in self._parts_of.get(owner, ()) if part not in sent)
            if parts:
                self._uploading[owner] = parts
                out.append(Upload(owner, self._root, parts))
        return out

    def _drop(self) -> list[Effect]:
        """Forget vectors that can no longer count: ours that are void, and of each other peer all but the newest."""
        gone: list[Effect] = []
        for peer, roots in self._held.items():
            kept = self._root if peer == self._me else next(reversed(roots), None)
            for root in [root for root in roots if root != kept]:
                del roots[root]
                gone.append(Drop(peer, root))
        return gone

    def _holds_all(self, held: set[int]) -> bool:
        return bool(self.own_parts) and held.issuperset(self.own_parts)

    def _holds(self, now: float, *, everything: bool = False) -> list[Effect]:
        """Say what we hold: what is new, and now and then all of it, since words may be lost."""
        if self.frozen or not self.own_parts:
            self._holds_at = float("inf")
            return []
        self._holds_at = now + RETRY_S
        if everything or now >= self._all_at:
            self._all_at = now + RETRY_S * max(1.0, len(self._held) / FEW_VECTORS * 4)
            said = [
                (peer, root)
                for peer, roots in sorted(self._held.items())
                for root, held in sorted(roots.items())
                if self._holds_all(held)
            ]
        else:
            said = list(self._unsaid)
        self._unsaid.clear()
        return [Holds(tuple(said))] if said else []

    def _fold(self) -> list[Effect]:
        if self._entries is None or self._folding or self._results or not self.own_parts:
            return []
        if not all(self._holds_all(self._held[entry.peer].get(entry.root, set())) for entry in self._entries):
            return []
        self._folding = True
        return [Fold(self.own_parts, self._entries)]


def _take_due(retries: dict[PeerId, float], now: float) -> list[PeerId]:
    """Whose time has come, in peer-id order; they are taken off `retries`."""
    due = sorted(peer for peer, at in retries.items() if now >= at)
    for peer in due:
        del retries[peer]
    return due
