"""The receiving side of /kwaai/tensor/2.0.0, and peers that speak it by hand, well or badly."""

from __future__ import annotations

import struct

import kwaai_tensor2_by_hand as hand
import pytest
import torch
import trio
import trio.testing
from kwaai_world import bare_server
from tensor2_world import receiver

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import StreamReset
from kwaainet_bridge.kwaai.server import KwaaiProtocols
from kwaainet_bridge.wire.kwaai_tensor2 import PROTOCOL, Ack, Code, End
from kwaainet_bridge.wire.kwaai_tensor2_values import Compression, encode_values

FLOATS = struct.pack("<4f", 0, 1, -2, 0.5)
MIB = 1 << 20


def floats(number: int, count: int, name: str = "t", dtype: str = "float32") -> bytes:
    return hand.offer(number, name, dtype, (count,), 0, 4 * count)


async def test_the_dialogue_of_the_page():
    async with receiver() as to:
        by_hand = await to.stream()
        await by_hand.write(hand.offer(1, "h", "float32", (2, 2), 0, 16, {"step": "3"}))
        assert await by_hand.frame() == hand.ack(1, 1)
        await by_hand.write(hand.part(1, 0, FLOATS[:8]), hand.part(1, 8, FLOATS[8:]))
        assert await by_hand.frame() == hand.ack(1, 2, count=16)
        await by_hand.write(hand.offer(2, "s", "bfloat16", (), 0, 2, data=b"\x80\x3f"))
        assert await by_hand.frame() == hand.ack(2, 2, count=2)
        await by_hand.write(hand.offer(3, "e", "int64", (0, 4)))
        assert await by_hand.frame() == hand.ack(3, 2)
        await by_hand.write(hand.end())
        assert await by_hand.frame() == b""
        (_, h), (_, s), (_, e) = to.inbox.taken
        assert to.inbox.names == ["h", "s", "e"]
        assert to.inbox.peers[0] == to.world.host().peer_id
        assert to.inbox.asked[0].metadata == {"step": "3"}
        assert (h.tolist(), s.item(), tuple(e.shape)) == ([[0, 1], [-2, 0.5]], 1, (0, 4))
        await to.check_nothing_held()


async def test_byte_by_byte():
    async with receiver() as to:
        by_hand = await to.stream()
        for byte in floats(1, 4) + hand.part(1, 0, FLOATS):
            await by_hand.write(bytes([byte]))
        assert [await by_hand.frame(), await by_hand.frame()] == [hand.ack(1, 1), hand.ack(1, 2, count=16)]


@pytest.mark.parametrize("compression", Compression)
async def test_every_compression_in_parts_of_five_bytes(compression):
    values = torch.linspace(-3, 3, 96).reshape(4, 24)
    data = b"".join(encode_values(values, compression, top_k=0.5))
    async with receiver() as to:
        by_hand = await to.stream()
        await by_hand.write(hand.offer(1, "t", "float32", (4, 24), compression.value, len(data)))
        await by_hand.write(*(hand.part(1, at, data[at : at + 5]) for at in range(0, len(data), 5)))
        assert [await by_hand.frame(), await by_hand.frame()] == [
            hand.ack(1, 1),
            hand.ack(1, 2, count=len(data)),
        ]
        [(_, tensor)] = to.inbox.taken
        allowed = 1.6 if compression == Compression.KWAAI_TOP_K else 0.06
        assert (tensor - values).abs().max() <= allowed


