"""A host behind a router that forwards its port, and announces the address outside."""

from __future__ import annotations

import pytest
from child_processes import PeerError
from lab import Lab
from lab_peers import PORT, StockPeers, our_peer

pytestmark = [pytest.mark.slow, pytest.mark.interop]

OUTER_PORT = 7000


async def test_a_stock_peer_dials_what_our_host_announces(lab: Lab, stock: StockPeers) -> None:
    router = lab.nat("router", "symmetric")
    inside = router.host("inside")
    router.forward_port(OUTER_PORT, inside, PORT)
    ours = await our_peer(inside, announce=[router.at(OUTER_PORT)])
    [announced] = await ours.do("addresses")
    assert announced == f"{router.at(OUTER_PORT)}/p2p/{ours.id}"
    theirs = await stock.start(lab.host("outside"), use_relay=False)
    await theirs.do("connect", address=announced)
    await theirs.do("call", peer=ours.id)
    [connection] = await ours.do("connections")
    assert not connection["initiator"]


async def test_where_no_port_is_forwarded_it_cannot(lab: Lab, stock: StockPeers) -> None:
    router = lab.nat("router", "symmetric")
    ours = await our_peer(router.host("inside"), announce=[router.at(OUTER_PORT)])
    [announced] = await ours.do("addresses")
    theirs = await stock.start(lab.host("outside"), use_relay=False)
    with pytest.raises(PeerError, match=r"timeout|deadline"):
        await theirs.do("connect", address=announced)
    assert await ours.do("connections") == []
