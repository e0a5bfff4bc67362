import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from dugnad.coordinator import answers, shell, sync
from dugnad.coordinator.averages import RESULTS_CHANNEL, ResultsHeader
from dugnad.coordinator.ledger import Ledger, LedgerError
from dugnad.coordinator.messages import (
    ROUND_KINDS,
    SYNC_KINDS,
    Applied,
    Ballot,
    Commit,
    Commits,
    CommitsRequest,
    Plan,
    StateOffer,
    StateRequest,
    Welcome,
    WelcomeRequest,
    applied_payload,
)
from dugnad.coordinator.sync import CHANNEL, CODEC, Asker, SyncError
from dugnad.dht import bulk
from dugnad.dht.delegation import Delegation
from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.transport import RequestRefused, Transport, TransportError, Unreachable
from dugnad.dht.wire import Codec, Kind, Message, WireError, open_sealed, seal
from tests.unit.chains import (
    CHARTER,
    GENESIS,
    RUN,
    SIGNER,
    FakeSigner,
    a_ledger,
    an_entry,
    digest,
    extend,
    honest_chain,
    relinked,
)
from tests.unit.memory_transport import MemoryTransport, Net, network
from tests.unit.shells import LAYOUT, Role, Run, serving
from tests.unit.still import Still

ME, DONOR, OTHER = (Identity.from_seed(bytes([k]) * 32) for k in range(1, 4))
SHORT_S = 0.05
LONG_S = 10.0
ENOUGH = 60
"""More questions than any chain here has rounds: who asks more often asks for ever."""

Say = Callable[[Message], Message | bytes]
"""How a donor answers: in words that it seals, or with these very bytes."""


def a_long_chain(num_rounds: int) -> list[Commit]:
    ledger = a_ledger()
    return [extend(ledger, an_entry("a", (10 * k, 10 * k + 10))) for k in range(num_rounds)]


CHAIN = a_long_chain(20)
OTHER_CHAIN = relinked(
    [msgspec.structs.replace(commit.block, model_before=digest("another model")) for commit in CHAIN]
)


def sealed(message: Message, *, by: Identity = DONOR, run: bytes = RUN) -> bytes:
    return seal(by, run, CODEC, message)


async def serve(net: Net, identity: Identity, say: Say, *, run: bytes = RUN) -> list[Message]:
    """Have `identity` answer what `ME` asks; the questions, as they come."""
    asked: list[Message] = []

    async def answer(sender: PeerId, raw: bytes) -> bytes:
        who, question = open_sealed(raw, run, CODEC)
        assert who == sender == ME.peer_id
        assert isinstance(question, Message)
        asked.append(question)
        if len(asked) > ENOUGH:
            await asyncio.Event().wait()
        said = say(question)
        return said if isinstance(said, bytes) else sealed(said, by=identity, run=run)

    await net.join(identity.peer_id).serve(CHANNEL, answer)
    return asked


@asynccontextmanager
async def asking(say: Say) -> AsyncIterator[tuple[Asker, list[Message]]]:
    """One who asks `DONOR`, which answers so, and what it is asked; nothing may take for ever."""
    async with network() as net, asyncio.timeout(LONG_S):
        asked = await serve(net, DONOR, say)
        yield Asker(net.join(ME.peer_id), ME, RUN), asked


@dataclass(slots=True)
class Copy:
    """A copy of the chain that takes what follows with proof, as a role does; `offered` is what it was shown."""

    ledger: Ledger = field(default_factory=a_ledger)
    taken: list[Commit] = field(default_factory=list)
    offered: list[Commit] = field(default_factory=list)

    def take(self, commit: Commit) -> tuple[int, int]:
        self.offered.append(commit)
        try:
            self.ledger.check_commit(commit)
        except LedgerError:
            return self.ledger.head.place
        self.ledger.append(commit)
        self.taken.append(commit)
        return self.ledger.head.place


def pages(chain: Sequence[Commit], size: int, *, head: int | None = None) -> Say:
    """An honest donor of `chain`, which answers `size` commits at a time; `head` is what it claims to have."""

    def say(question: Message) -> Message:
        assert isinstance(question, CommitsRequest)
        first = question.after_round
        return Commits(0, len(chain) if head is None else head, tuple(chain[first : first + size]))

    return say


def script(*answers: Message | bytes) -> Say:
    """One answer after the other, and the last one for ever."""
    left = iter(answers)
    last: list[Message | bytes] = []

    def say(_: Message) -> Message | bytes:
        last[:] = [next(left, last[0])] if last else [next(left)]
        return last[0]

    return say


# -- the chain


