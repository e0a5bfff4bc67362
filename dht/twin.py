"""Whether another running peer signs with our key: someone copied the key, or the whole folder.

Our records have numbers that only grow and that are set aside on disk before they are used (`sequence.py`). So a record
with our signature and a number above all that this folder ever took was signed elsewhere; and so was one that was
issued after we began, and before we said anything. Where there is a suspicion, or this folder is a copy, a joiner stays
silent for a while and listens: a peer that is running says something every few seconds, and one that is not, as after a
backup was restored, never will. Two who both speak would contradict each other, and both would be out of the run.
"""

WATCH_S = 12.0
"""How long a joiner with a suspicion listens: two periods in which a member of a small run says what it does."""
YOUNG_S = 30.0
"""For how long after it first spoke a peer counts as the newcomer of the two, and goes."""
_MARGIN_S = 1.0
"""What two clocks of one run may differ by."""


class KeyInUse(Exception):
    """Another running peer has our key."""

    code = "E402"

    def __init__(self, directory: str) -> None:
        super().__init__(
            f"{self.code} your key is in use by another running peer. A copied key?  "
            f"dugnad identity new --force --dir {directory}"
        )


class Twin:
    """What our own records, as others have them, say of another peer with our key; times: the run's, unix seconds."""

    def __init__(self, *, suspected: bool) -> None:
        self.suspected = suspected
        """Whether someone may have signed elsewhere."""
        self.found = False
        """Whether someone does, now."""
        self._began_s = float("inf")
        self._spoke_s: float | None = None

    def begin(self, *, now: float) -> None:
        """We are in the network, and listen."""
        self._began_s = now

    def speak(self, *, now: float) -> None:
        """We say things ourselves from now on."""
        self._spoke_s = now

    def heard(self, seq: int, issued_s: float, *, ours: int) -> None:
        """There is a record of ours with that number; `ours` is the highest that this folder may ever have taken."""
        foreign = seq > ours
        self.suspected = self.suspected or foreign
        if issued_s > self._began_s + _MARGIN_S and (foreign or self._spoke_s is None):
            self.found = True

    def newcomer(self, *, now: float) -> bool:
        """Whether, of two with one key, it is we who came last."""
        return self._spoke_s is None or now - self._spoke_s < YOUNG_S
