"""The two roles as processes: host, swarm, exporter and role together, ended in order.

Ctrl+C (or SIGTERM) once: finish what others count on, then leave. Twice: leave now.
"""

import asyncio
import contextlib
import importlib
import itertools
import logging
import signal
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from blake3 import blake3

from dugnad.configs.recipe import Recipe, decode, encode
from dugnad.coordinator.chain import Chain
from dugnad.coordinator.messages import Genesis, Welcome
from dugnad.coordinator.roll import ALLOW_LIST, INVITED
from dugnad.coordinator.service import Coordinator, Dismissed
from dugnad.coordinator.sync import Asker, SyncError
from dugnad.dht.delegation import Delegation
from dugnad.dht.host import Host
from dugnad.dht.identity import Identity, PeerId, nickname, peer_id_of
from dugnad.dht.invite import Invite, InviteError, Pass, check, encode_invite
from dugnad.dht.ticket import Terms, day_of
from dugnad.peer import gate
from dugnad.peer.folder import Folder, FolderError, OtherRun
from dugnad.peer.network import Network
from dugnad.peer.place import Place, Way, keep_remembering, placed
from dugnad.peer.terminal import live_line

if TYPE_CHECKING:
    from dugnad.peer.numerics import Numerics
    from dugnad.peer.session import Session

log = logging.getLogger(__name__)

WELCOME_S = 60.0
"""How long a volunteer looks for someone who can say what the run is."""
_LOOK_S = 1.0
"""How often it is seen to that the network daemon is there."""
_NO_TICKET = (
    "This invite leads to the run and lets nobody in: the one that this peer came by is for itself alone, used up or "
    "expired. Ask the organizer for one (dugnad invite, where run.key is)."
)
_ON_THE_LIST = "Who joins by it needs to be on the organizer's allow-list."


async def launch(recipe: Recipe, folder: Folder, network: Network, *, told: Callable[[str, str], None]) -> str:
    """Begin a run as its organizer and coordinator; returns why it ended.

    told: hears the invite and the exporter's URL.
    """
    with folder.occupied():
        if folder.genesis() is not None:
            raise FolderError(
                f"{folder.path}: a run was launched here before. Go on with it: dugnad launch --resume {folder.path}. "
                "For another run, choose another folder with --dir."
            )
        from dugnad.peer.numerics import Numerics

        numerics = Numerics(recipe)
        await asyncio.to_thread(numerics.prepare, to_train=False)  # before anything is written: it may not go together
        first = await asyncio.to_thread(numerics.first_model)
        founder, organizer = folder.identity().peer_id, folder.organizer().peer_id
        with contextlib.closing(Chain(folder.chain)) as chain:
            incarnation = chain.incarnation()
        genesis = Genesis(encode(recipe), organizer, founder, incarnation, first.digest())
        way = Way(genesis.run, recipe.name, organizer)
        async with placed("coordinator", folder, way, network, may_wait=True) as place:
            return await _coordinate(genesis, numerics, place, folder, folder.organizer(), told)


async def resume(folder: Folder, network: Network, *, invite: Invite | None, told: Callable[[str, str], None]) -> str:
    """Go on as the coordinator of the run in `folder`; in a folder with nothing but run.key, of the run of `invite`.

    Where run.key has been taken offline, by the delegation that the chain holds, for as long as that lasts. Returns why
    it ended.
    """
    with folder.occupied():
        genesis = folder.genesis()
        mandate = folder.organizer() if folder.has_run_key else _left_delegation(folder)
        if genesis is None and invite is None:
            raise FolderError(
                f"{folder.path}: no run was launched here. Name the folder that holds its chain.sqlite; or, to go on "
                "from its run.key alone, add --invite with an invite that names a peer who is there."
            )
        if genesis is not None and invite is not None and genesis.run != invite.run:
            raise _other_run(folder, genesis, invite)
        if invite is not None:
            way = Way.of(invite)
        else:
            assert genesis is not None
            way = Way(genesis.run, decode(genesis.recipe).name, genesis.organizer)
        network = network.moved(stays=True)
        async with placed("coordinator", folder, way, network, may_wait=True) as place:
            if genesis is None and invite is not None:
                genesis = (await _welcome(place, invite)).genesis
            assert genesis is not None
            if isinstance(mandate, Identity) and genesis.organizer != mandate.peer_id:
                raise FolderError(f"{folder.path}: run.key is not the key of this run.")
            from dugnad.peer.numerics import Numerics

            numerics = Numerics(decode(genesis.recipe))
            await asyncio.to_thread(numerics.prepare, to_train=False)
            return await _coordinate(genesis, numerics, place, folder, mandate, told)


