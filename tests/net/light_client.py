"""A peer of another make: py-libp2p, msgpack and `cryptography`, and not a line of ours.

    python light_client.py RELAY_MULTIADDR TARGET_PEER_ID RUN_HEX RECORDS

Dials the relay (TCP, noise, yamux), goes through it to the target, says hello, and asks for its records by gossip until
it has so many. Prints one line of JSON: {"hello": [...], "records": [[kind, owner, seq, body], ...]}. What it does with
bytes is what the docstrings of dht/hello.py, host.py, wire.py, gossip.py and records.py say of them.
"""

import json
import struct
import sys

import msgpack
import multiaddr
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from libp2p import create_yamux_muxer_option, new_host
from libp2p.abc import IHost, INetStream
from libp2p.connection_types import ConnectionType
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, PeerId, Status
from libp2p.relay.circuit_v2.utils import read_delimited_msg, write_delimited_msg
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise

HOP = TProtocol("/libp2p/circuit/relay/0.2.0/hop")
HELLO, GOSSIP = TProtocol("dugnad/hello"), TProtocol("dugnad/gossip/1")
PROTOCOL, NUM_BUCKETS, HASH_BYTES, TAG_BYTES = 1, 256, 8, 16
SEED = b"light client of another make".ljust(32, b".")
PATIENCE_S = 15.0


class Records:
    """What the target has told, verified; and what is to be said next."""

    def __init__(self, run: bytes) -> None:
        self.run = run
        self.key = Ed25519PrivateKey.from_private_bytes(SEED)
        self.found: dict[tuple[str, str], list[object]] = {}
        self.to_say: list[bytes] = [self.seal("buckets", [bytes(NUM_BUCKETS * HASH_BYTES)])]
        """First: I hold nothing; what do you hold?"""

    def seal(self, tag: str, body: list[object]) -> bytes:
        """A signed message of gossip."""
        packed = msgpack.packb(body)
        signature = self.key.sign(b"dugnad/message/1" + self.run + bytes([len(tag)]) + tag.encode() + packed)
        me = self.key.public_key().public_bytes_raw()
        fields = [msgpack.packb(field) for field in (PROTOCOL, self.run, tag, me)]
        return bytes(b"\x96" + b"".join(fields) + packed + msgpack.packb(signature))

    def take(self, raw: bytes) -> None:
        """A message from the target: want what it names, keep what it gives."""
        _, run, tag, sender, body, signature = msgpack.unpackb(raw)
        assert run == self.run
        packed = msgpack.packb(body)
        Ed25519PublicKey.from_public_bytes(sender).verify(
            signature, b"dugnad/message/1" + run + bytes([len(tag)]) + tag.encode() + packed
        )
        if tag == "summary" and body[0]:
            self.to_say.append(self.seal("want", [body[0]]))
        elif tag == "push":
            for record in body[0]:
                self.keep(record)

    def keep(self, raw: bytes) -> None:
        """A record, if its owner signed it for this run."""
        said, signature = raw[:-64], raw[-64:]
        version, run, kind, owner, key, seq, issued_ms, expires_ms, body = msgpack.unpackb(said)
        assert (version, run, key) == (1, self.run, "")
        assert issued_ms < expires_ms
        Ed25519PublicKey.from_public_bytes(owner).verify(signature, b"dugnad/record/1" + said)
        body = [field.hex() if isinstance(field, bytes) else field for field in body]
        self.found[kind, owner.hex()] = [kind, owner.hex(), seq, body]


async def read(stream: INetStream, num_bytes: int) -> bytes:
    """Exactly so many bytes."""
    data = b""
    while len(data) < num_bytes:
        piece = await stream.read(num_bytes - len(data))
        assert piece, "the stream ended early"
        data += piece
    return data


async def ask(host: IHost, peer: ID, protocol: TProtocol, payload: bytes) -> bytes:
    """The reply to a request: u32 length and payload there; a status byte, u32 length and payload back."""
    stream = await host.new_stream(peer, [protocol])
    await stream.write(struct.pack(">I", len(payload)) + payload)
    status, length = struct.unpack(">BI", await read(stream, 5))
    reply = await read(stream, length)
    await stream.close()
    assert status == 0, reply
    return reply


async def through(host: IHost, relay: ID, target: ID) -> None:
    """Connect to the target through the relay: circuit v2, and noise and yamux once more inside."""
    stream = await host.new_stream(relay, [HOP])
    await write_delimited_msg(stream, HopMessage(type=HopMessage.CONNECT, peer=PeerId(id=target.to_bytes())))
    answer = await read_delimited_msg(stream, HopMessage)
    assert answer.status == Status.OK, f"the relay says {answer.status}"
    raw = RawConnection(stream=stream, initiator=True, connection_type=ConnectionType.RELAYED, addresses=[])
    await host.upgrade_outbound_connection(raw, target)


async def main(relay_address: str, target_text: str, run: bytes, num_records: int) -> None:
    """See above."""
    keys = create_new_key_pair(SEED)
    host = new_host(
        key_pair=keys,
        muxer_opt=create_yamux_muxer_option(),
        # said explicitly: left to itself, py-libp2p would also take an unencrypted connection
        sec_opt={NOISE: Noise(keys, noise_privkey=create_noise_key_pair().private_key)},
        listen_addrs=[multiaddr.Multiaddr("/ip4/127.0.0.1/tcp/0")],
    )
    relay, target = info_from_p2p_addr(multiaddr.Multiaddr(relay_address)), ID.from_base58(target_text)
    records = Records(run)

    async def on_gossip(stream: INetStream) -> None:
        (length,) = struct.unpack(">I", await read(stream, 4))
        raw = await read(stream, length)
        await stream.write(struct.pack(">BI", 0, 0))
        records.take(raw)

    async with host.run(listen_addrs=[multiaddr.Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        host.set_stream_handler(GOSSIP, on_gossip)
        with trio.fail_after(PATIENCE_S):
            await host.connect(relay)
            await through(host, relay.peer_id, target)
            hello = msgpack.unpackb(await ask(host, target, HELLO, msgpack.packb([PROTOCOL, "0.0.1", run])))
            while len(records.found) < num_records:
                if records.to_say:
                    await ask(host, target, GOSSIP, records.to_say.pop(0))
                await trio.sleep(0.02)
    found = sorted(records.found.values(), key=lambda record: (record[0], record[1]))
    print(json.dumps({"hello": hello, "records": found}))


if __name__ == "__main__":
    trio.run(main, sys.argv[1], sys.argv[2], bytes.fromhex(sys.argv[3]), int(sys.argv[4]))
