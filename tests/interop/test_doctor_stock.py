"""``doctor`` at stock peers: one with a DHT, one without."""

from __future__ import annotations

from stock_swarm import START_SECONDS, StockEnvironment, StockPeer

from kwaainet_bridge.cli.doctor import Verdict, examine, open_callee


async def test_a_stock_dht_node_passes_every_step(stock: StockEnvironment) -> None:
    with stock.script("dht_peer.py") as driver:
        driver.event("ready", within=START_SECONDS)
        theirs = await driver.aask("start", initial_peers=[])
        async with open_callee("/ip4/127.0.0.1/tcp/0") as callee:
            examination = await examine(theirs["addresses"][0], callee=callee)
        await driver.aask("shutdown")
    verdicts = {step.name: step.verdict for step in examination.steps}
    assert verdicts.pop("dns") is Verdict.SKIPPED
    assert set(verdicts.values()) == {Verdict.OK}, examination.steps
    assert abs(examination.clock_seconds) < 1


async def test_a_stock_peer_without_a_dht_fails_at_its_ping(stock_peer: StockPeer) -> None:
    examination = await examine(stock_peer.address)
    assert examination.failed == "dht ping"
    assert examination.clock_seconds is None
