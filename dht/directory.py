"""Finding a run's peers through hivemind's DHT: each peer keeps one announcement there, and only it can write it.

An announcement stands under (run, peer id) and is signed together with its place and its expiry, so that neither a
stranger's bytes nor our own old ones with a new expiry can take its place. The nodes that keep it check that.
"""

import asyncio
import contextlib
import logging
import struct
import time
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import msgspec

from dugnad.dht.daemon import STOP_S, Daemon
from dugnad.dht.identity import Identity, PeerId, verify
from dugnad.dht.transport import NetworkDown

OwnerOf = Callable[[bytes], PeerId | None]
"""Whose record these bytes are; None if they are no valid record."""

RECORD_BYTES = 8192
LIFETIME_S = 24 * 3600.0
_SIGNATURE_BYTES = 64
_ANSWER_S = 3.0
_DOMAIN = b"dugnad/announcement/1"


class Directory:
    """A DHT node on a running daemon: `async with Directory(...)`."""

    def __init__(self, daemon: Daemon, identity: Identity, owner_of: OwnerOf) -> None:
        self._daemon = daemon
        self._identity = identity
        self._owner_of = owner_of
        self._p2p: Any = None
        self._control: Any = None
        self._node: Any = None

    async def __aenter__(self) -> Self:
        from hivemind.p2p import P2P
        from hivemind.utils.multiaddr import Multiaddr

        self._p2p = await P2P.replicate(Multiaddr(f"/unix{self._daemon.control}"))
        self._control = self._p2p._client.control
        self._control._pending_calls = _PendingCalls(self._control._pending_calls)
        return self

    async def join(self, peers: Sequence[PeerId]) -> None:
        """Enter the DHT through `peers`, to whom the daemon is connected already."""
        from hivemind.dht.node import DHTNode
        from hivemind.dht.routing import DHTID

        self._node = await DHTNode.create(
            p2p=self._p2p,
            node_id=DHTID.generate(source=self._identity.peer_id.encode()),
            initial_peers=[f"/p2p/{peer}" for peer in peers],
            record_validator=_Ownership(self._identity, self._owner_of),
            wait_timeout=_ANSWER_S,
            ensure_bootstrap_success=False,  # that check turns away peers whose clocks are 3 s off; records bound time
            strict=False,
            cache_locally=False,  # an announcement is worth something only as it stands now
            cache_nearest=0,
            cache_on_store=False,
            cache_refresh_before_expiry=0,
        )

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(TimeoutError, NetworkDown):
            async with asyncio.timeout(STOP_S):
                if self._node is not None:
                    self._daemon.check_alive()
                    await self._node.shutdown()
        await self._p2p.shutdown()
        tasks = (self._control._read_task, self._control._write_task)  # cancelled, and nobody else waits for their end
        await asyncio.gather(*tasks, return_exceptions=True)

    async def announce(self, run: bytes, raw: bytes, *, expires_s: float) -> bool:
        """Keep our record `raw` in the DHT for `expires_s` seconds; whether a node took it."""
        assert len(raw) <= RECORD_BYTES, f"a record of {len(raw)} bytes, at most {RECORD_BYTES}"
        expiry = time.time() + min(expires_s, LIFETIME_S)
        return bool(await self._node.store(_key(run), raw, expiry, subkey=self._identity.peer_id))

    async def discover(self, run: bytes) -> list[bytes]:
        """The raw records of all peers that announced themselves for `run`, ours too; each checked for its owner."""
        found = await self._node.get(_key(run), latest=True)
        if found is None or not isinstance(found.value, dict):
            return []
        return [entry.value for entry in found.value.values()]


class _Ownership:
    """hivemind's RecordValidatorBase by its methods; not by its class, since importing that imports torch."""

    def __init__(self, identity: Identity, owner_of: OwnerOf) -> None:
        self._identity = identity
        self._owner_of = owner_of

    def validate(self, record: Any) -> bool:
        """Whether `record` (hivemind's DHTRecord, from anyone) is signed by the peer under whose name it stands."""
        value, signature = record.value[:-_SIGNATURE_BYTES], record.value[-_SIGNATURE_BYTES:]
        if len(value) > RECORD_BYTES + 8 or record.expiration_time > time.time() + 2 * LIFETIME_S:
            return False
        try:
            peer = PeerId(msgspec.msgpack.decode(record.subkey, type=str))
            raw = msgspec.msgpack.decode(value, type=bytes)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return False  # values without an owner come here too: one of them would wipe all announcements of a run
        return verify(peer, _signed(record, value), signature) and self._owner_of(raw) == peer

    def sign_value(self, record: Any) -> bytes:
        """Our own value, with our signature behind it."""
        return bytes(record.value + self._identity.sign(_signed(record, record.value)))

    def strip_value(self, record: Any) -> bytes:
        """The value without its signature."""
        return bytes(record.value[:-_SIGNATURE_BYTES])


class _PendingCalls(dict[Any, "asyncio.Future[Any]"]):
    """hivemind's unanswered calls, less the abandoned ones: their late answers would end its reading loop for good."""

    def __contains__(self, call: object) -> bool:
        future = self.get(call)
        return future is not None and not future.done()


def import_hivemind() -> None:
    """Import hivemind (1-3 s, with torch) without its warnings, log handler and renamed log levels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import hivemind.dht.node
        import hivemind.p2p  # noqa: F401
        from hivemind.utils.logging import use_hivemind_log_handler
    use_hivemind_log_handler("nowhere")
    logging.getLogger("hivemind").setLevel(logging.ERROR)
    logging.addLevelName(logging.WARNING, "WARNING")


def _key(run: bytes) -> bytes:
    return _DOMAIN + run


def _signed(record: Any, value: bytes) -> bytes:
    """What a signature covers: the place, the owner's name and the expiry besides the value."""
    place = struct.pack(">20sdH", record.key, record.expiration_time, len(record.subkey))
    return _DOMAIN + place + bytes(record.subkey) + value
