"""Members who lie together: two votes, two pledges, two blocks to two halves, contributions with two roots.

Each runs the production machine, and tells others something else than it says. They know all that any of them knows.
"""

from collections import defaultdict
from collections.abc import Sequence

from blake3 import blake3
from msgspec import structs

from dugnad.coordinator.messages import (
    PRECOMMIT,
    PREVOTE,
    Ballot,
    Block,
    Commit,
    Contribution,
    Lock,
    Pledge,
    Proposal,
    ViewChange,
    Vote,
    pledge_payload,
    vote_payload,
)
from dugnad.dht.identity import PeerId
from dugnad.dht.wire import Message
from dugnad.peer.nodes import Node
from dugnad.peer.stage import RUN, SimSigner
from dugnad.peer.volunteer_node import VolunteerNode
from dugnad.peer.world import World


class Conspiracy:
    """What the liars of one world do together: it turns their nodes' messages into lies."""

    def __init__(self, world: World, names: Sequence[str]) -> None:
        self.world = world
        self.names = [PeerId(name) for name in names]
        self.lies = self.blocks = 0
        """How many messages were lies, and how many blocks of them."""
        self._others: dict[bytes, tuple[int, Block, PeerId]] = {}
        """The block shown to the other half -> its view, itself, and who leads."""
        self._ballots: dict[tuple[bytes, int], dict[PeerId, Ballot]] = defaultdict(dict)
        """(block, phase) -> the votes for it that liars have cast or got."""
        world.rules.liars.update(self.names)

    def start(self, name: str) -> None:
        """Start a volunteer that lies."""
        node = self.world.start_volunteer(name)
        assert isinstance(node, VolunteerNode)
        honest = node.say

        def say(to: Sequence[PeerId], message: Message) -> None:
            for one, lie in self._told(node, to, message):
                honest(one, lie)

        node.say = say  # type: ignore[method-assign]
        heard = node.take

        def take(sender: PeerId, message: Message) -> None:
            if isinstance(message, Vote) and message.block in self._others:
                self._count(message.block, message.phase, sender, message.signature)
            else:
                heard(sender, message)

        node.take = take  # type: ignore[method-assign]

    def _told(self, node: Node, to: Sequence[PeerId], message: Message) -> Sequence[tuple[Sequence[PeerId], Message]]:
        """What is told to whom in the place of `message`."""
        one, other = self._halves(to)
        match message:
            case Proposal():
                block = self._other_block(node, message.block)
                if block is not None:
                    self._others.setdefault(block.hash, (message.view, block, node.peer))
                    for liar in self.names:
                        self._vote(liar, block, message.view, PREVOTE)
                        self._vote(liar, block, message.view, PRECOMMIT)
                    self.lies, self.blocks = self.lies + 1, self.blocks + 1
                    return [(one, message), (other, Proposal(message.view, block))]
            case Lock() | Commit():
                return [(one, message)]  # the other half gets another
            case Vote():
                junk = blake3(message.block).digest()
                self.lies += 1
                return [(to, self._signed(node, message, junk)), (to, message)]
            case ViewChange():
                self.lies += 1
                return [(one, message), (other, self._without_lock(node, message))]
            case Contribution():
                root = blake3(message.root).digest()
                self.lies += 1
                return [(to, structs.replace(message, root=root)), (to, message)][:: self.world.rng.choice((1, -1))]
        return [(to, message)]

    def _halves(self, to: Sequence[PeerId]) -> tuple[Sequence[PeerId], Sequence[PeerId]]:
        """Liars are told all; of the others every second hears another story."""
        honest = [peer for peer in to if peer not in self.names]
        return [peer for peer in to if peer in self.names or honest.index(peer) % 2 == 0], honest[1::2]

    def _other_block(self, node: Node, block: Block) -> Block | None:
        """As good a block, but with one voter less."""
        rule, ledger = node.follower.ledger.rule, node.follower.ledger
        members = {voter.peer: voter.incarnation for voter in block.committee}
        victim = next((peer for peer in sorted(members) if peer not in self.names), None)
        if victim is None or len(members) == 1:
            return None
        del members[victim]
        seat = block.coordinator if block.coordinator and block.coordinator.coordinator in members else None
        committee = rule.weigh(members, None if seat is None else seat.coordinator, ledger.credit)
        return structs.replace(block, committee=committee, coordinator=seat)

    def _vote(self, liar: PeerId, block: Block, view: int, phase: int) -> None:
        disk = self.world.disks[liar]
        payload = vote_payload(RUN, block.epoch, block.round, view, phase, block.hash, disk.incarnation)
        self._count(block.hash, phase, liar, SimSigner(liar).sign(payload))

    def _count(self, block_hash: bytes, phase: int, peer: PeerId, signature: bytes) -> None:
        """Another vote for the other block; when it is a quorum, the other half hears of it."""
        view, block, leader = self._others[block_hash]
        node = self.world.nodes.get(leader)
        ballots = self._ballots[block_hash, phase]
        ballots[peer] = Ballot(peer, signature)
        if node is None or block.parent != node.follower.ledger.head.hash:
            return
        head, rule = node.follower.ledger.head, node.follower.ledger.rule
        if not rule.decided(head.committee, ballots):
            return
        said = tuple(ballots[peer] for peer in sorted(ballots))
        proof = Lock(view, block, said) if phase == PREVOTE else Commit(block, view, said)
        _, other = self._halves(sorted(head.voters - {leader}))
        for peer in other:
            self.world.send(leader, peer, proof, 1000)

    def _signed(self, node: Node, vote: Vote, block: bytes) -> Vote:
        place = (RUN, vote.epoch, vote.round, vote.view, vote.phase, block, node.disk.incarnation)
        return structs.replace(vote, block=block, signature=SimSigner(node.peer).sign(vote_payload(*place)))

    def _without_lock(self, node: Node, said: ViewChange) -> ViewChange:
        place = (RUN, said.epoch, said.round, said.view, 0, b"", node.disk.incarnation)
        pledge = Pledge(node.peer, 0, b"", SimSigner(node.peer).sign(pledge_payload(*place)))
        return structs.replace(said, pledge=pledge, lock=None)
