"""A run's members as one peer sees them: found through the DHT, told by gossip, dialled at the addresses they sign.

The DHT only gives the first hints, of people who can then be asked. From there on member and progress records travel by
gossip (`gossip.py`), and a member's addresses come from its own record.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Coroutine
from importlib.metadata import version
from types import TracebackType
from typing import Any, Self

from dugnad.dht import records
from dugnad.dht.crdt import RecordMap
from dugnad.dht.gossip import GOSSIP_KINDS, Gossip, Send, refresh_s
from dugnad.dht.host import Host
from dugnad.dht.identity import Identity, PeerId, nickname
from dugnad.dht.records import KINDS, MemberBody, ProgressBody, Record
from dugnad.dht.transport import Direction, TransportError
from dugnad.dht.wire import Codec, WireError, open_sealed, seal

log = logging.getLogger(__name__)

CHANNEL = "dugnad/gossip/1"
CODEC = Codec(GOSSIP_KINDS)
ANNOUNCE_S = 60.0
"""How often we say in the DHT that we are there."""
MEMBER_LIFETIME_S = 180.0
PROGRESS_LIFETIME_PERIODS = 6
"""For how many of the periods after which it is renewed what we say of our progress holds."""
ANSWER_S = 3.0
MAX_WAITING = 64
"""Answers to one peer that wait for earlier ones to reach it; what does not fit is left to the next exchange."""


class Swarm:
    """Entered, it keeps one peer among the members of one run until it is left.

    role: "volunteer" or "coordinator". progress: what we are doing, asked now and then. refused: hears why a record or
    a message of gossip was refused, in a word or two. passed: hears the direction and kind of each message of gossip.
    """

    def __init__(
        self,
        host: Host,
        identity: Identity,
        run: bytes,
        *,
        role: str,
        refused: Callable[[str], None],
        progress: Callable[[], ProgressBody | None],
        passed: Callable[[Direction, str], None] | None = None,
    ) -> None:
        self.records = RecordMap()
        self._host = host
        self._identity = identity
        self._run = run
        self._role = role
        self._refused = refused
        self._progress = progress
        self._passed = passed or (lambda direction, kind: None)
        self._gossip = Gossip(identity.peer_id, self.records, self._parse)
        self._rng = random.Random()
        self._tasks = asyncio.TaskGroup()
        self._running: set[asyncio.Task[None]] = set()
        self._answering: dict[PeerId, list[Send]] = {}
        """What is still to be sent to each peer that is being answered: one message at a time."""
        self._over = False
        """Whether we are leaving: from then on gossip that arrives is ignored."""

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        await self._host.serve(CHANNEL, self._on_message)
        await self._announce()
        for work in (self._keep_announcing(), self._keep_telling(), self._keep_gossiping()):
            self._spawn(work)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        for task in self._running:
            task.cancel()
        await self._tasks.__aexit__(kind, error, trace)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._tasks.create_task(work)
        task.add_done_callback(self._ended)  # right behind the task group's own, which takes no more after a failure
        self._running.add(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._over = True

    def roles(self) -> dict[PeerId, str]:
        """Every other member that we know of, and its role."""
        found = self.records.items("member", now=time.time())
        mine = self._identity.peer_id
        return {one.owner: one.body.role for one in found if one.owner != mine and isinstance(one.body, MemberBody)}

    def addresses(self) -> set[str]:
        """Where the other members are, by their own word."""
        found = self.records.items("member", now=time.time())
        others = (one.body for one in found if one.owner != self._identity.peer_id)
        return {address for body in others if isinstance(body, MemberBody) for address in body.addresses}

    def progress_of(self, peer: PeerId) -> ProgressBody | None:
        """What `peer` last said that it is doing, if that still holds."""
        found = self.records.get("progress", peer, now=time.time())
        return found.body if found is not None and isinstance(found.body, ProgressBody) else None

    async def look_around(self) -> dict[PeerId, str]:
        """Ask the DHT who is there, and return every other member that we know of, with its role."""
        for raw in await self._host.discover(self._run):
            self._take(raw)
        await self._meet()
        return self.roles()

    # -- what we say

    async def _announce(self) -> None:
        # an announcement of a minute ago must not outlive us for long
        body = MemberBody(self._host.addresses(), self._role, nickname(self._identity.peer_id), version("dugnad"))
        record = self._say("member", body, MEMBER_LIFETIME_S)
        await self._host.announce(self._run, record.raw, expires_s=MEMBER_LIFETIME_S)

    def _say(self, kind: str, body: MemberBody | ProgressBody, lifetime_s: float) -> Record:
        # by the clock, so that it grows over restarts; and above what others still hold of us, if the clock went back
        seq = max(int(time.time() * 1000), self.records.seq_of(kind, self._identity.peer_id) + 1)
        record = records.issue(self._identity, self._run, kind, "", seq, body, now=time.time(), lifetime_s=lifetime_s)
        self.records.merge(record)
        return record

    async def _keep_announcing(self) -> None:
        while True:
            await asyncio.sleep(ANNOUNCE_S / 2 + self._rng.random() * ANNOUNCE_S / 2)
            try:
                await self._announce()
                await self.look_around()
                self.records.prune(now=time.time())
            except TransportError as error:
                log.info("could not announce ourselves: %s", error)

    async def _keep_telling(self) -> None:
        while True:
            body, period_s = self._progress(), refresh_s(len(self.roles()) + 1)
            if body is not None:
                lifetime_s = min(PROGRESS_LIFETIME_PERIODS * period_s, KINDS["progress"].max_lifetime_s)
                self._say("progress", body, lifetime_s)
            await asyncio.sleep(period_s)

    # -- gossip

    async def _keep_gossiping(self) -> None:
        while True:
            now = time.time()
            await self._meet()
            for effect in self._gossip.tick(now=now, rng=self._rng):
                if isinstance(effect, Send):
                    await self._send(effect)
            await asyncio.sleep(max(0.05, min(1.0, self._gossip.wake_at() - time.time())))

    async def _meet(self) -> None:
        """Let the gossip and the network know of the members that the records name, and gossip of who is connected."""
        try:
            connected = await self._host.peers()  # a coordinator that was away for long is in nobody's records
        except TransportError as error:
            log.debug("could not learn who is connected: %s", error)
            connected = []
        self._gossip.set_peers({*self.roles(), *connected})
        for record in self.records.items("member", now=time.time()):
            if isinstance(record.body, MemberBody):
                await self._host.learn(record.owner, record.body.addresses)

    async def _on_message(self, peer: PeerId, raw: bytes) -> bytes:
        if self._over:
            return b""
        try:
            sender, message = open_sealed(raw, self._run, CODEC)
            if sender != peer:
                raise WireError("not the sender")
            self._passed("received", CODEC.tag_of(message))
            effects = self._gossip.receive(sender, message, now=time.time())
        except WireError as error:
            self._refused(error.reason)
            return b""
        sends = [effect for effect in effects if isinstance(effect, Send)]  # who wants the changes asks the records
        waiting = self._answering.get(peer)
        if waiting is not None:
            waiting += sends[: max(0, MAX_WAITING - len(waiting))]
        elif sends:
            self._answering[peer] = sends
            self._spawn(self._answer(peer, sends))
        return b""

    async def _answer(self, peer: PeerId, sends: list[Send]) -> None:
        try:
            while sends:
                await self._send(sends.pop(0))
        finally:
            del self._answering[peer]

    async def _send(self, send: Send) -> None:
        raw = seal(self._identity, self._run, CODEC, send.message)
        self._passed("sent", CODEC.tag_of(send.message))
        try:
            await self._host.request(send.to, CHANNEL, raw, timeout_s=ANSWER_S)
        except TransportError as error:
            log.debug("no gossip with %s: %s", nickname(send.to), error)

    def _parse(self, raw: bytes, now: float) -> Record:
        try:
            return records.parse(raw, self._run, now=now)
        except WireError as error:
            self._refused(error.reason)
            raise

    def _take(self, raw: bytes) -> None:
        with contextlib.suppress(WireError):
            self.records.merge(self._parse(raw, time.time()))
