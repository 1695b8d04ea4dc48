"""The admin side has the OpenAI endpoint, for its own page: who may ask, and what is told while there is none."""

from __future__ import annotations

import pytest
from admin_support import asking, free_port, served

from kwaainet_bridge.admin_address import TcpAddress


@pytest.mark.parametrize("origin", ["https://evil.example", "http://127.0.0.1:1", "null"])
async def test_pages_of_other_sites_may_not_ask(origin):
    address = TcpAddress("127.0.0.1", free_port())
    async with served(address), asking(address) as client:
        for ask in (client.get, client.post):
            refused = await ask("/api/status", headers={"Origin": origin})
            assert refused.status_code == 403
            assert "open this node's own page" in refused.text
        assert (await client.get("/api/status", headers={"Origin": address.url})).status_code == 200
