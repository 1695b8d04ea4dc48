"""A configuration that is read again: what has changed, and what a running node makes of it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from admin_support import asking, until
from node_clients import node_in_both
from node_support import NOWHERE, PREFIX, node_config, running_node

from kwaainet_bridge.config import NodeConfig, anchored, merge_settings, parse_config
from kwaainet_bridge.errors import ConfigError
from kwaainet_bridge.net import HostConfig, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.node.control import Control
from kwaainet_bridge.node.reloading import compare, merged
from kwaainet_bridge.node.state import NodeState

PEER = "12D3KooWJNHmzNXJwHBrjUin2kpjTMSyogJjT8oTH2T3TPKEhjAA"


def parsed(**settings: Any) -> NodeConfig:
    return parse_config("", "test", settings)


@pytest.mark.parametrize(
    ("before", "after", "applied", "restart"),
    [
        ({}, {}, (), ()),
        ({}, {"limits": {"connections": 10}}, ("limits.connections",), ()),
        (
            {},
            {
                "limits": {"connections_per_network": {"petals": 5}},
                "log": {"level": "debug", "format": "json"},
            },
            ("limits.connections_per_network.petals", "log.level"),
            ("log.format",),
        ),
        ({}, {"idle": {"watch": "cpu"}, "peers": {"deny": [PEER]}}, ("idle.watch", "peers.deny"), ()),
        ({}, {"networks": {"kwaainet": {}}}, (), ("networks.kwaainet",)),
        ({}, {"networks": {"petals": {"bootstrap": [NOWHERE]}}}, (), ("networks.petals.bootstrap",)),
        ({}, {"model": {}}, (), ("model",)),
        ({"model": {}}, {"model": {"public_name": "me"}}, ("model.public_name",), ()),
        ({"model": {}}, {"model": {"cache_tokens": 64}}, (), ("model.cache_tokens",)),
        (
            {"models": [{"name": "a/x.1"}, {"name": "b/y"}]},
            {"models": [{"name": "b/y", "threads": 2}, {"name": "a/x.1", "public_name": "me"}]},
            ("models.a/x.1.public_name",),
            ("models.b/y.threads",),
        ),
        ({"models": [{"name": "a/x"}]}, {"models": [{"name": "b/y"}]}, (), ("models.a/x", "models.b/y")),
        ({"model": {"shares": {PEER: 2}}}, {"model": {}}, (), (f"model.shares.{PEER}",)),
    ],
)
def test_what_changes_and_what_of_it_applies(
    before: dict[str, Any], after: dict[str, Any], applied: tuple[str, ...], restart: tuple[str, ...]
) -> None:
    running, wanted = parsed(**before), parsed(**after)
    result = compare(running, wanted)
    assert (result.applied, result.restart) == (applied, restart)
    # what applies has applied then, and what needs a restart needs it still
    assert compare(merged(running, wanted), wanted) == type(result)((), restart)


class File:
    """The configuration file of a node; ``settings`` are what it has."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder, self.settings, self.text = folder, settings, ""

    def read(self) -> NodeConfig:
        return anchored(parse_config(self.text, "node.yaml", self.settings), self.folder)

    def change(self, **settings: Any) -> None:
        self.settings = merge_settings(self.settings, settings)


async def test_limits_log_level_and_whom_it_lets_in(tmp_path: Path) -> None:
    base = node_config(tmp_path, "node").model_dump(mode="json", exclude_defaults=True)
    file = File(tmp_path, **base)
    logger = logging.getLogger("kwaainet_bridge")
    level = logger.level
    try:
        async with (
            running_node(file.read(), read=file.read) as node,
            asking(file.read().admin_address) as admin,
        ):
            await node.serving()
            assert (await admin.post("/api/reload")).json() == {"applied": [], "restart": []}
            friend = Identity.generate("ed25519")
            async with open_host(HostConfig(friend, listen=())) as host:
                peer = await host.connect(node.address)
                file.change(
                    limits={"connections": 321, "streams": 32, "stream_buffers_mib": 64},
                    log={"level": "error"},
                    peers={"deny": [str(friend.peer_id)]},
                    drain_seconds=5,
                )
                answer = (await admin.post("/api/reload")).json()
                assert answer == {
                    "applied": [
                        "limits.connections",
                        "limits.stream_buffers_mib",
                        "limits.streams",
                        "log.level",
                        "peers.deny",
                    ],
                    "restart": ["drain_seconds"],
                }
                assert logger.level == logging.ERROR
                status = (await admin.get("/api/status")).json()["host"]
                assert (status["connections"]["limit"], status["streams"]["limit"]) == (321, 32)
                with trio.fail_after(10):
                    await host.wait_disconnected(peer)
                assert (await admin.post("/api/reload")).json() == {
                    "applied": [],
                    "restart": ["drain_seconds"],
                }
            assert (node.state.reloads_begun, node.state.reloads_ended) == (3, 3)
    finally:
        logger.setLevel(level)


