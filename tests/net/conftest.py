from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from kwaainet_bridge.net import Host, HostConfig, Stream, open_host
from kwaainet_bridge.net.identity import Identity


async def echo(stream: Stream) -> None:
    while data := await stream.read(1 << 20):
        await stream.write(data)


@pytest.fixture(scope="session")
def rsa_identity() -> Identity:
    """RSA keys take a while to find."""
    return Identity.generate("rsa")


@pytest.fixture
async def server(rsa_identity: Identity) -> AsyncIterator[Host]:
    async with open_host(HostConfig(rsa_identity)) as host:
        host.serve("Echo.run", echo)
        yield host


@pytest.fixture
async def client() -> AsyncIterator[Host]:
    async with open_host(HostConfig(Identity.generate("ed25519"))) as host:
        yield host
