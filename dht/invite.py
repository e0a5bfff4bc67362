"""Invites: the one line of text with which a stranger finds a run and knows it for the right one.

"dugnad1:" and, in lower-case base32 without padding: u16 length of the whole text in characters, big-endian; msgpack
array [run, organizer, addresses, name, ticket]; the first 4 bytes of the blake3 of both. The length tells a copy that
was cut off from one that was mistyped. Case and white space do not matter, for mail programs change them.
"""

import base64
from typing import Annotated, Self

import msgspec
from blake3 import blake3
from msgspec import Meta, Struct

from dugnad.dht import ticket
from dugnad.dht.delegation import Delegation, Signature, Signs, UnixSeconds, ends
from dugnad.dht.identity import Identity, PeerId, peer_id_of, public_key_of, verify
from dugnad.dht.records import Address
from dugnad.dht.wire import WireError

PREFIX = "dugnad1:"
MAX_CHARACTERS = 8192
_LENGTH_BYTES = 2
_CHECKSUM_BYTES = 4
_COMMAND = "dugnadjoin"
"""What stands before an invite in the line that a launch prints, without its spaces."""
_AGAIN = f"Copy it again; it starts with {PREFIX} and ends with a checksum."

_Key = Annotated[bytes, Meta(min_length=32, max_length=32)]


class InviteError(Exception):
    """An invite that can't be used; says why and what to do.

    code: "E101" unreadable, "E102" expired, "E401" it lets this peer in no more, or never did.
    """

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(f"{code} {sentence}")
        self.code = code


