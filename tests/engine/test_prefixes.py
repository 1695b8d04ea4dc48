"""Beginnings that sessions have in common: computed once, shared, never by mistake, and given up where there is need."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import trio
import trio.testing
from engine_support import BLOCKS as LLAMA_BLOCKS
from engine_support import HIDDEN, Reference, at_once, close
from family_models import BLOCKS, random_hidden, save
from hypothesis import given, settings
from hypothesis import strategies as st

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import Engine, EngineConfig
from kwaainet_bridge.engine.budget import PageBudget
from kwaainet_bridge.engine.compute import Merged
from kwaainet_bridge.engine.holding import CacheRoom
from kwaainet_bridge.engine.offload import Offload
from kwaainet_bridge.engine.pages import PageAllocator, PageTable, pages_for
from kwaainet_bridge.engine.prefix import PrefixCache
from kwaainet_bridge.engine.session import Session
from kwaainet_bridge.engine.step import Step
from kwaainet_bridge.errors import AllocationFailed, ConfigError, EngineError, InvalidRequest

PAGE = defaults.PAGE_TOKENS
ALL = range(LLAMA_BLOCKS)
PROMPT = 3 * PAGE + 5


@asynccontextmanager
async def loaded(folder: Path, **settings: Any) -> AsyncIterator[Engine]:
    engine = await Engine.load(EngineConfig(str(folder), **{"max_length": 256, **settings}))
    try:
        yield engine
    finally:
        await engine.aclose()


def computed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each step has computed from now on."""
    counts: list[int] = []
    run = engine._compute.run

    async def note(work: Any, *args: Any) -> Any:
        step = work.step if isinstance(work, Merged) else work.make.args[0]
        counts.append(step.tokens)
        return await run(work, *args)

    monkeypatch.setattr(engine._compute, "run", note)
    return counts


def used(engine: Engine) -> int:
    """Pages in use, in the first block."""
    return engine._room.budget.pages - engine._room.allocator.free(0)


def promised(engine: Engine) -> int:
    """Pages promised, in the first block."""
    return engine._room.budget.pages - engine._room.budget._left[0]


