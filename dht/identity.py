"""Who a peer is: an ed25519 key, and the libp2p peer id that this key gives.

An ed25519 peer id contains the public key, so one key is name and signer at once, and anyone can check a signature
knowing nothing but the name.
"""

import contextlib
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import NewType, Self

from blake3 import blake3
from nacl.exceptions import BadSignatureError, CryptoError
from nacl.signing import SigningKey, VerifyKey

PeerId = NewType("PeerId", str)
"""The libp2p peer id of an ed25519 key: "12D3KooW" and 44 more characters."""

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"  # base58, as in Bitcoin and libp2p
_PREFIX = bytes.fromhex("0024") + bytes.fromhex("08011220")  # identity multihash of a protobuf {type: ed25519, key}
_ID_CHARACTERS = 52


_RESTORE = (
    "Restore it from a backup, or move it away: the next start makes a new identity, and you join as someone new."
)


class IdentityError(Exception):
    """An identity file that can't be read or written; says which, and what to do."""


class Identity:
    """An ed25519 key pair."""

    def __init__(self, key: SigningKey) -> None:
        self._key = key
        self.public_key = bytes(key.verify_key)
        """32 bytes."""
        self.peer_id = peer_id_of(self.public_key)

    @classmethod
    def generate(cls) -> Self:
        """A new key from the system's randomness."""
        return cls(SigningKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Self:
        """The key of a 32-byte seed."""
        return cls(SigningKey(seed))

    @classmethod
    def load_or_create(cls, path: Path) -> Self:
        """The identity kept in `path`, made there (mode 0600, durable) if the file does not exist.

        Raises IdentityError for a file that is not 64 hex digits, or that can't be read or written.
        """
        return cls._read(path) or cls._create(path)

    @classmethod
    def _read(cls, path: Path) -> Self | None:
        try:
            return cls.load(path, otherwise=_RESTORE)
        except FileNotFoundError:
            return None

    @classmethod
    def load(cls, path: Path, *, otherwise: str) -> Self:
        """The identity in a file. Raises FileNotFoundError, or IdentityError for one that holds none or can't be read.

        otherwise: what the user of a file that holds none is to do.
        """
        try:
            return cls.from_seed(bytes.fromhex(path.read_text(encoding="ascii")))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise IdentityError(f"{path}: can't read the identity: {error.strerror}") from error
        except (ValueError, CryptoError) as error:
            raise IdentityError(f"{path}: this is not an identity (expected 64 hex digits). {otherwise}") from error

    @classmethod
    def _create(cls, path: Path) -> Self:
        key = cls.generate()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            key.keep(path)
        except OSError as error:
            raise IdentityError(f"{path}: can't keep the identity there: {error}") from error
        return key

    def keep(self, path: Path) -> None:
        """Write the key to `path`, mode 0600, in place of what is there: whole, or not at all. Raises OSError."""
        write_private(path, bytes(self._key).hex().encode() + b"\n")

    def sign(self, payload: bytes) -> bytes:
        """64 bytes; `payload` begins with a domain tag of its own, so that no signature passes for another."""
        return self._key.sign(payload).signature

    def libp2p_private_key(self) -> bytes:
        """The key in libp2p's encoding: protobuf {1: ed25519, 2: seed + public key}, 68 bytes."""
        return bytes.fromhex("08011240") + bytes(self._key) + self.public_key


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read: whole and durable, or not there at all. Raises OSError."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp: mode 0600 from the start
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def peer_id_of(public_key: bytes) -> PeerId:
    """The peer id of a 32-byte public key."""
    if len(public_key) != 32:
        raise ValueError(f"an ed25519 public key has 32 bytes, not {len(public_key)}")
    raw = _PREFIX + public_key
    number, digits = int.from_bytes(raw), ""
    while number:
        number, digit = divmod(number, 58)
        digits = _ALPHABET[digit] + digits
    return PeerId("1" * (len(raw) - len(raw.lstrip(b"\0"))) + digits)


@lru_cache(maxsize=65536)
def public_key_of(peer: PeerId) -> bytes:
    """The 32-byte key inside a peer id. Raises ValueError for anything but an ed25519 peer id."""
    if len(peer) != _ID_CHARACTERS or peer[0] != "1":
        raise ValueError("not an ed25519 peer id: those have 52 characters and begin with 12D3KooW")
    number = 0
    for character in peer:
        number = number * 58 + _ALPHABET.index(character)
    raw = number.to_bytes(39)[1:]  # 52 base-58 digits: at most 38 bytes and a few bits
    if not raw.startswith(_PREFIX):
        raise ValueError("not an ed25519 peer id: it names another kind of key")
    return raw.removeprefix(_PREFIX)


def verify(peer: PeerId, payload: bytes, signature: bytes) -> bool:
    """Whether `signature` (64 bytes) is that of `peer` over `payload`; a foreign or malformed name is False."""
    try:
        VerifyKey(public_key_of(peer)).verify(payload, signature)
    except (ValueError, BadSignatureError):
        return False
    return True


def nickname(peer: PeerId) -> str:
    """Two words for people to tell peers apart, "amber-otter"; of 9,250 pairs, so for no machine."""
    digest = blake3(peer.encode()).digest()
    return f"{_ADJECTIVES[digest[0] % len(_ADJECTIVES)]}-{_ANIMALS[digest[1] % len(_ANIMALS)]}"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ADJECTIVES = _words(
    """
    agile amber ample azure balmy birch bold brave breezy bright brisk bronze calm candid cedar civil clever
    copper coral cosmic cozy crisp curious dapper daring deft dewy eager early earnest ebony fair fearless fern
    fleet fluent fond frank fresh frosty gentle gilded glad golden grand green hardy hazel hearty honest humble
    indigo ivory jade jolly keen kind lilac limber lively loyal lucid lunar mellow merry mighty mild misty modest
    mossy neat nimble noble oaken olive opal patient pearl placid plucky polar prompt proud quick quiet rapid
    ready regal robust rosy ruby rustic sage sandy scarlet serene sharp silver sincere slate smooth snowy solar
    solid spry stable steady stout sunny swift tawny teal tidy tranquil true upbeat valiant velvet vivid warm
    willow windy wise witty zesty
    """
)
_ANIMALS = _words(
    """
    badger bear beaver bison bittern boar buck buzzard crane cricket curlew deer dipper dolphin dove eagle eider
    elk ermine falcon ferret finch fox gannet goat goose grebe grouse gull hare hawk hedgehog heron hound ibis jay
    kestrel kite lark lemming linnet lynx magpie marten merlin mole moose mouse newt otter owl oyster perch pike
    pine plover puffin raven robin salmon seal shrew shrike snipe sparrow squirrel stoat stork swan swift tern
    thrush trout vole
    """
)
