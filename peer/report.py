"""What a role says of itself when asked: one dictionary, the same for `dugnad status`, /status and the terminal."""

import os
from typing import TYPE_CHECKING, Any

from dugnad.coordinator.membership import Stage
from dugnad.coordinator.service import Coordinator
from dugnad.coordinator.shell import Shell
from dugnad.dht.identity import PeerId, nickname
from dugnad.dht.records import ProgressBody
from dugnad.dht.swarm import Swarm

if TYPE_CHECKING:
    from dugnad.peer.session import Session  # and with it torch, which takes seconds

Report = dict[str, Any]
"""Made of what JSON can hold; digests and run ids in hex."""
_STAGES = frozenset(Stage)


def of_coordinator(role: Coordinator) -> Report:
    """Where the run stands, as its coordinator sees it."""
    val_round, val_loss = role.leader.validation
    return {
        **_of_any(role, "coordinator"),
        "state": role.leader.phase,
        "reason": _taking(role) or role.machine.reason,
        "val_loss": val_loss,
        "val_round": val_round,
        "peers": _reported(role),
        "coordinator": {"peer": role.identity.peer_id, "alive": True, "gone_s": 0.0},
    }


def of_volunteer(role: "Session", swarm: Swarm) -> Report:
    """Where the run stands, as one of its volunteers sees it; of the others it knows what they say in gossip."""
    volunteer, plan = role.machine, role.machine.plan
    standing = volunteer.standing
    seats = plan.seats if plan else ()
    gone_s = volunteer.coordinator_gone_s(now=role.now())
    heard = {peer: swarm.progress_of(peer) for peer, what in swarm.roles().items() if what == "volunteer"}
    barred = role.follower.barred()
    # who says nothing of itself has left, or was never let in: for minutes its record still tells where it was
    others = [_of_other(peer, said) for peer, said in heard.items() if said is not None and peer not in barred]
    delegated = role.follower.delegation
    return {
        **_of_any(role, "volunteer"),
        "state": volunteer.stage,
        "reason": _taking(role) or volunteer.why(now=role.now()),
        "val_loss": standing.val_loss if standing else None,
        "val_round": standing.val_round if standing else 0,
        "loss": role.loss,
        "tokens_per_s": role.tokens_per_s,
        "step": volunteer.step,
        "of_steps": next((seat.steps for seat in seats if seat.peer == role.identity.peer_id), 0),
        "peers": _reported(role) if role.follower.leads else others,
        "coordinator": {
            "peer": delegated.coordinator if delegated is not None else role.genesis.founder,
            "alive": gone_s is None,
            "gone_s": gone_s or 0.0,
        },
    }


def _reported(role: Shell) -> list[Report]:
    """Everyone who reports to us while we lead, and may take part; who left in order is not there any more."""
    peers: list[Report] = []
    leader = role.leader
    seated = {seat.peer for seat in leader.plan.seats} if leader.plan else set()
    for peer in sorted({*leader.membership.live(), *seated}):
        said = leader.membership.report(peer)
        if said is not None and (not said.trains or role.follower.refuses(peer, said.claim) is not None):
            continue
        if said is not None and said.leaving and not leader.membership.is_live(peer):
            continue
        peers.append(
            {
                "peer": peer,
                "nickname": nickname(peer),
                "state": "lost" if not leader.membership.is_live(peer) else _stage(said.stage) if said else "unknown",
                "reason": leader.membership.why_lost(peer),
                "round": said.head_round if said else None,
                "step": said.step if said else 0,
                "of_steps": said.of_steps if said else 0,
            }
        )
    return peers


def _taking(role: Shell) -> str:
    """How far the model is that it takes from others, in words, if it takes one."""
    progress = role.sources.downloading
    return f"taking the model: {progress}" if progress else ""


