"""Every compression through a stock Hivemind expert server: its decoder takes what we encode, ours what it does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import torch
import trio
from stock_swarm import START_SECONDS, StockEnvironment, StockPeer

from kwaainet_bridge import defaults
from kwaainet_bridge.compression import CompressionType, decode, encode
from kwaainet_bridge.errors import HandlerError
from kwaainet_bridge.net import HostConfig, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.rpc import RpcClient, streaming, unary
from kwaainet_bridge.wire.expert import ExpertRequest, ExpertResponse
from kwaainet_bridge.wire.peer_id import PeerId
from kwaainet_bridge.wire.tensors import TensorJoiner, decode_tensor, encode_tensor, split_tensor

FORWARD = unary("ConnectionHandler.rpc_forward", ExpertRequest, ExpertResponse)
FORWARD_STREAM = streaming("ConnectionHandler.rpc_forward_stream", ExpertRequest, ExpertResponse)
HIDDEN = 512


@pytest.fixture(scope="module")
def expert_server(stock: StockEnvironment) -> Iterator[StockPeer]:
    with stock.script("expert_server.py").killed_on_failure() as driver:
        ready = driver.event("ready", within=START_SECONDS)
    with driver:
        yield StockPeer(ready["peer"], ready["addresses"][0], driver)


@asynccontextmanager
async def connected(server: StockPeer) -> AsyncIterator[tuple[RpcClient, PeerId]]:
    async with open_host(HostConfig(Identity.generate("ed25519"), listen=())) as host:
        with trio.fail_after(60):
            yield RpcClient(host), await host.connect(server.address)


def there_and_back(tensor: torch.Tensor, compression: CompressionType) -> torch.Tensor:
    """What comes back if both encoders and both decoders agree to the bit."""
    return decode(encode(decode(encode(tensor, compression)), compression))


def assert_the_same(answer: torch.Tensor, sent: torch.Tensor, compression: CompressionType) -> None:
    expected = there_and_back(sent, compression)
    if compression == CompressionType.QUANTILE_8BIT:  # numpy 2 may cut between other values than numpy 1
        torch.testing.assert_close(answer, expected, atol=0.05, rtol=0.05)
    elif compression == CompressionType.UNIFORM_8BIT:
        # A stock server encodes its outputs in place and so takes the mean off the codebook, but not off the codes.
        lost = decode(encode(sent, compression)).mean()
        torch.testing.assert_close(answer, expected - lost, atol=1e-3, rtol=0)  # sums of float32
    else:
        assert torch.equal(answer, expected)


@pytest.mark.parametrize("compression", list(CompressionType), ids=lambda c: c.name)
async def test_unary(compression: CompressionType, expert_server: StockPeer):
    sent = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(9))
    request = ExpertRequest(uid=f"codec.{compression:d}", tensors=[encode_tensor(sent, compression)])
    async with connected(expert_server) as (client, peer):
        response = await client.call(peer, FORWARD, request, timeout=30)
    [answer] = response.tensors
    assert answer.compression == compression
    assert_the_same(decode_tensor(answer), sent, compression)


@pytest.mark.parametrize("compression", list(CompressionType), ids=lambda c: c.name)
async def test_streamed(compression: CompressionType, expert_server: StockPeer):
    """More than fits one message."""
    sent = torch.randn(4096, HIDDEN, generator=torch.Generator().manual_seed(10))
    parts = split_tensor(encode_tensor(sent, compression))
    uid = f"codec.{compression:d}"
    joiner = TensorJoiner(16 * defaults.MIB)
    answers = []
    async with (
        connected(expert_server) as (client, peer),
        client.stream(peer, FORWARD_STREAM, open_timeout=10) as stream,
    ):
        for part in parts:
            await stream.send(ExpertRequest(uid=uid, tensors=[part]))
        await stream.end()
        async for response in stream:
            for tensor in response.tensors:
                answers += joiner.feed(tensor)
    [answer] = answers + joiner.finish()
    assert_the_same(decode_tensor(answer), sent, compression)


async def test_a_stock_decoder_refuses_what_is_cut_short(expert_server: StockPeer):
    tensor = encode_tensor(torch.ones(1, HIDDEN), CompressionType.BLOCKWISE_8BIT)
    tensor.values = [bytes(tensor.buffer)[:100]]
    async with connected(expert_server) as (client, peer):
        with pytest.raises(HandlerError):
            await client.call(peer, FORWARD, ExpertRequest(uid="codec.5", tensors=[tensor]), timeout=30)
