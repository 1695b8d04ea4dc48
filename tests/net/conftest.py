from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from echo_protocol import echo
from raw_sockets import close_all

from kwaainet_bridge.net import Host, HostConfig, open_host
from kwaainet_bridge.net.identity import Identity


@pytest.fixture(autouse=True)
def no_socket_stays_open() -> Iterator[None]:
    yield
    close_all()


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
