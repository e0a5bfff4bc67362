"""The shared model as one peer has it: it takes the next committed bytes once it holds them all, and nothing else.

Two positions move apart for a while: the chain's head (proven commits, stored) and the model (commits applied). The
model only ever takes the next committed bytes, so it is always the model after some round of the chain.
"""

from collections import deque
from collections.abc import Iterable

from dugnad.coordinator.effects import Apply, Effect, Resync
from dugnad.coordinator.messages import Block, Commit

REPLAY_ROUNDS = 32
"""How many committed rounds are replayed at most; further behind, the state is taken instead."""


class Replica:
    """One peer's copy of the model, the bytes that it holds, and the commits that it has still to take."""

    def __init__(self) -> None:
        self.model: bytes | None = None
        """Digest of the model after `round`; None until there is one."""
        self.round = -1
        self.applying: Commit | None = None
        """The commit that is being applied."""
        self._held: set[bytes] = set()
        self._unapplied: deque[Commit] = deque(maxlen=REPLAY_ROUNDS)

    @property
    def next(self) -> Commit | None:
        """The next commit to be applied, if there is one."""
        return self._unapplied[0] if self._unapplied else None

    @property
    def can_go_on(self) -> bool:
        """Whether there is a model, and nothing is being applied to it."""
        return self.model is not None and self.applying is None

    def hold(self, digests: Iterable[bytes]) -> None:
        """These bytes are checked and on disk."""
        self._held.update(digests)

    def forget(self, digests: Iterable[bytes]) -> None:
        """These bytes are no longer on disk."""
        self._held.difference_update(digests)

    def holds_some(self, block: Block) -> bool:
        """Whether any part of `block` is here."""
        return not self._held.isdisjoint(block.parts)

    def missing(self, block: Block) -> tuple[tuple[int, bytes], ...]:
        """The parts of `block` that are not here: (part, digest)."""
        return tuple((part, digest) for part, digest in enumerate(block.parts) if digest not in self._held)

    def begin(self, round_: int, model: bytes, since: Iterable[Commit]) -> None:
        """The model after `round_` is here; `since` are the commits after it."""
        self._unapplied = deque(since, maxlen=REPLAY_ROUNDS)
        self._has(round_, model)

    def follow(self, commit: Commit) -> None:
        """`commit` is proven and stored: its turn will come."""
        self._unapplied.append(commit)

    def apply_next(self, head_round: int) -> list[Effect]:
        """Apply the next commit, all of whose bytes are here."""
        commit = self._unapplied[0]
        if commit.block.round != self.round + 1:
            self._unapplied.clear()
            self.model = None
            return [Resync(f"{head_round - self.round} rounds behind: too many to replay")]
        self.applying = commit  # kept here: when many more arrive meanwhile, it falls out of `_unapplied`
        return [Apply(commit)]

    def applied(self, round_: int, model: bytes) -> Commit | None:
        """The model after `round_` is in place; the commit that made it, or None where an epoch began before it."""
        commit = self.applying
        if commit is None:
            return None
        assert commit.block.round == round_ == self.round + 1, "commits are applied one by one, in order"
        self._has(round_, model)
        self._held.difference_update(commit.block.parts)
        return commit

    def damaged(self, digests: Iterable[bytes]) -> bool:
        """These parts of the commit under way are no longer what they were on disk; whether it has to be done again."""
        self._held.difference_update(digests)
        if self.applying is None:
            return False
        if not self._unapplied or self._unapplied[0] is not self.applying:
            self._unapplied.appendleft(self.applying)
        self.applying = None
        return True

    def rewind(self, base: int) -> bool:
        """What followed round `base` counts no more; whether the model, of a later round, is of no use either."""
        kept = [commit for commit in self._unapplied if commit.block.round <= base]
        self._unapplied = deque(kept, maxlen=REPLAY_ROUNDS)
        if self.applying is not None and self.applying.block.round > base:
            self.applying = None
        if self.round <= base:
            return False
        self.model = None
        return True

    def _has(self, round_: int, model: bytes) -> None:
        self.round, self.model, self.applying = round_, model, None
        while self._unapplied and self._unapplied[0].block.round <= round_:
            self._unapplied.popleft()
