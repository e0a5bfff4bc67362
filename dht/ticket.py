"""Tickets: the organizer's word that whoever holds one may become a member of the run, and how a peer claims one.

A ticket has a key of its own, whose seed travels in the invite alone. A peer claims the ticket by having that key sign
its own name; the claim is public and names its peer, so whoever reads one can do nothing with it. Both are bound to the
run, whose id is the hash of its genesis: a ticket holds for one history only.

    organizer (or its delegate)  --signs-->  Ticket{run, key, roles, expires, until, uses, bound}
    ticket's key, from the seed  --signs-->  Claim{ticket, peer}

Anyone can check a claim offline, but for two things: how often a ticket was used, which the chain counts, and whether
it has expired, which is for whoever gives a seat.
"""

from datetime import UTC, datetime
from functools import cached_property
from typing import Annotated

import msgspec
from blake3 import blake3
from msgspec import Meta, Struct

from dugnad.dht.delegation import Delegation, Member, Signature, Signs, UnixSeconds, ends, is_delegated
from dugnad.dht.identity import PeerId
from dugnad.dht.wire import Verify, WireError, strictly

CLAIM_BYTES = 768
"""The largest claim."""
VOLUNTEER = "volunteer"
"""The role of who trains."""

Run = Annotated[bytes, Meta(min_length=32, max_length=32)]
Role = Annotated[str, Meta(pattern=r"\A[a-z]{1,16}\Z")]
Roles = Annotated[tuple[Role, ...], Meta(min_length=1, max_length=4)]
Uses = Annotated[int, Meta(ge=0, le=10**6)]
"""How many members may come in by it; 0 for any number."""
Bound = Annotated[PeerId, Meta(max_length=80)]
"""Whose alone it is; empty for whoever holds it."""


class Terms(Struct, frozen=True, kw_only=True):
    """What a ticket promises; the defaults are those of the invite that a launch prints."""

    roles: Roles = (VOLUNTEER,)
    expires: UnixSeconds = 0
    """The last moment to claim it, unix seconds; 0: it stays good."""
    until: UnixSeconds = 0
    """When the membership that it gives ends, unix seconds; 0: never."""
    uses: Uses = 0
    bound: Bound = PeerId("")


class Ticket(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, dict=True):
    """A signed ticket; the signature is over `ticket_payload`, by the organizer or by who holds `delegation`."""

    run: Run
    key: Member
    """The ticket's own key: what it signs is a claim."""
    roles: Roles
    expires: UnixSeconds
    until: UnixSeconds
    uses: Uses
    bound: Bound
    delegation: Delegation | None
    signature: Signature

    @cached_property
    def id(self) -> bytes:
        """32 bytes that name what was promised: by whom and how it was signed makes no other ticket of it."""
        return blake3(_payload(self.run, self.key, self.terms)).digest()

    @property
    def terms(self) -> Terms:
        """What it promises."""
        return Terms(
            roles=self.roles, expires=self.expires, until=self.until, uses=self.uses, bound=self.bound
        )  # fmt: skip


class Claim(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`peer` wants to be a member by that ticket; `proof` is the ticket's key's, over `claim_payload`."""

    ticket: Ticket
    peer: Member
    proof: Signature


_encoder = msgspec.msgpack.Encoder()
_claims = msgspec.msgpack.Decoder(Claim)


def issue(signer: Signs, run: bytes, key: PeerId, terms: Terms, delegation: Delegation | None = None) -> Ticket:
    """A ticket that `signer` gives out: the organizer, or its delegate by `delegation`.

    Raises ValueError for terms that nobody would accept.
    """
    try:
        terms = msgspec.convert(msgspec.to_builtins(terms), Terms)
    except msgspec.ValidationError as error:
        raise ValueError(f"no such ticket can be: {error}") from error
    if delegation is not None and ends(terms.expires) > ends(delegation.until):
        raise ValueError("a delegate's ticket can't be good for longer than the delegation")
    signature = signer.sign(_payload(run, key, terms))
    return Ticket(run, key, terms.roles, terms.expires, terms.until, terms.uses, terms.bound, delegation, signature)


def claim(ticket: Ticket, key: Signs, peer: PeerId) -> bytes:
    """The claim of `peer` to a ticket whose `key` it holds, as bytes."""
    return _encoder.encode(Claim(ticket, peer, key.sign(_claim_payload(ticket, peer))))


def parse_claim(raw: bytes, run: bytes, organizer: PeerId, verify: Verify) -> Claim:
    """The claim in some bytes from anyone; it may be expired, and its ticket used up.

    Raises WireError, with a reason of its own for each: malformed or too large, a foreign ticket, an altered one (or
    one that the organizer never signed), one bound to another key, and a claim that the ticket's key did not sign.
    """
    if len(raw) > CLAIM_BYTES:
        raise WireError("too large", f"a claim of {len(raw)} bytes, at most {CLAIM_BYTES}")
    said = strictly(_claims, raw, "claim")
    check_ticket(said.ticket, run, organizer, verify)
    if said.ticket.bound not in ("", said.peer):
        raise WireError("ticket bound to another key", f"to {said.ticket.bound}, and {said.peer} claims it")
    if not verify(said.ticket.key, _claim_payload(said.ticket, said.peer), said.proof):
        raise WireError("bad claim", f"that of {said.peer} is not signed by the ticket's key")
    return said


def check_ticket(ticket: Ticket, run: bytes, organizer: PeerId, verify: Verify) -> None:
    """Raise WireError unless the organizer of that run, or a delegate of it, signed `ticket`."""
    if ticket.run != run:
        raise WireError("foreign ticket", "it is one of another run")
    issuer, seat = organizer, ticket.delegation
    if seat is not None:
        issuer = seat.coordinator
        # a delegate gives out nothing that outlives its delegation: so the chain, which knows no time, can hold it
        if not is_delegated(seat, run, organizer, verify) or ends(ticket.expires) > ends(seat.until):
            raise WireError("altered ticket", "whoever signed it may sign none")
    if not verify(issuer, _payload(ticket.run, ticket.key, ticket.terms), ticket.signature):
        raise WireError("altered ticket", "it is not what the run's organizer signed")


def expired(ticket: Ticket, now: float) -> bool:
    """Whether it can be claimed no more at `now`, unix seconds of the run's time."""
    return ends(ticket.expires) <= now


def day_of(at_s: float) -> str:
    """The day of a moment, for people."""
    return str(datetime.fromtimestamp(at_s, UTC).date())


def _payload(run: bytes, key: PeerId, terms: Terms) -> bytes:
    said = (run, key, terms.roles, terms.expires, terms.until, terms.uses, terms.bound)
    return b"dugnad/ticket/1" + _encoder.encode(said)


def _claim_payload(ticket: Ticket, peer: PeerId) -> bytes:
    return b"dugnad/claim/1" + _encoder.encode((ticket.run, ticket.id, peer))
