"""What a host in a test is given by others: an owner for each record, and a meter."""

from dugnad.dht.identity import PeerId, public_key_of


def owner_of(raw: bytes) -> PeerId | None:
    """Records of these tests are a peer id and some text."""
    peer = PeerId(raw[:52].decode("ascii", "replace"))
    try:
        public_key_of(peer)
    except ValueError:
        return None
    return peer


def ignore(direction: str, kind: str, num_bytes: int) -> None:
    """A meter for those who don't count."""
