"""Which blocks stock Petals chooses for a server, and whether it would move, for random swarms; one event ``ready``.

``block_choice.py SEED CASES MOVES``. Each of the event's ``cases`` has what the servers announce and what
``choose_best_blocks`` answers: ``tests/vectors/petals-block-choice.json``, of seed 1 and 120. Each of its ``moves`` has
what ``should_choose_other_blocks`` answers one of them, and the first block of the best place that it found on the way
(null if it did not look): ``tests/vectors/petals-rebalancing.json``, of seed 1 and 160. Servers are shuffled there by
``random.Random(seed).shuffle``, in place of NumPy's.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np
from hivemind import PeerID
from lines import Lines
from petals.data_structures import RemoteModuleInfo, ServerInfo, ServerState
from petals.server import block_selection

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


def modules_of(servers: list[dict[str, Any]], total: int) -> list[RemoteModuleInfo]:
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
    return modules


def choose(servers: list[dict[str, Any]], total: int, size: int) -> list[int]:
    chosen = block_selection.choose_best_blocks(size, modules_of(servers, total))
    return [chosen[0], chosen[-1] + 1]


def random_case(rng: random.Random) -> dict[str, Any]:
    total = rng.choice([1, 6, 8, 12, 32])
    size = rng.randint(1, rng.choice([total, 1 + total // 4]))
    # some swarms are sparse, some crowded; with few distinct throughputs there are ties
    servers = [random_server(rng, total) for _ in range(rng.choice([0, 2, 4, 8, 8, 16]))]
    return {"total": total, "size": size, "servers": servers, "chosen": choose(servers, total, size)}


class NeverSettles(Exception):
    """Stock's simulation of what other servers would do goes in circles for some swarms."""


def would_move(
    servers: list[dict[str, Any]], total: int, own: str, quality: float, seed: int
) -> tuple[bool, int | None]:
    shuffle, find, rounds, found = random.Random(seed).shuffle, block_selection._choose_best_start, 0, []

    def counted_shuffle(keys: list[PeerID]) -> None:
        nonlocal rounds
        rounds += 1
        if rounds > 200:
            raise NeverSettles
        shuffle(keys)

    def noted_find(throughputs: Any, num_blocks: int) -> int:
        found.append(find(throughputs, num_blocks))
        return found[-1]

    np.random.shuffle, block_selection._choose_best_start = counted_shuffle, noted_find
    try:
        moves = block_selection.should_choose_other_blocks(
            PeerID.from_base58(own), modules_of(servers, total), quality
        )
    finally:
        block_selection._choose_best_start = find
    return bool(moves), int(found[0]) if found else None


def random_move(rng: random.Random) -> dict[str, Any]:
    while True:
        total = rng.choice([6, 8, 8, 12, 32])
        servers = [random_server(rng, total) for _ in range(rng.choice([2, 4, 6, 8, 16]))]
        if rng.random() < 0.7:  # nobody moves while some block has no server at all, and none would get one
            size = rng.randint(2, total // 2)
            spread = [random_server(rng, total) for _ in range(0, total, size)]
            for server, start in zip(spread, range(0, total, size), strict=True):
                server["blocks"], server["state"] = [start, min(total, start + size)], "ONLINE"
            servers += spread
        if rng.random() < 0.5:  # of servers that are much alike
            for server in servers:
                server["throughput"] = rng.choice([100.0, rng.uniform(50, 150)])
        own = rng.choice([server for server in servers if server["state"] != "OFFLINE"] or [None])
        if own is None:
            continue
        case = {"total": total, "own": own["peer"], "quality": rng.choice([0.0, 0.5, 0.75, 0.75, 1.0])}
        case["seed"] = rng.randrange(1000)
        try:
            moves, best = would_move(servers, total, case["own"], case["quality"], case["seed"])
        except NeverSettles:
            continue
        return {**case, "servers": servers, "best": best, "moves": moves}


def main() -> None:
    seed, cases, moves = map(int, sys.argv[1:])
    choices, rebalancing = random.Random(seed), random.Random(seed)
    Lines().event(
        "ready",
        cases=[random_case(choices) for _ in range(cases)],
        moves=[random_move(rebalancing) for _ in range(moves)],
    )
    for _ in sys.stdin:
        pass


main()
