"""Why a peer is idle, slow, relayed or refused, in sentences, from what its role says of itself (`report.py`).

Of the status this needs nothing to be there: what a role does not know is not spoken of.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from dugnad.coordinator.membership import Stage
from dugnad.dht.clock import in_words
from dugnad.dht.paths import Path, Reach
from dugnad.peer.members import gone

_NAMED = 3
"""How many others are named at most."""
_SLOW_MBIT = 1.0
_NEW_KEY = "dugnad identity new --force --dir DIR"
_BEFORE = {
    Stage.CONTRIBUTED: (Stage.TRAINING,),
    Stage.REDUCING: (Stage.TRAINING, Stage.CONTRIBUTED),
    Stage.WAITING: (Stage.TRAINING, Stage.CONTRIBUTED, Stage.REDUCING),
}
"""For whom a peer in a stage waits: those in an earlier one."""


def words(status: dict[str, Any]) -> list[str]:
    """A few sentences, the most urgent first, from the answer of /status; empty statuses are of roles that start."""
    if not status:
        return ["It is just starting: it looks for the run, and takes what it needs."]
    found = [*_refused(status), _doing(status), *_waiting(status), *_led(status), *_clock(status), *ways(status)]
    return [sentence for sentence in found if sentence]


def ways(status: dict[str, Any]) -> list[str]:
    """By which ways the others are reached, and what would make them better; empty where nothing is known."""
    return [sentence for sentence in _paths(status) if sentence]


def _refused(status: dict[str, Any]) -> Iterable[str]:
    if status.get("out"):
        yield (
            "Refused: this peer's key is proven to have said two things, so nobody in the run counts it any more. Was "
            f"its folder copied? Stop both, and join as someone new:  {_NEW_KEY}"
        )
    if status.get("key_in_use"):
        yield (
            "E402 another running peer signs with this peer's key. If both vote, both are out: stop one of them, and "
            f"give it a key of its own:  {_NEW_KEY}"
        )
    if status.get("refused"):
        yield str(status["refused"])


def _doing(status: dict[str, Any]) -> str:
    since = f", for {in_words(status['state_s'])}" if status.get("state_s", 0) >= 1 else ""
    reason = str(status.get("reason", "")).rstrip(".")
    match status.get("state"):
        case Stage.TRAINING:
            at = f"step {status.get('step', 0)} of {status['of_steps']}" if status.get("of_steps") else reason
            speed = f", {status['tokens_per_s']:.0f} tokens/s" if status.get("tokens_per_s") else ""
            return f"Training{since}: {at}{speed}."
        case Stage.SYNCING:
            return f"Not training yet{since}: {reason or 'it takes the model from others'}."
        case Stage.CONTRIBUTED | Stage.REDUCING:
            return f"Exchanging{since}: {reason}."
        case Stage.WAITING:
            return f"Idle{since}: {reason}."
        case state if status.get("role") == "coordinator":
            return f"{'Leading' if status.get('leads') else 'Following'}, {state}{since}: {reason}."
        case state:
            return f"{str(state).capitalize()}{since}: {reason}."


def _waiting(status: dict[str, Any]) -> Iterable[str]:
    earlier = _BEFORE.get(status.get("state"))  # type: ignore[arg-type]
    peers: list[dict[str, Any]] = status.get("peers", [])
    if earlier is None:
        return
    for stage in earlier:
        there = [peer for peer in peers if peer["state"] == stage]
        if there:
            at = {peer["nickname"]: f" (step {peer['step']})" for peer in there if stage == "training" and peer["step"]}
            yield f"Still {stage}: {_names([peer['nickname'] + at.get(peer['nickname'], '') for peer in there])}."
    lost = [peer["nickname"] for peer in peers if peer["state"] == "lost"]
    if lost:
        yield f"Lost, and not waited for: {_names(lost)}."


def _led(status: dict[str, Any]) -> Iterable[str]:
    there = status.get("coordinator", {"alive": True})
    if not there["alive"]:
        leader = "This peer leads" if status.get("leads") else "Another volunteer leads"
        away = in_words(there["gone_s"])
        yield f"The coordinator has been gone for {away}. {leader} the rounds meanwhile; nothing is lost."


def _clock(status: dict[str, Any]) -> Iterable[str]:
    if status.get("clock_warning"):
        warning = str(status["clock_warning"])
        yield f"{warning[:1].upper()}{warning[1:]}. Set it; the run goes on all the same."


def _paths(status: dict[str, Any]) -> Iterable[str]:
    left = gone(status)
    paths: list[dict[str, Any]] = [one for one in status.get("paths", []) if one["peer"] not in left]
    relayed = [one for one in paths if one["path"] == Path.RELAYED]
    if paths:
        counts = Counter(str(one["path"]) for one in paths)
        each = ", ".join(f"{counts[kind]} {kind}" for kind in Path if counts[kind])
        whom = f" ({_names([one['nickname'] for one in relayed])})" if relayed else ""
        yield f"Paths to {_count(len(paths), 'peer')}: {each}{whom}."
    tried = [f"{one['nickname']}: {one['why'].rstrip('.')}" for one in relayed if one.get("why")]
    if tried:
        yield f"No direct way to {_names(tried)}."
    yield _improvement(status, bool(relayed))
    slow = [one for one in paths if 0 < max(one["sent_mbit"], one["received_mbit"]) < _SLOW_MBIT]
    if slow:
        each = _names([f"{one['nickname']} ({max(one['sent_mbit'], one['received_mbit']):.1f} Mbit/s)" for one in slow])
        yield f"Slow paths: {each}. Relayed or not, these hold up an exchange the most."


def _improvement(status: dict[str, Any], relayed: bool) -> str:
    """What would make paths better, "" if nothing needs to."""
    host = (status.get("outside") or "HOST").rpartition(":")[0] or "HOST"
    forward = (
        f"Forward TCP ports 4001 and 4002 to this machine and start it with --port 4001 --announce {host}:4001, "
        "or switch on UPnP in the router, and others can reach you directly."
    )
    match status.get("reach"):
        case Reach.SYMMETRIC:
            return f"Relayed: your router gives each connection another port (symmetric NAT). {forward}"
        case Reach.CONE if relayed:
            return (
                "Behind a router: direct paths can be opened to most, but not to peers whose own router gives each "
                f"connection another port. {forward}"
            )
        case Reach.CONE:
            return "Behind a router, through which direct paths were opened: nothing to do."
        case Reach.OPEN if relayed:
            return "Others can connect to this machine, so a relayed path becomes direct once they do."
        case Reach.UNKNOWN if relayed:
            return f"E203 inbound blocked: going on through a relay. Slower, still useful. {forward}"
        case _:
            return ""


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _count(number: int, what: str) -> str:
    return f"1 {what}" if number == 1 else f"{number} {what}s"
