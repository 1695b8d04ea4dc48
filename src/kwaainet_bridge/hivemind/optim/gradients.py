"""Gradients: accumulated over this peer's batches, then averaged with those of other peers.

Source of the arithmetic: hivemind 1.1.12, ``optim/grad_averager.py``. All functions here compute, so they are meant for
a thread beside the event loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Gradients:
    """The gradients of ``parameters``: a sum of this peer's, and ``averaged``, which an averager works on.

    ``averaged`` are on the CPU and have the parameters' dtypes, as those of stock peers; sums have at least float32,
    and the parameters' devices. Parameters without gradient count as having one of zeros.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter | torch.Tensor]) -> None:
        self._parameters = tuple(parameters)
        self.averaged = tuple(
            torch.zeros(p.shape, dtype=p.dtype, device="cpu", requires_grad=False) for p in self._parameters
        )
        self._sums = tuple(
            torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
            for p in self._parameters
        )
        self.samples = 0
        self._times = 0
        self._first_batch = 0

    def accumulate(self, batch_size: int) -> bool:
        """Add the parameters' gradients, the mean of a batch of this size, and remove them from the parameters.

        Batches count by their size relative to the first one. A gradient that is not finite is left out, with all of
        its batch: then the answer is False. Raises ValueError for a batch without samples.
        """
        with torch.no_grad():
            if batch_size < 1:
                raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
            gradients = [parameter.grad for parameter in self._parameters]
            for parameter in self._parameters:
                parameter.grad = None
            if not all(
                bool(torch.isfinite(gradient).all()) for gradient in gradients if gradient is not None
            ):
                return False
            self._first_batch = self._first_batch or batch_size
            for total, gradient in zip(self._sums, gradients, strict=True):
                if gradient is not None:
                    total.add_(
                        gradient.detach().to(total.device, total.dtype), alpha=batch_size / self._first_batch
                    )
            self.samples += batch_size
            self._times += 1
            return True

    def load(self) -> None:
        """Put the mean of this peer's gradients into ``averaged``; zeros if there are none."""
        with torch.no_grad():
            scale = 1 / self._times if self._times else 0.0
            for total, averaged in zip(self._sums, self.averaged, strict=True):
                averaged.copy_(total * scale)

    def apply(self) -> None:
        """Put ``averaged`` into the parameters' gradients."""
        with torch.no_grad():
            for parameter, averaged in zip(self._parameters, self.averaged, strict=True):
                parameter.grad = averaged.to(device=parameter.device, dtype=parameter.dtype, copy=True)

    def reset(self) -> None:
        """Forget what this peer has accumulated; ``averaged`` stay."""
        with torch.no_grad():
            self.samples = self._times = self._first_batch = 0
            for total in self._sums:
                total.zero_()
