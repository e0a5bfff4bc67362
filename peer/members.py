"""The members of a run as one role sees them: what they do, and by which way they are reached."""

from typing import Any

Row = dict[str, Any]
_COLUMNS = ("nickname", "state", "round", "path", "rtt ms", "up Mbit/s", "down Mbit/s", "key")


def rows(status: dict[str, Any]) -> list[Row]:
    """A row for each member that a status (`report.py`) names, by nickname; None for what is not known.

    rtt_s in seconds; up_mbit and down_mbit: what this side sent to it and took from it, in Mbit/s.
    """
    left = gone(status)
    paths = {one["peer"]: one for one in status.get("paths", []) if one["peer"] not in left}
    found = paths | {one["peer"]: one for one in status.get("peers", [])}
    return sorted((_row(one, paths.get(peer, {})) for peer, one in found.items()), key=lambda row: row["nickname"])


def gone(status: dict[str, Any]) -> frozenset[str]:
    """Peers to which there was a path, and who are there no more as far as the status tells."""
    reached = {one["peer"] for one in status.get("paths", [])}
    if not reached:
        return frozenset()
    coordinator = status.get("coordinator", {})
    dead = set() if coordinator.get("alive", True) else {coordinator.get("peer")}
    states = {one["peer"]: one["state"] for one in status.get("peers", [])}
    here = {peer for peer, state in states.items() if state != "lost"} | {coordinator.get("peer")}
    # where none is named nobody says who is here, as while a coordinator follows
    return frozenset(reached & dead | (reached - here if states else set()))


def _row(peer: Row, way: Row) -> Row:
    return {
        "peer": peer["peer"],
        "nickname": peer["nickname"],
        "state": peer.get("state"),
        "round": peer.get("round"),
        "path": way.get("path"),
        "rtt_s": way.get("rtt_s"),
        "up_mbit": way.get("sent_mbit") or None,
        "down_mbit": way.get("received_mbit") or None,
    }


def text(found: list[Row]) -> str:
    """The same as a table; "-" for what is not known."""
    if not found:
        return "nobody else is known here yet"
    table = [_COLUMNS, *(_cells(row) for row in found)]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(_COLUMNS))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in table)
    return "\n".join(line.rstrip() for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    rtt_ms = None if row["rtt_s"] is None else f"{row['rtt_s'] * 1000:.0f}"
    up, down = (None if rate is None else f"{rate:.1f}" for rate in (row["up_mbit"], row["down_mbit"]))
    cells = (row["nickname"], row["state"], row["round"], row["path"], rtt_ms, up, down, row["peer"])
    return tuple("-" if cell is None else str(cell) for cell in cells)
