"""Messages as bytes: typed, capped, signed, bound to one run.

A sealed message is a msgpack array [version, run, tag, sender key, body, signature]; the body is the msgpack array of
one typed struct. Caps are checked before anything is parsed, and bytes that would not be written the same way again
are refused, so a message has exactly one encoding. Remote bytes can raise nothing but `WireError`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from dugnad.dht import identity as keys
from dugnad.dht.identity import Identity, PeerId, peer_id_of

PROTOCOL = 1
"""What peers must have in common to work together; also the first field of every sealed message."""
ENVELOPE_BYTES = 256
"""What a seal adds to a body, at most."""
_DOMAIN = b"dugnad/message/1"

Verify = Callable[[PeerId, bytes, bytes], bool]
"""Whether these 64 bytes are the peer's signature over those."""


class Message(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of every message: immutable, encoded as a msgpack array, unknown fields refused."""


class WireError(Exception):
    """They sent nonsense: drop it, and count it under `reason` (one or two words)."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of message: its tag on the wire, its type, and how many bytes its body may have."""

    tag: str
    type: type[Struct]
    cap_bytes: int


class _Sealed(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: int
    run: Annotated[bytes, Meta(min_length=32, max_length=32)]
    tag: Annotated[str, Meta(max_length=32)]
    sender: Annotated[bytes, Meta(min_length=32, max_length=32)]
    body: msgspec.Raw
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


S = TypeVar("S", bound=Struct)
_encoder = msgspec.msgpack.Encoder(order="deterministic")
_sealed = msgspec.msgpack.Decoder(_Sealed)


class Codec:
    """Encodes and decodes the bodies of some kinds of messages."""

    def __init__(self, kinds: Iterable[Kind]) -> None:
        self._by_tag = {kind.tag: (kind, msgspec.msgpack.Decoder(kind.type)) for kind in kinds}
        self._by_type: dict[type[Any], Kind] = {kind.type: kind for kind, _ in self._by_tag.values()}
        self.cap_bytes = max(kind.cap_bytes for kind in self._by_type.values()) + ENVELOPE_BYTES
        """The largest sealed message."""

    def tag_of(self, message: Struct) -> str:
        """The tag of a message of one of the codec's kinds."""
        return self._by_type[type(message)].tag

    def encode(self, message: Struct) -> bytes:
        """The body of `message`. A body above its own cap is our fault: AssertionError."""
        kind, body = self._by_type[type(message)], _encoder.encode(message)
        assert len(body) <= kind.cap_bytes, f"{kind.tag} has {len(body)} bytes, above its cap of {kind.cap_bytes}"
        return body

    def decode(self, tag: str, body: bytes | memoryview) -> Struct:
        """The message in `body`. Raises WireError for an unknown tag, a body above the cap, and anything odd in it."""
        if tag not in self._by_tag:
            raise WireError("unknown kind", repr(tag[:32]))
        kind, decoder = self._by_tag[tag]
        if len(body) > kind.cap_bytes:
            raise WireError("too large", f"{tag} of {len(body)} bytes, at most {kind.cap_bytes}")
        return strictly(decoder, body, tag)


def seal(identity: Identity, run: bytes, codec: Codec, message: Struct) -> bytes:
    """Sign `message` for `run` (32 bytes)."""
    tag, body = codec.tag_of(message), codec.encode(message)
    signature = identity.sign(_signed(run, tag, body))
    return _encoder.encode(_Sealed(PROTOCOL, run, tag, identity.public_key, msgspec.Raw(body), signature))


def open_sealed(raw: bytes, run: bytes, codec: Codec, *, verify: Verify = keys.verify) -> tuple[PeerId, Struct]:
    """Who said what, of a message sealed for `run`. Raises WireError for anything else."""
    if len(raw) > codec.cap_bytes:
        raise WireError("too large", f"{len(raw)} bytes, at most {codec.cap_bytes}")
    sealed = strictly(_sealed, raw, "envelope")
    if sealed.version != PROTOCOL:
        raise WireError("version", f"they speak protocol {sealed.version}, we {PROTOCOL}")
    if sealed.run != run:
        raise WireError("foreign run")
    body, sender = bytes(sealed.body), peer_id_of(sealed.sender)
    message = codec.decode(sealed.tag, body)
    if not verify(sender, _signed(run, sealed.tag, body), sealed.signature):
        raise WireError("bad signature", f"{sealed.tag} that says to be from {sender}")
    return sender, message


def _signed(run: bytes, tag: str, body: bytes) -> bytes:
    return _DOMAIN + run + bytes([len(tag)]) + tag.encode() + body


def strictly(decoder: msgspec.msgpack.Decoder[S], raw: bytes | memoryview, what: str) -> S:
    """The value in some bytes, if they are just those that we would write. Raises WireError, about `what`."""
    try:
        value = decoder.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise WireError("malformed", f"{what}: {error}") from error
    if _encoder.encode(value) != raw:
        raise WireError("malformed", f"{what}: not in canonical form")
    return value
