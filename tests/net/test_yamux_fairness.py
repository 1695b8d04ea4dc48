"""Who is sent when, and how streams end while others go on."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from yamux_pair import SERVER, against_script, connected

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, StreamClosed, StreamReset
from kwaainet_bridge.net.yamux import YamuxConnection
from kwaainet_bridge.net.yamux_frames import (
    ACK,
    DATA,
    FIN,
    INITIAL_WINDOW,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    FrameParser,
    Header,
)


class GatedChannel:
    """Takes a write when the test says so, and keeps it."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self._go = trio.Semaphore(0)

    async def receive_chunks(self) -> list[bytes]:
        await trio.sleep_forever()
        raise AssertionError

    async def send_pieces(self, pieces: Sequence[bytes | memoryview]) -> None:
        await self._go.acquire()
        self.writes.append(b"".join(pieces))

    def abort(self) -> None: ...

    async def take(self, count: int = 1) -> None:
        """Let ``count`` writes through, and everybody who waited for them act."""
        for _ in range(count):
            self._go.release()
            await trio.testing.wait_all_tasks_blocked()

    def frames(self, write: int) -> list[Header]:
        events = FrameParser().feed(self.writes[write])
        return [event for event in events if isinstance(event, Header)]


@asynccontextmanager
async def gated() -> AsyncIterator[tuple[YamuxConnection, GatedChannel, trio.Nursery]]:
    channel = GatedChannel()
    connection = YamuxConnection(channel, SERVER, initiator=True, accept=lambda _: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        await trio.testing.wait_all_tasks_blocked()  # the first ping waits at the gate
        yield connection, channel, nursery
        nursery.cancel_scope.cancel()


async def test_frames_of_several_streams_leave_in_one_write() -> None:
    async with gated() as (connection, channel, _):
        for _ in range(10):
            stream = await connection.open_stream()
            await stream.write(b"a")
            await stream.write(b"b")
        await channel.take(2)
        assert [frame.stream_id for frame in channel.frames(1)] == [1 + 2 * (i // 2) for i in range(20)]
        assert [frame.flags for frame in channel.frames(1)] == [SYN, 0] * 10


async def test_transfers_take_turns() -> None:
    """Each write carries a share of each stream, however much each has."""
    async with gated() as (connection, channel, nursery):
        for _ in range(3):
            stream = await connection.open_stream()
            nursery.start_soon(stream.write, bytes(INITIAL_WINDOW))
        await trio.testing.wait_all_tasks_blocked()
        await channel.take(4)
        for write in (1, 2):  # the window is two shares
            sent = Counter[int]()
            for frame in channel.frames(write):
                sent[frame.stream_id] += frame.length
            assert set(sent) == {1, 3, 5}
            assert set(sent.values()) == {defaults.STREAM_SHARE_BYTES}


async def test_a_step_is_behind_one_share_of_a_transfer() -> None:
    async with gated() as (connection, channel, nursery):
        bulk, step = [await connection.open_stream() for _ in range(2)]
        nursery.start_soon(bulk.write, bytes(INITIAL_WINDOW))
        await channel.take()
        await trio.testing.wait_all_tasks_blocked()  # one write is under way, the next is full
        await step.write(b"step")
        await channel.take(2)
        before = channel.writes[2].index(b"step")
        assert before <= defaults.STREAM_SHARE_BYTES + 100


@pytest.mark.parametrize("count", [9, 64, 250])
async def test_many_transfers_are_all_in_each_write(count: int) -> None:
    """And with them a step that came too late for the write before."""
    async with gated() as (connection, channel, nursery):
        for _ in range(count):
            stream = await connection.open_stream()
            stream.add_send_credit(1 << 30)
            nursery.start_soon(stream.write, bytes(2 << 20))
        step = await connection.open_stream()
        await trio.testing.wait_all_tasks_blocked()
        await channel.take(3)  # the second was filled by those who came first; the fifth is full by now
        nursery.start_soon(step.write, b"step")
        await channel.take(3)
        for write in range(2, 6):
            sent = {frame.stream_id for frame in channel.frames(write) if frame.type == DATA}
            assert len(sent - {step.stream_id}) == count
        assert b"step" in channel.writes[5]


async def test_what_waits_for_the_socket_is_bounded() -> None:
    async with gated() as (connection, channel, nursery):
        for _ in range(100):
            stream = await connection.open_stream()
            nursery.start_soon(stream.write, bytes(INITIAL_WINDOW))
        await trio.testing.wait_all_tasks_blocked()
        await channel.take(3)
        assert max(map(len, channel.writes)) < defaults.SEND_QUEUE_BYTES + 2 * defaults.STREAM_SHARE_BYTES


async def test_pings_and_windows_do_not_wait_for_their_turn() -> None:
    async with gated() as (connection, channel, nursery):
        stream = await connection.open_stream()
        nursery.start_soon(stream.write, bytes(INITIAL_WINDOW))
        await channel.take()
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(connection.ping)
        await trio.testing.wait_all_tasks_blocked()
        await channel.take(2)
        assert PING in [frame.type for frame in channel.frames(2)]


# --- ends


async def blocked_writer(stream, nursery) -> None:
    nursery.start_soon(expect_end, stream.write, bytes(2 * INITIAL_WINDOW))


async def blocked_reader(stream, nursery) -> None:
    await stream.write(b"x")
    nursery.start_soon(expect_end, stream.read, 10)


async def unopened(stream, nursery) -> None: ...


async def first_reader(stream, nursery) -> None:
    stream.propose("Echo.run")
    nursery.start_soon(expect_end, stream.read, 10)


async def half_closed(stream, nursery) -> None:
    await stream.write(b"x")
    stream.finish()
    nursery.start_soon(expect_end, stream.read, 10)


async def closed(stream, nursery) -> None:
    await stream.write(b"x")
    await stream.close()


async def waiting_for_its_end(stream, nursery) -> None:
    await stream.write(b"x")
    nursery.start_soon(stream.wait_ended)


async def watched(stream, nursery) -> None:
    ended = trio.Event()
    stream.watch(ended.set)
    nursery.start_soon(ended.wait)


async def expect_end(call, *args) -> None:
    with pytest.raises(StreamReset):
        await call(*args)


STATES = [
    unopened,
    first_reader,
    blocked_writer,
    blocked_reader,
    half_closed,
    closed,
    waiting_for_its_end,
    watched,
]


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
@pytest.mark.parametrize("by", ["the peer", "us"])
async def test_the_connection_breaks_in_each_state(state, by: str) -> None:
    """Nobody waits on, and nothing is kept."""
    async with against_script(initiator=True) as (connection, peer, _):
        stream = await connection.open_stream()
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                await state(stream, nursery)
                await trio.testing.wait_all_tasks_blocked()
                if by == "us":
                    await connection.close()
                else:
                    await peer.stream.aclose()
            await connection.closed.wait()
        assert connection.open_streams == 0
        with pytest.raises((StreamReset, StreamClosed)):
            await stream.read(1)
        with pytest.raises((StreamReset, StreamClosed)):
            await stream.write(b"x")
        await stream.close()
        await stream.reset()


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
async def test_the_peer_resets_in_each_state(state) -> None:
    async with against_script(initiator=True) as (connection, peer, _):
        stream = await connection.open_stream()
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                await state(stream, nursery)
                await trio.testing.wait_all_tasks_blocked()
                await peer.send(WINDOW_UPDATE, RST, stream.stream_id, 0)
        while connection.open_streams:
            await trio.testing.wait_all_tasks_blocked()
        other = await connection.open_stream()
        await peer.send(DATA, ACK, other.stream_id, 2, b"on")
        assert await other.read(10) == b"on"


@pytest.mark.parametrize("seed", range(5))
async def test_resets_among_transfers(seed: int) -> None:
    """500 streams, a third of which either side resets at some moment; the others arrive whole."""
    chance = random.Random(seed)
    fates = [chance.choice(["ours", "theirs", "whole", "whole"]) for _ in range(500)]
    sizes = [chance.choice([0, 1, 1000, 70_000, 300_000]) for _ in fates]
    whole = Counter[str]()

    async with connected() as (client, server, accepted):

        async def send(number: int) -> None:
            stream = await client.open_stream()
            with contextlib.suppress(NetworkError):
                await stream.write(number.to_bytes(2, "big"))
                if fates[number] == "ours":
                    with trio.move_on_after(chance.random() / 20):
                        await stream.write(bytes(10 * INITIAL_WINDOW))
                    await stream.reset()
                    return
                await stream.write(bytes([number % 256]) * sizes[number])
            await stream.close()

        async def receive(stream) -> None:
            with contextlib.suppress(NetworkError):
                data = b""
                while len(data) < 2:
                    data += await stream.read(2 - len(data))
                number = int.from_bytes(data, "big")
                left = sizes[number]
                while fates[number] != "theirs" and (data := await stream.read(1 << 16)):
                    assert fates[number] == "ours" or data == bytes([number % 256]) * len(data)
                    left -= len(data)
                if fates[number] == "whole":
                    assert left == 0
                    whole["arrived"] += 1
                    await stream.close()
            await stream.reset()

        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                for _ in fates:
                    nursery.start_soon(receive, await accepted.receive())

            nursery.start_soon(serve)
            for number in range(len(fates)):
                nursery.start_soon(send, number)
        assert whole["arrived"] == fates.count("whole")
        with trio.fail_after(5):
            while client.open_streams or server.open_streams:
                await client.ping()
                await server.ping()


async def test_what_was_sent_before_a_reset_of_ours_arrives_first() -> None:
    async with connected() as (client, _, accepted):
        stream = await client.open_stream()
        await stream.write(b"last words")
        await stream.reset()
        served = await accepted.receive()
        await served.wait_ended()
        assert await served.read(100) == b"last words"
        with pytest.raises(StreamReset):
            await served.read(1)


async def test_a_watcher_is_told_once_of_data_of_the_end_and_at_once_if_it_is_late() -> None:
    async with against_script(initiator=True) as (connection, peer, _):
        for number, frame in ((1, (DATA, ACK, 1, 1, b"x")), (3, (WINDOW_UPDATE, FIN, 3, 0))):
            stream = await connection.open_stream()
            told: list[int] = []
            stream.watch(lambda told=told, number=number: told.append(number))
            assert not told
            await peer.send(*frame)
            await peer.send(WINDOW_UPDATE, RST, number, 0)
            await stream.wait_ended()
            assert told == [number]
            stream.watch(lambda told=told: told.append(0))
            assert told == [number, 0]
            stream.watch(None)
