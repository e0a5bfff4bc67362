"""The first contact, where a stranger's words are dialled: what can't be costs a reason, not the start."""

import asyncio
from collections.abc import Sequence

import pytest

from dugnad.dht.bootstrap import Address, join
from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.transport import BootstrapError

pytestmark = pytest.mark.net

ME, GOOD, BAD = (Identity.from_seed(bytes([k]) * 32).peer_id for k in (1, 2, 3))


async def connect(peer: PeerId, addresses: Sequence[str]) -> None:
    assert peer == GOOD


@pytest.mark.parametrize("place", ["/dns4/a..b/tcp/1", f"/dns4/{'a' * 64}/tcp/1", "/ip4/127.0.0.1/tcp/99999"])
async def test_an_address_that_cannot_be_is_a_failure_beside_the_others(place: str) -> None:
    async with await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        contacts = await join([f"/ip4/{host}/tcp/{port}/p2p/{GOOD}", f"{place}/p2p/{BAD}"], ME, connect)
    assert contacts.peers == (GOOD,)
    ((address, reason),) = contacts.failures
    assert address.startswith(place)
    assert reason.startswith("not the address of a peer")


@pytest.mark.parametrize("place", [("a..b", 1), ("a\0b", 1), ("127.0.0.1", 99999)])
async def test_what_cannot_be_looked_up_leads_nowhere(place: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever checks addresses may overlook one."""
    monkeypatch.setattr(Address, "parse", lambda text: Address(text, *place, "", BAD))
    with pytest.raises(BootstrapError, match="no way there"):
        await join(["/any"], ME, connect)
