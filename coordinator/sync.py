"""What one who joins or catches up asks of others, and how it knows that the answers are true.

Welcome      the genesis, whose hash is the run's id       checked by hash
Commits      the chain after a round                       checked by its certificates
StateOffer   the manifest of a model after a round         checked by the next block, or by digests a quorum signed
chunks       from anyone who has them                      checked by hash
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from blake3 import blake3

from dugnad.coordinator.ledger import Charter
from dugnad.coordinator.messages import (
    SYNC_KINDS,
    Commit,
    Commits,
    CommitsRequest,
    StateOffer,
    StateRequest,
    Welcome,
    WelcomeRequest,
    applied_payload,
)
from dugnad.coordinator.votes import Signer
from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.transport import Transport, TransportError
from dugnad.dht.wire import Codec, Message, WireError, open_sealed, seal

CHANNEL = "dugnad/sync/1"
CODEC = Codec(SYNC_KINDS)
ANSWER_S = 10.0
"""How long an answer of up to a megabyte may take."""
ASKED_AT_ONCE = 8
"""How many are asked what the run is at a time: strangers may say that they are there, and then say nothing."""
A = TypeVar("A", bound=Message)
CommitOf = Callable[[int], Commit | None]
"""The commit of a round of our proven chain."""


class SyncError(Exception):
    """Nobody could give what was asked for, or nobody's answer was true; the message says who and why."""


class Asker:
    """Asks questions about one run, as `identity`."""

    def __init__(self, transport: Transport, identity: Identity, run: bytes) -> None:
        self._transport = transport
        self._identity = identity
        self._run = run

    async def ask(self, peer: PeerId, question: Message, answer: type[A]) -> A:
        """The answer of `peer`. Raises TransportError, WireError, and SyncError where it has nothing to say."""
        raw = seal(self._identity, self._run, CODEC, question)
        reply = await self._transport.request(peer, CHANNEL, raw, timeout_s=ANSWER_S)
        if not reply:
            raise SyncError(f"{peer} has no answer to {type(question).__name__}")
        sender, message = await asyncio.to_thread(open_sealed, reply, self._run, CODEC)
        if sender != peer or not isinstance(message, answer):
            raise WireError("wrong answer", f"{peer} answered {type(message).__name__} as {sender}")
        return message

    async def welcome(self, peers: Iterable[PeerId]) -> Welcome:
        """What the run is, from who of `peers` first proves it; they are asked a few at a time, in order.

        Raises SyncError if none does.
        """
        left, faults, proven = iter(peers), list[str](), list[Welcome]()

        async def ask_one_after_the_other() -> None:
            for peer in left:
                try:
                    said = await self.ask(peer, WelcomeRequest(), Welcome)
                    _check_welcome(said, self._run)
                except (TransportError, WireError, SyncError) as error:
                    faults.append(str(error))
                else:
                    proven.append(said)
                    for task in asking:
                        task.cancel()
                    return

        async with asyncio.TaskGroup() as tasks:
            asking = [tasks.create_task(ask_one_after_the_other()) for _ in range(ASKED_AT_ONCE)]
        if not proven:
            raise SyncError("nobody could say what this run is: " + ("; ".join(faults) or "nobody was found"))
        return proven[0]

    async def commits(self, peer: PeerId, after: tuple[int, int], take: Callable[[Commit], tuple[int, int]]) -> None:
        """Hand every commit of `peer` after that place, (epoch, round), to `take`, which checks it and says how far
        our chain reaches then.
        """
        while True:
            said = await self.ask(peer, CommitsRequest(*after), Commits)
            reached = after
            for commit in said.commits:
                reached = take(commit)
            if reached >= (said.head_epoch, said.head_round):
                return
            if reached <= after:
                raise SyncError(f"{peer} says that its chain reaches round {said.head_round}, but does not show it")
            after = reached

    async def state(
        self, peer: PeerId, charter: Charter, first_model: bytes, commit_of: CommitOf, signer: Signer
    ) -> StateOffer:
        """The model that `peer` offers, proven by our chain, of which `commit_of` gives the commits by round."""
        said = await self.ask(peer, StateRequest(), StateOffer)
        digest = blake3(said.manifest).digest()
        if said.round == 0 and digest == first_model:
            return said
        ballots = {ballot.peer: ballot.signature for ballot in said.ballots}
        if not is_proven(said.round, digest, ballots, charter, commit_of, signer):
            raise SyncError(f"{peer} offers a model after round {said.round} that no quorum stands for")
        return said


def is_proven(
    round_: int, model: bytes, ballots: Mapping[PeerId, bytes], charter: Charter, commit_of: CommitOf, signer: Signer
) -> bool:
    """Whether a quorum stands for `model` being the digest after `round_`: by the next block, or by `ballots`.

    ballots: {peer: signature} over what `Applied` says, of those who vote on the next round.
    """
    following = commit_of(round_ + 1)
    if following is not None:
        return following.block.model_before == model
    commit = commit_of(round_)
    if commit is None:
        return False
    payload = applied_payload(charter.run, round_, commit.block.hash, model)
    true = [peer for peer, signature in ballots.items() if signer.verify(peer, payload, signature)]
    return charter.rule.decided(commit.block.committee, true)


def _check_welcome(said: Welcome, run: bytes) -> None:
    if said.genesis.run != run:
        raise WireError("foreign genesis", "it is not the one that the invite names")
