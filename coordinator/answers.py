"""What one who joins or catches up is answered: what the run is, the chain after a round, the newest proven model."""

import msgspec

from dugnad.coordinator.chain import Chain
from dugnad.coordinator.messages import Commit, Commits, CommitsRequest, Genesis, StateRequest, Welcome, WelcomeRequest
from dugnad.coordinator.rounds import Leader
from dugnad.coordinator.state import State
from dugnad.dht.wire import Message

COMMITS_BYTES = 512 * 1024
"""How many bytes of commits one answer holds, about."""


class Answers:
    """Answers from what this peer holds of the run."""

    def __init__(self, genesis: Genesis, chain: Chain, state: State, leader: Leader) -> None:
        self._genesis = genesis
        self._chain = chain
        self._state = state
        self._leader = leader

    def to(self, question: Message) -> Message | None:
        """The answer; None where there is none."""
        match question:
            case WelcomeRequest():
                return Welcome(self._genesis)
            case CommitsRequest(epoch, after_round):
                return self._commits_after(epoch, after_round)
            case StateRequest():
                return self._state.offer(self._chain, self._leader)
            case _:
                return None

    def _commits_after(self, epoch: int, round_: int) -> Commits:
        begins = self._chain.epoch_begins(after_epoch=epoch)
        round_ = round_ if begins is None else min(round_, begins - 1)
        chosen: list[Commit] = []
        size = 0
        for commit in self._chain.commits(after_round=round_, limit=1024):
            size += len(msgspec.msgpack.encode(commit))
            if chosen and size > COMMITS_BYTES:
                break
            chosen.append(commit)
        return Commits(*self._leader.follower.ledger.head.place, tuple(chosen))
