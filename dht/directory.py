"""Finding a run's peers through hivemind's DHT: each peer keeps one announcement there, and only it can write it.

An announcement stands under (run, peer id) and is signed together with its place and its expiry, so that neither a
stranger's bytes nor our own old ones with a new expiry can take its place. The nodes that keep it check that.
Whatever strangers send, a node keeps a bounded number of announcements, for minutes, and answers within bounds.
"""

import asyncio
import contextlib
import hashlib
import logging
import struct
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import msgspec

from dugnad.dht.daemon import STOP_S, Daemon
from dugnad.dht.identity import Identity, PeerId, verify
from dugnad.dht.transport import NetworkDown
from dugnad.dht.wire import WireError

OwnerOf = Callable[[bytes], PeerId | None]
"""Whose record these bytes are; None if they are no valid record."""

RECORD_BYTES = 6144
LIFETIME_S = 300.0
"""For how long an announcement holds at most."""
MAX_OWNERS = 3 * 2**20 // RECORD_BYTES
"""How many announcements a node keeps of one run: all of them fit into one answer, which hivemind bounds at 4 MiB."""
_CLOCK_ERROR_S = 60.0
_RUNS_KEPT = 8  # by a node that knows no run yet
_REQUEST_BYTES = 1024  # of a request that carries no records
_KEYS_PER_REQUEST = 1  # our own nodes never ask for more
_NODE_ID_BYTES = (0, 20)
_SIGNATURE_BYTES = 64
_ANSWER_S = 3.0
_DOMAIN = b"dugnad/announcement/1"


class Directory:
    """A DHT node on a running daemon: `async with Directory(...)`; now: the run's time, unix seconds.

    hivemind has one time for all nodes of a process; it is that of the directory that joined last.
    """

    def __init__(self, daemon: Daemon, identity: Identity, owner_of: OwnerOf, now: Callable[[], float]) -> None:
        self._daemon = daemon
        self._identity = identity
        self._now = now
        self._ownership = _Ownership(identity, owner_of, now)
        self._p2p: Any = None
        self._control: Any = None
        self._node: Any = None

    async def __aenter__(self) -> Self:
        from hivemind.p2p import P2P
        from hivemind.utils.multiaddr import Multiaddr

        self._p2p = await P2P.replicate(Multiaddr(f"/unix{self._daemon.control}"))
        self._control = self._p2p._client.control
        self._control._pending_calls = _PendingCalls(self._control._pending_calls)
        self._control.unary_handlers = _Handlers()
        return self

    async def join(self, peers: Sequence[PeerId], *, serves: bool = True) -> None:
        """Enter the DHT through `peers`, to whom the daemon is connected already.

        serves: also answer others and keep their announcements, as only those can whom others reach: they would wait.
        """
        from hivemind.dht.node import DHTNode
        from hivemind.dht.routing import DHTID

        _set_time(self._now)
        self._node = await DHTNode.create(
            p2p=self._p2p,
            node_id=DHTID.generate(source=self._identity.peer_id.encode()),
            initial_peers=[f"/p2p/{peer}" for peer in peers],
            client_mode=not serves,
            record_validator=self._ownership,
            wait_timeout=_ANSWER_S,
            ensure_bootstrap_success=False,  # that check turns away peers whose clocks are 3 s off; ours gets corrected
            strict=False,
            cache_locally=False,  # an announcement is worth something only as it stands now
            cache_nearest=0,
            cache_size=_RUNS_KEPT,
            cache_on_store=False,
            cache_refresh_before_expiry=0,
        )
        self._node.protocol.storage.maxsize = _RUNS_KEPT
        self._node.protocol.call_find = _by_content(self._node.protocol.call_find)

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
        """Keep our record `raw` in the DHT for `expires_s` seconds, at most LIFETIME_S; whether a node took it."""
        assert len(raw) <= RECORD_BYTES, f"a record of {len(raw)} bytes, at most {RECORD_BYTES}"
        expiry = self._now() + min(expires_s, LIFETIME_S)
        return bool(await self._node.store(self._key(run), raw, expiry, subkey=self._identity.peer_id))

    async def discover(self, run: bytes) -> list[bytes]:
        """The raw records of all peers that announced themselves for `run`, ours too; each checked for its owner."""
        found = await self._node.get(self._key(run), latest=True)
        if found is None or not isinstance(found.value, dict):
            return []
        return [entry.value for entry in found.value.values()]

    def _key(self, run: bytes) -> bytes:
        """A run's key; from now on this node keeps announcements only of the runs that we asked for."""
        key = _DOMAIN + run
        self._ownership.places.add(hashlib.sha1(key).digest())
        return key


