"""Which chunk is asked of which donor, as a machine: no network, no clock.

    add_donors           they may be asked now                      -> Request
    arrived              one chunk less is missing                  -> Cancel its other request; Request what there is
                                                                       room for; Done
    failed WRONG_HASH    the donor lies: dropped for good           -> Cancel its other requests, ask others
    failed GONE          it lacks this one chunk, and is asked for others
    failed BROKEN        it may be asked again, until it broke BROKEN_TRIES times in a row; then it is lost
    donor_lost           gone, until it is added again              -> Cancel its requests, ask others

A chunk is asked of one donor at a time, until the end: when nothing waits that an idle donor could give, it is asked
for a chunk that is late at another. Late is what was overtaken: LATE times as many bytes as it has, asked for after
it, have arrived. The first of the two counts. A report about a request that is not out is ignored, so that each chunk
arrives exactly once. When nothing is out and nobody is left to ask, the machine is Stuck: all that could be had is
here; a new donor sets it going again.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from dugnad.dht.identity import PeerId

BROKEN_TRIES = 3
"""How many times in a row a donor may break off before it counts as lost."""
LATE = 2
"""Among donors of one speed a chunk is often overtaken by one other, which is no reason to pay for it twice."""


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
    """The request for `digest` is no longer out: its donor is dropped, or another one was faster."""

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


@dataclass(slots=True, eq=False)
class _Donor:
    peer: PeerId
    position: int
    out: dict[bytes, int] = field(default_factory=dict)
    """Chunks that it is asked for now, and as the how manieth of all requests, in this order."""
    lacks: set[bytes] = field(default_factory=set)
    broken: int = 0
    """How often it broke off since its last chunk arrived."""

    def rank(self) -> tuple[int, int, int]:
        """Least-loaded first, then the most reliable, then who came first."""
        return len(self.out), self.broken, self.position


@dataclass(slots=True)
class _Out:
    donors: list[_Donor]
    """One, or two of which the second was asked because the first is late."""
    overtaken_bytes: int = 0
    """Of chunks that were asked for after it, and have arrived."""


class Fetcher:
    """Gets the chunks `wanted`, {digest: bytes}, from donors, at most `per_donor` at a time from each."""

    def __init__(self, wanted: Mapping[bytes, int], *, per_donor: int = 2) -> None:
        self._sizes = dict(wanted)
        self._missing = dict.fromkeys(wanted)
        self._waiting = dict.fromkeys(wanted)
        """Missing and asked of nobody."""
        self._out: dict[bytes, _Out] = {}
        """Asked of somebody, in the order of the first request."""
        self._per_donor = per_donor
        self._donors: dict[PeerId, _Donor] = {}
        self._liars: set[PeerId] = set()
        self._seen = 0
        self._asked = 0

    @property
    def missing(self) -> frozenset[bytes]:
        """Digests of the chunks that have not arrived."""
        return frozenset(self._missing)

    @property
    def done(self) -> bool:
        """Whether every chunk has arrived."""
        return not self._missing

    def add_donors(self, *peers: PeerId) -> list[Effect]:
        """`peers` may have any of the chunks, which they share out. No news about a liar, or a donor that is known."""
        new = [peer for peer in peers if peer not in self._liars and peer not in self._donors]
        for peer in new:
            self._donors[peer] = _Donor(peer, self._seen)
            self._seen += 1
        return self._go_on() if new else []

    def donor_lost(self, peer: PeerId) -> list[Effect]:
        """`peer` can't be asked any more, until it is added again."""
        if peer not in self._donors:
            return []
        return [*self._drop(peer), *self._go_on()]

    def arrived(self, digest: bytes, peer: PeerId) -> list[Effect]:
        """The chunk that `peer` was asked for is here, and its bytes are right."""
        donor = self._donors.get(peer)
        if donor is None or digest not in donor.out:
            return []
        number = donor.out[digest]
        donor.broken = 0
        del self._missing[digest]
        slower = [other for other in self._out.pop(digest).donors if other is not donor]
        for other in (donor, *slower):
            del other.out[digest]
        for late, out in self._out.items():
            if out.donors[0].out[late] < number:
                out.overtaken_bytes += self._sizes[digest]
        return [*(Cancel(other.peer, digest) for other in slower), *([Done()] if self.done else self._go_on())]

    def failed(self, digest: bytes, peer: PeerId, reason: Failure) -> list[Effect]:
        """The chunk that `peer` was asked for did not come."""
        donor = self._donors.get(peer)
        if donor is None or digest not in donor.out:
            return []
        self._take_back(donor, digest)
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

    def _take_back(self, donor: _Donor, digest: bytes) -> None:
        """The request is no longer out; its chunk waits to be asked for again, unless another is asked for it too."""
        del donor.out[digest]
        out = self._out[digest]
        if out.donors[0] is donor:
            out.overtaken_bytes = 0  # who is left was asked just now
        out.donors.remove(donor)
        if not out.donors:
            del self._out[digest]
            self._waiting[digest] = None

    def _drop(self, peer: PeerId) -> list[Effect]:
        donor = self._donors.pop(peer)
        digests = list(donor.out)
        for digest in digests:
            self._take_back(donor, digest)
        return [Cancel(peer, digest) for digest in digests]

    def _go_on(self) -> list[Effect]:
        """Ask for what can be asked, in the order wanted, and whatever failed last; then for what is late."""
        requests: list[Effect] = []
        for digest in list(self._waiting):
            free = [donor for donor in self._donors.values() if len(donor.out) < self._per_donor]
            if not free:
                break
            able = [donor for donor in free if digest not in donor.lacks]
            if able:
                del self._waiting[digest]
                requests.append(self._ask(min(able, key=_Donor.rank), digest))
        requests += self._ask_again()
        return requests or self._stuck()

    def _ask_again(self) -> Iterator[Request]:
        """Ask idle donors, who can give nothing that waits, for what is late elsewhere, the oldest first."""
        for digest, out in self._out.items():
            if len(out.donors) > 1 or out.overtaken_bytes < LATE * self._sizes[digest]:
                continue
            idle = [donor for donor in self._donors.values() if not donor.out and digest not in donor.lacks]
            if idle:
                yield self._ask(min(idle, key=_Donor.rank), digest)

    def _ask(self, donor: _Donor, digest: bytes) -> Request:
        self._asked += 1
        donor.out[digest] = self._asked
        self._out.setdefault(digest, _Out([])).donors.append(donor)
        return Request(donor.peer, digest, self._sizes[digest])

    def _stuck(self) -> list[Effect]:
        if not self._missing or self._out:
            return []
        first = next(iter(self._missing)).hex()[:16]
        who = f"none of {len(self._donors)} donors has it" if self._donors else "no donor is left"
        return [Stuck(f"{len(self._missing)} of {len(self._sizes)} chunks are missing, {first} the first: {who}")]
