from __future__ import annotations

import logging

import pytest
import trio
from client_fakes import PREFIX, FakeDht, FakeRecord, peer, toy_swarm

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import ConfigError, DeadlineExceeded, NetworkError, NoRoute, ProtocolNotSupported
from kwaainet_bridge.hivemind.client import Directory, Swarm
from kwaainet_bridge.hivemind.client.routing import Hop
from kwaainet_bridge.hivemind.experts.records import ServerInfo, ServerState

A, B, C = map(peer, (1, 2, 3))


def online(start: int | None, end: int | None, **fields) -> ServerInfo:
    return ServerInfo(ServerState.ONLINE, 1.0, start_block=start, end_block=end, **fields)


async def read(dht: FakeDht, num_blocks: int = 8, **options) -> dict:
    return {span.peer: span.blocks for span in await Directory(dht, PREFIX, num_blocks, **options).read()}


async def test_one_record_is_enough_for_a_span() -> None:
    dht = FakeDht()
    dht.announce(A, online(0, 4), range(2, 3))
    dht.announce(B, online(4, 8), range(4, 8))
    assert await read(dht) == {A: range(4), B: range(4, 8)}


async def test_spans_are_clipped_to_the_model() -> None:
    dht = FakeDht()
    dht.announce(A, online(4, 10**9), range(4, 8))
    assert await read(dht) == {A: range(4, 8)}


@pytest.mark.parametrize("state", [ServerState.OFFLINE, ServerState.JOINING])
async def test_only_servers_online_count(state: ServerState) -> None:
    dht = FakeDht()
    dht.announce(A, ServerInfo(state, 1.0, start_block=0, end_block=8), range(8))
    assert await read(dht) == {}


async def test_what_a_server_said_last_counts() -> None:
    dht = FakeDht()
    dht.announce(A, online(0, 4), range(4), expiration=100.0)
    dht.announce(A, online(4, 8), range(4, 8), expiration=200.0)
    dht.announce(B, online(0, 4), range(4), expiration=100.0)
    dht.announce(
        B, ServerInfo(ServerState.OFFLINE, 1.0, start_block=0, end_block=4), range(2), expiration=150.0
    )
    assert await read(dht) == {A: range(4, 8)}


async def test_without_a_span_the_longest_run_of_records_is_one() -> None:
    dht = FakeDht()
    dht.announce(A, online(None, None), range(1))
    dht.announce(A, online(None, None), range(3, 6))
    assert await read(dht) == {A: range(3, 6)}


@pytest.mark.parametrize(
    ("subkey", "value", "text"),
    [
        (str(A), (2, "fast", {}), "throughput"),
        (str(A), (7, 1.0, {}), "state"),
        (str(A), b"garbage", "expected"),
        (str(A), (2, 1.0, {"start_block": 4, "end_block": 8}), "4:8 does not hold the block"),
        (str(A), (2, 1.0, {"start_block": 3, "end_block": 0}), "3:0"),
        ("not base58!", (2, 1.0, {}), "base58"),
        (b"bytes", (2, 1.0, {}), "subkey"),
    ],
)
async def test_a_bad_record_is_skipped_and_logged(subkey, value, text, caplog) -> None:
    dht = FakeDht({f"{PREFIX}.0": FakeRecord({subkey: (value, 1.0)})})
    dht.announce(B, online(0, 2), range(2))
    with caplog.at_level(logging.WARNING):
        assert await read(dht) == {B: range(2)}
    assert text in caplog.text
    assert "skipped 1 bad" in caplog.text


async def test_a_key_that_is_no_dictionary_is_skipped(caplog) -> None:
    dht = FakeDht({f"{PREFIX}.0": FakeRecord("value", is_dictionary=False)})
    assert await read(dht) == {}
    assert f"{PREFIX}.0 is no dictionary" in caplog.text


async def test_a_thousand_bad_records_make_one_line(caplog) -> None:
    dht = FakeDht({f"{PREFIX}.0": FakeRecord({f"x{i}": (None, 1.0) for i in range(1000)})})
    assert await read(dht) == {}
    assert len(caplog.records) == 1
    assert "1000 bad" in caplog.text
    assert len(caplog.text) < 500