async def test_the_name_is_announced_at_once_in_both_networks(tmp_path: Path) -> None:
    file = File(tmp_path)
    async with node_in_both(tmp_path, read=file.read) as world:
        file.settings = world.node.config.model_dump(mode="json", exclude_defaults=True)
        file.change(model={"public_name": "my machine"})
        answer = (await world.admin.post("/api/reload")).json()
        assert answer == {"applied": ["model.public_name"], "restart": []}

        async def renamed() -> bool:
            found = [await world.petals.record(PREFIX), await world.kwaainet.record("model")]
            return [record and record.public_name for record in found] == ["my machine"] * 2

        await until(renamed)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("limits: {connections: many}", "limits.connections: Input should be a valid integer"),
        ("limitz: {}", "limitz: unknown key; did you mean 'limits'?"),
        ("a: [", "not YAML"),
        ("version: 9", "version: the file has layout 9"),
        ("idle: {pause_above: 5, resume_below: 10}", "resume_below (10) exceeds pause_above (5): lower it"),
    ],
)
async def test_a_file_with_a_mistake_changes_nothing(tmp_path: Path, text: str, told: str) -> None:
    base = node_config(tmp_path, "node").model_dump(mode="json", exclude_defaults=True)
    file = File(tmp_path, **base)
    async with running_node(file.read(), read=file.read) as node, asking(file.read().admin_address) as admin:
        await node.serving()
        file.text = text
        file.change(limits={"streams": 32}) if "limits" not in text else None
        before = (await admin.get("/api/status")).json()["host"]["streams"]["limit"]
        answer = await admin.post("/api/reload")
        assert answer.status_code == 422
        assert told in answer.json()["error"]
        assert (await admin.get("/api/status")).json()["host"]["streams"]["limit"] == before
        assert any(event.kind == "control" for event in node.state.events)


async def test_a_node_without_a_file_has_nothing_to_read(tmp_path: Path) -> None:
    config = node_config(tmp_path, "node")
    async with running_node(config), asking(config.admin_address) as admin:
        answer = await admin.post("/api/reload")
        assert answer.status_code == 422
        assert "started without a configuration file" in answer.json()["error"]


async def test_a_rule_that_cannot_be_followed_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    base = node_config(tmp_path, "node").model_dump(mode="json", exclude_defaults=True)
    file = File(tmp_path, **base)
    async with running_node(file.read(), read=file.read) as node, asking(file.read().admin_address) as admin:
        await node.serving()
        file.change(idle={"watch": "gpu"}, limits={"streams": 32})
        answer = await admin.post("/api/reload")
        assert answer.status_code == 422
        assert "pip install 'kwaainet-bridge[idle]'" in answer.json()["error"]
        assert (await admin.get("/api/status")).json()["host"]["streams"]["limit"] != 32
    with pytest.raises(ConfigError, match="needs nvidia-ml-py"):
        Control(file.read(), NodeState(), trio.Event())


async def test_only_the_peers_of_allow_get_in(tmp_path: Path) -> None:
    friend = Identity.generate("ed25519")
    config = node_config(tmp_path, "node", peers={"allow": [str(friend.peer_id)]})
    async with running_node(config) as node:
        await node.serving()
        async with open_host(HostConfig(friend, listen=())) as host:
            await host.connect(node.address)
            async with open_host(HostConfig(Identity.generate("ed25519"), listen=())) as stranger:
                peer = await stranger.connect(node.address)
                with trio.fail_after(10):
                    await stranger.wait_disconnected(peer)
            assert node.contact.peer_id in host.connected_peers()
        assert node.state.host is not None
        assert node.state.host.refused.counts["denied"] == 1


async def test_bootstrap_peers_need_not_be_allowed_and_can_be_denied(tmp_path: Path) -> None:
    async with running_node(node_config(tmp_path, "first")) as first:
        await first.serving()
        config = node_config(tmp_path, "node", bootstrap=[first.address], peers={"allow": [PEER]})
        async with running_node(config) as node:
            await node.serving()
            assert not node.state.degraded
        denied = {"deny": [str(first.contact.peer_id)]}
        config = node_config(tmp_path, "other", bootstrap=[first.address], peers=denied)
        async with running_node(config) as node:
            await node.serving()
            assert "bootstrap petals" in node.state.degraded
            assert node.state.host is not None
            with pytest.raises(Exception, match=r"kept out by peers\.deny"):
                await node.state.host.connect(first.address)
