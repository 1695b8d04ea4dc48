"""One of four averagers does one thing wrong: how it ends for two stock ones and another one of ours."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import trio
from averaging_faults import (
    ANSWERS,
    BAD,
    HEARS,
    SAYS,
    Action,
    Fault,
    Saboteur,
    Wire,
    die,
    die_after,
    die_answered,
    end,
    fail,
    late,
    say,
    spoilt,
    stay_silent,
    twice,
    with_fields,
    with_tensor,
    with_values,
)
from averaging_mix import OurPeer, values, words_of_leaders
from averaging_pool import SIZES, Pool, StockPeer, Swarm, beginning, cut, members_of, swarm_of
from child_processes import PeerError
from stock_swarm import START_SECONDS, StockEnvironment

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError
from kwaainet_bridge.hivemind.averaging import StepResult
from kwaainet_bridge.wire.averaging import DownloadData, MessageCode, code_name
from kwaainet_bridge.wire.msgpack import pack
from kwaainet_bridge.wire.pb import averaging_pb2 as pb
from kwaainet_bridge.wire.peer_id import PeerId
from kwaainet_bridge.wire.tensors import TensorMessage, encode_tensor

OURS, STOCK, SURVIVORS = 0, (1, 2), (0, 1, 2)
PART_SECONDS = 3.0
ALLREDUCE_SECONDS = 10.0


@dataclass
class Stock:
    """Two stock peers that all tests use."""

    pool: Pool
    peers: list[StockPeer]

    @property
    def driver(self) -> Any:
        return self.pool.driver


@pytest.fixture(scope="module")
def stock_peers(stock: StockEnvironment) -> Iterator[Stock]:
    with stock.script("averaging_peer.py") as driver:
        driver.event("ready", within=START_SECONDS)
        pool = Pool(driver)
        yield Stock(pool, [pool.start(allreduce_timeout=ALLREDUCE_SECONDS) for _ in STOCK])


async def survivors(swarm: Swarm, stock_peers: Stock, **ours: Any) -> None:
    await swarm.add_ours(OURS, **ours)
    for number, peer in zip(STOCK, stock_peers.peers, strict=True):
        await swarm.use(number, peer)


async def fates(swarm: Swarm, members: list[int]) -> dict[tuple[str, str], list[str]]:
    """What became of the parts, in order, by who averaged them and at whom: ours, stock peers, the bad one.

    A: the mean of all. O: that of the others, without the bad one. L: the own values. N: not finite. ?: anything else.
    One text for each pair of peers.
    """
    before = {n: beginning(n).double() for n in (*SURVIVORS, BAD)}
    found = {n: (await swarm.found_values(n)).double() for n in SURVIVORS}
    means = {
        "A": torch.stack([before[n] for n in members]).mean(0),
        "O": torch.stack([before[n] for n in members if n != BAD]).mean(0),
    }

    def fate(peer: int, part: Any) -> str:
        ended = cut(found[peer], part)
        if not ended.isfinite().all():
            return "N"
        for name, expected in (*means.items(), ("L", before[peer])):
            if (ended - cut(expected, part)).abs().max() < 2e-6:
                return name
        return "?"

    kind = {OURS: "ours", BAD: "bad"}
    result: dict[tuple[str, str], list[str]] = {}
    for owner, parts in swarm.layout(members).items():
        for peer in SURVIVORS:
            key = kind.get(owner, "stock"), kind.get(peer, "stock")
            result.setdefault(key, []).append("".join(fate(peer, part) for part in parts))
    return result


async def check_fates(swarm: Swarm, members: list[int], expected: dict[Any, str]) -> None:
    """``expected``: patterns, by who averaged, or by that and at whom; A+ unless given."""
    for (owner, at), texts in (await fates(swarm, members)).items():
        pattern = expected.get((owner, at), expected.get(owner, "A+"))
        for text in filter(None, texts):
            assert re.fullmatch(pattern, text), (owner, at, text)


def check_named(failed: dict[Any, str], culprits: set[str], why: str | None) -> None:
    """Nobody else is blamed, and for nothing else; nobody may be if ``why`` is None, or could be empty."""
    blamed = {str(peer) for peer in failed}
    if why is None or not re.search(why, ""):
        assert blamed == (set() if why is None else culprits)
    assert blamed <= culprits
    for text in failed.values():
        assert re.search(why or "", text), text


# --- joining ----------------------------------------------------------------------------------------------

ANSWER_LATER = late(2.5)  # than the others wait for it
STRANGER = b"\x12\x20" + bytes(32)

LEADS: dict[str, tuple[int, Action]] = {
    "says nothing": (0, stay_silent),
    "accepts late": (0, ANSWER_LATER),
    "ends the call": (0, end),
    "answers an error": (0, fail),
    "is killed": (0, die),
    "answers another code": (0, say(with_fields(code=MessageCode.AVERAGED_PART.value))),
    "begins before it accepts": (0, say(with_fields(code=MessageCode.BEGIN_ALLREDUCE.value))),
    "accepts, then nothing": (1, stay_silent),
    "accepts, then ends": (1, end),
    "accepts, then an error": (1, fail),
    "accepts, then is killed": (1, die),
    "begins with fewer gathered than members": (1, say(with_fields(gathered=[b"\x93\xc0\x00\xc4\x01\xc0"]))),
    "begins without those it accepted": (
        1,
        say(with_fields(ordered_peer_ids=[STRANGER], gathered=[b"\x93\xc0\x00\xc4\x01\xc0"])),
    ),
    "sends them to a stranger": (
        1,
        say(with_fields(code=MessageCode.GROUP_DISBANDED.value, suggested_leader=STRANGER)),
    ),
}


@pytest.mark.parametrize("name", LEADS)
async def test_a_leader_that(stock_peers: Stock, name: str) -> None:
    """The others leave it, and make a group without it, unless it joins theirs in time."""
    at, act = LEADS[name]
    saboteur = Saboteur(Fault("join_group", ANSWERS, at, act))
    async with joining(stock_peers) as swarm:
        await survivors(swarm, stock_peers)
        bad = await saboteur.join(swarm)
        step = bad.averager.begin(gather={"number": BAD})
        await swarm.declared(bad.id)
        await swarm.begin(*SURVIVORS)
        with trio.move_on_after(8):  # once all have been refused
            await saboteur.wait_struck(1 if act is die else 3)
        assert saboteur.fired
        step.cancel()
        without, with_it = list(SURVIVORS), [*SURVIVORS, BAD]
        await together(swarm, [without] if act is die else [without, with_it])


def joining(stock_peers: Stock) -> Any:
    """Survivors may begin without the fourth."""
    return swarm_of(
        stock_peers.pool,
        size=4,
        least_size=3,
        matchmaking_seconds=3.0,
        request_seconds=1.5,
        part_seconds=PART_SECONDS,
    )


async def together(swarm: Swarm, groups: list[list[int]]) -> list[int]:
    """All survivors end in one of these groups, with its mean. Returns the members in order."""
    outcomes = await swarm.outcomes(within=40)
    members = members_of(outcomes[OURS])
    assert sorted(members) in groups
    for outcome in outcomes.values():
        assert members_of(outcome) == members
    await check_fates(swarm, members, {})
    return members


async def join_twice(wire: Wire, request: Any) -> None:
    await wire.send(request)
    await wire.end()
    first = await wire.stream.receive()
    async with wire.open_another() as second:
        await second.send(request)
        await second.end()
        assert code_name((await second.receive()).code) == "DUPLICATE_PEER_ID"
    wire.give_back(first)


@dataclass(frozen=True)
class Follower:
    where: str
    at: int
    act: Action
    told: str | None = None  # the first word of the leader
    told_by_stock: str | None = None
    bandwidth: float | None = None


def asks(told: str, *, stock: str | None = None, bandwidth: float | None = None, **fields: Any) -> Follower:
    return Follower(SAYS, 0, say(with_fields(**fields)), told, stock or told, bandwidth)


FOLLOWS = {
    "asks with other tensors": asks("BAD_SCHEMA_HASH", schema_hash=b"x" * 20),
    "asks without a schema": asks("PROTOCOL_VIOLATION", schema_hash=b""),
    "asks for another group": asks("BAD_GROUP_KEY", group_key="run.0b1"),
    "expires too early": asks("BAD_EXPIRATION_TIME", expiration=1.0),
    "expires at no time": asks("PROTOCOL_VIOLATION", expiration=float("nan")),
    "gathers what nobody can read": asks("PROTOCOL_VIOLATION", stock="ACCEPTED", gather=b"\xc1"),
    "has a negative bandwidth": asks(
        "PROTOCOL_VIOLATION",
        stock="ACCEPTED",
        bandwidth=-1.0,
        gather=pack([-1.0, 0, pack({"number": BAD})]),
    ),
    "joins twice": Follower(SAYS, 0, join_twice),
    "asks nothing": Follower(SAYS, 0, stay_silent),
    "sends an error": Follower(SAYS, 0, fail),
    "is killed when it is accepted": Follower(HEARS, 0, die),
}


@pytest.mark.parametrize("leader", ["ours", "stock"])
@pytest.mark.parametrize("name", FOLLOWS)
async def test_a_follower_that(stock_peers: Stock, name: str, leader: str) -> None:
    """A leader of either side refuses it or makes a group without it; if it then does everything right, with it."""
    follower = FOLLOWS[name]
    saboteur = Saboteur(Fault("join_group", follower.where, follower.at, follower.act, once=True))
    first = {"ours": OURS, "stock": STOCK[0]}[leader]
    async with joining(stock_peers) as swarm:
        await survivors(swarm, stock_peers)
        bad = await saboteur.join(swarm)
        words = words_of_leaders(bad)
        await swarm.begin(first)
        await swarm.declared(swarm.id(first))
        bad.averager.begin(gather={"number": BAD})
        with trio.fail_after(20):
            await saboteur.wait_struck()
        await swarm.begin(*(number for number in SURVIVORS if number != first))
        if follower.bandwidth is not None and leader == "stock":
            swarm.bandwidths[BAD] = follower.bandwidth
        without, with_it = list(SURVIVORS), [*SURVIVORS, BAD]
        await together(swarm, [without] if follower.act is die else [without, with_it])
        if follower.told is not None:
            assert words[0] == (follower.told if leader == "ours" else follower.told_by_stock)


# --- parts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """How it ends: see ``check_fates``; what we blame it for as a sender and as a reducer; what we blame stock reducers
    for that it harmed; whether stock peers' steps fail (None: that depends on the size of the last part); if
    those that do leave the others at once, at whatever part they are, which fates are certain nevertheless; how late
    the first part of ours leaves.
    """

    where: str
    at: int
    act: Action
    fates: dict[Any, str] = field(default_factory=dict)
    sender: str | None = None
    reducer: str | None = None
    harmed: str | None = None
    stock_fails: bool | None = False
    if_stock_leaves: dict[Any, str] | None = None
    ours_late: float = 0.0


sends = partial(Case, SAYS)
averages = partial(Case, ANSWERS)
NEVER = {"ours": "O+", "stock": "O+"}
ONCE = {"ours": "AO+", "stock": "AO+"}
"""The bad one's first part counts, no other."""
LOST = {"bad": "AL+"}
ALONE = {("stock", "stock"): ".+", ("ours", "stock"): ".+", ("bad", "stock"): ".+"}
"""Whatever a stock peer has whose step failed."""
ANY = {"ours": "[AO?L]+", "stock": "[AO?L]+", "bad": "[AO?L]+", ("ours", "ours"): "[AO?]+"}
"""Nobody has what is no number, and ours averages its share."""
LEFT = "fewer parts|no answer|INTERNAL_ERROR|^$"
"""Of a stock reducer whose step failed."""

