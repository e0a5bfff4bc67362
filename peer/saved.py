"""What `dugnad checkpoints` shows: the checkpoints in a folder, each read to its last byte."""

from pathlib import Path
from typing import Any

from dugnad.coordinator.checkpoint import MANIFEST, Checkpoint, Head, inspect, read_head, round_of
from dugnad.coordinator.checkpoints import Checkpoints
from dugnad.coordinator.damage import Damage
from dugnad.dht.identity import nickname
from dugnad.peer.folder import FolderError


def rows(source: Path) -> list[dict[str, Any]]:
    """One row for each checkpoint, newest first, as JSON can hold it.

    source: a role's folder, a folder of checkpoints, or one checkpoint. Raises FolderError if there is none.
    """
    if not source.is_dir():
        raise FolderError(f"{source}: there is no such folder.")
    found = [row for path in _checkpoints_in(source) if (row := _row(path)) is not None]
    if not found:
        raise FolderError(f"{source}: there is no checkpoint here. Name a role's folder, or one with checkpoints.")
    return found


def text(found: list[dict[str, Any]]) -> str:
    """The same for people."""
    lines = [f"{'round':>7}  {'size':>10}  {'step':>7}  {'validation':>10}  {'written by':<20}  "]
    for row in found:
        val_loss = "" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
        writer, step = row["nickname"] or "unknown", "" if row["global_step"] is None else row["global_step"]
        state = "intact" if row["intact"] else "DAMAGED"
        size = f"{row['size_bytes'] / 1e6:.1f} MB"
        lines.append(f"{row['round']:>7}  {size:>10}  {step:>7}  {val_loss:>10}  {writer:<20}  {state}")
        lines += [f"{'':>9}{one['file']} {one['words']}" for one in row["damage"]]
    damaged = sum(not row["intact"] for row in found)
    if damaged:
        lines += ["", f"{damaged} of {len(found)} damaged. Another copy of the same round holds what is lost here."]
    return "\n".join(line.rstrip() for line in lines)


def _checkpoints_in(source: Path) -> list[Path]:
    if (source / MANIFEST).exists() or (round_of(source) and source.is_dir()):
        return [source]
    within = source / "checkpoints"
    return Checkpoints(within if within.is_dir() else source, keep=1).newest_first()


def _row(path: Path) -> dict[str, Any] | None:
    """What is known of one checkpoint; None if its role has dropped it meanwhile."""
    found, head = inspect(path), read_head(path)
    try:
        size_bytes = sum(file.stat().st_size for file in path.iterdir())
    except FileNotFoundError:
        return None
    known = head if isinstance(head, Head) else None
    broken = found.broken if isinstance(found, Damage) else ()
    return {
        "path": str(path),
        "round": known.round if known else round_of(path),
        "size_bytes": size_bytes,
        "global_step": known.meta.global_step if known else None,
        "val_loss": known.meta.val_loss if known else None,
        "run": known.meta.run if known else None,
        "model_digest": known.meta.model_digest if known else None,
        "written_by": known.writer if known else None,
        "nickname": nickname(known.writer) if known else None,
        "intact": isinstance(found, Checkpoint),
        "damage": [
            {"file": one.file, "fault": one.fault.value, "tensors": list(one.tensors), "words": one.words}
            for one in broken
        ],
    }