class _Ownership:
    """hivemind's RecordValidatorBase by its methods; not by its class, since importing that imports torch."""

    def __init__(self, identity: Identity, owner_of: OwnerOf, now: Callable[[], float]) -> None:
        self._identity = identity
        self._owner_of = owner_of
        self._now = now
        self.places: set[bytes] = set()
        """The keys, hashed, under which records may stand; while there is none, any."""

    def validate(self, record: Any) -> bool:
        """Whether `record` (hivemind's DHTRecord, from anyone) is signed by the peer under whose name it stands.

        It must stand under one of our runs' keys and be about to expire, give or take what clocks differ.
        """
        value, signature = record.value[:-_SIGNATURE_BYTES], record.value[-_SIGNATURE_BYTES:]
        if len(record.key) != 20 or (self.places and record.key not in self.places):
            return False
        if not abs(record.expiration_time - self._now()) <= LIFETIME_S + _CLOCK_ERROR_S:  # so that NaN fails too
            return False
        if len(value) > RECORD_BYTES + 8:
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


class _Handlers(dict[str, Any]):
    """hivemind's handlers of requests, each behind `_check_request`: what that raises goes back to the sender."""

    def __setitem__(self, name: str, handler: Any) -> None:
        async def guarded(request: bytes, sender: Any) -> bytes:
            _check_request(name, request)
            return bytes(await handler(request, sender))

        super().__setitem__(name, guarded)


def _check_request(name: str, raw: bytes) -> None:
    """Raises WireError for a request (protobuf, from anyone) that none of our nodes sends.

    A long one makes a reply hundreds of times longer; a bad node id ends in a traceback on the terminal.
    """
    from hivemind.proto import dht_pb2

    method = name.rpartition(".")[2]
    if method != "rpc_store" and len(raw) > _REQUEST_BYTES:
        raise WireError("too large", f"a request of {len(raw)} bytes, at most {_REQUEST_BYTES}")
    kinds = {"rpc_find": dht_pb2.FindRequest, "rpc_store": dht_pb2.StoreRequest, "rpc_ping": dht_pb2.PingRequest}
    request = kinds[method].FromString(raw)
    if len(request.peer.node_id) not in _NODE_ID_BYTES:
        raise WireError("malformed", f"a node id of {len(request.peer.node_id)} bytes")
    if method != "rpc_ping" and len(request.keys) > _KEYS_PER_REQUEST:
        raise WireError("too large", f"{len(request.keys)} keys, at most {_KEYS_PER_REQUEST}")


def _by_content(call_find: Callable[..., Any]) -> Callable[..., Any]:
    """`DHTProtocol.call_find`, its answers rebuilt from the records in them: what else they say nobody has signed.

    An expiry of the whole that lies far ahead would end a search at once.
    """
    from hivemind.dht.storage import DictionaryDHTValue
    from hivemind.utils.timed_storage import ValueWithExpiration

    def rebuilt(found: Any) -> Any:
        records = DictionaryDHTValue()
        if found is not None and isinstance(found.value, DictionaryDHTValue):
            for subkey, (value, expiry) in found.value.data.items():
                records.store(subkey, value, expiry)
        return ValueWithExpiration(records, records.latest_expiration_time) if records else None

    async def call(peer: Any, keys: Any) -> Any:
        answer = await call_find(peer, keys)
        return answer and {key: (rebuilt(found), nearest) for key, (found, nearest) in answer.items()}

    return call


def _store_later(self: Any, subkey: Any, value: bytes, expiry: float) -> bool:
    """`DictionaryDHTValue.store` for at most MAX_OWNERS subkeys, and only for what expires later than what is held.

    hivemind's own refuses an older value but takes its expiry, and with that deletes the newer one too early.
    """
    from hivemind.utils.timed_storage import TimedStorage

    held = self.data.get(subkey)
    if held is not None and expiry <= held.expiration_time:
        return bool(held.value == value and held.expiration_time == expiry)
    if held is None and len(self) >= MAX_OWNERS:
        return False
    self.latest_expiration_time = max(self.latest_expiration_time, expiry)
    return bool(TimedStorage.store(self, subkey, value, expiry))


def _set_time(now: Callable[[], float]) -> None:
    """Have hivemind judge what is over by `now`: by a machine's wrong clock no announcement of others would count."""
    from hivemind.dht import node, protocol, routing
    from hivemind.utils import timed_storage

    for module in (node, protocol, routing, timed_storage):
        module.get_dht_time = now


def import_hivemind() -> None:
    """Import hivemind (1-3 s, with torch) without its warnings, log handler, renamed log levels and storing fault."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import hivemind.dht.node
        import hivemind.p2p  # noqa: F401
        from hivemind.dht.storage import DictionaryDHTValue
        from hivemind.utils.logging import use_hivemind_log_handler
    DictionaryDHTValue.store = _store_later
    use_hivemind_log_handler("nowhere")
    logging.getLogger("hivemind").setLevel(logging.ERROR)
    logging.addLevelName(logging.WARNING, "WARNING")


def _signed(record: Any, value: bytes) -> bytes:
    """What a signature covers: the place, the owner's name and the expiry besides the value."""
    place = struct.pack(">20sdH", record.key, record.expiration_time, len(record.subkey))
    return _DOMAIN + place + bytes(record.subkey) + value
