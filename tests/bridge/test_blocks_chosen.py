"""Operators' commands over both networks: what is missing in them together, and a daemon that fills it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import yaml
from child_processes import Process
from node_support import PREFIX, TINY, node_config, running_node
from our_nodes import wait_until_ready
from simulator import TINY as SIMULATED_TINY
from simulator import simulated_bootstrap, simulated_server

pytestmark = pytest.mark.slow

COMMAND = Path(sys.executable).with_name("kwaainet-bridge")
ENVIRONMENT = dict(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
BOTH = {"petals": PREFIX, "kwaainet": SIMULATED_TINY.prefix}


async def told_by_swarm(arguments: Sequence[str]) -> Any:
    run = partial(trio.run_process, capture_stdout=True, capture_stderr=True, check=False, env=ENVIRONMENT)
    done = await run([COMMAND, "swarm", *arguments, "--json"])
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def by_network(told: Any) -> dict[str, Any]:
    """The only model of each network."""
    models = {}
    for network in told["networks"]:
        (models[network["network"]],) = network["models"]
        assert network["error"] == ""
    return models


async def test_a_daemon_fills_the_gap_of_both_networks_and_is_seen_in_both(tmp_path: Path) -> None:
    """A node in Petals alone has 0:4, a peer in KwaaiNet alone 6:8; two blocks are chosen by a third in both."""
    with trio.fail_after(120):
        async with (
            simulated_bootstrap() as boot,
            simulated_server(blocks=range(6, 8), bootstrap=[boot]) as kwaainet_peer,
            running_node(node_config(tmp_path, "petals", blocks="0:4")) as petals_node,
        ):
            await petals_node.serving()
            config = tmp_path / "both.yaml"
            settings = {
                "identity": {"path": "both.key", "kind": "ed25519"},
                "listen": ["/ip4/127.0.0.1/tcp/0"],
                "networks": {
                    "petals": {"bootstrap": [petals_node.address]},
                    "kwaainet": {"bootstrap": [boot.address], "dht_prefix": SIMULATED_TINY.prefix},
                },
                "model": {"name": str(TINY), "dht_prefix": PREFIX, "throughput": 1.0, "threads": 1},
            }
            config.write_text(yaml.safe_dump(settings))
            arguments = ["-c", str(config), "--num-blocks", "2"]

            told = await told_by_swarm(arguments)
            seen = by_network(told)
            assert seen["petals"]["servers_per_block"] == [1, 1, 1, 1, 0, 0, 0, 0]
            assert seen["kwaainet"]["servers_per_block"] == [0, 0, 0, 0, 0, 0, 1, 1]
            assert seen["petals"]["gaps"] == [[4, 8]]
            assert seen["kwaainet"]["gaps"] == [[0, 6]]
            (server,) = seen["petals"]["servers"]
            assert (server["peer"], server["blocks"]) == (str(petals_node.contact.peer_id), [0, 4])
            (server,) = seen["kwaainet"]["servers"]
            assert (server["peer"], server["blocks"]) == (kwaainet_peer.peer_id, [6, 8])
            assert server["check"]["reachable"] is True
            assert told["models"] == [
                {
                    "prefixes": BOTH,
                    "num_blocks": 8,
                    "unknown_in": [],
                    "networks_per_block": [1, 1, 1, 1, 0, 0, 1, 1],
                    "gaps": [[4, 6]],
                    "suggestion": {"blocks": [4, 6], "reason": "nobody serves 4:6"},
                }
            ]

            words = [COMMAND, "run", "-c", config, "--auto", "--num-blocks", "2"]
            process = Process("both", words, env=ENVIRONMENT, log=tmp_path / "both.log")
            with process:
                address = await trio.to_thread.run_sync(wait_until_ready, process)
                choice = json.loads(process.wait_for(r"\{.*\"blocks chosen\".*\}")[0])
                assert (choice["blocks"], choice["reason"]) == ("4:6", "nobody serves 4:6")
                assert choice["networks"] == ["kwaainet", "petals"]

                told = await told_by_swarm(arguments)
                seen = by_network(told)
                assert seen["petals"]["servers_per_block"] == [1, 1, 1, 1, 1, 1, 0, 0]
                assert seen["kwaainet"]["servers_per_block"] == [0, 0, 0, 0, 1, 1, 1, 1]
                for model in seen.values():
                    chosen = [server for server in model["servers"] if server["blocks"] == [4, 6]]
                    assert [server["peer"] for server in chosen] == [address.rpartition("/p2p/")[2]]
                (together,) = told["models"]
                assert together["networks_per_block"] == [1, 1, 1, 1, 2, 2, 1, 1]
                assert together["gaps"] == []
            assert kwaainet_peer.complaints == boot.complaints == []
            await petals_node.drained()