@pytest.mark.parametrize("size", [1, 3, 7, 20, 1000])
async def test_a_whole_chain_is_taken_page_by_page_in_order(size: int) -> None:
    mine = Copy()
    async with asking(pages(CHAIN, size)) as (asker, asked):
        await asker.commits(DONOR.peer_id, (0, 0), mine.take)
    assert mine.offered == mine.taken == CHAIN
    assert asked == [CommitsRequest(0, after) for after in range(0, len(CHAIN), size)]


async def test_only_what_comes_after_our_head_is_asked_for() -> None:
    mine = Copy()
    for commit in CHAIN[:5]:
        mine.take(commit)
    async with asking(pages(CHAIN, 10)) as (asker, asked):
        await asker.commits(DONOR.peer_id, (0, 5), mine.take)
    assert mine.taken == CHAIN
    assert asked == [CommitsRequest(0, 5), CommitsRequest(0, 15)]


@pytest.mark.parametrize("head", [0, 3, 4])
async def test_a_donor_that_has_nothing_newer_is_asked_once_and_gives_nothing(head: int) -> None:
    mine = Copy()
    async with asking(pages(CHAIN[:head], 10)) as (asker, asked):
        await asker.commits(DONOR.peer_id, (0, 4), mine.take)
    assert mine.offered == []
    assert asked == [CommitsRequest(0, 4)]


async def test_a_chain_with_comers_and_goers_is_taken_too() -> None:
    mine = Copy()
    async with asking(pages(honest_chain(), 2)) as (asker, _):
        await asker.commits(DONOR.peer_id, (0, 0), mine.take)
    assert mine.taken == honest_chain()


GARBAGE: dict[str, tuple[bytes, str]] = {
    "noise": (b"\x00\xff\x13 not a message", "malformed"),
    "one byte": (b"\x96", "malformed"),
    "a deep list": (b"\x91" * 100_000, "malformed"),
    "a huge list": (b"\xdd\xff\xff\xff\xff", "malformed"),
    "bytes after it": (sealed(Commits(0, 9, ())) + b"\0", "malformed"),
    "a page without an envelope": (msgspec.msgpack.encode(Commits(0, 9, tuple(CHAIN[:2]))), "malformed"),
    "a page above every cap": (sealed(Commits(0, 9, ())) + bytes(CODEC.cap_bytes), "too large"),
    "a small answer grown large": (bytes(CODEC.cap_bytes + 1), "too large"),
    "another run's seal": (sealed(Commits(0, 9, tuple(CHAIN[:2])), run=digest("another run")), "foreign run"),
    "another run's seal, rewritten": (
        sealed(Commits(0, 9, tuple(CHAIN[:2])), run=digest("another run")).replace(digest("another run"), RUN),
        "bad signature",
    ),
    "another signer": (sealed(Commits(0, 9, tuple(CHAIN[:2])), by=OTHER), "wrong answer"),
    "another signer's name": (
        sealed(Commits(0, 9, tuple(CHAIN[:2])), by=OTHER).replace(OTHER.public_key, DONOR.public_key),
        "bad signature",
    ),
    "our own words": (sealed(Commits(0, 9, tuple(CHAIN[:2])), by=ME), "wrong answer"),
    "the question": (sealed(CommitsRequest(0, 0)), "wrong answer"),
    "the answer to another question": (sealed(StateOffer(9, b"manifest", ())), "wrong answer"),
    "a word of the rounds": (
        seal(DONOR, RUN, Codec(ROUND_KINDS), Delegation(DONOR.peer_id, 1, 0, bytes(64))),
        "unknown kind",
    ),
    "too many commits": (
        seal(DONOR, RUN, Codec([Kind("commits", Commits, 2**23)]), Commits(0, 2000, tuple(CHAIN[:1]) * 1025)),
        "malformed",
    ),
}  # fmt: skip


async def test_no_answer_of_garbage_ends_but_in_an_error_or_reaches_the_chain() -> None:
    for name, (raw, reason) in GARBAGE.items():
        for before in ([], [Commits(0, 9, tuple(CHAIN[:2]))]):  # at once, or after a good page
            mine = Copy()
            async with asking(script(*before, raw)) as (asker, asked):
                with pytest.raises(WireError) as caught:
                    await asker.commits(DONOR.peer_id, (0, 0), mine.take)
            assert (name, caught.value.reason) == (name, reason)
            assert mine.offered == [commit for page in before for commit in page.commits]
            assert len(asked) == len(before) + 1