@pytest.mark.parametrize(
    ("offer", "code"),
    [
        (hand.offer(1, "no thanks", "float32", (4,), 0, 16), Code.REFUSED),
        (hand.offer(1, "no", "float32", (4,), 0, 16, data=FLOATS), Code.REFUSED),
        (hand.offer(1, "late", "float32", (4,), 0, 16, data=FLOATS), Code.REFUSED),
        (hand.offer(1, "t", "complex64", (4,), 0, 32), Code.UNSUPPORTED),
        (hand.offer(1, "t", "float32", (4,), 7, 16), Code.UNSUPPORTED),
        (hand.offer(1, "t", "bfloat16", (4,), 2, 8), Code.UNSUPPORTED),
        (hand.offer(1, "t", "float32", (4,), 0, 20), Code.INVALID),
        (hand.offer(1, "t", "float32", (1 << 20, 1 << 20), 0, 1 << 42), Code.INVALID),
        (hand.offer(1, "t", "float32", (1 << 28,), 0, 1 << 30), Code.TOO_LARGE),
        (hand.offer(1, "t", "float64", (1 << 30,), 65, 8, data=bytes(8)), Code.TOO_LARGE),
        (hand.offer(1, "t", "bool", (2,), 0, 2, data=b"\x01\x07"), Code.INVALID),
    ],
)
async def test_a_tensor_that_is_not_taken_and_one_after_it(offer, code):
    async with receiver() as to:
        by_hand = await to.stream()
        await by_hand.write(offer, hand.offer(2, "t", "float32", (4,), 0, 16, data=FLOATS))
        ack = await by_hand.message()
        assert (ack.number, ack.code) == (1, code)
        assert ack.text
        assert ack.bytes == (defaults.KWAAI_TENSOR2_PEER_BYTES if code == Code.TOO_LARGE else 0)
        assert await by_hand.frame() == hand.ack(2, 2, count=16)
        assert to.inbox.names == ["t"]


async def test_values_that_do_not_decode_after_their_parts():
    async with receiver() as to:
        by_hand = await to.stream()
        data = struct.pack("<2I2f", 4, 1, 1, 1)  # indices that do not ascend
        await by_hand.write(hand.offer(1, "t", "float32", (6,), 65, 16), hand.part(1, 0, data))
        assert await by_hand.frame() == hand.ack(1, 1)
        ack = await by_hand.message()
        assert (ack.code, "ascend" in ack.text) == (Code.INVALID, True)
        await by_hand.write(floats(2, 4), hand.part(2, 0, FLOATS))
        assert [await by_hand.frame(), await by_hand.frame()] == [hand.ack(2, 1), hand.ack(2, 2, count=16)]


async def test_a_callback_with_a_bug(caplog):
    async with receiver() as to:
        by_hand = await to.stream()
        await by_hand.write(hand.offer(1, "bug", "float32", (4,), 0, 16, data=FLOATS))
        assert await by_hand.message() == Ack(1, Code.FAILED, "an error of the receiver's")
        await by_hand.write(hand.offer(2, "t", "float32", (4,), 0, 16, data=FLOATS))
        assert await by_hand.frame() == hand.ack(2, 2, count=16)
        assert [r.message for r in caplog.records if r.levelname == "ERROR"]


# --- breaches of the protocol


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        ([hand.part(1, 0, FLOATS)], "no tensor is under way"),
        ([floats(2, 4)], "offer 2 where 1 is due"),
        ([floats(1, 4), floats(1, 4)], "offer 1 where 2 is due"),
        ([floats(1, 4), hand.part(1, 4, FLOATS)], "byte 0 is due"),
        ([floats(1, 4), hand.part(1, 0, FLOATS[:4]), hand.part(1, 0, FLOATS[:4])], "byte 4 is due"),
        ([floats(1, 4), hand.part(1, 0, FLOATS[:4]), hand.part(1, 8, FLOATS[8:])], "byte 4 is due"),
        ([floats(1, 4), hand.part(1, 0, FLOATS + b"\x00")], "part of 17 bytes"),
        ([floats(1, 4), hand.part(1, 1 << 63, FLOATS)], "byte 0 is due"),
        ([floats(1, 4), floats(2, 4), hand.part(2, 0, FLOATS)], "tensor 2 where one of 1 is due"),
        ([floats(1, 4), hand.part(1, 0, FLOATS), hand.part(1, 16, b"a")], "no tensor is under way"),
        ([floats(n, 4) for n in range(1, 18)], "more than 16 offers"),
        ([hand.ack(1, 1)], "an ack from the side that offers"),
        ([hand.offer(1, "t", "float32", (4,), 0, 16, data=FLOATS[:8])], "data has 8 of 16 bytes"),
        ([hand.offer(1, "", "float32", (4,), 0, 16)], "name has 0 bytes"),
        ([hand.frame(0, b"\x08\x01")], "offer has wire type 0"),
        ([hand.frame(0, b"")], "0 of offer, part and ack"),
        ([hand.frame(2, b"")], "marker 2"),
        ([struct.pack(">QB", 1 << 40, 0)], "bytes announced"),
        ([struct.pack(">BQ", 1, 300)], "marker first, then length"),
    ],
)
async def test_a_breach_ends_the_stream(frames, text):
    async with receiver() as to:
        by_hand = await to.stream()
        await by_hand.write(*frames)
        while isinstance(last := await by_hand.message(), Ack):
            pass
        assert isinstance(last, End)
        assert last.code == Code.PROTOCOL
        assert text in last.text
        assert await by_hand.frame() == b""
        await to.check_nothing_held()
        again = await to.stream()
        await again.write(hand.offer(1, "t", "float32", (4,), 0, 16, data=FLOATS))
        assert await again.frame() == hand.ack(1, 2, count=16)


