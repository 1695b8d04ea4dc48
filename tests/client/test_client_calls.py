from __future__ import annotations

from pathlib import Path

import pytest
import torch
from client_fakes import PREFIX, toy_swarm

from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.errors import HandlerError, InvalidRequest, NetworkError, RemoteError
from kwaainet_bridge.hivemind.client import calls
from kwaainet_bridge.hivemind.client.routing import Hop
from kwaainet_bridge.wire import msgpack
from kwaainet_bridge.wire.msgpack import TensorDescriptor
from kwaainet_bridge.wire.pb.expert_pb2 import ExpertInfo
from kwaainet_bridge.wire.tensors import encode_tensor

MESSAGES = Path(__file__).parents[1] / "vectors" / "petals-tiny-llama" / "messages"


def info(**changes) -> bytes:
    like = TensorDescriptor(size=(None, 1, 2048, 4), dtype="torch.float32", compression=2)
    answer = {"version": "x", "forward_schema": ((like,), {}), "inference_schema": ((like,) * 3, {})}
    return msgpack.pack({key: value for key, value in (answer | changes).items() if value is not None})


def test_a_stock_servers_description() -> None:
    answer = ExpertInfo.FromString((MESSAGES / "002-rpc_info.response.bin").read_bytes())
    traits = calls.parse_traits(answer.serialized_info)
    assert traits == calls.ServerTraits("2.3.0.dev2", CompressionType.NONE, CompressionType.NONE)
    assert traits.rolls_back


@pytest.mark.parametrize(
    ("version", "heeds"),
    [
        ("2.2.0.post1", False),
        ("2.1.0", False),
        ("2.3.0.dev2", True),
        ("kwaainet-bridge 0.1", True),
        (7, True),
    ],
)
def test_old_releases_do_not_roll_back(version, heeds) -> None:
    assert calls.parse_traits(info(version=version)).rolls_back is heeds


def test_the_announced_compression_is_read() -> None:
    traits = calls.parse_traits(info())
    assert (traits.inference, traits.training) == (CompressionType.FLOAT16, CompressionType.FLOAT16)


@pytest.mark.parametrize(
    ("serialized", "text"),
    [
        (b"\xc1", "msgpack"),
        (msgpack.pack([1]), "no map"),
        (info(inference_schema=None), "inference_schema is missing"),
        (info(forward_schema=()), "forward_schema is missing"),
        (info(forward_schema=7), "forward_schema is missing"),
        (info(forward_schema=(({},), {})), "describes no tensor"),
        (
            info(forward_schema=((TensorDescriptor((None,), "torch.float32", compression=9),), {})),
            "unknown compression 9",
        ),
    ],
)
def test_a_bad_description_is_the_servers_fault(serialized, text) -> None:
    with pytest.raises(RemoteError, match=text):
        calls.parse_traits(serialized)


async def test_a_server_is_asked_once_and_again_after_a_failure() -> None:
    async with toy_swarm(2) as toy:
        server = toy.add(0, 2)
        hop = Hop(server.peer, range(2))
        assert (await toy.swarm.traits(hop)).version == "2.3.0.dev2"
        await toy.swarm.traits(hop)
        assert server.calls["info"] == 1
        toy.swarm.note_failure(Hop(server.peer, range(1)), NetworkError("gone"))
        await toy.swarm.traits(hop)
        assert server.calls["info"] == 2


async def test_a_server_that_refuses_to_describe_itself() -> None:
    async with toy_swarm(4) as toy:
        server = toy.add(0, 2)
        with pytest.raises(HandlerError, match=f"does not serve {PREFIX}.2"):
            await toy.swarm.traits(Hop(server.peer, range(2, 4)))


@pytest.mark.parametrize("compression", CompressionType)
async def test_arguments_survive_every_compression(compression: CompressionType) -> None:
    hidden = torch.linspace(-1, 1, 4096).reshape(1, 64, 64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        messages = await calls.encode_arguments(
            [hidden.to(dtype), calls.NO_TENSOR, torch.tensor([3, 1])], compression
        )
        assert [m.compression for m in messages] == [compression, 0, 0]
        back = await calls.decode_answer(messages[:1], [hidden.shape], dtype)
        torch.testing.assert_close(back[0].float(), hidden, rtol=0.02, atol=0.02)
        assert not messages[1].buffer
        assert list(messages[1].size) == [0]


async def test_what_a_compression_cannot_carry_is_named() -> None:
    with pytest.raises(InvalidRequest, match="compression QUANTILE_8BIT"):
        await calls.encode_arguments([torch.full((1, 4, 4), float("nan"))], CompressionType.QUANTILE_8BIT)


async def test_gradients_are_neither_sent_nor_received() -> None:
    hidden = torch.ones(1, 2, 4, requires_grad=True)
    (message,) = await calls.encode_arguments([hidden], CompressionType.NONE)
    assert not message.requires_grad
    message.requires_grad = True
    (answer,) = await calls.decode_answer([message], [hidden.shape], torch.float32)
    assert not answer.requires_grad


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ([], "0 tensors, expected 1"),
        ([torch.ones(1, 2, 4)] * 2, "2 tensors, expected 1"),
        ([torch.ones(1, 3, 4)], r"shape \[1, 3, 4\], expected \[1, 2, 4\]"),
        ([torch.ones(8)], r"shape \[8\]"),
        ([torch.ones(1, 2, 4, dtype=torch.int64)], "dtype torch.int64"),
    ],
)
async def test_an_answer_must_be_what_was_asked_for(tensors, text) -> None:
    with pytest.raises(RemoteError, match=text):
        await calls.decode_answer([encode_tensor(t) for t in tensors], [(1, 2, 4)], torch.float32)


async def test_an_answer_whose_buffer_does_not_fit_its_shape() -> None:
    message = encode_tensor(torch.ones(1, 2, 4))
    message.values = [message.buffer[:-1]]
    with pytest.raises(RemoteError):
        await calls.decode_answer([message], [(1, 2, 4)], torch.float32)
