"""What a second network costs a daemon: its resident memory in one network and in both.

``python -m bench.both_networks`` starts one daemon after the other, in Petals, in KwaaiNet and in both. A stock Petals
client and a simulated KwaaiNet client generate through it, those of its networks at the same time; then its memory is
read: the proportional set size (PSS, shared pages counted by their share) and what is its own alone (USS). The model is
the tiny one of the tests, a megabyte, so that no weights hide what a network costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psutil
import trio

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "kwaainet"))

from child_processes import Driver
from our_nodes import start_node, wait_until_ready
from simulator import TINY, simulated_bootstrap, simulated_client
from stock_swarm import START_SECONDS, StockEnvironment, start_bootstrap

MIB = 1024 * 1024
PROMPT = [1, 42, 99, 7, 300]
TOKENS = 64
TEXTS = 3
"""Of each client."""
SETTLE_SECONDS = 1.0
"""Between the last token and the reading."""
TARGET = 1.05

NETWORKS = {"petals": ("petals",), "kwaainet": ("kwaainet",), "both": ("petals", "kwaainet")}


async def measure(name: str, folder: Path, client: Driver, petals_boot: str) -> dict[str, float]:
    """One daemon: seconds from its start to serving, PSS and USS in MiB after the texts."""
    async with AsyncExitStack() as stack:
        boot = await stack.enter_async_context(simulated_bootstrap())
        prefix = f"bench-{folder.name}-hf"
        settings: dict[str, Any] = {
            "petals": {"bootstrap": [petals_boot]},
            "kwaainet": {"bootstrap": [boot.address], "dht_prefix": TINY.prefix},
        }
        networks = {which: settings[which] if which in NETWORKS[name] else None for which in settings}
        began = time.perf_counter()
        daemon = stack.enter_context(
            start_node(folder, name, model=TINY.folder, prefix=prefix, networks=networks)
        )
        await trio.to_thread.run_sync(wait_until_ready, daemon)
        seconds = time.perf_counter() - began

        kwaainet = await stack.enter_async_context(simulated_client(bootstrap=[boot]))

        async def by_petals() -> None:
            loaded = {"model": str(TINY.folder), "prefix": prefix, "peers": [petals_boot]}
            await client.aask("load", key=prefix, within=START_SECONDS, **loaded)
            for _ in range(TEXTS):
                await client.aask("generate", key=prefix, ids=[PROMPT], new_tokens=TOKENS)
            await client.aask("forget", key=prefix)

        async def by_kwaainet() -> None:
            for _ in range(TEXTS):
                await kwaainet.generate(PROMPT, TOKENS)

        async with trio.open_nursery() as nursery:
            if "petals" in NETWORKS[name]:
                nursery.start_soon(by_petals)
            if "kwaainet" in NETWORKS[name]:
                nursery.start_soon(by_kwaainet)
        await trio.sleep(SETTLE_SECONDS)
        memory = psutil.Process(daemon.pid).memory_full_info()
        return {"start_seconds": seconds, "pss_mib": memory.pss / MIB, "uss_mib": memory.uss / MIB}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.both_networks", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default: %(default)s)")
    options = parser.parse_args()

    runs: dict[str, list[dict[str, float]]] = {name: [] for name in NETWORKS}
    with tempfile.TemporaryDirectory() as work:
        stock = StockEnvironment.find(Path(work))
        bootstrap, address = start_bootstrap(stock)
        with bootstrap, stock.script("petals_client.py") as client:
            client.event("ready", within=START_SECONDS)
            for number in range(options.rounds):
                for name in list(NETWORKS)[:: 1 if number % 2 == 0 else -1]:
                    folder = Path(work) / f"{name}-{number}"
                    folder.mkdir()
                    result = trio.run(measure, name, folder, client, address)
                    runs[name].append(result)
                    print(f"round {number + 1} {name}: {result}", file=sys.stderr, flush=True)

    summary: dict[str, dict[str, float]] = {}
    for row in ("pss_mib", "uss_mib", "start_seconds"):
        medians = {name: statistics.median(result[row] for result in of) for name, of in runs.items()}
        ratios = {f"both/{one}": medians["both"] / medians[one] for one in ("petals", "kwaainet")}
        summary[row] = {key: round(value, 3) for key, value in (medians | ratios).items()}
    print(json.dumps(summary, indent=1))
    worst = max(summary["pss_mib"]["both/petals"], summary["pss_mib"]["both/kwaainet"])
    print(f"target: both <= {TARGET:g} times one network: {'met' if worst <= TARGET else 'missed'}")


if __name__ == "__main__":
    main()
