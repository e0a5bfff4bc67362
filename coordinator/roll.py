"""Who is admitted to a run, as its chain counts it: by which ticket, until when, and how often each ticket was used.

A block proves of everyone who contributes for the first time that it may: with a claim to a ticket where one comes by
invitation, with the organizer's decision where there is a list. Whether that holds is the same for everyone, now and in
a year: no clock takes part. That tickets expire, memberships end and members are banned is for whoever gives a seat, or
votes: see `admission`.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from dugnad.coordinator.messages import ADMISSION_BYTES, ADMISSIONS_BYTES, Block
from dugnad.dht import decisions, records
from dugnad.dht.delegation import ends
from dugnad.dht.identity import PeerId
from dugnad.dht.ticket import CLAIM_BYTES, VOLUNTEER, Claim, parse_claim
from dugnad.dht.wire import Verify, WireError

assert CLAIM_BYTES <= ADMISSION_BYTES
assert records.KINDS["allow"].cap_bytes <= ADMISSION_BYTES

OPEN, INVITED, ALLOW_LIST = "open", "invited", "allow-list"
"""Whom a run admits: anyone, whoever has a ticket, or whom the organizer allowed."""
_KEPT_PROOFS, _KEPT_ROLLS = 4096, 128
T = TypeVar("T")


class RollError(Exception):
    """Admissions that no block may have; the message says why."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """A proof that `peer` may be a member, checked: until that unix second (0: for good).

    ticket: the id of its ticket, empty without one; uses: how many may come by it, 0 for any number; expires: the last
    unix second to claim it, 0 for any; bound: whether it is for that peer alone.
    """

    peer: PeerId
    until: int = 0
    ticket: bytes = b""
    uses: int = 0
    expires: int = 0
    bound: bool = False


@dataclass(frozen=True, slots=True)
class Roll:
    """Who is admitted after a block, and how often each ticket was used."""

    members: Mapping[PeerId, Admitted] = field(default_factory=dict)
    uses: Mapping[bytes, int] = field(default_factory=dict)

    def refuses(self, one: Admitted) -> str | None:
        """Why that proof admits nobody after this block, or None."""
        known = self.members.get(one.peer)
        if known is not None and (known.ticket == one.ticket or ends(one.until) <= ends(known.until)):
            return f"{one.peer} is admitted already"
        if one.uses and self.uses.get(one.ticket, 0) >= one.uses:
            return f"ticket used up: {one.uses} members came in by it"
        return None

    def with_all(self, admitted: Iterable[Admitted]) -> "Roll":
        """The roll with those as well. Raises RollError."""
        members, uses = dict(self.members), dict(self.uses)
        grown = Roll(members, uses)
        for one in admitted:
            fault = grown.refuses(one)
            if fault is not None:
                raise RollError(fault)
            members[one.peer] = one
            if one.ticket:
                uses[one.ticket] = uses.get(one.ticket, 0) + 1
        return grown if members else self


class Gate:
    """Reads the proofs of one run, each once: `kind` says what is a proof there, `founder` needs none."""

    def __init__(self, run: bytes, organizer: PeerId, founder: PeerId, kind: str, verify: Verify) -> None:
        self.kind = kind
        self._run, self._organizer, self._founder, self._verify = run, organizer, founder, verify
        self._read: OrderedDict[bytes, Admitted] = OrderedDict()
        self._rolls: OrderedDict[bytes, Roll] = OrderedDict()
        """Block -> the roll after it."""

    def needs_proof(self, peer: PeerId) -> bool:
        """Whether `peer` has to prove that it may be a member."""
        return self.kind != OPEN and peer != self._founder

    def read(self, raw: bytes) -> Admitted:
        """Who may be a member by that proof, which anyone may have made. Raises WireError with the reason."""
        return _kept(self._read, raw, _KEPT_PROOFS, lambda: self._parse(raw))

    def _parse(self, raw: bytes) -> Admitted:
        if self.kind == INVITED:
            return _of_claim(parse_claim(raw, self._run, self._organizer, self._verify))
        if self.kind != ALLOW_LIST:
            raise WireError("bad claim", "nobody needs to be admitted to an open run")
        record = records.parse_of_any_time(raw, self._run, verify=self._verify)
        if not isinstance(record.body, records.DecisionBody) or record.body.verdict != "allow":
            raise WireError("bad claim", "it does not allow anyone anything")
        decisions.check(record, self._organizer, self._verify)
        return Admitted(PeerId(record.key))

    def after(self, roll: Roll, block: Block) -> Roll:
        """The roll that `block` makes of the one before it. Raises RollError unless all in it may contribute."""
        if self.kind == OPEN and not block.admissions:
            return roll
        return _kept(self._rolls, block.hash, _KEPT_ROLLS, lambda: self._after(roll, block))

    def _after(self, roll: Roll, block: Block) -> Roll:
        if sum(map(len, block.admissions)) > ADMISSIONS_BYTES:
            raise RollError(f"more than {ADMISSIONS_BYTES} bytes of admissions")
        try:
            admitted = [self.read(raw) for raw in block.admissions]
        except WireError as error:
            raise RollError(f"an admission is refused: {error}") from None
        peers = [one.peer for one in admitted]
        contributors = {entry.peer for entry in block.entries}
        if peers != sorted(set(peers)) or not contributors.issuperset(peers):
            raise RollError("admissions are not in peer-id order, or someone is admitted who did not contribute")
        grown = roll.with_all(admitted) if admitted else roll
        strangers = [peer for peer in sorted(contributors - grown.members.keys()) if self.needs_proof(peer)]
        if strangers:
            raise RollError(f"{strangers[0]} contributed, and is not admitted to this run")
        return grown


def _of_claim(said: Claim) -> Admitted:
    ticket = said.ticket
    if VOLUNTEER not in ticket.roles:
        raise WireError("bad claim", f"its ticket is for {', '.join(ticket.roles)}")
    return Admitted(said.peer, ticket.until, ticket.id, ticket.uses, ticket.expires, ticket.bound != "")


def _kept(kept: OrderedDict[bytes, T], key: bytes, most: int, made: Callable[[], T]) -> T:
    """What was made of `key` before, or is now: what is refused is not kept, so that nobody can fill our memory."""
    if key not in kept:
        value = made()
        while len(kept) >= most:
            kept.popitem(last=False)
        kept[key] = value
    return kept[key]
