"""The sending side of /kwaai/tensor/2.0.0: to our receiver, and to peers that answer by hand, well or badly."""

from __future__ import annotations

import kwaai_tensor2_by_hand as hand
import pytest
import torch
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from kwaai_world import bare_server
from tensor2_world import pretended, receiver

from kwaainet_bridge import defaults
from kwaainet_bridge.compression.adaptive import by_size
from kwaainet_bridge.errors import (
    CompressionError,
    DeadlineExceeded,
    NetworkError,
    PeerUnreachable,
    ProtocolNotSupported,
    RemoteError,
    StreamClosed,
    TensorRefused,
)
from kwaainet_bridge.kwaai import tensor2, tensor2_client
from kwaainet_bridge.kwaai.server import KwaaiProtocols
from kwaainet_bridge.kwaai.tensor2_client import open_tensor_stream, send_tensors
from kwaainet_bridge.wire.kwaai_tensor2 import Code, End, Offer, Part
from kwaainet_bridge.wire.kwaai_tensor2_values import Compression

SMALL = torch.arange(6, dtype=torch.float32).reshape(2, 3)
LARGE = torch.arange(400_000, dtype=torch.float32)


@pytest.fixture
def no_threads(monkeypatch):
    """The clock would jump while a thread encodes or decodes."""
    monkeypatch.setattr(tensor2_client, "_AT_ONCE_BYTES", 1 << 30)
    monkeypatch.setattr(tensor2, "_AT_ONCE_BYTES", 1 << 30)


async def test_several_tensors_of_all_kinds():
    tensors = {
        "weights": torch.randn(300, 700),
        "bfloat16": torch.randn(5, 40_000).to(torch.bfloat16),
        "ids": torch.arange(100_000),
        "mask": torch.arange(70_000) % 3 == 0,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 4, dtype=torch.float16),
        "strided": torch.randn(500, 300).t(),
        "grad": torch.randn(4, requires_grad=True),
        "bytes": torch.arange(256, dtype=torch.uint8),
    }
    async with receiver() as to:
        await send_tensors(to.world.host(), to.peer, tensors, metadata={"step": "3"}, timeout=20)
        assert sorted(to.inbox.names) == sorted(tensors)
        for name, tensor in to.inbox.taken:
            assert tensor.dtype == tensors[name].dtype
            assert torch.equal(tensor, tensors[name])
            assert not tensor.requires_grad
        assert all(offer.metadata == {"step": "3"} for offer in to.inbox.asked)
        await to.check_nothing_held()