async def join(
    invite: Invite,
    folder: Folder,
    network: Network,
    *,
    threads: int,
    checked: gate.Told,
    told: Callable[[Recipe, str, str], None],
) -> str:
    """Take part in a run with so many threads of torch; returns why it ended.

    checked: hears what was looked at. told: hears the recipe, our nickname and the exporter's URL.
    """
    with folder.occupied():
        kept, organizer = folder.genesis(), peer_id_of(invite.organizer)
        if kept is not None and kept.run != invite.run:
            raise _other_run(folder, kept, invite)
        back = kept is not None
        network = network.moved(stays=False)
        # torch takes seconds to load, in which the others can be reached already
        loading = asyncio.create_task(asyncio.to_thread(importlib.import_module, "dugnad.peer.session"))
        async with placed("volunteer", folder, Way.of(invite), network, may_wait=back) as place:
            if not back:  # the chain knows who was here before
                check(invite, place.identity.peer_id, now=place.swarm.now())
            genesis = kept if kept is not None else (await _welcome(place, invite)).genesis
            if genesis.organizer != organizer:
                raise InviteError("E101", "this invite names another organizer than the run has. Ask for another one.")
            recipe = decode(genesis.recipe)
            gate.tell_network(place.host.contacts, place.swarm.clock.correction, told=checked)
            await asyncio.to_thread(gate.check_recipe, recipe, folder, threads=threads, told=checked)
            told(recipe, nickname(place.identity.peer_id), place.url)
            await loading
            from dugnad.peer.numerics import Numerics
            from dugnad.peer.session import Session

            numerics = Numerics(recipe, threads=threads)
            await asyncio.to_thread(numerics.prepare, to_train=True)
            role = Session(place.surroundings(genesis, folder), numerics)

            def passed_on() -> str:
                given = invite.ticket if role.may_pass_on(place.face.claim) else None
                return encode_invite(place.invite(genesis, recipe.name, given))

            def note() -> str:
                if role.charter.admission != INVITED or role.may_pass_on(place.face.claim):
                    return _ON_THE_LIST if role.charter.admission == ALLOW_LIST else ""
                return _NO_TICKET

            place.face.role, place.face.invite, place.face.invite_note = role, passed_on, note
            with folder.inhabited("volunteer", invite.run, recipe.name, place.url):
                await _until_done(role, place, folder, role.leave, "leaving after this round; Ctrl+C again leaves now")
    if role.machine.dismissed is not None:
        raise Dismissed(role.left_because)
    return role.left_because


def lasting_ticket(organizer: Identity, run: bytes, is_revoked: Callable[[bytes], bool]) -> Pass:
    """The ticket in the invite that a launch prints, for any number of members, for good.

    Always the same of a key, until it is revoked: then the next. is_revoked: of a ticket's id, as far as is known.
    """
    for number in itertools.count():
        seed = blake3(organizer.sign(b"dugnad/lasting-ticket/1" + run + number.to_bytes(4))).digest()
        given = Pass.issue(organizer, run, seed, Terms())
        if not is_revoked(given.of(run, Identity.from_seed(seed).peer_id).id):
            return given
    raise AssertionError("the numbers do not end")


def _left_delegation(folder: Folder) -> Delegation:
    """The newest by which whoever lives in `folder` coordinates, where run.key is not. Raises FolderError."""
    if folder.chain.exists():
        me = folder.identity().peer_id
        with contextlib.closing(Chain(folder.chain, read_only=True)) as chain:
            seats = [seat for commit in chain.commits() if (seat := commit.block.coordinator) is not None]
        mine = [seat for seat in seats if seat.coordinator == me]
        if mine and mine[-1].over(time.time()):
            raise FolderError(
                f"{folder.path}: the delegation that was left here ended on {day_of(mine[-1].until)}. Put run.key back "
                "to renew it."
            )
        if mine:
            return mine[-1]
    raise FolderError(f"{folder.path}: there is no run.key here: only who has the run's key can coordinate it.")


