"""A whole run on one machine, with real parts: what `dugnad demo` shows, checks and writes down.

A coordinator and some volunteers run as processes of their own, each with its own libp2p daemon; they know nothing of
each other but the invite. One volunteer joins while the run is on, one is killed with SIGKILL in the middle of a
round. What is shown and checked afterwards is read from the coordinator's chain, not from what anyone claimed.
"""

import asyncio
import contextlib
import json
import math
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from dugnad.configs.recipe import Recipe, load
from dugnad.coordinator.chain import Chain
from dugnad.coordinator.history import RoundRow, rows
from dugnad.dht.identity import PeerId, nickname
from dugnad.peer import ask
from dugnad.peer.folder import Folder
from dugnad.peer.terminal import live_line, say

START_S = 60.0
"""How long a process may take to come up."""
POLL_S = 0.1
LEAVE_S = 30.0
"""How long volunteers may take to leave after the run has ended."""


class DemoError(Exception):
    """The demo can't go on: which process, and the end of its log."""


@dataclass(slots=True)
class Process:
    """One role in a process of its own."""

    name: str
    folder: Folder
    process: asyncio.subprocess.Process

    @classmethod
    async def start(cls, name: str, directory: Path, command: str, *arguments: str) -> "Process":
        """Start `dugnad COMMAND`; it ends when we do, however that happens."""
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "output.txt").open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "dugnad.peer", command, *arguments, "--exit-with-stdin",
                stdin=asyncio.subprocess.PIPE, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        return cls(name, Folder(directory), process)

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.returncode is None

    async def status(self) -> dict[str, Any] | None:
        """What the role says of itself, or None while it can't."""
        with contextlib.suppress(ask.AskError):
            return await asyncio.to_thread(ask.status, self.folder.path)
        return None

    async def up(self) -> dict[str, Any]:
        """Wait until the role answers. Raises DemoError."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.running:
            said = await self.status()
            if said is not None:
                return said
            await asyncio.sleep(POLL_S)
        raise DemoError(f"{self.name} did not come up:\n{self.output()[-2000:]}")

    def output(self) -> str:
        """Everything that it printed."""
        return (self.folder.path / "output.txt").read_text("utf-8", errors="replace")

    async def end(self, within_s: float) -> None:
        """Wait for it to end by itself, then ask it to, then make it."""
        for number in (None, signal.SIGINT, signal.SIGKILL):
            if number is not None and self.running:
                with contextlib.suppress(ProcessLookupError):
                    self.process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await self.process.wait()
                    return
            within_s = 10.0


@dataclass(slots=True)
class Demo:
    """What has happened so far."""

    recipe: Recipe
    directory: Path
    num_peers: int
    processes: list[Process] = field(default_factory=list)
    names: dict[PeerId, str] = field(default_factory=dict)
    killed: PeerId | None = None
    killed_in_round: int | None = None
    joined_late: PeerId | None = None
    shown: int = 0
    line: str = "starting"
    since: float = field(default_factory=time.monotonic)
    started: set[psutil.Process] = field(default_factory=set)
    """Every process below this one that was ever seen: the roles, and their daemons."""

    @property
    def coordinator(self) -> Process:
        """The first process."""
        return self.processes[0]

    @property
    def join_round(self) -> int:
        """After which round the late one joins."""
        return max(1, self.recipe.rounds.num_rounds() // 4)

    @property
    def kill_round(self) -> int:
        """In the middle of which round one is killed."""
        return max(2, self.recipe.rounds.num_rounds() // 2)


async def run_demo(
    name: str, rounds: int | None, num_peers: int, directory: Path | None, json_file: Path | None
) -> int:
    """Run the demo, show it, and return the exit status: 0 only if everything held."""
    recipe = load(name)
    recipe = recipe if rounds is None else recipe.cut(rounds)
    base = directory or Path(tempfile.mkdtemp(prefix="dugnad-demo-"))
    if (base / "coordinator").exists():
        raise DemoError(f"{base}: an earlier demo lies there. Remove it, or choose another folder with --dir.")
    demo = Demo(recipe, base.absolute(), num_peers)
    say(f"dugnad demo: {recipe.summary}")
    say(f"a coordinator and {num_peers} volunteers, {recipe.rounds.num_rounds()} rounds, in {base}")
    async with _ended(demo), live_line(lambda: demo.line):
        await _start(demo, name)
        await _watch(demo)
    found = _account(demo, [process.pid for process in demo.started if _is_alive(process)])
    _show_end(found)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1))
    return 0 if not found["broken"] else 1


@contextlib.asynccontextmanager
async def _ended(demo: Demo) -> AsyncIterator[None]:
    """No process outlives this."""
    try:
        yield
    except BaseException:
        await asyncio.gather(*(process.end(0.0) for process in demo.processes))
        raise
    await asyncio.gather(*(process.end(LEAVE_S) for process in demo.processes))


async def _start(demo: Demo, recipe: str) -> None:
    coordinator, rounds = demo.directory / "coordinator", str(demo.recipe.rounds.num_rounds())
    started = await Process.start(
        "coordinator", coordinator, "launch", recipe, "--rounds", rounds, "--dir", str(coordinator)
    )
    demo.processes.append(started)
    await started.up()
    await asyncio.gather(*(_join(demo, f"volunteer-{k + 1}") for k in range(demo.num_peers)))


async def _join(demo: Demo, name: str) -> PeerId:
    directory = demo.directory / name
    invite = next(word for word in demo.coordinator.output().split() if word.startswith("dugnad1:"))
    process = await Process.start(name, directory, "join", invite, "--dir", str(directory), "--threads", "1")
    demo.processes.append(process)
    said = await process.up()
    peer = PeerId(said["peer"])
    demo.names[peer] = name
    say(f"{name} is {nickname(peer)} (pid {said['pid']})")
    return peer


async def _watch(demo: Demo) -> None:
    """Show what happens, and make the two things happen that the demo is about."""
    async with asyncio.TaskGroup() as tasks:
        while demo.coordinator.running:
            said = await demo.coordinator.status()
            if said is not None:
                demo.line = f"round {said['round']}: {said['reason']}"
                if demo.joined_late is None and said["round"] >= demo.join_round:
                    demo.joined_late = PeerId("")
                    tasks.create_task(_join_late(demo))
                if demo.killed is None and said["round"] >= demo.kill_round:
                    _kill_one(demo, said)
            _show_rounds(demo)
            demo.started.update(psutil.Process().children(recursive=True))
            await asyncio.sleep(POLL_S)
        _show_rounds(demo)
    if demo.coordinator.process.returncode != 0:
        raise DemoError(f"the coordinator ended early:\n{demo.coordinator.output()[-2000:]}")


async def _join_late(demo: Demo) -> None:
    say(f"-- round {demo.join_round} is committed: one more volunteer joins")
    demo.joined_late = await _join(demo, f"volunteer-{demo.num_peers + 1}")


def _kill_one(demo: Demo, said: dict[str, Any]) -> None:
    """SIGKILL the second volunteer, as soon as it is half through its steps."""
    victim = demo.processes[2]
    peer = next(peer for peer, name in demo.names.items() if name == victim.name)
    seen = next((one for one in said["peers"] if one["peer"] == peer), None)
    if seen is None or seen["state"] != "training" or not 0 < seen["step"] < seen["of_steps"]:
        return
    victim.process.send_signal(signal.SIGKILL)
    demo.killed, demo.killed_in_round = peer, said["round"] + 1
    say(
        f"-- {nickname(peer)} is killed (SIGKILL) in the middle of round {said['round'] + 1}, "
        f"after step {seen['step']} of {seen['of_steps']}"
    )


def _rows(demo: Demo, after_round: int = 0) -> list[RoundRow]:
    chain = Chain(demo.coordinator.folder.chain, read_only=True)
    try:
        return rows(chain, after_round=after_round)
    finally:
        chain.close()


def _show_rounds(demo: Demo) -> None:
    """Show the rounds that are over: of the newest, not everything has been said yet."""
    ended = not demo.coordinator.running
    for row in _rows(demo, demo.shown) if demo.coordinator.folder.chain.exists() else []:
        applied = set(row.roster) - ({demo.killed} if demo.killed else set()) <= set(row.model_digest)
        if not ended and not (applied and (row.val_loss is not None or not row.roster)):
            return
        demo.shown = row.round
        say(_line(row, demo.recipe.rounds.total_steps))


def _line(row: RoundRow, total_steps: int) -> str:
    if not row.roster:
        return f"round {row.round:>3}  (someone left)"
    digests = "same model" if row.agree else "MODELS DIFFER"
    digest = next(iter(row.model_digest.values()), b"").hex()[:8]
    val = f"{row.val_loss:.3f}" if row.val_loss is not None else "-"
    names = " ".join(nickname(peer) for peer in row.roster)
    return (
        f"round {row.round:>3}  step {row.global_step:>4}/{total_steps}  loss {row.train_loss or math.nan:.3f}"
        f"  val {val}  {row.wire_bytes / 1e6:5.1f} MB  {row.duration_s:5.1f} s"
        f"  {digests} {digest} x{len(row.model_digest)}  {names}"
    )


def _account(demo: Demo, left: Sequence[int]) -> dict[str, Any]:
    """Everything that the demo found out, as JSON can hold it; `broken` lists what did not hold."""
    done = _rows(demo)
    trained = [row for row in done if row.roster]
    parameters = _num_parameters(demo.recipe)
    sent = sum(row.wire_bytes for row in done)
    parallel = _data_parallel_bytes(trained, parameters)
    losses = [row.val_loss for row in trained if row.val_loss is not None]
    audited = ask.audit(demo.coordinator.folder.path)
    checkpoints = sorted((demo.coordinator.folder.path / "checkpoints").glob("round-*"))
    found = {
        "recipe": demo.recipe.name,
        "parameters": parameters,
        "rounds": [_round_json(row) for row in done],
        "val_loss_first": losses[0] if losses else None,
        "val_loss_last": losses[-1] if losses else None,
        "killed": demo.killed,
        "killed_in_round": demo.killed_in_round,
        "joined_late": demo.joined_late,
        "bytes_sent": sent,
        "bytes_data_parallel": parallel,
        "bytes_vs_data_parallel": parallel / sent if sent else None,
        "exchange_bytes_over_ideal": _exchange_over_ideal(trained, parameters),
        "compute_s": {peer: sum(row.train_s.get(peer, 0.0) for row in done) for peer in demo.names},
        "utilization": _utilization(done, demo.names),
        "nicknames": {peer: nickname(peer) for peer in demo.names},
        "checkpoint": str(checkpoints[-1]) if checkpoints else None,
        "audit": audited,
        "left_processes": list(left),
        "duration_s": time.monotonic() - demo.since,
    }
    found["broken"] = _broken(demo, found, trained)
    return found


def _round_json(row: RoundRow) -> dict[str, Any]:
    kinds: dict[str, int] = {}
    for sent in row.sent_bytes.values():
        for kind, count in sent.items():
            kinds[kind] = kinds.get(kind, 0) + count
    return {
        "round": row.round,
        "global_step": row.global_step,
        "roster": list(row.roster),
        "committed": True,
        "model_digest": {peer: digest.hex() for peer, digest in row.model_digest.items()},
        "train_loss": row.train_loss,
        "val_loss": row.val_loss,
        "wire_bytes": row.wire_bytes,
        "wire_bytes_by_kind": kinds,
        "duration_s": row.duration_s,
    }


def _num_parameters(recipe: Recipe) -> int:
    from dugnad.peer.models import tensor_shapes

    return sum(math.prod(shape) for _, shape in tensor_shapes(recipe.model))


def _data_parallel_bytes(trained: Sequence[RoundRow], parameters: int) -> int:
    """What the same steps would have sent with gradients in fp32, reduced after each step by a ring."""
    total, before = 0, 0
    for row in trained:
        total += (row.global_step - before) * 2 * (len(row.roster) - 1) * 4 * parameters
        before = row.global_step
    return total


def _exchange_over_ideal(trained: Sequence[RoundRow], parameters: int) -> float | None:
    """Bytes of uploads and averages over 2 (N - 1) per parameter, in the rounds that everyone began and ended."""
    quiet = [row for row in trained if set(row.roster) <= set(row.sent_bytes) and len(row.roster) > 1]
    ideal = sum(2 * (len(row.roster) - 1) * parameters for row in quiet)
    kinds = ("upload", "result")
    sent = sum(row.sent_bytes[peer].get(kind, 0) for row in quiet for peer in row.roster for kind in kinds)
    return sent / ideal if ideal else None


def _utilization(done: Sequence[RoundRow], peers: dict[PeerId, str]) -> dict[str, float]:
    out: dict[str, float] = {}
    for peer in peers:
        wall_s = sum(row.wall_s.get(peer, 0.0) for row in done)
        out[peer] = sum(row.train_s.get(peer, 0.0) for row in done) / wall_s if wall_s else 0.0
    return out


def _broken(demo: Demo, found: dict[str, Any], trained: Sequence[RoundRow]) -> list[str]:
    """What should hold and does not, in sentences."""
    rosters = [set(row.roster) for row in trained]
    first, last = found["val_loss_first"], found["val_loss_last"]
    checks = {
        f"{len(trained)} rounds were committed, not {demo.recipe.rounds.num_rounds()}": (
            len(trained) == demo.recipe.rounds.num_rounds()
        ),
        "model digests differ": all(row.agree for row in trained),
        "a round has fewer than two signed digests": all(len(row.model_digest) > 1 for row in trained),
        "the chain does not pass its audit": found["audit"]["clean"],
        "the validation loss did not fall": first is not None and last is not None and last < first,
        "nobody was killed": demo.killed is not None,
        "the late volunteer's work never counted": any(demo.joined_late in roster for roster in rosters),
        "no checkpoint was written": found["checkpoint"] is not None,
        f"processes are left: {found['left_processes']}": not found["left_processes"],
        "a process ended badly: " + ", ".join(_ended_badly(demo)): not _ended_badly(demo),
    }
    return [sentence for sentence, held in checks.items() if not held]


def _is_alive(process: psutil.Process) -> bool:
    """Whether it runs: one that has ended and that its new parent has not yet asked about does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _ended_badly(demo: Demo) -> list[str]:
    victim = demo.names.get(demo.killed) if demo.killed else None
    return [one.name for one in demo.processes if one.process.returncode != 0 and one.name != victim]


