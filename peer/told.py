"""How a command ends that failed by something its user can act on."""

import contextlib
import sys
from collections.abc import Iterator

import typer


class UsageError(Exception):
    """Options that can't be used, or do not go together."""


@contextlib.contextmanager
def told_errors() -> Iterator[None]:
    """Turn what a user can do something about into a sentence and status 1 (2 for bad input)."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        print("left at once", file=sys.stderr)
        raise typer.Exit(130) from None
    except BaseException as error:
        from dugnad.peer.errors import sentence_of

        said = sentence_of(error)
        if said is None:
            raise
        print(f"dugnad: {said[0]}", file=sys.stderr)
        raise typer.Exit(said[1]) from None
