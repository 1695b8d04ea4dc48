"""Pages of the KV cache: who has which, what is copied when, and that none is lost or shared by mistake."""

from __future__ import annotations

import random
from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kwaainet_bridge.engine.claims import Claims
from kwaainet_bridge.engine.pages import OutOfPages, PageAllocator, PageTable
from kwaainet_bridge.errors import EngineError

SIZE = 4
"""Tokens of a page."""
PAGES, BLOCKS = 24, 3
ALL = range(BLOCKS)


def table(allocator: PageAllocator, rows: int = 1, length: int = 40, blocks: range = ALL) -> PageTable:
    return PageTable(allocator, blocks, rows, length, page_tokens=SIZE)


def test_pages_are_taken_as_they_are_needed_and_returned() -> None:
    allocator = PageAllocator(PAGES, BLOCKS)
    one = table(allocator)
    assert one.prepare(1, start=0) == []
    assert (one.held, allocator.free(0)) == (1, PAGES - 1)
    one.prepare(4, start=1)
    assert one.held == 1
    one.prepare(5, start=4)
    assert one.held == 2
    one.prepare(5, start=2)  # going back within what is held
    assert one.held == 2
    one.prepare(3, start=3)
    assert one.held == 1
    one.close()
    assert [allocator.free(block) for block in ALL] == [PAGES] * BLOCKS


def test_a_sequence_grows_in_one_run_beside_others() -> None:
    allocator = PageAllocator(PAGES, BLOCKS)
    tables = [table(allocator, length=6 * SIZE) for _ in range(4)]
    for length in range(1, 6 * SIZE + 1):
        for each in tables:
            each.prepare(length, start=length - 1)
    for each in tables:
        (row,) = each.rows
        assert row == list(range(row[0], row[0] + 6))
    assert allocator.free(0) == 0


def test_claims_give_way_where_there_is_no_other_room() -> None:
    allocator = PageAllocator(PAGES, BLOCKS)
    first = table(allocator, length=PAGES * SIZE)
    second = table(allocator, length=PAGES * SIZE)
    second.prepare(5 * SIZE, start=0)
    first.prepare(19 * SIZE, start=0)
    assert set(first.rows[0]).isdisjoint(second.rows[0])
    with pytest.raises(OutOfPages):
        first.prepare(20 * SIZE, start=19 * SIZE)
    assert first.length == 19 * SIZE
    second.close()
    first.prepare(24 * SIZE, start=19 * SIZE)


def test_blocks_have_pages_of_their_own() -> None:
    allocator = PageAllocator(PAGES, BLOCKS)
    front, back = table(allocator, blocks=range(1)), table(allocator, blocks=range(1, 3))
    front.prepare(10 * SIZE, start=0)
    assert [allocator.free(block) for block in ALL] == [PAGES - 10, PAGES, PAGES]
    back.prepare(10 * SIZE, start=0)
    assert front.rows == back.rows  # the same numbers, of other blocks
    whole = table(allocator)
    whole.prepare(10 * SIZE, start=0)
    assert set(whole.rows[0]).isdisjoint(front.rows[0])


def test_rows_that_begin_alike_share_pages_until_they_are_written() -> None:
    allocator = PageAllocator(PAGES, BLOCKS)
    rows = table(allocator, rows=3)
    rows.prepare(6, start=0)
    assert rows.held == 6
    kept = rows.rows[1]
    assert rows.needed(7, start=6, order=[1, 1, 1]) == 4
    copies = rows.prepare(7, start=6, order=[1, 1, 1])
    assert [row[0] for row in rows.rows] == [kept[0]] * 3
    assert len({row[1] for row in rows.rows}) == 3
    assert sorted(copies) == sorted((kept[1], row[1]) for row in rows.rows if row[1] != kept[1])
    assert len(copies) == 2
    assert (rows.held, allocator.free(0)) == (4, PAGES - 4)


def test_whole_pages_are_shared_without_copies() -> None:
    rows = table(PageAllocator(PAGES, BLOCKS), rows=3)
    rows.prepare(8, start=0)
    assert rows.prepare(9, start=8, order=[0, 0, 2]) == []
    assert rows.held == 2 + 2 + 3


def test_what_cannot_be_is_no_page_operation() -> None:
    one = table(PageAllocator(PAGES, BLOCKS), length=10)
    for length, start in [(11, 0), (1, 1), (2, 3)]:
        with pytest.raises(EngineError, match="no room for tokens"):
            one.prepare(length, start=start)
    assert one.held == 0


