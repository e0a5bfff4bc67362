"""Commands with which people look at their own peer: what is wrong, why it is slow, who else is there, its key."""

import asyncio
import contextlib
import ipaddress
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dugnad.peer.told import UsageError, told_errors

if TYPE_CHECKING:
    from dugnad.peer.network import Network, Said

Dir = Annotated[Path | None, typer.Option("--dir", help="The role's folder.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Force = Annotated[bool, typer.Option("--force", help="Though there is a key; the old one is kept beside it.")]
Announce = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Where everyone reaches this peer, if you know: as with a router that was told to pass a port on. "
        '"": nowhere in particular any more.',
        show_default=False,
    ),
]

identity = typer.Typer(
    name="identity",
    help="This peer's key: who it is to the run. Without --dir: the only role's in your data directory.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def register(app: typer.Typer) -> None:
    """Add these commands to the `dugnad` command."""
    for command in (doctor, why, peers):
        app.command()(command)
    app.add_typer(identity)


def doctor(
    invite: Annotated[
        str | None, typer.Argument(help="An invite: looks at the network too.", show_default=False)
    ] = None,
    directory: Dir = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on, as you would in joining.", show_default=False)
    ] = None,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes any free one.", min=0, max=65535)] = 0,
    bulk_port: Annotated[int, typer.Option(help="Port for direct connections.", min=0, max=65535)] = 0,
    announce: Announce = None,
    metrics_port: Annotated[int, typer.Option(help="Port for /metrics and /status.", min=0, max=65535)] = 0,
    threads: Annotated[int, typer.Option(help="Cores to train with; 0: half of them.", min=0, max=1024)] = 0,
    as_json: AsJson = False,
) -> None:
    """Look for whatever would keep this machine from taking part, or make it slow; status 1 if something does.

    With an invite it joins the network for some seconds, as a stranger who leaves no trace. Takes less than 20 s. "-"
    stands before what was not measured, in JSON "skipped". A port that your router passes on is tried as in joining:
    dugnad doctor INVITE --port 4001 --announce HOST:4001
    """
    with told_errors():
        from dugnad.dht.invite import parse_invite

        known = None if invite is None else parse_invite(invite)
        from dugnad.peer import doctor as judging
        from dugnad.peer import measure
        from dugnad.peer.folder import Folder, data_folder, volunteer_folder
        from dugnad.peer.network import Network, host_for

        cores = threads or default_threads()
        base = directory or data_folder()
        folder = Folder(base) if directory or known is None else volunteer_folder(known.name, known.run)
        network = Network.of(
            said_of(host, port, bulk_port or None, announce),
            None,
            host="127.0.0.1" if known is None else host_for(known),
            metrics_port=metrics_port,
        )
        machine = measure.machine(base, threads=cores, look_for_gpu=True)
        ports = measure.ports(network.host, ports_of(network, port, bulk_port))
        free, bulk = (0 if one.fault else one.port for one in ports[:2])
        network = replace(network, port=free, bulk_port=bulk)
        facts = asyncio.run(measure.everything(known, machine, ports, network, folder))
        found = judging.checks(facts)
        said = judging.as_json(found, facts.network)
        print(json.dumps(said) if as_json else "\n".join(map(str, found)))
        raise typer.Exit(0 if said["ok"] else 1)


def default_threads() -> int:
    """Half of the cores: the other half is for people."""
    return max(1, (os.cpu_count() or 1) // 2)


def said_of(host: str | None, port: int | None, bulk_port: int | None, announce: str | None) -> "Said":
    """What these options say of where a role listens; None: nothing. Raises UsageError."""
    from dugnad.dht.multiaddrs import place_of
    from dugnad.peer.network import Said

    try:
        ipaddress.ip_address(host or "127.0.0.1")
    except ValueError:
        raise UsageError(
            f"--host {host}: not an IP address. Name one of this machine's, or 0.0.0.0 for all of them"
        ) from None
    try:
        outside = place_of(announce) if announce else announce
    except ValueError as error:
        raise UsageError(f"--announce {error}") from error
    return Said(host=host, port=port, bulk_port=bulk_port, announce=outside)


def ports_of(network: "Network", port: int | None, bulk_port: int | None) -> tuple[tuple[str, int], ...]:
    """(option, port) of each that was asked for by these options; 0 for any."""
    bulk = network.bulk.port if port or bulk_port else 0
    return ("--port", port or 0), ("--bulk-port", bulk), ("--metrics-port", network.metrics_port)


def check_lived_in(directory: Path | None) -> None:
    """Raises AskError, with how it ended, where a role lived in the folder that is meant and lives there no more."""
    from dugnad.peer.ask import AskError

    if said := _ended(directory):
        raise AskError(f"no role is running here. {said}")


def _ended(directory: Path | None) -> str:
    from dugnad.peer import ended, folder

    if directory is not None:
        return ended.told(folder.Folder(directory))
    return "" if folder.inhabited_folders() else ended.told_of_only_one()


def why(directory: Dir = None, as_json: AsJson = False) -> None:
    """Say why the peer in --dir is idle, slow, relayed or refused, and what would help; or how it ended."""
    with told_errors():
        from dugnad.peer import ask
        from dugnad.peer.why import words

        ended = _ended(directory)
        said = [ended] if ended else words(ask.status(directory))
        print(json.dumps(said) if as_json else "\n".join(said))


def peers(directory: Dir = None, as_json: AsJson = False) -> None:
    """List the other members of the run, as the peer in --dir sees them: what they do, and how they are reached."""
    with told_errors():
        from dugnad.peer import ask, members

        found = members.rows(ask.status(directory))
        print(json.dumps(found) if as_json else members.text(found))


@identity.command()
def show(directory: Dir = None) -> None:
    """Print this peer's key, which an organizer needs to let it in, and its nickname."""
    with told_errors():
        from dugnad.peer import keys

        print(keys.shown(keys.folder_of(directory)))


@identity.command()
def new(directory: Dir = None, force: Force = False) -> None:
    """Make a new key: this peer is someone else from its next start on."""
    with told_errors():
        from dugnad.peer import keys

        print(keys.renew(keys.folder_of(directory), force=force))


@identity.command()
def export(
    file: Annotated[Path, typer.Argument(help="The file to write; it must not be there yet.")], directory: Dir = None
) -> None:
    """Copy this peer's key to FILE: a backup, or to move to another machine."""
    with told_errors():
        from dugnad.peer import keys

        print(keys.export(keys.folder_of(directory), file))


@identity.command("import")
def bring(
    file: Annotated[Path, typer.Argument(help="A file that `dugnad identity export` wrote.")],
    directory: Dir = None,
    force: Force = False,
) -> None:
    """Make the key in FILE this peer's own."""
    with told_errors():
        from dugnad.dht.identity import Identity
        from dugnad.peer import keys

        with contextlib.suppress(FileNotFoundError):  # which is told as what it is
            Identity.load(file, otherwise="Name a file that dugnad identity export wrote.")
        print(keys.bring(keys.folder_of(directory), file, force=force))
