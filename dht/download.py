"""A model on its way here: its chunks come from many peers at once, and lie in a folder until all are there.

Whoever is killed in the middle goes on where it was: what the folder holds is verified, and not fetched again. Chunks
of another model are removed, but for those that both have; what did not change since an older model that is still here
need not come at all.
"""

import asyncio
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from dugnad.dht.blobs import Blobs
from dugnad.dht.bulk import Lookup, fetch_all
from dugnad.dht.identity import PeerId
from dugnad.dht.transport import Transport


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a download is."""

    num_chunks: int
    of_chunks: int
    num_bytes: int
    of_bytes: int
    num_donors: int
    """How many have given something."""

    def __str__(self) -> str:
        done, total = self.num_bytes / 1e6, self.of_bytes / 1e6
        donors = f"{self.num_donors} donor{'s' if self.num_donors != 1 else ''}"
        return f"{done:.1f} of {total:.1f} MB, {self.num_chunks} of {self.of_chunks} chunks, from {donors}"


class Incoming:
    """The chunks that are here already: those in `folder`, which one process owns, and those that `have` gives."""

    def __init__(self, folder: Path, have: Lookup) -> None:
        self._folder = folder
        # not synced: what a power cut damages is seen when it is read, and fetched again
        self._blobs = Blobs(folder, durable=False)
        self._have = have

    def begin(self, wanted: Mapping[bytes, int]) -> dict[bytes, int]:
        """Forget all chunks but `wanted`, {digest: bytes}, and return which of those are missing. Reads the others."""
        for digest in self._blobs.digests() - wanted.keys():
            self._blobs.delete(digest)
        return {digest: size for digest, size in wanted.items() if not self._is_here(digest, size)}

    def keep(self, digest: bytes, data: bytes | memoryview) -> None:
        """Keep a chunk that has come. Raises OSError."""
        assert self._blobs.put(data) == digest, f"other bytes than those of {digest.hex()}"

    def chunk(self, digest: bytes) -> bytes | memoryview | None:
        """The bytes of a chunk, where they are here."""
        data = self._blobs.get(digest)
        return self._have(digest) if data is None else data

    def clear(self) -> None:
        """The model is in use: its chunks need not lie here any more."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _is_here(self, digest: bytes, size: int) -> bool:
        data = self.chunk(digest)
        return data is not None and len(data) == size and blake3(data).digest() == digest


async def download(
    transport: Transport,
    donors: Sequence[PeerId],
    wanted: Mapping[bytes, int],
    incoming: Incoming,
    *,
    timeout_s: float,
    told: Callable[[Progress], None],
) -> None:
    """Get every chunk of `wanted`, {digest: bytes}, that is not here yet, from any of `donors`.

    told: hears how far it is, at first and with each chunk. timeout_s: how long a donor may be silent. Raises
    Unavailable if a chunk can't be had; what has come stays for the next time. Raises OSError, in a group, for a disk
    that takes no more.
    """
    missing = await asyncio.to_thread(incoming.begin, wanted)
    left_chunks, left_bytes, gave = len(missing), sum(missing.values()), set[PeerId]()

    def tell() -> None:
        of_chunks, of_bytes = len(wanted), sum(wanted.values())
        told(Progress(of_chunks - left_chunks, of_chunks, of_bytes - left_bytes, of_bytes, len(gave)))

    def given(donor: PeerId, num_bytes: int) -> None:
        nonlocal left_chunks, left_bytes
        left_chunks, left_bytes = left_chunks - 1, left_bytes - num_bytes
        gave.add(donor)
        tell()

    tell()
    if missing:
        # the largest first, so that nobody is left with a large one when all else is here
        order = dict(sorted(missing.items(), key=lambda chunk: -chunk[1]))
        await fetch_all(
            transport, donors, order, kind="state", timeout_s=timeout_s, on_blob=incoming.keep, on_given=given
        )
