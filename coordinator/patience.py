"""When a voter gives a leader up: it is silent, it has been at work for too long, or it comes to no count of votes."""

from dataclasses import dataclass

from dugnad.configs.recipe import RoundSettings

NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class Patience:
    """When a leader is given up: silent for `silence_s`, at work for `round_s`, or counting votes for `vote_s`."""

    silence_s: float
    round_s: float
    vote_s: float

    @classmethod
    def of(cls, rounds: RoundSettings) -> "Patience":
        """As a recipe's durations ask for."""
        round_s = rounds.train_s + 4 * rounds.exchange_s
        return cls(rounds.silence_s, round_s, rounds.exchange_s + rounds.silence_s)


class Watch:
    """What one voter has heard of whoever leads."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.heard_at = 0.0
        """When the leader was last heard, or began to be awaited."""
        self.ran_at = 0.0
        """When we last looked."""
        self._busy_since: float | None = None
        """Since when it has been at work on the round, by its own word."""
        self._voting_since: float | None = None

    def begin(self, now: float) -> None:
        """Another leads, of whom nothing else was heard yet: its silence begins here."""
        self.heard_at, self._busy_since, self._voting_since = now, None, None

    def stands(self, *, working: bool, voting: bool, now: float) -> None:
        """The leader says what it is at."""
        self._busy_since = (now if self._busy_since is None else self._busy_since) if working else None
        self._voting_since = (now if self._voting_since is None else self._voting_since) if voting else None

    def look(self, now: float, silence_s: float) -> None:
        """We run; if we did not for long, then it was us who stood still, and nobody else is to blame for the time."""
        if now > self.ran_at + silence_s / 2:
            self.heard_at = now
            self._busy_since = None if self._busy_since is None else now
            self._voting_since = None if self._voting_since is None else now
        self.ran_at = max(self.ran_at, now)

    def stuck_at(self) -> float:
        """When a leader that is there, but gets nowhere, is given up."""
        busy = NEVER if self._busy_since is None else self._busy_since + self.patience.round_s
        voting = NEVER if self._voting_since is None else self._voting_since + self.patience.vote_s
        return min(busy, voting)
