"""The keeping of places at relays, in simulated time, over a host that only pretends."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, RemoteError
from kwaainet_bridge.net.addresses import Address
from kwaainet_bridge.net.relays import RelayKeeper
from kwaainet_bridge.wire.circuit import HOP, HopMessage, HopType, Status, encode_hop
from kwaainet_bridge.wire.peer_id import PeerId


class Relay:
    """Grants places for ``seconds``, or fails."""

    def __init__(self, number: int) -> None:
        self.peer = PeerId(b"\x12\x20" + bytes([number]) * 32)
        self.seconds = 3600.0
        self.error: NetworkError | RemoteError | None = None
        self.gone = trio.Event()
        self.host = "8.8.8.8"
        self.offers = True
        self.silent = False
        self.asked: list[float] = []


class Network:
    """What a keeper sees of its host, with streams that only pretend."""

    def __init__(self, relays: Sequence[Relay]) -> None:
        self.relays = {other.peer: other for other in relays}
        self.protected: list[PeerId] = []

    def direct_peers(self, protocol: str) -> list[PeerId]:
        assert protocol == HOP
        relays = self.relays.values()
        return [other.peer for other in relays if other.offers and not other.gone.is_set()]

    async def open_direct_stream(self, peer: PeerId, _addresses, _protocol) -> FakeStream:
        other = self.relays[peer]
        other.asked.append(trio.current_time())
        if other.error is not None:
            raise other.error
        if other.silent:
            await trio.sleep_forever()
        expires = max(0, min(int(trio.current_time() + other.seconds), 2**64 - 1))
        return FakeStream(
            peer, encode_hop(HopMessage(HopType.STATUS, status=Status.OK, expires=expires, addresses=()))
        )

    async def wait_disconnected(self, peer: PeerId) -> None:
        await self.relays[peer].gone.wait()

    def where(self, peer: PeerId) -> list[Address]:
        return [Address("ip4", self.relays[peer].host, 4001)]

    def protect(self, peer: PeerId, _tag: str) -> None:
        self.protected.append(peer)

    def unprotect(self, peer: PeerId, _tag: str) -> None:
        self.protected.remove(peer)


class FakeStream:
    protocol = HOP

    def __init__(self, remote: PeerId, answer: bytes) -> None:
        self.remote = remote
        self._answer = answer

    async def write(self, data: bytes) -> None:
        assert data == encode_hop(HopMessage(HopType.RESERVE))

    async def read(self, _: int) -> bytes:
        return self._answer

    def close_now(self) -> None:
        pass


@asynccontextmanager
async def keeping(network: Network) -> AsyncIterator[tuple[RelayKeeper, list[int]]]:
    changes: list[int] = []
    keeper = RelayKeeper(
        network,
        changed=lambda: changes.append(len(keeper.reservations)),
        clock=trio.current_time,
        rng=random.Random(1),
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.run)
        yield keeper, changes
        nursery.cancel_scope.cancel()


async def test_nothing_is_reserved_unasked(autojump_clock) -> None:
    one = Relay(1)
    async with keeping(Network([one])) as (keeper, _):
        await trio.sleep(1000)
        assert not one.asked
        assert keeper.addresses == []


async def test_places_are_renewed_before_they_expire(autojump_clock) -> None:
    relays = [Relay(n) for n in range(3)]
    network = Network(relays)
    async with keeping(network) as (keeper, changes):
        keeper.want(True)
        await trio.sleep(4 * 3600)
        held = [other for other in relays if other.asked]
        assert len(held) == defaults.RELAYS_WANTED
        for other in held:
            gaps = [b - a for a, b in zip(other.asked, other.asked[1:], strict=False)]
            assert 4 <= len(gaps) <= 5
            assert max(gaps) <= 3600 - defaults.RELAY_RENEWAL_SECONDS + 1
        assert changes == [1, 2]  # nobody is told of mere renewals
        assert len(keeper.addresses) == 2
        keeper.want(False)
        await trio.sleep(1)
        assert keeper.addresses == []
        assert network.protected == []


async def test_a_relay_that_fails_is_replaced(autojump_clock) -> None:
    relays = [Relay(n) for n in range(3)]
    async with keeping(Network(relays)) as (keeper, _):
        keeper.want(True)
        await trio.sleep(1)
        lost = next(other for other in relays if other.asked)
        lost.gone.set()
        await trio.sleep(defaults.RELAY_LOOK_SECONDS + 1)
        assert len(keeper.reservations) == 2
        assert not keeper.holds(lost.peer)
        refusing = next(other for other in relays if keeper.holds(other.peer))
        refusing.error = RemoteError("no more")
        await trio.sleep(3600)
        assert not keeper.holds(refusing.peer)


async def test_relays_that_refuse_are_not_pestered(autojump_clock) -> None:
    one = Relay(1)
    one.error = RemoteError("full")
    async with keeping(Network([one])) as (keeper, changes):
        keeper.want(True)
        await trio.sleep(600)
        assert len(one.asked) <= 600 / defaults.RELAY_RETRY_SECONDS + 1
        one.error = None
        await trio.sleep(2 * defaults.RELAY_RETRY_SECONDS)
        assert keeper.holds(one.peer)
        assert changes == [1]


async def test_places_that_have_expired_already_do_not_make_it_ask_without_end(autojump_clock) -> None:
    one = Relay(1)
    one.seconds = -3600
    async with keeping(Network([one])) as (keeper, _):
        keeper.want(True)
        await trio.sleep(100)
        assert len(one.asked) <= 100 / defaults.RELAY_LOOK_SECONDS + 1


async def test_places_that_never_expire_are_renewed_all_the_same(autojump_clock) -> None:
    """Their relay's clock is wrong, or it lies."""
    one = Relay(1)
    one.seconds = 2.0**70
    async with keeping(Network([one])) as (keeper, _):
        keeper.want(True)
        await trio.sleep(4 * 3600)
        assert 4 <= len(one.asked) <= 6