class Pass(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A ticket as an invite carries it: without what the invite says already, and with the seed of the ticket's key."""

    seed: _Key
    roles: ticket.Roles
    expires: UnixSeconds
    until: UnixSeconds
    uses: ticket.Uses
    bound: ticket.Bound
    delegation: Delegation | None
    signature: Signature

    @classmethod
    def issue(cls, signer: Signs, run: bytes, seed: bytes, terms: ticket.Terms, seat: Delegation | None = None) -> Self:
        """A new one, of 32 bytes that nobody else knows. Raises ValueError for terms that nobody would accept."""
        made = ticket.issue(signer, run, Identity.from_seed(seed).peer_id, terms, seat)
        return cls(seed, *(getattr(made, name) for name in cls.__struct_fields__[1:]))

    def of(self, run: bytes, key: PeerId) -> ticket.Ticket:
        """The ticket of that run and of the key that `seed` makes."""
        return ticket.Ticket(run, key, *(getattr(self, name) for name in self.__struct_fields__[1:]))


class Invite(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How to find a run (its id: 32 bytes), whom it obeys (the organizer's ed25519 public key), and what lets one in.

    Raises ValueError for an address that does not end in an ed25519 peer id.
    """

    run: _Key
    organizer: _Key
    addresses: Annotated[tuple[Address, ...], Meta(min_length=1, max_length=16)]
    """Multiaddrs, each with /p2p/ and a peer id at its end."""
    name: Annotated[str, Meta(max_length=64, pattern=r"\A[a-z0-9]+(-[a-z0-9]+)*\Z")]
    """The recipe's; safe as the name of a folder."""
    ticket: Pass | None = None
    """None where nobody needs one, or where whoever made this invite has none to give."""

    def __post_init__(self) -> None:
        for address in self.addresses:
            public_key_of(PeerId(address.rpartition("/p2p/")[2]))

    def claim(self, peer: PeerId) -> bytes:
        """The claim of `peer` to the ticket in it; empty without one."""
        if self.ticket is None:
            return b""
        key = Identity.from_seed(self.ticket.seed)
        return ticket.claim(self.ticket.of(self.run, key.peer_id), key, peer)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Invite)


def encode_invite(invite: Invite) -> str:
    """The invite as text. Raises ValueError for fields that `parse_invite` would refuse."""
    body = _encoder.encode(invite)
    try:
        _decoder.decode(body)
    except msgspec.ValidationError as error:
        raise ValueError(f"not an invite: {error}") from error
    num_bytes = _LENGTH_BYTES + len(body) + _CHECKSUM_BYTES
    num_characters = len(PREFIX) + -(-num_bytes * 8 // 5)
    assert num_characters <= MAX_CHARACTERS, f"an invite of {num_characters} characters"
    checked = num_characters.to_bytes(_LENGTH_BYTES) + body
    return PREFIX + base64.b32encode(checked + _checksum(checked)).decode().rstrip("=").lower()


def parse_invite(text: str) -> Invite:
    """The invite in a line that someone pasted, expired or not. Raises InviteError E101 if it can't be read."""
    text = "".join(text[: 2 * MAX_CHARACTERS].split()).lower().removeprefix(_COMMAND)
    if not text.startswith(PREFIX):
        raise _unreadable(f"it starts with {text[: len(PREFIX)]!r}" if text else "it is empty")
    return _checked(text)


def check(invite: Invite, peer: PeerId, *, now: float) -> None:
    """Raises InviteError where the ticket in it lets `peer` in no more, or never did; now: unix seconds of the run."""
    given, organizer = invite.ticket, peer_id_of(invite.organizer)
    if given is None:
        return
    if ends(given.expires) <= now:
        raise InviteError("E102", f"invite expired on {ticket.day_of(given.expires)}. Ask the organizer for a new one.")
    if given.bound not in ("", peer):
        raise InviteError(
            "E401", f"this invite is for another key, {given.bound}. Ask the organizer for one for yours: {peer}"
        )
    try:
        ticket.parse_claim(invite.claim(peer), invite.run, organizer, verify)
    except WireError as error:
        raise InviteError("E401", f"{error}. Ask the organizer for an invite. Your key: {peer}") from None


def _checked(text: str) -> Invite:
    raw = _bytes_of(text)
    checked, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
    if _checksum(checked) != checksum:
        raise _unreadable(_damage(raw, len(text)))
    try:
        invite = _decoder.decode(checked[_LENGTH_BYTES:])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise InviteError(
            "E101", "invite not readable: no version of dugnad that this one knows has made it. Update dugnad, or ask "
            "the organizer for another invite."
        ) from None  # fmt: skip
    if encode_invite(invite) != text:
        raise _unreadable("it is not written the way invites are")
    return invite


def _bytes_of(text: str) -> bytes:
    digits = text.removeprefix(PREFIX)
    for position, digit in enumerate(digits, len(PREFIX) + 1):
        if digit not in "abcdefghijklmnopqrstuvwxyz234567":
            raise _unreadable(f"character {position} is {digit!r}, which no invite contains")
    # zeros in place of what is missing, then cut: Python refuses a text cut off within a byte, which we want to measure
    padded = digits + "a" * (-len(digits) % 8)
    return base64.b32decode(padded, casefold=True)[: len(digits) * 5 // 8]


def _damage(raw: bytes, num_characters: int) -> str:
    """What most likely happened to an invite with a wrong checksum."""
    expected = int.from_bytes(raw[:_LENGTH_BYTES]) if len(raw) >= _LENGTH_BYTES else MAX_CHARACTERS + 1
    if expected > MAX_CHARACTERS:
        return f"it ends early (after {num_characters} characters)" if len(raw) < 64 else "its checksum is wrong"
    if num_characters < expected:
        return f"it ends early ({num_characters} of {expected} characters)"
    if num_characters > expected:
        return f"it is too long ({num_characters} characters instead of {expected})"
    return "its checksum is wrong, so a character was changed"


def _unreadable(why: str) -> InviteError:
    return InviteError("E101", f"invite not readable: {why}. {_AGAIN}")


def _checksum(checked: bytes) -> bytes:
    return blake3(checked).digest(length=_CHECKSUM_BYTES)
