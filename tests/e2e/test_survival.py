"""No single death matters: real processes are killed, frozen and started anew, and the run goes on."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dugnad.coordinator.chain import Chain
from tests.e2e.processes import PATIENCE_S, Running, Start, dugnad, endless
from tests.e2e.test_commands import at_round, audited

pytestmark = pytest.mark.timeout(240)


def launched(start: Start, directory: Path, volunteers: int) -> tuple[Running, list[Running]]:
    """A coordinator and so many volunteers, all in the committee, of a run without an end."""
    coordinator = start("coordinator", "launch", endless(directory))
    invite = coordinator.invite()
    others = [start(f"v{k}", "join", invite) for k in range(volunteers)]
    coordinator.until(lambda said: at_round(2)(said) and len(said["committee"]) == volunteers + 1, "a full committee")
    return coordinator, others


def round_of(one: Running) -> int:
    said = one.status()
    assert said is not None, one.text()
    return int(said["round"])


def two_rounds_later(one: Running) -> dict[str, Any]:
    """The status of `one` after two more rounds are committed."""
    now = round_of(one)
    return one.until(at_round(now + 2), "two more rounds")


def kill_between_votes(one: Running) -> None:
    """SIGKILL when it has promised a prevote and no lock has come: it is stopped first, and then looked at."""
    chain = Chain(one.directory / "chain.sqlite", read_only=True)

    def prevoted() -> bool:
        said = chain.promises()
        if said is None or said.prevoted is None or said.round <= chain.head_round():
            return False
        return said.lock is None or said.lock.view < said.prevoted.view

    try:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if prevoted():
                os.kill(one.process.pid, signal.SIGSTOP)
                if prevoted():
                    one.kill()
                    return
                os.kill(one.process.pid, signal.SIGCONT)
        raise AssertionError(f"never seen between two votes:\n{one.text()}")
    finally:
        chain.close()


def blocks(directory: Path) -> list[bytes]:
    chain = Chain(directory / "chain.sqlite", read_only=True)
    try:
        return [commit.block.hash for commit in chain.commits()]
    finally:
        chain.close()


def assert_one_history(directories: list[Path]) -> None:
    """Every chain is a beginning of the longest one, and that one proves that nothing was lost or counted twice."""
    chains = {directory: blocks(directory) for directory in directories}
    longest = max(chains, key=lambda directory: len(chains[directory]))
    for directory, chain in chains.items():
        assert chain == chains[longest][: len(chain)], f"{directory} holds another history"
    found = audited(longest)
    assert found["ranges_lost"] == found["ranges_doubled"] == []
    assert found["digests_agree"]


def test_one_death_after_the_other_costs_no_round_and_no_data(start: Start, tmp_path: Path) -> None:
    coordinator, volunteers = launched(start, tmp_path, 6)
    coordinator.until(at_round(3), "third round")
    everyone = [coordinator, *volunteers]
    coordinator.kill()
    witness = volunteers[0]
    said = two_rounds_later(witness)
    assert not said["coordinator"]["alive"]
    assert said["coordinator"]["gone_s"] > 0

    volunteers[1].until(lambda said: said["state"] == "reducing", "its part in the all-reduce")
    volunteers[1].kill()
    two_rounds_later(witness)

    kill_between_votes(volunteers[2])
    two_rounds_later(witness)

    frozen = volunteers[3]
    os.kill(frozen.process.pid, signal.SIGSTOP)
    try:
        two_rounds_later(witness)
    finally:
        os.kill(frozen.process.pid, signal.SIGCONT)
    # else those who are killed next could be half of the committee, and then nobody may go on
    thawed = frozen.until(lambda said: True, "a word")["peer"]
    witness.until(lambda said: thawed in said["committee"], "the frozen one back in the committee")

    # one joins through a peer of the swarm, since its coordinator is gone, while its donors are killed
    invite = dugnad("invite", "--dir", witness.directory)
    assert invite.returncode == 0, invite.stderr
    joiner = start("joiner", "join", invite.stdout.strip())
    everyone.append(joiner)
    volunteers[4].kill()
    two_rounds_later(witness)
    volunteers[5].kill()
    joiner.until(lambda said: said["model_digest"] is not None and said["step"] > 0, "its own training")
    two_rounds_later(witness)
    assert_one_history([one.directory for one in everyone])


def test_all_are_killed_at_once_and_go_on_from_their_disks(start: Start, tmp_path: Path) -> None:
    coordinator, volunteers = launched(start, tmp_path, 3)
    coordinator.until(at_round(5), "fifth round")
    everyone = [coordinator, *volunteers]
    for one in everyone:
        one.kill()
    stood_at = max(len(blocks(one.directory)) for one in everyone)
    again = [start("coordinator", "launch", "--resume", coordinator.directory)]
    again += [start(one.directory.name, "join", coordinator.invite()) for one in volunteers]
    again[1].until(at_round(stood_at + 2), "two more rounds")
    assert_one_history([one.directory for one in again])
    for one in again:  # each from its own disk: nobody asks another for the model
        assert "taking the model from peers" not in one.text().rpartition("metrics  ")[2], one.text()


def test_a_coordinator_comes_back_on_an_empty_disk_with_the_run_key_and_of_two_the_newer_leads(
    start: Start, tmp_path: Path
) -> None:
    coordinator, volunteers = launched(start, tmp_path, 3)
    coordinator.kill()
    two_rounds_later(volunteers[0])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "run.key").write_bytes((coordinator.directory / "run.key").read_bytes())
    invite = dugnad("invite", "--dir", volunteers[0].directory).stdout.strip()
    back = start("elsewhere", "launch", "--resume", elsewhere, "--invite", invite)
    said = back.until(lambda said: said["leads"] and said["round"] > 3, "the lead again")
    assert said["state"] in ("idle", "gather", "reduce", "vote")
    two_rounds_later(volunteers[0])
    told = volunteers[0].until(lambda said: said["coordinator"]["alive"], "the coordinator")
    assert told["coordinator"]["peer"] == said["peer"]

    # and the first one is started again by mistake: the newer word of the organizer counts
    first = start("coordinator", "launch", "--resume", coordinator.directory)
    first.until(lambda said: said["leads"] and said["round"] > told["round"], "the lead of the newer one")
    back.until(lambda said: said["reason"].startswith("yields: "), "the older one to say that it yields")
    assert "yields: another coordinator was started later" in back.text()
    assert_one_history([elsewhere, *(one.directory for one in (coordinator, *volunteers))])


@pytest.mark.soak
def test_the_organizer_begins_an_epoch_when_most_of_a_committee_is_gone_for_good(start: Start, tmp_path: Path) -> None:
    coordinator, volunteers = launched(start, tmp_path, 4)
    for one in volunteers[:3]:
        one.kill()
    last = volunteers[3]
    time.sleep(8)  # past the silence after which they count as lost: nothing is committed any more
    stood_at = round_of(last)
    coordinator.interrupt()
    coordinator.ended(120)
    recovered = dugnad("recover", coordinator.directory, "--yes")
    assert recovered.returncode == 0, recovered.stderr
    assert "epoch 1 begins" in recovered.stdout
    back = start("coordinator", "launch", "--resume", coordinator.directory)
    back.until(lambda said: said["epoch"] == 1, "the new epoch")
    newcomer = start("newcomer", "join", back.invite())
    back.until(at_round(stood_at + 3), "rounds in the new epoch")
    assert_one_history([coordinator.directory, last.directory, newcomer.directory])