def _of_any(role: Shell, name: str) -> Report:
    head = role.follower.ledger.head
    model = role.follower.model
    return {
        "role": name,
        "run": role.run.hex(),
        "name": role.recipe.name,
        "peer": role.identity.peer_id,
        "nickname": nickname(role.identity.peer_id),
        "pid": os.getpid(),
        "addresses": list(role.machine.abilities.addresses),
        "round": head.round,
        "head": head.hash.hex(),
        "global_step": head.global_step,
        "total_steps": role.recipe.rounds.total_steps,
        "admission": role.charter.admission,
        "model_round": role.follower.model_round,
        "model_digest": model.hex() if model is not None else None,
        "epoch": head.epoch,
        "view": role.follower.view,
        "leader": role.follower.leader,
        "leads": role.follower.leads,
        "committee": [voter.peer for voter in head.committee],
        "checkpoint": str(role.state.checkpoint) if role.state.checkpoint else None,
        "bytes_sent": role.metrics.sent_bytes(),
        "bytes_received": role.metrics.received_bytes(),
    }


def _of_other(peer: PeerId, said: ProgressBody) -> Report:
    return {
        "peer": peer,
        "nickname": nickname(peer),
        "state": _stage(said.state),
        "reason": said.reason,
        "round": said.round,
        "step": said.step,
    }


def _stage(said: str) -> str:
    # any text of a stranger's: as it is, it could steer the terminal and make a new series of a metric each time
    return said if said in _STAGES else "unknown"


def line(said: Report) -> str:
    """One line for a person who waits."""
    total = said["total_steps"]
    head = f"round {said['round']}  step {said['global_step']}/{total}"
    if said["role"] == "volunteer" and said["of_steps"] and said["state"] == "training":
        doing = f"training {said['step']}/{said['of_steps']}"
        if said["loss"] is not None:
            doing += f"  loss {said['loss']:.3f}  {said['tokens_per_s']:.0f} tokens/s"
    else:
        doing = said["reason"]
    gone = said["coordinator"]
    silent = "" if gone["alive"] else f"  coordinator gone {gone['gone_s']:.0f} s"
    return f"{head}  {doing}{silent}"


def text(said: Report) -> str:
    """Some lines for a person who asks."""
    loss = "not yet"
    if said["val_loss"] is not None:
        loss = f"{said['val_loss']:.4f} nats per byte after round {said['val_round']}"
    there = said["coordinator"]
    alive = "alive" if there["alive"] else f"gone {there['gone_s']:.0f} s"
    leader = "you" if said["leads"] else nickname(PeerId(said["leader"]))
    lines = [
        f"run          {said['name']} ({said['run'][:8]})",
        f"you are      {said['nickname']}, {said['role']} (pid {said['pid']})",
        f"your key     {said['peer']}",
        f"round        {said['round']}, step {said['global_step']} of {said['total_steps']}",
        f"state        {said['state']}: {said['reason']}",
        f"validation   {loss}",
        f"model        {(said['model_digest'] or 'none yet')[:16]} after round {said['model_round']}",
        f"coordinator  {alive}",
        f"leader       {leader}, in view {said['view']}",
        f"sent         {_bytes(said['bytes_sent'])}",
        f"received     {_bytes(said['bytes_received'])}",
        f"peers        {len(said['peers'])}",
    ]
    if said.get("clock_warning"):
        lines.append(f"clock        {said['clock_warning']}")
    for peer in said["peers"]:
        steps = f"  step {peer['step']}/{peer['of_steps']}" if peer.get("of_steps") else ""
        lines.append(f"  {peer['nickname']:<20} {peer['state']}{steps}")
    return "\n".join(lines)


def _bytes(kinds: dict[str, int]) -> str:
    total = sum(kinds.values())
    most = ", ".join(f"{kind} {count / 1e6:.1f}" for kind, count in sorted(kinds.items(), key=lambda kv: -kv[1])[:4])
    return f"{total / 1e6:.1f} MB ({most})" if kinds else "nothing"
