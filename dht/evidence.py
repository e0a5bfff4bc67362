"""Proof that a peer has said two things where it may say one: both, as it signed them, which anyone can check.

Evidence is "dugnad/evidence/1" and the msgpack array [run, accused, sort, first, second]. It carries no signature of
whoever brings it, for it needs no trust: a checker of that sort finds the accused in the two signed things alone, or
refuses. One piece against a peer is as good as any other, so all of them have the same tag: whoever holds one wants
none, and an equivocator that makes them by the thousand makes no traffic. It holds for as long as the run.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import msgspec
from blake3 import blake3
from msgspec import Meta, Struct

from dugnad.dht import identity as keys
from dugnad.dht import records
from dugnad.dht.identity import PeerId, peer_id_of, public_key_of
from dugnad.dht.records import KINDS, MAX_RECORD_BYTES, TAG_BYTES, Record, slot_of
from dugnad.dht.wire import Verify, WireError

MAX_SIDE_BYTES = MAX_RECORD_BYTES
"""Of each of the two signed things."""
EVIDENCE_BYTES = 2 * MAX_SIDE_BYTES + 128
"""The largest piece of evidence."""
RECORDS = "records"
"""The sort of two records of one owner, kind, key and seq."""
_DOMAIN = b"dugnad/evidence/1"

Checker = Callable[[bytes, bytes, bytes], PeerId | None]
"""(run, first, second) -> whom these two signed things convict, or None; whatever the bytes, it raises nothing else
than WireError, which counts as None. The order of the two says nothing."""

_Side = Annotated[bytes, Meta(min_length=1, max_length=MAX_SIDE_BYTES)]


class _Payload(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    run: Annotated[bytes, Meta(min_length=32, max_length=32)]
    accused: Annotated[bytes, Meta(min_length=32, max_length=32)]
    sort: Annotated[str, Meta(max_length=16)]
    first: _Side
    second: _Side


_encoder = msgspec.msgpack.Encoder()
_payloads = msgspec.msgpack.Decoder(_Payload)


@dataclass(frozen=True)
class Evidence:
    """A checked proof against `owner`: made by `Proofs` only, or of two checked records."""

    owner: PeerId
    sort: str
    raw: bytes
    expires_ms = math.inf
    """Never: who has said two things once is not believed again."""

    @cached_property
    def slot(self) -> bytes:
        """16 bytes that name the place of all evidence against this peer."""
        return slot_of("evidence", self.owner, "")

    @cached_property
    def tag(self) -> bytes:
        """16 bytes, the same for all evidence against this peer."""
        return blake3(_DOMAIN + self.slot).digest(length=TAG_BYTES)

    def expired(self, now: float) -> bool:
        """Whether it is over at `now` (unix seconds): never."""
        return False


class Proofs:
    """What counts as proof: a pure checker for each sort of pairs; `RECORDS` is there, upper floors add theirs."""

    def __init__(self, checkers: Mapping[str, Checker] | None = None, *, verify: Verify = keys.verify) -> None:
        def two_records(run: bytes, first: bytes, second: bytes) -> PeerId | None:
            one = records.parse_of_any_time(first, run, verify=verify)
            other = records.parse_of_any_time(second, run, verify=verify)
            return one.owner if contradict(one, other) else None

        self._checkers: dict[str, Checker] = {RECORDS: two_records, **(checkers or {})}

    def convict(self, run: bytes, sort: str, one: bytes, other: bytes) -> Evidence | None:
        """The evidence that two signed things are, in either order; None if they prove nothing."""
        checker = self._checkers.get(sort)
        if checker is None or one == other or not all(0 < len(side) <= MAX_SIDE_BYTES for side in (one, other)):
            return None
        first, second = sorted((one, other))
        try:
            accused = checker(run, first, second)
        except WireError:
            return None
        return None if accused is None else _evidence(run, accused, sort, first, second)

    def parse(self, raw: bytes, run: bytes) -> Evidence:
        """The evidence in some bytes from anyone.

        Raises WireError for bytes over the cap or malformed, a foreign run, a sort that nobody here can check, and a
        pair that does not convict whom it accuses.
        """
        said = _decoded(raw)
        if said.run != run:
            raise WireError("foreign run")
        if said.sort not in self._checkers:
            raise WireError("unknown kind", f"evidence of the sort {said.sort!r}")
        evidence = self.convict(run, said.sort, said.first, said.second)
        if evidence is None or evidence.raw != raw:
            raise WireError("no evidence", f"against {peer_id_of(said.accused)}, by two {said.sort}")
        return evidence


def contradict(one: Record, other: Record) -> bool:
    """Whether two checked records of one run can't both be an honest owner's."""
    # two signatures under the same words are no two words: someone else might have made one out of the other
    same = (one.slot, one.seq) == (other.slot, other.seq)
    return same and one.said != other.said and KINDS[one.kind].convicts


def of_records(one: Record, other: Record) -> Evidence:
    """The evidence that two checked records which contradict each other are."""
    return _evidence(one.run, one.owner, RECORDS, *sorted((one.raw, other.raw)))


def is_evidence(raw: bytes) -> bool:
    """Whether some bytes say to be evidence; a record's never do."""
    return raw.startswith(_DOMAIN)


def tag_of(raw: bytes) -> bytes:
    """The tag that the record or the evidence in some bytes has, if it is one."""
    if is_evidence(raw):
        try:
            return Evidence(peer_id_of(_decoded(raw).accused), "", raw).tag
        except WireError:
            pass  # as any other bytes: whoever parses them will say what is wrong
    return blake3(raw).digest(length=TAG_BYTES)


def _decoded(raw: bytes) -> _Payload:
    if len(raw) > EVIDENCE_BYTES:
        raise WireError("too large", f"evidence of {len(raw)} bytes, at most {EVIDENCE_BYTES}")
    body = raw.removeprefix(_DOMAIN)
    try:
        said = _payloads.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise WireError("malformed", f"evidence: {error}") from error
    if _DOMAIN + _encoder.encode(said) != raw:
        raise WireError("malformed", "evidence: not in canonical form")
    return said


def _evidence(run: bytes, accused: PeerId, sort: str, first: bytes, second: bytes) -> Evidence:
    payload = _Payload(run, public_key_of(accused), sort, first, second)
    return Evidence(accused, sort, _DOMAIN + _encoder.encode(payload))