async def test_lists_of_allowed_and_blocked_peers_and_adapters() -> None:
    dht = FakeDht()
    dht.announce(A, online(0, 8, adapters=("lora",)), range(8))
    dht.announce(B, online(0, 8), range(8))
    dht.announce(C, online(0, 8), range(8))
    assert (await read(dht, allowed=[A, B])).keys() == {A, B}
    assert (await read(dht, blocked=[A])).keys() == {B, C}
    assert (await read(dht, allowed=[A, B], blocked=[B])).keys() == {A}
    assert (await read(dht, adapter="lora")).keys() == {A}
    assert await read(dht, allowed=[]) == {}


def test_the_prefix_is_checked() -> None:
    with pytest.raises(ConfigError, match="without dots"):
        Directory(FakeDht(), "a.b", 8)


async def test_records_are_read_again_when_they_are_old(autojump_clock) -> None:
    async with toy_swarm() as toy:
        toy.add(0, 4)
        for _ in range(3):
            await toy.swarm.session_chain(range(4), 16)
        assert toy.dht.reads == 1
        await trio.sleep(defaults.DIRECTORY_SECONDS + 1)
        await toy.swarm.session_chain(range(4), 16)
        assert toy.dht.reads == 2


async def test_a_missing_block_is_looked_for_once_more() -> None:
    async with toy_swarm() as toy:
        toy.add(0, 4)
        await toy.swarm.refresh()
        toy.num_blocks = 4
        late = toy.add(0, 4)
        toy.swarm.note_failure(Hop(toy.servers[0].peer, range(1)), NetworkError("gone"))
        assert await toy.swarm.session_chain(range(4), 16) == [Hop(late.peer, range(4))]
        assert toy.dht.reads == 2


async def test_no_server_at_all_is_said_at_once() -> None:
    async with toy_swarm() as toy:
        toy.add(0, 2)
        with pytest.raises(NoRoute, match="tiny-llama-hf: no server is online for blocks 2:4"):
            await toy.swarm.request_chain(range(4))


async def test_a_banned_server_is_used_when_nobody_else_is_there() -> None:
    async with toy_swarm() as toy:
        only = toy.add(0, 4)
        toy.swarm.note_failure(Hop(only.peer, range(1)), NetworkError("gone"))
        assert await toy.swarm.request_chain(range(4)) == [Hop(only.peer, range(4))]


async def test_tasks_that_wait_for_the_records_share_one_reading() -> None:
    async with toy_swarm() as toy:
        toy.add(0, 4)
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(toy.swarm.session_chain, range(4), 16)
        assert toy.dht.reads == 1


async def test_known_servers_survive_a_dht_that_fails(autojump_clock, caplog) -> None:
    async with toy_swarm() as toy:
        toy.add(0, 4)
        await toy.swarm.refresh()

        async def fail(keys, *, latest=True):
            raise NetworkError("no DHT peer answered")

        toy.dht.get_many = fail
        await toy.swarm.refresh()
        assert len(toy.swarm.spans) == 1
        assert "no DHT peer answered" in caplog.text
        with pytest.raises(NetworkError, match="no DHT peer answered"):
            await Swarm(toy.swarm.rpc, toy.directory).refresh()


async def test_a_dht_that_hangs_is_given_up(autojump_clock) -> None:
    async with toy_swarm() as toy:

        async def hang(keys, *, latest=True):
            await trio.sleep_forever()

        toy.dht.get_many = hang
        with pytest.raises(DeadlineExceeded, match="no block records within 60 s"):
            await toy.swarm.session_chain(range(4), 16)


async def test_round_trips_decide(autojump_clock) -> None:
    async with toy_swarm() as toy:
        far, near, client_mode, silent = (toy.add(0, 4) for _ in range(4))
        seconds = {far.peer: 0.5, near.peer: 0.1, client_mode.peer: 0.2}

        async def ping(who):
            if who == silent.peer:
                await trio.sleep_forever()
            await trio.sleep(seconds[who])
            if who == client_mode.peer:
                raise ProtocolNotSupported("no DHT served")

        swarm = Swarm(toy.swarm.rpc, toy.directory, ping=ping)
        before = trio.current_time()
        assert await swarm.session_chain(range(4), 16) == [Hop(near.peer, range(4))]
        assert trio.current_time() - before == pytest.approx(defaults.PING_SECONDS)
        for expected in (client_mode, far, silent):
            swarm.note_failure(
                Hop(next(s.peer for s in (near, client_mode, far) if s.peer in seconds), range(1)),
                NetworkError("gone"),
            )
            seconds.pop(next(s.peer for s in (near, client_mode, far) if s.peer in seconds))
            assert await swarm.session_chain(range(4), 16) == [Hop(expected.peer, range(4))]
            if not seconds:
                break
