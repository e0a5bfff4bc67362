"""The `dugnad` command. Heavy imports stand inside the commands, so that `dugnad --help` answers at once."""

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dugnad.peer import cli_organizer, cli_self
from dugnad.peer.cli_self import Announce, ports_of, said_of
from dugnad.peer.told import UsageError, told_errors

if TYPE_CHECKING:
    from dugnad.configs.recipe import Recipe
    from dugnad.peer.ended import Words
    from dugnad.peer.folder import Folder

app = typer.Typer(
    name="dugnad",
    help="Volunteers pretrain one model together over the internet.\n\n"
    "See it work on this machine: dugnad demo\n\n"
    "Try out a large run: dugnad simulate tiny-books --peers 100\n\n"
    "Begin a run: dugnad launch tiny-books\n\n"
    "Take part in one: dugnad join dugnad1:...",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Dir = Annotated[Path | None, typer.Option("--dir", help="Folder for everything this role keeps.", show_default=False)]
Host = Annotated[
    str | None,
    typer.Option(
        help="Address to listen on; 0.0.0.0 lets other machines in. If never given: 127.0.0.1.", show_default=False
    ),
]
JoinHost = Annotated[
    str | None,
    typer.Option(
        help="Address to listen on. If never given: all, or only this machine's own if the invite leads no farther.",
        show_default=False,
    ),
]
BulkPort = Annotated[
    int | None,
    typer.Option(
        help="Port for direct connections; if not given: the one after --port, or any.",
        min=0,
        max=65535,
        show_default=False,
    ),
]
Port = Annotated[
    int | None,
    typer.Option(help="Port to listen on; 0 takes any free one, which it keeps.", min=0, max=65535, show_default=False),
]
MetricsPort = Annotated[int, typer.Option(help="Port for /metrics and /status; 0: any.", min=0, max=65535)]
GiveMbit = Annotated[float, typer.Option(help="Mbit/s to give at most: to joiners, late peers, as a relay.", min=1)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
WithStdin = Annotated[bool, typer.Option("--exit-with-stdin", hidden=True)]
_MANY_FILES = 65536
_DEMO_ROUNDS = 12
"""A quarter of them pass before one more volunteer joins, and some until it has started and taken the model."""


@app.command()
def demo(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or the path of a .toml file.")] = "tiny-books",
    rounds: Annotated[
        int | None, typer.Option(help="End after so many rounds, at least 12.", min=1, show_default=False)
    ] = None,
    peers: Annotated[int, typer.Option(help="Volunteers at the start; one more joins later.", min=2, max=16)] = 3,
    directory: Dir = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what happened to this file.")] = None,
) -> None:
    """Watch a whole run on this machine: it trains, one volunteer joins late, one is killed, and it ends by itself."""
    with told_errors():
        _check_writable(json_file)
        num_rounds = _recipe(recipe, rounds).rounds.num_rounds()
        if num_rounds < _DEMO_ROUNDS:
            raise UsageError(
                f"a demo of {num_rounds} rounds is over before the volunteer that joins late has trained and another "
                f"was killed: take at least {_DEMO_ROUNDS} (--rounds, or a recipe with more)"
            )
        from dugnad.peer.demo import run_demo

        raise typer.Exit(asyncio.run(run_demo(recipe, rounds, peers, directory, json_file)))


@app.command()
def launch(
    recipe: Annotated[str | None, typer.Argument(help="A recipe's name, or a .toml file.", show_default=False)] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.", show_default=False)] = None,
    invite: Annotated[
        str | None,
        typer.Option(help="With --resume, where the folder has nothing but run.key: a peer to start from."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Cut the run to so many rounds.", min=1, show_default=False)
    ] = None,
    directory: Dir = None,
    host: Host = None,
    port: Port = None,
    bulk_port: BulkPort = None,
    announce: Announce = None,
    metrics_port: MetricsPort = 0,
    give_mbit: GiveMbit = 100,
    exit_with_stdin: WithStdin = False,
) -> None:
    """Begin a run, or go on with one, as its organizer: prints the invite that volunteers join with.

    Ctrl+C once: finish the round, write a checkpoint, leave. Twice: leave now. Nothing is lost either way: while no
    coordinator is there the volunteers lead each other, and each of them keeps chain and checkpoints too.

    A run that goes on listens where it did before, so that its invites stay good; options that are given now are kept.

    On another machine, with nothing but the run's key in DIR: dugnad launch --resume DIR --invite INVITE, where the
    invite is of a peer that is there (dugnad invite --dir ITS_FOLDER). Chain and model come from the peers.
    """
    with told_errors():
        if (recipe is None) == (resume is None):
            raise UsageError("say what to launch: either a recipe (dugnad launch tiny-books) or --resume DIR")
        if invite is not None and resume is None:
            raise UsageError("--invite belongs to --resume: a new run needs nobody to start from")
        if resume is not None and rounds is not None:
            raise UsageError("--rounds belongs to a new run: the recipe of a run never changes")
        from dugnad.configs.recipe import RecipeError
        from dugnad.dht.invite import parse_invite
        from dugnad.peer import ended, gate, roles
        from dugnad.peer import folder as folders
        from dugnad.peer.data import TooShort
        from dugnad.peer.network import Network

        said = said_of(host, port, bulk_port, announce)
        last = None if resume is None else folders.Folder(resume).listened()
        network = Network.of(said, last, host="127.0.0.1", metrics_port=metrics_port, give_mbit=give_mbit)
        if resume is not None:
            where = folders.Folder(resume)
            if not where.path.is_dir():
                raise folders.FolderError(
                    f"{resume}: there is no such folder. Name the one that the run was launched in."
                )
            known = None if invite is None else parse_invite(invite)
            with where.occupied():  # who lives there has its ports
                gate.check_ports(network.host, ports_of(network, port, bulk_port))
            told, life = _tell_invite(where), ended.kept(where, "coordinator", roles.run_name(where, known))
            _run(lambda: roles.resume(where, network, invite=known, told=told), where, life, exit_with_stdin)
        else:
            assert recipe is not None
            chosen = _recipe(recipe, rounds)
            where = folders.Folder(directory or folders.data_folder() / f"{chosen.name}-organizer")
            gate.check_ports(network.host, ports_of(network, port, bulk_port))
            told, life = _tell_invite(where), ended.kept(where, "coordinator", chosen.name)
            try:
                _run(lambda: roles.launch(chosen, where, network, told=told), where, life, exit_with_stdin)
            except (RecipeError, TooShort) as error:  # what shows only beside the model and the corpus
                raise UsageError(f"{recipe}: {str(error).removeprefix(f'{chosen.name}: ')}") from error


@app.command()
def join(
    invite: Annotated[str, typer.Argument(help="The invite you were given: dugnad1:...")],
    directory: Dir = None,
    host: JoinHost = None,
    port: Port = None,
    bulk_port: BulkPort = None,
    announce: Announce = None,
    metrics_port: MetricsPort = 0,
    give_mbit: GiveMbit = 100,
    threads: Annotated[int, typer.Option(help="Cores to train with; 0: half of them.", min=0, max=1024)] = 0,
    exit_with_stdin: WithStdin = False,
) -> None:
    """Take part in a run: trains on this machine, averages with the others, until the run ends or you leave.

    Ctrl+C once: finish the round, write a checkpoint, leave. Twice: leave now; only this round's work is lost.

    Who comes back listens where it did before; options that are given now are kept.
    """
    with told_errors():
        from dugnad.dht.invite import parse_invite

        known = parse_invite(invite)
        from dugnad.peer import ended, gate
        from dugnad.peer import folder as folders
        from dugnad.peer.network import Network, host_for
        from dugnad.peer.terminal import say

        where = folders.Folder(directory) if directory else folders.volunteer_folder(known.name, known.run)
        network = Network.of(
            said_of(host, port, bulk_port, announce),
            where.listened(),
            host=host_for(known),
            metrics_port=metrics_port,
            give_mbit=give_mbit,
        )
        where.check()
        cores = threads or cli_self.default_threads()
        say(f'dugnad {version("dugnad")}   run "{known.name}" ({known.run.hex()[:8]})')
        wanted = ports_of(network, port, bulk_port)
        gate.check_machine(where, network.host, wanted, threads=cores, told=_tell_check)
        from dugnad.peer import roles  # not before: it takes seconds, with torch

        told = _tell_run(where, cores)

        def begin() -> Coroutine[Any, Any, str]:
            return roles.join(known, where, network, threads=cores, checked=_tell_check, told=told)

        _run(begin, where, ended.kept(where, "volunteer", known.name), exit_with_stdin)


@app.command()
def status(directory: Dir = None, as_json: AsJson = False) -> None:
    """Say where the run stands, as the role that lives in --dir sees it.

    Without --dir: the only role that runs from your data directory, where roles live that were given no --dir.
    """
    with told_errors():
        from dugnad.peer import ask

        cli_self.check_lived_in(directory)
        said = ask.status(directory)
        if as_json:
            print(json.dumps(said))
        else:
            from dugnad.peer.report import text

            print(text(said))


cli_organizer.register(app)


@app.command()
def audit(
    directory: Annotated[Path, typer.Argument(help="A role's folder.")],
    as_json: AsJson = False,
) -> None:
    """Prove from the chain in DIR that nothing was lost or counted twice; status 1 if it does not hold."""
    with told_errors():
        from dugnad.peer import ask, folder

        folder.check_role(directory)
        found = ask.audit(directory)
        print(json.dumps(found) if as_json else ask.audit_text(found))
        raise typer.Exit(0 if found["clean"] else 1)


@app.command()
def checkpoints(
    directory: Annotated[Path, typer.Argument(help="A role's folder, a folder of checkpoints, or a single one.")],
    as_json: AsJson = False,
) -> None:
    """List the checkpoints in DIR: round, size, who wrote each, and whether it is intact; status 1 if one is not.

    Each is read to its last byte: every megabyte is held against its hash, all hashes against the digest of the model,
    and that against the signature of who wrote it. What is damaged is named by file and tensor.

    A role repairs its own from the others' copies. By hand: put back a copy of the round's folder from any keeper of
    the run, or move it away. Nothing is changed by this command, and the role may be running.
    """
    with told_errors():
        from dugnad.peer import saved

        found = saved.rows(directory)
        print(json.dumps(found) if as_json else saved.text(found))
        raise typer.Exit(0 if all(row["intact"] for row in found) else 1)


@app.command()
def sample(
    source: Annotated[Path, typer.Argument(help="A checkpoint's folder, or any role's folder (its newest one).")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "\n",
    length: Annotated[int, typer.Option(help="How many bytes to write.", min=1, max=100_000)] = 400,
    temperature: Annotated[float, typer.Option(help="Below 1: safer; above: wilder.", min=0.01, max=10.0)] = 0.8,
    top_k: Annotated[int, typer.Option(help="Choose among so many likeliest bytes.", min=1, max=256)] = 50,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.", min=0)] = 1,
) -> None:
    """Let the model of a checkpoint write."""
    with told_errors():
        from dugnad.peer.sample import write

        print(write(source, prompt, length, temperature=temperature, top_k=top_k, seed=seed))


@app.command()
def simulate(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or the path of a .toml file.")],
    peers: Annotated[int, typer.Option(help="Volunteers, 1 to 1000.")] = 16,
    churn: Annotated[
        float,
        typer.Option(
            help="Share of the volunteers, 0 to 1, that die in each round: at a random moment, without a word, disk "
            "and all. A new one, with a new name and nothing on its disk, comes 1 to 10 s later."
        ),
    ] = 0.0,
    uplink: Annotated[
        str, typer.Option(help="What each peer can send, as in 500kbit, 20mbit, 1gbit; it takes in as much.")
    ] = "100mbit",
    seed: Annotated[int, typer.Option(help="The same seed gives the same run, byte for byte.", min=0)] = 1,
    rounds: Annotated[
        int | None, typer.Option(help="Cut the run to so many rounds.", min=1, show_default=False)
    ] = None,
    step_s: Annotated[
        float, typer.Option(help="Seconds of a training step on the fastest volunteer; the slowest takes 1.3 times it.")
    ] = 0.1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what was found to this file.")] = None,
) -> None:
    """Try out a run of many volunteers before there are any: hours of it in minutes, on this machine alone.

    What decides, trains, votes and averages is the real thing; the network, the disks and the tensors are simulated.
    It says how many rounds an hour commit, how much of their time the volunteers train, what they wait for else, and
    how many bytes each kind of message costs. 1,000 volunteers take some minutes.

    Every rule of the protocol is checked at every step. If one breaks, the run ends with status 1, the seed, and the
    command that replays it. Status 1 too where no round commits any more: half of a committee died at once.

    Gossip among as many peers is simulated by itself, without deaths, and its bytes are added.

    Example: dugnad simulate tiny-books --peers 100 --churn 0.02 --uplink 20mbit --seed 7
    """
    with told_errors():
        _check_writable(json_file)
        from dugnad.peer import simulate as simulation

        asked = simulation.Asked(
            recipe=recipe, peers=peers, churn=churn, uplink=uplink, seed=seed, rounds=rounds, step_s=step_s
        )
        raise typer.Exit(simulation.simulate(_recipe(recipe, rounds), asked, json_file))


def _check_writable(json_file: Path | None) -> None:
    if json_file is not None and (json_file.is_dir() or not os.access(json_file.absolute().parent, os.W_OK)):
        raise UsageError(f"--json {json_file} can't be written: name a file in a folder that is there")


def _recipe(name: str, rounds: int | None) -> "Recipe":
    from dugnad.configs.recipe import load

    chosen = load(name)
    if rounds is None:
        return chosen
    if rounds > chosen.rounds.num_rounds():
        raise UsageError(f"--rounds is {rounds}, but {chosen.name} ends after {chosen.rounds.num_rounds()} rounds")
    return chosen.cut(rounds)


def _tell_invite(where: "Folder") -> Any:
    def tell(invite: str, url: str) -> None:
        from dugnad.dht.invite import parse_invite
        from dugnad.dht.multiaddrs import is_local
        from dugnad.peer.terminal import say

        if where.has_run_key:
            say(f"run key     {where.path / 'run.key'}: keep it safe; who has it decides about the run")
            say("            once it is up you may move that key to a place offline: it goes on for 30 days without")
        say(f"metrics     {url}/metrics      status: dugnad status --dir {where.path}")
        say("coordinator up. Volunteers join with:")
        if all(is_local(address) for address in parse_invite(invite).addresses):
            say("(only from this machine; --host 0.0.0.0 lets others in)")
        say("")
        say(f"dugnad join {invite}")
        say("")

    return tell


def _tell_check(check: object) -> None:
    from dugnad.peer.terminal import say

    say(str(check))


def _tell_run(where: "Folder", cores: int) -> Any:
    def tell(recipe: "Recipe", nickname: str, url: str) -> None:
        from dugnad.peer.terminal import say

        say(f'run    "{recipe.name}": {recipe.summary}')
        say(f"role   trainer, with {cores} {'core' if cores == 1 else 'cores'}")
        say(f"ask    dugnad status | why | peers --dir {where.path}      metrics  {url}/metrics")
        say(f'You are "{nickname}". Ctrl+C once: finish this round and leave.')

    return tell


def _run(
    begin: Callable[[], Coroutine[Any, Any, str]],
    where: "Folder",
    life: "AbstractContextManager[Words]",
    exit_with_stdin: bool,
) -> None:
    """Let a role live in a folder; life: keeps how that ends."""
    from dugnad.peer.terminal import log_to, say

    where.create()
    log_to(where.path)
    _allow_many_files()
    if exit_with_stdin:
        threading.Thread(target=_exit_with_stdin, daemon=True).start()
    with life as words:
        words.said = asyncio.run(begin())
    say(words.said)


def _allow_many_files() -> None:
    """Each peer of a large swarm is a socket or two; shells allow 1,024 files by habit."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _exit_with_stdin() -> None:
    """Whoever started us is gone, however it ended: go too."""
    while os.read(0, 1024):  # not through sys.stdin, whose lock this thread would hold at the interpreter's end
        pass
    os._exit(3)


cli_self.register(app)  # behind those with which a run begins


def main() -> None:
    """The command's entry point."""
    app()
