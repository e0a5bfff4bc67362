"""What the libp2p daemon can be asked, in our words: who we are, who is connected, connect there, open a stream.

Its control socket speaks hivemind's protobuf (p2pd_pb2); peers go over it as the bytes of their ids.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import NamedTuple

from dugnad.dht.daemon import Daemon, DaemonRefused
from dugnad.dht.identity import PeerId, peer_id_of, public_key_of
from dugnad.dht.transport import NetworkDown, Unreachable

CONNECT_S = 10.0
_ID_PREFIX = bytes.fromhex("002408011220")  # what a peer id of an ed25519 key has before the key

_P2P = b"\xa5\x03"  # the number of the protocol


class Connection(NamedTuple):
    """A connection of the daemon's: to whom, and the multiaddr at its other end (a circuit if it is relayed)."""

    peer: PeerId
    address: str


async def identify(daemon: Daemon) -> list[str]:
    """The multiaddrs that the daemon takes for its own. Raises NetworkDown."""
    from hivemind.proto import p2pd_pb2
    from hivemind.utils.multiaddr import Multiaddr

    answer = await daemon.ask(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))
    return [str(Multiaddr(raw)) for raw in answer.identify.addrs]


async def connections(daemon: Daemon) -> list[Connection]:
    """All connections to peers of our kind; a peer may have several. Raises NetworkDown."""
    from hivemind.proto import p2pd_pb2
    from hivemind.utils.multiaddr import Multiaddr

    try:
        answer = await daemon.ask(p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS))
    except DaemonRefused as error:
        raise NetworkDown(f"the network daemon does not say to whom it is connected: {error}") from error
    found = [(peer_of_bytes(one.id), str(Multiaddr(raw))) for one in answer.peers for raw in one.addrs]
    return [Connection(peer, address) for peer, address in found if peer is not None]


async def connect(daemon: Daemon, peer: PeerId, addresses: Sequence[str]) -> None:
    """Have the daemon dial `peer` at these multiaddrs, or find it by itself.

    Raises DaemonRefused, NetworkDown, or Unreachable for a name that is no peer's.
    """
    from hivemind.proto import p2pd_pb2

    request = p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT)
    request.connect.peer, request.connect.timeout = bytes_of(peer), int(CONNECT_S)
    for address in addresses:
        with contextlib.suppress(ValueError, Unreachable):  # a stranger's text
            request.connect.addrs.append(_encoded(address.removesuffix(f"/p2p/{peer}")))
    await daemon.ask(request)


async def disconnect(daemon: Daemon, peer: PeerId) -> None:
    """End all connections to `peer`. Raises DaemonRefused or NetworkDown."""
    from hivemind.proto import p2pd_pb2

    request = p2pd_pb2.Request(type=p2pd_pb2.Request.DISCONNECT)
    request.disconnect.peer = bytes_of(peer)
    await daemon.ask(request)


async def keep_connected(daemon: Daemon, peer: PeerId, why: str) -> None:
    """Spare the connections to `peer` when the daemon has too many. Raises DaemonRefused or NetworkDown."""
    from hivemind.proto import p2pd_pb2

    request = p2pd_pb2.Request(type=p2pd_pb2.Request.CONNMANAGER)
    request.connManager.type = p2pd_pb2.ConnManagerRequest.TAG_PEER
    request.connManager.peer, request.connManager.tag, request.connManager.weight = bytes_of(peer), why, 100
    await daemon.ask(request)


async def open_stream(daemon: Daemon, peer: PeerId, protocol: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A stream to `peer`. Raises DaemonRefused, NetworkDown, or Unreachable for a name that is no peer's."""
    from hivemind.proto import p2pd_pb2

    request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN)
    request.streamOpen.peer, request.streamOpen.timeout = bytes_of(peer), int(CONNECT_S)
    request.streamOpen.proto.append(protocol)
    _, reader, writer = await daemon.ask_stream(request)
    return reader, writer


async def take_streams(daemon: Daemon, protocol: str) -> None:
    """Have the daemon hand us others' streams of a protocol, at `daemon.streams`. Raises NetworkDown."""
    from hivemind.proto import p2pd_pb2
    from hivemind.utils.multiaddr import Multiaddr

    request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_HANDLER)
    request.streamHandler.addr = Multiaddr(f"/unix{daemon.streams}").to_bytes()
    request.streamHandler.balanced = False
    request.streamHandler.proto.append(protocol)
    try:
        await daemon.ask(request)
    except DaemonRefused as error:
        raise NetworkDown(f"the network daemon does not serve {protocol}: {error}") from error


async def read_header(reader: asyncio.StreamReader) -> tuple[PeerId | None, str]:
    """Who opened a stream that the daemon hands us, None if it is no peer of our kind, and its protocol."""
    from hivemind.p2p.p2p_daemon_bindings.utils import read_pbmsg_safe
    from hivemind.proto import p2pd_pb2

    info = p2pd_pb2.StreamInfo()
    await read_pbmsg_safe(reader, info)
    return peer_of_bytes(info.peer), info.proto


def _encoded(address: str) -> bytes:
    """A multiaddr in bytes; peers in it as the daemon wants them, where hivemind writes a longer form.

    Raises ValueError or Unreachable for what is none.
    """
    from hivemind.utils.multiaddr import Multiaddr

    place, _, relay = address.partition("/p2p/")
    raw = bytes(Multiaddr(place).to_bytes())
    if relay:
        peer, _, rest = relay.partition("/")
        name = bytes_of(PeerId(peer))
        raw += _P2P + bytes([len(name)]) + name + (Multiaddr(f"/{rest}").to_bytes() if rest else b"")
    return raw


def bytes_of(peer: PeerId) -> bytes:
    """A peer id in libp2p's bytes. Raises Unreachable for a name that is none of ours."""
    try:
        return _ID_PREFIX + public_key_of(peer)
    except ValueError as error:
        raise Unreachable(peer, str(error)) from error


def peer_of_bytes(raw: bytes) -> PeerId | None:
    """The peer id in libp2p's bytes; None for other kinds of keys, which no peer of ours has."""
    known = raw.startswith(_ID_PREFIX) and len(raw) == len(_ID_PREFIX) + 32
    return peer_id_of(raw.removeprefix(_ID_PREFIX)) if known else None