async def test_a_prompt_is_computed_once_for_a_peer(
    engine: Engine, llama: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = torch.randn(1, PROMPT + 4, HIDDEN)
    expected = llama(hidden)
    counts = computed(engine, monkeypatch)
    async with engine.open_session(ALL, 1, 128, peer="a") as one:
        close(await one.step(hidden[:, :PROMPT]), expected[:, :PROMPT])
        assert (used(engine), promised(engine)) == (4, 8)
        async with engine.open_session(ALL, 1, 128, peer="a") as two:
            close(await two.step(hidden[:, :PROMPT]), expected[:, :PROMPT])
            assert used(engine) == 5
            assert promised(engine) == 8 + 8  # the common pages once, and what each was promised beyond them
            for session in (two, one):
                for at in range(PROMPT, PROMPT + 4):
                    close(await session.step(hidden[:, at : at + 1]), expected[:, at : at + 1])
    assert counts == [PROMPT, 5, *[1] * 8]
    assert (used(engine), promised(engine)) == (3, 0)
    assert engine.cache_bytes_left == engine.cache_bytes_total


async def test_one_that_goes_first_leaves_the_pages_to_the_other(engine: Engine, llama: Reference) -> None:
    hidden = torch.randn(1, PROMPT + 1, HIDDEN)
    async with engine.open_session(ALL, 1, 128, peer="a") as two:
        async with engine.open_session(ALL, 1, 128, peer="a") as one:
            await one.step(hidden[:, :PROMPT])
            await two.step(hidden[:, :PROMPT])
        assert promised(engine) == 3 + 8
        close(await two.step(hidden[:, PROMPT:]), llama(hidden)[:, PROMPT:])


async def test_a_prompt_that_is_wholly_kept_computes_nothing(
    engine: Engine, llama: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = torch.randn(1, 2 * PAGE, HIDDEN)
    counts = computed(engine, monkeypatch)
    outputs = []
    for _ in range(2):
        async with engine.open_session(ALL, 1, 64, peer="a") as session:
            outputs.append(await session.step(hidden))
            assert session.position == 2 * PAGE
    assert torch.equal(*outputs)
    outputs[1].zero_()  # what is handed out is the caller's
    async with engine.open_session(ALL, 1, 64, peer="a") as session:
        close(await session.step(hidden), llama(hidden))
    assert counts == [2 * PAGE]


async def test_prompts_in_several_steps_and_ones_that_part(
    engine: Engine, llama: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = torch.randn(1, 4 * PAGE + 3, HIDDEN)
    other = torch.cat([hidden[:, : 3 * PAGE - 1], torch.randn(1, PAGE, HIDDEN)], 1)
    counts = computed(engine, monkeypatch)
    async with engine.open_session(ALL, 1, 128, peer="a") as session:
        for part in hidden.split(2 * PAGE, 1):
            await session.step(part)
    async with engine.open_session(ALL, 1, 128, peer="a") as session:
        outputs = [await session.step(part) for part in hidden.split([3 * PAGE, PAGE + 3], 1)]
        close(torch.cat(outputs, 1), llama(hidden))
    async with engine.open_session(ALL, 1, 128, peer="a") as session:
        close(await session.step(other), llama(other))
    assert counts == [2 * PAGE, 2 * PAGE, 3, 3, other.shape[1] - 2 * PAGE]


async def test_going_back_into_common_pages_takes_a_copy(engine: Engine, llama: Reference) -> None:
    hidden, other = torch.randn(1, PROMPT + 1, HIDDEN), torch.randn(1, 2 * PAGE, HIDDEN)
    async with (
        engine.open_session(ALL, 1, 128, peer="a") as one,
        engine.open_session(ALL, 1, 128, peer="a") as two,
    ):
        await one.step(hidden[:, :PROMPT])
        await two.step(hidden[:, :PROMPT])
        output = await two.step(other, start_from_position=20)
        close(output, llama(torch.cat([hidden[:, :20], other], 1))[:, 20:])
        await one.step(hidden[:, :0], start_from_position=37)
        again = await one.step(hidden[:, 37:])
        close(again, llama(hidden)[:, 37:])
        # neither is what was kept: a third session finds the first prompt as it was
        async with engine.open_session(ALL, 1, 128, peer="a") as three:
            close(await three.step(hidden), llama(hidden))
    assert promised(engine) == 0


async def test_a_session_that_went_back_is_not_taken_for_what_it_was(
    engine: Engine, llama: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, other = torch.randn(1, 4 * PAGE, HIDDEN), torch.randn(1, 2 * PAGE, HIDDEN)
    for _ in range(2):
        async with engine.open_session(ALL, 1, 128, peer="a") as session:
            await session.step(hidden[:, : 3 * PAGE])
            await session.step(other[:, :PAGE], start_from_position=PAGE)
            await session.step(other[:, PAGE:])
            output = await session.step(hidden[:, 3 * PAGE :])
            whole = torch.cat([hidden[:, :PAGE], other, hidden[:, 3 * PAGE :]], 1)
            close(output, llama(whole)[:, 3 * PAGE :])
    counts = computed(engine, monkeypatch)
    async with engine.open_session(ALL, 1, 128, peer="a") as session:
        close(await session.step(hidden), llama(hidden))
    assert counts == [PAGE]


@pytest.mark.parametrize(
    ("sharing", "peers", "shared"),
    [
        ("peer", ("a", "a"), True),
        ("peer", ("a", "b"), False),
        ("peer", (None, None), False),
        ("all", ("a", "b"), True),
        ("all", (None, "b"), True),
        ("off", ("a", "a"), False),
    ],
)
async def test_who_shares(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, sharing: str, peers: tuple[Any, Any], shared: bool
) -> None:
    hidden = torch.randn(1, PROMPT, HIDDEN)
    async with loaded(llama_folder, share_prefixes=sharing, blocks=range(2)) as engine:
        counts = computed(engine, monkeypatch)
        for peer in peers:
            async with engine.open_session(range(2), 1, 64, peer=peer) as session:
                await session.step(hidden)
    assert counts == [PROMPT, 5 if shared else PROMPT]


async def test_what_is_not_the_same_is_not_shared(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other blocks, another dtype, one bit, deep prompts, a batch, a tree."""
    hidden = torch.randn(1, 2 * PAGE, HIDDEN)
    counts = computed(engine, monkeypatch)
    near = hidden.clone()
    near[0, 0, 0] = torch.nextafter(near[0, 0, 0], torch.tensor(9.0))
    prompts = torch.randn(LLAMA_BLOCKS, 1, 2, HIDDEN)
    parents = list(range(-1, 2 * PAGE - 1))
    async with engine.open_session(ALL, 1, 64, peer="a") as session:
        await session.step(hidden, prompts)
        with pytest.raises(InvalidRequest):
            await session.step(hidden, start_from_position=99)
    async with engine.open_session(ALL, 1, 64, peer="a") as session:
        await session.step(hidden, tree=parents)
        await session.step(near[:, :1], accept=parents[1:])
    for blocks, inputs in (
        (ALL, hidden),
        (range(3), hidden),
        (range(1, LLAMA_BLOCKS), hidden),
        (ALL, hidden.double()),
        (ALL, near),
        (ALL, hidden.flip(1)),
    ):
        async with engine.open_session(blocks, 1, 64, peer="a") as session:
            await session.step(inputs)
    async with engine.open_session(ALL, 2, 64, peer="a") as session:
        await session.step(hidden.repeat(2, 1, 1))
    assert counts == [2 * PAGE, 2 * PAGE, 1, *[2 * PAGE] * 6, 4 * PAGE]


async def test_what_is_kept_has_a_limit_and_goes_oldest_first(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "PREFIX_SHARE", 0.25)
    async with loaded(llama_folder, cache_tokens=64 * PAGE) as engine:
        cache = engine._room.prefixes
        assert cache is not None
        each = LLAMA_BLOCKS * engine._room.page_bytes + PAGE * HIDDEN * 4
        limit = engine.cache_bytes_total // 4 // each
        prompts = [torch.randn(1, 2 * PAGE, HIDDEN) for _ in range(limit)]
        for prompt in prompts:
            async with engine.open_session(ALL, 1, 2 * PAGE, peer="a") as session:
                await session.step(prompt)
            assert len(cache) <= limit
        assert used(engine) == len(cache) == limit
        counts = computed(engine, monkeypatch)
        for prompt in (prompts[-1], prompts[0]):
            async with engine.open_session(ALL, 1, 2 * PAGE, peer="a") as session:
                await session.step(prompt)
        assert counts == [2 * PAGE]
        # a prompt longer than that keeps its beginning
        long = torch.randn(1, (limit + 3) * PAGE, HIDDEN)
        async with engine.open_session(ALL, 1, (limit + 3) * PAGE, peer="a") as session:
            await session.step(long)
            assert len(cache) == limit
        async with engine.open_session(ALL, 1, (limit + 3) * PAGE, peer="a") as session:
            await session.step(long)
        assert counts[1:] == [(limit + 3) * PAGE, 3 * PAGE]


async def test_sessions_need_no_room_that_only_prefixes_have(llama_folder: Path, llama: Reference) -> None:
    async with loaded(llama_folder, cache_tokens=16 * PAGE, share_prefixes="all") as engine:
        for seed in range(4):
            async with engine.open_session(ALL, 1, 2 * PAGE) as session:
                await session.step(random_hidden(1, 2 * PAGE, seed))
        assert used(engine) > 0
        hidden = torch.randn(1, 16 * PAGE, HIDDEN)
        async with engine.open_session(ALL, 1, 16 * PAGE) as session:
            close(await session.step(hidden), llama(hidden))
            with pytest.raises(AllocationFailed):
                async with engine.open_session(ALL, 1, PAGE):
                    pass
        assert engine.cache_bytes_left == engine.cache_bytes_total


async def test_a_step_without_room_after_what_it_found_changes_nothing(
    llama_folder: Path, llama: Reference, autojump_clock: trio.testing.MockClock
) -> None:
    async with loaded(llama_folder, cache_tokens=16 * PAGE) as engine:
        hidden = torch.randn(1, 12 * PAGE, HIDDEN)
        async with engine.open_session(ALL, 1, 2 * PAGE, peer="a") as session:
            await session.step(hidden[:, : 2 * PAGE])
        async with (
            engine.open_session(ALL, 1, 12 * PAGE, peer="a") as session,
            engine.open_session(ALL, 1, 6 * PAGE, peer="b"),
        ):
            before = promised(engine)
            with pytest.raises(AllocationFailed, match="is at token 0 and needs room for"):
                await session.step(hidden)
            assert (session.position, promised(engine)) == (0, before)
            close(await session.step(hidden[:, : 5 * PAGE]), llama(hidden[:, : 5 * PAGE]))
        assert promised(engine) == 0


async def test_cancelled_while_it_waits_for_room_it_has_nothing(
    llama_folder: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with loaded(llama_folder, cache_tokens=16 * PAGE) as engine:
        hidden = torch.randn(1, 12 * PAGE, HIDDEN)
        async with engine.open_session(ALL, 1, 2 * PAGE, peer="a") as session:
            await session.step(hidden[:, : 2 * PAGE])
        async with (
            engine.open_session(ALL, 1, 12 * PAGE, peer="a") as session,
            engine.open_session(ALL, 1, 6 * PAGE, peer="b"),
        ):
            before = promised(engine)
            with trio.move_on_after(1) as scope:
                await session.step(hidden)
            assert scope.cancelled_caught
            assert promised(engine) == before
            await session.step(hidden[:, : 2 * PAGE])


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss", "mistral-narrow", "bloom", "falcon-rw"])
async def test_families_share(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(name, tmp_path)
    whole = Reference(tmp_path)
    hidden = random_hidden(1, 60)
    async with loaded(tmp_path) as engine:
        counts = computed(engine, monkeypatch)
        for _ in range(2):
            async with engine.open_session(range(BLOCKS), 1, 64, peer="a") as session:
                outputs = [await session.step(part) for part in hidden.split([50, 1, 9], 1)]
                close(torch.cat(outputs, 1), whole(hidden), 2e-5)
    assert counts == [50, 1, 9, 2, 1, 9]


async def test_positions_that_depend_on_the_length_are_not_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("phi3-longrope", tmp_path)
    async with loaded(tmp_path) as engine:
        counts = computed(engine, monkeypatch)
        for _ in range(2):
            async with engine.open_session(range(BLOCKS), 1, 64, peer="a") as session:
                await session.step(random_hidden(1, 20))
    assert counts == [20, 20]


def test_other_words_for_it_are_refused() -> None:
    with pytest.raises(ConfigError, match="share_prefixes must be off, peer or all, got some"):
        EngineConfig("model", share_prefixes="some")


def test_pages_are_adopted_only_where_one_ends() -> None:
    allocator = PageAllocator(8, 1)
    one, two = (PageTable(allocator, range(1), 1, 20, page_tokens=4) for _ in range(2))
    one.prepare(6, start=0)
    two.prepare(3, start=0)
    with pytest.raises(EngineError, match="not after 3 tokens"):
        two.adopt(one.rows[0][:1])


class Memory:
    """What pages hold, in the place of an engine: outputs tell of all tokens that a sequence has up to there."""

    hidden_size = 2
    dtype = torch.float32

    def __init__(self) -> None:
        self.slots: dict[tuple[int, int], float] = {}

    async def run(self, work: Any) -> Any:
        await trio.lowlevel.checkpoint()
        if isinstance(work, Merged):
            return self.compute(work.step)
        pieces = work.make(None)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                return end.value

    def run_prompt(self, step: Step, _contended: object) -> Iterator[None]:
        yield
        return self.compute(step)

    def read_pages(self, blocks: range, pages: list[int], _contended: object) -> Iterator[None]:
        yield
        slots = [page * PAGE + at for page in pages for at in range(PAGE)]
        return [[self.slots.get((block, at)) for at in slots] for block in blocks]

    def write_pages(
        self, blocks: range, pages: list[int], contents: Any, _contended: object
    ) -> Iterator[None]:
        yield
        slots = [page * PAGE + at for page in pages for at in range(PAGE)]
        for block, content in zip(blocks, contents, strict=True):
            self.slots |= {(block, at): value for at, value in zip(slots, content, strict=True)}

    def compute(self, step: Step) -> torch.Tensor:
        (row,) = step.rows
        for block in step.blocks:
            for source, target in step.copies:
                for at in range(PAGE):
                    self.slots[block, target * PAGE + at] = self.slots[block, source * PAGE + at]
            for number, value in enumerate(step.hidden[0, :, 0].tolist()):
                self.slots[block, slot(row, step.start + number)] = value
        lines = []
        for end in range(step.start, step.start + step.hidden.shape[1]):
            sums = {
                sum((at + 1) * self.slots[block, slot(row, at)] for at in range(end + 1))
                for block in step.blocks
            }
            (total,) = sums
            lines.append([self.slots[step.blocks.start, slot(row, end)], total])
        return torch.tensor([lines])


def slot(row: list[int], token: int) -> int:
    return row[token // PAGE] * PAGE + token % PAGE


def told(content: list[float], start: int) -> torch.Tensor:
    """What :class:`Memory` gives for a sequence of these tokens, from ``start`` on."""
    sums = [
        sum((at + 1) * value for at, value in enumerate(content[: end + 1])) for end in range(len(content))
    ]
    return torch.tensor([[[value, total] for value, total in zip(content, sums, strict=True)][start:]])


SPANS = (range(2), range(1), range(1, 2))


@settings(max_examples=80, deadline=None)
@given(st.data())
async def test_no_page_is_lost_or_shared_by_mistake(data: st.DataObject) -> None:
    """Sessions of two peers open, read prompts that often begin alike, go back, decode and end, in a small cache."""
    with patch.object(defaults, "CACHE_GROWTH_SECONDS", 0):
        await live_and_check(data)


async def live_and_check(data: st.DataObject) -> None:
    pages = data.draw(st.integers(4, 20))
    allocator, budget = PageAllocator(pages, 2), PageBudget(pages, 2)
    most = data.draw(st.sampled_from((0, 500, 1200, 10**6)))
    cache = PrefixCache(allocator, budget, page_bytes=64, max_bytes=most)
    memory = Memory()
    offload = Offload(memory, memory, idle_seconds=0.0, max_bytes=3000, clock=lambda: 0.0)  # type: ignore[arg-type]
    room = CacheRoom(allocator, budget, 64, 0, cache, offload if data.draw(st.booleans()) else None)
    live: list[tuple[Session, list[float]]] = []

    def check() -> None:
        expected = [pages] * 2
        owners: Counter[tuple[int, int]] = Counter()
        for session, content in live:
            assert session.position == len(content)
            mine = session._holding._table.held - len(session._holding._prefix._shared)  # type: ignore[union-attr]
            assert 0 <= mine <= session._holding._promised
            for block in session.blocks:
                expected[block] -= session._holding._promised
            owners.update(
                (page, session.blocks.start) for row in session._holding._table.rows for page in row
            )
        for kept in cache._kept.values():
            assert kept.sessions == sum(
                kept in session._holding._prefix._shared.values()
                for session, _ in live  # type: ignore[union-attr]
            )
            for block in kept.blocks:
                expected[block] -= bool(kept.sessions)
            owners[kept.page, kept.blocks.start] += 1
        moved = [s._holding._moved for s, _ in live]
        there = [each for each in moved if each is not None]
        assert offload.left == 3000 - sum(each.num_bytes for each in there) >= 0
        assert (offload.use.sessions, offload.use.num_bytes) == (len(there), 3000 - offload.left)
        assert cache.use.kept_bytes == most - cache._room
        assert budget._left == expected
        assert allocator._owners == owners
        assert min(budget._left) >= 0

    for _ in range(data.draw(st.integers(1, 25))):
        what = data.draw(st.sampled_from(("open", "prompt", "prompt", "back", "decode", "close")))
        if what == "open":
            blocks, peer = data.draw(st.sampled_from(SPANS)), data.draw(st.sampled_from("ab"))
            length = data.draw(st.integers(1, 6 * PAGE))
            first = pages_for(min(length, 2 * PAGE))
            if room.offload is not None and data.draw(st.booleans()):
                await room.offload.make_room(budget, blocks, first)
            if budget.take_now(blocks, first):
                options: Any = {"promised": first, "adapter": None, "peer": peer, "scope": peer}
                live.append((Session(memory, memory, room, blocks, (1, length), **options), []))  # type: ignore[arg-type]
        elif live:
            session, content = data.draw(st.sampled_from(live))
            start = len(content)
            if what == "close":
                session.close()
                live.remove((session, content))
                check()
                continue
            if what == "back":
                start = data.draw(st.integers(0, start))
            tokens = (
                1 if what == "decode" else data.draw(st.sampled_from((0, 3, PAGE, 2 * PAGE, 3 * PAGE + 2)))
            )
            tokens = min(tokens, session.max_length - start)
            values = [
                float(data.draw(st.sampled_from((1, 1, 1, 2)))) if at % PAGE == 0 else 3.0
                for at in range(tokens)
            ]
            hidden = torch.tensor([[[value, 0.0] for value in values]]).reshape(1, tokens, 2)
            try:
                output = await session.step(hidden, start_from_position=start)
            except AllocationFailed:
                check()
                continue
            content[:] = content[:start] + values
            if tokens:
                assert torch.equal(output, told(content, start))
        check()
    for session, _ in live:
        session.close()
    live.clear()
    check()
    while cache.evict():
        pass
    assert budget._left == [pages] * 2
    assert [allocator.free(block) for block in range(2)] == [pages] * 2
    assert not allocator._owners
    assert cache._room == most


async def test_a_page_that_is_yet_to_be_copied_is_nobody_elses(llama_folder: Path, llama: Reference) -> None:
    """It was a common one, which its last session leaves for a copy; another session runs before the copy is made."""
    first, further = torch.randn(1, 3 * PAGE, HIDDEN), torch.randn(1, 70, HIDDEN)
    other = torch.randn(1, 10 * PAGE, HIDDEN)
    async with (
        loaded(llama_folder, cache_tokens=16 * PAGE) as engine,
        engine.open_session(ALL, 1, 6 * PAGE, peer="a") as one,
        engine.open_session(ALL, 1, 10 * PAGE, peer="b") as two,
    ):
        await one.step(first)
        await two.step(other[:, : 6 * PAGE])
        back = partial(one.step, further, start_from_position=PAGE + 8)
        # a long step waits for the batch of short ones
        outputs = await at_once(engine, back, partial(two.step, other[:, 6 * PAGE :]))
        whole = llama(torch.cat([first[:, : PAGE + 8], further], 1))
        close(outputs[0], whole[:, PAGE + 8 :])
        close(outputs[1], llama(other)[:, 6 * PAGE :])
    assert engine.cache_bytes_left == engine.cache_bytes_total


async def test_a_step_back_that_finds_no_room_leaves_the_session_where_it_was(
    llama_folder: Path, llama: Reference, autojump_clock: trio.testing.MockClock
) -> None:
    """Its beginning is one that is kept."""
    kept, mine = torch.randn(1, 2 * PAGE, HIDDEN), torch.randn(1, PAGE + 3, HIDDEN)
    async with loaded(llama_folder, cache_tokens=16 * PAGE) as engine:
        async with engine.open_session(ALL, 1, 2 * PAGE, peer="a") as before:
            await before.step(kept)
        async with (
            engine.open_session(ALL, 1, 13 * PAGE, peer="a") as session,
            engine.open_session(ALL, 1, 6 * PAGE, peer="b"),
        ):
            await session.step(mine)
            again = torch.cat([kept, torch.randn(1, 10 * PAGE, HIDDEN)], 1)
            with pytest.raises(AllocationFailed):
                await session.step(again, start_from_position=0)
            assert session.position == PAGE + 3
            further = torch.randn(1, 3, HIDDEN)
            output = await session.step(further)
            close(output, llama(torch.cat([mine, further], 1))[:, PAGE + 3 :])
    assert engine.cache_bytes_left == engine.cache_bytes_total


async def test_long_outputs_are_copied_beside_the_event_loop(
    engine: Engine, llama: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a long prompt have a hundred megabytes. A cancellation that comes then is too late."""
    monkeypatch.setattr(defaults, "INLINE_BYTES", 2 * PAGE * HIDDEN * 4 - 1)
    hidden, copies = torch.randn(1, PROMPT, HIDDEN), []
    clone, cat = torch.Tensor.clone, torch.cat

    def note(copy: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
            copies.append(threading.get_ident())
            return copy(*args, **kwargs)

        return noted

    run = engine._compute.run

    async def cancel(*args: Any) -> Any:
        result = await run(*args)
        scope.cancel()
        return result

    for _ in range(2):
        async with engine.open_session(ALL, 1, 128, peer="a") as session:
            with monkeypatch.context() as noting, trio.CancelScope() as scope:
                noting.setattr(engine._compute, "run", cancel)
                noting.setattr(torch.Tensor, "clone", note(clone))
                noting.setattr(torch, "cat", note(cat))
                output = await session.step(hidden)
            close(output, llama(hidden))
            assert session.position == PROMPT
            assert threading.get_ident() not in copies
            assert copies
            copies.clear()
    assert engine._room.prefixes is not None
    assert len(engine._room.prefixes) == 3
