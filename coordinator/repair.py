"""A damaged checkpoint written anew beside the old one: of what is whole here, and of what other keepers give."""

import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from dugnad.coordinator import checkpoint
from dugnad.coordinator.checkpoint import Checkpoint, CheckpointMeta, round_of
from dugnad.coordinator.damage import Broken, CheckpointError, Damage
from dugnad.coordinator.durable import NewFile, in_thread, remove
from dugnad.coordinator.tensorfile import Chunk, files_of, salvage
from dugnad.coordinator.votes import Signer
from dugnad.dht.bulk import Lookup, OnBlob
from dugnad.dht.manifest import Manifest, parse_manifest
from dugnad.dht.transport import TransportError

Fetch = Callable[[Mapping[bytes, int], OnBlob], Awaitable[None]]
"""Gets blobs, {digest: bytes}, from other keepers, as `dht.bulk.fetch_all` does. Raises TransportError."""


@dataclass(frozen=True, slots=True)
class Known:
    """What a damaged checkpoint has to be."""

    round: int
    meta: CheckpointMeta
    model_manifest_bytes: int | None

    @property
    def model(self) -> bytes:
        """The digest of its model."""
        return bytes.fromhex(self.meta.model_digest)


def known_of(damage: Damage, meta: CheckpointMeta | None, model_manifest_bytes: int | None) -> Known:
    """What its own manifest.json says, or else what its keeper knows. Raises CheckpointError if nobody knows."""
    head = checkpoint.read_head(damage.path)
    if not isinstance(head, Broken):
        return Known(head.round, head.meta, head.model_manifest_bytes)
    if meta is None:
        raise CheckpointError(f"{damage}. Nobody here knows what it is of: put back a copy.", damage)
    return Known(round_of(damage.path), meta, model_manifest_bytes)


async def rebuild(
    damage: Damage, folder: Path, known: Known, fetch: Fetch, *, nearby: Lookup, signer: Signer
) -> Checkpoint:
    """Write the checkpoint into a new `folder`, verify every byte there, and return it.

    What is whole in the old one, or found `nearby`, is not fetched. Raises CheckpointError, OSError, ManifestError, and
    what `fetch` raises; then the folder is the caller's to remove.
    """
    model = await _model(damage, known, fetch, nearby)
    raw = model.encode()
    tensors = _Tensors(damage.path, folder, model)
    try:
        await in_thread(lambda: tensors.begin(nearby))
        if tensors.missing:
            await fetch(tensors.missing, tensors.take)
        if tensors.missing:
            raise CheckpointError(
                f"{damage.path} could not be repaired: {len(tensors.missing)} chunks did not come", damage
            )
        await in_thread(tensors.finish)
    finally:
        tensors.close()
    await in_thread(lambda: checkpoint.write_manifests(folder, known.round, known.meta, raw, signer))
    written = await in_thread(lambda: checkpoint.inspect(folder))
    if isinstance(written, Damage):
        raise CheckpointError(
            f"{damage.path} could not be repaired: what was just written is not what was read again: {written}. "
            "It is as it was, but this disk seems to fail: use another.",
            damage,
        )
    return written


async def _model(damage: Damage, known: Known, fetch: Fetch, nearby: Lookup) -> Manifest:
    """The manifest of the model: of this disk if it is here, or else from others."""

    def here() -> bytes | None:
        model = checkpoint.read_model(damage.path, None)
        raw = model.encode() if isinstance(model, Manifest) else b""
        found = raw if blake3(raw).digest() == known.model else nearby(known.model)
        return None if found is None else bytes(found)

    raw = await in_thread(here)
    if raw is None:
        raw = await _fetch_one(damage, known, fetch)
    return parse_manifest(raw)


async def _fetch_one(damage: Damage, known: Known, fetch: Fetch) -> bytes:
    if known.model_manifest_bytes is None:
        raise CheckpointError(f"{damage}. Nobody here knows how large its model.msgpack was: put back a copy.", damage)
    came: list[bytes] = []
    await fetch({known.model: known.model_manifest_bytes}, lambda _, data: came.append(bytes(data)))
    for data in came:
        if blake3(data).digest() == known.model:
            return data
    raise CheckpointError(f"{damage.path} could not be repaired: the manifest of its model did not come", damage)


class _Tensors:
    """The files of tensors of the checkpoint in `damaged`, written anew in `folder`.

    Chunks are taken by their hash, wherever they come from, and each once. Raises OSError. Blocks on the disk.
    """

    def __init__(self, damaged: Path, folder: Path, model: Manifest) -> None:
        self._damaged, self._folder = damaged, folder
        self._files = files_of(model)
        self._new: dict[str, NewFile] = {}
        self._open = contextlib.ExitStack()
        self._missing: dict[bytes, list[tuple[str, Chunk]]] = {}
        """Digest -> every place where the chunk belongs: chunks of equal content are one."""
        for name, file in self._files.items():
            for chunk in file.chunks:
                self._missing.setdefault(chunk.digest, []).append((name, chunk))

    @property
    def missing(self) -> dict[bytes, int]:
        """digest -> bytes of the chunks that are not in place."""
        return {digest: places[0][1].size_bytes for digest, places in self._missing.items()}

    def begin(self, nearby: Lookup) -> None:
        """Make the files, and put in what is whole in the old ones, or is found `nearby`."""
        remove(self._folder)
        self._folder.mkdir(parents=True)
        for name, file in self._files.items():
            self._new[name] = self._open.enter_context(NewFile(self._folder / name, file.size_bytes))
            self._new[name].put(0, file.header)
        for name, file in self._files.items():
            for chunk, data in salvage(self._damaged / name, file):
                self.take(chunk.digest, data)
        for digest in tuple(self._missing):
            found = nearby(digest)
            if found is not None:
                self.take(digest, found)

    def take(self, digest: bytes, data: bytes | memoryview) -> None:
        """Put a chunk where it belongs; what nobody misses, or is not what its digest says, is dropped."""
        if digest in self._missing and blake3(data).digest() == digest:
            for name, chunk in self._missing[digest]:
                self._new[name].put(chunk.offset_bytes, data)
            del self._missing[digest]

    def finish(self) -> None:
        """Make the files durable."""
        assert not self._missing, f"{len(self._missing)} chunks are missing"
        for new in self._new.values():
            new.sync()
        self.close()

    def close(self) -> None:
        """Write no more."""
        self._open.close()


def cause_of(error: Exception) -> Exception:
    """The one thing that went wrong; what is not the disk's or the network's fault is ours, and raised again."""
    while isinstance(error, ExceptionGroup):
        expected, other = error.split((OSError, TransportError))
        if other is not None:
            raise error
        assert expected is not None
        error = expected.exceptions[0]
    return error
