"""Every error that has a code: what it is called, what causes it, what to do.

The sentence that a user sees is made where the error arises, with its numbers and names in it, and begins with the
code. `python -m dugnad.peer.codes > docs/errors.md` writes the table for people.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Code:
    """One error, in words that hold for each time it happens."""

    title: str
    cause: str
    fix: str


CODES: dict[str, Code] = {
    "E101": Code(
        "invite not readable",
        "The invite ends early, or a character of it was changed, or it is no invite. The message says which.",
        "Copy it again, whole: it starts with `dugnad1:` and ends with a checksum.",
    ),
    "E102": Code(
        "invite expired, or membership ended",
        "The organizer gave the invite a last day, or the membership that came with it, which is over by the clocks "
        "of the run.",
        "Ask the organizer for a new one.",
    ),
    "E201": Code(
        "nobody of the run could be reached",
        "None of the addresses of the invite, nor of those remembered from the last time, led to a peer. For each the "
        "message says why: *refused* (the machine is there, and nothing listens), *no answer* (a firewall, or the "
        "machine is off), *answered as* another key (re-installed: the invite is stale), *not a dugnad peer*, "
        "*cannot resolve* its name, or *no way there*.",
        "If all refuse or are stale: ask for a new invite, which any peer of the run can print with "
        "`dugnad invite`. If nobody answers: try from another network; a firewall of yours may let nothing out.",
    ),
    "E202": Code(
        "port can't be listened on",
        "Another program listens there, or the address is not one of this machine.",
        "Stop the other program (is a dugnad still running?), or choose another `--port`, `--metrics-port` or "
        "`--host`; port 0 takes any free one.",
    ),
    "E203": Code(
        "inbound blocked",
        "A router or firewall lets no connection in. A warning: the peer goes on through a relay, slower.",
        "Forward two TCP ports to this machine, or switch on UPnP in the router. `dugnad why` says how.",
    ),
    "E301": Code(
        "another protocol version",
        "The run and this software speak different versions of the protocol.",
        "Update as the message says, or use the version that it names.",
    ),
    "E302": Code(
        "not enough memory",
        "Model, optimizer and batch of this run need more memory than is free here.",
        "Close other programs, or help in a run with a smaller model.",
    ),
    "E303": Code(
        "not enough disk",
        "Checkpoints and the bytes of recent rounds need more room than is free in the role's folder.",
        "Make room, or choose a folder on another disk with `--dir`.",
    ),
    "E304": Code(
        "another run",
        "The folder belongs to another run than the invite, or the peer of the invite takes part in another one now.",
        "Give each run a folder of its own with `--dir`; or ask the organizer for a new invite.",
    ),
    "E401": Code(
        "not admitted",
        "The run takes only those whom its organizer has admitted, by an allow-list or by the invite itself: one "
        "without a ticket, one whose places are taken, one for another key, one that was revoked. The message says "
        "which.",
        "Send the key that the message shows (`dugnad identity show` prints it too) to the organizer.",
    ),
    "E402": Code(
        "identity in use",
        "Another running peer signs with the same key: a copied `identity.key`, or a copied folder. Two peers with "
        "one key contradict each other, and once both vote, both are out of the run.",
        "Give this peer a key of its own: `dugnad identity new --force --dir DIR`. If the other one should not be "
        "running, stop it.",
    ),
    "E403": Code(
        "banned",
        "The organizer has banned this key, for the reason in the message.",
        "Only the organizer can take that back (`dugnad unban`).",
    ),
}
_HEAD = """\
# Errors

What keeps a peer out of a run, or makes it slow, has a code, so that people can look it up and tell each other; what is
wrong with a recipe, a folder, a file or a disk is told without one. Either way the message says what happened this
time, and what to do. Exit status 2 means that what was typed can't be used as it is (invite, folder, options, recipe),
1 that something else is wrong, 130 that you left at once.

`dugnad doctor INVITE` looks for these before you join; what it did not measure it marks with `-`. `dugnad why` says
them afterwards, also once the role has ended.

| code | | why | what to do |
|---|---|---|---|
"""


def table() -> str:
    """docs/errors.md."""
    rows = (f"| {code} | {one.title} | {one.cause} | {one.fix} |\n" for code, one in CODES.items())
    return _HEAD + "".join(rows)


if __name__ == "__main__":
    print(table(), end="")
