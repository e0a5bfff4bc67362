"""What the user is told, and what is our own mistake."""

import errno
import os

import pytest

from dugnad.coordinator.ledger import LedgerError
from dugnad.peer.data import CorpusError
from dugnad.peer.errors import _ADVICE, _KNOWN, sentence_of
from dugnad.peer.trainer import OptimizerError


def test_every_error_that_is_known_by_name_exists() -> None:
    import importlib

    for name in {*_KNOWN, *_ADVICE}:
        module, _, kind = name.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), kind), Exception), name


@pytest.mark.parametrize("error", [CorpusError("so it is"), OptimizerError("so it is")])
def test_an_error_with_advice_of_its_own_is_told_as_it_is(error: Exception) -> None:
    assert sentence_of(error) == ("so it is", 1)
    assert sentence_of(ExceptionGroup("", [ExceptionGroup("", [error])])) == ("so it is", 1)


def test_a_chain_file_that_does_not_hold_together_comes_with_what_to_do() -> None:
    said = sentence_of(LedgerError("block of round 7 does not follow round 5 of this chain"))
    assert said is not None
    assert said[0].startswith("block of round 7 does not follow round 5 of this chain. The chain.sqlite in this")
    assert "put back a copy" in said[0]


def test_what_is_our_own_mistake_keeps_its_traceback() -> None:
    assert sentence_of(AssertionError()) is None
    assert sentence_of(ExceptionGroup("", [CorpusError("x"), AssertionError()])) is None


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_too_many_open_files_come_with_what_to_do(number: int) -> None:
    said = sentence_of(OSError(number, os.strerror(number)))
    assert said == ("too many open files: raise the limit with ulimit -n", 1)
