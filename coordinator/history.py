"""What happened, round by round, as rows that people and programs read; a fold over the chain on disk."""

from dataclasses import dataclass

from dugnad.coordinator.chain import Chain
from dugnad.coordinator.messages import Applied, Commit
from dugnad.dht.identity import PeerId


@dataclass(frozen=True, slots=True)
class RoundRow:
    """One committed round."""

    round: int
    global_step: int
    roster: tuple[PeerId, ...]
    """Whose work was counted."""
    tokens: int
    train_loss: float | None
    """Mean over the counted tokens, in nats; None in a block that only lets someone go."""
    val_loss: float | None
    """Nats per byte on held-out data after the round; None where it was not measured."""
    model_digest: dict[PeerId, bytes]
    """What each peer signed to have after the round."""
    train_s: dict[PeerId, float]
    """Seconds that each peer computed in the time that ended with the round."""
    wall_s: dict[PeerId, float]
    """How long that time was."""
    sent_bytes: dict[PeerId, dict[str, int]]
    """Bytes that each peer put on the wire in that time, by kind, as metered at its sockets."""
    duration_s: float
    """From the commit before to this one; of the first round, as long as its slowest peer says."""

    @property
    def agree(self) -> bool:
        """Whether everyone who applied the round has the same model."""
        return len(set(self.model_digest.values())) <= 1

    @property
    def wire_bytes(self) -> int:
        """All bytes that its peers sent."""
        return sum(sum(kinds.values()) for kinds in self.sent_bytes.values())


def rows(chain: Chain, *, after_round: int = 0) -> list[RoundRow]:
    """Every committed round after that one, oldest first. Raises ChainError."""
    commits = list(chain.commits(after_round=after_round))  # first: the run may go on and commit while we read
    applied, validation, at_s = chain.applieds(after_round=after_round), chain.validation(), chain.committed_at()
    out: list[RoundRow] = []
    for commit in commits:
        number = commit.block.round
        said = applied.get(number, {})
        before_s = at_s.get(number - 1)
        slowest_s = max((one.wall_s for one in said.values()), default=0.0)
        duration_s = slowest_s if before_s is None else at_s[number] - before_s
        out.append(_row(commit, dict(said), validation.get(number), duration_s))
    return out


def _row(commit: Commit, applied: dict[PeerId, Applied], val_loss: float | None, duration_s: float) -> RoundRow:
    block = commit.block
    tokens = sum(entry.tokens for entry in block.entries)
    return RoundRow(
        round=block.round,
        global_step=block.global_step,
        roster=tuple(entry.peer for entry in block.entries),
        tokens=tokens,
        train_loss=sum(entry.loss * entry.tokens for entry in block.entries) / tokens if tokens else None,
        val_loss=val_loss,
        model_digest={peer: said.model for peer, said in applied.items()},
        train_s={peer: said.train_s for peer, said in applied.items()},
        wall_s={peer: said.wall_s for peer, said in applied.items()},
        sent_bytes={peer: dict(said.sent_bytes) for peer, said in applied.items()},
        duration_s=duration_s,
    )
