"""The averages on this disk: those that owners push, are fetched, or are folded here, and how long each is kept.

What is committed is kept for KEPT_ROUNDS rounds. What came of an attempt stays until its round is in place without it:
it may have been voted for.
"""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from typing import Annotated

import msgspec
from blake3 import blake3
from msgspec import Meta, Struct

from dugnad.coordinator.chain import Chain
from dugnad.coordinator.messages import MAX_PARTS, Commit, Digest
from dugnad.coordinator.repair import Fetch
from dugnad.coordinator.replica import REPLAY_ROUNDS
from dugnad.coordinator.rounds import Leader
from dugnad.coordinator.state import Numerics
from dugnad.dht import bulk
from dugnad.dht.blobs import Blobs
from dugnad.dht.identity import PeerId, nickname
from dugnad.dht.transport import TransportError

log = logging.getLogger(__name__)

RESULTS_CHANNEL = "dugnad/results/1"
HEADER_BYTES = 512 * 1024
"""How long a header may be."""
KEPT_ROUNDS = REPLAY_ROUNDS
"""For how many rounds their committed bytes are kept for those who come late."""


class ResultsHeader(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What stands before the bytes of encoded averages: of which attempt, which parts, with which digests."""

    round: int
    view: int
    attempt: int
    parts: Annotated[tuple[tuple[int, Digest], ...], Meta(min_length=1, max_length=MAX_PARTS)]

    @property
    def order(self) -> tuple[int, int, int]:
        """As `Plan.order`."""
        return (self.round, self.view, self.attempt)


_results_header = msgspec.msgpack.Decoder(ResultsHeader)


class Averages:
    """What `blobs` holds for the run of `chain`, of which `leader` says what is expected and what is agreed."""

    def __init__(self, blobs: Blobs, chain: Chain, leader: Leader, numerics: Numerics) -> None:
        self._blobs = blobs
        self._chain = chain
        self._leader = leader
        self._numerics = numerics
        self._part_bytes = tuple(numerics.part_bytes)
        self._attempted: dict[bytes, int] = {}
        """Blobs of attempts at rounds that are not committed yet -> the round."""
        self._came: tuple[tuple[int, int, int], dict[int, bytes]] = ((0, 0, 0), {})
        """The newest attempt of which averages were pushed, and the digest of each part that has come in it."""
        self._fetching: set[bytes] = set()
        self._forgotten_round = 0
        """Up to which round the parts of old commits are deleted."""

    def take_up(self, here: Iterable[bytes]) -> None:
        """Go on with what is on the disk."""
        head = self._chain.head_round()
        # what belongs to no round yet may have been voted for: it goes when the next round is in place without it
        self._attempted = dict.fromkeys(set(here) - self._kept_parts(head), head + 1)
        self._forgotten_round = max(0, head - KEPT_ROUNDS)

    # -- what comes

    def refuses(self, sender: PeerId, raw: bytes, sizes: tuple[int, ...]) -> str | None:
        """Why the averages that a header announces are not wanted, if they are not."""
        try:
            header = _results_header.decode(raw)
        except msgspec.DecodeError as error:
            return f"malformed header: {error}"
        if not all(0 <= part < len(self._part_bytes) for part, _ in header.parts):
            return f"the vector has {len(self._part_bytes)} parts"
        if sizes != tuple(self._part_bytes[part] for part, _ in header.parts):
            return "a part has another size than the layout gives it"
        if not self._leader.expects(sender, header.order, [part for part, _ in header.parts]):
            return f"round {header.round} is not under way here"
        order, came = self._came
        if order == header.order and any(came.get(part, digest) != digest for part, digest in header.parts):
            return "other averages came for this part"  # else one owner could fill the disk
        return None

    async def take(self, sender: PeerId, raw: bytes, buffers: Sequence[memoryview]) -> ResultsHeader:
        """Check and store averages that `refuses` let pass. Raises PushRefused, and OSError of our own disk."""
        header = _results_header.decode(raw)
        why = await asyncio.to_thread(self._fault, header, buffers)
        if why is not None:
            log.warning("averages of %s refused: %s", nickname(sender), why)
            raise bulk.PushRefused(sender, why)
        await self.store(header.round, buffers)
        if self._came[0] != header.order:
            self._came = (header.order, {})
        self._came[1].update(header.parts)
        return header

    def _fault(self, header: ResultsHeader, buffers: Sequence[memoryview]) -> str | None:
        for (part, digest), buffer in zip(header.parts, buffers, strict=True):
            if blake3(buffer).digest() != digest:
                return f"part {part} is not what its digest promised"
            try:
                self._numerics.check_part(buffer)
            except ValueError as error:
                return f"part {part}: {error}"
        return None

    async def store(self, round_: int, buffers: Sequence[bytes | bytearray | memoryview]) -> tuple[bytes, ...]:
        """Store averages of an attempt at `round_` durably, and return their digests."""
        digests = await asyncio.to_thread(lambda: tuple(self._blobs.put(buffer) for buffer in buffers))
        self._attempted.update(dict.fromkeys(digests, round_))
        return digests

    async def fetch(self, wanted: Sequence[tuple[int, bytes]], fetch: Fetch) -> tuple[bytes, ...]:
        """Get those of `wanted`, (part, digest), that are not here; which of them are then."""

        def store(_: bytes, data: memoryview) -> None:
            self._blobs.put(data)

        # what is on its way already is not asked for again: on a slow line the two would only slow each other down
        sizes = {digest: self._part_bytes[part] for part, digest in wanted if digest not in self._fetching}
        missing = {digest: size for digest, size in sizes.items() if not self._blobs.has(digest)}
        self._fetching |= missing.keys()
        self._attempted.update(dict.fromkeys(missing, self._leader.follower.ledger.head.round + 1))
        try:
            if missing:
                await fetch(missing, store)
        except TransportError as error:
            log.info("%d parts could not be fetched yet: %s", len(missing), error)
        finally:
            self._fetching -= missing.keys()
        return tuple(digest for digest in sizes if self._blobs.has(digest))

    # -- what goes

    def forget(self, applied: Commit) -> None:
        """Delete what failed attempts at this round left, and the parts of the round that is too old now."""
        number = applied.block.round
        stale = {digest for digest, round_ in self._attempted.items() if round_ <= number} - set(applied.block.parts)
        self._attempted = {digest: round_ for digest, round_ in self._attempted.items() if round_ > number}
        self._leader.follower.forget(stale)
        if number - KEPT_ROUNDS > self._forgotten_round:
            old = number - KEPT_ROUNDS
            for commit in self._chain.commits(after_round=self._forgotten_round, limit=old - self._forgotten_round):
                stale.update(commit.block.parts)
            self._forgotten_round = old
        if stale:  # two rounds may have had the same averages
            stale -= self._kept_parts(number)
        for digest in stale:
            self._blobs.delete(digest)

    def _kept_parts(self, head_round: int) -> set[bytes]:
        commits = self._chain.commits(after_round=max(0, head_round - KEPT_ROUNDS))
        return {digest for commit in commits for digest in commit.block.parts}