def test_a_page_of_more_commits_than_an_answer_may_have_is_refused_for_its_number_alone() -> None:
    commit = msgpack.unpackb(msgspec.msgpack.encode(Commit(CHAIN[0].block, 0, ())))
    assert CODEC.decode("commits", msgpack.packb([0, 2000, [commit] * 1024]))
    with pytest.raises(WireError, match="malformed"):
        CODEC.decode("commits", msgpack.packb([0, 2000, [commit] * 1025]))


async def test_an_answer_cut_off_at_any_byte_is_refused() -> None:
    whole = sealed(Commits(0, 9, tuple(CHAIN[:1])))
    for end in range(1, len(whole)):
        mine = Copy()
        async with asking(script(whole[:end])) as (asker, _):
            with pytest.raises(WireError, match="malformed"):
                await asker.commits(DONOR.peer_id, (0, 0), mine.take)
        assert mine.offered == []


@given(st.data())
async def test_an_answer_with_any_byte_changed_is_refused(data: st.DataObject) -> None:
    raw = bytearray(sealed(Commits(0, 9, tuple(CHAIN[:2]))))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    mine = Copy()
    async with asking(script(bytes(raw))) as (asker, _):
        with pytest.raises(WireError):
            await asker.commits(DONOR.peer_id, (0, 0), mine.take)
    assert mine.offered == []


@given(st.binary(min_size=1, max_size=200))
async def test_any_bytes_for_an_answer_are_a_wire_error(raw: bytes) -> None:
    async with asking(script(raw)) as (asker, _):
        for question, answer in (
            (CommitsRequest(0, 0), Commits),
            (WelcomeRequest(), Welcome),
            (StateRequest(), StateOffer),
        ):
            with pytest.raises(WireError):
                await asker.ask(DONOR.peer_id, question, answer)


async def test_a_donor_with_nothing_to_say_is_a_sync_error_that_names_it_and_the_question() -> None:
    async with asking(script(b"")) as (asker, asked):
        with pytest.raises(SyncError, match=f"{DONOR.peer_id} has no answer to CommitsRequest"):
            await asker.commits(DONOR.peer_id, (0, 0), Copy().take)
    assert len(asked) == 1


UNSHOWN = {
    "an empty page": (Commits(0, 9, ()),),
    "an empty page, and the largest head": (Commits(0, 2**53 - 1, ()),),
    "an empty page after a good one": (Commits(0, 9, tuple(CHAIN[:4])), Commits(0, 9, ())),
    "the same page for ever": (Commits(0, 9, tuple(CHAIN[:4])),),
    "an older page": (Commits(0, 9, tuple(CHAIN[:4])), Commits(0, 9, tuple(CHAIN[1:3]))),
    "a page with a gap before it": (Commits(0, 9, tuple(CHAIN[:4])), Commits(0, 9, tuple(CHAIN[5:9]))),
    "a page from the end": (Commits(0, 20, tuple(CHAIN[:-9:-1])),),
    "another chain": (Commits(0, 20, tuple(OTHER_CHAIN[1:])),),
    "another chain in the middle": (Commits(0, 20, tuple(CHAIN[:4])), Commits(0, 20, tuple(OTHER_CHAIN[4:]))),
    "commits without votes": (Commits(0, 20, tuple(Commit(commit.block, 0, ()) for commit in CHAIN)),),
    "a commit a thousand times": (Commits(0, 20, (CHAIN[0],) * 1000),),
}


@pytest.mark.parametrize("answers", UNSHOWN.values(), ids=UNSHOWN.keys())
async def test_a_chain_that_is_claimed_but_not_shown_ends_in_an_error_and_never_in_a_loop(
    answers: tuple[Commits, ...],
) -> None:
    mine = Copy()
    async with asking(script(*answers)) as (asker, asked):
        with pytest.raises(SyncError, match=rf"reaches round {answers[-1].head_round}, but does not show it"):
            await asker.commits(DONOR.peer_id, (0, 0), mine.take)
    assert mine.taken == CHAIN[: len(mine.taken)]
    assert len(asked) <= 2


async def test_a_donor_whose_head_is_always_further_is_followed_as_far_as_it_shows_commits() -> None:
    mine = Copy()
    async with asking(pages(CHAIN, 6, head=2**53 - 1)) as (asker, asked):
        with pytest.raises(SyncError, match="does not show it"):
            await asker.commits(DONOR.peer_id, (0, 0), mine.take)
    assert mine.taken == CHAIN
    assert len(asked) == 5


shown = st.builds(
    Commits,
    st.just(0),
    st.integers(0, 25) | st.just(2**53 - 1),
    st.lists(st.sampled_from([*CHAIN[:8], *OTHER_CHAIN[:3]]), max_size=4).map(tuple)
    | st.integers(0, 6).flatmap(lambda first: st.just(tuple(CHAIN[first : first + 3]))),
)


