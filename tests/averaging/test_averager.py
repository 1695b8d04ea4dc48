"""Averagers on a network in memory, in simulated time: whole steps, roles, faults, state."""

from __future__ import annotations

import math
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import pytest
import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.errors import AveragingCancelled, DeadlineExceeded, HandlerError, NetworkError
from kwaainet_bridge.hivemind import peer as hivemind_peer
from kwaainet_bridge.hivemind.averaging import Averager, Phase, State, Status, StepResult
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.net.memory import MemoryHost, MemoryNetwork
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire.averaging import AveragingData, DownloadData, MessageCode
from kwaainet_bridge.wire.msgpack import pack
from kwaainet_bridge.wire.pb import averaging_pb2 as pb
from kwaainet_bridge.wire.peer_id import PeerId
from kwaainet_bridge.wire.tensors import encode_tensor

PREFIX = "run"
SMALL = {"part_bytes": 64}  # 16 elements of float32


def clock() -> float:
    return 1.7e9 + trio.current_time()


def peer_id(number: int) -> PeerId:
    return PeerId(b"\x12\x20" + number.to_bytes(32, "big"))


class Peer:
    def __init__(
        self, network: MemoryNetwork, number: int, tensors: list[torch.Tensor], **options: Any
    ) -> None:
        self.host: MemoryHost = network.host(peer_id(number))
        self.server, self.client = RpcServer(self.host), RpcClient(self.host)
        self.id = self.host.peer_id
        self.tensors = tensors
        is_client = options.get("client_mode", False)
        self.dht = DhtNode(
            self.host, self.server, self.client, client_mode=is_client, clock=clock, rng=random.Random(number)
        )
        self.node = hivemind_peer.Peer(self.host, self.server, self.client, self.dht)
        self.averager = Averager(self.node, tensors, prefix=PREFIX, clock=clock, **SMALL | options)
        self.result: StepResult | None = None

    async def step(self, **arguments: Any) -> None:
        self.result = await self.averager.step(**{"timeout": 60.0} | arguments)


class Run:
    """The peers of one run; peer ``n`` begins with ``n`` everywhere."""

    def __init__(self, nursery: trio.Nursery, stack: AsyncExitStack) -> None:
        self.network = MemoryNetwork(nursery)
        self.peers: list[Peer] = []
        self._stack = stack

    async def add(self, sizes: tuple[int, ...] = (40, 3), **options: Any) -> Peer:
        number = len(self.peers)
        peer = Peer(self.network, number, [torch.full((size,), float(number)) for size in sizes], **options)
        await self._stack.enter_async_context(peer.dht.running())
        if self.peers:
            await peer.dht.bootstrap([self.peers[0].id])
        await self._stack.enter_async_context(peer.averager)
        self.peers.append(peer)
        return peer

    async def step(self, *, weights: list[float] | None = None, **arguments: Any) -> None:
        async with trio.open_nursery() as nursery:
            for number, peer in enumerate(self.peers):
                weight = None if weights is None else weights[number]
                nursery.start_soon(lambda p=peer, w=weight: p.step(weight=w, **arguments))


@asynccontextmanager
async def run(size: int = 0, **options: Any) -> AsyncIterator[Run]:
    async with trio.open_nursery() as nursery:
        async with AsyncExitStack() as stack:
            swarm = Run(nursery, stack)
            for _ in range(size):
                await swarm.add(**options)
            yield swarm
        nursery.cancel_scope.cancel()


def group_of(size: int) -> dict[str, Any]:
    return {"target_group_size": size}


def means(peer: Peer) -> list[float]:
    """The one value of each tensor."""
    for tensor in peer.tensors:
        assert (tensor - tensor[0]).abs().max() < 1e-6
    return [float(tensor[0]) for tensor in peer.tensors]


