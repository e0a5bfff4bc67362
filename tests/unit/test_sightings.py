"""What is believed of those who tell how our port looks from outside."""

import pytest

from dugnad.dht.endpoint import Endpoint
from dugnad.dht.identity import PeerId
from dugnad.dht.paths import Reach
from dugnad.dht.sightings import Judgement, Sighting, counting, judge

PORT = 4002
PLACES = {"ann": "11.0.0.1:4002", "bob": "11.0.0.2:4002", "eve": "11.0.0.3:4002", "joe": "11.0.0.4:4002"}
SECOND = "11.0.0.1:50000"
"""Ann's."""
HOME = "11.0.9.9:4002"
TURNED = "11.0.9.9:61001"
LIE = "12.0.0.1:1"


def sighting(observer: str, seen: str, place: str = "") -> Sighting:
    found = Sighting.of(PeerId(observer), Endpoint.parse(place or PLACES[observer]), seen)
    assert found is not None
    return found


def judged(*sightings: Sighting, more: bool = True) -> tuple[Reach, str]:
    found = judge(sightings, port=PORT, more=more)
    return found.reach, str(found.outside)


@pytest.mark.parametrize("said", [None, "", "garbage", "11.0.9.9", "11.0.9.9:0", "[2001:db8::9]:4002", "[fe80::1%x]:1"])
def test_what_cannot_be_so_is_no_sighting(said: str | None) -> None:
    assert Sighting.of(PeerId("ann"), Endpoint.parse(PLACES["ann"]), said) is None


def test_one_spelling_of_an_address_is_as_good_as_another() -> None:
    assert Endpoint.parse("[2001:DB8:0::9]:4002") == Endpoint.parse("[2001:db8::9]:4002")


def test_nobody_tells_nothing() -> None:
    assert judge([], port=PORT, more=False) == Judgement(Reach.UNKNOWN, None)


@pytest.mark.parametrize(
    ("sightings", "reach"),
    [
        ((sighting("ann", HOME),), Reach.CONE),
        ((sighting("ann", TURNED),), Reach.UNKNOWN),
        ((sighting("ann", TURNED), sighting("ann", TURNED)), Reach.UNKNOWN),
        ((sighting("ann", TURNED), sighting("ann", TURNED, SECOND)), Reach.CONE),
        ((sighting("ann", TURNED), sighting("bob", TURNED)), Reach.CONE),
        ((sighting("ann", HOME), sighting("bob", HOME), sighting("eve", LIE)), Reach.CONE),
        ((sighting("eve", LIE), sighting("ann", HOME), sighting("bob", HOME)), Reach.CONE),
        ((sighting("ann", "11.0.9.9:1"), sighting("bob", "11.0.9.9:2"), sighting("joe", LIE)), Reach.SYMMETRIC),
        (
            (
                sighting("ann", "11.0.9.9:1"),
                sighting("ann", "11.0.9.9:2", SECOND),
                sighting("bob", "11.0.9.9:3"),
                sighting("bob", "11.0.9.9:4", "11.0.0.2:50000"),
            ),
            Reach.SYMMETRIC,
        ),
    ],
)  # fmt: skip
def test_what_most_say_is_believed(sightings: tuple[Sighting, ...], reach: Reach) -> None:
    assert judge(sightings, port=PORT, more=True).reach is reach
    assert judge(sightings, port=PORT, more=False).reach is reach


def test_of_three_the_one_that_lies_changes_nothing_whoever_came_first() -> None:
    honest = [sighting("ann", HOME), sighting("bob", HOME)]
    for at in range(3):
        assert judged(*honest[:at], sighting("eve", LIE), *honest[at:]) == (Reach.CONE, HOME)


@pytest.mark.parametrize(
    "sightings",
    [
        (sighting("ann", HOME), sighting("eve", LIE)),
        (sighting("eve", LIE), sighting("eve", "12.0.0.1:2", "11.0.0.3:50000")),
        (sighting("ann", HOME), sighting("eve", LIE), sighting("eve", "12.0.0.1:2", "11.0.0.3:50000")),
    ],
)
def test_one_word_against_another_is_believed_only_where_nobody_else_can_be_asked(
    sightings: tuple[Sighting, ...],
) -> None:
    assert judge(sightings, port=PORT, more=True).reach is Reach.UNKNOWN
    assert judge(sightings, port=PORT, more=False).reach is Reach.SYMMETRIC


def test_who_sees_us_from_within_our_network_or_by_the_other_family_does_not_count() -> None:
    outside = sighting("ann", HOME)
    others = [
        sighting("bob", "192.168.1.6:4002", "192.168.1.2:4002"),
        sighting("joe", "192.168.1.6:4002"),
        sighting("eve", "[2a00::9]:4002", "[2a00::1]:4002"),
    ]
    assert counting([*others, outside]) == [outside]
    assert judged(*others, outside, more=False) == (Reach.CONE, HOME)


def test_where_all_are_in_one_network_they_are_what_there_is() -> None:
    within = [sighting("ann", "10.0.0.9:4002", "10.0.0.1:4002"), sighting("bob", "10.0.0.9:4002", "10.0.0.2:4002")]
    assert judged(*within) == (Reach.CONE, "10.0.0.9:4002")
