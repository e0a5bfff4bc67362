"""Who dials whom: for every pair of situations the two sides' steps fit together."""

import itertools

import pytest

from dugnad.dht import meeting
from dugnad.dht.endpoint import Endpoint
from dugnad.dht.identity import PeerId
from dugnad.dht.meeting import (
    FAVOUR_S,
    PLACES_FOR_ALL,
    PLACES_FOR_ONE,
    PLACES_FOR_STRANGERS,
    Dial,
    Favours,
    Give,
    Meet,
    Punch,
    Step,
    Wait,
)
from dugnad.dht.paths import Reach
from dugnad.dht.wire import WireError


def meet(reach: Reach, *, open: str = "", local: str = "", outside: str = "", second: str = "") -> Meet:
    return Meet(b"certificate", reach, (open,) if open else (), (local,) if local else (), outside, second)


PUBLIC = meet(Reach.OPEN, open="11.0.0.1:4002", local="11.0.0.1:4002", second="11.0.0.1:50000")
CONE = meet(Reach.CONE, local="192.168.1.2:4002", outside="11.0.0.21:4002")
NEIGHBOUR = meet(Reach.CONE, local="192.168.1.3:4002", outside="11.0.0.21:4003")
FAR_CONE = meet(Reach.CONE, local="192.168.1.2:4002", outside="11.0.0.22:4002")
SYMMETRIC = meet(Reach.SYMMETRIC, local="192.168.2.2:4002", outside="11.0.0.23:61234")
MAYBE = meet(Reach.CONE, open="11.0.0.24:4002", local="192.168.3.2:4002", outside="11.0.0.24:4002")
"""Its router lets some in; the other two are not seen yet, and not to be punched."""
MAYBE_TOO = meet(Reach.UNKNOWN, open="11.0.0.25:4002", local="192.168.3.2:4002")
MAYBE_UNSEEN = meet(Reach.UNKNOWN, open="11.0.0.27:4002", local="192.168.3.2:4002")
MAYBE_SYMMETRIC = meet(Reach.SYMMETRIC, open="11.0.0.26:4002", local="192.168.3.2:4002", outside="11.0.0.26:61234")
UNSEEN = meet(Reach.UNKNOWN, local="10.0.0.7:4002")
LONELY = meet(Reach.UNKNOWN, local="127.0.0.1:4002")
LONELY_TOO = meet(Reach.UNKNOWN, local="127.0.0.1:4004")


def both(first: Meet, second: Meet) -> tuple[Step, Step]:
    return meeting.step(first, second, first=True), meeting.step(second, first, first=False)


@pytest.mark.parametrize(
    ("first", "second", "steps"),
    [
        (CONE, PUBLIC, (Dial((Endpoint("11.0.0.1", 4002),)), Wait())),
        (PUBLIC, CONE, (Wait(), Dial((Endpoint("11.0.0.1", 4002),)))),
        (PUBLIC, SYMMETRIC, (Wait(), Dial((Endpoint("11.0.0.1", 4002),)))),
        (PUBLIC, PUBLIC, (Dial((Endpoint("11.0.0.1", 4002),)), Wait())),
        (CONE, FAR_CONE, (Punch(Endpoint("11.0.0.22", 4002)), Punch(Endpoint("11.0.0.21", 4002)))),
        (CONE, NEIGHBOUR, (Dial((Endpoint("192.168.1.3", 4002),)), Wait())),
        (LONELY, LONELY_TOO, (Dial((Endpoint("127.0.0.1", 4004),)), Wait())),
        (MAYBE, PUBLIC, (Dial((Endpoint("11.0.0.1", 4002),)), Wait())),
        (PUBLIC, MAYBE, (Wait(), Dial((Endpoint("11.0.0.1", 4002),)))),
        (CONE, MAYBE, (Punch(Endpoint("11.0.0.24", 4002)), Punch(Endpoint("11.0.0.21", 4002)))),
        (SYMMETRIC, MAYBE, (Dial((Endpoint("11.0.0.24", 4002),)), Wait())),
        (MAYBE, MAYBE_TOO, (Dial((Endpoint("11.0.0.25", 4002),)), Wait())),
        (MAYBE_TOO, MAYBE_UNSEEN, (Dial((Endpoint("11.0.0.27", 4002),)), Wait())),
        (MAYBE_SYMMETRIC, CONE, (Wait(), Dial((Endpoint("11.0.0.26", 4002),)))),
    ],
)
def test_each_does_its_part(first: Meet, second: Meet, steps: tuple[Step, Step]) -> None:
    assert both(first, second) == steps


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (CONE, SYMMETRIC, "it is behind a router that takes another port for each connection"),
        (SYMMETRIC, CONE, "you are behind a router that takes another port for each connection"),
        (CONE, UNSEEN, "how it is seen from outside, nobody has said yet"),
        (UNSEEN, CONE, "how you are seen from outside, nobody has said yet"),
    ],
)
def test_where_nothing_can_be_done_both_know_why(first: Meet, second: Meet, words: str) -> None:
    mine, theirs = both(first, second)
    assert mine == Give(words)
    assert isinstance(theirs, Give)


