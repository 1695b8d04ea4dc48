"""A small regression that peers of both kinds train: its model, its data, its optimizer. Needs torch alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

INPUTS = 8
BATCH = 16


def make_model(seed: int) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(INPUTS, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))


def make_optimizer(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.03)


def make_scheduler(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + 0.05 * epoch))


def answers(inputs: torch.Tensor) -> torch.Tensor:
    """What is to be learned."""
    return torch.sin(inputs[:, :1]) + inputs[:, 1:2] * inputs[:, 2:3] / 2 - inputs[:, 3:4]


class Batches:
    """The batches of one peer, the same ones in each run."""

    size = BATCH

    def __init__(self, number: int) -> None:
        self._data = torch.Generator().manual_seed(1000 + number)

    def loss(self, model: torch.nn.Module) -> torch.Tensor:
        inputs = torch.randn(BATCH, INPUTS, generator=self._data)
        return torch.nn.functional.mse_loss(model(inputs), answers(inputs))


@torch.no_grad()
def loss_of(model: torch.nn.Module) -> float:
    """On data that no peer trains with."""
    inputs = torch.randn(2048, INPUTS, generator=torch.Generator().manual_seed(1))
    return float(torch.nn.functional.mse_loss(model(inputs), answers(inputs)))


@torch.no_grad()
def weights_of(model: torch.nn.Module) -> list[float]:
    return [float(w) for parameter in model.parameters() for w in parameter.flatten()]
