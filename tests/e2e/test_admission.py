"""The organizer's decisions as a user types them: who is banned is out within a round, and nobody restarts anything."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dugnad.coordinator.chain import Chain
from dugnad.dht.identity import Identity, PeerId, nickname
from dugnad.dht.invite import parse_invite
from tests.e2e.processes import Running, Start, dugnad, endless

pytestmark = pytest.mark.timeout(240)


def alone(directory: Path) -> Path:
    """A recipe without an end, whose rounds go on with a single volunteer."""
    recipe = endless(directory)
    recipe.write_text(recipe.read_text().replace("min_peers = 2", "min_peers = 1"))
    return recipe


def listed(directory: Path) -> Path:
    """The same, for those on the organizer's list."""
    recipe = alone(directory)
    recipe.write_text(recipe.read_text().replace('kind = "invited"', 'kind = "allow-list"'))
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


def test_a_run_that_is_resumed_is_where_its_invites_say_and_a_revoked_one_is_not_printed_again(
    start: Start, tmp_path: Path
) -> None:
    def stands(running: Running) -> tuple[tuple[str, ...], int]:
        said = running.until(lambda said: True, "a word")
        return parse_invite(said["invite"]).addresses, said["bulk_port"]

    coordinator = start("coordinator", "launch", alone(tmp_path), "--host", "0.0.0.0")
    first, stood = coordinator.invite(), stands(coordinator)
    volunteer = start("volunteer", "join", first)
    stood_too = stands(volunteer)
    volunteer.until(lambda said: counts(said) == 2, "being a member")
    coordinator.kill()
    volunteer.kill()
    resumed = start("coordinator", "launch", "--resume", coordinator.directory)
    assert stands(resumed) == stood
    ran("revoke", first, "--dir", coordinator.directory)
    second = ran("invite", "--dir", coordinator.directory).strip()
    assert second != first
    resumed.kill()
    offline = ran("invite", "--dir", coordinator.directory, "--uses", "2").strip()
    assert parse_invite(offline).addresses[: len(stood[0])] == stood[0]
    lasting = ran("invite", "--dir", coordinator.directory).strip()
    assert parse_invite(lasting).ticket == parse_invite(second).ticket
    again = start("coordinator", "launch", "--resume", coordinator.directory)
    assert stands(again) == stood
    assert again.until(lambda said: True, "a word")["invite"] == second
    assert stands(start("volunteer", "join", first)) == stood_too
    start("other", "join", offline).until(lambda said: counts(said) == 3, "a member by an invite that nobody saw made")


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


@pytest.mark.soak  # a minute; who is banned otherwise is tried above
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


def test_in_an_allow_list_run_whoever_is_on_the_list_takes_part_and_a_new_coordinator_by_run_key_alone(
    start: Start, tmp_path: Path
) -> None:
    coordinator = start("coordinator", "launch", listed(tmp_path))
    stranger = start("stranger", "join", coordinator.invite())
    run, elsewhere = coordinator.directory, tmp_path / "elsewhere"
    early = Identity.load_or_create(tmp_path / "early" / "identity.key").peer_id
    ran("allow", early, "--dir", run)
    other = start("early", "join", coordinator.invite())
    unlisted = refused(stranger)
    key = Identity.load_or_create(stranger.directory / "identity.key").peer_id
    assert unlisted == f"dugnad: E401 you are not on the allow-list. Your key: {key} (send it to the organizer)."
    name = f"{nickname(key)} ({key})"
    assert ran("allow", key, "--dir", run) == f"allowed {name}: it can join from now on\n"
    stranger = start("stranger", "join", coordinator.invite())
    coordinator.until(lambda said: {key, early} <= {*said["committee"]}, "both of the list")
    assert rounds_with(coordinator, key)
    ran("ban", key, "--dir", run)
    assert refused(stranger).startswith("dugnad: E403 the organizer has banned your key.")
    assert ran("unban", key, "--dir", run) == f"unbanned {name}: it can join again\n"
    stranger = start("stranger", "join", coordinator.invite())
    for one in (stranger, other):  # who are the quorum without the coordinator only once they know that they are
        one.until(lambda said: counts(said) == 3, "both again")
    coordinator.kill()
    elsewhere.mkdir()
    (run / "run.key").rename(elsewhere / "run.key")
    invite = ran("invite", "--dir", other.directory).strip()
    resumed = start("elsewhere", "launch", "--resume", elsewhere, "--invite", invite)
    resumed.until(lambda said: bool(said["leads"]), "leading in its own name")
    with contextlib.closing(Chain(elsewhere / "chain.sqlite", read_only=True)) as chain:
        assert any(commit.block.admissions for commit in chain.commits())
