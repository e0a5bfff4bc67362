"""Which relays a peer has places at: two, spread, renewed, replaced when gone, small ones for want of better only."""

from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dugnad.dht.circuit import Reservation
from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.relays import NUM_PLACES, RENEW_S, RETRY_MOST_S, RETRY_S, SMALL_RETRY_S, Relays

ME, *OTHERS = (Identity.from_seed(bytes([number] * 32)).peer_id for number in range(9))
GOOD, SMALL = Reservation(2**32, 1800), Reservation(2**17, 120)


def address_of(peer: PeerId) -> str:
    return f"/ip4/11.0.0.{OTHERS.index(peer) + 1}/tcp/4001"


def known(peers: Iterable[PeerId] = OTHERS, me: PeerId = ME) -> Relays:
    relays = Relays(me)
    relays.know({peer: address_of(peer) for peer in peers})
    return relays


def asked(relays: Relays, now: float) -> list[PeerId]:
    return [peer for peer, _ in relays.to_ask(now=now)]


def held(relays: Relays) -> set[PeerId]:
    return {PeerId(address.split("/")[6]) for address in relays.addresses()}


def settled(relays: Relays, small: Iterable[PeerId] = (), now: float = 0.0) -> set[PeerId]:
    """Let relays grant what they have until nobody is asked any more; who has granted."""
    granted = set[PeerId]()
    while peers := asked(relays, now):
        for peer in peers:
            relays.granted(peer, SMALL if peer in small else GOOD, now=now)
            granted.add(peer)
    return granted


def test_of_many_two_are_asked_and_named_as_circuits() -> None:
    relays = known()
    assert relays.addresses() == ()
    granted = settled(relays)
    assert len(granted) == NUM_PLACES
    assert set(relays.addresses()) == {f"{address_of(peer)}/p2p/{peer}/p2p-circuit" for peer in granted}
    assert asked(relays, RENEW_S - 1) == []


def test_we_are_never_our_own_relay_and_one_that_is_there_is_enough() -> None:
    relays = Relays(ME)
    relays.know({ME: "/ip4/11.0.0.99/tcp/1", OTHERS[0]: address_of(OTHERS[0])})
    assert settled(relays) == {OTHERS[0]}


def test_the_load_spreads_over_the_relays() -> None:
    load = dict.fromkeys(OTHERS, 0)
    for number in range(400):
        me = Identity.from_seed(number.to_bytes(32)).peer_id
        for peer in settled(known(me=me)):
            load[peer] += 1
    assert min(load.values()) > 50, "of 100 each"


def test_a_place_is_renewed_and_stays() -> None:
    relays = known()
    granted = settled(relays)
    assert set(asked(relays, RENEW_S)) == granted
    for peer in granted:
        relays.granted(peer, GOOD, now=RENEW_S)
    assert held(relays) == granted


def test_a_relay_whose_connection_is_lost_is_replaced_at_once_and_others_are_left_alone() -> None:
    relays = known()
    gone, stays = sorted(settled(relays))
    relays.connected([stays], now=1.0)
    assert held(relays) == {stays}
    (instead,) = asked(relays, 1.0)
    assert instead not in (gone, stays)
    relays.granted(instead, GOOD, now=1.0)
    assert held(relays) == {stays, instead}


def test_a_relay_that_does_not_answer_a_renewal_is_replaced() -> None:
    relays = known()
    gone, stays = sorted(settled(relays))
    assert set(asked(relays, RENEW_S)) == {gone, stays}
    relays.granted(stays, GOOD, now=RENEW_S)
    relays.failed(gone, now=RENEW_S)
    assert held(relays) == {stays}
    (instead,) = asked(relays, RENEW_S)
    assert instead not in (gone, stays)


def test_one_that_fails_is_tried_again_later_and_later() -> None:
    (only,) = OTHERS[:1]
    relays, now, waits = known([only]), 0.0, list[float]()
    for _ in range(9):
        assert asked(relays, now) == [only]
        relays.failed(only, now=now)
        began = now
        while not relays.to_ask(now=now):
            now += 1.0
        waits.append(now - began)
        relays.failed(only, now=now)
        now += RETRY_MOST_S
    assert waits[0] == RETRY_S
    assert waits == sorted(waits)
    assert waits[-1] == RETRY_MOST_S


