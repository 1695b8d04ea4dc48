from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trio
from client_fakes import ToySwarm, random_hidden, run_blocks, toy_swarm

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import InvalidRequest, NoRoute, Refusal
from kwaainet_bridge.hivemind.client import backward, forward
from kwaainet_bridge.hivemind.client.routing import Hop
from kwaainet_bridge.wire.expert import ExpertRequest
from kwaainet_bridge.wire.tensors import decode_tensor

MESSAGES = Path(__file__).parents[1] / "vectors" / "petals-tiny-llama" / "messages"


def local(
    toy: ToySwarm, hidden: torch.Tensor, grad: torch.Tensor, prompts: torch.Tensor | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output and gradients computed here; prompts of a batch of 1 are expanded first, as servers do."""
    hidden = hidden.clone().requires_grad_()
    if prompts is None:
        output = toy.reference(hidden)
        return output.detach(), list(torch.autograd.grad(output, [hidden], grad))
    prompts = prompts.expand(-1, hidden.shape[0], -1, -1).clone().requires_grad_()
    output = toy.reference(hidden, prompts)
    return output.detach(), list(torch.autograd.grad(output, [hidden, prompts], grad))


@pytest.mark.parametrize("prompt_batch", [None, 1, 2])
async def test_forward_and_backward_equal_local_ones(prompt_batch: int | None) -> None:
    async with toy_swarm(6) as toy:
        toy.add(0, 2), toy.add(2, 3), toy.add(3, 6)
        hidden, grad = random_hidden(2, 5, 4), random_hidden(2, 5, 4, seed=1)
        prompts = None if prompt_batch is None else random_hidden(6, prompt_batch, 3, 4, seed=2)
        output, grads = local(toy, hidden, grad, prompts)
        done = await forward(toy.swarm, hidden, prompts=prompts)
        torch.testing.assert_close(done.output, output)
        result = await backward(toy.swarm, done, grad, prompts=prompts)
        torch.testing.assert_close(result.hidden, grads[0])
        if prompts is None:
            assert result.prompts is None
        else:
            torch.testing.assert_close(result.prompts, grads[1])
        assert [(s.calls["forward"], s.calls["backward"]) for s in toy.servers] == [(1, 1)] * 3


async def test_part_of_the_model() -> None:
    async with toy_swarm(6) as toy:
        toy.add(0, 4), toy.add(3, 6)
        hidden, prompts = random_hidden(1, 5, 4), random_hidden(3, 1, 2, 4)
        done = await forward(toy.swarm, hidden, prompts=prompts, blocks=range(2, 5))
        torch.testing.assert_close(done.output, run_blocks(range(2, 5), hidden, prompts, 2))


async def test_requests_are_byte_for_byte_those_of_a_stock_client() -> None:
    def recorded(number: int, rpc: str) -> ExpertRequest:
        return ExpertRequest.read((MESSAGES / f"{number:03}-{rpc}.request.bin").read_bytes())

    async with toy_swarm(8) as toy:
        toy.add(0, 4), toy.add(4, 8)
        hidden, first_prompts = map(decode_tensor, recorded(9, "rpc_forward").tensors)
        later_prompts = decode_tensor(recorded(11, "rpc_forward").tensors[1])
        grad = decode_tensor(recorded(13, "rpc_backward").tensors[1])
        prompts = torch.cat([first_prompts, later_prompts])
        done = await forward(toy.swarm, hidden, prompts=prompts)
        await backward(toy.swarm, done, grad, prompts=prompts)
        first, second = toy.servers
        assert first.requests[0] == recorded(9, "rpc_forward")
        assert second.requests[0].metadata == recorded(11, "rpc_forward").metadata
        assert second.requests[1].tensors[1:] == recorded(13, "rpc_backward").tensors[1:]
        assert second.requests[1].metadata == recorded(13, "rpc_backward").metadata
        assert first.requests[1].tensors[0] == recorded(15, "rpc_backward").tensors[0]
        assert first.requests[1].metadata == recorded(15, "rpc_backward").metadata


async def test_large_tensors_are_streamed_in_parts(monkeypatch) -> None:
    monkeypatch.setattr(defaults, "CLIENT_UNARY_BYTES", 100)
    monkeypatch.setattr(defaults, "STREAM_PART_BYTES", 48)
    async with toy_swarm(4) as toy:
        server = toy.add(0, 4)
        hidden, grad = random_hidden(2, 5, 4), random_hidden(2, 5, 4, seed=1)
        prompts = random_hidden(4, 1, 3, 4, seed=2)
        output, grads = local(toy, hidden, grad, prompts)
        done = await forward(toy.swarm, hidden, prompts=prompts)
        torch.testing.assert_close(done.output, output)
        result = await backward(toy.swarm, done, grad, prompts=prompts)
        torch.testing.assert_close(result.hidden, grads[0])
        torch.testing.assert_close(result.prompts, grads[1])
        assert server.calls == {"info": 1, "forward_stream": 1, "backward_stream": 1}
        assert all(len(r.tensors) == 1 and len(r.tensors[0].buffer) <= 48 for r in server.requests)
        assert all(r.uid and r.metadata for r in server.requests)


async def test_a_small_request_with_a_large_answer_is_streamed() -> None:
    async with toy_swarm(4) as toy:
        server = toy.add(0, 4)
        hidden, prompts = random_hidden(64, 16, 64), random_hidden(4, 1, 16, 64)
        assert 4 * (2 * hidden.numel() + prompts.numel()) < defaults.CLIENT_UNARY_BYTES
        done = await forward(toy.swarm, hidden, prompts=prompts)
        result = await backward(toy.swarm, done, torch.ones_like(hidden), prompts=prompts)
        assert result.prompts is not None
        assert result.prompts.shape == (4, 64, 16, 64)
        assert server.calls["forward"] == 1
        assert server.calls["backward_stream"] == 1


def fail(server, step, hidden):
    raise Refusal("not today")


async def test_forward_goes_round_a_server_that_fails() -> None:
    async with toy_swarm(4) as toy:
        toy.add(0, 2)
        toy.add(2, 4, throughput=1e9, before_answer=fail)
        toy.add(2, 3), toy.add(3, 4)
        hidden = random_hidden(1, 3, 4)
        done = await forward(toy.swarm, hidden)
        torch.testing.assert_close(done.output, toy.reference(hidden))
        assert [hop.blocks for hop, _ in done.inputs] == [range(2), range(2, 3), range(3, 4)]


async def test_backward_runs_forward_again_where_a_server_is_lost() -> None:
    async with toy_swarm(4) as toy:
        toy.add(0, 1)
        lost = toy.add(1, 4, throughput=1e9)
        toy.add(1, 2), toy.add(2, 4)
        hidden, grad = random_hidden(1, 3, 4), random_hidden(1, 3, 4, seed=1)
        prompts = random_hidden(4, 1, 2, 4, seed=2)
        done = await forward(toy.swarm, hidden, prompts=prompts)
        assert len(done.inputs) == 2
        lost.before_answer = fail
        _, grads = local(toy, hidden, grad, prompts)
        result = await backward(toy.swarm, done, grad, prompts=prompts)
        torch.testing.assert_close(result.hidden, grads[0])
        torch.testing.assert_close(result.prompts, grads[1])


async def test_giving_up_names_the_last_error(autojump_clock) -> None:
    async with toy_swarm(4) as toy:
        toy.add(0, 2)
        toy.add(2, 4, before_answer=fail)
        with pytest.raises(NoRoute, match=r"gave up on blocks 2:4 after 8 attempts, the last: .*not today"):
            await forward(toy.swarm, random_hidden(1, 3, 4))


async def test_a_server_that_hangs_is_left(autojump_clock, monkeypatch) -> None:
    async def hang(*_):
        await trio.sleep_forever()

    async with toy_swarm(2) as toy:
        bad, good = toy.add(0, 2, throughput=1e9), toy.add(0, 2)
        bad.before_answer = hang
        bad._send = hang
        hidden = random_hidden(1, 3, 4)
        done = await forward(toy.swarm, hidden)
        assert [hop.peer for hop, _ in done.inputs] == [good.peer]
        toy.swarm.note_success(Hop(bad.peer, range(1)))
        monkeypatch.setattr(defaults, "CLIENT_UNARY_BYTES", 1)
        done = await forward(toy.swarm, hidden)
        assert [hop.peer for hop, _ in done.inputs] == [good.peer]
        assert bad.calls["forward_stream"] == 1


async def test_an_answer_of_another_shape_is_refused(caplog) -> None:
    async with toy_swarm(2) as toy:
        bad, good = toy.add(0, 2, throughput=1e9), toy.add(0, 2)
        bad.before_answer = lambda _server, _step, hidden: hidden[:, 1:]
        done = await forward(toy.swarm, random_hidden(1, 3, 4))
        assert [hop.peer for hop, _ in done.inputs] == [good.peer]
        assert "shape [1, 2, 4], expected [1, 3, 4]" in caplog.text


async def test_a_streamed_answer_of_too_many_tensors_is_refused(caplog, monkeypatch) -> None:
    monkeypatch.setattr(defaults, "CLIENT_UNARY_BYTES", 1)
    async with toy_swarm(2) as toy:
        bad, good = toy.add(0, 2, throughput=1e9), toy.add(0, 2)
        honest = bad._send
        bad._send = lambda call, tensors: honest(call, tensors * 2)
        done = await forward(toy.swarm, random_hidden(1, 3, 4))
        assert [hop.peer for hop, _ in done.inputs] == [good.peer]
        assert "tensor parts: more than 1 tensors" in caplog.text


@pytest.mark.parametrize(
    ("shape", "prompts", "text"),
    [
        ((3, 4), None, "hidden states"),
        ((0, 3, 4), None, "hidden states"),
        ((1, 3, 4), (3, 1, 2, 4), "do not fit 4 blocks"),
        ((2, 3, 4), (4, 3, 2, 4), "do not fit"),
        ((1, 3, 4), (4, 1, 4, 4), "do not fit"),
    ],
)
async def test_what_does_not_fit_is_refused(shape, prompts, text) -> None:
    async with toy_swarm(4) as toy:
        with pytest.raises(InvalidRequest, match=text):
            await forward(
                toy.swarm, torch.zeros(shape), prompts=None if prompts is None else torch.zeros(prompts)
            )


async def test_a_gradient_of_another_shape_is_refused() -> None:
    async with toy_swarm(2) as toy:
        toy.add(0, 2)
        done = await forward(toy.swarm, random_hidden(1, 3, 4))
        with pytest.raises(InvalidRequest, match="differs from the output"):
            await backward(toy.swarm, done, random_hidden(1, 2, 4))
