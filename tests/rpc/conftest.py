from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from rpc_pairs import Pair, libp2p_pair, memory_pair


@pytest.fixture(params=["memory", "libp2p"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    async with memory_pair() if request.param == "memory" else libp2p_pair() as both:
        yield both
