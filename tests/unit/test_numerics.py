"""What a recipe asks of this machine is seen before a run begins."""

from dataclasses import replace

import pytest
import torch

from dugnad.configs.recipe import Recipe, RecipeError, load
from dugnad.peer.data import Corpus, CorpusError
from dugnad.peer.numerics import Numerics
from dugnad.peer.trainer import OptimizerError

TINY = load("tiny-books")
CORPUS = Corpus.load(TINY.data)


def with_parts(elements: int) -> Recipe:
    return replace(TINY, codec=replace(TINY.codec, block_elements=64, part_elements=elements))


def test_a_model_in_too_many_parts_is_a_recipe_error_that_names_the_keys_and_the_way_out() -> None:
    with pytest.raises(
        RecipeError, match=r"part_elements is 64 \(with codec.block_elements = 64\).* 13164 parts"
    ) as said:
        Numerics(with_parts(64))
    assert str(said.value).endswith("at most 8192 are allowed: make it at least 128")
    assert len(Numerics(with_parts(128)).part_bytes) == 6582


def test_a_strangers_huge_model_is_refused_before_its_parts_are_listed() -> None:
    model = replace(TINY.model, layers=256, width=16384, heads=1)
    with pytest.raises(RecipeError, match="at most 8192 are allowed"):
        Numerics(replace(with_parts(64), model=model))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_eight_bits_without_a_gpu_are_refused_at_the_start_of_who_trains_and_of_nobody_else() -> None:
    eight = Numerics(replace(TINY, inner=replace(TINY.inner, optimizer="adamw8bit")))
    eight.prepare(to_train=False)
    with pytest.raises(OptimizerError, match=r'"adamw8bit" needs an NVIDIA GPU, this is cpu.*"adamw"'):
        eight.prepare(to_train=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_eight_bits_train_on_the_gpu() -> None:
    eight = Numerics(replace(TINY, inner=replace(TINY.inner, optimizer="adamw8bit")))
    eight.prepare(to_train=True)
    theta = eight.first_model().weights
    done = eight.trainer.train(
        theta, ranges=[(0, 64)], steps=2, global_step=0, stop=lambda: False, on_step=lambda step: None
    )
    assert done.steps == 2
    assert done.pseudo_gradient.any()


def test_a_corpus_that_is_too_short_for_the_recipe_is_found_at_the_start() -> None:
    with pytest.raises(CorpusError, match="hold less back"):
        Numerics(replace(TINY, data=replace(TINY.data, validation_bytes=2**30))).prepare(to_train=False)


def test_a_training_text_shorter_than_a_sample_is_found_at_the_start() -> None:
    num_bytes = sum(part.size for part in (CORPUS.train, CORPUS.validation))
    data = replace(TINY.data, validation_bytes=num_bytes - TINY.model.context)
    with pytest.raises(CorpusError, match="only 128 bytes are there to train on"):
        Numerics(replace(TINY, data=data)).prepare(to_train=False)
