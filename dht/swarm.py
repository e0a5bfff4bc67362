"""A run's members as one peer sees them: found through the DHT, told by gossip, dialled at the addresses they sign.

The DHT only gives the first hints, of people who can then be asked. From there on member and progress records travel by
gossip (`gossip.py`), and a member's addresses come from its own record. What time it is, all agree on
(`timekeeping.py`): a record that one issues by a clock of its own would hold for nobody else.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Coroutine
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from dugnad.dht import records
from dugnad.dht.crdt import Entry, RecordMap
from dugnad.dht.decisions import Decisions
from dugnad.dht.evidence import Proofs, is_evidence
from dugnad.dht.gossip import GOSSIP_KINDS, Changed, Effect, Gossip, Push, Send, refresh_s
from dugnad.dht.host import Host
from dugnad.dht.identity import Identity, PeerId, nickname
from dugnad.dht.multiaddrs import usable
from dugnad.dht.paths import Reach
from dugnad.dht.records import KINDS, MEMBER_KINDS, REGISTERS, MemberBody, ProgressBody, Record
from dugnad.dht.sequence import Sequence
from dugnad.dht.timekeeping import Timekeeper
from dugnad.dht.transport import Direction, TransportError
from dugnad.dht.twin import WATCH_S, KeyInUse, Twin
from dugnad.dht.verdicts import Verdicts
from dugnad.dht.wire import Codec, WireError, open_sealed, seal

log = logging.getLogger(__name__)

CHANNEL = "dugnad/gossip/1"
MINE_CHANNEL = "dugnad/mine/1"
"""Where one asks what another holds of oneself: an empty question, a msgpack array of raw records. They are what one
said, and what was decided about one: while one was away, that may have changed.
"""
CODEC = Codec(GOSSIP_KINDS)
MINE_BYTES = len(KINDS) * (records.MAX_RECORD_BYTES + 8) + 8
ASK_AGAIN_S = 1.0
"""How often those who may know of another peer with our key are asked."""
ANNOUNCE_S = 60.0
"""How often we say in the DHT that we are there."""
MEMBER_LIFETIME_S = 180.0
LIFETIME_PERIODS = 3
"""For how many of the periods after which it is renewed what we say holds, at least."""
PROGRESS_LIFETIME_S = 30.0
MOST_ASKED = 8
"""How many are asked what they hold of us."""
MOST_TOLD = 16
"""How many are told at once of a decision that someone brings."""
ANSWER_S = 3.0
MOVED_S = 0.5
"""For how long our addresses are left to settle once they changed, before we say it: a relay gone, another found."""
MAX_WAITING = 64
"""Answers to one peer that wait for earlier ones to reach it; what does not fit is left to the next exchange."""


def progress_period_s(num_members: int) -> float:
    """How often each of so many members says what it is doing."""
    return refresh_s(num_members * len(MEMBER_KINDS))


def member_period_s(num_members: int) -> float:
    """How often each of so many members says again where it can be reached."""
    return max(ANNOUNCE_S, refresh_s(num_members * len(MEMBER_KINDS)))


def lifetime_s(kind: str, period_s: float) -> float:
    """For how long a record of a kind that is renewed so often holds."""
    least_s = MEMBER_LIFETIME_S if kind == "member" else PROGRESS_LIFETIME_S
    return min(max(least_s, LIFETIME_PERIODS * period_s), KINDS[kind].max_lifetime_s)


class Swarm:
    """Entered, it keeps one peer among the members of one run until it is left.

    role: "volunteer" or "coordinator". directory: where our numbers and the evidence are kept. progress: what we are
    doing, asked now and then. reach, certificate: how our direct connections come about, and the fingerprint that they
    show. refused: hears why a record or a message of gossip was refused, in a word or two. passed: hears the direction
    and kind of each message of gossip. proofs: what convicts a peer of having said two things; accused: hears of each
    peer that is convicted, once, and why. organizer: whose decisions count.
    Raises OSError or ValueError if the directory can't be used; KeyInUse, in entering or soon after.
    """

    def __init__(
        self,
        host: Host,
        identity: Identity,
        run: bytes,
        *,
        role: str,
        directory: Path,
        refused: Callable[[str], None],
        progress: Callable[[], ProgressBody | None],
        reach: Callable[[], Reach] = lambda: Reach.UNKNOWN,
        certificate: bytes = b"",
        passed: Callable[[Direction, str], None] | None = None,
        proofs: Proofs | None = None,
        accused: Callable[[PeerId, str], None] | None = None,
        organizer: PeerId | None = None,
    ) -> None:
        self.records = RecordMap()
        self.clock = host.clock
        """What this machine's clock is corrected by, and what people should know of it."""
        self._host = host
        self._identity = identity
        self._run = run
        self._role = role
        self._directory = directory
        self._sequence = Sequence(directory / "sequence")
        self._twin = Twin(suspected=self._sequence.copied)
        self._twin_found = asyncio.Event()
        self._refused = refused
        self._progress = progress
        self._reach = reach
        self._certificate = certificate
        self._passed = passed or (lambda direction, kind: None)
        self._verdicts = Verdicts(
            self.records,
            run,
            identity.peer_id,
            directory=directory,
            organizer=organizer,
            proofs=proofs or Proofs(),
            accused=accused or (lambda peer, why: None),
        )
        self._time = Timekeeper(host, members=self._trusted, corrected=self._say_anew, refused=refused)
        self._gossip = Gossip(identity.peer_id, self.records, self._parse)
        self._rng = random.Random()
        self._known: tuple[PeerId, ...] = ()
        """Members and whoever is connected, sorted."""
        self._tasks = asyncio.TaskGroup()
        self._running: set[asyncio.Task[None]] = set()
        self._answering: dict[PeerId, list[Send]] = {}
        """What is still to be sent to each peer that is being answered: one message at a time."""
        self._handing_on: set[asyncio.Task[None]] = set()
        """Decisions that someone brought, on their way to others."""
        self._over = False
        """Whether we are leaving: from then on gossip that arrives is ignored."""

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._verdicts.load()
        await self._time.serve()
        await self._host.serve(MINE_CHANNEL, self._on_mine)
        await self._host.serve(CHANNEL, self._on_message)
        await self._meet()
        await self._time.begin()  # before we say anything by a clock that may be wrong
        try:
            await self._listen_for_twin()
            self._twin.speak(now=self.now())
            await self._announce()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        for work in (
            self._keep_announcing(),
            self._keep_telling(),
            self._keep_gossiping(),
            self._time.keep(),
            self._keep_watching(),
        ):
            self._spawn(work)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handing_on:
            await asyncio.wait(self._handing_on, timeout=ANSWER_S)
        self._over = True
        for task in self._running:
            task.cancel()
        await self._tasks.__aexit__(kind, error, trace)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = self._tasks.create_task(work)
        task.add_done_callback(self._ended)  # right behind the task group's own, which takes no more after a failure
        self._running.add(task)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._over = True

    def now(self) -> float:
        """The run's time, unix seconds: this machine's clock, corrected."""
        return self._host.now()

    def roles(self) -> dict[PeerId, str]:
        """Every other member that we know of, and its role."""
        found = self.records.items("member", now=self.now())
        mine = self._identity.peer_id
        return {one.owner: one.body.role for one in found if one.owner != mine and isinstance(one.body, MemberBody)}

    def addresses(self) -> set[str]:
        """Where the other members are, by their own word: multiaddrs that name the peer."""
        found = self.records.items("member", now=self.now())
        return {
            f"{address}/p2p/{one.owner}"
            for one in found
            if one.owner != self._identity.peer_id and isinstance(one.body, MemberBody)
            for address in one.body.addresses
            if usable(address)
        }

    def open_peers(self) -> list[PeerId]:
        """The other members that accept direct connections from anywhere, by their own word."""
        found = self.records.items("member", now=self.now())
        others = [one for one in found if one.owner != self._identity.peer_id]
        return [one.owner for one in others if isinstance(one.body, MemberBody) and one.body.reach is Reach.OPEN]

    def fingerprint_of(self, peer: PeerId) -> bytes | None:
        """Of the certificate with which `peer` makes direct connections; None if it has not said."""
        found = self.records.get("member", peer, now=self.now())
        return found.body.certificate or None if found is not None and isinstance(found.body, MemberBody) else None

    def progress_of(self, peer: PeerId) -> ProgressBody | None:
        """What `peer` last said that it is doing, if that still holds."""
        found = self.records.get("progress", peer, now=self.now())
        return found.body if found is not None and isinstance(found.body, ProgressBody) else None

    def quarantined(self) -> frozenset[PeerId]:
        """Those who are proven to have said two things: no seat, no vote, and none of their records counts."""
        return self.records.quarantined()

    def accuse(self, sort: str, one: bytes, other: bytes) -> bool:
        """Spread the proof that two signed things are, if they are one and news; whether they are."""
        return self._verdicts.accuse(sort, one, other, now=self.now())

    @property
    def decisions(self) -> Decisions:
        """What the organizer has decided, as far as we have heard."""
        return self._verdicts.decisions

    def decide(self, raw: bytes) -> str | None:
        """Spread a decision that someone brings; why it is refused, or None if it holds from now on."""
        refused = self._verdicts.decide(raw, now=self.now())
        if refused is None and not self._over:
            self._hand_on(raw)
        return refused

    def _hand_on(self, raw: bytes) -> None:
        """Tell some others at once, and before we leave: it may be we who are put out. Gossip tells the rest."""
        for peer in self._rng.sample(self._known, min(len(self._known), MOST_TOLD)):
            task = self._spawn(self._send(Send(peer, Push((raw,)))))
            self._handing_on.add(task)
            task.add_done_callback(self._handing_on.discard)

    def _trusted(self) -> list[PeerId]:
        """Whoever is there and not proven to lie."""
        liars = self.quarantined()
        return [peer for peer in self._known if peer not in liars]

    async def look_around(self) -> dict[PeerId, str]:
        """Ask the DHT who is there, and return every other member that we know of, with its role."""
        for raw in await self._host.discover(self._run):
            self._take(raw)
        await self._meet()
        return self.roles()

    # -- what we say

    async def _announce(self, *, anew: bool = False) -> None:
        """Say in the DHT that we are there, with a new record if the last one is old or no longer true, or `anew`."""
        period_s = member_period_s(len(self.roles()) + 1)
        mine = self._identity.peer_id
        addresses = tuple(address.removesuffix(f"/p2p/{mine}") for address in self._host.addresses())
        body = MemberBody(addresses, self._role, nickname(mine), version("dugnad"), self._reach(), self._certificate)
        record = self.records.get("member", mine, now=self.now())
        if (
            anew
            or record is None
            or record.body != body
            or self.now() > record.issued_ms / 1000 + period_s - ANNOUNCE_S
        ):
            record = self._say("member", body, period_s)
        await self._host.announce(self._run, record.raw, expires_s=MEMBER_LIFETIME_S)

    def _tell(self) -> float:
        """Say what we are doing; for how long that is enough, in seconds."""
        body, period_s = self._progress(), progress_period_s(len(self.roles()) + 1)
        if body is not None:
            self._say("progress", body, period_s)
        return period_s

    def _say(self, kind: str, body: MemberBody | ProgressBody, period_s: float) -> Record:
        # above what others still hold of us, too: the file with our numbers may have been lost
        least = max(int(self.now() * 1000), self.records.seq_of(kind, self._identity.peer_id) + 1)
        seq = self._sequence.next(least)
        lasts_s = lifetime_s(kind, period_s)
        record = records.issue(self._identity, self._run, kind, "", seq, body, now=self.now(), lifetime_s=lasts_s)
        self.records.merge(record)
        return record

    async def _say_anew(self) -> None:
        """All that we say: what we have said until now, nobody may believe."""
        self._tell()
        with contextlib.suppress(TransportError):
            await self._announce(anew=True)

    async def _keep_announcing(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ANNOUNCE_S / 2 + self._rng.random() * ANNOUNCE_S / 2):
                    await self._host.addresses_changed()
                    await asyncio.sleep(MOVED_S)
            try:
                await self._announce()
                await self.look_around()
            except TransportError as error:
                log.info("could not announce ourselves: %s", error)

    async def _keep_telling(self) -> None:
        while True:
            await asyncio.sleep(self._tell())

    # -- whether it is we who say it

    @property
    def key_in_use(self) -> bool:
        """Whether another running peer signs with our key."""
        return self._twin.found

    async def _listen_for_twin(self) -> None:
        """Before we say anything: whether another does so in our name. Raises KeyInUse, within 12 s."""
        self._twin.begin(now=self.now())
        await self._ask_of_us()
        if not self._twin.suspected:
            return
        log.info("someone has signed with this peer's key, or its folder is a copy: listening for %.0f s", WATCH_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WATCH_S):
                while not self._twin.found:
                    await asyncio.sleep(ASK_AGAIN_S)
                    await self._ask_of_us()
        if self._twin.found:
            raise KeyInUse(str(self._directory))

    async def _ask_of_us(self) -> None:
        """Take what others hold of us. Asked, not gossiped: what is sent to our name may reach the other with it."""
        answers = await asyncio.gather(*(self._held_by(peer) for peer in self._known[:MOST_ASKED]))
        for raw in dict.fromkeys(raw for answer in answers for raw in answer):
            self._take(raw)

    async def _held_by(self, peer: PeerId) -> list[bytes]:
        try:
            return _decode_mine(await self._host.request(peer, MINE_CHANNEL, b"", timeout_s=ANSWER_S))
        except TransportError as error:
            log.debug("%s does not say what it holds of us: %s", nickname(peer), error)
        except WireError as error:
            self._refused(error.reason)
        return []

    async def _on_mine(self, peer: PeerId, raw: bytes) -> bytes:
        now = self.now()
        said = [self.records.get(kind, peer, now=now) for kind in MEMBER_KINDS]
        decided = [self.decisions.on(register, peer, now=now) for register in REGISTERS]
        return msgspec.msgpack.encode([held.raw for held in (*said, *decided) if held is not None])

    async def _keep_watching(self) -> None:
        await self._twin_found.wait()
        if self._twin.newcomer(now=self.now()):
            raise KeyInUse(str(self._directory))
        log.error(
            "%s another running peer signs with this peer's key: a copy of its folder, or of identity.key? If both "
            "vote, both are out of the run. Stop the other one, and give it a key of its own: dugnad identity new "
            "--force --dir DIR",
            KeyInUse.code,
        )

    def _heard_of_us(self, record: Record) -> None:
        self._twin.heard(record.seq, record.issued_ms / 1000, ours=self._sequence.last)
        if self._twin.found:
            self._twin_found.set()

    # -- gossip

    async def _keep_gossiping(self) -> None:
        while True:
            await self._meet()
            for effect in self._gossip.tick(now=self.now(), rng=self._rng):
                if isinstance(effect, Send):
                    await self._send(effect)
            await asyncio.sleep(max(0.05, min(1.0, self._gossip.wake_at() - self.now())))

    async def _meet(self) -> None:
        """Let the gossip and the network know of the members that the records name, and gossip of who is connected."""
        try:
            connected = await self._host.peers()  # a coordinator that was away for long is in nobody's records
        except TransportError as error:
            log.debug("could not learn who is connected: %s", error)
            connected = []
        self._known = tuple(sorted({*self.roles(), *connected} - {self._identity.peer_id}))
        self._gossip.set_peers(self._known)
        for record in self.records.items("member", now=self.now()):
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
            effects = self._gossip.receive(sender, message, now=self.now())
        except WireError as error:
            self._refused(error.reason)
            return b""
        self._answer_with(peer, effects)
        self._verdicts.take((effect.entry for effect in effects if isinstance(effect, Changed)), now=self.now())
        return b""

    def _answer_with(self, peer: PeerId, effects: list[Effect]) -> None:
        sends = [effect for effect in effects if isinstance(effect, Send)]
        waiting = self._answering.get(peer)
        if waiting is not None:
            waiting += sends[: max(0, MAX_WAITING - len(waiting))]
        elif sends:
            self._answering[peer] = sends
            self._spawn(self._answer(peer, sends))

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

    def _parse(self, raw: bytes, now: float) -> Entry:
        try:
            if is_evidence(raw):
                return self._verdicts.parse_evidence(raw)
            record = records.parse(raw, self._run, now=now)
            self._verdicts.check(record)
        except WireError as error:
            self._refused(error.reason)
            raise
        if record.owner == self._identity.peer_id:
            self._heard_of_us(record)
        return record

    def _take(self, raw: bytes) -> None:
        with contextlib.suppress(WireError):
            entry = self._parse(raw, self.now())
            self._verdicts.take(self.records.learn(entry) if isinstance(entry, Record) else (), now=self.now())


def _decode_mine(raw: bytes) -> list[bytes]:
    """Raises WireError for anything but a few raw records, which are not looked at."""
    if len(raw) > MINE_BYTES:
        raise WireError("too large", f"{len(raw)} bytes of records, at most {MINE_BYTES}")
    try:
        return _mine.decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise WireError("malformed", f"records: {error}") from error


_mine = msgspec.msgpack.Decoder(list[bytes])
