"""Signed single-writer records: what one key says, in bytes that anyone can check and nobody else can write.

A member says where it is and what it does. The organizer, or who holds its delegation, says what it has decided about
others (`decisions.py` sees to it that nobody else does).

A record is the msgpack array [version, run, kind, owner, key, seq, issued, expires, body], followed by 64 bytes of
ed25519 signature over a domain tag and that array. These raw bytes are what travels. Everything is bounded before it is
parsed: a kind's bytes, its keys, its lifetime. A record that is merely expired parses: expiry is applied in reading and
sending, since clocks differ and a merge that looked at them would leave replicas different.
"""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Literal

import msgspec
from blake3 import blake3
from msgspec import Meta, Struct

from dugnad.dht import identity as keys
from dugnad.dht.delegation import Delegation
from dugnad.dht.identity import Identity, PeerId, peer_id_of
from dugnad.dht.paths import Reach
from dugnad.dht.wire import Verify, WireError, strictly

VERSION = 1
MAX_AHEAD_S = 60.0
"""How far ahead of our clock a record may have been issued."""
TAG_BYTES = 16
"""What names a record in gossip; 8 would do against chance, but an owner could find two of its own that share those."""
_DOMAIN = b"dugnad/record/1"
DECISION_S = 100 * 365.25 * 86400.0
"""For how long a decision holds: longer than any run."""
_SIGNATURE_BYTES = 64
_LAST_MS = 253_402_300_799_000  # the year 9999: later times are nonsense, and some would not fit a float

Address = Annotated[str, Meta(pattern=r"^/[!-~]{1,255}\Z")]
"""A multiaddr, as far as its characters go."""
_Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Seq = Annotated[int, Meta(ge=1, le=2**63 - 1)]
_Milliseconds = Annotated[int, Meta(ge=0, le=_LAST_MS)]