@given(st.lists(shown, min_size=1, max_size=8))
async def test_whatever_a_donor_shows_it_is_asked_again_only_while_our_head_moves(answers: list[Commits]) -> None:
    mine = Copy()
    async with asking(script(*answers)) as (asker, asked):
        with contextlib.suppress(SyncError):
            await asker.commits(DONOR.peer_id, (0, 0), mine.take)
    assert mine.taken in (CHAIN[: len(mine.taken)], OTHER_CHAIN[: len(mine.taken)])
    rounds = [question.after_round for question in asked if isinstance(question, CommitsRequest)]
    assert len(rounds) == len(asked)
    assert rounds == sorted(set(rounds))
    assert len(asked) <= len(mine.taken) + 1


async def test_a_donor_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "ANSWER_S", SHORT_S)

    async def wait(sender: PeerId, raw: bytes) -> bytes:
        await asyncio.Event().wait()
        return b""

    mine = Copy()
    async with network() as net, asyncio.timeout(LONG_S):
        await net.join(DONOR.peer_id).serve(CHANNEL, wait)
        asker = Asker(net.join(ME.peer_id), ME, RUN)
        with pytest.raises(Unreachable, match="no answer in"):
            await asker.commits(DONOR.peer_id, (0, 0), mine.take)
        with pytest.raises(SyncError, match="no answer in"):
            await asker.welcome([DONOR.peer_id])
    assert mine.offered == []


async def test_a_donor_that_leaves_in_the_middle_leaves_what_it_gave() -> None:
    mine = Copy()
    async with network() as net, asyncio.timeout(LONG_S):
        await serve(net, DONOR, pages(CHAIN, 4))
        asker = Asker(net.join(ME.peer_id), ME, RUN)

        def take(commit: Commit) -> tuple[int, int]:
            if commit.block.round == 8:
                net.leave(DONOR.peer_id)
            return mine.take(commit)

        with pytest.raises(Unreachable):
            await asker.commits(DONOR.peer_id, (0, 0), take)
    assert mine.taken == CHAIN[:8]


async def test_a_donor_that_refuses_or_does_not_serve_is_a_transport_error() -> None:
    async def refuse(sender: PeerId, raw: bytes) -> bytes:
        raise ValueError("not for you")

    async with network() as net, asyncio.timeout(LONG_S):
        asker, donor = Asker(net.join(ME.peer_id), ME, RUN), net.join(DONOR.peer_id)
        with pytest.raises(Unreachable):
            await asker.commits(DONOR.peer_id, (0, 0), Copy().take)
        await donor.serve(CHANNEL, refuse)
        with pytest.raises(RequestRefused, match="not for you"):
            await asker.commits(DONOR.peer_id, (0, 0), Copy().take)


# -- what the run is

WORLD = Run(OTHER, ME).genesis
WELCOME = Welcome(WORLD)


def of_genesis(**changed: Any) -> Welcome:
    """What the run is, with something changed."""
    return Welcome(msgspec.structs.replace(WORLD, **changed))


LIES: dict[str, tuple[Message | bytes, str]] = {
    "nothing": (b"", "no answer to WelcomeRequest"),
    "noise": (b"\xc1noise", "malformed"),
    "too much": (bytes(CODEC.cap_bytes + 1), "too large"),
    "a large recipe": (
        seal(
            DONOR,
            WORLD.run,
            Codec([Kind("welcome", Welcome, 2**20)]),
            of_genesis(recipe=bytes(400 * 1024)),
        ),
        "too large",
    ),
    "another run's seal": (sealed(WELCOME, run=RUN), "foreign run"),
    "another signer": (sealed(WELCOME, by=OTHER, run=WORLD.run), "wrong answer"),
    "another answer": (Commits(0, 0, ()), "wrong answer"),
    "another genesis": (Welcome(GENESIS), "foreign genesis"),
    "another organizer": (of_genesis(organizer=OTHER.peer_id), "foreign genesis"),
    "another recipe": (of_genesis(recipe=b"{}"), "foreign genesis"),
    "another founder": (of_genesis(founder=DONOR.peer_id), "foreign genesis"),
    "another disk of the founder": (of_genesis(incarnation=bytes(8)), "foreign genesis"),
    "another first model": (of_genesis(first_model=digest("another")), "foreign genesis"),
}


