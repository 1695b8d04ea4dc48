"""Which blocks stock Petals chooses for a new server, for random swarms; one event ``ready`` tells all.

``block_choice.py SEED CASES``. Each case has what the servers announce and what ``choose_best_blocks`` answers. It is
how ``tests/vectors/petals-block-choice.json`` was made: the event's ``cases``, of seed 1 and 120.
"""

from __future__ import annotations

import random
import sys
from typing import Any

from hivemind import PeerID
from lines import Lines
from petals.data_structures import RemoteModuleInfo, ServerInfo, ServerState
from petals.server.block_selection import choose_best_blocks

STATES = ("ONLINE", "ONLINE", "ONLINE", "JOINING", "OFFLINE")


def random_server(rng: random.Random, total: int) -> dict[str, Any]:
    start = max(0, rng.randrange(-total // 2, total))  # the first blocks are not rarer than others
    end = rng.randint(start + 1, min(total, start + max(1, total // 2)))
    throughput = rng.choice([1.0, 0.1, rng.uniform(0, 1000), rng.uniform(0, 1)])
    return {
        "peer": PeerID(b"\x12\x20" + rng.randbytes(32)).to_base58(),
        "blocks": [start, end],
        "throughput": throughput,
        "state": rng.choice(STATES),
    }


def choose(servers: list[dict[str, Any]], total: int, size: int) -> list[int]:
    modules = [RemoteModuleInfo(uid=f"model.{block}", servers={}) for block in range(total)]
    for server in servers:
        start, end = server["blocks"]
        info = ServerInfo(
            state=ServerState[server["state"]],
            throughput=server["throughput"],
            start_block=start,
            end_block=end,
        )
        for block in range(start, end):
            modules[block].servers[PeerID.from_base58(server["peer"])] = info
    chosen = choose_best_blocks(size, modules)
    return [chosen[0], chosen[-1] + 1]


def random_case(rng: random.Random) -> dict[str, Any]:
    total = rng.choice([1, 6, 8, 12, 32])
    size = rng.randint(1, rng.choice([total, 1 + total // 4]))
    # some swarms are sparse, some crowded; with few distinct throughputs there are ties
    servers = [random_server(rng, total) for _ in range(rng.choice([0, 2, 4, 8, 8, 16]))]
    return {"total": total, "size": size, "servers": servers, "chosen": choose(servers, total, size)}


def main() -> None:
    rng = random.Random(int(sys.argv[1]))
    Lines().event("ready", cases=[random_case(rng) for _ in range(int(sys.argv[2]))])
    for _ in sys.stdin:
        pass


main()