PARTS = {
    "never sends": sends(0, stay_silent, NEVER, "late"),
    "sends one part only": sends(1, stay_silent, ONCE, "late"),
    "sends late": sends(1, late(PART_SECONDS + 2), ONCE, "late"),
    "sends slowly": sends(1, late(1.0)),
    "ends before it sent a part": sends(0, end, NEVER, "late|without a message"),
    "ends after one part": sends(1, end, ONCE, "fewer parts"),
    "sends an error after one part": sends(1, fail, ONCE, "fewer parts"),
    "begins with another code": sends(
        0, say(with_fields(code=MessageCode.AVERAGED_PART)), NEVER, "has AVERAGED_PART"
    ),
    "begins with another group": sends(0, say(with_fields(group_id=b"x" * 20)), NEVER, "late"),
    "sends no tensor": sends(1, say(with_fields(tensor_part=None)), ONCE, "no tensor"),
    "sends too short a tensor": sends(1, say(with_tensor(values=[b"\0" * 8])), ONCE, "buffer has 8 bytes"),
    "is killed before it sends": sends(
        0,
        die,
        NEVER | {"bad": "L+"},
        "left|late",
        ".",
    ),
    "is killed after one part": sends(
        1, die_answered, {"ours": "[AO]O+", "stock": "[AO]O+", "bad": "[AL]+"}, "left|late", ".|^$"
    ),
    # a stock peer's call of a member that is gone is cancelled, and with it the future that the part's other
    # senders wait for: its step fails
    "is killed while its part waits for ours": sends(
        1,
        die_after(0.5),
        sender="left",
        reducer=".",
        harmed=LEFT,
        stock_fails=True,
        if_stock_leaves={("ours", "ours"): "[AO]O+"},
        ours_late=1.0,
    ),
    "sends a part of another size": sends(
        1,
        say(with_values(lambda values: values[:-1])),
        {"ours": "AO+", "stock": "AL+", **ALONE},  # stock peers that average wait for ever for one part more
        "has size",
        harmed="fewer parts|no answer",
        stock_fails=True,
    ),
    "sends a single value": sends(
        1, say(with_values(lambda values: values[:1])), {"ours": "AO+", "stock": "A[?]A+"}, "has size"
    ),
    "sends NaN": sends(
        1,
        say(with_values(spoilt)),
        {"ours": "AO+", "stock": "AL+", ("stock", "stock"): "ANA+"},
        "is nan",
        harmed="not finite",
    ),
    "sends a negative weight": sends(
        1, say(with_fields(weight=-1.0)), {"ours": "[AO]O+", "stock": "A[?]A+"}, "cannot be read|late"
    ),
    "never answers": averages(0, stay_silent, {"bad": "L+"}, reducer="no answer within 12 s"),
    "answers once": averages(1, stay_silent, LOST, reducer="no answer within 12 s"),
    "answers slowly": averages(1, late(1.0)),
    "ends after one answer": averages(1, end, LOST, reducer="fewer parts"),
    "answers an error code": averages(
        1, say(with_fields(code=MessageCode.INTERNAL_ERROR)), LOST, reducer="INTERNAL_ERROR"
    ),
    "answers an error": averages(1, fail, LOST, reducer="no disk"),
    "answers no tensor": averages(1, say(with_fields(tensor_part=None)), LOST, reducer="no tensor"),
    "answers too short a tensor": averages(
        1, say(with_tensor(values=[b"\0" * 8])), LOST, reducer="buffer has 8 bytes"
    ),
    "is killed after one answer": averages(
        1, die_answered, {"ours": "[AO]+", "stock": "[AO]+", "bad": "[AL]L+"}, "left|late|^$", "."
    ),
    "answers another size": averages(
        1,
        say(with_values(lambda values: values[:-1])),
        reducer="has size",
        harmed=LEFT,
        stock_fails=True,
        if_stock_leaves={("bad", "ours"): "AL+"},
    ),
    "answers NaN": averages(
        1, say(with_values(spoilt)), LOST | {("bad", "stock"): "ANA+"}, reducer="not finite"
    ),
    "sends a part twice": sends(  # nothing numbers parts: the next ones are taken for others unless their size differs
        1,
        twice,
        {"ours": "AA[?O]+", "stock": "AA[?OL]+", **ALONE},
        "has size|more than|^$",
        harmed=LEFT,
        stock_fails=None,
        if_stock_leaves={},
    ),
    "answers twice": averages(
        1,
        twice,
        {"bad": "L+|AAL+", **ALONE},
        reducer="more parts|has size",
        harmed=LEFT,
        stock_fails=None,
        if_stock_leaves={("bad", "ours"): "L+|AAL+"},
    ),
}


