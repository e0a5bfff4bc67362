import lzma
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dugnad.configs.recipe import load
from dugnad.peer.data import Corpus, CorpusError

SETTINGS = load("tiny-books").data
TEXT_BYTES = 5_057_279
CONTEXT = 128
MASK = 2**64 - 1
BOOKS = Corpus.load(SETTINGS)

seeds = st.integers(0, 2**63 - 1)
numbers = st.integers(0, 2**80)


def counting(train_bytes: int, validation_bytes: int = 1, seed: int = 1) -> Corpus:
    """A corpus whose bytes are their own places."""
    text = np.arange(train_bytes + validation_bytes, dtype=np.uint8)
    return Corpus(text[:train_bytes], text[train_bytes:], seed)


def splitmix_output(state: int) -> int:
    """The reference generator's next number, in whole numbers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_text_is_split_without_loss_and_its_end_is_held_back() -> None:
    text = lzma.decompress((Path(__file__).parents[2] / "peer/corpora/shakespeare.txt.xz").read_bytes())
    assert len(text) == TEXT_BYTES
    assert BOOKS.train.tobytes() + BOOKS.validation.tobytes() == text
    assert BOOKS.validation.size == SETTINGS.validation_bytes


def test_the_reference_generator_is_the_published_one() -> None:
    assert splitmix_output(0) == 0xE220A8397B1DCDAF  # first output for seed 0, as published with the algorithm


@given(seed=seeds, k=numbers)
def test_a_sample_lies_where_splitmix64_says(seed: int, k: int) -> None:
    corpus = counting(train_bytes=200, seed=seed)
    start = splitmix_output((splitmix_output(seed) + k * 0x9E3779B97F4A7C15) & MASK) % (200 - 9)
    assert corpus.sample(k, context=9).tolist() == list(range(start, start + 10))


def test_these_samples_are_the_same_on_every_machine() -> None:
    assert BOOKS.sample(0, context=30).tobytes() == b"UCKINGHAM.\nLo, you, my lord,\nTh"
    assert BOOKS.sample(10**12, context=30).tobytes() == b"lancholy;\nand then there's a pa"


@given(ks=st.lists(numbers, min_size=1, max_size=20))
def test_a_batch_is_its_samples_one_by_one(ks: list[int]) -> None:
    batch_BS = BOOKS.batch(ks, context=7)
    assert batch_BS.shape == (len(ks), 8)
    assert batch_BS.dtype == np.uint8
    assert [row.tolist() for row in batch_BS] == [BOOKS.sample(k, context=7).tolist() for k in ks]


def test_a_range_is_as_good_as_a_list_and_nothing_gives_nothing() -> None:
    np.testing.assert_array_equal(BOOKS.batch(range(5, 9), context=7), BOOKS.batch([5, 6, 7, 8], context=7))
    assert BOOKS.batch([], context=7).shape == (0, 8)


def test_samples_come_from_all_of_the_training_text_and_only_from_it() -> None:
    corpus = counting(train_bytes=100, validation_bytes=100)
    starts = corpus.batch(range(5000), context=9)[:, 0]
    assert set(starts.tolist()) == set(range(91))
    counts = np.bincount(starts)
    assert counts.min() > 25
    assert counts.max() < 95
    assert corpus.batch(range(5000), context=9).max() == 99


def test_another_seed_is_another_order() -> None:
    def starts(seed: int) -> NDArray[np.uint8]:
        return counting(train_bytes=256, seed=seed).batch(range(64), context=1)[:, 0]

    assert np.mean(starts(1) == starts(2)) < 0.1
    # nor the same order begun elsewhere
    assert not {tuple(starts(1)[i : i + 4]) for i in range(60)} & {tuple(starts(2)[i : i + 4]) for i in range(60)}


def test_a_negative_sample_does_not_exist() -> None:
    with pytest.raises(ValueError, match="no sample -1"):
        BOOKS.batch([3, -1], context=7)


def test_a_training_text_just_long_enough_has_one_sample() -> None:
    assert counting(train_bytes=10).sample(77, context=9).tolist() == list(range(10))
    with pytest.raises(CorpusError, match=r"model\.context is 10, but only 10 bytes"):
        counting(train_bytes=10).sample(77, context=10)


@pytest.mark.parametrize("sequences", [1, 3, 10])
def test_validation_sequences_are_spread_out_and_do_not_overlap(sequences: int) -> None:
    corpus = counting(train_bytes=50, validation_bytes=103)
    batch_BS = corpus.validation_batch(sequences, context=9)
    assert batch_BS.shape == (sequences, 10)
    places = batch_BS.ravel().tolist()
    assert len(set(places)) == len(places)
    assert min(places) == 50
    assert max(places) >= 50 + 103 - 103 // sequences
    assert np.all(np.diff(batch_BS.astype(int), axis=1) == 1)


def test_more_validation_than_is_held_back_is_refused() -> None:
    corpus = counting(train_bytes=50, validation_bytes=103)
    with pytest.raises(CorpusError, match=r"evaluation\.sequences is 11, each of 10 bytes, but only 103"):
        corpus.validation_batch(11, context=9)


@pytest.mark.parametrize("held_back", [TEXT_BYTES, 2**40])
def test_holding_everything_back_is_refused(held_back: int) -> None:
    with pytest.raises(CorpusError, match=rf"validation_bytes is {held_back}, but .* has {TEXT_BYTES} bytes"):
        Corpus.load(replace(SETTINGS, validation_bytes=held_back))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (lzma.compress(b"another text"), "is damaged: 12 bytes with sha256 .* not 5057279"),
        (lzma.compress(b"cut short")[:-4], "cannot be read"),
        (b"not compressed at all", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_damaged_corpus_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: bytes | None, message: str
) -> None:
    (tmp_path / "corpora").mkdir()
    if stored is not None:
        (tmp_path / "corpora/shakespeare.txt.xz").write_bytes(stored)
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    with pytest.raises(CorpusError, match=f"{message}.*Install dugnad again"):
        Corpus.load(SETTINGS)