@pytest.mark.parametrize(("lie", "reason"), LIES.values(), ids=LIES.keys())
async def test_a_peer_that_lies_about_the_run_is_passed_over_and_named(lie: Message | bytes, reason: str) -> None:
    async with network() as net, asyncio.timeout(LONG_S):
        await serve(net, DONOR, script(lie), run=WORLD.run)
        await serve(net, OTHER, script(WELCOME), run=WORLD.run)
        asker = Asker(net.join(ME.peer_id), ME, WORLD.run)
        with pytest.raises(SyncError, match=f"nobody could say what this run is: .*{reason}"):
            await asker.welcome([DONOR.peer_id])
        assert await asker.welcome([DONOR.peer_id, OTHER.peer_id]) == WELCOME


async def test_the_first_who_proves_the_run_is_believed_and_nobody_is_asked_after_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sync, "ASKED_AT_ONCE", 1)
    async with network() as net, asyncio.timeout(LONG_S):
        first = await serve(net, DONOR, script(WELCOME), run=WORLD.run)
        second = await serve(net, OTHER, script(WELCOME), run=WORLD.run)
        asker = Asker(net.join(ME.peer_id), ME, WORLD.run)
        nobody = PeerId("nobody")
        assert await asker.welcome(iter([nobody, DONOR.peer_id, OTHER.peer_id])) == WELCOME
        assert (first, second) == ([WelcomeRequest()], [])


async def test_strangers_who_say_nothing_do_not_keep_the_truth_from_who_asks() -> None:
    async with network() as net, asyncio.timeout(LONG_S / 2):  # half of what one of them may take
        mute = [Identity.from_seed(bytes([k]) * 32) for k in range(100, 99 + sync.ASKED_AT_ONCE)]
        for stranger in mute:
            await net.join(stranger.peer_id).serve(CHANNEL, never)
        await serve(net, DONOR, script(WELCOME), run=WORLD.run)
        asker = Asker(net.join(ME.peer_id), ME, WORLD.run)
        assert await asker.welcome([*(stranger.peer_id for stranger in mute), DONOR.peer_id]) == WELCOME


async def never(sender: PeerId, raw: bytes) -> bytes:
    await asyncio.Event().wait()
    return b""


async def test_every_fault_is_told_where_nobody_can_say_what_the_run_is() -> None:
    async with network() as net, asyncio.timeout(LONG_S):
        await serve(net, DONOR, script(b""), run=WORLD.run)
        await serve(net, OTHER, script(b"noise"), run=WORLD.run)
        asker = Asker(net.join(ME.peer_id), ME, WORLD.run)
        with pytest.raises(SyncError, match=f"{DONOR.peer_id} has no answer .*; malformed"):
            await asker.welcome([DONOR.peer_id, OTHER.peer_id])
        with pytest.raises(SyncError, match="nobody was found"):
            await asker.welcome([])


# -- the model

MANIFEST = b"model after round 3"
"""What the next block names the hash of."""
WITH_MODEL = honest_chain()[2]
"""Its committee: the founder, `a` and `c`, who also did the work."""


def ballot(
    peer: PeerId, *, manifest: bytes = MANIFEST, round_: int = 3, run: bytes = RUN, block: bytes = b""
) -> Ballot:
    block = block or WITH_MODEL.block.hash
    return Ballot(peer, FakeSigner(peer).sign(applied_payload(run, round_, block, blake3(manifest).digest())))


VOTERS = tuple(voter.peer for voter in WITH_MODEL.block.committee)
BALLOTS = tuple(ballot(peer) for peer in VOTERS)


async def offered(
    said: Message | bytes, *, first_model: bytes = GENESIS.first_model, head_round: int = 3
) -> StateOffer:
    """What `ME`, which has the chain up to that round, takes of an offer. Raises SyncError, WireError."""
    chain = {commit.block.round: commit for commit in honest_chain()[:head_round]}
    fault: SyncError | WireError
    async with asking(script(said)) as (asker, asked):
        try:
            return await asker.state(DONOR.peer_id, CHARTER, first_model, chain.get, SIGNER)
        except (SyncError, WireError) as error:
            fault = error  # raised below: the network's task group would hide it in another
        finally:
            assert asked == [StateRequest()]
    raise fault


async def test_a_model_that_a_quorum_signed_is_taken_whoever_offers_it() -> None:
    assert len(VOTERS) == 3
    for said in (BALLOTS, BALLOTS[:2], BALLOTS[1:], (*BALLOTS[::-1], ballot(PeerId("stranger")))):
        assert await offered(StateOffer(3, MANIFEST, said)) == StateOffer(3, MANIFEST, said)


