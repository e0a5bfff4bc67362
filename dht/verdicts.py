"""What is found about members: what the organizer decides, and who is proven to have said two things.

Both spread as records do; here they are checked, told once, and kept in files, so that who restarts knows them at once.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from dugnad.dht import decisions, records
from dugnad.dht.crdt import Entry, RecordMap
from dugnad.dht.decisions import Decision, Decisions
from dugnad.dht.evidence import Evidence, Proofs
from dugnad.dht.identity import PeerId, nickname, write_private
from dugnad.dht.records import REGISTERS, Record
from dugnad.dht.wire import WireError

log = logging.getLogger(__name__)


class Verdicts:
    """What one peer, `me`, knows of them in one run; all that counts stands in `known`.

    directory: where they are kept. organizer: whose decisions count. proofs: what convicts a peer; accused: hears of
    each that is convicted, once, and why.
    """

    def __init__(
        self,
        known: RecordMap,
        run: bytes,
        me: PeerId,
        *,
        directory: Path,
        organizer: PeerId | None,
        proofs: Proofs,
        accused: Callable[[PeerId, str], None],
    ) -> None:
        self.decisions = Decisions()
        """What the organizer has decided, as far as we have heard."""
        self._known = known
        self._run = run
        self._me = me
        self._evidence_file = directory / "evidence"
        self._decisions_file = directory / "decisions"
        self._organizer = organizer
        self._proofs = proofs
        self._accused = accused

    def load(self) -> None:
        """Take up what the files hold."""
        for raw in _list_in(self._evidence_file, "what it proves has to come from others"):
            with contextlib.suppress(WireError):  # as of another run, or of a sort that is no longer known
                evidence = self.parse_evidence(raw)
                if self._known.merge(evidence):
                    self._tell_of(evidence)
        for raw in _list_in(self._decisions_file, "what it says has to come from others"):
            with contextlib.suppress(WireError):
                record = records.parse_of_any_time(raw, self._run)
                self.check(record)
                if record.kind in REGISTERS:
                    self._known.merge(record)
        self._take_up_decisions()

    def parse_evidence(self, raw: bytes) -> Evidence:
        """The evidence in some bytes, if it convicts anyone. Raises WireError."""
        return self._proofs.parse(raw, self._run)

    def check(self, record: Record) -> None:
        """Raises WireError for a decision that is not the organizer's."""
        if record.kind in REGISTERS:
            if self._organizer is None:
                raise WireError("not the organizer", "whose decisions count is not known here")
            decisions.check(record, self._organizer)

    def accuse(self, sort: str, one: bytes, other: bytes, *, now: float) -> bool:
        """Have the proof that two signed things are spread, if they are one and news; whether they are."""
        evidence = self._proofs.convict(self._run, sort, one, other)
        if evidence is None or not self._known.merge(evidence):
            return False
        self.take([evidence], now=now)
        return True

    def decide(self, raw: bytes, *, now: float) -> str | None:
        """Have a decision that someone brings spread; why it is refused, or None if it holds from now on."""
        try:
            record = records.parse(raw, self._run, now=now)
            if record.kind not in REGISTERS:
                raise WireError("unknown kind", f"a {record.kind} record is no decision")
            self.check(record)
        except WireError as error:
            return str(error)
        if not self._known.merge(record):
            return "there is a newer decision on that, or no room for another"
        self.take([record], now=now)
        return None

    def take(self, news: Iterable[Entry], *, now: float) -> None:
        """Do what is new in the map calls for: what was decided, and who is convicted, is told once, and kept."""
        news = list(news)
        said = [Decision.of(one) for one in news if isinstance(one, Record) and one.kind in REGISTERS]
        convicting = [entry for entry in news if isinstance(entry, Evidence)]
        if said or convicting:  # whoever is convicted takes what it decided along
            self._take_up_decisions()
        for one in said:
            if self.decisions.on(one.register, one.subject, now=now) == one:
                _tell_decision(one)
        if said:
            write_private(self._decisions_file, msgspec.msgpack.encode([one.raw for one in self.decisions.all()]))
        for evidence in convicting:
            self._tell_of(evidence)
        if convicting:
            against = (self._known.evidence_against(peer) for peer in self._known.quarantined())
            write_private(self._evidence_file, msgspec.msgpack.encode([one.raw for one in against if one is not None]))

    def _take_up_decisions(self) -> None:
        """Know what stands in the map: it forgets what expired, and what finds no room."""
        self.decisions.replace(map(Decision.of, self._known.decisions()))

    def _tell_of(self, evidence: Evidence) -> None:
        why = f"it signed two contradicting {evidence.sort}"
        if evidence.owner == self._me:
            log.error(
                "%s with our key: nobody in this run counts us any more. Does another dugnad run with a copy of this "
                "folder? Stop both, move identity.key away, and join as someone new.", why.replace("it", "someone", 1)
            )  # fmt: skip
        else:
            log.warning("%s (%s) is quarantined: %s", nickname(evidence.owner), evidence.owner, why)
        self._accused(evidence.owner, why)


def _tell_decision(said: Decision) -> None:
    if said.verdict in ("ban", "unban"):
        peer = PeerId(said.subject)
        why = f": {said.reason}" if said.reason else ""
        log.warning("%s (%s) is %sned by the organizer%s", nickname(peer), peer, said.verdict, why)


def _list_in(path: Path, otherwise: str) -> list[bytes]:
    """What a file of ours holds, nothing if there is none or it can't be read: `otherwise` says what of that comes."""
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=list[bytes])
    except FileNotFoundError:
        return []
    except (OSError, msgspec.DecodeError) as error:
        log.warning("%s can't be read; %s: %s", path, otherwise, error)
        return []
