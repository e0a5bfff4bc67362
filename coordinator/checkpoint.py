"""One checkpoint: a folder in which one signature accounts for every byte.

manifest.json           what it is of, the digest of its model, and who wrote it, signed
model.msgpack           the manifest of the model (`dht.manifest`): it hashes to that digest, and names every chunk
weights.safetensors     the model, readable by anything that reads safetensors; it follows from model.msgpack
momentum.safetensors    the outer momentum, tensors of the same names
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from blake3 import blake3
from msgspec import Meta, Struct
from numpy.typing import NDArray

from dugnad.coordinator.damage import Broken, Damage, Fault, named
from dugnad.coordinator.durable import NewFile, read_at, sync_names, write_new
from dugnad.coordinator.tensorfile import FILES, Chunk, TensorFile, Tensors, files_of, read_chunk
from dugnad.coordinator.votes import Signer
from dugnad.dht.identity import PeerId, verify
from dugnad.dht.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    ManifestError,
    TensorEntry,
    chunks_of,
    digests_of,
    parse_manifest,
)
from dugnad.dht.transport import printable

MODEL = "model.msgpack"
MANIFEST = "manifest.json"
_VERSION = 2
_MAX_HEAD_BYTES = 2**20
_SIGNED_AS = b"dugnad/checkpoint/1"
_NAME = re.compile(r"round-(\d{6,})")

_Hash = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class CheckpointMeta(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a checkpoint is of; digests and the run's id in hex."""

    run: str
    recipe: str
    recipe_json: str
    """The whole recipe as `configs.recipe.encode` writes it, so that the weights can be used without the run."""
    block: _Hash
    """The block after which the model is what it is: the chain may have taken back a round of the same number."""
    model_digest: _Hash
    global_step: int
    val_loss: float | None
    """Nats per byte on held-out data, or None if not measured."""


class Head(Struct, frozen=True, forbid_unknown_fields=True):
    """What manifest.json says."""

    version: int
    round: int
    meta: CheckpointMeta
    model_manifest_bytes: Annotated[int, Meta(ge=1, le=MAX_MANIFEST_BYTES)]
    """Size of model.msgpack, so that it can be asked for by its digest."""
    writer: PeerId
    digest: str
    """blake3 of this table's JSON with this field and the next empty."""
    signature: str
    """The writer's, over the digest, in hex."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint; its tensors are read-only float32 views of the files, mapped into memory."""

    path: Path
    round: int
    meta: CheckpointMeta
    writer: PeerId
    weights: Tensors
    momentum: Tensors


def name_of(round_number: int) -> str:
    """The name of a round's folder."""
    return f"round-{round_number:06d}"


def round_of(path: Path) -> int:
    """The round of a checkpoint's folder; 0 if it has another name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def is_name(name: str) -> bool:
    """Whether a folder of that name is a checkpoint's."""
    return _NAME.fullmatch(name) is not None


def manifest_of(tensors: Mapping[str, NDArray[np.float32]]) -> Manifest:
    """The manifest of a model: float32 tensors named "momentum/<name>" and "weights/<name>".

    Raises ValueError, which names the tensor, for what a checkpoint can't hold.
    """
    wrong = [name for name, tensor in tensors.items() if tensor.dtype != np.float32 or tensor.size == 0]
    if wrong:
        raise ValueError(f"shared state is float32 and has values, but {wrong[:5]} are not, or have none")
    entries = (
        TensorEntry(name, "float32", tensors[name].shape, digests_of(_raw(tensors[name]))) for name in sorted(tensors)
    )
    model = Manifest.of(tuple(entries))
    files_of(parse_manifest(model.encode()))  # what no reader would take must not be written
    return model


# -- writing


def write_tensors(folder: Path, model: Manifest, tensors: Mapping[str, NDArray[np.float32]]) -> None:
    """Write both files of a model's tensors, durably. Raises OSError."""
    files = files_of(model)
    for group, name in FILES.items():
        with NewFile(folder / name, files[name].size_bytes) as new:
            new.put(0, files[name].header)
            for chunk, data in _cut(files[name], group, tensors):
                new.put(chunk.offset_bytes, data)
            new.sync()


def write_manifests(folder: Path, round_number: int, meta: CheckpointMeta, model: bytes, signer: Signer) -> None:
    """Write what stands beside the tensors, signed, and make the folder durable. Raises OSError."""
    assert blake3(model).hexdigest() == meta.model_digest, "the manifest of another model"
    head = Head(_VERSION, round_number, meta, len(model), signer.peer_id, "", "")
    digest = _digest_of(head)
    signature = signer.sign(_SIGNED_AS + digest)
    write_new(folder / MODEL, model)
    write_new(
        folder / MANIFEST, _json_of(msgspec.structs.replace(head, digest=digest.hex(), signature=signature.hex()))
    )
    sync_names(folder)


def _cut(
    file: TensorFile, group: str, tensors: Mapping[str, NDArray[np.float32]]
) -> Iterator[tuple[Chunk, memoryview]]:
    pieces = (piece for name in file.shapes for piece in chunks_of(_raw(tensors[f"{group}/{name}"])))
    return zip(file.chunks, pieces, strict=True)


def _raw(tensor: NDArray[np.float32]) -> memoryview:
    return np.ascontiguousarray(tensor, "<f4").reshape(-1).data.cast("B")


def _digest_of(head: Head) -> bytes:
    return blake3(msgspec.json.encode(msgspec.structs.replace(head, digest="", signature=""))).digest()


def _json_of(head: Head) -> bytes:
    return msgspec.json.format(msgspec.json.encode(head))


# -- reading