class MemberBody(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a peer can be reached and what it is there for."""

    addresses: Annotated[tuple[Address, ...], Meta(max_length=16)]
    role: Annotated[str, Meta(pattern=r"^(volunteer|coordinator)\Z")]
    nickname: Annotated[str, Meta(max_length=40)]
    version: Annotated[str, Meta(max_length=40)]
    reach: Reach = Reach.UNKNOWN
    """How its direct connections come about."""
    certificate: Annotated[bytes, Meta(max_length=32)] = b""
    """The fingerprint with which those are made: 32 bytes, or none for who makes none."""

    def __post_init__(self) -> None:
        if len(self.certificate) not in (0, 32):
            raise ValueError("a fingerprint has 32 bytes, or none")
        _check_printable(self.nickname, self.version)


class ProgressBody(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a peer is doing: informs people, decides nothing."""

    round: _Count
    state: Annotated[str, Meta(max_length=16)]
    reason: Annotated[str, Meta(max_length=200)]
    step: _Count
    tokens_per_s: float
    loss: float | None
    """Nats per token; None while there is none."""
    model_digest: Annotated[bytes, Meta(max_length=32)]
    """32 bytes, or none while there is no model."""

    def __post_init__(self) -> None:
        _check_printable(self.state, self.reason)
        msgspec.structs.force_setattr(self, "tokens_per_s", float(self.tokens_per_s))  # an int has another encoding
        msgspec.structs.force_setattr(self, "loss", None if self.loss is None else float(self.loss))
        if not (math.isfinite(self.tokens_per_s) and (self.loss is None or math.isfinite(self.loss))):
            raise ValueError("numbers must be finite")
        if len(self.model_digest) not in (0, 32):
            raise ValueError("a model digest has 32 bytes, or none")


class DecisionBody(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What was decided about the peer, or the ticket (its id in hex), that is the record's key."""

    verdict: Literal["allow", "ban", "unban", "revoke"]
    """allow: on the list of an allow-list run. ban: out. unban: as if it had never been banned. revoke: no more
    members by that ticket."""
    reason: Annotated[str, Meta(max_length=200)]
    delegation: Delegation | None
    """By what the record's owner may decide; None for the organizer itself."""

    def __post_init__(self) -> None:
        _check_printable(self.reason)


Body = MemberBody | ProgressBody | DecisionBody


@dataclass(frozen=True, slots=True)
class RecordKind:
    """What records of one kind may be: the type of their body, their size, how long they last, their keys."""

    body: type[Body]
    cap_bytes: int
    """Of the raw record."""
    max_lifetime_s: float
    keys: tuple[str, ...] | None = ("",)
    """All the keys that one owner may have: with them, members x kinds bound a map. None: any; see `RecordMap`."""
    convicts: bool = True
    """Whether two records with one number prove that their owner lies."""
    decoder: msgspec.msgpack.Decoder[Body] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "decoder", msgspec.msgpack.Decoder(self.body))


REGISTERS = ("allow", "ban", "revoke")
"""The kinds of decisions, of which none touches another: who is on the list, who is banned, which tickets are over."""
# decisions must not lapse; and an organizer that decides on two machines within one millisecond is no liar
_DECISION = RecordKind(DecisionBody, cap_bytes=1536, max_lifetime_s=DECISION_S, keys=None, convicts=False)
KINDS = {
    "member": RecordKind(MemberBody, cap_bytes=6144, max_lifetime_s=1800.0),
    "progress": RecordKind(ProgressBody, cap_bytes=1536, max_lifetime_s=1800.0),
    **dict.fromkeys(REGISTERS, _DECISION),
}
MEMBER_KINDS = tuple(name for name, kind in KINDS.items() if kind.keys is not None)
"""What every member says of itself, again and again."""
MAX_RECORD_BYTES = max(kind.cap_bytes for kind in KINDS.values())


@dataclass(frozen=True)
class Record:
    """A record whose bytes were checked: made by `parse` and `issue` only."""

    run: bytes
    kind: str
    owner: PeerId
    key: str
    seq: int
    """Grows with each record of this owner, kind and key, restarts included; the first is 1."""
    issued_ms: int
    expires_ms: int
    body: Body
    raw: bytes

    @cached_property
    def slot(self) -> bytes:
        """16 bytes that name (kind, owner, key)."""
        return slot_of(self.kind, self.owner, self.key)

    @cached_property
    def hash(self) -> bytes:
        """The blake3 of the raw bytes, 32 bytes."""
        return blake3(self.raw).digest()

    @property
    def said(self) -> bytes:
        """What its owner signed: the raw bytes without the signature."""
        return self.raw[:-_SIGNATURE_BYTES]

    @cached_property
    def tag(self) -> bytes:
        """The first 16 bytes of the hash: what names just these bytes in gossip."""
        return self.hash[:TAG_BYTES]

    def expired(self, now: float) -> bool:
        """Whether it is over at `now` (unix seconds)."""
        return now * 1000 >= self.expires_ms


class _Payload(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: int
    run: Annotated[bytes, Meta(min_length=32, max_length=32)]
    kind: Annotated[str, Meta(max_length=16)]
    owner: Annotated[bytes, Meta(min_length=32, max_length=32)]
    key: Annotated[str, Meta(max_length=64)]
    seq: _Seq
    issued_ms: _Milliseconds
    expires_ms: _Milliseconds
    body: msgspec.Raw


_encoder = msgspec.msgpack.Encoder()
_payloads = msgspec.msgpack.Decoder(_Payload)
_NAME = re.compile(r"[0-9A-Za-z]{1,64}\Z")


def slot_of(kind: str, owner: PeerId, key: str) -> bytes:
    """16 bytes that name the place of a record: one record at a time stands there."""
    return blake3(_encoder.encode((kind, owner, key))).digest(length=16)


def issue(
    identity: Identity, run: bytes, kind: str, key: str, seq: int, body: Body, *, now: float, lifetime_s: float
) -> Record:
    """A new record of our own; seq: above that of the last one, see `RecordMap.seq_of`. now: unix seconds.

    Raises ValueError if other peers would refuse it, for a body or a lifetime over the kind's limits.
    """
    assert isinstance(body, KINDS[kind].body), f"a {type(body).__name__} in a record of kind {kind}"
    issued_ms = round(now * 1000)
    expires_ms = issued_ms + round(lifetime_s * 1000)
    encoded = msgspec.Raw(_encoder.encode(body))
    head = _encoder.encode(_Payload(VERSION, run, kind, identity.public_key, key, seq, issued_ms, expires_ms, encoded))
    raw = head + identity.sign(_DOMAIN + head)
    try:
        return parse(raw, run, now=now, verify=_ours)
    except WireError as error:
        raise ValueError(f"no peer would accept this {kind} record: {error}") from error


def parse(raw: bytes, run: bytes, *, now: float, verify: Verify = keys.verify) -> Record:
    """The record in some bytes from anyone; now: unix seconds.

    Raises WireError for bytes over the cap, malformed or with a bad signature, and for a foreign run, an unknown kind
    or key, a lifetime over the kind's, and an issue time more than 60 s ahead of `now`.
    """
    record = _unverified(raw, run)
    if record.issued_ms > (now + MAX_AHEAD_S) * 1000:
        raise WireError("from the future", f"issued {record.issued_ms / 1000 - now:.0f} s ahead of our clock")
    _check_signature(record, verify)
    return record


def parse_of_any_time(raw: bytes, run: bytes, *, verify: Verify = keys.verify) -> Record:
    """As `parse`, whenever it was issued: its owner has said it all the same. Raises WireError."""
    record = _unverified(raw, run)
    _check_signature(record, verify)
    return record


def owner_of(raw: bytes) -> PeerId | None:
    """Whose member record these bytes are, of any run and any time; None if they are no valid one."""
    try:
        record = _unverified(raw, None)
        _check_signature(record, keys.verify)
    except WireError:
        return None
    return record.owner if record.kind == "member" else None


def _unverified(raw: bytes, run: bytes | None) -> Record:
    """All that can be told from the bytes alone, but for the signature: that costs most, so it comes last."""
    if not _SIGNATURE_BYTES < len(raw) <= MAX_RECORD_BYTES:
        raise WireError("too large" if len(raw) > MAX_RECORD_BYTES else "malformed", f"a record of {len(raw)} bytes")
    head = strictly(_payloads, raw[:-_SIGNATURE_BYTES], "record")
    if head.version != VERSION:
        raise WireError("version", f"a record of version {head.version}, we speak {VERSION}")
    if run is not None and head.run != run:
        raise WireError("foreign run")
    kind = _kind_of(head, len(raw))
    body = strictly(kind.decoder, bytes(head.body), "record")
    owner = peer_id_of(head.owner)
    return Record(head.run, head.kind, owner, head.key, head.seq, head.issued_ms, head.expires_ms, body, raw)


def _kind_of(head: _Payload, num_bytes: int) -> RecordKind:
    kind = KINDS.get(head.kind)
    if kind is None:
        raise WireError("unknown kind", repr(head.kind))
    if num_bytes > kind.cap_bytes:
        raise WireError("too large", f"a {head.kind} record of {num_bytes} bytes, at most {kind.cap_bytes}")
    if head.key not in kind.keys if kind.keys is not None else not _NAME.match(head.key):
        raise WireError("unknown key", f"{head.key!r} of a {head.kind} record")
    if not 0 < head.expires_ms - head.issued_ms <= kind.max_lifetime_s * 1000:
        lifetime_s = (head.expires_ms - head.issued_ms) / 1000
        raise WireError("lifetime", f"{lifetime_s:.0f} s for a {head.kind} record, at most {kind.max_lifetime_s:.0f}")
    return kind


def _check_signature(record: Record, verify: Verify) -> None:
    if not verify(record.owner, _DOMAIN + record.said, record.raw[-_SIGNATURE_BYTES:]):
        raise WireError("bad signature", f"{record.kind} record that says to be from {record.owner}")


def _ours(peer: PeerId, payload: bytes, signature: bytes) -> bool:
    return True


def _check_printable(*texts: str) -> None:
    # they end up on terminals and in logs: no escape sequence, no line break of a stranger's gets there
    if not all(text.isprintable() for text in texts):
        raise ValueError("texts must be printable")
