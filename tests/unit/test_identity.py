import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dugnad.dht.identity import (
    Identity,
    IdentityError,
    PeerId,
    nickname,
    peer_id_of,
    public_key_of,
    verify,
    write_private,
)

ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
SEED = bytes(range(32))
ME = Identity.from_seed(SEED)

keys = st.binary(min_size=32, max_size=32)
identities = keys.map(Identity.from_seed)


def base58(raw: bytes) -> str:
    """Digit by digit, as one does it on paper; written apart from the module's own."""
    digits: list[int] = []
    for byte in raw:
        carry = byte
        for place, digit in enumerate(digits):
            carry, digits[place] = divmod(digit * 256 + carry, 58)
        while carry:
            carry, digit = divmod(carry, 58)
            digits.append(digit)
    zeros = len(raw) - len(raw.lstrip(b"\0"))
    return "1" * zeros + "".join(ALPHABET[digit] for digit in reversed(digits))


def test_an_rfc_8032_key_signs_as_the_rfc_says() -> None:
    me = Identity.from_seed(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
    assert me.public_key.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert me.sign(b"").hex() == (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b"
    )


@given(keys)
def test_a_peer_id_is_the_base58_multihash_of_the_key_and_gives_the_key_back(key: bytes) -> None:
    peer = peer_id_of(key)
    assert peer == base58(bytes.fromhex("002408011220") + key)
    assert len(peer) == 52
    assert peer.startswith("12D3KooW")
    assert public_key_of(peer) == key


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_key_of_another_length_has_no_peer_id(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        peer_id_of(bytes(size))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "1" * 52,
        "z" * 52,
        "1" + "z" * 51,
        ME.peer_id[:-1],
        ME.peer_id + "1",
        "1" + ME.peer_id,
        ME.peer_id.replace("K", "0"),
        ME.peer_id.replace("K", "é"),
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        "16Uiu2HAm3LXDTEaXUdLZbNTqzRPLnWCXJsrrJ1FnmRkQHUYNjMdZ",
    ],
)
def test_what_is_not_an_ed25519_peer_id_is_a_value_error_and_verifies_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=r"peer id|substring"):
        public_key_of(PeerId(name))
    assert not verify(PeerId(name), b"words", ME.sign(b"words"))


@given(st.text(max_size=60) | st.text(ALPHABET, min_size=51, max_size=53).map(lambda text: "1" + text[1:]))
def test_any_text_is_a_peer_id_with_exactly_one_key_or_a_value_error(text: str) -> None:
    try:
        key = public_key_of(PeerId(text))
    except ValueError:
        return
    assert peer_id_of(key) == text


@given(identities, st.binary(max_size=200))
def test_a_signature_verifies_for_its_signer(me: Identity, payload: bytes) -> None:
    signature = me.sign(payload)
    assert len(signature) == 64
    assert verify(me.peer_id, payload, signature)


@given(identities, identities, st.binary(max_size=50), st.binary(max_size=50))
def test_a_signature_is_for_one_peer_and_one_payload(me: Identity, other: Identity, said: bytes, unsaid: bytes) -> None:
    signature = me.sign(said)
    assert verify(other.peer_id, said, signature) == (me.peer_id == other.peer_id)
    assert verify(me.peer_id, unsaid, signature) == (said == unsaid)


@pytest.mark.parametrize("position", range(64))
def test_a_signature_with_one_byte_changed_does_not_verify(position: int) -> None:
    signature = bytearray(ME.sign(b"words"))
    signature[position] ^= 1
    assert not verify(ME.peer_id, b"words", bytes(signature))


@pytest.mark.parametrize("size", [0, 1, 63, 65, 128])
def test_a_signature_of_another_length_does_not_verify(size: int) -> None:
    assert not verify(ME.peer_id, b"words", (ME.sign(b"words") * 2)[:size])


@given(keys, st.binary(min_size=64, max_size=64))
def test_keys_and_signatures_off_the_curve_are_refused_and_raise_nothing(key: bytes, signature: bytes) -> None:
    assert not verify(peer_id_of(key), b"words", signature)


def test_two_generated_identities_differ() -> None:
    assert Identity.generate().peer_id != Identity.generate().peer_id


def test_the_libp2p_key_holds_seed_and_public_key() -> None:
    key = ME.libp2p_private_key()
    assert len(key) == 68
    assert key == bytes([0x08, 1, 0x12, 64]) + SEED + ME.public_key


def test_an_identity_is_made_once_for_its_owner_only_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "identity"
    made = Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["identity"]
    assert Identity.load_or_create(path).peer_id == made.peer_id


@pytest.mark.parametrize("text", [b"", b"\n", b"00", b"zz" * 32, b"00" * 31, b"00" * 33, b"\xff" * 64])
def test_a_file_that_holds_no_identity_is_an_error_that_says_what_to_do_and_is_left_alone(
    tmp_path: Path, text: bytes
) -> None:
    path = tmp_path / "identity"
    path.write_bytes(text)
    with pytest.raises(IdentityError, match=str(path)):
        Identity.load_or_create(path)
    assert path.read_bytes() == text


def test_a_place_that_cannot_be_read_or_written_is_an_identity_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "identity"):
        with pytest.raises(IdentityError, match=str(path)):
            Identity.load_or_create(path)


def test_a_write_that_fails_leaves_neither_a_half_file_nor_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError("disk full")

    path = tmp_path / "secret"
    write_private(path, b"before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_private(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_nickname_is_two_words_and_stays_the_same_from_version_to_version() -> None:
    assert nickname(ME.peer_id) == "cedar-bison"
    assert len({nickname(peer_id_of(bytes([k]) * 32)) for k in range(256)}) > 200
