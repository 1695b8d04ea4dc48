"""Runs of our own peers, in simulated time: what they train, who comes and goes, what hostile peers achieve."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
import trio
from trainers import RUN, TARGET, Trainer, clock, owner_key, small_model, training

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.averaging import Averager, State
from kwaainet_bridge.hivemind.dht import RsaSignatureValidator
from kwaainet_bridge.hivemind.dht.signatures import owner_marker
from kwaainet_bridge.hivemind.optim.progress import progress_key


def replayed(trainers: list[Trainer], epochs: int, *, momentum: float) -> torch.Tensor:
    """The weights after training alone with the batches that these peers took for each epoch."""
    model = small_model(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    data = [torch.Generator().manual_seed(1000 + trainer.number) for trainer in trainers]
    for epoch in range(epochs):
        inputs = [
            torch.randn(8, 3, generator=data[n])
            for n, trainer in enumerate(trainers)
            for _ in range(trainer.log[epoch].samples // 8)
        ]
        together = torch.cat(inputs)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(together), together @ TARGET.T + 1.0).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def agree(trainers: list[Trainer]) -> bool:
    return all((t.weights() - trainers[0].weights()).abs().max() < 1e-5 for t in trainers)


# --- what is trained --------------------------------------------------------------------------------------


@pytest.mark.parametrize("average_state_every", [1, 3])
async def test_peers_together_train_as_one_would_with_all_batches(
    autojump_clock: object, average_state_every: int
) -> None:
    async with training() as run:
        for seconds in (0.5, 0.7, 1.1):
            await run.add(seed=0, seconds=seconds, momentum=0.5, average_state_every=average_state_every)
        await run.train(6)
        for trainer in run.trainers:
            assert [end.epoch for end in trainer.log] == [1, 2, 3, 4, 5, 6]
            assert all(end.gradient_peers == 3 and end.stepped for end in trainer.log)
        assert all(sum(t.log[n].samples for t in run.trainers) >= 64 for n in range(6))
        expected = replayed(run.trainers, 6, momentum=0.5)
        for trainer in run.trainers:
            assert (trainer.weights() - expected).abs().max() < 1e-5


async def test_peers_that_begin_with_other_parameters_come_to_the_same(autojump_clock: object) -> None:
    async with training(3) as run:
        assert not agree(run.trainers)
        await run.train(15)
        await run.settle()
        assert agree(run.trainers)
        assert run.trainers[0].error < 0.3


async def test_a_peer_alone_trains_without_waiting_for_anybody(autojump_clock: object) -> None:
    async with training(1, seed=0, delay_state_averaging=False) as run:
        began = trio.current_time()
        await run.train(5)
        assert trio.current_time() - began == pytest.approx(5 * 8 * 0.5, abs=1)
        trainer = run.trainers[0]
        assert [(end.samples, end.gradient_peers) for end in trainer.log] == [(64, 1)] * 5
        assert (trainer.weights() - replayed([trainer], 5, momentum=0.0)).abs().max() < 1e-6


async def test_averaging_of_parameters_may_be_waited_for(autojump_clock: object) -> None:
    async with training(2, delay_state_averaging=False) as run:
        await run.train(2)
        assert agree(run.trainers)


async def test_batches_that_are_not_finite_are_left_out(
    autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    async with training(1, seed=0) as run:
        trainer = run.trainers[0]
        trainer.backward()
        trainer.model.bias.grad = torch.tensor([math.nan])
        await trainer.optimizer.step(8)
        assert "not finite" in caplog.text
        assert trainer.optimizer.samples == 0
        assert trainer.model.weight.grad is None
        await run.train(2)
        assert torch.isfinite(trainer.weights()).all()


async def test_wrong_calls_are_refused(autojump_clock: object) -> None:
    async with training(1) as run:
        trainer = run.trainers[0]
        with pytest.raises(ValueError, match="batch size is given nowhere"):
            await trainer.optimizer.step()
        with pytest.raises(ValueError, match="batch_size is 0"):
            await trainer.optimizer.step(0)
        with pytest.raises(ValueError, match="average_state_every is 0"):
            await run.add(average_state_every=0)
        helper = await run.add(auxiliary=True)
        with pytest.raises(ValueError, match="auxiliary peer has no batches"):
            await helper.optimizer.step(8)


# --- who comes and goes -----------------------------------------------------------------------------------


async def test_a_peer_that_joins_late_takes_the_state_and_follows(autojump_clock: object) -> None:
    async with training(2, seed=0, momentum=0.5, schedule=0.9) as run:
        await run.train(4)
        async with trio.open_nursery() as nursery:
            for trainer in run.trainers:
                nursery.start_soon(trainer.train, 9)
            await trio.sleep(1)
            late = await run.add(seed=7, momentum=0.5, schedule=0.9)
            assert late.optimizer.epoch == 0
            await late.step()
            assert late.optimizer.epoch == run.trainers[0].optimizer.epoch >= 4
            assert agree(run.trainers)
            nursery.start_soon(late.train, 9)
        assert [end.epoch for end in late.log] == list(range(late.log[0].epoch, 10))
        assert run.trainers[0].log[-1].gradient_peers == 3
        for trainer in run.trainers:
            rate = trainer.optimizer.optimizer.param_groups[0]["lr"]
            assert rate == pytest.approx(0.1 * 0.9**9)
        assert agree(run.trainers)


async def test_a_peer_that_fell_behind_catches_up(autojump_clock: object) -> None:
    async with training(3, seed=0) as run:
        await run.train(2)
        slow = run.trainers[2]
        await run.train(6, run.trainers[:2])  # it computes nothing meanwhile
        assert slow.optimizer.epoch == 2
        await run.train(10)
        assert slow.log[1].epoch == 2
        assert slow.log[2].epoch > 6
        await run.settle()
        assert agree(run.trainers)


async def test_others_go_on_when_a_peer_dies(autojump_clock: object) -> None:
    async with training(3, seed=0) as run:
        async with trio.open_nursery() as nursery:
            for trainer in run.trainers:
                nursery.start_soon(trainer.train, 8)
            await trio.sleep(11)  # in the middle of the fourth epoch
            run.die(run.trainers[2])
        for trainer in run.trainers[:2]:
            assert trainer.log[1].gradient_peers == 3
            assert [end.epoch for end in trainer.log] == list(range(1, 9))
            assert trainer.log[-1].gradient_peers == 2
        assert agree(run.trainers[:2])


async def test_a_peer_that_leaves_takes_its_report_back(autojump_clock: object) -> None:
    async with training(1) as run, trio.open_nursery() as nursery:
        nursery.start_soon(run.trainers[0].train_on)
        peer = await run.peer()
        other = Trainer(peer, 1)
        async with other.optimizer:
            await other.train(2)
            await trio.sleep(10)
            assert run.trainers[0].optimizer.swarm.peers == 2
        await trio.sleep(10)
        assert run.trainers[0].optimizer.swarm.peers == 1
        run.trainers[0].alive.cancel()


async def test_own_gradients_are_used_if_averaging_fails(
    autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    """The other peer has another model under the same name: they form no group."""
    async with training(2, seed=0) as run:
        peer = await run.peer()
        other = Trainer(peer, 2)
        other.model = torch.nn.Linear(3, 1, bias=False)
        alone = run.trainers[:1]
        run.network.down.add(run.trainers[1].peer.peer_id)
        marker = owner_marker(owner_key(5))
        peer.dht.add_validators([RsaSignatureValidator(owner_key(5))])
        claim = report(epoch=0, peer_id=b"other")
        await peer.dht.store(progress_key(RUN), claim, clock() + 1000, subkey=marker)
        await run.train(2, alone)
        assert [(end.gradient_peers, end.stepped) for end in alone[0].log] == [(1, True)] * 2
        assert "own gradients alone" in caplog.text
        assert (alone[0].weights() - replayed(alone, 2, momentum=0.0)).abs().max() < 1e-6


# --- roles ------------------------------------------------------------------------------------------------


async def test_a_peer_in_client_mode_trains_with_others(autojump_clock: object) -> None:
    async with training(2, seed=0) as run:
        client = await run.add(seed=0, dht_client=True)
        await run.train(5)
        assert [end.gradient_peers for end in client.log][1:] == [3, 3, 3, 3]
        assert run.trainers[0].optimizer.swarm.clients == 1
        assert agree(run.trainers)


async def test_an_auxiliary_peer_helps_and_changes_nothing(autojump_clock: object) -> None:
    async with training(2, seed=0) as run:
        helper = await run.add(seed=9, auxiliary=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(helper.train_on)
            await run.train(6, run.trainers[:2])
            helper.alive.cancel()
        trained = run.trainers[:2]
        assert {end.gradient_peers for end in trained[0].log[2:]} == {3}
        assert helper.log[-1].gradient_peers == 3
        assert not any(end.stepped or end.samples for end in helper.log)
        assert (trained[0].weights() - replayed(trained, 6, momentum=0.0)).abs().max() < 1e-5


async def test_an_auxiliary_peer_joins_late_without_the_epochs_before(autojump_clock: object) -> None:
    async with training(2, seed=0) as run:
        await run.train(5)
        helper = await run.add(auxiliary=True)
        await helper.step()
        assert helper.optimizer.epoch == 5


# --- hostile peers ----------------------------------------------------------------------------------------


def report(**changes: Any) -> dict[str, Any]:
    return {
        "peer_id": b"vandal",
        "epoch": 0,
        "samples_accumulated": 0,
        "samples_per_second": 0.0,
        "time": clock(),
        "client_mode": False,
    } | changes


async def test_malformed_reports_change_nothing(autojump_clock: object) -> None:
    """The vandal's own node checks nothing, and offers its lies to whoever asks."""
    async with training() as run:
        vandal = await run.peer()
        vandal.dht.add_validators([RsaSignatureValidator(*(owner_key(n) for n in range(10, 16)))])
        lies = [7, {}, report(epoch=-1), report(epoch="x"), report(time=math.nan), report(more=bytes(5000))]
        for number, lie in enumerate(lies):
            marker = owner_marker(owner_key(10 + number))
            await vandal.dht.store(progress_key(RUN), lie, clock() + 500, subkey=marker)
        for _ in range(2):
            await run.add(seed=0)
        await run.train(3)
        assert all(trainer.optimizer.swarm.peers == 2 for trainer in run.trainers)
        assert (run.trainers[0].weights() - replayed(run.trainers, 3, momentum=0.0)).abs().max() < 1e-5


