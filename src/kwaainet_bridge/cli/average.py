"""``kwaainet-bridge average``: peers on this machine average random tensors, and a picture of how they converge."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
import trio
import typer
from rich.console import Console

from kwaainet_bridge.cli.printing import console, counted, spinner
from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.errors import ConfigError, DeadlineExceeded
from kwaainet_bridge.hivemind.averaging import Averager, StepResult
from kwaainet_bridge.hivemind.peer import open_peer
from kwaainet_bridge.net.identity import Identity

_COLUMNS: Final = 40  # of the picture
_PATIENCE: Final = 6  # a round is given up after so many times the matchmaking time
_SPREAD: Final = 10.0  # peers begin around different numbers between minus and plus this


@dataclass(frozen=True, slots=True)
class AverageOptions:
    """Times in seconds. ``bootstrap``: the swarm in which to average, if not a new one."""

    peers: int
    group_size: int
    rounds: int
    elements: int
    compression: str
    matchmaking_seconds: float
    prefix: str
    bootstrap: Sequence[str]
    listen: str
    seed: int


async def average_peers(options: AverageOptions) -> None:
    """Run the peers, and print a line for each round.

    Raises NetworkError for a swarm that cannot be reached, ConfigError for options that cannot be. Cancelled: all peers
    end.
    """
    if options.compression not in CompressionType.__members__:
        known = ", ".join(CompressionType.__members__)
        raise ConfigError(f"--compression {options.compression}: must be one of {known}")
    generator = torch.Generator().manual_seed(options.seed)
    tensors = [_beginning(options.elements, generator) for _ in range(options.peers)]
    picture = _Picture(console(), tensors)
    strangers: set[object] = set()
    async with AsyncExitStack() as stack:
        with spinner("starting peers"):
            averagers, address = await _start(stack, options, tensors)
        if address is not None:
            join = f"kwaainet-bridge average --prefix {options.prefix} --initial-peers {address}"
            typer.echo(f"others may take part: {join}\n", err=True)
        picture.print_head()
        picture.print_round(0)
        for number in range(1, options.rounds + 1):
            began = time.monotonic()
            with spinner(f"round {number}"):
                results = await _round(averagers, _PATIENCE * options.matchmaking_seconds)
            picture.print_round(number, groups=_groups(results), seconds=time.monotonic() - began)
            strangers |= {member for result in results if result for member in result.gathered}
        strangers -= {averager.peer_id for averager in averagers}
    picture.print_end(len(strangers))


def _beginning(elements: int, generator: torch.Generator) -> torch.Tensor:
    around = (torch.rand(1, generator=generator) * 2 - 1) * _SPREAD
    return torch.randn(elements, generator=generator) + around


async def _start(
    stack: AsyncExitStack, options: AverageOptions, tensors: Sequence[torch.Tensor]
) -> tuple[list[Averager], str | None]:
    """The peers' averagers, and the address of the first one."""
    averagers: list[Averager] = []
    joined, first = list(options.bootstrap), None
    groups = -(-options.peers // options.group_size)
    width = (groups - 1).bit_length()
    for number, values in enumerate(tensors):
        peer = await stack.enter_async_context(
            open_peer(joined, listen=[options.listen], identity=Identity.generate("ed25519"))
        )
        if not number:
            first = next(iter(peer.host.addresses()), None)
            joined = joined or peer.host.addresses()
        averager = Averager(
            peer,
            [values],
            prefix=options.prefix,
            target_group_size=options.group_size,
            matchmaking_seconds=options.matchmaking_seconds,
            request_seconds=options.matchmaking_seconds / 2,
            compression=CompressionType[options.compression],
            # a row of the grid; from round to round its peers go apart
            bits=format(number // options.group_size, f"0{width}b") if width else "",
        )
        averagers.append(await stack.enter_async_context(averager))
    return averagers, first


async def _round(averagers: Sequence[Averager], seconds: float) -> list[StepResult | None]:
    """All step at once; None for those that found no group."""
    results: list[StepResult | None] = [None] * len(averagers)

    async def step(number: int, averager: Averager) -> None:
        try:
            results[number] = await averager.step(timeout=seconds)
        except DeadlineExceeded:
            return

    async with trio.open_nursery() as nursery:
        for number, averager in enumerate(averagers):
            nursery.start_soon(partial(step, number, averager))
    return results


def _groups(results: Sequence[StepResult | None]) -> str:
    """Sizes of the groups of a round: ``4 + 4``, and those that found none."""
    groups = {frozenset(result.gathered) for result in results if result is not None}
    sizes = " + ".join(str(size) for size in sorted(map(len, groups), reverse=True))
    alone = sum(result is None for result in results)
    return f"{sizes or 'none'}, {alone} alone" if alone else sizes


class _Picture:
    """Where the peers are, from round to round, between the smallest and the largest they began with."""

    def __init__(self, out: Console, tensors: Sequence[torch.Tensor]) -> None:
        self._out = out
        self._tensors = tensors
        self._mean = torch.stack(list(tensors)).double().mean(dim=0)
        positions = self._positions()
        self._least, self._most = min(positions), max(positions)

    def _positions(self) -> list[float]:
        return [float(tensor.double().mean()) for tensor in self._tensors]

    def print_head(self) -> None:
        self._out.print(
            f"round  {'where the peers are':<{_COLUMNS}}  distance from the mean   seconds  groups"
        )

    def print_round(self, number: int, *, groups: str = "", seconds: float | None = None) -> None:
        distance = float(
            torch.stack([(t.double() - self._mean).square().mean() for t in self._tensors]).mean()
        )
        took = "" if seconds is None else f"{seconds:.1f}"
        line = f"{number:>5}  {self._strip():<{_COLUMNS}}  {distance**0.5:>22.3g}  {took:>8}  {groups}"
        self._out.print(line.rstrip())

    def _strip(self) -> str:
        width = (self._most - self._least) or 1.0
        columns = Counter(
            min(max(round((position - self._least) / width * (_COLUMNS - 1)), 0), _COLUMNS - 1)
            for position in self._positions()
        )
        marks = (columns[column] for column in range(_COLUMNS))
        return "".join("·" if not peers else str(peers) if peers < 10 else "#" for peers in marks)

    def print_end(self, strangers: int) -> None:
        if strangers:
            self._out.print(
                f"\n{counted(strangers, 'peer')} of others took part: the mean of all is not known here."
            )
            return
        worst = max(float((tensor.double() - self._mean).abs().max()) for tensor in self._tensors)
        self._out.print(f"\nNo number of any peer is further than {worst:.3g} from the mean of all.")
