"""Averagers in plain code, without an event loop."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import torch
import trio

from kwaainet_bridge.blocking import Portal, open_portal
from kwaainet_bridge.hivemind.averaging import Averager
from kwaainet_bridge.hivemind.peer import open_peer

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


@pytest.fixture
def portal() -> Iterator[Portal]:
    with open_portal() as portal:
        yield portal


def test_two_training_loops_average(portal: Portal) -> None:
    tensors = [torch.full((1000,), float(n)) for n in range(2)]
    peers = [portal.enter(open_peer(listen=LOOPBACK))]
    peers.append(portal.enter(open_peer(peers[0].host.addresses(), listen=LOOPBACK)))
    averagers = [
        portal.enter(Averager(peer, [values], prefix="run", target_group_size=2))
        for peer, values in zip(peers, tensors, strict=True)
    ]
    step = portal.call_now(averagers[0].begin, weight=3.0, timeout=60)
    result = portal.call(averagers[1].step, timeout=60)
    assert not result.missing_elements
    portal.call(step.result)
    with portal.within(averagers[0].lock):
        assert tensors[0].tolist() == tensors[1].tolist() == [0.25] * 1000


def test_errors_come_to_the_caller(portal: Portal) -> None:
    async def fail(text: str) -> None:
        await trio.lowlevel.checkpoint()
        raise ValueError(text)

    with pytest.raises(ValueError, match="wrong"):
        portal.call(fail, "wrong")
    assert portal.call_now(threading.current_thread) is not threading.current_thread()


@asynccontextmanager
async def noted(events: list[str], name: str, *, swallow: bool = False) -> AsyncIterator[str]:
    events.append(f"enter {name}")
    task = trio.lowlevel.current_task()
    try:
        async with trio.open_nursery():
            yield name
    except BaseException as e:
        events.append(f"{name}: {e.__class__.__name__}")
        if not swallow:
            raise
    finally:
        assert trio.lowlevel.current_task() is task
        events.append(f"leave {name}")


def test_contexts_are_left_in_order_by_the_task_that_entered_them() -> None:
    events: list[str] = []
    with open_portal() as portal:
        assert portal.enter(noted(events, "a")) == "a"
        portal.enter(noted(events, "b"))
        with portal.within(noted(events, "c")):
            events.append("body")
    assert events == ["enter a", "enter b", "enter c", "body", "leave c", "leave b", "leave a"]


def test_an_error_of_the_block_passes_through_the_context(portal: Portal) -> None:
    events: list[str] = []
    with pytest.raises(ExceptionGroup) as caught, portal.within(noted(events, "a")):
        raise KeyError("mine")
    assert caught.group_contains(KeyError)
    assert events == ["enter a", "a: ExceptionGroup", "leave a"]


def test_a_context_that_cannot_be_entered_raises(portal: Portal) -> None:
    @asynccontextmanager
    async def broken() -> AsyncIterator[None]:
        raise OSError("no port")
        yield

    with pytest.raises(OSError, match="no port"):
        portal.enter(broken())


def test_a_context_whose_task_fails_raises_at_its_end() -> None:
    @asynccontextmanager
    async def failing() -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            yield

    async def fail() -> None:
        raise OSError("disk")

    with pytest.raises(ExceptionGroup) as caught, open_portal() as portal:
        portal.enter(failing())
    assert caught.group_contains(OSError)
