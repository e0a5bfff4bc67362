"""Errors that a user can do something about, as a sentence and an exit status."""

import errno

BAD_INPUT, FAILED = 2, 1


# by name: importing all of them to look at one error would take seconds
_KNOWN = {
    "dugnad.peer.told.UsageError": BAD_INPUT,
    "dugnad.configs.recipe.RecipeError": BAD_INPUT,
    "dugnad.dht.invite.InviteError": BAD_INPUT,
    "dugnad.dht.hello.TurnedAway": FAILED,
    "dugnad.dht.twin.KeyInUse": FAILED,
    "dugnad.peer.doctor.CheckFailed": FAILED,
    "dugnad.peer.folder.FolderError": BAD_INPUT,
    "dugnad.peer.simulate.SimulationError": BAD_INPUT,
    "dugnad.dht.identity.IdentityError": FAILED,
    "dugnad.dht.transport.TransportError": FAILED,
    "dugnad.monitoring.exporter.PortTaken": FAILED,
    "dugnad.coordinator.damage.CheckpointError": FAILED,
    "dugnad.coordinator.chain.ChainError": FAILED,
    "dugnad.coordinator.service.Dismissed": FAILED,
    "dugnad.coordinator.state.RestoreError": FAILED,
    "dugnad.coordinator.sync.SyncError": FAILED,
    "dugnad.coordinator.ledger.LedgerError": FAILED,
    "dugnad.peer.ask.AskError": FAILED,
    "dugnad.peer.data.CorpusError": FAILED,
    "dugnad.peer.demo.DemoError": FAILED,
    "dugnad.peer.trainer.OptimizerError": FAILED,
}
_ADVICE = {
    # what others send is refused where it arrives: only what lies on our own disk gets as far as here
    "dugnad.coordinator.ledger.LedgerError": "The chain.sqlite in this role's folder does not hold together: put back "
    "a copy of it. A volunteer can also move it away, and gets it from the others again.",
}


def sentence_of(error: BaseException) -> tuple[str, int] | None:
    """What to tell the user and the exit status, or None for what is our own mistake and needs its traceback."""
    if isinstance(error, BaseExceptionGroup):
        said = [sentence_of(inner) for inner in error.exceptions]
        known = [one for one in said if one is not None]
        return known[0] if known and len(known) == len(said) else None
    for kind in type(error).__mro__:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name in _KNOWN:
            return f"{error}. {_ADVICE[name]}" if name in _ADVICE else str(error), _KNOWN[name]
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many open files: raise the limit with ulimit -n", FAILED
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}. What was committed is safe; make room or fix the permissions, then resume.", 1
    return None
