"""What a peer of a training run holds: parameters, the optimizer's statistics, the epoch.

All functions here that take a tensor's values compute, so they are meant for a thread beside the event loop, and for
whoever holds the averager's lock. Source of what is shared, and of its order: hivemind 1.1.12,
``optim/state_averager.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.hivemind.averaging import State
from kwaainet_bridge.hivemind.optim import optimizer_state


class Scheduler(Protocol):
    """What is used of torch's ``LRScheduler``."""

    optimizer: torch.optim.Optimizer
    last_epoch: int

    def step(self) -> None: ...


class TrainingState:
    """The state around ``optimizer``, whose parameters it trains.

    ``averaged`` are copies, float32 on the CPU, on which an averager works: the parameters, then for each name in
    ``average_statistics`` this statistic of all parameters, then ``extra_tensors``. An optimizer without statistics
    gets them by a step with gradients of zero, as in stock peers; unlike there, parameters stay. ``scheduler`` is
    stepped once per epoch.

    Raises ValueError for what peers cannot exchange.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        scheduler: Scheduler | None = None,
        average_statistics: Sequence[str] = (),
        extra_tensors: Sequence[torch.Tensor] = (),
    ) -> None:
        if scheduler is not None and scheduler.optimizer is not optimizer:
            raise ValueError("the scheduler belongs to another optimizer")
        self.optimizer = optimizer
        self.epoch = 0
        self.parameters: tuple[torch.Tensor, ...] = tuple(
            parameter for group in optimizer.param_groups for parameter in group["params"]
        )
        self._scheduler = scheduler
        self._extras = tuple(extra_tensors)
        self._statistics = tuple(average_statistics)
        _initialise(optimizer, self.parameters)
        optimizer_state.dump(optimizer)
        for name in self._statistics:
            if any(name not in optimizer.state[parameter] for parameter in self.parameters):
                raise ValueError(f"the optimizer has no statistic {name!r} of each parameter")
        self.averaged = tuple(
            torch.zeros(tensor.shape, dtype=torch.float32, requires_grad=False) for tensor in self._local()
        )

    def _local(self) -> Iterator[torch.Tensor]:
        """What is averaged, in order."""
        yield from self.parameters
        for name in self._statistics:
            for parameter in self.parameters:
                yield self.optimizer.state[parameter][name]
        yield from self._extras

    # --- a step -------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Step the optimizer with the parameters' gradients, and remove them."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def begin_epoch(self, epoch: int) -> None:
        """Set the epoch, and what depends on it."""
        self.epoch = epoch
        while self._scheduler is not None and self._scheduler.last_epoch < epoch:
            self._scheduler.step()

    # --- averaging ----------------------------------------------------------------------------------------

    def load_averaged(self) -> None:
        """Copy the state into ``averaged``."""
        with torch.no_grad():
            for averaged, local in zip(self.averaged, self._local(), strict=True):
                averaged.copy_(local)

    def apply_averaged(self) -> None:
        """Copy ``averaged`` into the state."""
        with torch.no_grad():
            for averaged, local in zip(self.averaged, self._local(), strict=True):
                local.copy_(averaged if local.is_floating_point() else averaged.round())

    # --- sharing ------------------------------------------------------------------------------------------

    def shared(self, group_bits: str) -> State:
        """What others download. The tensors are the state's own: copy them before it changes."""
        entries, tensors = optimizer_state.dump(self.optimizer)
        metadata = {"epoch": self.epoch, "group_bits": group_bits, "optimizer_metadata": entries}
        return State(metadata, [t.detach() for t in (*self.parameters, *self._extras, *tensors)])

    def check(self, state: State) -> int:
        """The epoch of another peer's state. Raises RemoteError, naming the mistake, unless ``load`` can take it."""
        self._read(state)
        return int(state.metadata["epoch"])

    def load(self, state: State) -> None:
        """Take over another peer's state. Raises RemoteError as ``check`` does, and leaves everything as it was.

        With a scheduler the optimizer's options stay ours: it sets them by the epoch.
        """
        with torch.no_grad():
            own = (*self.parameters, *self._extras)
            self.optimizer.load_state_dict(self._read(state))
            for ours, theirs in zip(own, state.tensors, strict=False):
                ours.copy_(theirs)
            self.begin_epoch(state.metadata["epoch"])

    def _read(self, state: State) -> dict[str, object]:
        metadata = state.metadata
        epoch = metadata.get("epoch") if isinstance(metadata, dict) else None
        if not isinstance(epoch, int) or isinstance(epoch, bool) or not 0 <= epoch <= 2**53:
            raise RemoteError(f"training state: its epoch is {epoch!r:.60}")
        if epoch < self.epoch:
            raise RemoteError(f"training state: of epoch {epoch}, ours is of {self.epoch}")
        own = (*self.parameters, *self._extras)
        if len(state.tensors) < len(own):
            raise RemoteError(
                f"training state: {len(state.tensors)} tensors, {len(own)} parameters alone expected"
            )
        for number, (theirs, ours) in enumerate(zip(state.tensors, own, strict=False)):
            optimizer_state.check_tensor(f"training state, tensor {number}", theirs, ours)
        return optimizer_state.checked(
            self.optimizer,
            metadata.get("optimizer_metadata"),
            state.tensors[len(own) :],
            own_options=self._scheduler is not None,
        )


def _initialise(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]) -> None:
    if any(
        isinstance(value, torch.Tensor)
        for _, value in optimizer_state.leaves(optimizer.state_dict()["state"])
    ):
        return
    before = [(parameter.detach().clone(), parameter.grad) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with torch.no_grad():
        for parameter, (value, gradient) in zip(parameters, before, strict=True):
            parameter.copy_(value)
            parameter.grad = gradient
