"""Commands of the organizer: who may take part, and how a run goes on when too many are gone."""

import contextlib
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from dugnad.peer.told import told_errors

Dir = Annotated[Path | None, typer.Option("--dir", help="Folder for everything this role keeps.", show_default=False)]
RunKeyDir = Annotated[
    Path | None,
    typer.Option("--dir", help="Folder with run.key; else that of the only role that runs.", show_default=False),
]
Through = Annotated[
    Path | None,
    typer.Option(help="Folder of another role that tells the others, where none runs in --dir.", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add these commands to the `dugnad` command."""
    for command in (invite, allow, ban, unban, revoke, recover):
        app.command()(command)


def invite(
    directory: Dir = None,
    uses: Annotated[int, typer.Option(help="Let so many members in by it; 0: any number.", min=0, max=10**6)] = 0,
    expires: Annotated[str, typer.Option(help="Let them in for so long: 90min, 12h, 7d, 2w.", show_default=False)] = "",
    until: Annotated[str, typer.Option(help="End their membership after so long.", show_default=False)] = "",
    key: Annotated[str, typer.Option(help="Let in that peer alone: its key, 12D3KooW...", show_default=False)] = "",
    through: Through = None,
) -> None:
    """Print an invite to the run.

    Where run.key is, each with --uses, --expires, --until or --key holds a new ticket, signed here: nobody need be
    running, and whoever is there checks it offline; the chain counts who came by it. Without those, it is the invite
    that the launch printed; once that was revoked, another one for any number of members.

    Elsewhere, as in a volunteer's folder, it leads to the peer that lives there, for when others are gone; it lets
    people in if the invite by which that peer came still does.

    Example: dugnad invite --dir RUN --uses 20 --expires 7d
    """
    with told_errors():
        from dugnad.peer import admit, ask
        from dugnad.peer.folder import Folder

        terms = {"uses": uses} if uses else {}
        folder = ask.only_one() if directory is None else Folder(directory)
        if not folder.has_run_key and not (terms or expires or until or key or through):
            said = ask.status(folder.path)
            print(said["invite"])
            _note(said["invite_note"])
            return
        organizer = admit.Organizer(folder.path, through)
        made, words = organizer.invite(
            terms | ({"bound": admit.key_of(key)} if key else {}),
            expires_s=admit.seconds_of(expires) if expires else 0,
            until_s=admit.seconds_of(until) if until else 0,
        )
        print(made)
        _note(words)


def allow(
    key: Annotated[str, typer.Argument(help="The peer's key, 12D3KooW...: it was told to send you that.")],
    directory: RunKeyDir = None,
    through: Through = None,
) -> None:
    """Put a peer on the allow-list, in a run that has one; signed with the run.key in --dir."""
    with told_errors():
        from dugnad.peer.admit import Organizer, key_of

        name, still_out = Organizer(directory, through).decide(key_of(key), "allow")
        print(f"allowed {name}: {still_out or 'it can join from now on'}")


def ban(
    who: Annotated[str, typer.Argument(help="A peer's nickname or key.")],
    reason: Annotated[str, typer.Option(help="Why, in a few words; that peer and all others are told.")] = "",
    directory: RunKeyDir = None,
    through: Through = None,
) -> None:
    """Put a peer out of the run, within a round and for as long as you do not unban it; signed with run.key.

    Whoever hears of it spreads it, and nothing need be restarted. A new key is a new peer: in a run that is not open it
    needs a ticket, so see that it gets none (dugnad revoke).

    Example: dugnad ban grey-finch --reason "poison in rounds 12 to 14" --dir RUN
    """
    with told_errors():
        from dugnad.peer.admit import Organizer

        name, _ = Organizer(directory, through).decide(who, "ban", reason)
        print(f"banned {name}: out from the next round on")


def unban(
    who: Annotated[str, typer.Argument(help="The peer's nickname or key.")],
    directory: RunKeyDir = None,
    through: Through = None,
) -> None:
    """Let a peer back in that was banned: it joins again with the invite it had."""
    with told_errors():
        from dugnad.peer.admit import Organizer

        name, still_out = Organizer(directory, through).decide(who, "unban")
        print(f"unbanned {name}: {still_out or 'it can join again'}")


def revoke(
    invite: Annotated[str, typer.Argument(help="The invite: dugnad1:...")],
    directory: RunKeyDir = None,
    through: Through = None,
) -> None:
    """Let nobody in any more by the ticket of an invite, as when it got about; who came by it stays."""
    with told_errors():
        from dugnad.peer.admit import Organizer

        name, _ = Organizer(directory, through).decide(invite, "revoke")
        print(f"revoked {name}: nobody comes in by it any more")


def recover(
    directory: Annotated[Path, typer.Argument(help="The coordinator's folder, with run.key; nobody may live there.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Begin a new epoch with the organizer's key, when more than half of a committee is gone for good.

    Rounds stand still as long as no quorum of the last committee is there: then this coordinator decides alone, on the
    newest round in DIR. What others committed after that round is undone, and they follow. Start the coordinator
    afterwards: dugnad launch --resume DIR.
    """
    with told_errors():
        from dugnad.peer.folder import Folder
        from dugnad.peer.recover import Recoverer

        where = Folder(directory)
        with where.occupied(), contextlib.closing(Recoverer(where, at_s=time.time())) as recoverer:
            said = recoverer.recovery
            print(f'run "{said.run}": epoch {said.epoch} begins after round {said.after_round}.')
            print(f"The {len(said.committee)} voters of that round lose their votes until a new block names them.")
            print("What anyone committed after that round is undone.")
            if not yes and not typer.confirm("Begin the epoch?"):
                raise typer.Exit(1)
            recoverer.begin(at_s=time.time())
            print(f"Done. Now: dugnad launch --resume {where.path}")


def _note(words: str) -> None:
    """Say something beside what the command was asked for, which a program may be reading."""
    if words:
        print(words, file=sys.stderr)
