"""Tensors that are sent and received over /kwaai/tensor/1.0.0."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import torch
import trio
import trio.testing
from kwaai_world import bare_server

from kwaainet_bridge import defaults
from kwaainet_bridge.compression.kwaai import dequantise_blocks
from kwaainet_bridge.errors import (
    CompressionError,
    DeadlineExceeded,
    ProtocolNotSupported,
    RemoteError,
    StreamReset,
)
from kwaainet_bridge.kwaai.server import KwaaiProtocols
from kwaainet_bridge.kwaai.tensor import send_tensor
from kwaainet_bridge.wire.kwaai_tensor import PROTOCOL, KwaaiTensorMessage, TensorMessageType, encode_frame

GOLDEN = bytes.fromhex(
    "000000550000000001000000000000006701040000000000000000408120010000000000000008240100000000000000040000"
    "000000000040000000000000000100000000000000040000000000000001000000000000006d"
)


class Taker:
    def __init__(self):
        self.taken = []
        self.gate = None

    async def __call__(self, peer, message):
        if self.gate is not None:
            await self.gate.wait()
        self.taken.append((peer, message))


@asynccontextmanager
async def receiver():
    taker = Taker()
    async with bare_server(KwaaiProtocols(tensor=taker)) as (world, server, address):
        yield world, server, address, taker


async def test_a_tensor_arrives():
    async with receiver() as (world, server, address, taker):
        values = torch.randn(3, 5, 70, generator=torch.Generator().manual_seed(0))
        await send_tensor(world.host(), address, "weights", values, metadata="step 3", timeout=5)
        [(sender, message)] = taker.taken
        assert sender == world.host().peer_id
        assert (message.name, message.metadata, message.shape) == ("weights", "step 3", (3, 5, 70))
        error = (dequantise_blocks(message.tensor) - values).abs().max().item()
        assert error <= values.abs().max().item() / 127
        assert server._tensors._streams.used == 0
        assert server._tensors._budget.held == 0


async def test_the_golden_frame_and_its_receipt():
    async with receiver() as (world, _, address, taker):
        stream = await world.host().open_stream(address, PROTOCOL)
        for byte in GOLDEN:
            await stream.write(bytes([byte]))
        answer = b""
        while part := await stream.read(100):
            answer += part
        body = bytes.fromhex("0100000001000000000000006700000000000000000008000000000000007265636569766564")
        assert answer == len(body).to_bytes(4, "big") + body
        assert dequantise_blocks(taker.taken[0][1].tensor).tolist() == pytest.approx(
            [0, 1, -2, 0.5], abs=0.01
        )


async def test_the_receipt_waits_for_whoever_takes_it():
    async with receiver() as (world, _, address, taker):
        taker.gate = trio.Event()
        with pytest.raises(DeadlineExceeded, match=r"no receipt within 0\.1 s"):
            await send_tensor(world.host(), address, "g", torch.ones(4), timeout=0.1)


async def test_a_taker_that_refuses(caplog):
    async def take(peer, message):
        raise RemoteError("not wanted")

    async with bare_server(KwaaiProtocols(tensor=take)) as (world, _, address):
        with pytest.raises(StreamReset):
            await send_tensor(world.host(), address, "g", torch.ones(4), timeout=5)
    assert not [r for r in caplog.records if r.levelname == "ERROR"]


@pytest.mark.parametrize(
    "frame",
    [
        (2**32 - 1).to_bytes(4, "big"),
        GOLDEN[:4] + b"\x09" + GOLDEN[5:],
        GOLDEN.replace(bytes.fromhex("0824"), bytes.fromhex("007c")),
        GOLDEN.replace(bytes.fromhex("4000000000000000"), bytes(8)),
        encode_frame(KwaaiTensorMessage(TensorMessageType.REQUEST, "g")),
        encode_frame(KwaaiTensorMessage(TensorMessageType.ACK, "g")),
    ],
    ids=["length", "type", "infinite scale", "no block size", "request", "ack"],
)
async def test_what_is_no_tensor(frame):
    async with receiver() as (world, server, address, taker):
        stream = await world.host().open_stream(address, PROTOCOL)
        await stream.write(frame)
        with pytest.raises(StreamReset), trio.fail_after(5):
            await stream.read(1)
        assert taker.taken == []
        assert server._tensors._streams.used == 0


async def test_no_peer_takes_all_places():
    async with receiver() as (world, _, address, taker):
        limit = defaults.KWAAI_TENSOR_STREAMS_PER_PEER
        streams = [await world.host().open_stream(address, PROTOCOL) for _ in range(limit + 1)]
        with pytest.raises(StreamReset):
            await streams[-1].read(1)
        await send_tensor(world.host(101), address, "g", torch.ones(4), timeout=5)
        assert len(taker.taken) == 1


async def test_a_slow_sender_is_dropped(autojump_clock):
    async with receiver() as (world, server, address, _):
        stream = await world.host().open_stream(address, PROTOCOL)
        start = trio.current_time()

        async def drip():
            for byte in GOLDEN:
                await stream.write(bytes([byte]))
                await trio.sleep(10)

        with pytest.raises(StreamReset):
            await drip()
        assert trio.current_time() - start <= defaults.KWAAI_TENSOR_SECONDS + 10
        assert server._tensors._budget.held == 0


async def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(defaults, "KWAAI_TENSOR_PEER_BYTES", 300_000)
    async with receiver() as (world, server, address, _):
        with pytest.raises(StreamReset):
            await send_tensor(world.host(), address, "g", torch.ones(2_000_000), timeout=5)
        assert server._tensors._budget.held == 0


async def test_what_cannot_be_sent():
    async with receiver() as (world, _, address, _):
        with pytest.raises(CompressionError):
            await send_tensor(world.host(), address, "g", torch.tensor([float("inf")]), timeout=5)
        with pytest.raises(ValueError, match="a text of"):
            await send_tensor(world.host(), address, "g" * (1 << 17), torch.ones(1), timeout=5)


@pytest.mark.parametrize(
    "answer",
    [
        KwaaiTensorMessage(TensorMessageType.ACK, "other", metadata="received"),
        KwaaiTensorMessage(TensorMessageType.ACK, "g", metadata="no"),
        KwaaiTensorMessage(TensorMessageType.REQUEST, "g"),
    ],
    ids=["name", "text", "type"],
)
async def test_answers_that_are_no_receipt(answer):
    async with bare_server(KwaaiProtocols()) as (world, _, address):

        async def serve(stream):
            await stream.read(1 << 16)
            await stream.write(encode_frame(answer))

        world.network.hosts[address].serve(PROTOCOL, serve)
        with pytest.raises(RemoteError, match="is no receipt"):
            await send_tensor(world.host(), address, "g", torch.ones(4), timeout=5)


async def test_off_unless_there_is_a_taker():
    async with bare_server(KwaaiProtocols()) as (world, _, address):
        with pytest.raises(ProtocolNotSupported):
            await send_tensor(world.host(), address, "g", torch.ones(4), timeout=5)
