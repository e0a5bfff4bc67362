"""What the organizer has decided about peers and tickets: the newest word in each register counts.

    register   of a     verdicts     says
    allow      peer     allow        it is on the list of an allow-list run
    ban        peer     ban, unban   it is out; unban: as if it had never been banned
    revoke     ticket   revoke       nobody comes in by it any more

Decisions are records (`records.py`), by the organizer's key or by one that it delegated to; what a delegate decides
ends with its delegation, and then is as if it had never been said. Where the organizer has spoken itself, no delegate
is heard: whoever steals a delegated key takes back nothing. They spread by gossip like all records, so that a ban holds
for everyone within seconds; and each peer keeps them on its disk.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dugnad.dht import identity as keys
from dugnad.dht import records
from dugnad.dht.delegation import Delegation, ends, is_delegated
from dugnad.dht.identity import Identity, PeerId, public_key_of
from dugnad.dht.records import DECISION_S, DecisionBody, Record
from dugnad.dht.wire import Verify, WireError

_REGISTER_OF = {"allow": "allow", "ban": "ban", "unban": "ban", "revoke": "revoke"}
_TICKET = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided about `subject`, a peer or the id of a ticket in hex; times in unix seconds."""

    subject: str
    verdict: str
    reason: str
    at_s: float
    expires_s: float
    raw: bytes
    """The record that says so; of two of one moment the greater counts."""
    by: PeerId | None = None
    """The delegate that says so; None for the organizer itself."""

    @classmethod
    def of(cls, record: Record) -> "Decision":
        """What a record of such a kind says."""
        body = record.body
        assert isinstance(body, DecisionBody)
        by = record.owner if body.delegation is not None else None
        issued_s, expires_s = record.issued_ms / 1000, record.expires_ms / 1000
        return cls(record.key, body.verdict, body.reason, issued_s, expires_s, record.raw, by)

    @property
    def register(self) -> str:
        """To what it is an entry: one of `records.REGISTERS`."""
        return _REGISTER_OF[self.verdict]

    @property
    def _rank(self) -> tuple[bool, float, bytes]:
        """Of two that hold, the one of the higher rank counts."""
        return self.by is None, self.at_s, self.raw


class Decisions:
    """What the organizer and its delegates said last of each subject in each register, of what is taken in."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, str], dict[PeerId | None, Decision]] = {}
        """Register and subject -> the newest of each who decided there."""
        self._banned: dict[PeerId, Decision] = {}
        self._banned_from_s, self._banned_until_s = 0.0, 0.0
        """When just those are banned: from the one moment on, up to the other."""

    def take(self, said: Decision) -> bool:
        """Take a decision of whoever may decide; whether it is the newest of its own on that."""
        of_all = self._said.setdefault((said.register, said.subject), {})
        known = of_all.get(said.by)
        if known is not None and known._rank >= said._rank:
            return False
        of_all[said.by] = said
        self._banned_from_s = self._banned_until_s = 0.0
        return True

    def replace(self, standing: Iterable[Decision]) -> None:
        """Know those, and nothing else."""
        self._said.clear()
        self._banned_from_s = self._banned_until_s = 0.0
        for said in standing:
            self.take(said)

    def on(self, register: str, subject: str, *, now: float) -> Decision | None:
        """What counts in that register of that peer or ticket at `now`."""
        holding = [said for said in self._said.get((register, subject), {}).values() if now < said.expires_s]
        return max(holding, key=lambda said: said._rank, default=None)

    def banned(self, *, now: float) -> Mapping[PeerId, Decision]:
        """Everyone who is banned at `now`, and by what."""
        if not self._banned_from_s <= now < self._banned_until_s:
            self._look_who_is_banned(now)
        return self._banned

    def holding(self, *, now: float) -> list[Decision]:
        """What counts at `now`, one for each subject in each register, oldest first."""
        found = (self.on(register, subject, now=now) for register, subject in self._said)
        return sorted((said for said in found if said is not None), key=lambda said: (said.at_s, said.subject))

    def all(self) -> list[Decision]:
        """All that was taken and not replaced, whether it counts or not."""
        return [said for of_all in self._said.values() for said in of_all.values()]

    def _look_who_is_banned(self, now: float) -> None:
        """Once until something is said, or one of them expires: it is asked for each peer, many times a second."""
        of_bans = {PeerId(subject): of_all for (register, subject), of_all in self._said.items() if register == "ban"}
        found = {peer: self.on("ban", peer, now=now) for peer in of_bans}
        self._banned = {peer: said for peer, said in found.items() if said is not None and said.verdict == "ban"}
        ends_s = [said.expires_s for of_all in of_bans.values() for said in of_all.values()]
        self._banned_from_s = max((at_s for at_s in ends_s if at_s <= now), default=float("-inf"))
        self._banned_until_s = min((at_s for at_s in ends_s if at_s > now), default=float("inf"))


def decide(
    by: Identity,
    run: bytes,
    subject: str,
    verdict: str,
    reason: str,
    *,
    now: float,
    after_s: float = 0.0,
    delegation: Delegation | None = None,
) -> Record:
    """A decision of the organizer, or of who holds `delegation`; now: unix seconds of the run's time.

    after_s: the moment of the decision that it is to replace, 0 for none. Raises ValueError for words that no peer
    would take, as a ban of a ticket.
    """
    now = max(now, after_s + 0.001)
    lifetime_s = min(DECISION_S, ends(delegation.until if delegation else 0) - now - 0.002)  # times are rounded to ms
    if verdict not in _REGISTER_OF:
        raise ValueError(f"no such verdict: {verdict}")
    if not _suits(verdict, subject):
        raise ValueError(f"{verdict} is not said of {subject}")
    body, kind = DecisionBody(verdict, reason, delegation), _REGISTER_OF[verdict]  # type: ignore[arg-type]
    return records.issue(by, run, kind, subject, round(now * 1000), body, now=now, lifetime_s=lifetime_s)


def check(record: Record, organizer: PeerId, verify: Verify = keys.verify) -> None:
    """Raise WireError unless this is a decision, and its owner may decide for the run of `organizer`."""
    if not isinstance(record.body, DecisionBody):
        raise WireError("malformed", f"a {record.kind} record")
    verdict, seat = record.body.verdict, record.body.delegation
    if record.kind != _REGISTER_OF[verdict] or not _suits(verdict, record.key):
        raise WireError("malformed", f"{verdict} of {record.key} in a {record.kind} record")
    if seat is None:
        if record.owner != organizer:
            raise WireError("not the organizer", f"{record.owner} decides about {record.key}")
        return
    of_its_owner = seat.coordinator == record.owner != organizer  # whose own word ends with no delegation
    if not of_its_owner or not is_delegated(seat, record.run, organizer, verify):
        raise WireError("not delegated", f"{record.owner} decides about {record.key}")
    if record.expires_ms > ends(seat.until) * 1000:
        raise WireError("lifetime", f"a decision of {record.owner} that outlives its delegation")


def _suits(verdict: str, subject: str) -> bool:
    """Whether that can be said of that: tickets are revoked, all else is about peers."""
    if verdict == "revoke":
        return _TICKET.match(subject) is not None
    try:
        public_key_of(PeerId(subject))
    except ValueError:
        return False
    return True
