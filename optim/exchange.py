"""The tensors that `reduce.py` speaks of: one member's encoded parts, and those that others sent it to fold.

A contribution is encoded once, part by part; its root is the hash of the parts' digests. Every upload carries all the
digests, so an owner checks the bytes it gets against what the contributor promised to everyone. What is held, and for
how long, `reduce.Reducer` decides.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

import msgspec
from blake3 import blake3
from msgspec import Meta, Struct

from dugnad.dht import bulk
from dugnad.dht.identity import PeerId
from dugnad.dht.transport import Transport, TransportError
from dugnad.optim.codec import CodecError, Int8Codec, NonFinite
from dugnad.optim.layout import Layout, Vector
from dugnad.optim.reduce import Weighed

CHANNEL = "dugnad/parts/1"
HEADER_BYTES = 512 * 1024
SILENCE_S = 5.0
"""How long an upload may stand still."""
_HELD = "these parts are here"
"""Why an upload of what was uploaded before is refused, which its sender takes for an acknowledgement."""
log = logging.getLogger(__name__)

Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Expects = Callable[[PeerId, int, bytes], bool]
"""(sender, round, root): whether parts of that vector are wanted."""
Received = Callable[[PeerId, bytes, tuple[int, ...]], None]
"""(contributor, root, parts): checked and held."""


class _Header(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    round: int
    digests: Annotated[tuple[Digest, ...], Meta(max_length=8192)]
    parts: Annotated[tuple[int, ...], Meta(min_length=1, max_length=8192)]


_header = msgspec.msgpack.Decoder(_Header)


def root_of(digests: Iterable[bytes]) -> bytes:
    """The root that promises these part digests, in part order."""
    return blake3(b"dugnad/parts/1" + b"".join(digests)).digest()


class Exchange:
    """The part bytes of one round at a time; `expects` says what is wanted, `received` hears what has come."""

    def __init__(self, transport: Transport, layout: Layout, *, expects: Expects, received: Received) -> None:
        self.layout = layout
        self.part_bytes = tuple(Int8Codec(layout.block_elements).part_bytes(len(part)) for part in layout.parts)
        self._transport = transport
        self._codec = Int8Codec(layout.block_elements)
        self._expects = expects
        self._received = received
        self._round = 0
        self._promised: dict[bytes, tuple[bytes, ...]] = {}
        """Root -> digests, of our own vectors."""
        self._held: dict[tuple[PeerId, bytes], dict[int, memoryview]] = {}

    async def serve(self) -> None:
        """Take uploads from now on."""
        total_cap = sum(self.part_bytes)
        await bulk.serve_push(
            self._transport, CHANNEL, self._accept, self._done, header_cap=HEADER_BYTES, total_cap=total_cap
        )

    def begin(self, round_: int) -> None:
        """A round begins: forget the bytes of the one before. Said again of the same round, it changes nothing."""
        if round_ != self._round:
            self._round = round_
            self._promised.clear()
            self._held.clear()

    def drop(self, contributor: PeerId, root: bytes) -> None:
        """Forget a vector, if it is here."""
        self._held.pop((contributor, root), None)
        if contributor == self._transport.peer_id:
            self._promised.pop(root, None)

    async def contribute(self, pseudo_gradient: Vector) -> bytes:
        """Encode our work, float32 (layout.total_elements,), and return its root. Raises NonFinite."""
        round_ = self._round
        payloads = await asyncio.to_thread(self._encode, pseudo_gradient)
        digests = tuple(blake3(payload).digest() for payload in payloads)
        root = root_of(digests)
        if round_ == self._round:  # else it is over meanwhile, and nobody wants them
            self._promised[root] = digests
            self._held[self._transport.peer_id, root] = dict(enumerate(payloads))
        return root

    async def upload(self, owner: PeerId, root: bytes, parts: Sequence[int]) -> None:
        """Send `parts` of our vector `root` to their owner. Raises TransportError, also if it was dropped."""
        if root not in self._promised:
            raise TransportError(f"our work {root.hex()[:12]} is no longer wanted")
        payloads = self._held[self._transport.peer_id, root]
        header = msgspec.msgpack.encode(_Header(self._round, self._promised[root], tuple(parts)))
        chosen = [payloads[part] for part in parts]
        try:
            await bulk.push(self._transport, owner, CHANNEL, header, chosen, kind="upload", timeout_s=SILENCE_S)
        except bulk.PushRefused as refused:
            if refused.reason != _HELD:
                raise

    async def fold(self, parts: Sequence[int], entries: Sequence[Weighed]) -> dict[int, memoryview]:
        """The encoded average of `entries`, in that order, for each of `parts`; empty if we lack some."""
        sources = [self._held.get((entry.peer, entry.root), {}) for entry in entries]
        if not all(held.keys() >= set(parts) for held in sources):
            return {}  # a view that is over: its bytes are forgotten
        weights = [entry.tokens for entry in entries]
        return await asyncio.to_thread(self._fold, parts, sources, weights)

    def _encode(self, vector: Vector) -> list[memoryview]:
        payloads = [self._codec.encode(vector[part.start : part.stop]) for part in self.layout.parts]
        try:
            for payload in payloads:
                self._codec.check(payload)
        except CodecError as error:  # the owners would refuse it
            raise NonFinite(str(error)) from error
        return payloads

    def _fold(
        self, parts: Sequence[int], sources: Sequence[dict[int, memoryview]], weights: list[int]
    ) -> dict[int, memoryview]:
        sizes = {part: len(self.layout.parts[part]) for part in parts}
        return {part: self._codec.fold([held[part] for held in sources], weights, sizes[part]) for part in parts}

    def _accept(self, sender: PeerId, raw: bytes, sizes: tuple[int, ...]) -> str | None:
        try:
            header = _header.decode(raw)
        except msgspec.DecodeError as error:
            return f"malformed header: {error}"
        num_parts = len(self.part_bytes)
        if len(header.digests) != num_parts or not all(0 <= part < num_parts for part in header.parts):
            return f"the vector has {num_parts} parts"
        if sizes != tuple(self.part_bytes[part] for part in header.parts):
            return "a part has another size than the layout gives it"
        if not self._wants(sender, header):
            return f"not wanted in round {header.round} as it stands here"
        held = self._held.get((sender, root_of(header.digests)), {})
        return _HELD if held.keys() >= set(header.parts) else None

    def _wants(self, sender: PeerId, header: _Header) -> bool:
        return header.round == self._round and self._expects(sender, header.round, root_of(header.digests))

    async def _done(self, sender: PeerId, raw: bytes, buffers: list[memoryview]) -> bytes:
        header = _header.decode(raw)
        why = await asyncio.to_thread(self._fault, header, buffers)
        if why is not None:
            log.warning("parts from %s refused: %s", sender, why)
            raise bulk.PushRefused(sender, why)
        if not self._wants(sender, header):  # any more: it took a while to come
            raise bulk.PushRefused(sender, f"round {header.round} has moved on")
        root = root_of(header.digests)
        self._held.setdefault((sender, root), {}).update(zip(header.parts, buffers, strict=True))
        self._received(sender, root, header.parts)
        return b""

    def _fault(self, header: _Header, buffers: list[memoryview]) -> str | None:
        for part, buffer in zip(header.parts, buffers, strict=True):
            if blake3(buffer).digest() != header.digests[part]:
                return f"part {part} is not what its digest promised"
            try:
                self._codec.check(buffer)
            except CodecError as error:
                return f"part {part}: {error}"
        return None
