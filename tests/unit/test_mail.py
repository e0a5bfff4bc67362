import asyncio
from collections.abc import Awaitable, Callable

import pytest

from dugnad.coordinator import mail
from dugnad.coordinator.mail import OUTBOX_MESSAGES, Mail
from dugnad.dht.identity import PeerId
from tests.unit.memory_transport import Net, network

ME, ANN, BOB = PeerId("me"), PeerId("ann"), PeerId("bob")
CHANNEL = "dugnad/round/1"
SHORT_S = 0.05
LONG_S = 10.0


async def inbox(net: Net, peer: PeerId) -> list[bytes]:
    """What `peer` gets, from now on, as it gets it."""
    got: list[bytes] = []

    async def take(sender: PeerId, raw: bytes) -> bytes:
        assert sender == ME
        got.append(raw)
        await asyncio.sleep(0)
        return b""

    await net.join(peer).serve(CHANNEL, take)
    return got


async def deaf(net: Net, peer: PeerId) -> asyncio.Event:
    """Have `peer` answer nothing; the event says that it was asked."""
    asked = asyncio.Event()

    async def wait(sender: PeerId, raw: bytes) -> bytes:
        asked.set()
        await asyncio.Event().wait()
        return b""

    await net.join(peer).serve(CHANNEL, wait)
    return asked


class _Over(Exception):
    """The owner of the mail is done."""


def nobody_fails(peer: PeerId, why: str) -> None:
    pytest.fail(f"{peer} counts as unreachable: {why}")


async def sending(
    use: Callable[[Net, Mail], Awaitable[None]], *, unreachable: Callable[[PeerId, str], None] = nobody_fails
) -> None:
    """Run `use` with a mail of `ME`, and end everything, as an owner does that is done."""
    async with network() as net:
        try:
            async with asyncio.TaskGroup() as tasks:
                await use(net, Mail(net.join(ME), CHANNEL, tasks, unreachable=unreachable))
                raise _Over
        except* _Over:
            pass


async def test_messages_to_one_peer_arrive_in_the_order_they_were_posted() -> None:
    numbers = [bytes([k]) for k in range(50)]

    async def use(net: Net, post: Mail) -> None:
        got = await inbox(net, ANN)
        for raw in numbers[:20]:
            post.post(ANN, raw)
        await asyncio.sleep(0)  # some are on their way now
        for raw in numbers[20:]:
            post.post(ANN, raw)
        await post.flush(LONG_S)
        assert got == numbers
        post.post(ANN, b"later")
        await post.flush(LONG_S)
        assert got == [*numbers, b"later"]

    await sending(use)


async def test_a_peer_that_does_not_answer_delays_nobody_else() -> None:
    async def use(net: Net, post: Mail) -> None:
        asked, got = await deaf(net, BOB), await inbox(net, ANN)
        for k in range(10):
            post.post(BOB, bytes([k]))
            post.post(ANN, bytes([k]))
        await asked.wait()
        await post.flush(SHORT_S)
        assert got == [bytes([k]) for k in range(10)]

    await sending(use)


async def test_a_peer_that_does_not_answer_in_time_counts_as_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail, "ANSWER_S", SHORT_S)
    lost: list[PeerId] = []

    async def use(net: Net, post: Mail) -> None:
        await deaf(net, BOB)
        post.post(BOB, b"hello")
        await post.flush(LONG_S)
        assert lost == [BOB]

    await sending(use, unreachable=lambda peer, _: lost.append(peer))


async def test_an_unreachable_peer_is_reported_once_for_all_that_waited() -> None:
    lost: list[tuple[PeerId, str]] = []

    async def use(net: Net, post: Mail) -> None:
        for k in range(10):
            post.post(BOB, bytes([k]))
        await post.flush(LONG_S)
        assert lost == [(BOB, f"{BOB}: nobody knows an address of it")]
        got = await inbox(net, BOB)
        post.post(BOB, b"are you back?")
        await post.flush(LONG_S)
        assert got == [b"are you back?"]
        assert len(lost) == 1

    await sending(use, unreachable=lambda peer, why: lost.append((peer, why)))


async def test_a_peer_that_refuses_a_message_is_reported_and_the_rest_dropped() -> None:
    lost: list[PeerId] = []
    got: list[bytes] = []

    async def refuse(sender: PeerId, raw: bytes) -> bytes:
        got.append(raw)
        raise ValueError("not like this")

    async def use(net: Net, post: Mail) -> None:
        await net.join(BOB).serve(CHANNEL, refuse)
        post.post(BOB, b"one")
        post.post(BOB, b"two")
        await post.flush(LONG_S)
        assert (lost, got) == ([BOB], [b"one"])

    await sending(use, unreachable=lambda peer, _: lost.append(peer))


async def test_what_is_posted_to_a_peer_on_hearing_that_it_is_unreachable_is_sent_in_order() -> None:
    async with network() as net, asyncio.TaskGroup() as tasks:
        back = asyncio.Event()
        got: list[bytes] = []

        async def take(sender: PeerId, raw: bytes) -> bytes:
            got.append(raw)
            if len(got) == 3:
                back.set()
            return b""

        bob = net.join(BOB)

        def again(peer: PeerId, why: str) -> None:
            tasks.create_task(bob.serve(CHANNEL, take))
            for k in range(3):
                post.post(peer, bytes([k]))

        post = Mail(net.join(ME), CHANNEL, tasks, unreachable=again)
        post.post(BOB, b"lost")
        await back.wait()
        assert got == [b"\0", b"\1", b"\2"]


async def test_the_oldest_message_goes_when_too_many_wait_for_one_peer() -> None:
    async def use(net: Net, post: Mail) -> None:
        got = await inbox(net, ANN)
        numbers = [k.to_bytes(2) for k in range(OUTBOX_MESSAGES + 3)]
        for raw in numbers:
            post.post(ANN, raw)
        await post.flush(LONG_S)
        assert got == numbers[3:]

    await sending(use)


async def test_flush_gives_up_when_its_time_is_over_and_returns_at_once_with_nothing_to_send() -> None:
    async def use(net: Net, post: Mail) -> None:
        await post.flush(LONG_S)
        asked = await deaf(net, BOB)
        post.post(BOB, b"hello")
        await asked.wait()
        async with asyncio.timeout(LONG_S / 2):
            await post.flush(SHORT_S)

    await sending(use)


async def test_an_owner_that_ends_drops_what_is_still_waiting_without_another_error() -> None:
    asked: list[bytes] = []

    async def wait(sender: PeerId, raw: bytes) -> bytes:
        asked.append(raw)
        await asyncio.Event().wait()
        return b""

    async def use(net: Net, post: Mail) -> None:
        await net.join(BOB).serve(CHANNEL, wait)
        for k in range(3):
            post.post(BOB, bytes([k]))
        await post.flush(SHORT_S)

    async with asyncio.timeout(LONG_S / 2):
        await sending(use)
    assert asked == [b"\0"]