EVERYONE = (
    PUBLIC,
    CONE,
    NEIGHBOUR,
    FAR_CONE,
    SYMMETRIC,
    MAYBE,
    MAYBE_TOO,
    MAYBE_UNSEEN,
    MAYBE_SYMMETRIC,
    UNSEEN,
    LONELY,
)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(EVERYONE, repeat=2)))
def test_nobody_waits_for_one_who_waits_or_punches_alone(first: Meet, second: Meet) -> None:
    mine, theirs = both(first, second)
    fits = {(Dial, Wait), (Wait, Dial), (Punch, Punch), (Give, Give)}
    assert (type(mine), type(theirs)) in fits


@pytest.mark.parametrize(("first", "second"), list(itertools.product(EVERYONE, repeat=2)))
def test_where_both_speak_first_at_once_someone_dials_all_the_same(first: Meet, second: Meet) -> None:
    mine, theirs = meeting.step(first, second, first=True), meeting.step(second, first, first=True)
    assert {type(mine), type(theirs)} in ({Dial}, {Dial, Wait}, {Punch}, {Give})


def test_what_is_said_survives_the_wire() -> None:
    for said in EVERYONE:
        assert meeting.decode(meeting.encode(said)) == said


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc1",
        bytes(5000),
        meeting.encode(meet(Reach.OPEN, open="11.0.0.1")),
        meeting.encode(meet(Reach.OPEN, open="11.0.0.1:0")),
        meeting.encode(meet(Reach.OPEN, open="11.0.0.1:70000")),
        meeting.encode(meet(Reach.CONE, outside="999.0.0.1:4002")),
        meeting.encode(meet(Reach.CONE, second="beef:4002")),
        meeting.encode(meet(Reach.CONE)) + b"\0",
    ],
)
def test_nonsense_is_refused(raw: bytes) -> None:
    with pytest.raises(WireError):
        meeting.decode(raw)


# -- what is done for others


DIAL = Dial(tuple(Endpoint("11.0.0.1", port) for port in (4001, 4002)))
PUNCH = Punch(Endpoint("11.0.0.1", 4002))


def granted(favours: Favours, peer: str, step: Step, *, at: float, known: bool = True) -> bool:
    return favours.grant(PeerId(peer), step, known=known, now=at)


def test_one_peer_has_us_dial_so_many_places_and_then_has_to_wait() -> None:
    favours = Favours()
    assert all(granted(favours, "eve", PUNCH, at=0.0) for _ in range(PLACES_FOR_ONE - 1))
    assert not granted(favours, "eve", DIAL, at=1.0), "it has one place left, and these are two"
    assert granted(favours, "eve", PUNCH, at=1.0)
    assert not granted(favours, "eve", PUNCH, at=FAVOUR_S - 0.01)
    assert granted(favours, "ann", DIAL, at=FAVOUR_S - 0.01), "that one asked for nothing yet"
    assert granted(favours, "eve", DIAL, at=FAVOUR_S)


def test_any_number_of_names_has_us_dial_no_more_than_that_altogether() -> None:
    favours = Favours()
    assert sum(granted(favours, f"eve {k}", DIAL, at=k * 1e-3) for k in range(1000)) == PLACES_FOR_ALL // 2
    assert not granted(favours, "ann", PUNCH, at=1.0)
    assert granted(favours, "ann", PUNCH, at=FAVOUR_S + 0.1)


def test_any_number_of_strangers_leaves_most_of_the_room_to_those_whom_the_run_knows() -> None:
    favours = Favours()
    strangers = [granted(favours, f"eve {k}", PUNCH, at=k * 1e-3, known=False) for k in range(1000)]
    assert sum(strangers) == PLACES_FOR_STRANGERS
    known = [granted(favours, f"ann {k}", PUNCH, at=1.0 + k * 1e-3) for k in range(1000)]
    assert sum(known) == PLACES_FOR_ALL - PLACES_FOR_STRANGERS


def test_a_stranger_whom_the_run_comes_to_know_is_held_up_no_longer() -> None:
    favours = Favours()
    assert not all(granted(favours, f"eve {k}", PUNCH, at=0.0, known=False) for k in range(PLACES_FOR_STRANGERS + 1))
    assert not granted(favours, "bob", PUNCH, at=0.0, known=False)
    assert granted(favours, "bob", PUNCH, at=0.0, known=True)


@pytest.mark.parametrize("step", [Wait(), Give("for a reason")])
def test_to_wait_costs_nothing(step: Step) -> None:
    favours = Favours()
    assert all(granted(favours, "eve", step, at=0.0) for _ in range(1000))
    assert granted(favours, "eve", DIAL, at=0.0)