@pytest.mark.parametrize("how", ["close", "reset", "end", "half a frame"])
async def test_a_sender_that_leaves_within_a_tensor(how):
    async with receiver() as to:
        by_hand = await to.stream()
        await by_hand.write(floats(1, 1000), floats(2, 10), hand.part(1, 0, bytes(2000)))
        assert [await by_hand.frame(), await by_hand.frame()] == [hand.ack(1, 1), hand.ack(2, 1)]
        assert to.exchange.memory.used == 4040
        if how == "end":
            await by_hand.write(hand.end())
        if how == "half a frame":
            await by_hand.write(hand.part(1, 2000, bytes(2000))[:1000])
        await (by_hand.stream.reset() if how == "reset" else by_hand.stream.close())
        await trio.testing.wait_all_tasks_blocked()
        assert to.inbox.taken == []
        await to.check_nothing_held()


# --- memory, places, time


async def test_an_offer_waits_for_the_memory_of_those_before_it(monkeypatch):
    monkeypatch.setattr(defaults, "KWAAI_TENSOR2_PEER_BYTES", MIB)
    async with receiver() as to:
        by_hand = await to.stream()
        size = 3 * MIB // 4
        data = bytes(size)
        await by_hand.write(floats(1, size // 4, "a"), floats(2, size // 4, "b"))
        await by_hand.write(hand.offer(3, "c", "float32", (4,), 0, 16, data=FLOATS))
        assert await by_hand.frame() == hand.ack(1, 1)
        await trio.testing.wait_all_tasks_blocked()
        assert to.exchange.memory.used == size
        assert [offer.name for offer in to.inbox.asked] == ["a"]
        await by_hand.write(hand.part(1, 0, data))
        assert [await by_hand.frame() for _ in range(3)] == [
            hand.ack(1, 2, count=size),
            hand.ack(2, 1),
            hand.ack(3, 2, count=16),
        ]
        await by_hand.write(hand.part(2, 0, data))
        assert await by_hand.frame() == hand.ack(2, 2, count=size)
        assert to.inbox.names == ["a", "c", "b"]
        await by_hand.write(floats(4, MIB // 4 + 1))
        assert (await by_hand.message()).code == Code.TOO_LARGE
        await by_hand.write(hand.end())
        assert await by_hand.frame() == b""
        await to.check_nothing_held()


async def test_memory_that_other_streams_have(monkeypatch):
    monkeypatch.setattr(defaults, "KWAAI_TENSOR2_PEER_BYTES", MIB)
    async with receiver() as to:
        first, second, other = await to.stream(), await to.stream(), await to.stream(101)
        await first.write(floats(1, MIB // 4))
        assert await first.frame() == hand.ack(1, 1)
        await second.write(floats(1, 4))
        assert (await second.message()).code == Code.BUSY
        await other.write(floats(1, 4), hand.part(1, 0, FLOATS))
        assert [await other.frame(), await other.frame()] == [hand.ack(1, 1), hand.ack(1, 2, count=16)]
        await first.stream.close()
        await trio.testing.wait_all_tasks_blocked()
        await second.write(floats(2, 4))
        assert await second.frame() == hand.ack(2, 1)


async def test_an_inbox_with_a_limit_of_its_own():
    async with receiver(max_tensor_bytes=1000) as to:
        by_hand = await to.stream()
        await by_hand.write(floats(1, 251))
        ack = await by_hand.message()
        assert (ack.code, ack.bytes) == (Code.TOO_LARGE, 1000)


async def test_no_peer_has_all_streams():
    async with receiver() as to:
        limit = defaults.KWAAI_TENSOR2_STREAMS_PER_PEER
        streams = [await to.stream() for _ in range(limit + 1)]
        assert (await streams[-1].message()).code == Code.BUSY
        assert await streams[-1].frame() == b""
        other = await to.stream(101)
        await other.write(hand.offer(1, "t", "float32", (4,), 0, 16, data=FLOATS))
        assert await other.frame() == hand.ack(1, 2, count=16)


async def test_a_tensor_that_comes_too_slowly(autojump_clock):
    async with receiver() as to:
        by_hand = await to.stream()
        await by_hand.write(floats(1, 100_000))
        assert await by_hand.frame() == hand.ack(1, 1)
        start = trio.current_time()

        async def drip():
            for at in range(400_000):
                await by_hand.write(hand.part(1, at, b"a"))
                await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip)
            last = await by_hand.message()
            nursery.cancel_scope.cancel()
        assert last.code == Code.TIMEOUT
        assert trio.current_time() - start == pytest.approx(
            defaults.KWAAI_TENSOR2_SECONDS + 400_000 / defaults.KWAAI_TENSOR2_BYTES_PER_SECOND, abs=1
        )
        await to.check_nothing_held()


async def test_the_time_of_a_tensor_begins_with_its_turn(autojump_clock):
    async with receiver() as to:
        by_hand = await to.stream()
        await by_hand.write(floats(1, 4), floats(2, 4))
        await trio.sleep(50)
        await by_hand.write(hand.part(1, 0, FLOATS))
        await trio.sleep(50)
        await by_hand.write(hand.part(2, 0, FLOATS))
        await trio.testing.wait_all_tasks_blocked()
        assert len(to.inbox.taken) == 2


async def test_a_stream_without_offers_is_ended(autojump_clock):
    async with receiver() as to:
        by_hand = await to.stream()
        start = trio.current_time()
        last = await by_hand.message()
        assert last.code == Code.OK
        assert trio.current_time() - start == pytest.approx(defaults.KWAAI_TENSOR2_IDLE_SECONDS)
        assert await by_hand.frame() == b""


async def test_a_sender_that_reads_no_answers(autojump_clock):
    async with receiver() as to:
        by_hand = await to.stream()

        async def write_on():
            for number in range(1, 100_000):
                await by_hand.write(hand.offer(number, "x" * 20, "complex64", (4,), 0, 16))

        with pytest.raises(StreamReset):
            await write_on()
        await to.check_nothing_held()
        assert trio.current_time() >= defaults.SEND_SECONDS


async def test_a_slow_taker_stops_its_sender_and_nobody_else():
    async with receiver() as to:
        to.inbox.gate = trio.Event()
        by_hand, other = await to.stream(), await to.stream(101)
        written = 0
        frames = floats(1, 4) + hand.part(1, 0, FLOATS) + floats(2, MIB)

        async def send():
            nonlocal written
            await by_hand.write(frames)
            for at in range(0, 4 * MIB, 65536):
                await by_hand.write(hand.part(2, at, bytes(65536)))
                written += 65536

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.testing.wait_all_tasks_blocked()
            assert written <= 512 * 1024  # what the stream's window and one read hold
            await other.write(hand.offer(1, "no", "float32", (4,), 0, 16, data=FLOATS))
            assert (await other.message()).code == Code.REFUSED
            to.inbox.gate.set()
        for expected in (hand.ack(1, 1), hand.ack(1, 2, count=16), hand.ack(2, 1)):
            assert await by_hand.frame() == expected
        assert await by_hand.frame() == hand.ack(2, 2, count=4 * MIB)


# --- stopping, mounting


async def test_draining_waits_for_what_was_accepted():
    async with receiver() as to:
        by_hand = await to.stream()
        await by_hand.write(floats(1, 4))
        assert await by_hand.frame() == hand.ack(1, 1)
        drained = trio.Event()

        async def drain():
            await to.server.drain()
            drained.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            await trio.testing.wait_all_tasks_blocked()
            assert not drained.is_set()
            await by_hand.write(hand.offer(2, "t", "float32", (4,), 0, 16, data=FLOATS))
            assert (await by_hand.message()).code == Code.STOPPING
            await by_hand.write(hand.part(1, 0, FLOATS))
            assert await by_hand.frame() == hand.ack(1, 2, count=16)
        assert drained.is_set()


async def test_mounted_with_an_inbox_only_and_unmounted_at_the_end():
    async with bare_server(KwaaiProtocols()) as (world, _, address):
        assert PROTOCOL not in world.network.hosts[address]._handlers
    async with receiver() as to:
        host = to.world.network.hosts[to.peer]
        assert PROTOCOL in host._handlers
    assert PROTOCOL not in host._handlers
