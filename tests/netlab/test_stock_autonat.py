"""AutoNAT between our host and stock peers with public addresses, and through NAT routers."""

from __future__ import annotations

from typing import Any

import pytest
from lab import Host, Lab
from lab_peers import PORT, Peer, StockPeers, eventually, our_peer

pytestmark = [pytest.mark.slow, pytest.mark.interop]

FIRST_QUESTION_SECONDS = (
    60  # until a stock peer has asked, and was dialled back; it takes two, and 10 in vain
)


async def verdict(host: Host, stock: StockPeers, server: Host, **options: Any) -> list[Any]:
    """What a stock peer on ``server`` says about ours on ``host``."""
    theirs = await stock.start(server, auto_nat=True)
    ours = await our_peer(host, **options)
    await ours.do("connect", address=theirs.address)
    return await ours.do("reachable", peer=theirs.id)


async def test_a_stock_peer_reaches_our_public_host(lab: Lab, stock: StockPeers) -> None:
    host = lab.host("host")
    assert await verdict(host, stock, lab.host("server")) == [True, host.at(PORT), ""]


async def test_a_stock_peer_does_not_reach_our_host_behind_a_router(lab: Lab, stock: StockPeers) -> None:
    inside = lab.nat("router", "symmetric").host("inside")
    reachable, address, text = await verdict(inside, stock, lab.host("server"))
    assert (reachable, address) == (False, None)
    assert "dial" in text


@pytest.mark.parametrize("announced", [True, False])
async def test_a_stock_peer_reaches_it_through_a_forwarded_port(
    lab: Lab, stock: StockPeers, announced: bool
) -> None:
    """Told or not: it tries the named ports at the address that it sees."""
    router = lab.nat("router", "symmetric")
    inside = router.host("inside")
    router.forward_port(PORT, inside)
    options = {"announce": [router.at(PORT)]} if announced else {}
    assert await verdict(inside, stock, lab.host("server"), **options) == [True, router.at(PORT), ""]


async def dialled_back(
    lab: Lab, stock: StockPeers, host: Host, **options: Any
) -> tuple[Peer, dict[str, Any]]:
    """A stock peer on ``host`` that knows a public host of ours, and whom that has dialled back."""
    ours = await our_peer(lab.host("server"))
    await ours.do("dial_back")
    theirs = await stock.start(host, auto_nat=True, initial_peers=[ours.address], **options)
    [entry, *_] = await eventually(
        ours, "dialled", lambda entries: len(entries) > 0, within=FIRST_QUESTION_SECONDS
    )
    return theirs, entry


async def test_our_host_reaches_a_stock_peer_that_asks(lab: Lab, stock: StockPeers) -> None:
    host = lab.host("host")
    theirs, entry = await dialled_back(lab, stock, host)
    assert entry["peer"] == theirs.id
    assert entry["outcome"] == host.at(PORT)


async def test_our_host_does_not_reach_a_stock_peer_behind_a_router(lab: Lab, stock: StockPeers) -> None:
    router = lab.nat("router", "symmetric")
    theirs, entry = await dialled_back(lab, stock, router.host("inside"))
    assert entry["peer"] == theirs.id
    assert all(address.startswith(f"/ip4/{router.address}/tcp/") for address in entry["asked"])
    assert "no answer within 10 s" in entry["outcome"]
