"""What a survey of a swarm makes of records: coverage, models, checks. No network."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import trio
from client_fakes import PREFIX, FakeDht, FakeRecord, peer

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, PeerUnreachable, ProtocolNotSupported, RemoteError
from kwaainet_bridge.hivemind.client import (
    Check,
    Coverage,
    Directory,
    Span,
    SwarmModel,
    check_servers,
    registered_models,
    survey,
)
from kwaainet_bridge.hivemind.experts.records import (
    MODEL_REGISTRY_KEY,
    ModelRecord,
    ServerInfo,
    ServerState,
)

A, B, C, D = map(peer, (1, 2, 3, 4))
MODEL = SwarmModel(PREFIX, 8)


def info(start: int, end: int, state: ServerState = ServerState.ONLINE) -> ServerInfo:
    return ServerInfo(state, 1.0, start_block=start, end_block=end)


def spans(*blocks: tuple[int, int], state: ServerState = ServerState.ONLINE) -> list[Span]:
    return [Span(peer(n), range(*ends), info(*ends, state)) for n, ends in enumerate(blocks)]


# --- coverage


def test_servers_are_counted_for_each_block() -> None:
    coverage = Coverage.of(spans((0, 4), (2, 6), (2, 3)), 8)
    assert coverage.counts == (1, 1, 3, 2, 1, 1, 0, 0)
    assert coverage.gaps == [range(6, 8)]


@pytest.mark.parametrize("state", [ServerState.JOINING, ServerState.OFFLINE])
def test_only_servers_online_cover_blocks(state: ServerState) -> None:
    coverage = Coverage.of([*spans((0, 8), state=state), *spans((3, 5))], 8)
    assert coverage.counts == (0, 0, 0, 1, 1, 0, 0, 0)
    assert coverage.gaps == [range(3), range(5, 8)]


def test_an_empty_span_covers_nothing() -> None:
    assert Coverage.of(spans((3, 3)), 4).gaps == [range(4)]


def test_without_gaps() -> None:
    assert Coverage.of(spans((0, 4), (4, 8)), 8).gaps == []


@pytest.mark.parametrize(
    ("width", "size", "cells"),
    [
        (10, 1, [1, 1, 2, 2, 0, 1, 1]),
        (7, 1, [1, 1, 2, 2, 0, 1, 1]),
        (6, 2, [1, 2, 0, 1]),
        (3, 3, [1, 0, 1]),
        (1, 7, [0]),
    ],
)
def test_a_cell_is_as_good_as_its_worst_block(width: int, size: int, cells: list[int]) -> None:
    assert Coverage((1, 1, 2, 2, 0, 1, 1)).cells(width) == (size, cells)


# --- the directory, in all states


async def test_a_directory_gives_the_states_that_it_is_asked_for() -> None:
    dht = FakeDht()
    for server, state in ((A, ServerState.ONLINE), (B, ServerState.JOINING), (C, ServerState.OFFLINE)):
        dht.announce(server, info(0, 4, state), range(4))
    directory = Directory(dht, PREFIX, 8)
    assert [span.peer for span in await directory.read()] == [A]
    everybody = await directory.read(states=tuple(ServerState))
    assert {span.peer: span.info.state for span in everybody} == {
        A: ServerState.ONLINE,
        B: ServerState.JOINING,
        C: ServerState.OFFLINE,
    }


# --- the registry


def registry(entries: dict[Any, Any]) -> FakeDht:
    return FakeDht({MODEL_REGISTRY_KEY: FakeRecord({k: (value, 1.0) for k, value in entries.items()})})


async def test_registered_models() -> None:
    page = "https://huggingface.co/petals-team/StableBeluga2"
    dht = registry(
        {
            "b": {"num_blocks": 80, "repository": page, "a later field": 1},
            "a": {"num_blocks": defaults.MAX_MODEL_BLOCKS, "repository": None},
        }
    )
    models = await registered_models(dht)
    assert models == [SwarmModel("a", defaults.MAX_MODEL_BLOCKS), SwarmModel("b", 80, page)]
    for name in ("b", page, "petals-team/StableBeluga2", "StableBeluga2"):
        assert models[1].is_called(name)
    for name in ("a", "petals-team", "huggingface.co", ""):
        assert not models[1].is_called(name)
    assert models[0].is_called("a")


async def test_an_empty_registry() -> None:
    assert await registered_models(FakeDht()) == []


@pytest.mark.parametrize(
    ("prefix", "value", "text"),
    [
        ("m", None, "not a map"),
        ("m", [8], "not a map"),
        ("m", {}, "num_blocks None"),
        ("m", {"num_blocks": 0}, "num_blocks 0"),
        ("m", {"num_blocks": -1}, "num_blocks -1"),
        ("m", {"num_blocks": True}, "num_blocks True"),
        ("m", {"num_blocks": 8.0}, "num_blocks 8.0"),
        ("m", {"num_blocks": 1 << 62}, f"not in 1..{defaults.MAX_MODEL_BLOCKS}"),
        ("m", {"num_blocks": "9" * 10**6}, "num_blocks '999"),
        ("m", {"num_blocks": 8, "repository": b"x"}, "repository is no text"),
        ("a.b", {"num_blocks": 8}, "without dots"),
        ("", {"num_blocks": 8}, "non-empty"),
        (b"bytes", {"num_blocks": 8}, "no prefix"),
        (None, {"num_blocks": 8}, "no prefix"),
    ],
)
async def test_a_bad_model_record_is_skipped_and_logged(prefix, value, text, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        models = await registered_models(registry({prefix: value, "good": {"num_blocks": 8}}))
    assert models == [SwarmModel("good", 8)]
    assert text in caplog.text
    assert "skipped 1 bad" in caplog.text
    assert len(caplog.text) < 500


async def test_a_registry_that_is_no_dictionary(caplog) -> None:
    dht = FakeDht({MODEL_REGISTRY_KEY: FakeRecord("value", is_dictionary=False)})
    assert await registered_models(dht) == []
    assert "no dictionary" in caplog.text


def test_a_model_record_is_a_value_or_refused() -> None:
    assert ModelRecord.from_value({"num_blocks": 1}) == ModelRecord(1)
    with pytest.raises(RemoteError, match="model record"):
        ModelRecord.from_value(8)


# --- the survey


async def test_a_survey_gives_all_servers_in_the_order_of_their_blocks() -> None:
    dht = FakeDht()
    dht.announce(A, info(4, 8), range(4, 8))
    dht.announce(B, info(0, 6, ServerState.JOINING), range(6))
    dht.announce(C, info(0, 4), range(4))
    dht.records[f"{PREFIX}.0"].value["hostile\x1b[2J"] = (b"garbage", 1.0)
    surveyed, other = await survey(dht, [MODEL, SwarmModel("nobody", 2)])
    assert [span.peer for span in surveyed.spans] == [C, B, A]
    assert surveyed.coverage.gaps == []
    assert other.spans == ()
    assert other.coverage.gaps == [range(2)]


async def test_what_is_logged_of_a_hostile_record_is_printable(caplog) -> None:
    dht = FakeDht({f"{PREFIX}.0": FakeRecord({"hostile\x1b[2J\n": (b"garbage", 1.0)})})
    await survey(dht, [MODEL])
    assert "skipped 1 bad" in caplog.text
    assert "\x1b" not in caplog.text
    assert caplog.records[0].getMessage().isprintable()


async def test_a_model_that_cannot_be_read_does_not_hide_the_others(autojump_clock) -> None:
    class Failing(FakeDht):
        async def get_many(self, keys: Any, *, latest: bool = True) -> dict[Any, Any]:
            if keys[0].startswith("bad"):
                raise NetworkError("no DHT peer answered")
            if keys[0].startswith("slow"):
                await trio.sleep_forever()
            return await super().get_many(keys, latest=latest)

    dht = Failing()
    dht.announce(A, info(0, 8), range(8))
    bad, slow, good = await survey(dht, [SwarmModel("bad", 1), SwarmModel("slow", 1), MODEL])
    assert bad.error == "no DHT peer answered"
    assert "within 60 s" in slow.error
    assert (good.error, len(good.spans)) == ("", 1)


# --- checks


async def test_servers_are_checked(autojump_clock) -> None:
    async def round_trip(server):
        if server == B:
            raise PeerUnreachable("cannot reach B (tcp): refused", hop="tcp")
        if server == C:
            raise ProtocolNotSupported("no ping")
        if server == D:
            await trio.sleep_forever()
        return 0.25

    assert await check_servers([A, B, C, D, A], round_trip) == {
        A: Check(True, 0.25),
        B: Check(False, error="cannot reach B (tcp): refused"),
        C: Check(True),
        D: Check(False, error=f"no answer within {defaults.SERVER_CHECK_SECONDS:g} s"),
    }


async def test_checks_are_bounded_in_number_and_time(autojump_clock) -> None:
    running = most = 0

    async def hang(_):
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            await trio.sleep_forever()
        finally:
            running -= 1

    crowd = [peer(n) for n in range(1000)]
    checks = await check_servers(crowd, hang)
    assert most == defaults.SERVER_CHECKS_AT_ONCE
    assert trio.current_time() == pytest.approx(defaults.SERVER_CHECKS_SECONDS)
    rounds = int(defaults.SERVER_CHECKS_SECONDS / defaults.SERVER_CHECK_SECONDS)
    assert len(checks) == rounds * most
    assert running == 0