@pytest.mark.parametrize("name", PARTS)
async def test_a_member_that(stock_peers: Stock, name: str) -> None:
    case = PARTS[name]
    saboteur = Saboteur(Fault("aggregate_part", case.where, case.at, case.act))
    sluggard = Saboteur(Fault("aggregate_part", SAYS, 0, late(case.ours_late)))
    async with swarm_of(stock_peers.pool, size=4, part_seconds=PART_SECONDS) as swarm:
        await survivors(swarm, stock_peers, wrapped=sluggard.wrap)
        bad = await saboteur.join(swarm, part_seconds=100.0)
        bad.averager.begin(gather={"number": BAD})
        await swarm.begin(*SURVIVORS, retries=False)
        outcomes = await swarm.outcomes(within=40)
        result = outcomes[OURS]
        assert isinstance(result, StepResult)
        members = members_of(result)
        assert sorted(members) == [*SURVIVORS, BAD]
        stock_ended = all(isinstance(outcomes[number], dict) for number in STOCK)
        assert case.stock_fails is None or stock_ended != case.stock_fails, outcomes
        stock = {swarm.id(number) for number in STOCK}
        if case.if_stock_leaves is not None and not stock_ended:
            await check_fates(swarm, members, ANY | case.if_stock_leaves)
            assert {str(peer) for peer in result.failed_senders} <= {bad.id, *stock}
        else:
            await check_fates(swarm, members, case.fates)
            check_named(result.failed_senders, {bad.id}, case.sender)
        harmed = {peer: text for peer, text in result.failed_reducers.items() if str(peer) in stock}
        guilty = {peer: text for peer, text in result.failed_reducers.items() if str(peer) not in stock}
        check_named(harmed, stock, case.harmed)
        check_named(guilty, {bad.id}, case.reducer)