def _show_end(found: dict[str, Any]) -> None:
    from dugnad.peer.sample import write

    say("")
    if found["val_loss_first"] is not None:
        say(f"validation loss    {found['val_loss_first']:.3f} -> {found['val_loss_last']:.3f} nats per byte")
    if found["bytes_vs_data_parallel"] is not None:
        say(
            f"bytes sent         {found['bytes_sent'] / 1e6:.1f} MB; data-parallel training in fp32 would have sent "
            f"{found['bytes_data_parallel'] / 1e6:.0f} MB, {found['bytes_vs_data_parallel']:.0f} times as much"
        )
    for peer, share in found["utilization"].items():
        seconds = found["compute_s"][peer]
        say(f"computing          {found['nicknames'][peer]:<20} {seconds:5.0f} s, {100 * share:.0f} % of its time")
    if found["audit"]["clean"]:
        say(f"audit              {found['audit']['rounds']} rounds: no data range lost, none doubled, all models agree")
    say(f"checkpoint         {found['checkpoint']}")
    say(f"took               {found['duration_s']:.0f} s")
    say("")
    if found["checkpoint"]:
        say(write(Path(found["checkpoint"]), "\nKING ", 300, temperature=0.8, top_k=50, seed=1))
    for sentence in found["broken"]:
        say(f"DID NOT HOLD: {sentence}")