def inspect(path: Path) -> Checkpoint | Damage:
    """The checkpoint in the folder `path` after every byte of it was verified, or all that is wrong with it."""
    head = read_head(path)
    model = read_model(path, head if isinstance(head, Head) else None)
    broken = [one for one in (head, model) if isinstance(one, Broken)]
    files = files_of(model) if isinstance(model, Manifest) else {}
    for name in FILES.values():
        fault = _check(path / name, files.get(name))
        if fault is not None:
            broken.append(fault)
    if isinstance(head, Broken) or isinstance(model, Broken) or broken:
        return Damage(path, tuple(broken))
    try:
        momentum, weights = (files[name].map(path / name) for name in FILES.values())
    except OSError as error:  # its owner has dropped it meanwhile
        return Damage(path, (_unread(Path(error.filename or path).name, error),))
    return Checkpoint(path, head.round, head.meta, head.writer, weights, momentum)


def read_head(path: Path) -> Head | Broken:
    """What the manifest.json of the checkpoint in `path` says; its signature is that of the writer whom it names."""
    raw = _read(path / MANIFEST, _MAX_HEAD_BYTES)
    if isinstance(raw, Broken):
        return raw
    try:
        version = msgspec.json.decode(raw, type=_Versioned).version
        if version != _VERSION:
            words = f"has format {version}, this version of dugnad reads {_VERSION}"
            return Broken(MANIFEST, Fault.OTHER_FORMAT, words)
        head = msgspec.json.decode(raw, type=Head)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        fault = Fault.TRUNCATED if "truncated" in str(error) else Fault.ALTERED
        return Broken(MANIFEST, fault, f"is {fault.value}: {printable(str(error))}")
    why = _doubt(path, head, raw)
    return head if why is None else Broken(MANIFEST, Fault.ALTERED, f"is altered: {why}")


class _Versioned(Struct, frozen=True):
    version: int


def _doubt(path: Path, head: Head, raw: bytes) -> str | None:
    """Why a head is not believed."""
    digest = _digest_of(head)
    # another spelling of the same would escape the digest
    if digest.hex() != head.digest or _json_of(head) != raw:
        return "it does not match its own digest"
    try:
        signature = bytes.fromhex(head.signature)
    except ValueError:
        signature = b""
    if signature.hex() != head.signature or not verify(head.writer, _SIGNED_AS + digest, signature):
        return f"it is not signed by {printable(head.writer)}, whom it names as its writer"
    if is_name(path.name) and round_of(path) != head.round:
        return f"it is of round {head.round}"
    return None


def read_model(path: Path, head: Head | None) -> Manifest | Broken:
    """The model's manifest; without a head it is only known to be one."""
    raw = _read(path / MODEL, MAX_MANIFEST_BYTES)
    if isinstance(raw, Broken):
        return raw
    if head is not None and len(raw) < head.model_manifest_bytes:
        words = f"is truncated: {len(raw)} bytes of {head.model_manifest_bytes}"
        return Broken(MODEL, Fault.TRUNCATED, words)
    if head is not None and blake3(raw).hexdigest() != head.meta.model_digest:
        return Broken(MODEL, Fault.ALTERED, "is altered: it does not hash to the digest of the model")
    try:
        model = parse_manifest(raw)
        files_of(model)
    except ManifestError as error:
        return Broken(MODEL, Fault.ALTERED, f"is not a model of ours: {printable(str(error))}")
    return model


def _read(path: Path, at_most_bytes: int) -> bytes | Broken:
    try:
        with path.open("rb") as file:
            return file.read(at_most_bytes + 1)
    except OSError as error:
        return _unread(path.name, error)


def _check(path: Path, file: TensorFile | None) -> Broken | None:
    """What is wrong with a file of tensors; without knowing what it has to be, only whether it is there."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        return _unread(path.name, error, file.chunks if file else ())
    try:
        return _compare(path.name, descriptor, file) if file else None
    finally:
        os.close(descriptor)


def _compare(name: str, descriptor: int, file: TensorFile) -> Broken | None:
    size_bytes = os.fstat(descriptor).st_size
    bad: list[Chunk] = []
    failed: OSError | None = None
    whole_header = False
    try:
        whole_header = read_at(descriptor, 0, len(file.header)) == file.header
    except OSError as error:
        failed = error
    for chunk in file.chunks:
        try:
            whole = read_chunk(descriptor, chunk) is not None
        except OSError as error:  # a bad sector: what else is on it is looked at all the same
            whole, failed = False, error
        if not whole:
            bad.append(chunk)
    chunks = tuple(bad)
    where = ", ".join(([] if whole_header else ["its header"]) + ([named(chunks)] if chunks else []))
    if failed is not None:
        return Broken(name, Fault.UNREADABLE, f"can't be read: {failed.strerror}: {where}", chunks)
    if size_bytes < file.size_bytes:
        words = f"is truncated: {size_bytes} bytes of {file.size_bytes}, not whole: {where}"
        return Broken(name, Fault.TRUNCATED, words, chunks)
    if size_bytes > file.size_bytes:
        return Broken(name, Fault.ALTERED, f"is altered: {size_bytes} bytes instead of {file.size_bytes}", chunks)
    if where:
        return Broken(name, Fault.ALTERED, f"is altered: {where}", chunks)
    return None


def _unread(name: str, error: OSError, chunks: tuple[Chunk, ...] = ()) -> Broken:
    if isinstance(error, FileNotFoundError):
        return Broken(name, Fault.MISSING, "is missing", chunks)
    return Broken(name, Fault.UNREADABLE, f"can't be read: {error.strerror}", chunks)