# --- state ------------------------------------------------------------------------------------------------


async def pieces_for_ever(wire: Wire, message: Any) -> None:
    """25 MB a second: a stock peer takes all of it."""
    tensor = encode_tensor(torch.zeros(1 << 16))
    tensor.chunks = 1 << 30
    await wire.send(DownloadData(tensor_part=tensor))
    piece = DownloadData(tensor_part=TensorMessage(values=tensor.values))
    while True:
        await wire.send(piece)
        await trio.sleep(0.01)


NEXT, NOT_A_MAP, ONE_TENSOR, NONE = "the next peer's", "metadata 5", "one tensor", "none in time"
STATES: dict[str, tuple[int, Action, str]] = {  # the last: what a stock peer takes
    "gives nothing": (0, end, NEXT),
    "gives nothing for long": (0, stay_silent, NEXT),
    "gives metadata that nobody can read": (0, say(with_fields(metadata=b"\xc1")), NEXT),
    "gives metadata that are no map": (0, say(with_fields(metadata=pack(5))), NOT_A_MAP),
    "gives a tensor that is too short": (1, say(with_tensor(values=[b"\0" * 8])), NEXT),
    "ends after one tensor": (1, end, ONE_TENSOR),
    "fails after one tensor": (1, fail, NEXT),
    "is silent after one tensor": (1, stay_silent, NEXT),
    "is killed after one tensor": (1, die, ONE_TENSOR),
    "never ends": (1, pieces_for_ever, NONE),
}


