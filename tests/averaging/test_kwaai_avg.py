"""Averagers of /kwaai/avg/1.0.0 on a network in memory: groups, a peer written by hand, bad peers, and none of Hivemind's."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import kwaai_avg_by_hand as hand
import pytest
import torch
import trio
from kwaai_avg_by_hand import Frames, Member
from test_averager import Peer, Run, clock, group_of, means, peer_id, run

from kwaainet_bridge import defaults
from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.errors import DeadlineExceeded, ProtocolNotSupported, StreamReset
from kwaainet_bridge.hivemind.averaging import Averager, StepResult
from kwaainet_bridge.hivemind.averaging.dialect import dialect_of
from kwaainet_bridge.wire import frames

KWAAI: dict[str, Any] = {"protocol": "kwaai"}
NAME = f"{hand.NAME}run"


# --- groups


@pytest.mark.parametrize("compression", list(CompressionType))
async def test_a_group_of_four_ends_with_the_weighted_mean(
    autojump_clock: object, compression: CompressionType
) -> None:
    async with run(4, **group_of(4), **KWAAI, compression=compression, part_bytes=256) as swarm:
        await swarm.step(weights=[1.0, 2.0, 3.0, 4.0], gather="hello")
        for peer in swarm.peers:
            assert means_within(peer, 2.0, 0.02 if compression else 1e-6)
            assert peer.result is not None
            assert peer.result.gathered == {p.id: "hello" for p in swarm.peers}
            assert (peer.result.failed_senders, peer.result.failed_reducers) == ({}, {})


def means_within(peer: Peer, mean: float, error: float) -> bool:
    return all(float((tensor - mean).abs().max()) <= error for tensor in peer.tensors)


async def test_all_roles_are_in_one_group(autojump_clock: object) -> None:
    async with run(2, **group_of(5), **KWAAI) as swarm:
        await swarm.add(**group_of(5), **KWAAI, client_mode=True)
        await swarm.add(**group_of(5), **KWAAI, auxiliary=True)
        await swarm.add(**group_of(5), **KWAAI, bandwidth=7.0)
        await swarm.step()
        assert [means(peer) for peer in swarm.peers] == [[1.75, 1.75]] * 5  # of 0, 1, 2, 4


async def test_a_thin_line_averages_nothing_for_faster_ones(autojump_clock: object) -> None:
    bandwidths = [100.0, 1.0, None, 20.0]
    async with run() as swarm:
        for bandwidth in bandwidths:
            await swarm.add((2000,), **group_of(4), **KWAAI, bandwidth=bandwidth)
        await swarm.step()
        for peer in swarm.peers:
            assert means(peer) == pytest.approx([1.5])
            assert peer.result is not None
            # what it sends: all but its share of its own, and three times its share of the others'
            share = hand.shares(2000, bandwidths)[swarm.peers.index(peer)]
            assert peer.result.sent_bytes == pytest.approx(4 * (2000 + 2 * share), abs=8 * 16 * 4)


async def test_a_grid_of_sixteen_averages_exactly_in_two_rounds(autojump_clock: object) -> None:
    async with run() as swarm:
        for number in range(16):
            await swarm.add((20,), **group_of(4), **KWAAI, bits=format(number // 4, "02b"))
        await swarm.step()
        assert [means(peer)[0] for peer in swarm.peers] == [n // 4 * 4 + 1.5 for n in range(16)]
        await swarm.step()
        assert [means(peer)[0] for peer in swarm.peers] == [7.5] * 16


async def test_the_state_of_another_peer_is_loaded(autojump_clock: object) -> None:
    async with run(2, **KWAAI) as swarm:
        await trio.sleep(1)
        state = await swarm.peers[0].averager.load_state_from_peers()
        assert state is not None
        assert [tensor.tolist() for tensor in state.tensors] == [[1.0] * 40, [1.0] * 3]


@pytest.mark.parametrize("other", [{"compression": CompressionType.FLOAT16}, {"part_bytes": 128}])
async def test_peers_with_another_compression_or_part_size_form_no_group(
    autojump_clock: object, other: dict[str, Any]
) -> None:
    """Hivemind's would, and fail each other's shares."""
    async with run(1, **KWAAI) as swarm:
        await swarm.add(**KWAAI, **other)
        assert await steps_in_vain(swarm.peers, timeout=12) == 2


async def steps_in_vain(peers: list[Peer], timeout: float) -> int:
    alone = 0

    async def step(peer: Peer) -> None:
        nonlocal alone
        with pytest.raises(DeadlineExceeded):
            await peer.averager.step(timeout=timeout)
        alone += 1

    async with trio.open_nursery() as nursery:
        for peer in peers:
            nursery.start_soon(step, peer)
    return alone


# --- a peer that was written from the page


async def with_a_member_by_hand(swarm: Run) -> tuple[Peer, Member, list[float]]:
    """One of ours, one by hand with three times the weight, and their mean."""
    ours = await swarm.add((100,), **group_of(2), **KWAAI)  # parts of 16 elements
    ours.tensors[0].copy_(torch.arange(100.0))
    theirs = [1000.0 - n for n in range(100)]
    member = Member(swarm.network.host(peer_id(77)), "run", theirs, 3.0, 64)
    member.ready = trio.Event()
    member.served()
    return ours, member, [(n + 3 * value) / 4 for n, value in enumerate(theirs)]


def check(ours: Peer, member: Member, expected: list[float]) -> None:
    assert ours.tensors[0].tolist() == pytest.approx(expected)
    assert member.values == pytest.approx(expected)
    assert ours.result is not None
    assert ours.result.gathered == {ours.id: {"of": "ours"}, member.host.peer_id: None}
    assert ours.result.missing_elements == 0
    assert min(member.given) == hand.nil_gather()


async def test_a_follower_by_hand_averages_with_ours(autojump_clock: object) -> None:
    async with run() as swarm:
        ours, member, expected = await with_a_member_by_hand(swarm)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: ours.step(gather={"of": "ours"}))
                await trio.sleep(1)
                await member.follow(ours.id, clock() + 60)
        check(ours, member, expected)


async def test_a_leader_by_hand_is_found_by_its_record_and_averages_with_ours(autojump_clock: object) -> None:
    async with run() as swarm:
        ours, member, expected = await with_a_member_by_hand(swarm)
        member.host.serve("/kwaai/avg/1.0.0/run/join", member.lead)
        await ours.dht.store(
            "/kwaai/avg/1.0.0/run.0b", value=True, expiration=clock() + 4, subkey=member.host.peer_id.raw
        )
        with trio.fail_after(20):
            await ours.step(gather={"of": "ours"})
        check(ours, member, expected)


async def test_a_caller_by_hand_gets_our_state(autojump_clock: object) -> None:
    async with run(1, **KWAAI) as swarm:
        host = swarm.network.host(peer_id(77))
        stream = await host.open_stream(swarm.peers[0].id, f"{NAME}/state")
        await stream.write(hand.frame(b"") + hand.END)
        incoming = Frames(stream)
        first, second = await incoming.next(), await incoming.next()
        assert first is not None
        assert second is not None
        assert first[1][1] == [b"\x81\xa9group_key\xa0"]
        shapes = [hand.fields(message[1][2][0])[2][0] for message in (first, second)]
        assert shapes == [bytes([40]), bytes([3])]
        assert await incoming.next() is None


# --- bad peers


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Run, Any]]:
    """One of ours, and a host beside it."""
    async with run(2, **group_of(2), **KWAAI) as swarm:
        yield swarm, swarm.network.host(peer_id(77))


async def refused(host: Any, peer: Peer, call: str, data: bytes) -> None:
    stream = await host.open_stream(peer.id, f"{NAME}/{call}")
    await stream.write(data)
    with pytest.raises(StreamReset):
        await stream.read(100)


JOIN = hand.join(bytes(32), 1.7e9, hand.nil_gather(), f"{NAME}.0b")


@pytest.mark.parametrize(
    ("call", "data"),
    [
        ("join", frames.MARKER_FIRST.encode_message(JOIN[9:])),
        ("parts", frames.MARKER_FIRST.encode_message(hand.averaging(4, b"x" * 20)[9:])),
        ("state", frames.MARKER_FIRST.encode_end()),
        ("join", (defaults.AVERAGING_JOIN_BYTES + 1).to_bytes(8, "big") + b"\0"),
        ("parts", (8 * 64 + 64 * 1024 + 1).to_bytes(8, "big") + b"\0"),  # part_bytes is 64
        ("state", (defaults.MAX_FRAME_BYTES + 1).to_bytes(8, "big") + b"\0"),
        ("join", bytes(8) + b"\2"),
        ("join", b"\xff" * 9),
        ("join", hand.frame(b"\xff\xff")),
        ("parts", hand.frame(b"\x22\x7f")),
    ],
    ids=[
        "join in Hivemind's order",
        "parts in Hivemind's order",
        "state ended in Hivemind's order",
        "join too long",
        "parts too long",
        "state too long",
        "marker 2",
        "no length",
        "join no protobuf",
        "parts no protobuf",
    ],
)
async def test_what_is_no_frame_of_ours_ends_its_own_stream_only(
    autojump_clock: object, call: str, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with pair() as (swarm, host):
        await refused(host, swarm.peers[0], call, data)
        await swarm.step()
        assert [means(peer)[0] for peer in swarm.peers] == [0.5, 0.5]
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


async def test_an_answer_to_a_stranger_says_why(autojump_clock: object) -> None:
    async with pair() as (swarm, host):

        async def answers(call: str, data: bytes) -> list[Any]:
            stream = await host.open_stream(swarm.peers[0].id, f"{NAME}/{call}")
            await stream.write(data)
            incoming, got = Frames(stream), []
            while (frame := await incoming.next()) is not None:
                got.append(frame)
            return got

        part = hand.tensor(hand.floats(*[0.0] * 16), (16,), "float32")
        assert await answers("join", JOIN + hand.END) == [(0, {1: [13]})]
        assert await answers("parts", hand.averaging(4, b"x" * 20, part, 1.0) + hand.END) == [(0, {1: [10]})]
        assert await answers("parts", hand.END) == [(1, {1: [b"a call without a message"]})]
        assert await answers("join", b"") == [
            (1, {1: [f"no message within {defaults.AVERAGING_FIRST_PART_SECONDS:g} s".encode()]})
        ]
        step = swarm.peers[0].averager.begin()
        await trio.sleep(0.1)
        assert await answers("join", JOIN + hand.END) == [(0, {1: [9]})]
        step.cancel()


async def fail(stream: Any) -> None:
    await stream.write(hand.error("no disk"))
    await stream.close()


async def answer_in_hiveminds_order(stream: Any) -> None:
    message = hand.averaging(5, part=hand.tensor(hand.floats(*[0.0] * 16), (16,), "float32"))
    await stream.write(frames.MARKER_FIRST.encode_message(message[9:]))
    await trio.sleep_forever()


async def answer_too_much(stream: Any) -> None:
    await stream.write(((8 * 64 + 64 * 1024) + 1).to_bytes(8, "big") + b"\0")
    await trio.sleep_forever()


async def close(stream: Any) -> None:
    await stream.close()


async def end_within_a_frame(stream: Any) -> None:
    await stream.write(hand.averaging(5)[:-1])
    await stream.close()


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [
        (fail, "no disk"),
        (answer_in_hiveminds_order, "length first, then marker"),
        (answer_too_much, "66049 bytes announced, at most 66048"),
        (close, "fewer parts"),
        (end_within_a_frame, r"cut after \d of \d+ bytes"),
    ],
)
async def test_a_reducer_that_fails_costs_its_share_only(
    autojump_clock: object, behaviour: Any, why: str
) -> None:
    async with run(3, **group_of(3), **KWAAI) as swarm:
        bad = swarm.peers[2]
        bad.host.unserve(f"{NAME}/parts")
        bad.host.serve(f"{NAME}/parts", behaviour)
        await swarm.step()
        for number, peer in enumerate(swarm.peers[:2]):
            assert peer.result is not None
            ((who, what),) = peer.result.failed_reducers.items()
            assert who == bad.id
            assert re.search(why, what), what
            assert set(peer.tensors[0].tolist()) == {1.0, float(number)}
            assert 0 < peer.result.missing_elements < 30


@pytest.mark.parametrize("behaviour", [fail, answer_in_hiveminds_order, close, end_within_a_frame])
async def test_a_leader_that_fails_is_left(autojump_clock: object, behaviour: Any) -> None:
    async with run(1, **KWAAI) as swarm:
        bad = swarm.peers[0]
        asked = []

        async def lead(stream: Any) -> None:
            asked.append(stream.remote)
            await behaviour(stream)

        bad.host.unserve(f"{NAME}/join")
        bad.host.serve(f"{NAME}/join", lead)
        for _ in range(2):
            await swarm.add(**KWAAI)
        await bad.dht.store(f"{NAME}.0b", value=True, expiration=clock() + 4, subkey=bad.id.raw)
        async with trio.open_nursery() as nursery:
            for peer in swarm.peers[1:]:
                nursery.start_soon(peer.step)
        assert set(asked) == {peer.id for peer in swarm.peers[1:]}
        assert [means(peer)[0] for peer in swarm.peers] == [0.0, 1.5, 1.5]


# --- none of Hivemind's


async def test_one_prefix_in_both_protocols_makes_two_groups(autojump_clock: object) -> None:
    """In one DHT, with two peers in both: they have one id, one host and the same tensors."""
    async with run() as swarm:
        await swarm.add(**group_of(4))
        for _ in range(2):
            await swarm.add(**group_of(4), **KWAAI)
        await swarm.add(**group_of(4))
        both = swarm.peers[2:]
        others = []
        for peer in both:
            mine = peer.averager._dialect.record_prefix != "run"
            tensors = [torch.full((40,), 10.0), torch.full((3,), 10.0)]
            protocol: Any = "hivemind" if mine else "kwaai"
            others.append(
                Averager(
                    peer.node,
                    tensors,
                    prefix="run",
                    protocol=protocol,
                    clock=clock,
                    part_bytes=64,
                    **group_of(4),
                )
            )
        async with others[0], others[1]:
            results: list[StepResult] = []

            async def step(averager: Averager) -> None:
                results.append(await averager.step(timeout=60))

            async with trio.open_nursery() as nursery:
                for averager in [*(peer.averager for peer in swarm.peers), *others]:
                    nursery.start_soon(step, averager)
        assert [len(result.gathered) for result in results] == [3] * 6
        zero, one, two, three = (peer.id for peer in swarm.peers)
        assert {frozenset(result.gathered) for result in results} == {
            frozenset({zero, two, three}),
            frozenset({one, two, three}),
        }
        assert all(not r.failed_senders and not r.failed_reducers for r in results)
        # hivemind's: 0, 3 and the other 10 of peer 2; kwaai's: 1, 2 and the other 10 of peer 3
        assert [means(peer)[0] for peer in swarm.peers] == pytest.approx([13 / 3, 13 / 3, 13 / 3, 13 / 3])


async def test_a_hivemind_averager_and_one_of_ours_find_no_group(autojump_clock: object) -> None:
    async with run(1, **KWAAI) as swarm:
        await swarm.add()
        assert await steps_in_vain(swarm.peers, timeout=20) == 2
        assert await swarm.peers[0].averager.load_state_from_peers() is None
        assert await swarm.peers[1].averager.load_state_from_peers() is None


@pytest.mark.parametrize("caller", [0, 1])
async def test_calls_of_the_other_protocol_are_not_served(autojump_clock: object, caller: int) -> None:
    async with run(1, **KWAAI) as swarm:
        await swarm.add()
        kind = "DecentralizedAverager"
        methods = dialect_of("hivemind" if caller else "kwaai", "run", kind).methods
        for method in (methods.join_group, methods.aggregate_part, methods.download_state):
            with pytest.raises(ProtocolNotSupported):
                async with swarm.peers[caller].client.stream(
                    swarm.peers[1 - caller].id, method, open_timeout=5
                ):
                    pass


async def test_nothing_of_a_run_is_served_after_it(autojump_clock: object) -> None:
    async with run(1, **KWAAI) as swarm:
        peer = swarm.peers[0]
        async with Averager(peer.node, [torch.zeros(1)], prefix="other", clock=clock, **KWAAI):
            await (
                await swarm.network.host(peer_id(77)).open_stream(peer.id, f"{hand.NAME}other/join")
            ).reset()
        for call in ("join", "parts", "state"):
            with pytest.raises(ProtocolNotSupported):
                await swarm.network.host(peer_id(78)).open_stream(peer.id, f"{hand.NAME}other/{call}")