async def test_an_epoch_that_nobody_has_holds_a_run_up_for_a_moment_only(autojump_clock: object) -> None:
    async with training(2, seed=0) as run:
        await run.train(2)
        vandal = await run.peer()
        vandal.dht.add_validators([RsaSignatureValidator(owner_key(10))])
        lie = report(epoch=1_000_000)
        stored = await vandal.dht.store(
            progress_key(RUN), lie, clock() + 50, subkey=owner_marker(owner_key(10))
        )
        assert stored.ok
        began = trio.current_time()
        await run.train(6)
        assert trio.current_time() - began < 60
        assert all(trainer.optimizer.epoch == 6 for trainer in run.trainers)
        assert agree(run.trainers)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda s: State(s.metadata | {"epoch": "9"}, s.tensors), "its epoch is '9'"),
        (lambda s: State(s.metadata | {"epoch": -1}, s.tensors), "its epoch is -1"),
        (
            lambda s: State(s.metadata | {"optimizer_metadata": None}, s.tensors),
            "no values of optimizer state",
        ),
        (lambda s: State(s.metadata, s.tensors[:1]), "1 tensors, 2 parameters alone expected"),
        (lambda s: State(s.metadata, [t * math.nan for t in s.tensors]), "not finite"),
        (lambda s: State(s.metadata, [torch.zeros(3)] * 4), "shape"),
    ],
)
async def test_states_that_are_no_use_are_left_for_the_next_peers(
    autojump_clock: object, caplog: pytest.LogCaptureFixture, spoil: Any, why: str
) -> None:
    caplog.set_level(logging.INFO)
    async with training(1, seed=0, momentum=0.5) as run:
        await run.train(2)
        vandal = await run.peer()
        honest = run.trainers[0].optimizer._shared_state
        averager = Averager(
            vandal,
            [torch.zeros(1)],
            prefix=f"{RUN}_state_averager",
            kind="TrainingStateAverager",
            state=lambda: spoil(honest()),
            clock=clock,
        )
        async with averager:
            averager.share_state(allowed=True, priority=1e300)
            await trio.sleep(1)
            late = await run.add(seed=7, momentum=0.5)
            await late.step()
            assert late.optimizer.epoch == 2
            assert agree(run.trainers)
            assert why in caplog.text


