"""Virtual time, and a network in it: messages that are lost, doubled and overtaken, bulk bytes on lines of some rate.

What happens follows from the seed alone: events in the order of their times, and of their making where these are equal.
"""

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Generic, Protocol, TypeVar

from dugnad.dht.identity import PeerId
from dugnad.dht.wire import Message
from dugnad.peer.invariants import InvariantBroken
from dugnad.peer.traffic import CODEC, Line, Traffic


@dataclass(frozen=True, slots=True)
class Network:
    """Delays in seconds, rates in bytes/s, probabilities 0..1."""

    delay_s: float = 0.02
    jitter_s: float = 0.03
    loss_rate: float = 0.0
    duplicate_rate: float = 0.0
    bytes_per_s: float = 20e6
    """Of each peer's uplink."""
    downlink: float = 1.0
    """How many times as fast its downlink is."""
    clock_error_s: float = 0.0
    """How far a peer's clock is off at most."""
    step_s: float = 0.1
    step_spread: float = 0.3


class Station(Protocol):
    """Who can be reached in the network."""

    peer: PeerId
    alive: bool
    frozen: bool
    up: Line
    down: Line
    up_since: float

    def training_s(self) -> float:
        """For how long it has trained since it was started."""
        ...

    def do(self, event: Callable[[Any], object]) -> None:
        """Let something happen to it, if it is alive: now, or when it thaws."""
        ...

    def take(self, sender: PeerId, message: Message) -> None:
        """A message is there."""
        ...

    def unreachable(self, peer: PeerId) -> None:
        """The network says that nobody answers there."""
        ...


S = TypeVar("S", bound=Station)


class Net(Generic[S]):
    """The stations that are up, the time, and what is on its way."""

    def __init__(self, seed: int, network: Network) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.network = network
        self.traffic = Traffic()
        self.now = 0.0
        self.nodes: dict[PeerId, S] = {}
        self.cut: set[frozenset[PeerId]] = set()
        """Pairs that cannot reach each other."""
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def crash(self, name: str) -> None:
        """SIGKILL: nothing more is said or done; the disk stays."""
        node = self.nodes.pop(PeerId(name), None)
        if node is not None:
            node.alive = False
            self.traffic.up_s[node.peer] += self.now - node.up_since
            self.traffic.training_s[node.peer] += node.training_s()

    def partition(self, one: Sequence[str], other: Sequence[str]) -> None:
        """Nobody of `one` reaches anybody of `other`."""
        self.cut |= {frozenset((PeerId(a), PeerId(b))) for a in one for b in other}

    def heal(self) -> None:
        """Every pair reaches each other again."""
        self.cut.clear()

    def at(self, at_s: float, action: Callable[[], object]) -> None:
        """Do `action` at that virtual time."""
        self._push(at_s, lambda: (action(), None)[1])

    def when(self, condition: Callable[[], bool], action: Callable[[], object], *, every_s: float = 0.01) -> None:
        """Do `action` once, as soon as `condition` holds."""

        def look() -> None:
            if condition():
                action()
            else:
                self.after(every_s, look)

        self.after(every_s, look)

    def run(self, until_s: float, *, until: Callable[[], bool] | None = None) -> None:
        """Let virtual time pass; stops early when `until` holds."""
        while self._events and self._events[0][0] <= until_s:
            self.now, _, event = heapq.heappop(self._events)
            event()
            if until is not None and until():
                return
        self.now = until_s

    def after(self, delay_s: float, event: Callable[[], None]) -> None:
        """Do `event` after `delay_s` of virtual time."""
        self._push(self.now + delay_s, event)

    def _push(self, at_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), event))

    def reaches(self, a: PeerId, b: PeerId) -> bool:
        """Whether `b` is up and no partition lies between."""
        return b in self.nodes and frozenset((a, b)) not in self.cut

    def delay(self) -> float:
        """One message's way, in seconds."""
        return self.network.delay_s + self.rng.random() * self.network.jitter_s

    def send(self, sender: PeerId, to: PeerId, message: Message, nbytes: int) -> None:
        """Put one message on its way; it may be lost, doubled or overtaken."""
        way_s = self.nodes[sender].up.say(nbytes, now=self.now) if sender in self.nodes else 0.0
        if self.rng.random() < self.network.loss_rate:
            return
        for _ in range(2 if self.rng.random() < self.network.duplicate_rate else 1):
            self.after(way_s + self.delay(), lambda: self._deliver(sender, to, message, nbytes))

    def _deliver(self, sender: PeerId, to: PeerId, message: Message, nbytes: int) -> None:
        if self.reaches(sender, to):
            self.traffic.moved(sender, to, CODEC.tag_of(message), nbytes)
            other = self.nodes[to]
            way_s = other.down.say(nbytes, now=self.now)
            if way_s < 0.001:
                other.do(lambda node: node.take(sender, message))
            else:
                self.after(way_s, lambda: other.do(lambda node: node.take(sender, message)))
        elif sender in self.nodes:
            self.nodes[sender].do(lambda node: node.unreachable(to))

    def transfer(
        self,
        sender: S,
        to: PeerId,
        nbytes: int,
        kind: str,
        arrived: Callable[[S], str | None],
        done: Callable[[str | None], None],
        broken: Callable[[], None] = lambda: None,
    ) -> None:
        """Move bulk bytes: `arrived` takes or refuses them at the other end, `done` hears here of an error or None.

        broken: told at the other end if we are gone before all is there.
        """
        begun = self.nodes.get(to)
        if begun is None or not self.reaches(sender.peer, to):
            self.after(self.delay(), lambda: sender.do(lambda _: done("unreachable")))
            return
        lines = [sender.up, begun.down]

        def through() -> None:
            lines.pop()
            if not lines:
                self.after(self.delay(), finish)

        def finish() -> None:
            other = self.nodes.get(to)
            self.traffic.moved(sender.peer, to, kind, nbytes)
            if not sender.alive:
                begun.do(lambda _: broken())
            elif other is not begun or not self.reaches(sender.peer, to):
                sender.do(lambda _: done("unreachable"))
            elif other.frozen:
                self.after(5.0, lambda: sender.do(lambda _: done("no byte for 5 s")))
            else:
                begun.do(take)

        def take(node: S) -> None:
            said: str | None = "the connection broke"
            try:
                said = arrived(node)
            finally:
                sender.do(lambda _: done(said))

        for line in tuple(lines):
            line.carry(nbytes, through, now=self.now)

    def fail(self, rule: str) -> None:
        """An invariant does not hold."""
        raise InvariantBroken(f"seed {self.seed}, {self.now:.3f} s: {rule}")