def run_name(folder: Folder, invite: Invite | None) -> str:
    """The name of the run that `resume` would go on with; "" if there is none."""
    genesis = folder.genesis()
    return decode(genesis.recipe).name if genesis is not None else invite.name if invite is not None else ""


def _other_run(folder: Folder, kept: Genesis, invite: Invite) -> OtherRun:
    return OtherRun(
        folder.path,
        f"this folder belongs to run {kept.run.hex()[:8]}, the invite to run {invite.run.hex()[:8]}. "
        "Give each run a folder of its own with --dir.",
    )


async def _coordinate(
    genesis: Genesis,
    numerics: "Numerics",
    place: Place,
    folder: Folder,
    mandate: Identity | Delegation,
    told: Callable[[str, str], None],
) -> str:
    around = place.surroundings(genesis, folder)
    role = Coordinator(around, mandate, numerics)
    name = numerics.recipe.name
    invited = role.charter.admission == INVITED
    key = mandate if invited and isinstance(mandate, Identity) else None
    if invited and key is None:
        place.face.invite_note = lambda: _NO_TICKET

    def is_revoked(ticket: bytes) -> bool:
        return place.swarm.decisions.on("revoke", ticket.hex(), now=place.swarm.now()) is not None

    def made() -> str:
        ticket = lasting_ticket(key, genesis.run, is_revoked) if key is not None else None
        return encode_invite(place.invite(genesis, name, ticket))

    place.face.role, place.face.invite = role, made
    with folder.inhabited("coordinator", genesis.run, name, place.url):
        told(place.face.invite(), place.url)
        promise = "finishing the round, then leaving it to the others; Ctrl+C again: now"
        await _until_done(role, place, folder, role.stop, promise)
    if role.leader.finished:
        where = folder.path
        return f"the run is finished. See what is left of it: dugnad checkpoints {where}, dugnad sample {where}"
    return f"left in order. Go on with: dugnad launch --resume {folder.path}"


async def _welcome(place: Place, invite: Invite) -> Welcome:
    """What the run is, from those whom the invite names, or else from whomever the DHT names as its members.

    Those of the invite come first: anyone may call himself the coordinator.
    """
    asker = Asker(place.host, place.identity, invite.run)
    invited = [peer for peer in Way.of(invite).invited if peer != place.identity.peer_id]
    found: list[PeerId] = []
    fault = SyncError("nobody could say what this run is: nobody has answered yet")
    try:
        async with asyncio.timeout(WELCOME_S):
            while True:
                try:
                    return await asker.welcome(dict.fromkeys([*invited, *found]))
                except SyncError as error:
                    fault = error
                members = await place.swarm.look_around()
                found = sorted(members, key=lambda peer: members[peer] != "coordinator")
                await asyncio.sleep(1.0)
    except TimeoutError:
        raise fault from None


async def _until_done(
    role: "Coordinator | Session", place: Place, folder: Folder, leave: Callable[[], None], promise: str
) -> None:
    """Serve until the role is done; raises KeyboardInterrupt where the user will not wait for that.

    Raises NetworkDown, in a group, once the network daemon has ended.
    """
    serving = asyncio.create_task(_serve(role, place.host))
    looking = asyncio.create_task(place.face.keep_looking())
    remembering = asyncio.create_task(keep_remembering(place, folder))
    asked = 0

    def interrupted() -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            log.info(promise)
            leave()
        else:
            serving.cancel()

    try:
        with _on_interrupt(interrupted):
            async with live_line(place.face.line):
                await serving
    except asyncio.CancelledError:
        if asked > 1:
            raise KeyboardInterrupt from None
        raise
    finally:
        looking.cancel()
        remembering.cancel()


async def _serve(role: "Coordinator | Session", host: Host) -> None:
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(_watch(host))
        await role.serve()
        watching.cancel()


async def _watch(host: Host) -> None:
    """Raises NetworkDown once the daemon has ended: whoever sends takes that for the other side's silence."""
    while True:
        host.check_alive()
        await asyncio.sleep(_LOOK_S)


@contextlib.contextmanager
def _on_interrupt(act: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, act)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
