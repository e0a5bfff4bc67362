"""What `join` looks at before it takes part: the doctor's checks that decide, each told as it is made.

What nothing but this machine decides is looked at first, before anything is written; what depends on the recipe as soon
as that is known.
"""

from collections.abc import Callable, Iterable

from dugnad.configs.recipe import Recipe
from dugnad.dht.bootstrap import Contacts
from dugnad.dht.clock import Correction
from dugnad.peer import doctor, measure
from dugnad.peer.doctor import Check, CheckFailed, NetworkFacts, Verdict
from dugnad.peer.folder import Folder
from dugnad.peer.needs import Needs, needs_of

Told = Callable[[Check], None]
"""Hears of each check."""


def check_machine(folder: Folder, host: str, ports: Iterable[tuple[str, int]], *, threads: int, told: Told) -> None:
    """Whether any run could work here; tells what all should know. Raises CheckFailed."""
    machine = measure.machine(folder.path, threads=threads, look_for_gpu=False)
    told(_passed(doctor.software(measure.software())))
    cores = doctor.processor(machine)
    if cores.verdict is Verdict.WARNING:
        told(cores)
    check_ports(host, ports)
    for check in (doctor.memory(machine, Needs()), doctor.disk(machine, Needs())):
        _passed(check)  # told once the recipe is known: then it says more


def check_ports(host: str, ports: Iterable[tuple[str, int]]) -> None:
    """Whether these can be listened on; (option, port) of each, 0 for any. Raises CheckFailed."""
    _passed(doctor.ports(measure.ports(host, ports)))


def check_recipe(recipe: Recipe, folder: Folder, *, threads: int, told: Told) -> None:
    """Whether this run fits on this machine. Raises CheckFailed."""
    needs = needs_of(recipe)
    machine = measure.machine(folder.path, threads=threads, look_for_gpu=needs.gpu)
    for check in (doctor.memory(machine, needs), doctor.disk(machine, needs), doctor.gpu(machine, needs)):
        if _passed(check).name != "gpu" or needs.gpu:
            told(check)


def tell_network(contacts: Contacts, correction: Correction, *, told: Told) -> None:
    """Who was reached, and how this machine's clock is; nothing of that keeps anyone out who has come so far."""
    if not contacts.peers:
        return  # nobody is there yet, and we wait for them
    facts = NetworkFacts(
        asked=len(contacts.peers) + len(contacts.failures),
        reached=len(contacts.peers),
        failures=contacts.failures,
        run="connected",
        clock_error_s=-correction.offset_s if correction.num_peers else None,
        clock_peers=correction.num_peers,
    )
    told(doctor.clock(facts))
    told(doctor.network(facts))


def _passed(check: Check) -> Check:
    if check.verdict is Verdict.FAILURE:
        raise CheckFailed(check)
    return check