@pytest.mark.parametrize("compression", Compression)
@pytest.mark.parametrize("shape", [(3, 50, 700), (2, 8), (0,), (7, 0, 2)])
async def test_every_compression(compression, shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    async with receiver() as to:
        await send_tensors(
            to.world.host(), to.peer, {"t": values}, compression=compression.name, top_k=0.5, timeout=20
        )
        [(_, tensor)] = to.inbox.taken
        assert (tensor.shape, tensor.dtype) == (values.shape, values.dtype)
        if values.numel():
            assert (tensor - values).square().mean() <= 0.2 * values.square().mean()


async def test_nothing_to_send():
    async with receiver() as to:
        await send_tensors(to.world.host(), to.peer, {}, timeout=5)
        await trio.testing.wait_all_tasks_blocked()
        assert to.inbox.taken == []
        await to.check_nothing_held()


async def test_a_compression_for_each_tensor():
    choose = by_size(1000, less=lambda _: Compression.NONE, greater_equal=lambda info: _named[info.key])
    _named = {"a": Compression.FLOAT16, "b": Compression.KWAAI_INT8}
    async with receiver() as to:
        await send_tensors(
            to.world.host(),
            to.peer,
            {"small": SMALL, "a": LARGE[:1000], "b": LARGE[:1000]},
            compression=choose,
            timeout=5,
        )
        assert {o.name: o.compression for o in to.inbox.asked} == {"small": 0, "a": 2, "b": 64}


async def test_a_refused_tensor_does_not_stop_the_others():
    async with receiver() as to:
        tensors = {"a": LARGE, "no large": LARGE, "late": SMALL, "no small": SMALL, "b": LARGE, "c": SMALL}
        with pytest.raises(TensorRefused, match="REFUSED: not wanted") as caught:
            await send_tensors(to.world.host(), to.peer, tensors, timeout=20)
        assert (caught.value.tensor, caught.value.code, caught.value.text) == (
            "no large",
            "REFUSED",
            "not wanted",
        )
        assert sorted(to.inbox.names) == ["a", "b", "c"]
        await to.check_nothing_held()


async def test_too_large():
    async with receiver(max_tensor_bytes=1000) as to:
        with pytest.raises(TensorRefused) as caught:
            await send_tensors(to.world.host(), to.peer, {"t": LARGE}, timeout=5)
        assert (caught.value.code, caught.value.limit) == ("TOO_LARGE", 1000)


async def test_a_sender_with_less_memory_for_it_than_it_offers(monkeypatch):
    monkeypatch.setattr(defaults, "KWAAI_TENSOR2_PEER_BYTES", LARGE.nbytes * 3 // 2)
    async with receiver() as to:
        tensors = {f"t{n}": LARGE + n for n in range(6)}
        await send_tensors(to.world.host(), to.peer, tensors, timeout=20)
        assert to.inbox.names == list(tensors)


async def test_many_tasks_on_one_stream():
    async with receiver() as to, open_tensor_stream(to.world.host(), to.peer, open_timeout=5) as sender:
        outcomes = {}

        async def send(name, tensor):
            try:
                await sender.send(name, tensor, timeout=20)
                outcomes[name] = "taken"
            except TensorRefused as e:
                outcomes[name] = e.code

        async with trio.open_nursery() as nursery:
            for n in range(40):
                name = f"{'no' if n % 5 == 0 else 'late' if n % 7 == 0 else 't'}{n}"
                nursery.start_soon(send, name, LARGE[: 40_000 * (n % 3)] + n)
        assert len(outcomes) == 40
        assert sorted(to.inbox.names) == sorted(n for n, o in outcomes.items() if o == "taken")
        assert {o for n, o in outcomes.items() if not n.startswith("t")} == {"REFUSED"}
        for name, tensor in to.inbox.taken:
            assert torch.equal(tensor, LARGE[: len(tensor)] + int(name[1:]))


async def test_parts_are_not_mixed_and_no_more_are_offered_than_may_be():
    order, most = [], 0

    async def serve(by_hand):
        nonlocal most
        open_offers, due = {}, []
        while not isinstance(message := await by_hand.message(), End):
            if isinstance(message, Offer):
                open_offers[message.number] = message
                most = max(most, len(open_offers))
                due.append(message.number)
                # none is accepted before all that may be offered at once are there
                if message.number >= defaults.KWAAI_TENSOR2_IN_FLIGHT:
                    accepted = due if message.number == defaults.KWAAI_TENSOR2_IN_FLIGHT else due[-1:]
                    for number in accepted:
                        await by_hand.write(hand.ack(number, 1))
                continue
            assert isinstance(message, Part)
            assert message.number == due[0]
            order.append((message.number, message.offset, len(message.data)))
            if message.offset + len(message.data) == open_offers[message.number].bytes:
                del open_offers[due.pop(0)]
                await by_hand.write(hand.ack(message.number, 2, count=LARGE.nbytes))

    async with pretended(serve) as (world, address):
        await send_tensors(world.host(), address, {f"t{n}": LARGE for n in range(9)}, timeout=20)
    assert most == defaults.KWAAI_TENSOR2_IN_FLIGHT
    step = defaults.KWAAI_TENSOR2_PART_BYTES
    expected = [
        (n, at, min(step, LARGE.nbytes - at)) for n in range(1, 10) for at in range(0, LARGE.nbytes, step)
    ]
    assert order == expected


async def test_the_golden_offer():
    seen = []

    async def serve(by_hand):
        seen.append(await by_hand.frame())
        await by_hand.write(hand.ack(1, 2, count=2))
        seen.append(await by_hand.frame())

    async with pretended(serve) as (world, address):
        await send_tensors(world.host(), address, {"s": torch.ones((), dtype=torch.bfloat16)}, timeout=5)
        await trio.testing.wait_all_tasks_blocked()
    assert seen == [hand.offer(1, "s", "bfloat16", (), 0, 2, data=b"\x80\x3f"), hand.end()]


async def test_what_cannot_be_sent_leaves_the_stream_as_it_was():
    async with receiver() as to, open_tensor_stream(to.world.host(), to.peer, open_timeout=5) as sender:
        for bad, options, error in (
            (torch.tensor([float("nan")]), {"compression": "BLOCKWISE_8BIT"}, CompressionError),
            (torch.ones(2, dtype=torch.complex64), {}, CompressionError),
            (SMALL, {"compression": 99}, CompressionError),
            (SMALL, {"metadata": {"a": "b" * 40_000}}, ValueError),
        ):
            for _ in range(defaults.KWAAI_TENSOR2_IN_FLIGHT + 1):  # no place is lost
                with pytest.raises(error):
                    await sender.send("bad", bad, **options)
        await sender.send("good", SMALL)
        assert to.inbox.names == ["good"]
        assert to.inbox.asked[0].number == 1


async def test_a_bad_tensor_among_good_ones():
    async with receiver() as to:
        tensors = {"a": LARGE, "bad": LARGE / 0, "b": LARGE}
        with pytest.raises(CompressionError):
            await send_tensors(to.world.host(), to.peer, tensors, compression="KWAAI_INT8", timeout=5)
        await to.check_nothing_held()


# --- peers that answer badly, or not at all


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (hand.ack(1, 2, count=16), RemoteError, "out of turn"),
        (hand.ack(2, 1), RemoteError, "tensor 2, which is not under way"),
        (hand.ack(1, 0), RemoteError, "out of turn"),
        (hand.ack(1, 1) * 2, RemoteError, "out of turn"),
        (hand.offer(1, "t", "int8", (1,), 0, 1), RemoteError, "Offer from the side that receives"),
        (hand.frame(0, b"\xff"), RemoteError, "field number ends early"),
        (hand.frame(7, b""), RemoteError, "marker 7"),
        (hand.ack(1, 77, "what"), TensorRefused, "code 77: what"),
        (hand.ack(1, 6, "later"), TensorRefused, "BUSY: later"),
        (hand.end(9, "bad offer"), RemoteError, "ended the stream: bad offer"),
        (hand.end(10, "too slow"), DeadlineExceeded, "too slow"),
        (hand.end(6, "busy"), StreamClosed, "busy"),
        (hand.end(11), StreamClosed, "ended the stream"),
        (hand.end(), StreamClosed, "ended the stream"),
        (hand.end(1234, "future"), StreamClosed, "future"),
        (b"", StreamClosed, "closed the stream"),
        (hand.ack(1, 1)[:7], RemoteError, "cut after 7 bytes"),
    ],
)
async def test_answers_to_a_large_tensor(answer, error, text):
    async def serve(by_hand):
        await by_hand.frame()
        await by_hand.write(answer)

    async with pretended(serve) as (world, address):
        with pytest.raises(error, match=text):
            await send_tensors(world.host(), address, {"t": LARGE}, timeout=5)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (hand.ack(1, 1), "out of turn"),
        (hand.ack(1, 2, count=23), "ack 2 of 23 bytes is out of turn for tensor 1 of 24"),
        (hand.ack(0, 2, count=24), "tensor 0"),
    ],
)
async def test_answers_to_a_small_tensor(answer, text):
    async def serve(by_hand):
        await by_hand.frame()
        await by_hand.write(answer)
        await by_hand.frame()

    async with pretended(serve) as (world, address):
        with pytest.raises(RemoteError, match=text):
            await send_tensors(world.host(), address, {"t": SMALL}, timeout=5)


