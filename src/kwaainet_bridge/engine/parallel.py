"""One model in several processes of this machine: the first leads, the others do the same work in the same order.

The leader is the node's own compute thread. Before it runs a piece of work it tells the others, each over a pipe, and
all run it on their share of the weights and of the KV cache (:mod:`.sharding`); where transformers' plan wants it they
add up what they have. Nothing else passes between them, so whatever fails in one of them ends them all.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import outcome
import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.engine.config import EngineConfig
from kwaainet_bridge.errors import BridgeError, CheckpointError, EngineDied, EngineError

if TYPE_CHECKING:
    from kwaainet_bridge.engine.runner import Runner
    from kwaainet_bridge.engine.span import Span
    from kwaainet_bridge.engine.step import Step

Pieces = Generator[None, None, Any]


class Followers:
    """The processes beside this one. All methods run in the compute thread."""

    def __init__(self, config: EngineConfig, blocks: range) -> None:
        """Start them; they read the model's definition, no weights yet."""
        self._folder = tempfile.TemporaryDirectory(prefix="kwaainet-bridge-")
        self._store = Path(self._folder.name) / "meeting"
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._broken: str | None = None
        context = multiprocessing.get_context("spawn")
        for rank in range(1, config.tensor_parallel):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=follow,
                args=(theirs, config, blocks, rank, self._store),
                name=f"{config.model} share {rank}",
                daemon=True,  # none outlives this process
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def meet(self, span: Span) -> None:
        """Split the span's layers between this process and the others. Raises CheckpointError."""
        from kwaainet_bridge.engine import sharding

        self.wait()
        size = len(self._processes) + 1
        _use_loopback()
        sharding.join(self._store, 0, size, span.device)
        sharding.split(span, size)

    def wait(self) -> None:
        """Return once each has done what it is at. Raises CheckpointError with what one says has failed."""
        for rank, pipe in enumerate(self._pipes, start=1):
            try:
                failed = pickle.loads(pipe.recv_bytes())  # noqa: S301  # of a process that this one has started
            except (EOFError, OSError):
                failed = "it has ended"
            if failed:
                raise CheckpointError(f"the process with share {rank} of the model cannot go on: {failed}")

    def tell(self, *message: Any) -> None:
        """Have them do what this process is about to do. Raises EngineDied if one is gone."""
        self.check()
        packed = pickle.dumps(message)
        try:
            for pipe in self._pipes:
                pipe.send_bytes(packed)
        except OSError as e:
            self.give_up(str(e))
            self.check()

    def check(self) -> None:
        """Raises EngineDied if they no longer work together."""
        if self._broken is None and not all(process.is_alive() for process in self._processes):
            self.give_up("one has ended")
        if self._broken is not None:
            raise EngineDied(
                f"the {len(self._processes) + 1} processes that share the model no longer work together "
                f"({self._broken}): its blocks must be loaded anew"
            )

    def give_up(self, why: str) -> None:
        """End them: they may be at another place than this process."""
        if self._broken is None:
            self._broken = why.partition("\n")[0]
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        """End them and wait until they have ended."""
        from kwaainet_bridge.engine import sharding

        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(defaults.PARALLEL_END_SECONDS)
            process.kill()
            process.join()
        sharding.leave()
        self._folder.cleanup()


class LeadingRunner:
    """A runner whose work the followers do too."""

    def __init__(self, runner: Runner, followers: Followers) -> None:
        self._runner = runner
        self._followers = followers
        self._serial = 0
        self.hidden_size = runner.hidden_size
        self.dtype = runner.dtype

    def check(self) -> None:
        self._followers.check()

    def run_merged(self, steps: Sequence[Step]) -> Sequence[outcome.Outcome[torch.Tensor]]:
        try:
            self._followers.tell("run", "run_merged", steps)
        except EngineError as e:
            return [outcome.Error(e) for _ in steps]
        results = self._runner.run_merged(steps)
        for result in results:
            if isinstance(result, outcome.Error):
                self._followers.give_up(str(result.error))
        return results

    def run_prompt(self, step: Step, contended: Callable[[], bool]) -> Pieces:
        def ask() -> bool:
            answer = contended()
            self._followers.tell(answer)
            return answer

        return self._in_pieces("run_prompt", self._runner.run_prompt(step, ask), step)

    def forward(self, *args: Any) -> Pieces:
        return self._in_pieces("forward", self._runner.forward(*args), *args)

    def backward(self, *args: Any) -> Pieces:
        return self._in_pieces("backward", self._runner.backward(*args), *args)

    def _in_pieces(self, name: str, pieces: Pieces, *args: Any) -> Pieces:
        number, self._serial = self._serial, self._serial + 1
        self._followers.tell("begin", number, name, *args)
        done = False
        try:
            while True:
                self._followers.tell("next", number)
                try:
                    next(pieces)
                except StopIteration as end:
                    done = True
                    return end.value
                except BaseException as e:
                    self._followers.give_up(str(e))
                    raise
                yield
        finally:
            pieces.close()
            if not done:
                self._forget(number)

    def _forget(self, number: int) -> None:
        """Work that was given up between two pieces."""
        try:
            self._followers.tell("close", number)
        except EngineError:
            return  # they are gone, and it with them


def follow(pipe: Connection, config: EngineConfig, blocks: range, rank: int, store: Path) -> None:
    """The life of a follower. It ends with the pipe, and with whatever goes wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the leader decides
    try:
        runner = _load(pipe, config, blocks, rank, store)
    except (BridgeError, RuntimeError, OSError, MemoryError) as e:
        pipe.send_bytes(pickle.dumps(str(e) or type(e).__name__))
        return
    pipe.send_bytes(pickle.dumps(None))

    def hear() -> Any:
        return pickle.loads(pipe.recv_bytes())  # noqa: S301  # of the process that has started this one

    begun: dict[int, Pieces] = {}
    while True:
        try:
            what, subject, *rest = hear()
        except (EOFError, OSError):
            return
        if what == "run":
            getattr(runner, subject)(*rest)
        elif what == "begin":
            name, *args = rest
            if name == "run_prompt":
                args.append(lambda: hear()[0])
            begun[subject] = getattr(runner, name)(*args)
        elif what == "next":
            try:
                next(begun[subject])
            except StopIteration:
                del begun[subject]
        else:
            begun.pop(subject).close()


def _load(pipe: Connection, config: EngineConfig, blocks: range, rank: int, store: Path) -> Runner:
    from kwaainet_bridge.engine import family, sharding
    from kwaainet_bridge.engine.checkpoint import Checkpoint
    from kwaainet_bridge.engine.runner import Runner
    from kwaainet_bridge.engine.span import Span
    from kwaainet_bridge.engine.weights.cache import cache_of

    torch.set_grad_enabled(False)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    checkpoint = Checkpoint(
        config.model,
        revision=config.revision,
        weights=cache_of(config.storage),  # closed by the end of this process
        allow_pickled=config.storage.allow_pickled,
    )
    span = Span(family.build(checkpoint), checkpoint, blocks, config.dtype, config.device_of(rank))
    pipe.send_bytes(pickle.dumps(None))
    _use_loopback()
    size = config.tensor_parallel
    sharding.join(store, rank, size, span.device)
    sharding.split(span, size)
    for block in blocks:
        span.load(block)
    pipe.send_bytes(pickle.dumps(None))
    pipe.recv_bytes()  # all have loaded
    return Runner.make(config, span)


def _use_loopback() -> None:
    """Nothing that these processes say leaves the machine."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