async def test_a_model_that_the_next_block_names_needs_no_votes_and_no_votes_are_good_for_another() -> None:
    for head_round in (3, 4):
        older = StateOffer(2, b"model after round 2", ())
        assert await offered(older, head_round=head_round) == older
    assert await offered(StateOffer(3, MANIFEST, ()), head_round=4)
    other = b"another model"
    said = StateOffer(3, other, tuple(ballot(peer, manifest=other) for peer in VOTERS))
    assert await offered(said) == said, "nobody knows better yet"
    with pytest.raises(SyncError, match="after round 3 that no quorum stands for"):
        await offered(said, head_round=4)


async def test_the_first_model_needs_no_votes_but_the_digest_of_the_genesis() -> None:
    first_model = blake3(MANIFEST).digest()
    assert await offered(StateOffer(0, MANIFEST, ()), first_model=first_model) == StateOffer(0, MANIFEST, ())
    with pytest.raises(SyncError, match="after round 0 that no quorum stands for"):
        await offered(StateOffer(0, MANIFEST + b".", ()), first_model=first_model)


UNSIGNED = {
    "no votes": StateOffer(3, MANIFEST, ()),
    "one vote of three": StateOffer(3, MANIFEST, BALLOTS[:1]),
    "one vote three times": StateOffer(3, MANIFEST, BALLOTS[1:2] * 3),
    "votes of strangers": StateOffer(3, MANIFEST, tuple(ballot(PeerId(f"stranger {k}")) for k in range(9))),
    "votes for another model": StateOffer(3, MANIFEST + b".", BALLOTS),
    "votes of another round": StateOffer(3, MANIFEST, tuple(ballot(peer, round_=2) for peer in VOTERS)),
    "votes of another block": StateOffer(3, MANIFEST, tuple(ballot(peer, block=digest("block")) for peer in VOTERS)),
    "votes of another run": StateOffer(3, MANIFEST, tuple(ballot(peer, run=digest("run")) for peer in VOTERS)),
    "votes under other names": StateOffer(
        3, MANIFEST, tuple(Ballot(peer, one.signature) for peer, one in zip(VOTERS, BALLOTS[::-1], strict=True))[:2]
    ),
    "votes on the round before": StateOffer(2, MANIFEST, BALLOTS),
    "a round that we do not have": StateOffer(5, MANIFEST, BALLOTS),
    "the last round there can be": StateOffer(2**53 - 1, MANIFEST, BALLOTS),
    "a first model that is none": StateOffer(0, MANIFEST, BALLOTS),
    "an empty manifest": StateOffer(3, b"", BALLOTS),
}


@pytest.mark.parametrize("said", UNSIGNED.values(), ids=UNSIGNED.keys())
async def test_a_model_without_a_quorum_of_true_votes_is_refused(said: StateOffer) -> None:
    with pytest.raises(SyncError, match=f"{DONOR.peer_id} offers a model after round {said.round} that no quorum"):
        await offered(said)


async def test_no_garbage_passes_for_an_offer() -> None:
    for raw, reason in GARBAGE.values():
        if reason != "wrong answer":
            with pytest.raises(WireError, match=reason):
                await offered(raw)
    whole = sealed(StateOffer(3, MANIFEST, BALLOTS))
    assert await offered(whole)
    for end in range(1, len(whole)):
        with pytest.raises(WireError):
            await offered(whole[:end])
    with pytest.raises(SyncError, match="has no answer to StateRequest"):
        await offered(b"")
    large = Codec([Kind("state", StateOffer, 2**22)])
    with pytest.raises(WireError, match="too large"):
        await offered(seal(DONOR, RUN, large, StateOffer(3, bytes(2**20 + 300), ())))


# -- those who are asked


PLAN = Plan(0, 1, 1, 0, WORLD.run, 0, (), (ME.peer_id,) * len(LAYOUT.parts), (), 1.0, 1.0)
"""In which `ME` owns all parts."""


@asynccontextmanager
async def a_role(directory: Path) -> AsyncIterator[tuple[Role, Still, MemoryTransport]]:
    """A role whose machine stands still in round 1, and the transport of `ME`; the role must live to the end."""
    async with network() as net, asyncio.timeout(LONG_S):
        still = Still(PLAN)
        role = Role(net.join(DONOR.peer_id), directory, WORLD, me=DONOR, machine=still)
        async with serving(role):
            await role.begun.wait()
            yield role, still, net.join(ME.peer_id)


