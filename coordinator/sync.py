"""What one who joins or catches up asks of others, and how it knows that the answers are true.

Welcome      the genesis, whose hash is the run's id, and who leads        checked by hash and by signature
Commits      the chain after a round                                       checked by its certificates
StateOffer   the manifest of a model after a round                         checked by the digests a quorum signed
tensors      from anyone who has them                                      checked by hash
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import TypeVar

from blake3 import blake3

from dugnad.coordinator.messages import (
    SYNC_KINDS,
    Ballot,
    Commit,
    Commits,
    CommitsRequest,
    Genesis,
    Message,
    StateOffer,
    StateRequest,
    Voter,
    Welcome,
    WelcomeRequest,
    applied_payload,
    delegation_payload,
)
from dugnad.coordinator.votes import Signer, certified_by, has_quorum
from dugnad.dht.identity import Identity, PeerId, verify
from dugnad.dht.transport import Transport, TransportError
from dugnad.dht.wire import Codec, WireError, open_sealed, seal

CHANNEL = "dugnad/sync/1"
CODEC = Codec(SYNC_KINDS)
ANSWER_S = 10.0
"""How long an answer of up to a megabyte may take."""
ASKED_AT_ONCE = 8
"""How many are asked what the run is at a time: strangers may say that they are there, and then say nothing."""
A = TypeVar("A", bound=Message)


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

    async def commits(self, peer: PeerId, after_round: int, take: Callable[[Commit], int]) -> None:
        """Hand every commit of `peer` after that round to `take`, which checks it and returns the head it now has."""
        while True:
            said = await self.ask(peer, CommitsRequest(after_round), Commits)
            reached = after_round
            for commit in said.commits:
                reached = take(commit)
            if reached >= said.head_round:
                return
            if reached <= after_round:
                raise SyncError(f"{peer} says that its chain reaches round {said.head_round}, but does not show it")
            after_round = reached

    async def state(
        self, peer: PeerId, genesis: Genesis, signer: Signer, commit_of: Callable[[int], Commit | None]
    ) -> StateOffer:
        """The newest certified model's manifest, as `peer` knows it; `commit_of` is our proven chain."""
        said = await self.ask(peer, StateRequest(), StateOffer)
        if said.round == 0:
            true = blake3(said.manifest).digest() == genesis.first_model
        else:
            commit = commit_of(said.round)
            true = commit is not None and certifies(said.ballots, genesis.run, commit, said.manifest, signer)
        if not true:
            raise SyncError(f"{peer} offers a model after round {said.round} that no quorum has signed")
        return said


def certifies(ballots: Iterable[Ballot], run: bytes, commit: Commit, manifest: bytes, signer: Signer) -> bool:
    """Whether a quorum of the committee that `commit` leaves behind signed this model after it."""
    block = commit.block
    payload = applied_payload(run, block.round, block.hash, blake3(manifest).digest())
    return has_quorum(committee_after(commit), certified_by(signer, payload, ballots))


def committee_after(commit: Commit) -> tuple[Voter, ...]:
    """Who vouches for the model after `commit`: those who vote on the next round."""
    return commit.block.committee


def _check_welcome(said: Welcome, run: bytes) -> None:
    if said.genesis.run != run:
        raise WireError("foreign run", "its genesis is not the one that the invite names")
    order = said.delegation
    payload = delegation_payload(run, order.coordinator, order.term)
    if not verify(said.genesis.organizer, payload, order.signature):
        raise WireError("bad signature", "the delegation is not signed by the organizer")
