"""How a role finds its run, whoever else says that he is there."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from dugnad.configs.recipe import encode, load
from dugnad.coordinator import sync
from dugnad.coordinator.chain import Chain
from dugnad.coordinator.messages import Genesis, Welcome
from dugnad.coordinator.sync import CHANNEL, CODEC, SyncError
from dugnad.dht.budget import GIVE_MBIT, Budget
from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.invite import Invite, encode_invite
from dugnad.dht.transport import NetworkDown
from dugnad.dht.wire import seal
from dugnad.peer import cli, roles
from dugnad.peer import place as places
from dugnad.peer.folder import Folder, FolderError
from dugnad.peer.network import Network
from tests.unit.memory_transport import Net, network

ME, FOUNDER, ORGANIZER, OTHER = (Identity.from_seed(bytes([k]) * 32) for k in range(1, 5))
GENESIS = Genesis(b"{}", ORGANIZER.peer_id, FOUNDER.peer_id, bytes(8), bytes(32))
RUN = GENESIS.run
WELCOME = Welcome(GENESIS)
INVITE = Invite(RUN, ORGANIZER.public_key, (f"/ip4/127.0.0.1/tcp/1/p2p/{FOUNDER.peer_id}",), "tiny")
STRANGERS = [Identity.from_seed(bytes([k]) * 32).peer_id for k in range(100, 100 + 5 * sync.ASKED_AT_ONCE)]


async def never(sender: PeerId, raw: bytes) -> bytes:
    await asyncio.Event().wait()
    return b""


async def join(net: Net, identity: Identity) -> None:
    async def answer(sender: PeerId, raw: bytes) -> bytes:
        return seal(identity, RUN, CODEC, WELCOME)

    await net.join(identity.peer_id).serve(CHANNEL, answer)


def place(net: Net, members: dict[PeerId, str]) -> Any:
    async def look_around() -> dict[PeerId, str]:
        return members

    return SimpleNamespace(host=net.join(ME.peer_id), identity=ME, swarm=SimpleNamespace(look_around=look_around))


async def mute_strangers(net: Net) -> dict[PeerId, str]:
    for stranger in STRANGERS:
        await net.join(stranger).serve(CHANNEL, never)
    return dict.fromkeys(STRANGERS, "coordinator")


async def test_who_is_invited_asks_those_of_the_invite_before_any_stranger_who_says_that_he_leads() -> None:
    async with network() as net, asyncio.timeout(5):
        members = await mute_strangers(net)
        await join(net, FOUNDER)
        assert await roles._welcome(place(net, members), INVITE) == WELCOME


async def test_where_no_record_counts_the_invite_is_enough() -> None:
    async with network() as net, asyncio.timeout(5):
        await join(net, FOUNDER)
        assert await roles._welcome(place(net, {}), INVITE) == WELCOME


async def test_where_those_of_the_invite_are_gone_the_members_are_asked() -> None:
    async with network() as net, asyncio.timeout(5):
        await join(net, OTHER)
        assert await roles._welcome(place(net, {OTHER.peer_id: "volunteer"}), INVITE) == WELCOME


@pytest.mark.parametrize("command", [["launch", "tiny-books"], ["join", encode_invite(INVITE)]])
def test_what_a_volunteer_will_give_reaches_its_network(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    given: list[Network] = []

    def begin(known: object, folder: object, network: Network, **_: object) -> None:
        given.append(network)

    monkeypatch.setattr(roles, command[0], begin)
    monkeypatch.setattr(cli, "_run", lambda begin, *_: begin())
    run = CliRunner().invoke
    assert run(cli.app, [*command, "--give-mbit", "7.5"]).exit_code == 0
    assert run(cli.app, command).exit_code == 0
    assert [network.give_mbit for network in given] == [7.5, GIVE_MBIT]
    assert run(cli.app, [*command, "--give-mbit", "0.9"]).exit_code == 2
    assert Budget.of_mbit(1).at_once == 1, "the least that the commands take is no error"


async def test_looking_for_the_run_ends_in_time_however_many_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roles, "WELCOME_S", 0.2)
    async with network() as net, asyncio.timeout(5):
        members = await mute_strangers(net)
        with pytest.raises(SyncError, match=r"nobody could say what this run is: .*nobody knows an address of it"):
            await roles._welcome(place(net, members), INVITE)


@pytest.mark.parametrize(
    ("addresses", "port"),
    [
        (["/ip4/8.8.8.8/tcp/55/p2p/me", "/ip4/192.168.1.5/tcp/44/p2p/me"], 44),
        (["/ip4/192.168.1.5/tcp/44/p2p/me", "/ip4/192.168.1.9/tcp/66/p2p/relay/p2p-circuit/p2p/me"], 44),
    ],
)
def test_the_port_is_that_of_our_own_machine(addresses: list[str], port: int) -> None:
    host: Any = SimpleNamespace(addresses=lambda: tuple(addresses))
    assert places.tcp_port(host) == port


def test_a_daemon_that_names_no_address_is_told_as_that() -> None:
    host: Any = SimpleNamespace(addresses=lambda: ())
    with pytest.raises(NetworkDown, match="names no address"):
        places.tcp_port(host)


# -- going on with a run


def led(folder: Folder, *, key: bool = True) -> Genesis:
    """A run that was launched in this folder, by whoever has its key."""
    genesis = msgspec.structs.replace(GENESIS, organizer=folder.organizer().peer_id)
    with contextlib.closing(Chain(folder.chain)) as chain:
        chain.found(genesis)
    if not key:
        (folder.path / "run.key").unlink()
    return genesis


def empty(folder: Folder) -> None:
    folder.create()


def with_a_key_alone(folder: Folder) -> None:
    folder.organizer()


def launched(folder: Folder) -> None:
    led(folder)


def without_its_key(folder: Folder) -> None:
    led(folder, key=False)


def killed_while_launching(folder: Folder) -> None:
    folder.organizer()
    Chain(folder.chain).close()


REFUSED: dict[str, tuple[Callable[[Folder], None], Invite | None, str]] = {
    "nothing there": (empty, None, "there is no run.key here"),
    "nothing there but an invite": (empty, INVITE, "there is no run.key here"),
    "a volunteer's folder": (without_its_key, None, "there is no run.key here"),
    "a key alone, and nobody to ask": (with_a_key_alone, None, "add --invite with an invite"),
    "a launch that was killed, and nobody to ask": (killed_while_launching, None, "add --invite with an invite"),
    "an invite to another run": (launched, INVITE, "E304 .* the invite to run"),
}


@pytest.mark.parametrize(("make_ready", "invite", "why"), REFUSED.values(), ids=REFUSED)
async def test_a_folder_that_no_coordinator_can_go_on_from_is_refused_in_words(
    tmp_path: Path, make_ready: Callable[[Folder], None], invite: Invite | None, why: str
) -> None:
    folder = Folder(tmp_path / "role")
    folder.create()
    make_ready(folder)
    with pytest.raises(FolderError, match=why):
        await roles.resume(folder, Network(), invite=invite, told=lambda *_: None)


@contextlib.asynccontextmanager
async def in_memory(net: Net) -> AsyncIterator[None]:
    """Have roles find their place in `net`, as ME."""
    with pytest.MonkeyPatch.context() as patch:

        @contextlib.asynccontextmanager
        async def placed(*_: object, may_wait: bool) -> AsyncIterator[Any]:
            yield place(net, {})

        patch.setattr(roles, "placed", placed)
        yield


async def test_a_key_alone_goes_on_with_the_run_of_the_invite_and_only_with_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, foreign = Folder(tmp_path / "own"), Folder(tmp_path / "foreign")
    for folder in (own, foreign):
        folder.create()
        folder.organizer()
    genesis = msgspec.structs.replace(GENESIS, recipe=encode(load("tiny-books")), organizer=own.organizer().peer_id)
    invite = Invite(genesis.run, own.organizer().public_key, INVITE.addresses, "tiny")
    went_on: list[tuple[Genesis, Path]] = []

    async def coordinate(genesis: Genesis, numerics: object, where: object, folder: Folder, *_: object) -> None:
        went_on.append((genesis, folder.path))

    async def answer(sender: PeerId, raw: bytes) -> bytes:
        return seal(FOUNDER, genesis.run, CODEC, Welcome(genesis))

    monkeypatch.setattr(roles, "_coordinate", coordinate)
    async with network() as net, asyncio.timeout(10), in_memory(net):
        await net.join(FOUNDER.peer_id).serve(CHANNEL, answer)
        await roles.resume(own, Network(), invite=invite, told=lambda *_: None)
        with pytest.raises(FolderError, match=r"run\.key is not the key of this run"):
            await roles.resume(foreign, Network(), invite=invite, told=lambda *_: None)
    assert went_on == [(genesis, own.path)]
