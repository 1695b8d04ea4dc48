"""Sessions that do everything that sessions can, at the same time and with too little room, against the whole model.

Prompts in common, going back, reordering, trees, adapters, deep prompts, parts of the blocks, idle sessions that leave,
cancellations, and blocks that fail now and then. What each gets is right, and nothing is left of any.
"""

from __future__ import annotations

import random
from collections import Counter
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from adapter_files import make_adapter
from engine_support import close
from family_models import BLOCKS, random_hidden, save

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import Engine, EngineConfig, Session
from kwaainet_bridge.engine.session import BROKEN
from kwaainet_bridge.engine.span import Span
from kwaainet_bridge.errors import AllocationFailed, EngineError

PAGE = defaults.PAGE_TOKENS
LENGTH = 160
INJECTED = "now and then"


class Life:
    """One session with what it should have: ``past`` [rows, tokens, H], and the tree of its last step."""

    def __init__(self, engine: Engine, rng: random.Random, done: Counter[str]) -> None:
        self.engine, self.rng, self.done = engine, rng, done
        self.blocks = rng.choice([range(BLOCKS), range(BLOCKS), range(2), range(1, BLOCKS)])
        self.rows, self.length = rng.choice([1, 1, 1, 3]), rng.choice([40, 100, LENGTH])
        self.adapter = rng.choice([None, "one", "two"])
        self.common = random_hidden(1, LENGTH, seed=rng.randrange(3))
        self.past = self.common[:, :0].expand(self.rows, 0, -1)
        self.tree: tuple[torch.Tensor, list[int]] | None = None

    async def run(self) -> None:
        rng = self.rng
        try:
            async with self.engine.open_session(
                self.blocks, self.rows, self.length, peer=rng.choice("ab"), adapter=self.adapter, timeout=2
            ) as session:
                for _ in range(rng.randrange(2, 10)):
                    await trio.sleep(rng.choice([0, 0.002, 0.01]))
                    if not await self.step(session):
                        return
                    assert session.position == self.past.shape[1]
        except AllocationFailed:
            self.done["refused"] += 1

    async def step(self, session: Session) -> bool:
        """Whether the session can go on."""
        rng, past, given = self.rng, self.past, dict[str, Any]()
        if self.tree is not None and rng.random() < 0.7:
            nodes, parents = self.tree
            given["accept"] = path_to(parents, rng.randrange(len(parents)))
            past = torch.cat([past, nodes[:, given["accept"]]], 1)
        if past.shape[1] and rng.random() < 0.25:
            given["start_from_position"] = start = rng.choice(
                [0, rng.randrange(past.shape[1]), past.shape[1]]
            )
            past = past[:, :start]
        start = past.shape[1]
        tokens = min(rng.choice([1, 1, 1, 3, 16, 17, 33, 50, 70]), self.length - start)
        if not tokens:
            return False
        hidden = self.common[:, start : start + tokens]
        if self.rows > 1 or rng.random() < 0.3:
            hidden = random_hidden(self.rows, tokens, seed=rng.randrange(1 << 20))
        if self.rows > 1 and rng.random() < 0.4:
            order = [rng.randrange(self.rows) for _ in range(self.rows)]
            given["hypo_ids"], past = torch.tensor(order), past[order]
        if self.rows == 1 and tokens <= 17 and rng.random() < 0.3:
            given["tree"] = [rng.randrange(-1, node) for node in range(tokens)]
        elif tokens > 2 and rng.random() < 0.1:
            given["prompts"] = torch.randn(len(self.blocks), 1, 2, hidden.shape[2])
        before = session.position
        try:
            with trio.move_on_after(rng.choice([0, 0.001, *[100] * 20])):
                output = await session.step(hidden, **given)
                await self.compare(past, hidden, output, given)
                return "prompts" not in given  # what follows cannot be compared
        except AllocationFailed:
            self.done["no room"] += 1
        except EngineError as error:
            if INJECTED not in str(error):
                raise
            self.done["failed"] += 1
            return False
        self.done["cancelled"] += 1
        return session._unusable != BROKEN and session.position == before

    async def compare(
        self, past: torch.Tensor, hidden: torch.Tensor, output: torch.Tensor, given: dict[str, Any]
    ) -> None:
        self.done["steps"] += 1
        parents = given.get("tree")
        with trio.CancelScope(shield=True):
            if parents is not None:
                paths = [hidden[:, path_to(parents, node)] for node in range(len(parents))]
                outputs = [(await self.whole(torch.cat([past, path], 1)))[:, -1:] for path in paths]
                close(output, torch.cat(outputs, 1), 5e-5)
                self.past, self.tree = past, (hidden, parents)
                return
            self.past, self.tree = torch.cat([past, hidden], 1), None
            if "prompts" not in given:
                close(output, (await self.whole(self.past))[:, past.shape[1] :], 5e-5)

    async def whole(self, hidden: torch.Tensor) -> torch.Tensor:
        """Without a cache, which other tests compare with transformers."""
        return await self.engine.forward(hidden, self.blocks, adapter=self.adapter)


