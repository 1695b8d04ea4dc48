"""What a node says of itself where it can be dialled and where it cannot, and whether its blocks are announced."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from child_processes import Process
from lab import Lab, Machine
from lab_peers import PORT, eventually, our_node, our_peer, said

pytestmark = pytest.mark.slow

SERVED = {"model": {"name": "austen", "blocks": "0:2", "throughput": 1.0, "threads": 1, "max_length": 256}}


def swarm(*bootstrap: str, **more: Any) -> dict[str, Any]:
    return {"networks": {"petals": {"bootstrap": list(bootstrap)}}, **more}


async def first_node(machine: Machine, **config: Any) -> str:
    """A public bootstrap node; its address."""
    node = our_node(machine, f"{machine.name}-node", **config)
    peer = await said(node, r"^peer id +(\S+)")
    await said(node, r"^serving")
    return f"{machine.at(PORT)}/p2p/{peer}"


async def verdict(node: Process, expected: str, within: float = 60.0) -> str:
    """Wait until the node says so; its evidence."""
    return await said(node, rf"^reachable +{expected}: (.*)", within=within)


async def test_public(lab: Lab) -> None:
    bootstrap = await first_node(lab.host("first"))
    node = our_node(lab.host("second"), "node", **swarm(bootstrap), **SERVED)
    assert re.match(
        r"1 of 1 peers got through at /ip4/5\.44\.\d+\.2/tcp/4001 \(AutoNAT\)", await verdict(node, "public")
    )
    await said(node, "announced 2 blocks in .* as ONLINE")
    assert "degraded" not in node.tail()


async def test_a_router_that_forwards_the_port_is_found_out(lab: Lab) -> None:
    """Nothing is configured: a peer that got through names the outside address, which others are told then."""
    bootstrap = await first_node(lab.host("first"))
    router = lab.nat("router", "cone")
    inside = router.host("inside")
    router.forward_port(PORT, inside)
    node = our_node(inside, "node", **swarm(bootstrap))
    peer = await said(node, r"^peer id +(\S+)")
    assert f"at {router.at(PORT)} " in await verdict(node, "public")
    caller = await our_peer(lab.host("caller"))
    await caller.do("connect", address=bootstrap)
    # it knows the id alone, and asks the first node where that is
    await eventually(caller, "ping", bool, within=20, peer=peer)
    [connection] = [c for c in await caller.do("connections") if c["peer"] == peer]
    assert connection["address"].startswith(router.at(PORT))


async def test_behind_a_router_blocks_are_announced_with_a_relay_only(lab: Lab) -> None:
    bootstrap = await first_node(lab.host("first"))
    node = our_node(lab.nat("router", "symmetric").host("inside"), "node", **swarm(bootstrap), **SERVED)
    await verdict(node, "relayed")
    log = await said(node, "announced 2 blocks in .* as ONLINE: .*by other nodes")
    assert log
    text = node.tail()
    assert "as ONLINE" not in text.partition('"verdict": "unreachable"')[0]


async def test_text_is_generated_by_a_node_that_nobody_can_dial(lab: Lab) -> None:
    bootstrap = await first_node(lab.host("first"))
    model = {"model": {"name": "austen", "throughput": 1.0, "threads": 1, "max_length": 256}}
    node = our_node(lab.nat("router", "symmetric").host("inside"), "node", **swarm(bootstrap), **model)
    await said(node, "announced 8 blocks in .* as ONLINE")
    command = Path(sys.executable).with_name("kwaainet-bridge")
    words = [
        "generate",
        "My dear",
        "--model",
        "austen",
        "--max-new-tokens",
        "12",
        "--initial-peers",
        bootstrap,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    caller = lab.host("caller").process("generate", [command, *words, "--show-route"], env=env)
    peer = await said(node, r"^peer id +(\S+)")
    assert peer[-6:] in await said(caller, r"^route: 0:8 via (.*)")
    assert await said(caller, r"^My dear.{10}")


async def test_without_a_relay_nothing_is_announced(lab: Lab) -> None:
    bootstrap = await first_node(lab.host("first"), reachability={"relay_service": False})
    node = our_node(lab.nat("router", "cone").host("inside"), "node", **swarm(bootstrap), **SERVED)
    assert (await verdict(node, "unreachable")).startswith("0 of 1 peers got through (AutoNAT)")
    await said(node, r'"condition": "reachable".*forward its TCP port')
    await said(node, "blocks are not announced: nobody can dial this node")
    await said(node, r"^serving")
    assert "announced 2 blocks" not in node.tail()


async def test_a_peer_of_the_same_network_proves_nothing(lab: Lab) -> None:
    """It gets through, and those outside do not."""
    bootstrap = await first_node(lab.host("first"), reachability={"relay_service": False})
    router = lab.nat("router", "cone")
    neighbour = our_node(router.host("neighbour"), "neighbour", **swarm(bootstrap))
    await verdict(neighbour, "unreachable")
    id_ = await said(neighbour, r"^peer id +(\S+)")
    address = re.search(r"/ip4/192[^ ]+", await said(neighbour, r"^address.*"))
    assert address is not None
    assert id_ in address[0]
    node = our_node(router.host("inside"), "node", **swarm(bootstrap, address[0]))
    assert "1 peers got through" in await verdict(node, "unreachable")