def lists(number: int) -> list[list[float]]:
    return [tensor.tolist() for tensor in values(number, SIZES)]


async def share(stock_peers: Stock, number: int, *, allowed: bool) -> None:
    averager = stock_peers.peers[STOCK.index(number)].averager
    await stock_peers.driver.aask("share", averager=averager, allowed=allowed, priority=5.0)


async def loaded_by(stock_peers: Stock, number: int) -> Any:
    """What a stock peer takes for the state; None if it takes none within a while."""
    averager = stock_peers.peers[STOCK.index(number)].averager
    try:
        return await stock_peers.driver.aask("load", averager=averager, timeout=8.0)
    except PeerError:
        return None


@asynccontextmanager
async def shared_by(swarm: Swarm, stock_peers: Stock, number: int) -> AsyncIterator[None]:
    await share(stock_peers, number, allowed=True)
    await swarm.offered(swarm.id(number))
    yield
    await share(stock_peers, number, allowed=False)


@pytest.mark.parametrize("name", STATES)
async def test_a_peer_that_shares_its_state_and(
    stock_peers: Stock, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """We take the next peer's state whatever the first one does; a stock peer notices less."""
    at, act, taken = STATES[name]
    monkeypatch.setattr(defaults, "AVERAGING_STATE_SECONDS", 4.0)
    async with swarm_of(stock_peers.pool, size=4) as swarm:
        await survivors(swarm, stock_peers)

        async def load_from_bad(load: Callable[[], Awaitable[Any]]) -> Any:
            saboteur = Saboteur(Fault("download_state", ANSWERS, at, act))
            bad = await saboteur.join(swarm)
            bad.averager.share_state(allowed=True, priority=10.0)
            await swarm.offered(bad.id)
            with trio.fail_after(20):
                state = await load()
            assert saboteur.fired
            saboteur.killed.set()
            return state

        async with shared_by(swarm, stock_peers, STOCK[1]):
            ours = await load_from_bad(swarm.ours[OURS].averager.load_state_from_peers)
            theirs = await load_from_bad(partial(loaded_by, stock_peers, STOCK[0]))
    assert [tensor.tolist() for tensor in ours.tensors] == lists(STOCK[1])
    match taken:
        case "the next peer's":
            assert theirs == {"metadata": {"group_key": ""}, "tensors": lists(STOCK[1])}
        case "metadata 5":
            assert theirs == {"metadata": 5, "tensors": lists(BAD)}
        case "one tensor":
            assert theirs == {"metadata": {"group_key": ""}, "tensors": lists(BAD)[:1]}
        case "none in time":
            assert theirs is None


async def test_peers_that_download_badly_keep_nobody_from_the_state(stock_peers: Stock) -> None:
    """They say nothing, end without a request, leave without reading, after a piece, or are killed: at both sides."""
    async with swarm_of(stock_peers.pool, size=4) as swarm:
        await survivors(swarm, stock_peers)
        swarm.ours[OURS].averager.share_state(allowed=True, priority=10.0)
        await swarm.offered(swarm.id(OURS))
        async with shared_by(swarm, stock_peers, STOCK[1]):
            saboteur = Saboteur(Fault("download_state", HEARS, 0, die))
            bad = await saboteur.join(swarm)
            for number in (OURS, STOCK[1]):
                await download_badly(swarm, bad, PeerId.parse(swarm.id(number)))
            # the first that it asks is ours; it is killed at the first piece
            swarm.nursery.start_soon(bad.averager.load_state_from_peers)
            with trio.fail_after(10):
                await saboteur.killed.wait()
            theirs = await loaded_by(stock_peers, STOCK[0])
            assert theirs == {"metadata": {"group_key": ""}, "tensors": lists(OURS)}
            ours = await swarm.ours[OURS].averager.load_state_from_peers()
            assert ours is not None
            assert [tensor.tolist() for tensor in ours.tensors] == lists(STOCK[1])


async def download_badly(swarm: Swarm, bad: OurPeer, server: PeerId) -> None:
    method = bad.averager._methods.download_state
    opened = trio.Event()

    async def say_nothing() -> None:
        with suppress(NetworkError):
            async with bad.node.client.stream(server, method, open_timeout=5):
                opened.set()
                await trio.sleep_forever()

    swarm.nursery.start_soon(say_nothing)
    await opened.wait()
    for asks, pieces in ((False, 0), (True, 0), (True, 1)):
        with suppress(_Enough):
            async with bad.node.client.stream(server, method, open_timeout=5) as stream:
                if asks:
                    await stream.send(pb.DownloadRequest())
                await stream.end()
                for _ in range(pieces):
                    await stream.receive()
                    raise _Enough  # resets the call


class _Enough(Exception):
    pass
