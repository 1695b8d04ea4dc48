from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# how stock peers are started is written down there
sys.path.append(str(Path(__file__).parents[1] / "interop"))
# what adapters are made of
sys.path.append(str(Path(__file__).parents[1] / "engine"))


@pytest.fixture(scope="session")
def client_stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """The stock environment. Fails, rather than skips, where it is missing."""
    from stock_swarm import StockEnvironment

    try:
        yield StockEnvironment.find(tmp_path_factory.mktemp("client-stock"))
    except FileNotFoundError as e:
        pytest.fail(str(e), pytrace=False)