@pytest.mark.parametrize("page_bytes", [1, 2000, 2**20])
async def test_a_role_gives_its_whole_chain_to_one_who_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page_bytes: int
) -> None:
    monkeypatch.setattr(answers, "COMMITS_BYTES", page_bytes)
    run = Run(OTHER, ME)
    run.grow(6)
    run.begin_epoch(4)
    run.grow(5)
    async with a_role(run.keep_in(tmp_path)) as (_, _, me):
        got: list[Commit] = []

        def take(commit: Commit) -> tuple[int, int]:
            got.append(commit)
            return commit.block.epoch, commit.block.round

        asker = Asker(me, ME, WORLD.run)
        for after, first in (
            ((0, 0), 1),
            ((0, 2), 3),
            ((0, 6), 5),  # which the epoch undid
            ((0, 2**53 - 1), 5),
            ((1, 5), 6),
            ((1, 10), 11),
            ((1, 2**53 - 1), 11),
        ):
            got.clear()
            await asker.commits(DONOR.peer_id, after, take)
            assert got == run.commits[first - 1 :], after


async def test_a_role_says_what_the_run_is(tmp_path: Path) -> None:
    async with a_role(tmp_path) as (_, _, me):
        assert await Asker(me, ME, WORLD.run).welcome([DONOR.peer_id]) == WELCOME


def questions() -> Iterator[tuple[str, bytes]]:
    """What a stranger may say in place of a question."""
    whole = sealed(CommitsRequest(0, 0), by=ME, run=WORLD.run)
    yield "nothing", b""
    yield "noise", b"\xc1noise"
    yield "a deep list", b"\x91" * 100_000
    yield "too much", bytes(CODEC.cap_bytes + 1)
    yield (
        "more than its kind may have",
        seal(ME, WORLD.run, Codec([Kind("commits?", StateOffer, 4096)]), StateOffer(0, bytes(600), ())),
    )
    yield "another run's", sealed(CommitsRequest(0, 0), by=ME)
    yield "another sender's", sealed(CommitsRequest(0, 0), by=OTHER, run=WORLD.run)
    yield "the donor's own", sealed(CommitsRequest(0, 0), by=DONOR, run=WORLD.run)
    yield "a word of the rounds", seal(ME, WORLD.run, Codec(ROUND_KINDS), Delegation(ME.peer_id, 1, 0, bytes(64)))
    for message in (Commits(0, 0, ()), WELCOME, StateOffer(0, b"", ()), StateRequest()):
        yield f"{type(message).__name__} of a role that has no answer to it", sealed(message, by=ME, run=WORLD.run)
    for end in range(1, len(whole)):
        yield f"{end} bytes of a question", whole[:end]
        yield f"byte {end} changed", whole[: end - 1] + bytes([whole[end - 1] ^ 0x21]) + whole[end:]


async def test_a_role_answers_nothing_to_garbage_and_goes_on(tmp_path: Path) -> None:
    async with a_role(tmp_path) as (_, _, me):
        for what, raw in questions():
            assert (what, await me.request(DONOR.peer_id, CHANNEL, raw, timeout_s=LONG_S)) == (what, b"")
        asker = Asker(me, ME, WORLD.run)
        assert await asker.ask(DONOR.peer_id, CommitsRequest(0, 0), Commits) == Commits(0, 0, ())


async def test_a_role_drops_garbage_among_the_messages_of_a_round(tmp_path: Path) -> None:
    rounds = Codec(ROUND_KINDS)
    said = Applied(1, bytes(32), bytes(32), bytes(64), 0.0, 0.0, ())
    garbage = [
        *questions(),
        ("another run's", seal(ME, RUN, rounds, said)),
        ("OTHER's", seal(OTHER, WORLD.run, rounds, said)),
    ]
    async with a_role(tmp_path) as (_, still, me):
        heard: list[Message] = []

        def receive(sender: PeerId, message: Message, *, now: float) -> Sequence[object]:
            assert sender == ME.peer_id
            heard.append(message)
            return ()

        still.receive = receive  # type: ignore[method-assign]
        for what, raw in garbage:
            assert await me.request(DONOR.peer_id, shell.ROUND_CHANNEL, raw, timeout_s=LONG_S) == b"", what
        assert heard == [Delegation(ME.peer_id, 1, 0, bytes(64))]


# -- averages that are pushed

WORK = Run(OTHER, ME)
WORK.grow(1)
RESULTS = WORK.parts[0]
UNMADE = RESULTS[0][:-1] + b"\x80"
"""No encoder makes the code -128."""


def results_header(payloads: Sequence[bytes] = RESULTS, *, round_: int = 1) -> bytes:
    parts = tuple((part, blake3(payload).digest()) for part, payload in enumerate(payloads))
    return msgspec.msgpack.encode(ResultsHeader(round_, 1, 0, parts))


async def push(transport: Transport, header: bytes, payloads: Sequence[bytes] = RESULTS) -> None:
    await bulk.push(transport, DONOR.peer_id, RESULTS_CHANNEL, header, payloads, kind="result", timeout_s=LONG_S)