async def test_a_relay_that_never_answers_is_given_up(autojump_clock) -> None:
    one = Relay(1)
    one.silent = True
    async with keeping(Network([one])) as (keeper, _):
        keeper.want(True)
        await trio.sleep(1)
        assert keeper.holds(one.peer)
        await trio.sleep(defaults.RELAY_ANSWER_SECONDS)
        assert not keeper.holds(one.peer)


async def test_a_relay_that_offers_no_more_is_replaced(autojump_clock) -> None:
    """It stays connected, and nobody gets through it any more."""
    relays = [Relay(n) for n in range(3)]
    async with keeping(Network(relays)) as (keeper, _):
        keeper.want(True)
        await trio.sleep(1000)
        ended = next(other for other in relays if keeper.holds(other.peer))
        ended.offers = False
        await trio.sleep(2 * defaults.RELAY_LOOK_SECONDS)
        assert {held.relay for held in keeper.reservations} == {r.peer for r in relays if r is not ended}


async def test_a_relay_that_was_good_is_asked_again_as_soon_as_it_is_back(autojump_clock) -> None:
    one = Relay(1)
    async with keeping(Network([one])) as (keeper, _):
        keeper.want(True)
        await trio.sleep(1000)
        one.gone.set()
        await trio.sleep(1)
        one.gone = trio.Event()
        await trio.sleep(defaults.RELAY_LOOK_SECONDS)
        assert keeper.reservations
        one.gone.set()  # one that is lost all the time is not
        one.gone = trio.Event()
        await trio.sleep(2 * defaults.RELAY_LOOK_SECONDS)
        assert not keeper.reservations


async def test_relays_of_the_same_network_come_last(autojump_clock) -> None:
    """Nobody outside gets to them."""
    neighbours = [Relay(n) for n in range(20)]
    outside = [Relay(n) for n in range(20, 22)]
    for other in neighbours:
        other.host = "192.168.1.7"
    async with keeping(Network([*neighbours, *outside])) as (keeper, _):
        keeper.want(True)
        await trio.sleep(1)
        assert {held.relay for held in keeper.reservations} == {other.peer for other in outside}
