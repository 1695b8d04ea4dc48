"""/kwaai/tensor/2.0.0 between real hosts: every codec, large tensors in bounded memory, peers without it."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import kwaai_tensor2_by_hand as hand
import pytest
import torch
import trio
from rpc_pairs import libp2p_pair
from tensor2_world import ByHand, Inbox

from kwaainet_bridge.errors import ProtocolNotSupported, RemoteError, StreamClosed, TensorRefused
from kwaainet_bridge.kwaai.server import KwaaiProtocols, serve_kwaai
from kwaainet_bridge.kwaai.tensor import send_tensor
from kwaainet_bridge.kwaai.tensor2 import TensorInbox
from kwaainet_bridge.kwaai.tensor2_client import open_tensor_stream, send_tensors
from kwaainet_bridge.net import HostConfig, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.wire.kwaai_tensor2 import PROTOCOL
from kwaainet_bridge.wire.kwaai_tensor2_values import Compression

MIB = 1 << 20
PEER = Path(__file__).parent / "tensor2_peer.py"


@asynccontextmanager
async def two_hosts(**protocols):
    inbox = Inbox()
    if not protocols:
        protocols = {"tensor2": TensorInbox(take=inbox.take, want=inbox.want)}
    async with (
        libp2p_pair() as pair,
        serve_kwaai(pair.server_host, pair.server, KwaaiProtocols(**protocols)) as server,
    ):
        yield pair, inbox, server


@pytest.mark.parametrize("compression", Compression)
async def test_every_compression_over_hosts(compression):
    tensors = {
        "activations": torch.randn(2, 300, 512),
        "one token": torch.randn(1, 1, 512),
        "empty": torch.empty(0, 512),
    }
    async with two_hosts() as (pair, inbox, server):
        await send_tensors(
            pair.client_host, pair.peer, tensors, compression=compression, top_k=0.5, timeout=60
        )
        assert sorted(inbox.names) == sorted(tensors)
        assert inbox.peers[0] == pair.client_host.peer_id
        for name, tensor in inbox.taken:
            assert (tensor.shape, tensor.dtype) == (tensors[name].shape, torch.float32)
            if tensor.numel():
                assert (tensor - tensors[name]).square().mean() <= 0.2
        assert server._exchange.memory.used == 0


async def test_tensors_are_taken_again_once_other_blocks_are_served():
    """A node that moves drains what it served before."""
    values = {"a": torch.randn(3)}
    async with two_hosts() as (pair, inbox, server):
        async with server.serving(object()):
            await server.drain()
            with pytest.raises(TensorRefused, match="the node stops"):
                await send_tensors(pair.client_host, pair.peer, values, timeout=30)
        async with server.serving(object()):
            await send_tensors(pair.client_host, pair.peer, values, timeout=30)
        assert list(inbox.names) == ["a"]


async def test_bfloat16_scalars_and_refusals_over_hosts():
    values = torch.randn(3, 100_000).to(torch.bfloat16)
    async with (
        two_hosts() as (pair, inbox, _),
        open_tensor_stream(pair.client_host, pair.peer, open_timeout=10) as sender,
    ):
        await sender.send("a", values, timeout=30)
        with pytest.raises(TensorRefused, match="not wanted"):
            await sender.send("no", values, timeout=30)
        await sender.send("s", torch.tensor(True), metadata={"ü": "é"}, timeout=30)
        (_, a), (_, s) = inbox.taken
        assert torch.equal(a, values)
        assert (s.item(), s.dtype, s.shape) == (True, torch.bool, ())
        assert inbox.asked[-1].metadata == {"ü": "é"}


async def test_a_breach_over_hosts_and_its_reason():
    async with two_hosts() as (pair, _, server):
        by_hand = ByHand(await pair.client_host.open_stream(pair.peer, PROTOCOL))
        await by_hand.write(hand.offer(1, "t", "float32", (4,), 0, 16), hand.part(1, 4, b"abcd"))
        assert await by_hand.frame() == hand.ack(1, 1)
        assert await by_hand.frame() == hand.end(9, "part at 4 where byte 0 is due")
        assert await by_hand.frame() == b""
        with trio.fail_after(10):
            while server._exchange.streams.used:  # noqa: ASYNC110 - pools have no event
                await trio.sleep(0.01)
        assert server._exchange.memory.used == 0


async def test_why_a_peer_ended_the_stream_while_we_write():
    async def serve(stream):
        by_hand = ByHand(stream)
        await by_hand.frame()
        await by_hand.write(hand.ack(1, 1))
        await by_hand.frame()
        await by_hand.write(hand.end(9, "enough"))

    async with libp2p_pair() as pair:
        pair.server_host.serve(PROTOCOL, serve)
        with pytest.raises(RemoteError, match="enough"):
            await send_tensors(pair.client_host, pair.peer, {"t": torch.zeros(10_000_000)}, timeout=30)


async def test_a_connection_that_is_cut_within_a_tensor():
    started = trio.Event()

    async def serve(stream):
        by_hand = ByHand(stream)
        await by_hand.frame()
        await by_hand.write(hand.ack(1, 1))
        started.set()
        await trio.sleep_forever()

    def config():
        return HostConfig(identity=Identity.generate("ed25519"), listen=("/ip4/127.0.0.1/tcp/0",))

    async with open_host(config()) as ours, trio.open_nursery() as nursery:

        async def other(task_status):
            with trio.CancelScope() as scope:
                async with open_host(config()) as host:
                    host.serve(PROTOCOL, serve)
                    task_status.started((host.addresses()[0], scope))
                    await trio.sleep_forever()

        address, scope = await nursery.start(other)
        peer = await ours.connect(address)

        async def cut():
            await started.wait()
            scope.cancel()

        nursery.start_soon(cut)
        with pytest.raises(StreamClosed), trio.fail_after(30):
            await send_tensors(ours, peer, {"t": torch.zeros(10_000_000)}, timeout=60)


@pytest.mark.parametrize("known", [False, True])
async def test_a_peer_of_the_first_version_only(known):
    taken = []

    async def take(peer, message):
        taken.append(message.name)

    async with two_hosts(tensor=take) as (pair, _, _):
        if known:
            await send_tensor(pair.client_host, pair.peer, "first", torch.ones(4), timeout=10)
        with pytest.raises(ProtocolNotSupported, match=r"kwaai/tensor/1\.0\.0, kwaai\.tensor\.send_tensor"):
            await send_tensors(pair.client_host, pair.peer, {"t": torch.ones(4)}, timeout=10)
        await send_tensor(pair.client_host, pair.peer, "t", torch.ones(4), timeout=10)
        assert taken == ["first", "t"][not known :]


async def test_a_peer_that_stopped_serving_it():
    """The host takes its word for what it serves, and learns of the change from the first read or write."""
    async with libp2p_pair() as pair:
        inbox = Inbox()
        inner = KwaaiProtocols(tensor2=TensorInbox(take=inbox.take))
        async with serve_kwaai(pair.server_host, pair.server, inner):
            await send_tensors(pair.client_host, pair.peer, {"t": torch.ones(4)}, timeout=10)
        for tensor in (torch.ones(4), torch.ones(1_000_000)):
            with pytest.raises(ProtocolNotSupported, match=r"kwaai\.tensor\.send_tensor"):
                await send_tensors(pair.client_host, pair.peer, {"t": tensor}, timeout=10)


class Process:
    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process

    async def line(self) -> dict:
        text = await trio.to_thread.run_sync(self._process.stdout.readline, abandon_on_cancel=True)
        assert text, "the receiving process has ended"
        return json.loads(text)


@asynccontextmanager
async def receiving_process():
    start = partial(
        subprocess.Popen, [sys.executable, PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process = await trio.to_thread.run_sync(start)
    try:
        yield Process(process)
    finally:
        process.kill()
        process.communicate()


CARRIED = [
    pytest.param(compression, dtype, id=f"{compression.name}-{str(dtype).removeprefix('torch.')}")
    for compression in Compression
    for dtype in (torch.float32, torch.bfloat16)
    if dtype is torch.float32 or compression not in (Compression.FLOAT16, Compression.MEANSTD_16BIT)
]


@pytest.mark.slow
@pytest.mark.parametrize(("compression", "dtype"), CARRIED)
async def test_64_mib_take_at_most_two_and_a_half_times_that_at_the_receiver(compression, dtype):
    """Resident memory of a process of its own; a small tensor goes before, so that nothing is loaded meanwhile."""
    shape = (64 * MIB // dtype.itemsize // 4096, 4096)
    large = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert large.nbytes == 64 * MIB
    reports = []
    async with receiving_process() as process, open_host(HostConfig(identity=Identity.generate())) as host:
        with trio.fail_after(60):
            peer = await host.connect((await process.line())["address"])
        for values in (large[:256], large):
            with trio.fail_after(120):
                await send_tensors(host, peer, {"t": values}, compression=compression, top_k=0.1, timeout=110)
                reports.append(await process.line())
    small, whole = reports
    if compression in (Compression.NONE, Compression.FLOAT16):
        expected = large.double().sum().item()
        assert whole["sum"] == pytest.approx(expected, abs=0.01 * large.numel() ** 0.5)
    times = (whole["peak"] - small["before"]) / large.nbytes
    print(f"{compression.name} of {dtype}: {times:.2f} times the tensor")
    assert times <= 2.5