class Sessions(RuleBasedStateMachine):
    """Sessions that step, go back, reorder and end. Each writes tokens of its own into a pretended memory."""

    @initialize(pages=st.integers(1, 40))
    def begin(self, pages: int) -> None:
        self.allocator = PageAllocator(pages, BLOCKS)
        self.pages = pages
        self.memory: dict[tuple[int, int], object] = {}
        self.tables: list[tuple[PageTable, list[list[object]]]] = []
        self.serial = 0

    @rule(
        first=st.integers(0, BLOCKS - 1),
        count=st.integers(1, BLOCKS),
        rows=st.integers(1, 4),
        length=st.integers(0, 60),
    )
    def open(self, first: int, count: int, rows: int, length: int) -> None:
        blocks = range(first, min(BLOCKS, first + count))
        self.tables.append((table(self.allocator, rows, length, blocks), [[] for _ in range(rows)]))

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), back=st.integers(0, 8), more=st.integers(0, 12))
    def step(self, data: st.DataObject, back: int, more: int) -> None:
        each, contents = data.draw(st.sampled_from(self.tables))
        start = max(0, each.length - back)
        length = min(start + more, each._max_length)
        order = None
        if data.draw(st.booleans()):
            order = [data.draw(st.integers(0, len(contents) - 1)) for _ in contents]
        before, held = [list(row) for row in each.rows], each.held
        free = self.allocator.common(each.blocks)
        needed = each.needed(length, start=start, order=order)
        try:
            copies = each.prepare(length, start=start, order=order)
        except OutOfPages:
            assert needed - held > free - held
            assert (each.rows, each.held) == (before, held)
            assert self.allocator.common(each.blocks) == free
            return
        assert each.held == needed
        contents[:] = [list(contents[row][:start]) for row in order or range(len(contents))]
        for block in each.blocks:
            for source, target in copies:
                for offset in range(SIZE):
                    self.memory[block, target * SIZE + offset] = self.memory.get(
                        (block, source * SIZE + offset)
                    )
        for row, content in zip(each.rows, contents, strict=True):
            for token in range(start, length):
                self.serial += 1
                content.append(self.serial)
                for block in each.blocks:
                    self.memory[block, row[token // SIZE] * SIZE + token % SIZE] = (block, self.serial)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        each, contents = data.draw(st.sampled_from(self.tables))
        self.tables.remove((each, contents))
        each.close()

    @invariant()
    def everybody_reads_what_it_wrote(self) -> None:
        for each, contents in self.tables:
            for row, content in zip(each.rows, contents, strict=True):
                for token, value in enumerate(content):
                    for block in each.blocks:
                        slot = row[token // SIZE] * SIZE + token % SIZE
                        assert self.memory[block, slot] == (block, value)

    @invariant()
    def pages_are_free_or_have_their_owners(self) -> None:
        for block in ALL:
            used: set[int] = set()
            for each, _ in self.tables:
                if block not in each.blocks:
                    continue
                mine = {page for row in each.rows for page in row}
                assert not mine & used
                used |= mine
                for page in mine:
                    assert self.allocator.owners(each.blocks, page) == sum(page in row for row in each.rows)
            assert self.allocator.free(block) == self.pages - len(used)

    def teardown(self) -> None:
        for each, _ in getattr(self, "tables", []):
            each.close()
        if hasattr(self, "allocator"):
            assert [self.allocator.free(block) for block in ALL] == [self.pages] * BLOCKS
            assert not self.allocator._owners
            assert self.allocator._claims.claimed == [0] * BLOCKS


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=60, deadline=None)


def test_a_session_of_as_many_sequences_as_pages_is_a_moments_work() -> None:
    """A message without a tensor in it opens one, and all of this is done in the event loop."""
    pages = 2048
    allocator, blocks = PageAllocator(pages, 40), range(40)
    began = perf_counter()
    each = PageTable(allocator, blocks, pages, SIZE, page_tokens=SIZE)
    for start in (0, 0, 2):
        each.prepare(SIZE, start=start)
    other = table(allocator, rows=3, blocks=blocks)
    other.close()
    each.close()
    assert perf_counter() - began < 2
    assert allocator.free(0) == pages
    assert not any(allocator._claims.claimed)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), max_size=12), st.randoms(use_true_random=False)
)
def test_a_page_is_claimed_until_all_claims_of_it_are_given_up(
    pairs: list[tuple[int, int]], rng: random.Random
) -> None:
    places = [range(start, start + count) for start, count in pairs]
    claims = Claims(2)
    claims.add(range(2), places)
    claims.remove(range(1), places)
    assert claims.claimed[0] == 0
    rng.shuffle(places)
    while places:
        assert claims.claimed[1] == sum(1 << page for page in {page for place in places for page in place})
        gone, places = places[:2], places[2:]
        claims.remove(range(1, 2), gone)
    assert claims.claimed[1] == 0
