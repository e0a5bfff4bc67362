"""Who signed which model to be that after a round, of the newest rounds: what proves a model to one who joins."""

from collections.abc import Mapping

from dugnad.coordinator.effects import Effect, Keep, Refused
from dugnad.coordinator.ledger import Ledger
from dugnad.coordinator.messages import Applied, Ballot, applied_payload
from dugnad.coordinator.votes import Signer
from dugnad.dht.identity import PeerId

SHOWN_ROUNDS = 8
"""Of how many rounds the signed model digests are kept to show to joiners."""


class Vouched:
    """What peers signed to have applied, of the newest rounds of `ledger`."""

    def __init__(self, ledger: Ledger, signer: Signer) -> None:
        self.said: dict[int, dict[PeerId, Applied]] = {}
        """round -> peer -> what it said it applied."""
        self._ledger = ledger
        self._signer = signer

    def restore(self, said: Mapping[int, Mapping[PeerId, Applied]]) -> None:
        """Take up what this peer's own disk kept."""
        self.said.update({round_: dict(by_peer) for round_, by_peer in said.items()})

    def take(self, sender: PeerId, said: Applied, *, is_here: bool) -> list[Effect]:
        """Check what a peer signed, and keep it if the peer is here or has a vote."""
        ledger = self._ledger
        if said.block != ledger.block_hash(said.round):
            return [Refused(sender, "foreign chain", f"it applied another block of round {said.round}, or an old one")]
        payload = applied_payload(ledger.run, said.round, said.block, said.model)
        if not self._signer.verify(sender, payload, said.signature):
            return [Refused(sender, "bad signature", f"model digest after round {said.round}")]
        kept: list[Effect] = []
        known_here = is_here or sender in (self._signer.peer_id, *ledger.head.voters)
        if known_here and said.round > ledger.head.round - SHOWN_ROUNDS:
            known = self.said.setdefault(said.round, {})
            if sender not in known or known[sender].model != said.model:  # said again, it may have forgotten its cost
                known[sender] = said
                kept = [Keep(sender, said)]
        for old in [r for r in self.said if r <= ledger.head.round - SHOWN_ROUNDS]:
            del self.said[old]
        return kept

    def ballots(self, round_: int, model: bytes) -> tuple[Ballot, ...]:
        """Who of those that vote next signed that `model` is the digest after `round_`."""
        said, voters = self.said.get(round_, {}), self._ledger.head.voters
        signed = (peer for peer in said if said[peer].model == model and peer in voters)
        return tuple(Ballot(peer, said[peer].signature) for peer in signed)
