"""The muxer: against itself, and against a peer that sends what it likes."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from yamux_pair import against_script, connected

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import StreamClosed, StreamReset
from kwaainet_bridge.net.yamux_frames import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    INITIAL_WINDOW,
    PING,
    PROTOCOL_ERROR,
    RST,
    SYN,
    WINDOW_UPDATE,
    Payload,
    encode_header,
)


async def read_exactly(stream, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = await stream.read(size - len(data))
        assert piece, f"ended after {len(data)} of {size} bytes"
        data += piece
    return bytes(data)


# --- two connections


async def test_bytes_both_ways_and_end() -> None:
    async with connected() as (client, _, accepted):
        stream = await client.open_stream()
        await stream.write(b"question")
        served = await accepted.receive()
        assert await served.read(100) == b"question"
        await served.write(b"answer")
        await served.close()
        assert await stream.read(3) == b"ans"
        assert await stream.read(100) == b"wer"
        assert await stream.read(100) == b""
        assert await stream.read(100) == b""
        await stream.close()


async def test_more_than_any_window_both_ways() -> None:
    payload = bytes(range(256)) * (5 << 12)  # 5 MiB
    async with connected() as (client, _, accepted):
        stream = await client.open_stream()
        stream.announce()
        served = await accepted.receive()

        async def echo() -> None:
            while data := await served.read(1 << 16):
                await served.write(data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(echo)
            nursery.start_soon(stream.write, payload)
            assert await read_exactly(stream, len(payload)) == payload
            await stream.close()


async def test_many_streams_at_once() -> None:
    async with connected() as (client, _, accepted):

        async def serve() -> None:
            async with trio.open_nursery() as nursery:
                async for stream in accepted:
                    nursery.start_soon(echo_one, stream)

        async def echo_one(stream) -> None:
            await stream.write(await stream.read(100))
            await stream.close()

        async def call(number: int) -> None:
            stream = await client.open_stream()
            await stream.write(b"%d" % number)
            assert await stream.read(100) == b"%d" % number
            assert await stream.read(100) == b""
            await stream.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            async with trio.open_nursery() as callers:
                for number in range(500):
                    callers.start_soon(call, number)
            nursery.cancel_scope.cancel()
        assert client.open_streams == 0


async def test_a_reader_that_sleeps_for_an_hour(autojump_clock) -> None:
    """D4: a stalled reader is no error, however long it stalls."""
    async with connected() as (client, _, accepted):
        stream = await client.open_stream()
        stream.announce()
        served = await accepted.receive()
        payload = bytes(3 * INITIAL_WINDOW)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, payload)
            await trio.sleep(3600)
            assert await read_exactly(served, len(payload)) == payload


async def test_a_cancelled_write_harms_no_other_stream() -> None:
    """D5."""
    async with connected() as (client, _, accepted):
        stuck = await client.open_stream()
        with trio.move_on_after(0.05):
            await stuck.write(bytes(10 * INITIAL_WINDOW))
        await stuck.reset()
        other = await client.open_stream()
        await other.write(b"alive")
        await accepted.receive()
        assert await (await accepted.receive()).read(10) == b"alive"


async def test_a_cancelled_read_loses_nothing() -> None:
    async with connected() as (client, _, accepted):
        stream = await client.open_stream()
        stream.announce()
        served = await accepted.receive()
        with trio.move_on_after(0.01):
            await served.read(10)
        await stream.write(b"data")
        assert await served.read(10) == b"data"


async def test_reset_reaches_the_peer() -> None:
    async with connected() as (client, _, accepted):
        stream = await client.open_stream()
        stream.announce()
        served = await accepted.receive()
        await stream.reset()
        with pytest.raises(StreamReset):
            await served.read(1)
        with pytest.raises(StreamReset):
            await served.write(b"x")
        with pytest.raises(StreamClosed):
            await stream.read(1)
        await stream.reset()
        await stream.close()


async def test_after_close() -> None:
    async with connected() as (client, _, _accepted):
        stream = await client.open_stream()
        await stream.close()
        await stream.close()
        with pytest.raises(StreamClosed):
            await stream.read(1)
        with pytest.raises(StreamClosed):
            await stream.write(b"x")


async def test_a_connection_that_closes_ends_its_streams() -> None:
    async with connected() as (client, server, accepted):
        stream = await client.open_stream()
        stream.announce()
        served = await accepted.receive()
        await served.write(b"last words")
        await server.close()
        assert await stream.read(100) == b"last words"
        with pytest.raises(StreamReset):
            await stream.read(1)
        with pytest.raises(StreamReset):
            await client.open_stream()
        assert server.closed.is_set()


async def test_ping_measures_a_round_trip() -> None:
    async with connected() as (client, _, _accepted):
        assert 0 <= await client.ping() < 1


@pytest.mark.parametrize("budget", [0, 1 << 20, 64 << 20])
async def test_windows_grow_within_the_budget_and_give_it_back(monkeypatch, budget: int) -> None:
    monkeypatch.setattr(defaults, "WINDOW_GROWTH_BYTES", budget)
    async with connected() as (client, server, accepted):
        stream = await client.open_stream()
        stream.announce()
        served = await accepted.receive()
        await server.ping()
        server.round_trip_seconds = 1.0  # a distant peer: any window empties within four round trips
        payload = bytes(8 << 20)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, payload)
            await read_exactly(served, len(payload))
        assert served.window_growth <= min(budget, defaults.MAX_STREAM_WINDOW_BYTES)
        assert bool(served.window_growth) == (budget > 0)
        await served.reset()
        assert server.reserve_window(budget) == (budget > 0)


# --- a scripted peer


async def test_data_before_a_reset_is_delivered() -> None:
    """D8: stock daemons end some finished streams with RST."""
    async with against_script(initiator=True) as (connection, peer, _):
        stream = await connection.open_stream()
        stream.announce()
        syn = await peer.expect(WINDOW_UPDATE, SYN)
        await peer.send(DATA, ACK, syn.stream_id, 6, b"answer")
        await peer.send(WINDOW_UPDATE, RST, syn.stream_id, 0)
        while connection.open_streams:
            await trio.testing.wait_all_tasks_blocked()
        assert await stream.read(3) == b"ans"
        assert await stream.read(100) == b"wer"
        with pytest.raises(StreamReset):
            await stream.read(1)


async def test_a_reset_after_the_end_is_an_end() -> None:
    async with against_script(initiator=True) as (connection, peer, _):
        stream = await connection.open_stream()
        stream.announce()
        syn = await peer.expect(WINDOW_UPDATE, SYN)
        await peer.send(DATA, FIN, syn.stream_id, 3, b"end")
        await peer.send(WINDOW_UPDATE, RST, syn.stream_id, 0)
        assert await stream.read(100) == b"end"
        assert await stream.read(1) == b""


async def test_an_overrun_window_closes_the_connection() -> None:
    """D7."""
    async with against_script(initiator=False) as (connection, peer, accepted):
        await peer.send(WINDOW_UPDATE, SYN, 1, 0)
        await peer.send(DATA, 0, 1, INITIAL_WINDOW, bytes(INITIAL_WINDOW))
        await peer.send(DATA, 0, 1, 1, b"x")
        last = (await peer.until_closed())[-1]
        assert (last.type, last.length) == (GO_AWAY, PROTOCOL_ERROR)
        await connection.closed.wait()
        assert "window has 0 left" in connection.close_reason
        assert len(await read_exactly(accepted[0], INITIAL_WINDOW)) == INITIAL_WINDOW


async def test_a_window_is_checked_before_its_payload_arrives() -> None:
    async with against_script(initiator=False) as (connection, peer, accepted):
        await peer.send(DATA, SYN, 1, 0xFFFFFFFF)
        await connection.closed.wait()
        assert accepted


async def test_streams_beyond_the_limit_are_reset() -> None:
    async with against_script(initiator=False) as (connection, peer, accepted):
        for number in range(defaults.MAX_INBOUND_STREAMS + 2):
            await peer.send(WINDOW_UPDATE, SYN, 2 * number + 1, 0)
        refused = await peer.expect(WINDOW_UPDATE, RST)
        assert refused.stream_id == 2 * defaults.MAX_INBOUND_STREAMS + 1
        assert len(accepted) == defaults.MAX_INBOUND_STREAMS
        await accepted[0].reset()
        await peer.send(WINDOW_UPDATE, SYN, 9999, 0)
        while len(accepted) == defaults.MAX_INBOUND_STREAMS:
            await trio.testing.wait_all_tasks_blocked()
        accepted[-1].announce()
        await peer.expect(WINDOW_UPDATE, ACK | RST)
        assert (await peer.expect(WINDOW_UPDATE, ACK)).stream_id == 9999
        assert connection.usable


async def test_pings_are_answered() -> None:
    async with against_script(initiator=False) as (_, peer, _accepted):
        await peer.send(PING, SYN, 0, 77)
        assert (await peer.expect(PING, ACK)).length == 77


async def test_keep_alive_and_a_silent_peer(autojump_clock) -> None:
    async with against_script(initiator=False) as (connection, peer, _):
        first = await peer.expect(PING, SYN)
        await peer.send(PING, ACK, 0, first.length)
        before = trio.current_time()
        await peer.expect(PING, SYN)
        assert trio.current_time() - before == pytest.approx(defaults.KEEP_ALIVE_SECONDS)
        await connection.closed.wait()
        assert "no answer to a ping" in connection.close_reason


async def test_a_peer_that_reads_nothing_is_dropped(autojump_clock, monkeypatch) -> None:
    """Answers to pings must not pile up."""
    monkeypatch.setattr(defaults, "SEND_QUEUE_BYTES", 1 << 16)
    monkeypatch.setattr(defaults, "UNREAD_CONTROL_BYTES", 1 << 18)
    async with against_script(initiator=False) as (connection, peer, _):
        await peer.expect(PING, SYN)

        async def block(pieces: object) -> None:  # trio's streams in memory do not push back
            await trio.sleep_forever()

        connection._channel.send_pieces = block
        pings = encode_header(PING, SYN, 0, 1) * 5000
        while not connection.close_reason:
            await peer.stream.send_all(pings)
        assert connection.close_reason == "the peer does not read"
        await connection.closed.wait()


async def test_a_write_waits_for_the_window() -> None:
    async with against_script(initiator=True) as (connection, peer, _):
        stream = await connection.open_stream()
        done = trio.Event()

        async def write() -> None:
            await stream.write(bytes(INITIAL_WINDOW + 10))
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            received = 0
            while received < INITIAL_WINDOW:
                event = await peer.next()
                received += len(event.data) if isinstance(event, Payload) else 0
            await trio.testing.wait_all_tasks_blocked()
            assert not done.is_set()
            await peer.send(WINDOW_UPDATE, ACK, stream.stream_id, 10)
            await done.wait()


async def test_a_peer_that_closed_and_reads_no_more(autojump_clock) -> None:
    async with against_script(initiator=True) as (connection, peer, _):
        stream = await connection.open_stream()
        stream.announce()
        await peer.expect(WINDOW_UPDATE, SYN)
        await peer.send(WINDOW_UPDATE, ACK | FIN, stream.stream_id, 0)
        with pytest.raises(StreamReset, match="reads no more"):
            await stream.write(bytes(INITIAL_WINDOW + 1))


async def test_what_arrives_after_close_is_dropped_and_then_refused() -> None:
    async with against_script(initiator=False) as (connection, peer, accepted):
        await peer.send(WINDOW_UPDATE, SYN, 1, 0)
        while not accepted:
            await trio.testing.wait_all_tasks_blocked()
        await accepted[0].close()
        await peer.expect(WINDOW_UPDATE, ACK | FIN)
        await peer.send(DATA, 0, 1, INITIAL_WINDOW, bytes(INITIAL_WINDOW))
        await peer.expect(WINDOW_UPDATE, RST)
        assert connection.open_streams == 0
        assert connection.usable


async def test_a_stream_that_only_we_closed_is_reset_in_time(autojump_clock) -> None:
    async with against_script(initiator=False) as (connection, peer, accepted):

        async def answer_pings() -> None:
            while True:
                ping = await peer.expect(PING, SYN)
                await peer.send(PING, ACK, 0, ping.length)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer_pings)
            await peer.send(WINDOW_UPDATE, SYN, 1, 0)
            await trio.sleep(1)
            await accepted[0].close()
            await trio.sleep(30)
            assert connection.open_streams == 1
            await trio.sleep(70)
            assert connection.open_streams == 0
            nursery.cancel_scope.cancel()


async def test_go_away_ends_opening_not_what_is_open() -> None:
    async with against_script(initiator=True) as (connection, peer, _):
        stream = await connection.open_stream()
        await peer.send(GO_AWAY, 0, 0, 0)
        await peer.send(DATA, ACK, stream.stream_id, 2, b"ok")
        assert await stream.read(10) == b"ok"
        assert not connection.usable
        with pytest.raises(StreamReset, match="peer leaves"):
            await connection.open_stream()


async def test_a_connection_without_stream_ids_left_is_not_used() -> None:
    """So that the peer is dialled anew: at a thousand streams a second the ids last for 25 days."""
    async with against_script(initiator=True) as (connection, peer, _):
        connection._next_id = (1 << 32) - 1
        last = await connection.open_stream()
        assert not connection.usable
        with pytest.raises(StreamReset, match="no stream ids are left"):
            await connection.open_stream()
        await peer.send(DATA, ACK, last.stream_id, 2, b"ok")
        assert await last.read(10) == b"ok"


@pytest.mark.parametrize(
    "frame",
    [
        b"\x01" + bytes(11),
        b"\x00\x04" + bytes(10),
        b"\x00\x01\x00\x01" + b"\x00\x00\x00\x02" + bytes(4),
        b"\x00\x01\x00\x01" + bytes(8),
        b"\x00\x00\x00\x00" + b"\x00\x00\x00\x63" + b"\x7f\xff\xff\xff",
        b"\x00\x03\x00\x00" + bytes(4) + b"\x00\x00\x00\x02",
    ],
    ids=["version", "type", "parity", "stream-zero", "huge-unknown", "left-in-error"],
)
async def test_frames_that_end_the_connection(frame: bytes) -> None:
    async with against_script(initiator=False) as (connection, peer, _):
        await peer.stream.send_all(frame)
        await connection.closed.wait()
        assert connection.close_reason.startswith("yamux: ")


async def test_a_stream_id_cannot_be_opened_twice() -> None:
    async with against_script(initiator=False) as (connection, peer, _):
        await peer.send(WINDOW_UPDATE, SYN, 1, 0)
        await peer.send(WINDOW_UPDATE, SYN, 1, 0)
        await connection.closed.wait()
        assert "cannot open stream 1" in connection.close_reason


async def test_a_window_beyond_32_bits() -> None:
    async with against_script(initiator=False) as (connection, peer, _):
        await peer.send(WINDOW_UPDATE, SYN, 1, 0xFFFFFFFF)
        await connection.closed.wait()
        assert "exceeds 32 bits" in connection.close_reason


async def test_unacknowledged_streams_wait_their_turn() -> None:
    async with against_script(initiator=True) as (connection, peer, _):
        for _number in range(defaults.MAX_UNACKNOWLEDGED_STREAMS):
            await connection.open_stream()
        opened = trio.Event()

        async def one_more() -> None:
            await connection.open_stream()
            opened.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one_more)
            await trio.testing.wait_all_tasks_blocked()
            assert not opened.is_set()
            await peer.send(WINDOW_UPDATE, ACK, 1, 0)
            await opened.wait()