async def test_without_anybody_to_give_a_state_a_peer_tries_again(
    autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    async with training(1, seed=0) as run:
        before = run.trainers[0].weights()
        assert not await run.trainers[0].optimizer.load_state_from_peers()
        assert torch.equal(run.trainers[0].weights(), before)
        assert "nobody gave a state of epoch 0 or later" in caplog.text


# --- cancellation -----------------------------------------------------------------------------------------


async def test_a_step_cancelled_while_it_averages_can_be_made_again(autojump_clock: object) -> None:
    async with training(2, seed=0) as run:
        first, second = run.trainers
        with trio.move_on_after(4):
            await first.train_on()
        while not (first.optimizer._tracker.ready() and first.optimizer.swarm.others):
            second.backward()
            await second.optimizer.step(8) if second.optimizer.samples < 32 else await trio.sleep(0.3)
        samples = first.optimizer.samples
        first.backward()
        with trio.move_on_after(0.5) as scope:
            await first.optimizer.step(8)
        assert scope.cancelled_caught
        assert first.optimizer.samples == samples + 8
        assert first.optimizer.epoch == 0
        await run.train(5)
        assert first.optimizer.epoch == 5
        assert 2 in {end.gradient_peers for end in first.log}


async def test_leaving_in_the_middle_of_an_epoch_is_quick(autojump_clock: object) -> None:
    async with training(2) as run:
        await run.train(3)
        began = trio.current_time()
    assert trio.current_time() - began < defaults.TRAINING_GOODBYE_SECONDS + 10


def test_the_scheduler_must_be_that_of_the_optimizer() -> None:
    from kwaainet_bridge.hivemind.optim.training_state import TrainingState

    optimizers = [torch.optim.SGD(small_model().parameters(), lr=0.1) for _ in range(2)]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizers[0], 0.9)
    with pytest.raises(ValueError, match="belongs to another optimizer"):
        TrainingState(optimizers[1], scheduler=scheduler)


async def test_a_group_that_says_odd_epochs_does_no_harm(autojump_clock: object) -> None:
    """What others gather is theirs to choose: an average is left, or taken, and nothing else happens."""
    async with training(2, seed=0) as run:
        vandal = await run.peer()
        for word in ("x", None, -(2**60), 2**60, [1]):
            averager = Averager(
                vandal,
                [torch.zeros(1, 3), torch.zeros(1)],
                prefix=f"{RUN}_state_averager",
                kind="TrainingStateAverager",
                matchmaking_seconds=2.0,
                request_seconds=1.0,
                share_state=False,
                clock=clock,
            )
            epoch = run.trainers[0].optimizer.epoch
            async with averager, trio.open_nursery() as nursery:
                averager.begin(weight=0.0, gather=word, timeout=60)
                nursery.start_soon(run.train, epoch + 2)
            assert run.trainers[0].optimizer.epoch == epoch + 2
        await run.train(run.trainers[0].optimizer.epoch + 2)
        await run.settle()
        assert agree(run.trainers)
