"""Our host, our node and a stock peer over links that lose packets, fall silent, or come back as others."""

from __future__ import annotations

import pytest
import trio
from child_processes import PeerError
from lab import Lab
from lab_peers import PORT, StockPeers, eventually, our_node, our_peer, said

pytestmark = [pytest.mark.slow, pytest.mark.interop]

LARGE = 4 << 20
SHORT_CUT_SECONDS = 3.0  # retransmissions are 3 s apart by then


async def test_every_tenth_packet_is_lost(lab: Lab, stock: StockPeers) -> None:
    here, there = lab.host("here"), lab.host("there")
    ours, theirs = await our_peer(here), await stock.start(there)
    here.link.loss(10)
    await ours.do("connect", address=theirs.address)
    for _ in range(5):
        await ours.do("unary", peer=theirs.id)
        await theirs.do("unary", peer=ours.id)
    async with trio.open_nursery() as nursery:
        for caller, called in ((ours, theirs), (theirs, ours)):
            nursery.start_soon(lambda a=caller, b=called: a.do("call", peer=b.id, size=LARGE))


async def test_calls_outlast_a_short_cut(lab: Lab, stock: StockPeers) -> None:
    """TCP alone bridges it: the connections stay, and calls that began meanwhile are answered."""
    here, there = lab.host("here"), lab.host("there")
    ours, theirs = await our_peer(here), await stock.start(there)
    await ours.do("connect", address=theirs.address)
    before = await ours.do("connections")
    here.link.cut()
    took: list[float] = []

    async def call(caller, called) -> None:
        took.append(await caller.do("unary", peer=called.id))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call, ours, theirs)
        nursery.start_soon(call, theirs, ours)
        await trio.sleep(SHORT_CUT_SECONDS)
        assert took == []
        here.link.mend()
    assert [c["address"] for c in await ours.do("connections")] == [c["address"] for c in before]


async def test_our_host_comes_back_after_its_router_forgot_it(lab: Lab, stock: StockPeers) -> None:
    """Its old connection is refused. It dials its bootstrap peer again and is found by its id, as before."""
    router = lab.nat("router", "symmetric")
    inside = router.host("inside")
    router.forward_port(PORT, inside)
    bootstrap = await stock.start(lab.host("bootstrap"))
    ours = await our_peer(inside, announce=[router.at(PORT)])
    await ours.do("keep", addresses=[bootstrap.address])
    await ours.driver.aevent("kept", error=None)
    await eventually(bootstrap, "unary", lambda _: True, within=10, peer=ours.id)
    router.forget()
    with pytest.raises(PeerError):
        await ours.do("unary", peer=bootstrap.id)
    await ours.driver.aevent("kept", error=None)
    await ours.do("unary", peer=bootstrap.id)
    stranger = await stock.start(lab.host("stranger"), initial_peers=[bootstrap.address])
    await stranger.do("call", peer=ours.id)


async def test_both_sides_notice_a_dead_link_and_recover(lab: Lab, stock: StockPeers) -> None:
    """Takes a minute of real time: keep-alive pings go out every 30 s, and our side waits 30 s for an answer."""
    home = lab.host("home")
    bootstrap = await stock.start(lab.host("bootstrap"))
    await bootstrap.do("dht", initial_peers=[])
    node = our_node(home, "node", networks={"petals": {"bootstrap": [bootstrap.address]}})
    await said(node, '"event": ?"bootstrap peer reached"')
    ours = await our_peer(home, listen=[home.at(PORT + 1)])
    await ours.do("connect", address=bootstrap.address)
    assert len(await bootstrap.do("connections")) == 2
    home.link.cut()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: eventually(bootstrap, "connections", lambda c: c == [], within=75))
        nursery.start_soon(lambda: ours.do("gone", peer=bootstrap.id, within=75))
        nursery.start_soon(lambda: said(node, '"event": ?"bootstrap peer lost"', within=75))
    home.link.mend()
    await said(node, '"event": ?"recovered"')
    await ours.do("connect", address=bootstrap.address)
    await ours.do("unary", peer=bootstrap.id)
    stranger = await stock.start(lab.host("stranger"), initial_peers=[bootstrap.address])
    await stranger.do("dht", initial_peers=[bootstrap.address])
    node_id = await said(node, rf"/tcp/{PORT}/p2p/(\w+)")
    assert node_id in await stranger.do("routes")
