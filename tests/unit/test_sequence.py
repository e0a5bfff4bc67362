"""The numbers of our records: they only grow, whatever the clock does and whenever the process ends."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dugnad.dht.sequence import STEP, Sequence

AN_HOUR = 3_600_000


@given(st.lists(st.integers(0, 2**62) | st.none(), max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
def test_no_number_is_given_twice_over_restarts_and_clocks_set_back(
    tmp_path_factory: pytest.TempPathFactory, clock: list[int | None]
) -> None:
    path = tmp_path_factory.mktemp("numbers") / "sequence"
    sequence, last = Sequence(path), 0
    for shows in clock:
        if shows is None:  # the process is killed, and starts again
            sequence = Sequence(path)
        else:
            number = sequence.next(shows)
            assert max(last + 1, shows) <= number
            last = number


def test_a_number_is_that_which_was_asked_for_while_time_goes_on(tmp_path: Path) -> None:
    sequence = Sequence(tmp_path / "sequence")
    assert [sequence.next(at) for at in (1000, 2000, 2000, 500)] == [1000, 2000, 2001, 2002]


def test_the_file_is_written_once_for_many_numbers(tmp_path: Path) -> None:
    path = tmp_path / "sequence"
    sequence = Sequence(path)
    sequence.next(1)
    path.unlink()
    sequence.next(STEP)
    assert not path.exists()
    sequence.next(STEP + 2)
    assert int(path.read_text().split()[0]) == 2 * STEP + 2


def test_what_is_no_number_is_named(tmp_path: Path) -> None:
    path = tmp_path / "sequence"
    path.write_text("nonsense")
    with pytest.raises(ValueError, match="sequence: this is no number"):
        Sequence(path)
