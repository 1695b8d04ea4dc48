"""Fixtures for tests with stock peers. All processes listen on 127.0.0.1 only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from processes import Driver
from swarm import START_SECONDS, StockEnvironment


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
def rpc_peer(stock: StockEnvironment) -> Iterator[Driver]:
    """A stock Hivemind peer with the methods of ``stock/rpc_peer.py``; ``ready`` is its address book entry."""
    with stock.script("rpc_peer.py") as driver:
        driver.ready = driver.event("ready", within=START_SECONDS)
        yield driver
