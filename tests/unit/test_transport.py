"""A stranger's words."""

import pytest

from dugnad.dht.identity import PeerId
from dugnad.dht.transport import RequestRefused


@pytest.mark.parametrize("words", ["no\nway", "\x1b[2J", "\u202egnp", "\udce4", "no " * 500])
def test_a_refusals_words_neither_steer_a_terminal_nor_fill_it(words: str) -> None:
    refused = RequestRefused(PeerId("stranger"), words)
    assert str(refused).isprintable()
    assert refused.reason.isprintable()
    assert len(refused.reason) <= 200
