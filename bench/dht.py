"""Our DHT beside stock Hivemind's: the load of Hivemind's own benchmark, for both kinds in turn.

``python -m bench.dht`` starts 16 nodes of one kind on loopback, which join through the first 4. In each of 16 rounds 8
nodes store a subkey of one key, then 8 nodes read the latest of it, 10 rounds at a time; a tenth of the nodes (2) die
without a word, one while the others store and one while they read. Printed for each kind and pair: operations per
second, and the share that succeeded: of the stores those that any node accepted, of the reads the subkeys that were
found among those stored. Calls and subkeys of the nodes that die are made and not counted. CPU is that of all
processes, Hivemind's daemons included. Stock's nodes share one process on uvloop, which spares them what
``hivemind.DHT`` costs; ours share one as well.

Source of the numbers: hivemind 1.1.12, ``benchmarks/benchmark_dht.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from child_processes import Driver
from stock_swarm import START_SECONDS, StockEnvironment

PEERS, INITIAL, ROUNDS, AT_ONCE, STORERS, READERS = 16, 4, 16, 10, 8, 8
FAILURE_RATE = 0.1
WITHIN = 300.0
TARGET = 2.0
ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "build" / "bench" / "dht.json"


def load(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The jobs of storing and those of reading."""
    rng = random.Random(seed)
    doomed = rng.sample(range(INITIAL, PEERS), round(PEERS * FAILURE_RATE))
    stores: list[dict[str, Any]] = []
    gets: list[dict[str, Any]] = []
    for number in range(ROUNDS):
        key = f"key {seed} {number}"
        storers = rng.sample(range(PEERS), STORERS)
        lasting = [node for node in storers if node not in doomed]
        stores.append({"do": "store", "key": key, "nodes": storers, "counted": lasting})
        subkeys = [f"peer {node}" for node in lasting]
        readers = rng.sample(range(PEERS), READERS)
        lasting = [node for node in readers if node not in doomed]
        gets.append({"do": "get", "key": key, "nodes": readers, "counted": lasting, "subkeys": subkeys})
    for jobs, node in zip((stores, gets), doomed, strict=True):
        jobs.insert(len(jobs) // 2, {"do": "kill", "node": node})
    return stores, gets


def cpu_seconds(driver: Driver) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in driver.members())


def measure(kind: str, stock: StockEnvironment, seed: int, *, within: float = WITHIN) -> dict[str, float]:
    """One swarm from start to end."""
    with _driver(kind, stock) as driver:
        driver.event("ready", within=START_SECONDS)
        driver.ask("open", count=PEERS, initial=INITIAL, within=within)
        result: dict[str, float] = {}
        for name, jobs in zip(("store", "get"), load(seed), strict=True):
            calls = sum(len(job.get("nodes", ())) for job in jobs)
            before = cpu_seconds(driver)
            answer = driver.ask("run", jobs=jobs, parallel=AT_ONCE, within=within)
            done = [part for part, job in zip(answer["done"], jobs, strict=True) if job["do"] != "kill"]
            result[f"{name}s/s"] = calls / answer["seconds"]
            result[f"{name}s ok"] = statistics.mean(done)
            result[f"{name} CPU ms"] = (cpu_seconds(driver) - before) / calls * 1000
        driver.ask("close", within=within)
        return result


def _driver(kind: str, stock: StockEnvironment) -> Driver:
    if kind == "stock":
        script = Path(__file__).with_name("dht_stock.py")
        argv, env = [stock.python, script], stock.variables
    else:
        argv, env = [Path(sys.executable), "-m", "bench.dht_ours"], {**os.environ, "PYTHONPATH": _path()}
    return Driver(f"dht-{kind}", argv, env=env, log=stock.work / f"dht-{kind}-{time.time_ns()}.log")


def _path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=30)
    options = parser.parse_args()
    samples: dict[str, list[dict[str, float]]] = {"stock": [], "ours": []}
    with tempfile.TemporaryDirectory() as work:
        stock = StockEnvironment.find(Path(work))
        for pair in range(options.pairs):
            for kind, rows in samples.items():
                rows.append(measure(kind, stock, options.seed + pair))
    medians = {
        kind: {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        for kind, rows in samples.items()
    }
    ratios = {name: medians["ours"][name] / medians["stock"][name] for name in medians["ours"]}
    print(f"{'':14}{'stock':>10}{'ours':>10}{'ratio':>8}{'target':>9}")
    for name, ratio in ratios.items():
        target = f">= {TARGET:g}" if name.endswith("/s") else ">= 1" if name.endswith("ok") else ""
        print(f"{name:14}{medians['stock'][name]:10.3f}{medians['ours'][name]:10.3f}{ratio:8.2f}{target:>9}")
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps({"medians": medians, "ratios": ratios, "samples": samples}, indent=1))


if __name__ == "__main__":
    main()
