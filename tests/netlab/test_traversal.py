"""Ways through NAT routers: relays of either kind, and hole punching between two routers."""

from __future__ import annotations

from typing import Any

import pytest
from lab import Lab
from lab_peers import Peer, StockPeers, eventually, our_peer

from kwaainet_bridge import defaults
from kwaainet_bridge.wire.circuit import DCUTR

pytestmark = pytest.mark.slow

MANY = 1 << 20


def direct(peer: Peer) -> Any:
    return lambda connections: any(c["peer"] == peer.id and c["relay"] is None for c in connections)


async def hidden_peer(lab: Lab, name: str, kind: str, *relays: Peer) -> Peer:
    """A host of ours behind a router of its own, connected to relays."""
    peer = await our_peer(lab.nat(f"{name}-router", kind).host(name))
    for relay in relays:
        await peer.do("connect", address=relay.address)
    return peer


async def hide(peer: Peer) -> str:
    """Have it take places at relays; the address through the first of them."""
    await peer.do("hide")
    addresses = await eventually(peer, "addresses", lambda a: "/p2p-circuit/" in a[-1], within=20)
    return next(a for a in addresses if "/p2p-circuit/" in a)


async def our_relay(lab: Lab, name: str = "relay") -> Peer:
    relay = await our_peer(lab.host(name))
    await relay.do("relay")
    return relay


@pytest.mark.interop
async def test_behind_a_nat_a_stock_peer_calls_us_through_a_stock_relay(lab: Lab, stock: StockPeers) -> None:
    relay = await stock.start(lab.host("relay"))
    hidden = await hidden_peer(lab, "hidden", "symmetric", relay)
    address = await hide(hidden)
    assert address == f"{relay.address}/p2p-circuit/p2p/{hidden.id}"
    caller = await stock.start(lab.host("caller"), initial_peers=[relay.address])
    # it has to find out where we are, from the relay, which may not have heard that yet
    await eventually(caller, "unary", bool, within=20, peer=hidden.id)
    assert relay.id in {c["relay"] for c in await hidden.do("connections") if c["peer"] == caller.id}
    # the caller can be dialled, so that we need the relay no longer
    await eventually(hidden, "connections", direct(caller), within=20)
    await caller.do("call", peer=hidden.id, size=MANY)


@pytest.mark.interop
async def test_behind_a_nat_a_stock_peer_is_called_through_our_relays(lab: Lab, stock: StockPeers) -> None:
    relays = [await our_relay(lab, f"relay{n}") for n in range(4)]  # with fewer a daemon waits for minutes
    addresses = [relay.address for relay in relays]
    hidden = await stock.start(
        lab.nat("router", "cone").host("hidden"),
        initial_peers=addresses,
        trusted_relays=addresses,
        use_auto_relay=True,
        force_reachability="private",
    )
    caller = await our_peer(lab.host("caller"))
    for relay in relays:
        await caller.do("connect", address=relay.address)
    await eventually(caller, "unary", bool, within=30, peer=hidden.id)
    await caller.do("call", peer=hidden.id, size=MANY)
    assert {c["relay"] for c in await caller.do("connections") if c["peer"] == hidden.id} <= {
        r.id for r in relays
    }


async def test_a_hole_is_punched_through_two_routers(lab: Lab) -> None:
    relay = await our_relay(lab)
    one, two = [await hidden_peer(lab, name, "cone", relay) for name in ("one", "two")]
    address = await hide(one)
    await two.do("connect", address=address)
    await eventually(two, "connections", direct(one), within=20)
    await eventually(one, "connections", direct(two), within=20)
    await two.do("call", peer=one.id, size=MANY)
    relay.driver.kill()
    await two.do("call", peer=one.id, size=MANY)


async def test_where_no_hole_can_be_punched_the_relay_goes_on(lab: Lab) -> None:
    relay = await our_relay(lab)
    one, two = [await hidden_peer(lab, name, "symmetric", relay) for name in ("one", "two")]
    address = await hide(one)
    await two.do("connect", address=address)
    await two.do("call", peer=one.id, size=MANY)
    assert not direct(one)(await two.do("connections"))


async def test_a_relay_that_dies_is_replaced(lab: Lab) -> None:
    first, second, third = [await our_relay(lab, f"relay{n}") for n in range(3)]
    hidden = await hidden_peer(lab, "hidden", "symmetric", first, second, third)
    await hide(hidden)
    relays = {relay.id: relay for relay in (first, second, third)}

    def places(addresses: list[str]) -> set[str]:
        return {a.split("/p2p/")[1].partition("/")[0] for a in addresses if "/p2p-circuit/" in a}

    held = places(
        await eventually(hidden, "addresses", lambda a: len(places(a)) == defaults.RELAYS_WANTED, within=20)
    )
    lost = next(iter(held))
    relays[lost].driver.kill()
    await eventually(
        hidden,
        "addresses",
        lambda a: len(places(a)) == defaults.RELAYS_WANTED and lost not in places(a),
        within=20,
    )
    caller = await our_peer(lab.host("caller"))
    addresses = await hidden.do("addresses")
    await caller.do("add", peer=hidden.id, addresses=addresses)
    await caller.do("call", peer=hidden.id, size=MANY)


async def stock_behind_a_router(lab: Lab, stock: StockPeers, relays: list[Peer], **options: Any) -> Peer:
    """A stock peer that punches holes: it does once four peers have seen it at one public address."""
    peer = await stock.start(
        lab.nat("their-router", "cone").host("theirs"),
        initial_peers=[relay.address for relay in relays],
        auto_nat=True,
        **options,
    )
    for relay in relays:
        await peer.do("connect", address=relay.address)
    await eventually(relays[0], "protocols", lambda p: DCUTR in p, within=30, peer=peer.id)
    return peer


@pytest.mark.interop
async def test_a_stock_peer_behind_a_router_calls_and_a_hole_is_punched(lab: Lab, stock: StockPeers) -> None:
    """We begin, since the relay was asked for us."""
    relay, *others = [await our_relay(lab, f"relay{n}") for n in range(5)]
    theirs = await stock_behind_a_router(lab, stock, [relay, *others])
    ours = await hidden_peer(lab, "ours", "cone", relay)
    await hide(ours)
    await eventually(relay, "known", lambda a: any("/p2p-circuit" in x for x in a), within=20, peer=ours.id)
    await eventually(theirs, "unary", bool, within=20, peer=ours.id)
    await eventually(ours, "connections", direct(theirs), within=25)
    relay.driver.kill()
    await theirs.do("call", peer=ours.id, size=MANY)


@pytest.mark.interop
async def test_a_stock_peer_behind_a_router_is_called_and_punches_a_hole(lab: Lab, stock: StockPeers) -> None:
    """It begins, since the relay was asked for it."""
    relays = [await our_relay(lab, f"relay{n}") for n in range(5)]
    addresses = [relay.address for relay in relays]
    theirs = await stock_behind_a_router(
        lab, stock, relays, trusted_relays=addresses, use_auto_relay=True, force_reachability="private"
    )
    ours = await hidden_peer(lab, "ours", "cone", *relays)
    await eventually(
        relays[0], "known", lambda a: any("/p2p-circuit" in x for x in a), within=30, peer=theirs.id
    )
    await eventually(ours, "unary", bool, within=30, peer=theirs.id)
    await eventually(ours, "connections", direct(theirs), within=25)
    await ours.do("call", peer=theirs.id, size=MANY)
