"""A link that loses every tenth packet."""

from __future__ import annotations

import pytest
from lab import Lab
from lab_peers import StockPeers, our_peer

pytestmark = [pytest.mark.slow, pytest.mark.interop]

LARGE = 4 << 20


async def test_calls_and_a_large_transfer(lab: Lab, stock: StockPeers) -> None:
    here, there = lab.host("here"), lab.host("there")
    ours = await our_peer(here)
    theirs = await stock.start(there)
    here.link.loss(10)
    await ours.do("connect", address=theirs.address)
    for _ in range(10):
        await ours.do("unary", peer=theirs.id)
        await theirs.do("unary", peer=ours.id)
    print(await ours.do("call", peer=theirs.id, size=LARGE))
    print(await theirs.do("call", peer=ours.id, size=LARGE))
