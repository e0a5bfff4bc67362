"""Which chunk is asked of which donor, as a machine: no network, no clock.

    add_donor            it may be asked now                        -> Request
    arrived              one chunk less is missing                  -> Request what the donor has room for; Done
    failed WRONG_HASH    the donor lies: dropped for good           -> Cancel its other requests, ask others
    failed GONE          it lacks this one chunk, and is asked for others
    failed BROKEN        it may be asked again, until it broke BROKEN_TRIES times in a row; then it is lost
    donor_lost           gone, until it is added again              -> Cancel its requests, ask others

A chunk is asked of one donor at a time. A report about a request that is not out is ignored, so that each chunk
arrives exactly once. When nothing is out and nobody is left to ask, the machine is Stuck: all that could be had is
here; a new donor sets it going again.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from dugnad.dht.identity import PeerId

BROKEN_TRIES = 3
"""How many times in a row a donor may break off before it counts as lost."""


class Failure(Enum):
    """How a request failed."""

    WRONG_HASH = "wrong hash"
    GONE = "gone"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Request:
    """Ask `donor` for the chunk `digest` of `size` bytes, and say `arrived` or `failed`."""

    donor: PeerId
    digest: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """The request for `digest` is no longer out: its donor is dropped."""

    donor: PeerId
    digest: bytes


@dataclass(frozen=True, slots=True)
class Done:
    """Every chunk has arrived; said once."""


@dataclass(frozen=True, slots=True)
class Stuck:
    """Chunks are missing, nothing is out, and no donor is left that could have them."""

    reason: str


Effect = Request | Cancel | Done | Stuck


@dataclass(slots=True)
class _Donor:
    peer: PeerId
    position: int
    out: dict[bytes, None] = field(default_factory=dict)
    """Chunks that it is asked for now, in the order of asking."""
    lacks: set[bytes] = field(default_factory=set)
    broken: int = 0
    """How often it broke off since its last chunk arrived."""

    def rank(self) -> tuple[int, int, int]:
        """Least-loaded first, then the most reliable, then who came first."""
        return len(self.out), self.broken, self.position


class Fetcher:
    """Gets the chunks `wanted`, {digest: bytes}, from donors, at most `per_donor` at a time from each."""

    def __init__(self, wanted: Mapping[bytes, int], *, per_donor: int = 2) -> None:
        self._sizes = dict(wanted)
        self._missing = dict.fromkeys(wanted)
        self._waiting = dict.fromkeys(wanted)
        """Missing and asked of nobody."""
        self._per_donor = per_donor
        self._donors: dict[PeerId, _Donor] = {}
        self._liars: set[PeerId] = set()
        self._seen = 0

    @property
    def missing(self) -> frozenset[bytes]:
        """Digests of the chunks that have not arrived."""
        return frozenset(self._missing)

    @property
    def done(self) -> bool:
        """Whether every chunk has arrived."""
        return not self._missing

    def add_donor(self, peer: PeerId) -> list[Effect]:
        """`peer` may have any of the chunks. No news about a liar, or a donor that is known."""
        if peer in self._liars or peer in self._donors:
            return []
        self._donors[peer] = _Donor(peer, self._seen)
        self._seen += 1
        return self._go_on()

    def donor_lost(self, peer: PeerId) -> list[Effect]:
        """`peer` can't be asked any more, until it is added again."""
        if peer not in self._donors:
            return []
        return [*self._drop(peer), *self._go_on()]

    def arrived(self, digest: bytes, peer: PeerId) -> list[Effect]:
        """The chunk that `peer` was asked for is here, and its bytes are right."""
        donor = self._answered(digest, peer)
        if donor is None:
            return []
        donor.broken = 0
        del self._missing[digest]
        return [Done()] if self.done else self._go_on()

    def failed(self, digest: bytes, peer: PeerId, reason: Failure) -> list[Effect]:
        """The chunk that `peer` was asked for did not come."""
        donor = self._answered(digest, peer)
        if donor is None:
            return []
        self._waiting[digest] = None
        cancelled: Iterable[Effect] = ()
        match reason:
            case Failure.GONE:
                donor.lacks.add(digest)
            case Failure.WRONG_HASH:
                self._liars.add(peer)
                cancelled = self._drop(peer)
            case Failure.BROKEN:
                donor.broken += 1
                if donor.broken == BROKEN_TRIES:
                    cancelled = self._drop(peer)
        return [*cancelled, *self._go_on()]

    def _answered(self, digest: bytes, peer: PeerId) -> _Donor | None:
        """The donor of a request that was out until now; None if there was no such request."""
        donor = self._donors.get(peer)
        if donor is None or digest not in donor.out:
            return None
        del donor.out[digest]
        return donor

    def _drop(self, peer: PeerId) -> list[Effect]:
        donor = self._donors.pop(peer)
        self._waiting.update(donor.out)
        return [Cancel(peer, digest) for digest in donor.out]

    def _go_on(self) -> list[Effect]:
        """Ask for what can be asked, in the order wanted; whatever failed comes last."""
        requests: list[Effect] = []
        for digest in list(self._waiting):
            free = [donor for donor in self._donors.values() if len(donor.out) < self._per_donor]
            if not free:
                break
            able = [donor for donor in free if digest not in donor.lacks]
            if able:
                requests.append(self._ask(min(able, key=_Donor.rank), digest))
        return requests or self._stuck()

    def _ask(self, donor: _Donor, digest: bytes) -> Request:
        del self._waiting[digest]
        donor.out[digest] = None
        return Request(donor.peer, digest, self._sizes[digest])

    def _stuck(self) -> list[Effect]:
        if not self._missing or any(donor.out for donor in self._donors.values()):
            return []
        first = next(iter(self._missing)).hex()[:16]
        who = f"none of {len(self._donors)} donors has it" if self._donors else "no donor is left"
        return [Stuck(f"{len(self._missing)} of {len(self._sizes)} chunks are missing, {first} the first: {who}")]
