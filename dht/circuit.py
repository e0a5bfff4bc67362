"""Circuit relay v2 as far as we speak it: to ask a relay for a place at it, and to read what it grants.

Two protobuf messages, each behind its length as a varint: RESERVE there, STATUS back (HopMessage of libp2p's
circuit-v2 specification). Whoever holds a place can be dialled at RELAY'S ADDRESS/p2p/RELAY/p2p-circuit/p2p/PEER as
long as it stays connected to the relay; the daemon accepts such connections by itself.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from dugnad.dht import control
from dugnad.dht.daemon import Daemon, DaemonRefused
from dugnad.dht.identity import PeerId
from dugnad.dht.transport import NetworkDown, Unreachable
from dugnad.dht.wire import WireError

HOP = "/libp2p/circuit/relay/0.2.0/hop"
ANSWER_BYTES = 8192
ANSWER_S = 5.0
RESERVE = b"\x02\x08\x00"  # length 2; field 1, the type: RESERVE
_STATUS, _OK = 2, 100
_TYPE, _RESERVATION, _LIMIT, _STATUS_CODE = 1, 3, 4, 5
_LIMIT_DURATION, _LIMIT_DATA = 1, 2
_WORDS = {200: "it is full", 201: "it is at its limits", 202: "it does not relay for us", 203: "it could not connect"}


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a relay grants: how much each connection through it may carry."""

    data_bytes: int
    """In each direction; 0: without a limit."""
    duration_s: int
    """0: without a limit."""

    @property
    def is_small(self) -> bool:
        """Whether it is what libp2p grants by default, 128 KiB in 2 min: good to find each other, and no more."""
        return 0 < self.data_bytes < 2**24 or 0 < self.duration_s < 600


class RelayRefused(Exception):
    """A relay has no place for us; says why."""


async def reserve(daemon: Daemon, relay: PeerId) -> Reservation:
    """Ask for a place at `relay`, or to keep it, within 5 s.

    Raises RelayRefused, Unreachable, NetworkDown, or WireError for an answer that is none.
    """
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await control.open_stream(daemon, relay, HOP)
            try:
                writer.write(RESERVE)
                return decode_status(await read_delimited(reader))
            finally:
                writer.close()
    except TimeoutError:
        raise Unreachable(relay, f"no answer in {ANSWER_S:.0f} s") from None
    except (DaemonRefused, EOFError) as error:
        raise Unreachable(relay, f"it does not answer as a relay: {error}") from error
    except OSError as error:
        raise NetworkDown(f"the network daemon broke off: {error}") from error


def decode_status(message: bytes) -> Reservation:
    """What an answer to RESERVE grants. Raises RelayRefused, or WireError for anything that is no such answer."""
    fields = dict(_fields(message))
    if fields.get(_TYPE) != _STATUS:
        raise WireError("malformed", "not the answer of a relay")
    status = fields.get(_STATUS_CODE)
    if status != _OK:
        raise RelayRefused(_WORDS.get(status, f"status {status}") if isinstance(status, int) else "no status")
    if not isinstance(fields.get(_RESERVATION), bytes):
        raise WireError("malformed", "a relay that agrees and gives no place")
    limit = fields.get(_LIMIT, b"")
    limits = dict(_fields(limit)) if isinstance(limit, bytes) else {}
    data, duration = limits.get(_LIMIT_DATA, 0), limits.get(_LIMIT_DURATION, 0)
    if not isinstance(data, int) or not isinstance(duration, int):
        raise WireError("malformed", "the limits of a relay are no numbers")
    return Reservation(data, duration)


async def read_delimited(reader: asyncio.StreamReader) -> bytes:
    """A message behind its length. Raises EOFError, OSError, or WireError for one above the cap."""
    length, shift = 0, 0
    while True:
        (byte,) = await reader.readexactly(1)
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
        if shift > 21:
            raise WireError("too large", "the length of a relay's answer")
    if length > ANSWER_BYTES:
        raise WireError("too large", f"a relay's answer of {length} bytes, at most {ANSWER_BYTES}")
    return await reader.readexactly(length)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protobuf message: integers and bytes. Raises WireError."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, sort = tag >> 3, tag & 7
        value: int | bytes
        if sort == 0:
            value, at = _varint(message, at)
        elif sort == 2:
            length, at = _varint(message, at)
            value, at = message[at : at + length], at + length
        else:
            raise WireError("malformed", f"a field of sort {sort}")
        if number == 0 or at > len(message):
            raise WireError("malformed", "a field that ends early, or has no number")
        yield number, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """(the number that begins at `at`, where it ends). Raises WireError."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(message):
            raise WireError("malformed", "a number that ends early")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (2**64 - 1), at
    raise WireError("malformed", "a number of more than 64 bits")
