"""Long lines: python -m tests.net.forwarder LINKS, where LINKS is JSON, a list of `Link`s as objects.

Of each link it holds both ends, virtual network cards in two namespaces, and carries what goes in at one end to the
other: later by a delay, and not at all now and then. It says "ready" when the cards are there; they go with it.
(`tc netem` would do the same, and most kernels lack it.)
"""

import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_FRAME_BYTES = 65_536
_ARP = b"\x08\x06"
_QUEUED = 4096
"""Frames that are on their way over one link in one direction; what comes above that is lost, as at a full router."""


@dataclass(frozen=True, slots=True)
class Link:
    """A network card in one namespace, its counterpart in another, and the line between them, the same both ways."""

    namespaces: tuple[str, str]
    cards: tuple[str, str]
    """Their names."""
    delay_s: float
    """One way."""
    loss_rate: float
    """0..1, one way."""


@dataclass(slots=True)
class _End:
    """One direction of a link: what comes in here goes out there."""

    card: int
    other: int
    link: Link
    num_queued: int = 0


@dataclass(order=True, slots=True)
class _Frame:
    due_s: float
    number: int
    end: _End = field(compare=False)
    data: bytes = field(compare=False)


class Forwarder:
    """Carries frames, those of one direction in their order."""

    def __init__(self, ends: Sequence[_End]) -> None:
        self._ends = {end.card: end for end in ends}
        self._poll = select.epoll()
        for card in self._ends:
            self._poll.register(card, select.EPOLLIN)
        self._waiting: list[_Frame] = []
        self._number = 0
        self._chance = random.Random(1)

    def run(self) -> None:
        """Never returns."""
        while True:
            until_due_s = self._waiting[0].due_s - time.monotonic() if self._waiting else 60.0
            for card, _ in self._poll.poll(max(0.0, until_due_s)):
                self._take_all(self._ends[card])
            self._pass_on()

    def _take_all(self, end: _End) -> None:
        now = time.monotonic()
        while True:
            try:
                data = os.read(end.card, _FRAME_BYTES)
            except BlockingIOError:
                return
            if self._lost(end, data):
                continue
            end.num_queued += 1
            self._number += 1
            heapq.heappush(self._waiting, _Frame(now + end.link.delay_s, self._number, end, data))

    def _lost(self, end: _End, data: bytes) -> bool:
        """A lost ARP frame would cost a second, and no line of the internet loses those."""
        if end.num_queued >= _QUEUED:
            return True
        return data[12:14] != _ARP and self._chance.random() < end.link.loss_rate

    def _pass_on(self) -> None:
        now = time.monotonic()
        while self._waiting and self._waiting[0].due_s <= now:
            frame = heapq.heappop(self._waiting)
            frame.end.num_queued -= 1
            with contextlib.suppress(OSError):  # the card is full, or down: lost
                os.write(frame.end.other, frame.data)


def _cards(link: Link) -> list[_End]:
    first, second = (_card(*where) for where in zip(link.namespaces, link.cards, strict=True))
    return [_End(first, second, link), _End(second, first, link)]


def _card(namespace: str, name: str) -> int:
    """A new virtual network card in a namespace, as a file descriptor that gives and takes its frames."""
    enter(namespace)
    card = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(card, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return card


def enter(namespace: str) -> None:
    """Have the calling thread, and what it starts, be in a namespace. (Python's own setns comes with 3.12.)"""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}", "rb") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"can't enter the namespace {namespace}")


def main() -> None:
    """Forward until we are killed."""
    ends = [end for each in json.loads(sys.argv[1]) for end in _cards(Link(**each))]
    print("ready", flush=True)
    Forwarder(ends).run()


if __name__ == "__main__":
    main()
