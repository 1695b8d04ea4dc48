"""Fixtures for tests with stock peers. All processes listen on 127.0.0.1 only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from stock_swarm import StockEnvironment, StockPeer

sys.path.append(
    str(Path(__file__).parents[1] / "kwaainet")
)  # simulated peers of KwaaiNet, which has no stock ones


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test in this folder needs the stock environment."""
    for item in items:
        if item.path.parent.name == "interop":
            item.add_marker(pytest.mark.interop)


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> StockEnvironment:
    """The stock environment. Fails, rather than skips, where it is missing."""
    try:
        return StockEnvironment.find(tmp_path_factory.mktemp("stock"))
    except FileNotFoundError as e:
        pytest.fail(str(e), pytrace=False)


@pytest.fixture(scope="session")
def stock_peer(stock: StockEnvironment) -> Iterator[StockPeer]:
    """A stock Hivemind peer with the methods of ``stock/rpc_peer.py``, shared by all tests."""
    peer = StockPeer.start(stock)
    with peer.driver:
        yield peer


@pytest.fixture
def doomed_peer(stock: StockEnvironment) -> Iterator[StockPeer]:
    """Another one, for a test that kills it."""
    peer = StockPeer.start(stock)
    with peer.driver:
        yield peer