async def test_a_refusal_in_the_middle_of_the_parts():
    async def serve(by_hand):
        await by_hand.frame()
        await by_hand.write(hand.ack(1, 1))
        await by_hand.frame()
        await by_hand.write(hand.ack(1, 3))
        await by_hand.stream.wait_ended()

    async with pretended(serve) as (world, address):
        with pytest.raises(RemoteError, match="out of turn"):
            await send_tensors(world.host(), address, {"t": LARGE.repeat(10)}, timeout=5)


@pytest.mark.parametrize("end", [hand.end(9, "why"), None])
async def test_a_peer_that_ends_within_the_parts(end):
    async def serve(by_hand):
        await by_hand.frame()
        await by_hand.write(hand.ack(1, 1))
        await by_hand.frame()
        if end is None:
            await by_hand.stream.reset()
        else:
            await by_hand.write(end)

    async with pretended(serve) as (world, address):
        with pytest.raises(StreamClosed if end is None else RemoteError, match="why" if end else "reset"):
            await send_tensors(world.host(), address, {"t": LARGE.repeat(10), "u": LARGE}, timeout=5)


@pytest.mark.parametrize("accept", [False, True])
async def test_a_peer_that_reads_or_answers_nothing(accept, autojump_clock, no_threads):
    ended = []

    async def serve(by_hand):
        await by_hand.frame()
        if accept:
            await by_hand.write(hand.ack(1, 1))
        await by_hand.stream.wait_ended()
        ended.append(trio.current_time())

    async with pretended(serve) as (world, address):
        start = trio.current_time()
        with pytest.raises(DeadlineExceeded, match="within 30 s"):
            await send_tensors(world.host(), address, {"t": LARGE.repeat(10)}, timeout=30)
        assert trio.current_time() - start == pytest.approx(30)
        await trio.testing.wait_all_tasks_blocked()
        assert ended == [trio.current_time()]


