"""Questions from the command line to what lives in a folder, or lies there."""

import http.client
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from dugnad.configs.recipe import decode
from dugnad.coordinator.audit import audit as audit_chain
from dugnad.coordinator.chain import Chain
from dugnad.coordinator.ledger import Charter
from dugnad.dht.identity import PeerId, nickname, verify
from dugnad.peer.folder import Folder, inhabited_folders

_ANSWER_S = 5.0


class AskError(Exception):
    """Nobody there to ask, or no answer; the message says what to do."""


class _Checker:
    """Checks signatures and makes none."""

    peer_id = PeerId("")
    verify = staticmethod(verify)

    def sign(self, payload: bytes) -> bytes:
        """An auditor has nothing to sign."""
        raise AssertionError("an auditor has nothing to sign")


def status(directory: Path | None) -> dict[str, Any]:
    """What the role in `directory` says of itself; without one, the only role running from the data directory."""
    folder = Folder(directory) if directory is not None else only_one()
    said: dict[str, Any] = answer(folder, "/status")
    return said


def answer(folder: Folder, path: str, body: bytes | None = None) -> Any:
    """What the role that lives in `folder` answers, over its local HTTP. Raises AskError."""
    role = folder.role()
    if role is None or not role.alive:
        raise AskError(f"{folder.path}: no role is running here. Start it with dugnad launch or dugnad join.")
    try:
        with urllib.request.urlopen(f"{role.url}{path}", data=body, timeout=_ANSWER_S) as response:
            return json.load(response)
    except (OSError, http.client.HTTPException, ValueError) as error:  # it may be ending in the middle of a word
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        why = " ".join(str(error).split())
        raise AskError(
            f"{folder.path}: the {role.role} there (pid {role.pid}) gives no answer: {why}. Try again in a moment."
        ) from error


def only_one() -> Folder:
    """The folder of the only role running from the data directory. Raises AskError."""
    folders = inhabited_folders()
    if not folders:
        raise AskError("no role is running from the data directory. Name the folder of another with --dir.")
    if len(folders) > 1:
        names = "\n".join(f"     dugnad status --dir {folder.path}" for folder in folders)
        raise AskError(f"{len(folders)} roles are running; ask one:\n{names}")
    return folders[0]


def audit(directory: Path) -> dict[str, Any]:
    """What the chain in `directory` proves, as JSON can hold it."""
    path = Folder(directory).chain
    if not path.exists():
        raise AskError(f"{directory}: there is no chain.sqlite here. Name the folder of a coordinator or volunteer.")
    chain = Chain(path, read_only=True)
    try:
        genesis = chain.genesis()
        if genesis is None:
            raise AskError(f"{path}: this chain has not begun.")
        applied = {round_: {peer: one.model for peer, one in said.items()} for round_, said in chain.applieds().items()}
        charter = Charter.of(genesis, decode(genesis.recipe).admission.kind)
        found = audit_chain(charter, chain.commits(), applied, _Checker())
    finally:
        chain.close()
    return {
        "run": genesis.run.hex(),
        "rounds": found.rounds,
        "samples": found.samples_done,
        "ranges_lost": found.ranges_lost,
        "ranges_doubled": found.ranges_doubled,
        "ranges_to_redo": found.ranges_to_redo,
        "digests_agree": found.digests_agree,
        "credit": dict(found.credit),
        "faults": found.faults,
        "clean": found.clean,
    }


def audit_text(found: dict[str, Any]) -> str:
    """The same for people."""
    lines = [
        f"rounds           {found['rounds']}, each linked to the one before and signed by a quorum",
        f"samples          {found['samples']} trained on once; {len(found['ranges_to_redo'])} ranges still to redo",
        f"ranges lost      {found['ranges_lost'] or 'none'}",
        f"ranges doubled   {found['ranges_doubled'] or 'none'}",
        f"model digests    {'agree' if found['digests_agree'] else 'DIFFER'}",
        *(f"fault            {fault}" for fault in found["faults"]),
    ]
    for peer, tokens in sorted(found["credit"].items(), key=lambda one: -one[1]):
        lines.append(f"credit           {nickname(peer):<20} {tokens} tokens")
    if found["faults"]:
        lines[0] = f"rounds           {found['rounds']}"
    return "\n".join(lines)
