"""Server records: what Petals' strict readers accept, and what we accept of others."""

from __future__ import annotations

import math

import pytest

from kwaainet_bridge.errors import ConfigError, RemoteError
from kwaainet_bridge.hivemind.experts.records import (
    ServerInfo,
    ServerState,
    check_prefix,
    default_prefix,
)
from kwaainet_bridge.wire import msgpack
from kwaainet_bridge.wire.peer_id import PeerId

NEIGHBOUR = "12D3KooWJNHmzNXJwHBrjUin2kpjTMSyogJjT8oTH2T3TPKEhjAA"
# as a stock server stored it (recorded from a Petals swarm)
RECORDED = (
    2,
    2716.1776119469178,
    {
        "start_block": 0,
        "end_block": 4,
        "public_name": "bench",
        "version": "2.3.0.dev2",
        "network_rps": 97656.25,
        "forward_rps": 6790.444029867294,
        "inference_rps": 37.799984432823805,
        "adapters": (),
        "torch_dtype": "float32",
        "quant_type": "none",
        "using_relay": False,
        "cache_tokens_left": 16384,
        "next_pings": {NEIGHBOUR: 0.04091889360006463},
    },
)


def test_recorded_value_round_trips():
    info = ServerInfo.from_value(RECORDED)
    assert info.state is ServerState.ONLINE
    assert info.next_pings == {PeerId.parse(NEIGHBOUR): 0.04091889360006463}
    assert info.to_value() == RECORDED
    assert msgpack.pack(info.to_value()) == msgpack.pack(RECORDED)


def test_rates_are_stored_as_floats():
    value = ServerInfo(ServerState.JOINING, 1, network_rps=2, inference_rps=3).to_value()
    assert [type(v) for v in (value[1], value[2]["network_rps"], value[2]["inference_rps"])] == [float] * 3


@pytest.mark.parametrize(
    "value",
    [
        (2, 1.0),
        [2, 1.0, {}, "more"],
        (2, 1, {"unknown": [1]}),
        (2, 1.0, {"next_pings": {NEIGHBOUR: math.inf}}),
        (0, 0.0, {"start_block": None, "adapters": ["a"]}),
    ],
)
def test_what_readers_accept(value):
    ServerInfo.from_value(value)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (None, "expected"),
        ((2,), "expected"),
        ((2, 1.0, []), "not a map"),
        ((3, 1.0), "state"),
        ((-1, 1.0), "state"),
        ((True, 1.0), "state"),
        ((2, math.inf), "throughput"),
        ((2, math.nan), "throughput"),
        ((2, -1.0), "throughput"),
        ((2, "fast"), "throughput"),
        ((2, 1.0, {"start_block": 1.5}), "start_block"),
        ((2, 1.0, {"end_block": True}), "end_block"),
        ((2, 1.0, {"end_block": -1}), "end_block"),
        ((2, 1.0, {"version": 3}), "version"),
        ((2, 1.0, {"adapters": "abc"}), "adapters"),
        ((2, 1.0, {"adapters": [1]}), "adapters"),
        ((2, 1.0, {"cache_tokens_left": 1.0}), "cache_tokens_left"),
        ((2, 1.0, {"next_pings": [1]}), "next_pings"),
        ((2, 1.0, {"next_pings": {NEIGHBOUR: math.nan}}), "next_pings"),
        ((2, 1.0, {"next_pings": {"0OIl": 1.0}}), "base58"),
    ],
)
def test_what_readers_refuse(value, field):
    with pytest.raises(RemoteError, match=field):
        ServerInfo.from_value(value)


@pytest.mark.parametrize(
    ("repository", "family", "prefix"),
    [
        ("meta-llama/Meta-Llama-3.1-405B-Instruct", "llama", "Meta-Llama-3-1-405B-Instruct-hf"),
        ("test/tiny-llama", "llama", "tiny-llama-hf"),
        ("stabilityai/StableBeluga2-hf", "llama", "StableBeluga2-hf"),
        ("bigscience/bloom", "bloom", "bigscience/bloom-petals"),
        ("tiiuae/falcon-180B", "falcon", "falcon-180B"),
        ("mistralai/Mixtral-8x22B-Instruct-v0.1", "mixtral", "mistralai/Mixtral-8x22B-Instruct-v0-1"),
        ("Qwen/Qwen3-8B", "qwen3", "Qwen3-8B"),
    ],
)
def test_prefixes_are_those_of_petals(repository, family, prefix):
    assert default_prefix(repository, family) == prefix


@pytest.mark.parametrize("prefix", ["", "a.b", "a b", "a\nb"])
def test_bad_prefix(prefix):
    with pytest.raises(ConfigError, match="dht_prefix"):
        check_prefix(prefix)
