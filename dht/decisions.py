"""What the organizer has decided about peers and tickets: the newest word on each counts.

Decisions are records (`records.py`), by the organizer's key or by one that it delegated to; what a delegate decides
ends with its delegation. They spread by gossip like all records, so that a ban holds for everyone within seconds; and
each peer keeps them on its disk.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dugnad.dht import identity as keys
from dugnad.dht import records
from dugnad.dht.delegation import Delegation, ends, is_delegated
from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.records import DECISION_S, DecisionBody, Record
from dugnad.dht.wire import Verify, WireError

DECISION = "decision"
"""The kind of record."""


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

    @classmethod
    def of(cls, record: Record) -> "Decision":
        """What a record of that kind says."""
        assert isinstance(record.body, DecisionBody)
        verdict, reason = record.body.verdict, record.body.reason
        return cls(record.key, verdict, reason, record.issued_ms / 1000, record.expires_ms / 1000, record.raw)


class Decisions:
    """The newest decision on each subject, of those that are taken in."""

    def __init__(self) -> None:
        self._newest: dict[str, Decision] = {}
        self._banned: dict[PeerId, Decision] = {}

    def take(self, said: Decision) -> bool:
        """Take a decision of whoever may decide; whether it is the newest on its subject."""
        known = self._newest.get(said.subject)
        if known is not None and (known.at_s, known.raw) >= (said.at_s, said.raw):
            return False
        self._newest[said.subject] = said
        self._banned.pop(PeerId(said.subject), None)
        if said.verdict == "ban":
            self._banned[PeerId(said.subject)] = said
        return True

    def on(self, subject: str, *, now: float) -> Decision | None:
        """The newest decision on that peer or ticket, if it holds at `now`."""
        said = self._newest.get(subject)
        return said if said is not None and now < said.expires_s else None

    def banned(self, *, now: float) -> Mapping[PeerId, Decision]:
        """Everyone who is banned at `now`, and by what."""
        if all(now < said.expires_s for said in self._banned.values()):
            return self._banned
        return {peer: said for peer, said in self._banned.items() if now < said.expires_s}

    def all(self) -> list[Decision]:
        """The newest on each subject, in the order in which they were made."""
        return sorted(self._newest.values(), key=lambda said: (said.at_s, said.subject))


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
    would take.
    """
    now = max(now, after_s + 0.001)
    lifetime_s = min(DECISION_S, ends(delegation.until if delegation else 0) - now - 0.002)  # times are rounded to ms
    if verdict not in ("allow", "ban", "unban", "revoke"):
        raise ValueError(f"no such verdict: {verdict}")
    body = DecisionBody(verdict, reason, delegation)  # type: ignore[arg-type]
    return records.issue(by, run, DECISION, subject, round(now * 1000), body, now=now, lifetime_s=lifetime_s)


def check(record: Record, organizer: PeerId, verify: Verify = keys.verify) -> None:
    """Raise WireError unless the owner of a decision may decide for the run of `organizer`."""
    assert isinstance(record.body, DecisionBody)
    seat = record.body.delegation
    if seat is None:
        if record.owner != organizer:
            raise WireError("not the organizer", f"{record.owner} decides about {record.key}")
        return
    if seat.coordinator != record.owner or not is_delegated(seat, record.run, organizer, verify):
        raise WireError("not delegated", f"{record.owner} decides about {record.key}")
    if record.expires_ms > ends(seat.until) * 1000:
        raise WireError("lifetime", f"a decision of {record.owner} that outlives its delegation")
