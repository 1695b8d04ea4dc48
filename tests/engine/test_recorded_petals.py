"""What a stock Petals server answered to recorded requests, this engine answers too."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest
import torch
from engine_support import VECTORS, close

from kwaainet_bridge.engine import Engine, EngineConfig
from kwaainet_bridge.wire.pb import expert_pb2

BLOCKS = range(8)


@pytest.fixture
async def tiny() -> AsyncIterator[Engine]:
    engine = await Engine.load(EngineConfig(str(VECTORS / "model")))
    yield engine
    await engine.aclose()


def message(name: str) -> tuple[range, list[torch.Tensor | None]]:
    """The blocks and tensors of one recorded message; dummies are None. All of these are uncompressed."""
    (path,) = (VECTORS / "messages").glob(f"{name}.bin")
    kind = expert_pb2.ExpertRequest if name.endswith("request") else expert_pb2.ExpertResponse
    parsed = kind.FromString(path.read_bytes())
    uids = [int(uid.rpartition(".")[2]) for uid in getattr(parsed, "uid", "").split()]
    tensors: list[torch.Tensor | None] = []
    for tensor in parsed.tensors:
        assert tensor.compression == 0
        values = np.frombuffer(tensor.buffer, dtype=tensor.dtype).reshape(tuple(tensor.size))
        tensors.append(
            torch.from_numpy(values.copy()) if 0 not in tensor.size or len(tensor.size) > 1 else None
        )
    return range(min(uids, default=0), max(uids, default=-1) + 1), tensors


async def test_forward_with_and_without_prompts(tiny: Engine) -> None:
    for name in ("005", "007", "009", "011"):
        blocks, (hidden, prompts) = message(f"{name}-rpc_forward.request")
        _, (answer,) = message(f"{int(name) + 1:03}-rpc_forward.response")
        assert (prompts is not None) == (int(name) > 8)
        close(await tiny.forward(hidden, blocks, prompts), answer)


async def test_backward_with_prompts(tiny: Engine) -> None:
    for name in ("013", "015"):
        blocks, (hidden, grad_output, prompts) = message(f"{name}-rpc_backward.request")
        _, (grad_input, grad_prompts) = message(f"{int(name) + 1:03}-rpc_backward.response")
        answer = await tiny.backward(hidden, grad_output, blocks, prompts)
        close(answer[0], grad_input, 1e-4)
        close(answer[1], grad_prompts, 1e-4)


@pytest.mark.parametrize(
    "requests",
    [
        pytest.param(("017", "021", "025", "029"), id="front with hypo_ids and a step of no tokens"),
        pytest.param(("019", "023", "027", "031"), id="back with hypo_ids and a step of no tokens"),
        pytest.param(("035", "039"), id="front with prompts"),
        pytest.param(("037", "041"), id="back with prompts"),
    ],
)
async def test_inference(tiny: Engine, requests: tuple[str, ...]) -> None:
    blocks, _ = message(f"{requests[0]}-rpc_inference.request")
    async with tiny.open_session(blocks, 2, 16) as session:
        for name in requests:
            _, (hidden, prompts, hypo_ids) = message(f"{name}-rpc_inference.request")
            _, (answer,) = message(f"{int(name) + 1:03}-rpc_inference.response")
            close(await session.step(hidden, prompts, hypo_ids, session.position), answer)
