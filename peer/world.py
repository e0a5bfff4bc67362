"""A run in virtual time: the production machines under a simulated network, disks, clocks and faults, from one seed.

`Keeper`, `Volunteer`, `Leader`, `Follower` and `Reducer` are the real ones. What must hold whatever fails is checked as
it happens, by `invariants`.
"""

from collections.abc import Iterable

from dugnad.coordinator.audit import Audit, audit
from dugnad.coordinator.ledger import Ledger
from dugnad.coordinator.messages import Ballot, Block, Commit, epoch_payload
from dugnad.coordinator.rounds import Phase
from dugnad.dht.decisions import Decision
from dugnad.dht.delegation import Delegation, delegate
from dugnad.dht.identity import PeerId
from dugnad.peer.nodes import CoordinatorNode, Node
from dugnad.peer.stage import (
    COORDINATOR,
    FIRST_INCARNATION,
    FIRST_MODEL,
    ORGANIZER,
    RUN,
    WALL_S,
    Disk,
    SimSigner,
    Stage,
)
from dugnad.peer.volunteer_node import VolunteerNode


class World(Stage[Node]):
    """All of a run, with what a test scripts; everything that happens follows from `seed`."""

    def start_coordinator(self, name: str = COORDINATOR, *, until_s: float = 0.0) -> "CoordinatorNode":
        """Start a coordinator, first or again, from its disk: each start is a new term.

        until_s: virtual time at which its delegation ends; 0: never.
        """
        peer = PeerId(name)
        assert peer not in self.nodes, "two coordinators from one disk"
        self.starts += 1
        node = CoordinatorNode(self, peer, self._disk(peer), self.delegation(peer, until_s))
        self.nodes[peer] = node
        node.begin()
        return node

    def delegation(self, peer: PeerId, until_s: float = 0.0) -> Delegation:
        """The organizer's newest word that `peer` may have the coordinator's seat."""
        return delegate(SimSigner(ORGANIZER), RUN, peer, self.starts, int(WALL_S + until_s) if until_s else 0)

    def start_volunteer(self, name: str, *, fresh_disk: bool = False) -> "VolunteerNode":
        """Start a volunteer that joins, or joins again with the disk it had."""
        peer = PeerId(name)
        if fresh_disk:
            self.disks.pop(peer, None)
        self.left.pop(peer, None)
        node = VolunteerNode(self, peer, self._disk(peer))
        self.nodes[peer] = node
        node.begin()
        return node

    def _disk(self, peer: PeerId) -> Disk:
        if peer not in self.disks:
            first = peer == COORDINATOR and FIRST_INCARNATION not in self.incarnations
            incarnation = FIRST_INCARNATION if first else self.rng.randbytes(8)
            disk = Disk(incarnation=incarnation, model=FIRST_MODEL if first else None)
            self.disks[peer] = self.incarnations[incarnation] = disk
        return self.disks[peer]

    def wipe(self, name: str) -> None:
        """The disk of a node that is down is gone."""
        del self.disks[PeerId(name)]

    def recover(self, name: str) -> None:
        """The organizer begins an epoch on the chain of that coordinator's disk, while it is down: it decides alone."""
        peer = PeerId(name)
        disk = self.disks[peer]
        ledger = Ledger(self.charter, SimSigner(peer), self.gate)
        for commit in disk.commits:
            ledger.append(commit)
        head = ledger.head
        term = self.starts + 1
        seat = delegate(SimSigner(ORGANIZER), RUN, peer, term)
        block = Block(
            epoch=head.epoch + 1,
            round=head.round + 1,
            parent=head.hash,
            model_before=self.models[head.hash],
            global_step=head.global_step,
            steps=0,
            entries=(),
            parts=(),
            redo=head.redo,
            cursor=head.cursor,
            committee=ledger.rule.weigh({peer: disk.incarnation}, peer, ledger.credit),
            coordinator=seat,
        )
        signature = SimSigner(ORGANIZER).sign(epoch_payload(RUN, block.hash))
        disk.commits.append(Commit(block, 0, (Ballot(ORGANIZER, signature),)))
        self.rules.commits(disk.commits[-1])

    def lose_newest_commit(self) -> None:
        """Everyone is killed, and what the coordinator's disk took last is gone with the power."""
        for name in list(self.nodes):
            self.crash(name)
        disk = self.disks[COORDINATOR]
        lost = disk.commits.pop()
        disk.model_round, disk.model_block = len(disk.commits), lost.block.parent
        disk.model = self.models[lost.block.parent]
        self.rules.lost(disk.incarnation, (lost.block.epoch, lost.block.round - 1))

    def freeze(self, name: str) -> None:
        """SIGSTOP: connections stay open, nothing is processed."""
        self.nodes[PeerId(name)].frozen = True

    def thaw(self, name: str) -> None:
        """SIGCONT."""
        node = self.nodes[PeerId(name)]
        node.frozen = False
        backlog, node.backlog = node.backlog, []
        for event in backlog:
            event()

    def decide(self, verdict: str, name: str, reason: str = "", *, unheard_by: Iterable[str] = ()) -> None:
        """The organizer decides about a peer; everyone hears of it at once but for those that a test names."""
        raw = f"{verdict} {name} {self.now}".encode()
        said = Decision(PeerId(name), verdict, reason, self.wall_s(), float("inf"), raw)
        self.decisions.append(said)
        for peer, node in self.nodes.items():
            if peer not in unheard_by:
                node.decisions.take(said)

    def chain(self) -> list[Commit]:
        """The longest chain on any disk."""
        chains = [disk.commits for disk in self.disks.values() if disk.commits]
        return max(chains, key=lambda commits: (commits[-1].block.epoch, commits[-1].block.round), default=[])

    def audit(self) -> Audit:
        """What the longest chain proves."""
        commits = self.chain()
        known = {c.block.round: self.models[c.block.hash] for c in commits if c.block.hash in self.models}
        applied = {r: {COORDINATOR: digest} for r, digest in known.items()}
        return audit(self.charter, commits, applied, SimSigner(COORDINATOR))

    def rounds(self) -> int:
        """How many rounds are committed."""
        return len(self.chain())

    def leader(self) -> "Node | None":
        """Who leads now."""
        leading = [node for node in self.nodes.values() if node.leader().phase is not Phase.FOLLOWING]
        return max(leading, key=lambda node: (node.follower.ledger.head.place, node.follower.view), default=None)

    def reason(self) -> str:
        """What whoever leads says it waits for, and where everyone stands."""
        leader = self.leader()
        stand = ", ".join(
            f"{peer}: {node.follower.ledger.head.place} view {node.follower.view}/{node.follower.promises.pledged}"
            f"{' frozen' if node.frozen else ''} model {node.follower.model_round}"
            for peer, node in sorted(self.nodes.items())
        )
        committee = [voter.peer for voter in self.chain()[-1].block.committee] if self.chain() else []
        return f"{leader.peer + ': ' + leader.leader().reason if leader else 'nobody leads'} [{stand}] of {committee}"
