"""Where a role listens that was not told everything anew: as it was told before, on the ports that it took then."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from dugnad.dht.identity import Identity
from dugnad.dht.invite import Invite, encode_invite
from dugnad.peer import cli, place, roles
from dugnad.peer.folder import Folder
from dugnad.peer.network import Listened, Network, Said

PEER = Identity.from_seed(b"p" * 32).peer_id
ADDRESS = f"/ip4/203.0.113.7/tcp/4731/p2p/{PEER}"
INVITE = encode_invite(Invite(b"r" * 32, b"o" * 32, (ADDRESS,), "tiny"))
CHOSEN = Said(host="0.0.0.0", port=4731, announce="/dns/example.org/tcp/4731")


def listened(said: Said, port: int, bulk_port: int) -> Listened:
    return Listened(said=said, port=port, bulk_port=bulk_port, addresses=(ADDRESS,))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path / "role")
    folder.create()
    return folder


def where(network: Network) -> tuple[str, int, str | None]:
    return network.listen, network.bulk.port, network.announce


CASES: dict[str, tuple[Said, Listened | None, tuple[str, int, str | None]]] = {
    "nothing was ever said": (Said(), None, ("/ip4/127.0.0.1/tcp/0", 0, None)),
    "all is as it was": (
        Said(), listened(CHOSEN, 4731, 4732), ("/ip4/0.0.0.0/tcp/4731", 4732, "/dns/example.org/tcp/4731"),
    ),
    "ports that nobody chose stay too": (
        Said(), listened(Said(), 40123, 50321), ("/ip4/127.0.0.1/tcp/40123", 50321, None),
    ),
    "what is said now counts, and the rest stays": (
        Said(host="203.0.113.7"), listened(CHOSEN, 4731, 4732),
        ("/ip4/203.0.113.7/tcp/4731", 4732, "/dns/example.org/tcp/4731"),
    ),
    "direct connections follow another port": (
        Said(port=5000, announce=""), listened(CHOSEN, 4731, 4732), ("/ip4/0.0.0.0/tcp/5000", 5001, None),
    ),
    "but not where they have one of their own": (
        Said(port=5000), listened(Said(port=4731, bulk_port=6000), 4731, 6000), ("/ip4/127.0.0.1/tcp/5000", 6000, None),
    ),
    "any port can be asked for again": (
        Said(port=0), listened(Said(port=4731), 4731, 4732), ("/ip4/127.0.0.1/tcp/0", 0, None),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("said", "last", "expected"), CASES.values(), ids=CASES)
def test_a_role_listens_where_it_is_told_and_else_where_it_did(
    said: Said, last: Listened | None, expected: tuple[str, int, str | None]
) -> None:
    assert where(Network.of(said, last, host="127.0.0.1")) == expected


def test_what_was_said_once_holds_until_something_else_is() -> None:
    known = Network.of(Said(port=5000), listened(CHOSEN, 4731, 4732), host="127.0.0.1").said
    assert known == Said(host="0.0.0.0", port=5000, announce="/dns/example.org/tcp/4731")


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which another program listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_that_nobody_chose_is_given_up_when_it_is_taken(taken: int) -> None:
    network = Network.of(Said(), listened(Said(), taken, taken), host="127.0.0.1")
    assert where(network.moved(stays=False)) == ("/ip4/127.0.0.1/tcp/0", 0, None)
    assert where(network.moved(stays=True)) == (f"/ip4/127.0.0.1/tcp/{taken}", 0, None)


def test_a_port_that_was_chosen_is_never_given_up(taken: int) -> None:
    said = Said(port=taken, bulk_port=taken)
    network = Network.of(Said(), listened(said, taken, taken), host="127.0.0.1")
    assert network.moved(stays=False) == network


@pytest.mark.parametrize("command", [["launch", "--resume"], ["join", INVITE, "--dir"]])
def test_who_goes_on_listens_as_the_last_time(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    given: list[Network] = []

    def begin(known: object, *rest: object, **_: object) -> None:
        given.extend(one for one in rest if isinstance(one, Network))

    monkeypatch.setattr(roles, "resume", begin)
    monkeypatch.setattr(roles, "join", begin)
    monkeypatch.setattr(cli, "_run", lambda begin, *_: begin())
    folder.keep_listened(listened(CHOSEN, 4731, 4732))
    run = CliRunner().invoke
    assert run(cli.app, [*command, str(folder.path)]).exit_code == 0
    assert run(cli.app, [*command, str(folder.path), "--announce", "203.0.113.9:4731"]).exit_code == 0
    assert [where(network) for network in given] == [
        ("/ip4/0.0.0.0/tcp/4731", 4732, "/dns/example.org/tcp/4731"),
        ("/ip4/0.0.0.0/tcp/4731", 4732, "/ip4/203.0.113.9/tcp/4731"),
    ]


def peer_at(*addresses: str, others: tuple[str, ...] = ()) -> Any:
    return SimpleNamespace(shown=lambda: addresses, swarm=SimpleNamespace(addresses=lambda: set(others)))


async def remembered(there: Any, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "_REMEMBER_S", 0.0)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.05):
            await place.keep_remembering(there, folder)


async def test_the_folder_learns_when_a_role_is_reached_by_other_addresses(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.keep_listened(listened(CHOSEN, 4731, 4732))
    await remembered(peer_at("/ip4/198.51.100.9/tcp/1"), folder, monkeypatch)
    last = folder.listened()
    assert last is not None
    assert (last.addresses, last.said, last.bulk_port) == (("/ip4/198.51.100.9/tcp/1",), CHOSEN, 4732)


async def test_a_full_disk_is_told_once_and_ends_nothing(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried, once = list[object](), f"{folder.path}: addresses can't be kept for the next start: No space left on device"

    def full(addresses: object) -> None:
        tried.append(addresses)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "remember", full)
    await remembered(peer_at(others=(ADDRESS,)), folder, monkeypatch)
    assert len(tried) > 1
    assert [record.message for record in caplog.records] == [once]
