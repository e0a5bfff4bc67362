"""The first words to a peer of any version: who asks learns at once, and in words, whether it makes sense to go on.

    question   [protocol, software, run]
    answer     [protocol, software, name, code, words, seen]

Each is a msgpack array. The channel has no version: these fields stay what they are for ever, so that the oldest and
the newest release can tell each other that they do not fit. A later one may append fields, which earlier ones ignore.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from dugnad.dht.identity import PeerId
from dugnad.dht.transport import Transport, TransportError, printable
from dugnad.dht.wire import PROTOCOL, WireError

CHANNEL = "dugnad/hello"
MAX_BYTES = 1024
"""Of a question and of an answer, for ever."""
ANSWER_S = 5.0
"""How long all who are asked have, together."""
OTHER_PROTOCOL, OTHER_RUN = "E301", "E304"
NOT_ADMITTED, BANNED = "E401", "E403"

_Software = Annotated[str, Meta(pattern=r"^[0-9A-Za-z.+!_-]{0,40}\Z")]
"""A version of dugnad; safe in a command that people copy."""


class Hello(Struct, frozen=True, array_like=True):
    """Which protocol and software the asker has, and of which run (32 bytes) it asks."""

    protocol: Annotated[int, Meta(ge=0, le=2**31)]
    software: _Software
    run: Annotated[bytes, Meta(min_length=32, max_length=32)]


class Answer(Struct, frozen=True, array_like=True):
    """What the answerer is, and what it thinks of the asker. Raises ValueError for what is not printable."""

    protocol: Annotated[int, Meta(ge=0, le=2**31)]
    software: _Software
    name: Annotated[str, Meta(max_length=64)]
    """Of the recipe of the run that it takes part in."""
    code: Annotated[str, Meta(pattern=r"^([EW][0-9]{3})?\Z")]
    """Of the error that keeps the asker out; "" if nothing does."""
    words: Annotated[str, Meta(max_length=200)]
    """Why."""
    seen: Annotated[str, Meta(max_length=256)]
    """The multiaddr from which it saw the asker come; "" if it does not know."""

    def __post_init__(self) -> None:
        if not (self.name + self.words + self.seen).isprintable():
            raise ValueError("texts must be printable")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a role says to one who wants to take part: the code of an error and why, or nothing."""

    code: str = ""
    words: str = ""


Judge = Callable[[PeerId], Verdict]
"""Says what keeps a peer out of our run, if anything does."""
Seen = Callable[[PeerId], Awaitable[str]]
"""The multiaddr from which a peer came; "" if that is not known."""
M = TypeVar("M", bound=Struct)


class TurnedAway(Exception):
    """Those who were asked will not have us; code: why, see docs/errors.md, and the text begins with it."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(f"{code} {sentence}")
        self.code = code


def welcomes(peer: PeerId) -> Verdict:
    """The judge of a run that takes everyone."""
    return Verdict()


async def unseen(peer: PeerId) -> str:
    """Where no peer is known to come from."""
    return ""


async def serve(transport: Transport, run: bytes, name: str, *, judge: Judge = welcomes, seen: Seen = unseen) -> None:
    """Answer hellos as a member of `run`, whose recipe is called `name`."""

    async def answer(peer: PeerId, raw: bytes) -> bytes:
        asked = _decode(_hellos, raw)
        return encode(reply(asked, run, name, judge(peer) if asked.run == run else Verdict(), await seen(peer)))

    await transport.serve(CHANNEL, answer)


def reply(asked: Hello, run: bytes, name: str, verdict: Verdict, seen: str) -> Answer:
    """What a member of `run` answers; protocol and run go before what the role thinks."""
    if asked.protocol != PROTOCOL:
        verdict = Verdict(OTHER_PROTOCOL, f"this run speaks protocol {PROTOCOL}")
    elif asked.run != run:
        verdict = Verdict(OTHER_RUN, "takes part in another run")
    return Answer(PROTOCOL, version("dugnad"), name, verdict.code, printable(verdict.words), printable(seen))


async def greet(transport: Transport, peers: Iterable[PeerId], run: bytes) -> Answer | None:
    """The first answer that takes us, of `peers`, all asked at once; None if nobody says anything within 5 s.

    Raises TurnedAway if some turn us away and nobody takes us.
    """
    question = encode(Hello(PROTOCOL, version("dugnad"), run))
    faults: list[TurnedAway] = []

    async def ask(peer: PeerId) -> Answer | None:
        try:
            answer = _decode(_answers, await transport.request(peer, CHANNEL, question, timeout_s=ANSWER_S))
        except (TransportError, WireError):
            return None  # gone, or nothing that says hello: what comes next will tell
        fault = fault_of(answer, peer, transport.peer_id)
        if fault is not None:
            faults.append(fault)
        return None if fault is not None else answer

    asking = [asyncio.create_task(ask(peer)) for peer in peers]
    try:
        for first in asyncio.as_completed(asking):
            if (answer := await first) is not None:
                return answer
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    if faults:
        raise min(faults, key=lambda fault: _MOST_TELLING.get(fault.code, 9))
    return None


_MOST_TELLING = {BANNED: 0, NOT_ADMITTED: 1, OTHER_PROTOCOL: 2, OTHER_RUN: 3}


def fault_of(answer: Answer, peer: PeerId, me: PeerId) -> TurnedAway | None:
    """Why, by the answer of `peer`, we can't take part; in our own words, where we know the code."""
    if answer.protocol != PROTOCOL:
        return TurnedAway(OTHER_PROTOCOL, _other_protocol(answer))
    if answer.code == OTHER_RUN:
        return TurnedAway(
            OTHER_RUN,
            f'{peer} takes part in another run, "{answer.name}", and not in the one of this invite. Ask the organizer '
            "for a new invite.",
        )
    if answer.code == NOT_ADMITTED:
        return TurnedAway(NOT_ADMITTED, not_admitted(answer.words, me))
    if answer.code == BANNED:
        return TurnedAway(BANNED, banned(answer.words))
    return TurnedAway(answer.code, answer.words) if answer.code.startswith("E") else None


def not_admitted(why: str, me: PeerId) -> str:
    """What E401 says, without the code."""
    return f"{why or 'you are not on the allow-list'}. Your key: {me} (send it to the organizer)."


def banned(why: str) -> str:
    """What E403 says, without the code."""
    return f"the organizer has banned your key{f' ({why})' if why else ''}. Only the organizer can take that back."


def _other_protocol(answer: Answer) -> str:
    older = answer.protocol < PROTOCOL and answer.software
    fix = f"it needs dugnad {answer.software}" if older else "update your clone: git pull && make setup"
    return f"this run speaks protocol {answer.protocol}, you have {PROTOCOL}; {fix}"


_encoder = msgspec.msgpack.Encoder()
_hellos = msgspec.msgpack.Decoder(Hello)
_answers = msgspec.msgpack.Decoder(Answer)


def encode(message: Hello | Answer) -> bytes:
    """A question or an answer as bytes."""
    return _encoder.encode(message)


def _decode(decoder: msgspec.msgpack.Decoder[M], raw: bytes) -> M:
    """Raises WireError; remote bytes can raise nothing else."""
    if len(raw) > MAX_BYTES:
        raise WireError("too large", f"a hello of {len(raw)} bytes, at most {MAX_BYTES}")
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise WireError("malformed", f"hello: {error}") from error
