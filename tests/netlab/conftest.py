"""Fixtures of the laboratory, and whether there can be one here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# how child processes and stock peers are started is written down there
sys.path.append(str(Path(__file__).parents[1] / "interop"))

from lab import Lab, why_not
from lab_peers import StockPeers
from stock_swarm import StockEnvironment


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skips where the system forbids network namespaces. A tool that is missing fails."""
    reason = why_not()
    if reason is not None:
        pytest.skip(f"network namespaces are not permitted: {reason}. Run as root, or under `unshare -r`")


@pytest.fixture
def lab(namespaces: None, tmp_path: Path) -> Iterator[Lab]:
    with Lab(tmp_path) as lab:
        yield lab


@pytest.fixture(scope="session")
def stock(namespaces: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StockPeers]:
    """Starts stock peers. Fails, rather than skips, where their environment is missing."""
    try:
        environment = StockEnvironment.find(tmp_path_factory.mktemp("stock"))
    except FileNotFoundError as e:
        pytest.fail(str(e), pytrace=False)
    peers = StockPeers(environment)
    with peers.driver:
        yield peers