def test_one_that_was_gone_for_long_is_asked_as_soon_as_it_is_connected_again() -> None:
    (only,) = OTHERS[:1]
    relays, now = known([only]), 0.0
    settled(relays)
    while now < 1200:
        now += 1
        relays.connected([], now=now)
        for peer in asked(relays, now):
            relays.failed(peer, now=now)
    assert asked(relays, now + 1) == []
    relays.connected([only], now=now + 1)
    assert asked(relays, now + 1) == [only]


def test_one_that_refuses_is_not_asked_more_often_for_being_connected() -> None:
    (only,) = OTHERS[:1]
    relays, now, times = known([only]), 0.0, 0
    while now < 1200:
        now += 1
        relays.connected([], now=now)  # until we ask, which takes a connection
        for peer in asked(relays, now):
            times += 1
            relays.connected([only], now=now)
            relays.failed(peer, now=now)
            relays.connected([only], now=now)
    assert times < 20


def test_small_relays_count_only_while_there_is_no_better_one() -> None:
    relays = known()
    assert settled(relays, small=OTHERS) == set(OTHERS), "all were tried"
    assert len(held(relays)) == NUM_PLACES
    good = OTHERS[3]
    granted = settled(relays, small=set(OTHERS) - {good}, now=SMALL_RETRY_S)
    assert good in granted
    assert held(relays) == {good}


def test_one_that_is_open_no_longer_is_forgotten_unless_we_have_a_place_there() -> None:
    relays = known()
    granted = settled(relays)
    relays.know({})
    assert held(relays) == granted
    relays.connected([], now=1.0)
    relays.know({})
    assert asked(relays, 1000.0) == []


def test_who_has_moved_is_named_at_the_new_address() -> None:
    (only,) = OTHERS[:1]
    relays = known([only])
    settled(relays)
    relays.know({only: "/ip4/11.0.0.77/tcp/5"})
    assert relays.addresses() == (f"/ip4/11.0.0.77/tcp/5/p2p/{only}/p2p-circuit",)


class AnyOrder(RuleBasedStateMachine):
    """Whatever relays do, in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.relays = Relays(ME)
        self.open: set[PeerId] = set()
        self.asked: set[PeerId] = set()

    @rule(peers=st.sets(st.sampled_from(OTHERS)))
    def hear_of(self, peers: set[PeerId]) -> None:
        self.open = peers
        self.relays.know({peer: address_of(peer) for peer in peers})

    @rule(seconds=st.sampled_from([0.0, 1.0, RETRY_S, RENEW_S, 400.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for peer, _ in self.relays.to_ask(now=self.now):
            assert peer not in self.asked, "it was asked already"
            self.asked.add(peer)

    @rule(data=st.data(), place=st.sampled_from([GOOD, SMALL, None]))
    def answer(self, data: st.DataObject, place: Reservation | None) -> None:
        if self.asked:
            peer = data.draw(st.sampled_from(sorted(self.asked)))
            self.asked.discard(peer)
            if place is None:
                self.relays.failed(peer, now=self.now)
            else:
                self.relays.granted(peer, place, now=self.now)

    @rule(peers=st.sets(st.sampled_from(OTHERS)))
    def lose_all_but(self, peers: set[PeerId]) -> None:
        self.relays.connected(peers, now=self.now)

    @invariant()
    def no_more_than_wanted(self) -> None:
        assert len(self.relays.addresses()) <= NUM_PLACES
        assert len(set(self.relays.addresses())) == len(self.relays.addresses())

    def teardown(self) -> None:
        """Once all relays are there and willing, we have as many places as there can be."""
        self.relays.know({peer: address_of(peer) for peer in OTHERS})
        for peer in self.asked:
            self.relays.failed(peer, now=self.now)
        self.relays.connected(OTHERS, now=self.now)
        settled(self.relays, now=self.now + RETRY_MOST_S)
        assert len(held(self.relays)) == NUM_PLACES


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=30)