def in_header(*fields: Any) -> bytes:
    raw: bytes = msgpack.packb(list(fields))
    return raw


TRUE_PARTS = [[part, blake3(payload).digest()] for part, payload in enumerate(RESULTS)]
BAD_RESULTS = {
    "empty": (b"", RESULTS, "malformed header"),
    "noise": (b"\xc1noise", RESULTS, "malformed header"),
    "a map": (msgpack.packb({"round": 1}), RESULTS, "malformed header"),
    "a deep list": (b"\x91" * 100_000, RESULTS, "malformed header"),
    "a huge list": (b"\x94\x01\x01\x00\xdd\xff\xff\xff\xff", RESULTS, "malformed header"),
    "bytes after it": (results_header() + b"\0", RESULTS, "malformed header"),
    "a field too few": (in_header(1, 1, TRUE_PARTS), RESULTS, "malformed header"),
    "a field too many": (in_header(1, 1, 0, TRUE_PARTS, 0), RESULTS, "malformed header"),
    "a round of text": (in_header("\xff", 1, 0, TRUE_PARTS), RESULTS, "malformed header"),
    "text that is not utf-8": (b"\x94\xa1\xff\x01\x00\x90", RESULTS, "malformed header"),
    "a short digest": (in_header(1, 1, 0, [[0, bytes(31)]]), RESULTS[:1], "malformed header"),
    "a part without a digest": (in_header(1, 1, 0, [[0]]), RESULTS[:1], "malformed header"),
    "too many parts": (in_header(1, 1, 0, [[0, bytes(32)]] * 8193), RESULTS[:1], "malformed header"),
    "a part beyond the last": (in_header(1, 1, 0, [[3, bytes(32)]]), RESULTS[:1], "the vector has 3 parts"),
    "a negative part": (in_header(1, 1, 0, [[-1, bytes(32)]]), RESULTS[:1], "the vector has 3 parts"),
    "a huge part": (in_header(1, 1, 0, [[2**64 - 1, bytes(32)]]), RESULTS[:1], "the vector has 3 parts"),
    "another size": (results_header(), [RESULTS[0], RESULTS[2], RESULTS[1]], "another size"),
    "too few bytes": (results_header(), RESULTS[:2], "another size"),
    "another round": (results_header(round_=2), RESULTS, "round 2 is not under way"),
    "a huge round": (results_header(round_=2**64 - 1), RESULTS, "is not under way"),
    "other bytes": (results_header(), [RESULTS[1], RESULTS[0], RESULTS[2]], "part 0 is not what its digest promised"),
    "a part that no encoder makes": (results_header([UNMADE]), [UNMADE], "part 0: value 127 has code -128"),
    "more than a vector": (
        results_header(),
        [*RESULTS, b"more"],
        f"at most {sum(map(len, RESULTS))} are allowed",
    ),
}


async def test_averages_with_a_bad_header_or_bad_bytes_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    async with a_role(tmp_path) as (role, still, me):
        for what, (header, payloads, why) in BAD_RESULTS.items():
            with pytest.raises(bulk.PushRefused) as caught:
                await push(me, header, payloads)
            assert why in caught.value.reason, what
        for end in range(len(results_header())):
            with pytest.raises(bulk.PushRefused, match="malformed header"):
                await push(me, results_header()[:end])
        assert still.results == []
        assert role.blobs.digests() == set()
        await push(me, results_header())
        taken = {part: blake3(payload).digest() for part, payload in enumerate(RESULTS)}
        assert still.results == [(ME.peer_id, (1, 1, 0), taken)]
        assert role.blobs.digests() == {blake3(payload).digest() for payload in RESULTS}


async def test_a_header_of_averages_above_its_cap_is_refused_unread(tmp_path: Path) -> None:
    async with a_role(tmp_path) as (_, still, me):
        stream = await me.open(DONOR.peer_id, RESULTS_CHANNEL, kind="result")
        await stream.write(b"\x06result" + struct.pack(">I", 512 * 1024 + 1))
        verdict, length = struct.unpack(">BI", await stream.read_exactly(5))
        assert verdict == 1
        assert b"at most 524288 are allowed" in await stream.read_exactly(length)
        with pytest.raises(TransportError):
            await push(me, bytes(512 * 1024 + 1))
        assert still.results == []


def test_the_words_of_the_sync_fit_their_caps_at_their_longest() -> None:
    assert CODEC.encode(of_genesis(recipe=bytes(256 * 1024)))
    assert CODEC.encode(CommitsRequest(0, 2**53 - 1))
    assert {kind.tag for kind in SYNC_KINDS} == {"welcome?", "welcome", "commits?", "commits", "state?", "state"}
