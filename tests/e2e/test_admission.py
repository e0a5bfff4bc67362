"""The organizer's decisions as a user types them: who is banned is out within a round, and nobody restarts anything."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dugnad.coordinator.chain import Chain
from dugnad.dht.identity import PeerId, nickname
from tests.e2e.processes import Running, Start, dugnad, endless

pytestmark = pytest.mark.timeout(240)


def alone(directory: Path) -> Path:
    """A recipe without an end, whose rounds go on with a single volunteer."""
    recipe = endless(directory)
    recipe.write_text(recipe.read_text().replace("min_peers = 2", "min_peers = 1"))
    return recipe


def counts(said: dict[str, Any]) -> int:
    return len(said["committee"])


def at_round(round_: int) -> Callable[[dict[str, Any]], bool]:
    return lambda said: bool(said["round"] >= round_)


def rounds_with(running: Running, peer: PeerId) -> list[int]:
    """In which rounds the work of `peer` counted."""
    with contextlib.closing(Chain(running.directory / "chain.sqlite", read_only=True)) as chain:
        return [one.block.round for one in chain.commits() if any(entry.peer == peer for entry in one.block.entries)]


def ran(*arguments: str | Path) -> str:
    done = dugnad(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(running: Running) -> str:
    """The last words of a role that may not take part."""
    assert running.ended() == 1, running.text()
    return running.text().strip().splitlines()[-1]


def test_who_is_banned_by_its_nickname_is_out_within_a_round_and_unbanned_is_back(start: Start, tmp_path: Path) -> None:
    coordinator = start("coordinator", "launch", alone(tmp_path))
    assert coordinator.invite()  # it is up
    invite = ran("invite", "--dir", coordinator.directory, "--uses", "2", "--expires", "1h").strip()
    volunteers = [start(f"volunteer-{k}", "join", invite) for k in range(2)]
    coordinator.until(lambda said: counts(said) == 3, "both volunteers")
    banned, other = volunteers
    peer = (banned.status() or {})["peer"]
    told = ran("ban", nickname(peer), "--reason", "poison", "--dir", coordinator.directory)
    assert told == f"banned {nickname(peer)} ({peer}): out from the next round on\n"
    at = (coordinator.status() or {})["round"]
    assert (
        refused(banned)
        == "dugnad: E403 the organizer has banned your key (poison). Only the organizer can take that back."
    )
    coordinator.until(at_round(at + 3), "rounds without it")
    assert [round_ for round_ in rounds_with(coordinator, peer) if round_ > at + 1] == []
    again = start("volunteer-0", "join", invite)
    assert refused(again).startswith("dugnad: E403")
    # the organizer takes run.key offline: it is heard through whoever is there, and the coordinator goes on without it
    offline = tmp_path / "offline"
    offline.mkdir()
    (coordinator.directory / "run.key").rename(offline / "run.key")
    told = ran("unban", nickname(peer), "--dir", offline, "--through", other.directory)
    assert told == f"unbanned {nickname(peer)} ({peer}): it can join again\n"
    start("volunteer-0", "join", invite).until(lambda said: peer in said["committee"], "being back")
    coordinator.kill()
    resumed = start("coordinator", "launch", "--resume", coordinator.directory)
    resumed.until(lambda said: bool(said["leads"]), "leading again by the delegation that it was left with")


def test_a_banned_coordinator_tells_the_others_and_stays_out_until_it_is_unbanned(start: Start, tmp_path: Path) -> None:
    coordinator = start("coordinator", "launch", alone(tmp_path))
    volunteers = [start(f"volunteer-{k}", "join", coordinator.invite()) for k in range(2)]
    me = coordinator.until(lambda said: counts(said) == 3, "both volunteers")["peer"]
    banned = "dugnad: E403 the organizer has banned your key (moved). Only the organizer can take that back."
    ran("ban", me, "--reason", "moved", "--dir", coordinator.directory)
    assert refused(coordinator) == banned
    for one in volunteers:
        at = one.until(lambda said: me not in said["committee"], "a committee without it")["round"]
        one.until(at_round(at + 2), "rounds without it")
    resumed = start("coordinator", "launch", "--resume", coordinator.directory)
    assert refused(resumed) == banned
    ran("unban", me, "--dir", coordinator.directory, "--through", volunteers[1].directory)
    resumed = start("coordinator", "launch", "--resume", coordinator.directory)
    resumed.until(lambda said: bool(said["leads"]), "leading again")
    ran("ban", me, "--reason", "moved", "--dir", coordinator.directory)
    assert refused(resumed) == banned
    for one in volunteers:
        one.kill()
    resumed = start("coordinator", "launch", "--resume", coordinator.directory)
    assert refused(resumed) == banned, "it finds nobody, and remembers"
