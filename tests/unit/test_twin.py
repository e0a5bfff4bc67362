"""What our own records, as others have them, say of another peer with our key."""

import pytest

from dugnad.dht.twin import YOUNG_S, Twin

BEGAN_S = 1000.0
OURS = 500


@pytest.mark.parametrize(
    ("seq", "issued_s", "spoken", "suspected", "found"),
    [
        (500, 990.0, False, False, False),  # our own, from before a restart
        (500, 1000.9, False, False, False),  # the same, where two clocks differ a little
        (501, 990.0, False, True, False),  # from before our numbers were lost
        (501, 1002.0, False, True, True),
        (400, 1002.0, False, False, True),  # of a copy of our folder: we have said nothing yet
        (400, 1002.0, True, False, False),  # ours
        (501, 1002.0, True, True, True),
        (501, 990.0, True, True, False),
    ],
)
def test_a_record_of_ours_that_another_must_have_issued_now_gives_it_away(
    seq: int, issued_s: float, spoken: bool, suspected: bool, found: bool
) -> None:
    twin = Twin(suspected=False)
    twin.begin(now=BEGAN_S)
    if spoken:
        twin.speak(now=BEGAN_S)
    twin.heard(seq, issued_s, ours=OURS)
    assert (twin.suspected, twin.found) == (suspected, found)


def test_before_we_are_in_the_network_nothing_is_concluded() -> None:
    twin = Twin(suspected=False)
    twin.heard(501, 2000.0, ours=OURS)
    assert twin.suspected
    assert not twin.found


def test_a_copied_folder_is_suspect_and_a_peer_is_a_newcomer_for_a_while() -> None:
    twin = Twin(suspected=True)
    assert twin.suspected
    assert twin.newcomer(now=BEGAN_S)
    twin.speak(now=BEGAN_S)
    assert twin.newcomer(now=BEGAN_S + YOUNG_S - 1)
    assert not twin.newcomer(now=BEGAN_S + YOUNG_S)