def path_to(parents: list[int], node: int) -> list[int]:
    return [*path_to(parents, parents[node]), node] if node >= 0 else []


@pytest.mark.parametrize("seed", range(6))
async def test_each_gets_what_it_would_alone(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, done = random.Random(seed), Counter[str]()
    save(["llama3.1", "bloom", "mistral"][seed % 3], tmp_path / "model")
    modules = ("mlp.dense_h_to_4h",) if seed % 3 == 1 else ("self_attn.v_proj", "mlp.down_proj")
    adapters = [
        make_adapter(tmp_path / name, tmp_path / "model", modules, seed=number)
        for number, name in enumerate(("one", "two"))
    ]
    for name, values in {
        "CACHE_GROWTH_SECONDS": [0.02, 1.0],
        "CACHE_PROMISE_TOKENS": [16, 128],
        "CACHE_AHEAD_TOKENS": [0, 64],
        "PREFIX_SHARE": [0.25, 3.0],
        "MERGED_STEP_TOKENS": [20],
        "PIECE_TOKENS": [24],
    }.items():
        monkeypatch.setattr(defaults, name, rng.choice(values))
    config = EngineConfig(
        str(tmp_path / "model"),
        max_length=LENGTH,
        cache_tokens=rng.choice([20, 28]) * PAGE,
        share_prefixes=rng.choice(["peer", "all"]),
        offload_idle_seconds=[None, 1e-9][seed % 2],
        offload_bytes=rng.choice([1 << 30, 200_000]),
        adapters=tuple(map(str, adapters)),
    )
    engine = await Engine.load(config)
    run, failing = Span.run, random.Random(seed)

    def fail_sometimes(span: Span, block: int, hidden: torch.Tensor, *, cache: Any = None) -> torch.Tensor:
        if cache is not None and failing.random() < 0.01:
            raise RuntimeError(INJECTED)
        return run(span, block, hidden, cache=cache)

    monkeypatch.setattr(Span, "run", fail_sometimes)
    async with aclosing(engine):
        room = engine._room

        async def lives(number: int) -> None:
            mine = random.Random(100 * seed + number)
            for _ in range(3):
                await Life(engine, mine, done).run()

        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(lives, number)
        assert done["steps"] > 20
        assert engine.cache_bytes_left == engine.cache_bytes_total
        assert room.prefixes is not None
        while room.prefixes.evict():
            pass
        assert not len(room.prefixes)
        assert not room.allocator._owners
        assert not any(room.allocator._claims.claimed)
        assert [room.allocator.free(block) for block in range(BLOCKS)] == [room.budget.pages] * BLOCKS
        if room.offload is not None:
            assert (room.offload.left, room.offload.holdings) == (config.offload_bytes, {})