async def test_a_send_that_is_cancelled_ends_the_stream_for_the_others(autojump_clock, no_threads):
    async with receiver() as to, open_tensor_stream(to.world.host(), to.peer, open_timeout=5) as sender:
        to.inbox.gate = trio.Event()
        errors = {}

        async def send(name, timeout):
            try:
                await sender.send(name, LARGE, timeout=timeout)
            except NetworkError as e:
                errors[name] = e

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, "a", 10)
            nursery.start_soon(send, "b", 100)
        assert isinstance(errors["a"], DeadlineExceeded)
        assert isinstance(errors["b"], StreamClosed)
        assert "was cancelled" in str(errors["b"])
        with pytest.raises(StreamClosed):
            await sender.send("c", SMALL)
        to.inbox.gate.set()
        await to.check_nothing_held()


async def test_a_failure_inside_the_block_comes_out_as_it_is():
    async def fail(to):
        async with open_tensor_stream(to.world.host(), to.peer, open_timeout=5) as sender:
            await sender.send("a", SMALL)
            raise KeyError("mine")

    async with receiver() as to:
        with pytest.raises(KeyError, match="mine"):
            await fail(to)


async def test_peers_that_do_not_speak_it():
    async with bare_server(KwaaiProtocols()) as (world, _, address):
        with pytest.raises(ProtocolNotSupported, match=r"1\.0\.0, kwaai\.tensor\.send_tensor"):
            await send_tensors(world.host(), address, {"t": SMALL}, timeout=5)
        world.network.take_down(address)
        with pytest.raises(PeerUnreachable):
            await send_tensors(world.host(), address, {"t": SMALL}, timeout=5)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 100, 20_000, 150_000]), max_size=12),
    kinds=st.lists(st.sampled_from(["t", "t", "no", "late"]), min_size=12, max_size=12),
    compression=st.sampled_from(["NONE", "FLOAT16", "KWAAI_INT8"]),
)
def test_any_mixture_is_taken_or_refused(sizes, kinds, compression):
    async def run():
        async with receiver() as to:
            tensors = {f"{kinds[i]}{i}": torch.full((size,), float(i)) for i, size in enumerate(sizes)}
            refused = [name for name in tensors if not name.startswith("t")]
            told = None
            try:
                await send_tensors(to.world.host(), to.peer, tensors, compression=compression, timeout=60)
            except TensorRefused as e:
                told = e.tensor, e.code
            assert told == ((refused[0], Code.REFUSED.name) if refused else None)
            assert sorted(to.inbox.names) == sorted(name for name in tensors if name.startswith("t"))
            for name, tensor in to.inbox.taken:
                assert torch.allclose(tensor, tensors[name], rtol=1e-3)
            await to.check_nothing_held()

    trio.run(run)
