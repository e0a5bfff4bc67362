"""The organizer's words from the command line: tickets signed offline, decisions handed to whoever is there."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from dugnad.configs.recipe import AdmissionSettings, encode, load
from dugnad.coordinator.chain import Chain
from dugnad.coordinator.messages import Genesis
from dugnad.dht import records
from dugnad.dht.decisions import Decision, Decisions, check
from dugnad.dht.identity import Identity, PeerId, nickname
from dugnad.dht.invite import Invite, encode_invite, parse_invite
from dugnad.dht.invite import check as check_invite
from dugnad.peer import admit, cli
from dugnad.peer.admit import Organizer, seconds_of
from dugnad.peer.ask import AskError
from dugnad.peer.folder import Folder, Role
from dugnad.peer.network import Listened, Said

ANN, EVE = (Identity.from_seed(bytes([k]) * 32).peer_id for k in range(1, 3))
NOW = 1_700_000_000.0


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """The folder of a coordinator of an invited run that is not running now."""
    return launched(Folder(tmp_path / "run"))


def launched(folder: Folder, kind: Any = "invited") -> Folder:
    folder.create()
    recipe = dataclasses.replace(load("tiny-books"), admission=AdmissionSettings(kind=kind))
    me = folder.identity().peer_id
    with contextlib.closing(Chain(folder.chain)) as chain:
        chain.found(Genesis(encode(recipe), folder.organizer().peer_id, me, bytes(8), bytes(32)))
    led_by(folder, f"/ip4/127.0.0.1/tcp/4001/p2p/{me}")
    return folder


def led_by(folder: Folder, *addresses: str) -> None:
    """Keep what invites said of the role there while it ran."""
    folder.keep_listened(Listened(said=Said(host="0.0.0.0"), port=4001, bulk_port=4002, addresses=addresses))


def made(folder: Folder, *options: str) -> Invite:
    said = CliRunner().invoke(cli.app, ["invite", "--dir", str(folder.path), *options])
    assert said.exit_code == 0, said.output
    return parse_invite(said.stdout)


@pytest.mark.parametrize(
    ("said", "seconds"), [("90min", 5400), ("12h", 43_200), ("7d", 604_800), ("2w", 1_209_600), (" 1 d ", 86_400)]
)
def test_durations_are_read_as_people_write_them(said: str, seconds: int) -> None:
    assert seconds_of(said) == seconds


@pytest.mark.parametrize("said", ["", "7", "d", "-1d", "7 days", "1.5h"])
def test_what_is_no_duration_is_told_with_one_that_is(said: str) -> None:
    with pytest.raises(AskError, match="as in 7d"):
        seconds_of(said)


def test_a_ticket_is_signed_where_run_key_is_though_nobody_runs(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Organizer, "_clock_s", staticmethod(lambda: NOW))
    invite = made(folder, "--uses", "20", "--expires", "7d", "--until", "2w", "--key", ANN)
    ticket = invite.ticket
    assert ticket is not None
    assert (ticket.uses, ticket.bound) == (20, ANN)
    assert (ticket.expires, ticket.until) == (NOW + 604_800, NOW + 1_209_600)
    assert invite.addresses == (f"/ip4/127.0.0.1/tcp/4001/p2p/{folder.identity().peer_id}",)
    check_invite(invite, ANN, now=NOW)


def test_where_nobody_runs_an_invite_names_what_invites_named_while_someone_did(folder: Folder) -> None:
    me = folder.identity().peer_id
    own, other = f"/ip4/203.0.113.7/tcp/4001/p2p/{me}", f"/ip4/198.51.100.9/tcp/4001/p2p/{ANN}"
    led_by(folder, own)
    folder.remember([other, f"/ip4/127.0.0.1/tcp/5/p2p/{ANN}"])
    assert made(folder, "--uses", "2").addresses == (own, other)
    assert made(folder).addresses == (own, other)


def test_a_role_of_another_run_leads_to_no_invite(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = launched(Folder(tmp_path / "other"))
    Living(other, monkeypatch, [])
    for options in ([], ["--uses", "5"]):
        command = ["invite", "--dir", str(folder.path), "--through", str(other.path), *options]
        said = CliRunner().invoke(cli.app, command)
        assert (said.exit_code, said.stdout) == (1, "")
        assert f"{other.path}: the role there takes part in run" in said.stderr


def test_each_new_ticket_is_another_and_without_terms_it_is_that_of_the_launch(folder: Folder) -> None:
    one, other = made(folder, "--uses", "2").ticket, made(folder, "--uses", "2").ticket
    assert one is not None
    assert other is not None
    assert one.seed != other.seed
    assert made(folder) == made(folder)


def test_where_run_key_is_not_nobody_makes_a_ticket(folder: Folder) -> None:
    (folder.path / "run.key").unlink()
    for command in (["invite", "--uses", "2"], ["ban", ANN], ["unban", ANN], ["allow", ANN]):
        said = CliRunner().invoke(cli.app, [*command, "--dir", str(folder.path)])
        assert (said.exit_code, "no run.key here" in said.stderr) == (1, True), said.stderr


@pytest.mark.parametrize(("kind", "words"), [("open", "this run is open"), ("allow-list", "dugnad allow KEY")])
def test_a_run_that_asks_for_no_ticket_gets_none(tmp_path: Path, kind: str, words: str) -> None:
    folder = launched(Folder(tmp_path / "run"), kind)
    said = CliRunner().invoke(cli.app, ["invite", "--dir", str(folder.path)])
    assert parse_invite(said.stdout).ticket is None
    assert words in said.stderr
    refused = CliRunner().invoke(cli.app, ["invite", "--dir", str(folder.path), "--uses", "2"])
    assert (refused.exit_code, words in refused.stderr) == (1, True)


def test_a_decision_needs_somebody_who_spreads_it(folder: Folder) -> None:
    said = CliRunner().invoke(cli.app, ["ban", ANN, "--dir", str(folder.path)])
    assert said.exit_code == 1
    assert "--through" in said.stderr


class Living:
    """A role that runs in the folder, and takes what it is told."""

    def __init__(self, folder: Folder, patch: pytest.MonkeyPatch, peers: list[PeerId]) -> None:
        self.folder, self.peers, self.refuses = folder, peers, None
        self.admission = "invited"
        self.paths: list[PeerId] = []
        self.taken: list[records.Record] = []
        self.run = b""
        with contextlib.closing(Chain(folder.chain, read_only=True)) as chain:
            genesis = chain.genesis()
            assert genesis is not None
            self.run = genesis.run
        last = folder.listened()
        assert last is not None
        self.invite = Invite(self.run, folder.organizer().public_key, last.addresses, "tiny-books")
        role = Role("coordinator", self.run.hex(), "tiny-books", 1, 0.0, "http://here")
        patch.setattr(Organizer, "_living", lambda organizer: role)
        patch.setattr(Organizer, "_status", lambda organizer: self.status())
        patch.setattr(Organizer, "_request", lambda organizer, path, body=None: self.answer(path, body))

    def status(self) -> dict[str, Any]:
        return {
            "run": self.run.hex(), "peer": ANN, "coordinator": {"peer": ANN}, "committee": [ANN],
            "admission": self.admission, "peers": [{"peer": peer} for peer in self.peers], "clock_offset_s": 100.0,
            "paths": [{"peer": peer} for peer in self.paths],
            "invite": encode_invite(self.invite),
        }  # fmt: skip

    def answer(self, path: str, body: bytes | None) -> Any:
        if path == "/decisions":
            known = Decisions()
            known.replace(map(Decision.of, self.taken))
            return [json.loads(msgspec.json.encode(_row(said))) for said in known.holding(now=NOW)]
        assert path == "/decision"
        assert body is not None
        record = records.parse_of_any_time(body, self.run)
        check(record, self.folder.organizer().peer_id)
        self.taken.append(record)
        return {"refused": self.refuses}


def _row(said: Decision) -> dict[str, object]:
    return {"subject": said.subject, "verdict": said.verdict, "reason": said.reason, "at_s": said.at_s}


def test_a_ban_names_whom_it_meant_and_its_unban_is_newer_whatever_the_clock(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    living = Living(folder, monkeypatch, [EVE])
    clock = iter([NOW, NOW - 500])
    monkeypatch.setattr(Organizer, "_clock_s", staticmethod(lambda: next(clock)))
    run = CliRunner().invoke
    banned = run(cli.app, ["ban", nickname(EVE), "--reason", "poison", "--dir", str(folder.path)])
    assert banned.stdout == f"banned {nickname(EVE)} ({EVE}): out from the next round on\n"
    unbanned = run(cli.app, ["unban", nickname(EVE), "--dir", str(folder.path)])
    assert unbanned.stdout == f"unbanned {nickname(EVE)} ({EVE}): it can join again\n"
    first, second = (Decision.of(record) for record in living.taken)
    assert (first.verdict, first.reason, first.subject) == ("ban", "poison", EVE)
    assert first.at_s == NOW + 100.0, "by the run's clock, not this machine's"
    assert second.verdict == "unban"
    assert second.at_s > first.at_s


def test_who_is_meant_must_be_clear(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    Living(folder, monkeypatch, [EVE])
    monkeypatch.setattr(admit, "nickname", lambda peer: "grey-finch")
    run = CliRunner().invoke
    several = run(cli.app, ["ban", "grey-finch", "--dir", str(folder.path)])
    assert several.exit_code == 1
    assert "2 peers are called grey-finch" in several.stderr
    assert ANN in several.stderr
    assert EVE in several.stderr
    nobody = run(cli.app, ["ban", "red-fox", "--dir", str(folder.path)])
    assert "nobody here is called red-fox" in nobody.stderr


def test_whoever_dugnad_peers_shows_can_be_named(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    living = Living(folder, monkeypatch, [])
    living.paths = [EVE]
    said = CliRunner().invoke(cli.app, ["ban", nickname(EVE), "--dir", str(folder.path)])
    assert said.stdout == f"banned {nickname(EVE)} ({EVE}): out from the next round on\n", said.stderr


def test_an_invite_that_got_about_is_revoked_by_its_text(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    said = CliRunner().invoke(cli.app, ["invite", "--dir", str(folder.path), "--uses", "5"])
    invite = parse_invite(said.stdout)
    living = Living(folder, monkeypatch, [])
    revoked = CliRunner().invoke(cli.app, ["revoke", said.stdout.strip(), "--dir", str(folder.path)])
    assert revoked.exit_code == 0, revoked.output
    assert invite.ticket is not None
    key = Identity.from_seed(invite.ticket.seed).peer_id
    assert living.taken[0].key == invite.ticket.of(invite.run, key).id.hex()


@pytest.mark.parametrize(
    ("command", "of_invite", "advice"),
    [
        ("ban", True, "dugnad revoke dugnad1:"),
        ("unban", True, "dugnad revoke dugnad1:"),
        ("allow", True, "is no key of a peer"),
        ("revoke", False, "To put a peer out: dugnad ban"),
    ],
)
def test_a_word_of_the_wrong_sort_of_subject_is_not_signed(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, command: str, of_invite: bool, advice: str
) -> None:
    invite = CliRunner().invoke(cli.app, ["invite", "--dir", str(folder.path), "--uses", "5"]).stdout.strip()
    living = Living(folder, monkeypatch, [EVE])
    living.admission = "allow-list"
    said = CliRunner().invoke(cli.app, [command, invite if of_invite else EVE, "--dir", str(folder.path)])
    assert (said.exit_code, advice in said.stderr) == (1, True), said.stderr
    assert living.taken == []


@pytest.mark.parametrize(
    ("admission", "advice"),
    [("invited", f"dugnad invite --key {EVE}"), ("open", "anyone may join who is not banned")],
)
def test_nobody_is_put_on_a_list_that_the_run_does_not_have(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, admission: str, advice: str
) -> None:
    living = Living(folder, monkeypatch, [EVE])
    living.admission = admission
    said = CliRunner().invoke(cli.app, ["allow", EVE, "--dir", str(folder.path)])
    assert (said.exit_code, advice in said.stderr) == (1, True), said.stderr
    assert living.taken == []


def test_what_is_said_of_list_and_ban_is_what_then_is_so(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    living = Living(folder, monkeypatch, [EVE])
    living.admission = "allow-list"

    def said(command: str) -> str:
        done = CliRunner().invoke(cli.app, [command, EVE, "--dir", str(folder.path)])
        assert done.exit_code == 0, done.output
        return done.stdout.partition(": ")[2].strip()

    assert said("ban") == "out from the next round on"
    assert said("unban") == f"it is not on the allow-list; to put it there: dugnad allow {EVE}"
    assert said("ban") == "out from the next round on"
    assert said("allow") == f"it is banned all the same, until you say: dugnad unban {EVE}"
    assert said("unban") == "it can join again"


def revoke(folder: Folder, text: str) -> None:
    revoked = CliRunner().invoke(cli.app, ["revoke", text, "--dir", str(folder.path)])
    assert revoked.exit_code == 0, revoked.output


def test_no_invite_is_handed_out_that_was_revoked(folder: Folder) -> None:
    first = made(folder)
    assert first.ticket is not None
    with pytest.MonkeyPatch.context() as patch:
        living = Living(folder, patch, [])
        assert made(folder) == first
        revoke(folder, encode_invite(first))
        second = made(folder)
        assert second.ticket is not None
        assert second.ticket.seed != first.ticket.seed
        assert (second.ticket.uses, second.ticket.expires) == (0, 0)
        revoke(folder, encode_invite(made(folder, "--uses", "1")))
        assert made(folder) == second, "another one's end is not its"
    kept = [b"nonsense", *(record.raw for record in living.taken)]
    (folder.path / "decisions").write_bytes(msgspec.msgpack.encode(kept))
    assert made(folder) == second, "nor is it when nobody runs any more"


def test_what_the_role_refuses_is_told(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    living = Living(folder, monkeypatch, [EVE])
    living.refuses = "not the organizer"  # type: ignore[assignment]
    said = CliRunner().invoke(cli.app, ["ban", EVE, "--dir", str(folder.path)])
    assert said.exit_code == 1
    assert "not the organizer" in said.stderr