@contextmanager
def fault(target: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    original = getattr(target, name)
    setattr(target, name, replacement)
    try:
        yield
    finally:
        setattr(target, name, original)


# --- whole steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4, 8])
async def test_all_members_end_with_the_weighted_mean(autojump_clock: object, size: int) -> None:
    async with run(size, **group_of(size)) as swarm:
        weights = [1.0 + n for n in range(size)]
        await swarm.step(weights=weights, gather="hello")
        mean = sum(n * weight for n, weight in enumerate(weights)) / sum(weights)
        for peer in swarm.peers:
            assert means(peer) == pytest.approx([mean, mean])
            assert peer.result is not None
            assert peer.result.gathered == {p.id: "hello" for p in swarm.peers}
            assert peer.result.missing_elements == 0


@pytest.mark.parametrize("compression", list(CompressionType))
async def test_any_compression_averages(autojump_clock: object, compression: CompressionType) -> None:
    async with run(2, **group_of(2), compression=compression, part_bytes=256) as swarm:
        ours = [peer.tensors[0].copy_(torch.linspace(n, 1 + n, 40)) for n, peer in enumerate(swarm.peers)]
        expected = (ours[0] + ours[1]) / 2
        await swarm.step()
        for peer in swarm.peers:
            assert (peer.tensors[0] - expected).abs().max() < 0.02


async def test_a_group_that_does_not_fill_begins_at_its_time(autojump_clock: object) -> None:
    async with run(3, **group_of(16)) as swarm:
        began = trio.current_time()
        await swarm.step()
        assert 4.9 < trio.current_time() - began < 8
        assert [means(peer) for peer in swarm.peers] == [[1.0, 1.0]] * 3


async def test_group_bits_lead_everybody_to_one_mean(autojump_clock: object) -> None:
    """Two groups of two, mixed by the group bits from round to round."""
    async with run() as swarm:
        for number in range(4):
            await swarm.add(**group_of(2), bits=str(number // 2))
        for _ in range(6):
            await swarm.step()
        values = [means(peer)[0] for peer in swarm.peers]
        assert max(values) - min(values) < 0.6
        assert sum(values) == pytest.approx(6.0)


async def test_a_grid_of_sixteen_averages_exactly_in_two_rounds(autojump_clock: object) -> None:
    """Groups of four by two group bits: each of the second round has one member of each of the first."""
    async with run() as swarm:
        for number in range(16):
            await swarm.add((20,), **group_of(4), bits=format(number // 4, "02b"))
        await swarm.step()
        assert [means(peer)[0] for peer in swarm.peers] == [n // 4 * 4 + 1.5 for n in range(16)]
        await swarm.step()
        assert [means(peer)[0] for peer in swarm.peers] == [7.5] * 16


async def test_peers_that_die_while_they_wait_leave_the_others_a_group(autojump_clock: object) -> None:
    async with run(4, **group_of(8)) as swarm:
        async with trio.open_nursery() as nursery:
            for peer in swarm.peers[:3]:
                nursery.start_soon(peer.step)
            dying = trio.CancelScope()
            nursery.start_soon(_step_until_cancelled, swarm.peers[3], dying)
            await trio.sleep(2)
            dying.cancel()
        assert [means(peer)[0] for peer in swarm.peers] == [1.0, 1.0, 1.0, 3.0]


async def _step_until_cancelled(peer: Peer, scope: trio.CancelScope) -> None:
    with scope:
        await peer.averager.step()


async def test_alpha_moves_only_part_of_the_way(autojump_clock: object) -> None:
    async with run(2, **group_of(2), alpha=0.5) as swarm:
        await swarm.step()
        assert [means(peer)[0] for peer in swarm.peers] == [0.25, 0.75]


async def test_a_lonely_peer_is_told_that_there_was_no_group(autojump_clock: object) -> None:
    async with run(1) as swarm:
        with pytest.raises(DeadlineExceeded, match="'run': no group within 20 s"):
            await swarm.peers[0].averager.step(timeout=20)
        assert trio.current_time() < 25


async def test_peers_with_other_tensors_form_no_group(autojump_clock: object) -> None:
    async with run() as swarm:
        await swarm.add((40,))
        await swarm.add((41,))
        results = []
        async with trio.open_nursery() as nursery:
            for peer in swarm.peers:

                async def fail(peer: Peer = peer) -> None:
                    with pytest.raises(DeadlineExceeded):
                        await peer.averager.step(timeout=12)
                    results.append(peer)

                nursery.start_soon(fail)
        assert len(results) == 2


async def test_a_cancelled_step_changes_nothing_and_another_may_follow(autojump_clock: object) -> None:
    async with run(2, **group_of(2)) as swarm:
        with trio.move_on_after(2):
            await swarm.peers[0].averager.step()
        assert means(swarm.peers[0]) == [0.0, 0.0]
        await swarm.step()
        assert [means(peer)[0] for peer in swarm.peers] == [0.5, 0.5]


# --- steps in the background ------------------------------------------------------------------------------


async def test_a_step_waits_for_its_trigger_and_takes_the_weight_of_then(autojump_clock: object) -> None:
    async with run(2, **group_of(2)) as swarm:
        first, second = swarm.peers
        waiting = first.averager.begin(timeout=60, triggered=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(second.step)
            await trio.sleep(10)
            assert waiting.phase is Phase.WAITING
            assert means(first) == [0.0, 0.0]
            waiting.weight = 3.0
            first.tensors[0].fill_(8.0)
            waiting.trigger()
            result = await waiting.result()
        assert waiting.done
        assert result.missing_elements == 0
        assert [means(peer)[0] for peer in swarm.peers] == [6.25, 6.25]


async def test_a_trigger_that_never_comes_ends_the_step(autojump_clock: object) -> None:
    async with run(2, **group_of(2)) as swarm:
        waiting = swarm.peers[0].averager.begin(timeout=30, triggered=False)
        await swarm.peers[1].step()
        with pytest.raises(DeadlineExceeded, match="no trigger came"):
            await waiting.result()
        assert [means(peer)[0] for peer in swarm.peers] == [0.0, 1.0]
        assert swarm.peers[1].result is not None
        assert swarm.peers[1].result.failed_reducers.keys() == {swarm.peers[0].id}


async def test_a_step_begins_when_it_is_scheduled(autojump_clock: object) -> None:
    async with run(2, **group_of(4)) as swarm:
        began = trio.current_time()
        await swarm.step(scheduled=clock() + 20)
        assert 19.9 < trio.current_time() - began < 22


async def test_steps_of_one_averager_follow_each_other(autojump_clock: object) -> None:
    async with run(2, **group_of(2)) as swarm:
        steps = [peer.averager.begin(timeout=60) for peer in swarm.peers for _ in range(2)]
        for step in steps:
            assert (await step.result()).missing_elements == 0


async def test_a_step_in_the_background_can_be_cancelled(autojump_clock: object) -> None:
    async with run(1) as swarm:
        step = swarm.peers[0].averager.begin()
        await trio.sleep(1)
        step.cancel()
        with pytest.raises(AveragingCancelled):
            await step.result()
    with pytest.raises(RuntimeError, match="not running"):
        swarm.peers[0].averager.begin()


async def test_an_averager_that_ends_cancels_its_steps(autojump_clock: object) -> None:
    async with run(1) as swarm:
        peer = swarm.peers[0]
        async with Averager(peer.node, [torch.zeros(1)], prefix="other", clock=clock) as averager:
            step = averager.begin()
            await trio.sleep(1)
        with pytest.raises(AveragingCancelled):
            await step.result()


async def test_the_status_tells_what_happens(autojump_clock: object) -> None:
    async with run(2, **group_of(2)) as swarm:
        first, second = swarm.peers
        assert first.averager.status == Status(None, (), 0, 0, 0, None)
        step = first.averager.begin(timeout=60, triggered=False)
        await trio.sleep(1)
        assert first.averager.status.phase is Phase.LOOKING
        async with trio.open_nursery() as nursery:
            nursery.start_soon(second.step)
            await trio.sleep(8)
            assert first.averager.status.phase is Phase.WAITING
            assert set(first.averager.status.members) == {first.id, second.id}
            step.trigger()
        result = await step.result()
        # each sends half of 43 float32 numbers, and the differences of the other half
        assert (result.sent_bytes, result.received_bytes) == (172, 172)
        assert first.averager.status == Status(None, (), 1, 172, 172, result)


# --- bandwidths and allowed peers -------------------------------------------------------------------------


async def test_a_peer_with_a_thin_line_averages_nothing_for_faster_ones(autojump_clock: object) -> None:
    async with run() as swarm:
        for bandwidth in (100.0, 1.0, None, 20.0):
            await swarm.add((20_000,), **group_of(4), bandwidth=bandwidth)
        shares = averaged_elements(swarm.peers)
        await swarm.step()
        for peer in swarm.peers:
            assert means(peer) == pytest.approx([1.5])
        assert sum(shares.values()) == 20_000
        assert [shares[peer.id] > 6000 for peer in swarm.peers] == [True, False, True, True]
        assert shares[swarm.peers[1].id] == 0


def averaged_elements(peers: list[Peer]) -> dict[PeerId, int]:
    """How many elements each of them averages for the group, once a step is over."""
    shares: dict[PeerId, int] = {}
    for peer in peers:
        reduce = peer.averager._reduce

        async def noting(
            group: Any, weight: float, split: Any, own: PeerId = peer.id, reduce: Any = reduce
        ) -> Any:
            shares[own] = split[group.members.index(own)]
            return await reduce(group, weight, split)

        peer.averager._reduce = noting  # type: ignore[method-assign]
    return shares


@pytest.mark.parametrize("stranger_first", [False, True])
async def test_a_stranger_gets_into_no_group_of_allowed_peers(
    autojump_clock: object, stranger_first: bool
) -> None:
    allowed = [peer_id(number) for number in range(2)]
    async with run(2, **group_of(3), allowed_peers=allowed) as swarm:
        stranger = await swarm.add(**group_of(3))
        async with trio.open_nursery() as nursery:

            async def step_in_vain() -> None:
                with pytest.raises(DeadlineExceeded):
                    await stranger.averager.step(timeout=20)

            nursery.start_soon(step_in_vain)
            if stranger_first:
                await trio.sleep(1)
            for peer in swarm.peers[:2]:
                nursery.start_soon(peer.step)
        assert [means(peer)[0] for peer in swarm.peers] == [0.5, 0.5, 2.0]
        assert await stranger.averager.load_state_from_peers() is None
        state = await swarm.peers[0].averager.load_state_from_peers()
        assert state is not None
        assert float(state.tensors[0][0]) == 0.5


# --- roles ------------------------------------------------------------------------------------------------


async def test_a_peer_in_client_mode_averages_nothing_and_gets_the_mean(autojump_clock: object) -> None:
    async with run(2, **group_of(4)) as swarm:
        client = await swarm.add(**group_of(4), client_mode=True)
        await swarm.step(weights=[1.0, 1.0, 2.0])
        assert [means(peer) for peer in swarm.peers] == [[1.25, 1.25]] * 3
        with pytest.raises(ValueError, match="client mode"):
            client.averager.share_state(allowed=True)


async def test_an_auxiliary_peer_adds_nothing_to_the_mean(autojump_clock: object) -> None:
    async with run(2, **group_of(3)) as swarm:
        helper = await swarm.add(**group_of(3), auxiliary=True)
        helper.tensors[0].fill_(100.0)
        await swarm.step()
        assert [means(peer)[0] for peer in swarm.peers] == [0.5] * 3


async def test_a_peer_that_does_not_lead_joins_those_who_do(autojump_clock: object) -> None:
    async with run(2, **group_of(4)) as swarm:
        helper = await swarm.add(**group_of(4), auxiliary=True, leads=False)
        step = helper.averager.begin()
        await trio.sleep(600)  # no group can come about around it
        assert step.phase is Phase.LOOKING
        steps = [step, *(peer.averager.begin() for peer in swarm.peers[:2])]
        for each in steps:
            assert (await each.result()).gathered.keys() == {peer.id for peer in swarm.peers}
        assert [means(peer)[0] for peer in swarm.peers] == [0.5] * 3


async def test_if_all_weights_are_zero_nobody_changes(autojump_clock: object) -> None:
    async with run(2, **group_of(2)) as swarm:
        await swarm.step(weights=[0.0, 0.0])
        assert [means(peer)[0] for peer in swarm.peers] == [0.0, 1.0]


# --- faults -----------------------------------------------------------------------------------------------

SIZES = (150,)


def survivors(swarm: Run) -> list[Peer]:
    return swarm.peers[:3]


async def with_a_bad_fourth(
    swarm: Run, behaviour: Callable[[Any, AveragingData], Awaitable[None]], **options: Any
) -> Peer:
    """Four peers step; the fourth treats streams of parts in its own way. It gives its own parts as it should."""
    for _ in range(3):
        await swarm.add(SIZES, **group_of(4), **options)
    bad = await swarm.add(SIZES, **group_of(4))

    async def serve(stream: Any) -> None:
        await behaviour(stream, await stream.receive())

    method = bad.averager._methods.aggregate_part
    bad.server.unmount(method)
    bad.server.mount_stream(method, serve)
    async with trio.open_nursery() as nursery:
        for peer in survivors(swarm):
            nursery.start_soon(peer.step)
        nursery.start_soon(bad.step)
    return bad


async def answer_nothing(stream: Any, first: AveragingData) -> None:
    await trio.sleep_forever()


async def leave(stream: Any, first: AveragingData) -> None:
    return


async def fail(stream: Any, first: AveragingData) -> None:
    raise RuntimeError("no disk")


async def refuse(stream: Any, first: AveragingData) -> None:
    await stream.send(AveragingData(code=MessageCode.INTERNAL_ERROR))


async def answer_too_often(stream: Any, first: AveragingData) -> None:
    message: AveragingData | None = first
    while message is not None:
        assert message.tensor_part is not None
        tensor = encode_tensor(torch.zeros(message.tensor_part.size[0]))
        await stream.send(AveragingData(code=MessageCode.AVERAGED_PART, tensor_part=tensor))
        try:
            message = await stream.receive()
        except trio.EndOfChannel:
            message = None
    await stream.send(AveragingData(code=MessageCode.AVERAGED_PART, tensor_part=tensor))


def answer(values: Callable[[int], torch.Tensor]) -> Callable[[Any, AveragingData], Awaitable[None]]:
    async def behave(stream: Any, first: AveragingData) -> None:
        assert first.tensor_part is not None
        tensor = encode_tensor(values(first.tensor_part.size[0]))
        await stream.send(AveragingData(code=MessageCode.AVERAGED_PART, tensor_part=tensor))
        await trio.sleep_forever()

    return behave


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [
        (answer_nothing, "no answer within"),
        (leave, "fewer parts"),
        (answer_too_often, "more parts"),
        (refuse, "INTERNAL_ERROR"),
        (fail, "RuntimeError|no disk"),
        (answer(lambda n: torch.full((n,), math.nan)), "not finite"),
        (answer(lambda n: torch.zeros(n + 1)), "has size"),
        (answer(lambda n: torch.full((n,), 1e9)), "exceeds"),
    ],
)
async def test_a_reducer_that_fails_costs_its_share_only(
    autojump_clock: object,
    behaviour: Callable[[Any, AveragingData], Awaitable[None]],
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with run() as swarm:
        bad = await with_a_bad_fourth(swarm, behaviour, max_rms=1e6)
        for number, peer in enumerate(survivors(swarm)):
            assert peer.result is not None
            assert list(peer.result.failed_reducers) == [bad.id]
            assert re.search(why, peer.result.failed_reducers[bad.id])
            values = peer.tensors[0].tolist()
            assert 0 < peer.result.missing_elements < 60
            # a whole share keeps its values, and everything else is the mean of those who sent
            assert values.count(float(number)) >= peer.result.missing_elements
            others = {v for v in values if v != number}
            assert others <= {1.0, 1.5}
            assert all(math.isfinite(v) for v in values)


async def send_parts(
    bad: Peer, group_id: bytes, peer: PeerId, messages: list[AveragingData], *, stay: bool
) -> None:
    method = bad.averager._methods.aggregate_part
    try:
        async with bad.client.stream(peer, method, open_timeout=5) as stream:
            for message in messages:
                await stream.send(message)
            if stay:
                await trio.sleep_forever()
            await stream.end()
            async for _ in stream:
                pass
    except NetworkError:
        pass


def part(values: torch.Tensor, weight: float = 1.0, **fields: Any) -> AveragingData:
    return AveragingData(tensor_part=encode_tensor(values), weight=weight, **fields)


FIRST = {"code": MessageCode.PART_FOR_AVERAGING}


@pytest.mark.parametrize(
    ("messages", "stay", "why"),
    [
        ([], True, "late"),
        ([part(torch.full((16,), math.nan), **FIRST)], True, "value times"),
        ([part(torch.full((16,), 1e30), 1e20, **FIRST)], True, "value times"),
        ([part(torch.zeros(17), **FIRST)], True, "has size"),
        ([part(torch.zeros(16))], True, "first message has NO_CODE"),
        ([part(torch.zeros(16), **FIRST)], False, "fewer parts"),
        ([part(torch.zeros(16), **FIRST)], True, "late"),
        ([part(torch.zeros(16), **FIRST), AveragingData()], True, "no tensor"),
    ],
)
async def test_a_sender_that_fails_is_left_out_and_nobody_else(
    autojump_clock: object, messages: list[AveragingData], stay: bool, why: str
) -> None:
    async with run() as swarm:
        for _ in range(2):
            await swarm.add(SIZES, **group_of(3))
        bad = await swarm.add(SIZES, **group_of(3))

        async def misbehave(reduction: Any, client: RpcClient, method: Any) -> None:
            async with trio.open_nursery() as nursery:
                for peer in swarm.peers[:2]:
                    own = [
                        AveragingData(**{f: getattr(m, f) for f in ("code", "tensor_part", "weight")})
                        for m in messages
                    ]
                    for message in own[:1]:
                        message.group_id = reduction.group.group_id
                    nursery.start_soon(lambda p=peer, o=own: send_parts(bad, b"", p.id, o, stay=stay))
                await trio.sleep(100)
                nursery.cancel_scope.cancel()

        import kwaainet_bridge.hivemind.averaging.averager as module

        original = module.AllReduce.run

        async def either(self: Any, client: RpcClient, method: Any) -> None:
            await (
                misbehave(self, client, method) if client is bad.client else original(self, client, method)
            )

        with fault(module.AllReduce, "run", either):
            await swarm.step()
        for number, peer in enumerate(swarm.peers[:2]):
            assert peer.result is not None
            assert list(peer.result.failed_senders) == [bad.id]
            assert why in peer.result.failed_senders[bad.id]
            assert {round(value, 4) for value in peer.tensors[0].tolist()} <= {float(number), 0.5, 0.3333}
            assert 0.5 in peer.tensors[0].tolist()


@pytest.mark.parametrize("part_seconds", [2.0, 15.0])
async def test_members_are_given_up_after_the_time_that_parts_have(
    autojump_clock: object, part_seconds: float
) -> None:
    """A fourth peer answers nobody and sends nothing: first it is late, then its share is given up."""
    async with run() as swarm:
        began: list[float] = []

        async def silent(stream: Any, first: AveragingData) -> None:
            began.append(trio.current_time())
            await trio.sleep_forever()

        await with_a_bad_fourth(swarm, silent, part_seconds=part_seconds, matchmaking_seconds=1.0)
        assert 4 * part_seconds <= trio.current_time() - began[0] < 4 * part_seconds + 17
        for peer in survivors(swarm):
            assert peer.result is not None
            (why,) = peer.result.failed_reducers.values()
            assert why == f"no answer within {4 * part_seconds:g} s"


async def test_a_stranger_gets_into_no_group(autojump_clock: object) -> None:
    async with run(2, **group_of(2)) as swarm:
        stranger = await swarm.add(**group_of(2))
        method = stranger.averager._methods.aggregate_part
        async with stranger.client.stream(swarm.peers[0].id, method, open_timeout=5) as stream:
            await stream.send(part(torch.zeros(4), group_id=b"unknown", **FIRST))
            assert (await stream.receive()).code == MessageCode.BAD_GROUP_ID


@pytest.mark.parametrize("ends", [True, False])
async def test_calls_without_a_message_are_refused_quietly(
    autojump_clock: object, ends: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with run(2, **group_of(2)) as swarm:
        called = swarm.peers[0].averager._methods
        for method in (called.join_group, called.aggregate_part, called.download_state):
            async with swarm.peers[1].client.stream(swarm.peers[0].id, method, open_timeout=5) as stream:
                if ends:
                    await stream.end()
                with pytest.raises(HandlerError, match="a call without a message" if ends else "no message"):
                    await stream.receive()
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


async def test_own_values_that_are_not_finite_are_not_sent(autojump_clock: object) -> None:
    async with run(2, **group_of(2)) as swarm:
        swarm.peers[0].tensors[0][3] = math.nan

        async with trio.open_nursery() as nursery:
            nursery.start_soon(swarm.peers[1].step)
            with pytest.raises(ValueError, match="own values are not finite"):
                await swarm.peers[0].averager.step(timeout=30)
        assert means(swarm.peers[1]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("tensor", "options", "error"),
    [
        (torch.zeros(2, 3).t(), {}, "tensor 0 must be contiguous"),
        (torch.zeros(3, dtype=torch.int64), {}, "of floats"),
        (torch.zeros(0), {}, "nothing to average"),
        (torch.zeros(1), {"prefix": "a.b"}, "without a dot"),
        (torch.zeros(1), {"client_mode": True, "auxiliary": True}, "auxiliary"),
        (torch.zeros(1), {"bandwidth": math.nan}, "bandwidth is nan"),
        (torch.zeros(1), {"target_group_size": 1}, "at least 2 must fit"),
        (torch.zeros(1), {"part_seconds": 0.0}, "not above 0"),
    ],
)
async def test_what_cannot_be_averaged_is_refused_at_once(
    tensor: torch.Tensor, options: dict[str, Any], error: str
) -> None:
    async with run(1) as swarm:
        peer = swarm.peers[0]
        with pytest.raises(ValueError, match=error):
            Averager(peer.node, [tensor], **{"prefix": "other"} | options)
        for weight in (math.nan, -1.0, math.inf):
            with pytest.raises(ValueError, match="weight is"):
                await peer.averager.step(weight=weight)


# --- state ------------------------------------------------------------------------------------------------


async def test_the_state_of_the_highest_priority_is_loaded(autojump_clock: object) -> None:
    async with run(3) as swarm:
        swarm.peers[1].averager.share_state(allowed=True, priority=2.0)
        await trio.sleep(1)
        state = await swarm.peers[0].averager.load_state_from_peers()
        assert state is not None
        assert state.metadata == {"group_key": ""}
        assert [tensor.tolist() for tensor in state.tensors] == [[1.0] * 40, [1.0] * 3]
        swarm.peers[1].averager.share_state(allowed=False)
        await trio.sleep(1)
        state = await swarm.peers[0].averager.load_state_from_peers()
        assert state is not None
        assert float(state.tensors[0][0]) == 2.0


async def test_any_state_can_be_shared(autojump_clock: object) -> None:
    state = State(
        {"epoch": 7, "optimizer": [1, None]}, [torch.arange(30_000), torch.zeros(0), torch.tensor(5.0)]
    )
    async with run(1) as swarm:
        await swarm.add(state=lambda: state)
        await trio.sleep(1)
        loaded = await swarm.peers[0].averager.load_state_from_peers()
        assert loaded is not None
        assert loaded.metadata == state.metadata
        for ours, theirs in zip(loaded.tensors, state.tensors, strict=True):
            assert torch.equal(ours, theirs)


async def test_peers_that_give_no_state_are_passed_over(autojump_clock: object) -> None:
    async with run(3) as swarm:
        for number, peer in enumerate(swarm.peers[1:]):
            peer.averager.share_state(allowed=True, priority=10.0 - number)
        await trio.sleep(1)
        bad = swarm.peers[1]
        method = bad.averager._methods.download_state

        async def silent(stream: Any) -> None:
            await trio.sleep_forever()

        async def endless(stream: Any) -> None:
            tensor = encode_tensor(torch.zeros(1 << 18))
            tensor.chunks = 1 << 20
            await stream.send(DownloadData(metadata=pack({}), tensor_part=tensor))
            tensor.dtype, tensor.size = "", []
            while True:
                await stream.send(DownloadData(tensor_part=tensor))

        async def endless_nothing(stream: Any) -> None:
            tensor = encode_tensor(torch.zeros(8))
            tensor.chunks = 1 << 30
            await stream.send(DownloadData(metadata=pack({}), tensor_part=tensor))
            while True:
                await stream.send(DownloadData())

        async def one_tensor_too_few(stream: Any) -> None:
            await stream.send(
                DownloadData(metadata=pack({"group_key": ""}), tensor_part=encode_tensor(torch.zeros(40)))
            )

        async def nonsense(stream: Any) -> None:
            await stream.send(DownloadData(metadata=pack(5)))

        async def empty(stream: Any) -> None:
            await stream.receive()

        for behaviour in (silent, endless, endless_nothing, one_tensor_too_few, nonsense, empty):
            bad.server.unmount(method)
            bad.server.mount_stream(method, behaviour)
            began = trio.current_time()
            bad.averager.share_state(allowed=True, priority=10.0)
            state = await swarm.peers[0].averager.load_state_from_peers()
            assert state is not None
            assert float(state.tensors[0][0]) == 2.0
            assert trio.current_time() - began < defaults.AVERAGING_STATE_SECONDS + 5


async def test_without_anybody_who_shares_there_is_no_state(autojump_clock: object) -> None:
    async with run(2, share_state=False) as swarm:
        assert await swarm.peers[0].averager.load_state_from_peers() is None
        method = swarm.peers[1].averager._methods.download_state
        async with swarm.peers[0].client.stream(swarm.peers[1].id, method, open_timeout=5) as stream:
            await stream.send(pb.DownloadRequest())
            await stream.end()
            with pytest.raises(trio.EndOfChannel):
                await stream.receive()
