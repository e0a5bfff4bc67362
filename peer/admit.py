"""What the organizer says of who may take part: tickets, and decisions that whoever is there spreads.

Both are signed here, with the run.key of a folder; no process needs it. A ticket is of use by itself. A decision is
handed to a role that runs, in that folder or in another (`through`), over its local HTTP: that it is the organizer's,
its signature says.
"""

import contextlib
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from dugnad.configs.recipe import decode
from dugnad.coordinator.roll import ALLOW_LIST, INVITED, OPEN
from dugnad.dht import decisions, records
from dugnad.dht.identity import Identity, PeerId, nickname, public_key_of
from dugnad.dht.invite import Invite, Pass, encode_invite, parse_invite
from dugnad.dht.multiaddrs import reaching_out
from dugnad.dht.ticket import Terms, day_of
from dugnad.dht.wire import WireError
from dugnad.peer import ask
from dugnad.peer.folder import Folder, Role

MAX_ADDRESSES = 16
_INVITE = "dugnad1:"
_DURATION = re.compile(r"(\d{1,6})\s*(min|h|d|w)")
_UNIT_S = {"min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def seconds_of(duration: str) -> int:
    """The seconds of "90min", "12h", "7d" or "2w". Raises AskError."""
    said = _DURATION.fullmatch(duration.strip())
    if said is None:
        raise ask.AskError(f'"{duration}" is no duration: a number and min, h, d or w, as in 7d')
    return int(said[1]) * _UNIT_S[said[2]]


def key_of(text: str) -> PeerId:
    """The peer of that key. Raises AskError."""
    try:
        public_key_of(PeerId(text))
    except ValueError as error:
        raise ask.AskError(f'"{text}" is no key of a peer ({error}). Its owner sees it in dugnad status.') from None
    return PeerId(text)


class Organizer:
    """Who has the run.key of a folder, and the role through which it is heard: of the same folder unless told.

    Raises AskError where there is no such key.
    """

    def __init__(self, directory: Path | None, through: Path | None = None) -> None:
        self.folder = Folder(directory) if directory is not None else ask.only_one()
        if not self.folder.has_run_key:
            raise ask.AskError(
                f"{self.folder.path}: there is no run.key here, and only who has it can decide who takes part. "
                "Name the folder that it is in with --dir."
            )
        self.key: Identity = self.folder.organizer()
        self._through = self.folder if through is None else Folder(through)

    # -- tickets

    def invite(self, terms: Mapping[str, Any], *, expires_s: int = 0, until_s: int = 0) -> tuple[str, str]:
        """An invite with a new ticket, and what it is good for, in words.

        expires_s, until_s: from now on; 0 for ever. Without any of these, the invite that the launch printed, or what
        came after it if that is revoked. Raises AskError where nobody knows where the run is, or where it asks for no
        ticket.
        """
        base, kind = self._base()
        asked = bool(terms) or expires_s > 0 or until_s > 0
        if kind != INVITED:
            if asked:
                raise ask.AskError(_NO_TICKETS[kind])
            return encode_invite(msgspec.structs.replace(base, ticket=None)), _NO_TICKETS[kind]
        now = self._now()
        given = Terms(
            **terms,
            expires=int(now + expires_s) if expires_s else 0,
            until=int(now + until_s) if until_s else 0,
        )
        from dugnad.peer.roles import lasting_ticket

        if asked:
            new = Pass.issue(self.key, base.run, os.urandom(32), given)
        else:
            revoked = self._revoked(base.run)
            new = lasting_ticket(self.key, base.run, lambda ticket: ticket.hex() in revoked)
        return encode_invite(msgspec.structs.replace(base, ticket=new)), _in_words(given)

    def _base(self) -> tuple[Invite, str]:
        """An invite that leads to the run, and whom the run admits: as a living role knows, or else our own disk."""
        if self._living() is not None:
            said = self._status()
            base = parse_invite(said["invite"])
            if base.organizer != self.key.public_key:  # a ticket that this key signs is good for nothing there
                raise ask.AskError(
                    f"{self._through.path}: the role there takes part in run {base.run.hex()[:8]}, whose key the "
                    f"run.key in {self.folder.path} is not. Name the folder of a role of its run with --through."
                )
            return base, said["admission"]
        genesis = self._through.genesis()
        if genesis is None or genesis.organizer != self.key.peer_id:
            raise ask.AskError(
                f"{self._through.path}: no run of this run.key is here, and no role of it runs here. Name the folder "
                "of one that does with --through: a volunteer's will do."
            )
        last = self._through.listened()
        own = () if last is None else last.addresses
        addresses = reaching_out((*own, *self._through.remembered()))[:MAX_ADDRESSES]
        if not addresses:
            raise ask.AskError(f"{self._through.path}: it is not known here where any peer is. Start a role first.")
        recipe = decode(genesis.recipe)
        return Invite(genesis.run, self.key.public_key, addresses, recipe.name), recipe.admission.kind

    def _revoked(self, run: bytes) -> set[str]:
        """The ids of the tickets that were revoked: as a living role knows, or as one has kept."""
        if self._living() is not None:
            return {one["subject"] for one in self._known() if one["verdict"] == "revoke"}
        revoked = set()
        for raw in self._through.decisions():
            with contextlib.suppress(WireError):
                record = records.parse_of_any_time(raw, run)
                decisions.check(record, self.key.peer_id)
                revoked |= {record.key} if decisions.Decision.of(record).verdict == "revoke" else set()
        return revoked

    # -- decisions

    def decide(self, who: str, verdict: str, reason: str = "") -> tuple[str, str]:
        """Decide about a peer (a key, or a nickname that one peer has), or about the ticket of an invite, for everyone.

        Returns who that is, for people, and what keeps it out all the same, "" if nothing does. Raises AskError where
        nobody can be told, where it is not clear who is meant, or where that can't be said of it or in this run.
        """
        of_invite = who.startswith(_INVITE)
        if verdict == "revoke" and not of_invite:
            raise ask.AskError(
                f'"{who}" is no invite: revoke takes the whole text of one, {_INVITE}... To put a peer out: dugnad ban'
            )
        if verdict != "revoke" and of_invite:
            raise ask.AskError(f"that is an invite, and no peer. To let nobody in by it: dugnad revoke {_INVITE}...")
        if self._living() is None:
            raise ask.AskError(
                f"{self._through.path}: no role is running here that could tell the others. Name the folder of one "
                "that is with --through DIR: a volunteer's will do."
            )
        said, known = self._status(), self._known()
        if verdict == "allow" and said["admission"] != ALLOW_LIST:
            raise ask.AskError(_NO_LIST[said["admission"]].format(key=who))
        run = bytes.fromhex(said["run"])
        subject, name = _ticket(who, run) if of_invite else _peer(who, said, known)
        after_s = max((one["at_s"] for one in known if one["subject"] == subject), default=0.0)
        try:
            record = decisions.decide(self.key, run, subject, verdict, reason, now=self._now(), after_s=after_s)
        except ValueError as error:
            raise ask.AskError(f"that can't be said: {error}") from error
        refused = self._request("/decision", record.raw)["refused"]
        if refused is not None:
            raise ask.AskError(f"{self._through.path}: the role there refuses it: {refused}")
        return name, _still_out(subject, verdict, said["admission"], known)

    # -- the role through which we are heard

    def _living(self) -> Role | None:
        role = self._through.role()
        return role if role is not None and role.alive else None

    def _status(self) -> dict[str, Any]:
        said = ask.status(self._through.path)
        if not said:
            raise ask.AskError(f"{self._through.path}: the role there is only starting. Try again in a moment.")
        return said

    def _known(self) -> list[dict[str, Any]]:
        """What was decided before, as that role knows."""
        return list(self._request("/decisions"))

    def _now(self) -> float:
        """The run's time, unix seconds, as that role knows it."""
        offset_s = 0.0 if self._living() is None else float(self._status()["clock_offset_s"])
        return self._clock_s() + offset_s

    @staticmethod
    def _clock_s() -> float:
        """This machine's clock, which may err."""
        return time.time()

    def _request(self, path: str, body: bytes | None = None) -> Any:
        return ask.answer(self._through, path, body)


def _ticket(invite: str, run: bytes) -> tuple[str, str]:
    """The id of the ticket in an invite, and its name for people. Raises AskError."""
    given = parse_invite(invite)
    if given.run != run or given.ticket is None:
        raise ask.AskError("that invite holds no ticket of this run")
    ticket = given.ticket.of(run, Identity.from_seed(given.ticket.seed).peer_id).id.hex()
    return ticket, f"ticket {ticket[:8]}"


def _peer(who: str, said: dict[str, Any], known: list[dict[str, Any]]) -> tuple[str, str]:
    """The key of a peer, and its name for people; `who` is one of the two. Raises AskError."""
    with contextlib.suppress(ValueError):
        public_key_of(PeerId(who))
        return who, f"{nickname(PeerId(who))} ({who})"
    known_peers = {said["peer"], said["coordinator"]["peer"], *said["committee"]}
    known_peers |= {peer["peer"] for peer in (*said["peers"], *said.get("paths", ()))}
    known_peers |= {one["subject"] for one in known if one["verdict"] != "revoke"}
    found = sorted(peer for peer in known_peers if nickname(PeerId(peer)) == who)
    if len(found) == 1:
        return found[0], f"{who} ({found[0]})"
    if found:
        keys = "\n".join(f"     {peer}" for peer in found)
        raise ask.AskError(f"{len(found)} peers are called {who}; say which by its key:\n{keys}")
    raise ask.AskError(
        f"nobody here is called {who}. Name the peer by its key, 12D3KooW...; dugnad status lists who is here."
    )


def _still_out(subject: str, verdict: str, admission: str, known: list[dict[str, Any]]) -> str:
    """Why that peer can't join though this was said of it; "" if it can, by all that was `known` before."""
    before = {one["verdict"] for one in known if one["subject"] == subject}
    if verdict == "allow" and "ban" in before:
        return f"it is banned all the same, until you say: dugnad unban {subject}"
    if verdict == "unban" and admission == ALLOW_LIST and "allow" not in before:
        return f"it is not on the allow-list; to put it there: dugnad allow {subject}"
    return ""


def _in_words(terms: Terms) -> str:
    places = "any number of members" if not terms.uses else "1 member" if terms.uses == 1 else f"{terms.uses} members"
    whose = f", for {terms.bound} alone" if terms.bound else ""
    claimed = f", to be used by {day_of(terms.expires)}" if terms.expires else ""
    lasts = f"; they are members until {day_of(terms.until)}" if terms.until else ""
    return f"good for {places}{whose}{claimed}{lasts}"


_NO_TICKETS = {
    OPEN: "this run is open: anyone may join by this invite, for whom it is and until when can't be limited",
    ALLOW_LIST: "this run has an allow-list: whoever joins by this invite needs your word as well: dugnad allow KEY",
}
_NO_LIST = {
    OPEN: "this run has no allow-list: it is open, and anyone may join who is not banned. To lift a ban: dugnad unban",
    INVITED: "this run has no allow-list: its members come by invitation. An invite for that peer alone: "
    "dugnad invite --key {key}",
}
