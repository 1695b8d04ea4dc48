"""A node pays for the networks that it is in: nothing that only the other one needs is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SERVE = """
import json, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import trio
from node_support import node_config, running_node


async def main():
    networks = json.loads(sys.argv[3])
    async with running_node(node_config(Path(sys.argv[2]), "node", networks=networks, blocks="0:8")) as node:
        await node.serving()
        print(json.dumps(sorted(sys.modules)))
        await node.drained()


trio.run(main)
"""

ONLY_KWAAINET = {
    "node.kwaainet",
    "kwaai.server",
    "kwaai.inference",
    "kwaai.lease",
    "kwaai.mux",
    "kwaai.tensor",
}
ONLY_PETALS = {
    "node.petals",
    "hivemind.experts.server",
    "hivemind.experts.inference",
    "hivemind.experts.push",
}
RECORDS = "kwaainet_bridge.kwaai.records"  # the rules of names, a hundred lines


def modules_of_a_serving_node(folder: Path, networks: dict[str, object]) -> set[str]:
    command = [sys.executable, "-c", SERVE, Path(__file__).parent, folder, json.dumps(networks)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("["))
    return set(json.loads(line))


@pytest.mark.parametrize(
    ("networks", "needed", "other"),
    [
        ({"petals": {}, "kwaainet": None}, ONLY_PETALS, ONLY_KWAAINET),
        ({"petals": None, "kwaainet": {}}, ONLY_KWAAINET, ONLY_PETALS),
    ],
    ids=["petals", "kwaainet"],
)
def test_a_node_in_one_network_imports_nothing_of_the_other(
    tmp_path: Path, networks: dict[str, object], needed: set[str], other: set[str]
) -> None:
    modules = modules_of_a_serving_node(tmp_path, networks)
    assert {f"kwaainet_bridge.{name}" for name in needed} <= modules
    assert not {f"kwaainet_bridge.{name}" for name in other} & modules
    if networks["kwaainet"] is None:
        assert {m for m in modules if m.startswith("kwaainet_bridge.kwaai.")} <= {RECORDS}
