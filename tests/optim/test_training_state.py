"""The state that peers exchange: its order is stock's, and what does not fit is refused as a whole."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.hivemind.averaging import State
from kwaainet_bridge.hivemind.optim.gradients import Gradients
from kwaainet_bridge.hivemind.optim.optimizer_state import dump, leaves, rebuilt
from kwaainet_bridge.hivemind.optim.training_state import TrainingState
from kwaainet_bridge.wire.msgpack import pack

GOLDEN = json.loads((Path(__file__).parents[1] / "vectors" / "hivemind-training.json").read_text())


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.arange(n, dtype=torch.float32) / 8 + 1) for n in (3, 2, 1)]


def with_two_groups(**options: Any) -> torch.optim.Optimizer:
    p = parameters()
    return torch.optim.AdamW([{"params": p[:2]}, {"params": p[2:], "lr": 0.5} | options], lr=0.125)


def with_a_scheduler() -> torch.optim.Optimizer:
    optimizer = with_two_groups()
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))
    return optimizer


MAKERS: dict[str, Callable[[], torch.optim.Optimizer]] = {
    "sgd with momentum": lambda: torch.optim.SGD(parameters(), lr=0.125, momentum=0.5),
    "adam": lambda: torch.optim.Adam(parameters(), lr=0.0625),
    "adamw with two groups": lambda: with_two_groups(weight_decay=0.0),
    "adamw with a scheduler": with_a_scheduler,
}


def stepped(name: str) -> TrainingState:
    """After one step with gradients of 0.5, as the golden states."""
    state = TrainingState(MAKERS[name]())
    for parameter in state.parameters:
        parameter.grad = torch.full_like(parameter, 0.5)
    state.step()
    return state


def golden(name: str) -> dict[str, Any]:
    return next(state for state in GOLDEN["optimizer_states"] if state["name"] == name)


def copied(state: State) -> State:
    return State(dict(state.metadata), [tensor.clone() for tensor in state.tensors])


# --- order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_the_optimizers_part_is_stocks(name: str) -> None:
    wanted = golden(name)
    entries, tensors = dump(stepped(name).optimizer)
    assert entries == wanted["metadata"]
    assert pack(entries).hex() == wanted["packed"]
    assert len(tensors) == len(wanted["tensors"])
    for ours, theirs in zip(tensors, wanted["tensors"], strict=True):
        assert ours.tolist() == pytest.approx(theirs)


@pytest.mark.parametrize("name", MAKERS)
def test_stocks_state_is_taken_over(name: str) -> None:
    wanted = golden(name)
    extra = torch.tensor([1.0, 2.0])
    state = TrainingState(MAKERS[name](), extra_tensors=[extra])
    shared = State(
        {"epoch": 5, "group_bits": "", "optimizer_metadata": wanted["metadata"]},
        [torch.tensor(t) for t in (*wanted["parameters"], [7.0, 8.0], *wanted["tensors"])],
    )
    assert state.check(shared) == 5
    state.load(shared)
    assert state.epoch == 5
    assert extra.tolist() == [7.0, 8.0]
    for ours, theirs in zip(state.parameters, wanted["parameters"], strict=True):
        assert ours.tolist() == theirs
    entries, tensors = dump(state.optimizer)
    assert entries == wanted["metadata"]
    assert [t.tolist() for t in tensors] == [pytest.approx(t) for t in wanted["tensors"]]


def test_what_is_shared_is_in_order() -> None:
    extra = torch.tensor([9])
    state = TrainingState(MAKERS["adam"](), extra_tensors=[extra])
    state.begin_epoch(3)
    shared = state.shared("01")
    assert list(shared.metadata) == ["epoch", "group_bits", "optimizer_metadata"]
    assert (shared.metadata["epoch"], shared.metadata["group_bits"]) == (3, "01")
    assert [tuple(t.shape) for t in shared.tensors[:4]] == [(3,), (2,), (1,), (1,)]
    assert shared.tensors[3] is extra or torch.equal(shared.tensors[3], extra)
    assert len(shared.tensors) == 4 + 9
    assert not any(t.requires_grad for t in shared.tensors)


def test_keys_of_several_types_have_an_order_of_ours() -> None:
    tree = {2: "c", "b": [1, (2, 3)], 1: {"y": 5, "x": 4}, "a": None}
    values = [value for _, value in leaves(tree)]
    assert values == [4, 5, "c", None, 1, 2, 3]
    assert rebuilt(tree, iter(values)) == tree


def test_an_optimizer_with_other_values_is_refused_at_once() -> None:
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    optimizer.param_groups[0]["strange"] = object()
    with pytest.raises(ValueError, match=r"param_groups\.0\.strange is a object"):
        TrainingState(optimizer)


def test_beginning_changes_no_parameters() -> None:
    optimizer = torch.optim.AdamW(parameters(), lr=0.5, weight_decay=0.5)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    state = TrainingState(optimizer)
    for ours, before in zip(state.parameters, parameters(), strict=True):
        assert torch.equal(ours, before)
    assert torch.equal(state.parameters[0].grad, torch.ones(3))
    assert state.parameters[1].grad is None
    assert float(optimizer.state[state.parameters[0]]["step"]) == 1  # as in stock peers
    TrainingState(optimizer)
    assert float(optimizer.state[state.parameters[0]]["step"]) == 1


# --- what does not fit ------------------------------------------------------------------------------------


def entry(number: int, new: Any) -> Callable[[State], State]:
    def spoil(state: State) -> State:
        entries = list(state.metadata["optimizer_metadata"])
        entries[number] = new
        return State(state.metadata | {"optimizer_metadata": entries}, state.tensors)

    return spoil


def about(**changes: Any) -> Callable[[State], State]:
    return lambda state: State(state.metadata | changes, state.tensors)


def tensor(number: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], State]:
    def spoil(state: State) -> State:
        tensors = list(state.tensors)
        tensors[number] = change(tensors[number])
        return State(state.metadata, tensors)

    return spoil


# the entries of Adam: amsgrad, betas, betas, capturable, decoupled_weight_decay, differentiable, eps, foreach,
# fused, lr, maximize, three params, weight_decay, then tensors
WRONG: list[tuple[Callable[[State], State], str]] = [
    (about(epoch=None), "its epoch is None"),
    (about(epoch=True), "its epoch is True"),
    (about(epoch=1.5), "its epoch is 1.5"),
    (about(epoch=2**60), "its epoch is"),
    (about(epoch=1), "of epoch 1, ours is of 2"),
    (about(optimizer_metadata=None), "no values of optimizer state, 24 expected"),
    (about(optimizer_metadata=[]), "0 values of optimizer state, 24 expected"),
    (about(optimizer_metadata={"a": 1}), "no values of optimizer state"),
    (entry(0, 5), "param_groups.0.amsgrad: a value expected"),
    (entry(0, {"type": "value", "value": 0}), "param_groups.0.amsgrad: 0 instead of False"),
    (entry(0, {"type": "value"}), "param_groups.0.amsgrad: a value expected"),
    (entry(1, {"type": "value", "value": "x" * 5000}), "param_groups.0.betas.0: 'xxx"),
    (entry(9, {"type": "value", "value": math.inf}), "param_groups.0.lr: inf"),
    (entry(9, {"type": "value", "value": None}), "param_groups.0.lr: None"),
    (entry(9, {"type": "value", "value": True}), "param_groups.0.lr: True"),
    (entry(11, {"type": "value", "value": 1}), "parameters are in another order"),
    (entry(15, {"type": "value", "value": 1}), "state.0.exp_avg: tensor 0 expected"),
    (entry(15, {"type": "tensor", "index": 1}), "state.0.exp_avg: tensor 0 expected"),
    (entry(16, {"type": "tensor", "index": 10**9}), "state.0.exp_avg_sq: tensor 1 expected"),
    (entry(16, {"type": "tensor", "index": True}), "state.0.exp_avg_sq: tensor 1 expected"),
    (lambda s: State(s.metadata, s.tensors[:2]), "2 tensors, 3 parameters alone expected"),
    (lambda s: State(s.metadata, s.tensors[:-1]), "state.2.step: tensor 8 expected"),
    (lambda s: State(s.metadata, [*s.tensors, torch.zeros(1)]), "10 tensors of optimizer state, 9 expected"),
    (lambda s: State([], s.tensors), "its epoch is None"),  # type: ignore[arg-type]
    (tensor(0, lambda t: t[:2]), "tensor 0: shape (2,) instead of (3,)"),
    (tensor(0, lambda t: t.long()), "tensor 0: torch.int64 instead of torch.float32"),
    (tensor(2, lambda t: t * math.nan), "tensor 2: not finite"),
    (tensor(3, lambda t: t.unsqueeze(0)), "state.0.exp_avg: shape (1, 3) instead of (3,)"),
    (tensor(4, lambda t: t + math.inf), "state.0.exp_avg_sq: not finite"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(number: int) -> None:
    spoil, why = WRONG[number]
    other = stepped("adam")
    other.begin_epoch(2)
    state = TrainingState(MAKERS["adam"]())
    state.begin_epoch(2)
    before = copied(state.shared(""))
    spoiled = spoil(other.shared(""))
    for refusing in (state.check, state.load):
        with pytest.raises(RemoteError) as caught:
            refusing(spoiled)
        assert why in str(caught.value)
        assert len(str(caught.value)) < 200
    after = state.shared("")
    assert after.metadata == before.metadata
    assert all(torch.equal(a, b) for a, b in zip(after.tensors, before.tensors, strict=True))
    state.load(other.shared(""))
    assert torch.equal(state.parameters[0], other.parameters[0])


def test_how_the_machine_computes_stays_its_own() -> None:
    other = torch.optim.Adam(parameters(), lr=0.5, foreach=True)
    state = TrainingState(torch.optim.Adam(parameters(), lr=0.1, foreach=False))
    state.load(TrainingState(other).shared(""))
    group = state.optimizer.param_groups[0]
    assert (group["lr"], group["foreach"]) == (0.5, False)


def test_half_precision_takes_floats() -> None:
    state = TrainingState(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))], lr=0.1))
    metadata = {"epoch": 1, "group_bits": "", "optimizer_metadata": dump(state.optimizer)[0]}
    state.load(State(metadata, [torch.tensor([1.5, -2.0])]))
    assert state.parameters[0].tolist() == [1.5, -2.0]
    assert state.averaged[0].dtype == torch.float32


def test_with_a_scheduler_the_rate_follows_the_epoch_alone() -> None:
    """Stock peers multiply the rate that they took over by all factors once more, if the schedule is a product."""

    def make(lr: float) -> TrainingState:
        optimizer = torch.optim.SGD(parameters(), lr=lr, momentum=0.5)
        return TrainingState(optimizer, scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))

    first, late = make(1.0), make(1.0)
    first.begin_epoch(3)
    late.load(first.shared(""))
    assert late.epoch == 3
    assert late.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["lr"] == 0.125


# --- averaging --------------------------------------------------------------------------------------------


def test_parameters_statistics_and_extras_are_averaged_in_order() -> None:
    optimizer = MAKERS["adamw with two groups"]()
    extras = [torch.tensor([5.0]), torch.tensor([6], dtype=torch.int64)]
    state = TrainingState(optimizer, average_statistics=["exp_avg", "exp_avg_sq"], extra_tensors=extras)
    assert [t.numel() for t in state.averaged] == [3, 2, 1] * 3 + [1, 1]
    assert {t.dtype for t in state.averaged} == {torch.float32}
    state.load_averaged()
    assert torch.equal(state.averaged[0], parameters()[0])
    assert (float(state.averaged[-2]), float(state.averaged[-1])) == (5.0, 6.0)
    for number, averaged in enumerate(state.averaged):
        averaged.fill_(number + 0.6)
    state.apply_averaged()
    assert state.parameters[2].tolist() == pytest.approx([2.6])
    assert optimizer.state[state.parameters[1]]["exp_avg"].tolist() == pytest.approx([4.6, 4.6])
    assert optimizer.state[state.parameters[1]]["exp_avg_sq"].tolist() == pytest.approx([7.6, 7.6])
    assert extras[0].tolist() == pytest.approx([9.6])
    assert extras[1].tolist() == [11]


def test_a_statistic_that_is_not_there_cannot_be_averaged() -> None:
    with pytest.raises(ValueError, match="no statistic 'exp_avg'"):
        TrainingState(MAKERS["sgd with momentum"](), average_statistics=["exp_avg"])


def test_gradients_of_batches_count_by_their_size() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    gradients = Gradients(weights)
    for value, size in ((1.0, 8), (4.0, 16)):
        weights[0].grad = torch.full((2,), value)
        assert gradients.accumulate(size)
        assert weights[0].grad is None
    assert gradients.samples == 24
    gradients.load()
    # as stock: batches relative to the first, over their number
    assert [t.tolist() for t in gradients.averaged] == [[4.5, 4.5], [0.0]]
    gradients.apply()
    assert weights[0].grad.tolist() == [4.5, 4.5]
    assert weights[0].grad is not gradients.averaged[0]
    gradients.reset()
    gradients.load()
    assert gradients.samples == 0
    assert float(gradients.averaged[0].sum()) == 0.0


def test_gradients_of_half_precision_are_summed_in_float32() -> None:
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float16))
    gradients = Gradients([weight])
    for value in (1.0, 2.0**-12):
        weight.grad = torch.full((1,), value, dtype=torch.float16)
        gradients.accumulate(8)
    assert float(gradients._sums[0]) == 1.0 + 2.0**-12
    assert gradients.averaged[0].dtype == torch.float16  # as stock peers' are
