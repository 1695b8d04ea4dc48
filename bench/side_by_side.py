"""Our node beside a stock Petals server: same model, same machine, same stock client, one after the other.

``python -m bench.side_by_side`` alternates the two, so that a machine that slows down slows both, and prints
the medians and their ratios as a table and as JSON. Each server holds all blocks and joins the same stock
bootstrap peer under a name of its own, so that the client never sees the record of a server that has gone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from child_processes import Driver, Process
from our_nodes import start_node, wait_until_ready
from stock_swarm import SCRIPTS, StockEnvironment, start_bootstrap, start_server, wait_until_serving

MIB = 1024 * 1024
BLOCKS = range(8)
GENERATED_TOKENS = 64


@dataclass(frozen=True)
class Measurement:
    """What one run of one server gives. Speeds are the client's, in tokens per second."""

    generate: float
    """One session that generates 64 tokens after a prompt of 8."""
    forward_1x128: float
    forward_8x128: float
    start_seconds: float
    """From the start of the process to its word that it serves."""
    memory_mib: float
    """Resident memory of all processes of the server after the runs above, shared pages counted once."""


LESS_IS_BETTER = {"start_seconds", "memory_mib"}
Start = Callable[[str, list[str]], Process]


def measure(start: Start, client: Driver, model: Path, prefix: str, peers: list[str]) -> Measurement:
    began = time.perf_counter()
    with start(prefix, peers) as server:
        seconds = time.perf_counter() - began
        client.ask("load", key=prefix, model=str(model), prefix=prefix, peers=peers, reference=False)
        speed = client.ask("speed", key=prefix, new_tokens=GENERATED_TOKENS, within=300)
        memory = server.resident_bytes() / MIB
        client.ask("forget", key=prefix)
        return Measurement(start_seconds=seconds, memory_mib=memory, **speed)


def random_llama(stock: StockEnvironment, folder: Path) -> Path:
    """The model of the benchmark, made once."""
    if not (folder / "config.json").exists():
        argv = [stock.python, SCRIPTS / "random_llama.py", folder]
        subprocess.run(argv, env=stock.variables, check=True)
    return folder


def starters(stock: StockEnvironment, model: Path, work: Path) -> dict[str, Start]:
    def stock_server(prefix: str, peers: list[str]) -> Process:
        server = start_server(stock, model, prefix=prefix, blocks=BLOCKS, peers=peers)
        with server.killed_on_failure():
            wait_until_serving(server)
        return server

    def our_node(prefix: str, peers: list[str]) -> Process:
        threads = stock.threads
        node = start_node(
            work, prefix, model=model, prefix=prefix, blocks=BLOCKS, peers=peers, threads=threads
        )
        with node.killed_on_failure():
            wait_until_ready(node)
        return node

    return {"stock": stock_server, "ours": our_node}


def summarise(runs: dict[str, list[Measurement]]) -> dict[str, dict[str, float]]:
    """Medians of both, and how many times better the second of the two is."""
    (_, base), (_, other) = runs.items()
    summary = {}
    for field in fields(Measurement):
        medians = [statistics.median(getattr(m, field.name) for m in of) for of in (base, other)]
        better = medians[0] / medians[1] if field.name in LESS_IS_BETTER else medians[1] / medians[0]
        summary[field.name] = dict(zip(runs, medians, strict=True)) | {"times_better": better}
    return summary


def table(summary: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(summary.values())))
    lines = [" " * 16 + "".join(f"{column:>14}" for column in columns)]
    lines += [f"{name:16}" + "".join(f"{row[c]:14.2f}" for c in columns) for name, row in summary.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.side_by_side", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--pairs", type=int, default=5, help="runs of each server (default: %(default)s)")
    add("--threads", type=int, default=os.cpu_count(), help="torch threads of each process (default: all)")
    add("--work", type=Path, default=Path("build/bench"), help="folder of model, logs and results")
    add("--check", action="store_true", help="stock beside stock: how far from 1 the ratios are by chance")
    options = parser.parse_args()

    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    stock = StockEnvironment.find(work, threads=options.threads)
    model = random_llama(stock, work / "random-llama")
    start = starters(stock, model, work)
    pair = {"stock": start["stock"], "again": start["stock"]} if options.check else start
    runs: dict[str, list[Measurement]] = {name: [] for name in pair}

    bootstrap, address = start_bootstrap(stock)
    with bootstrap, stock.script("petals_client.py") as client:
        client.event("ready", within=60)
        for number in range(options.pairs):
            order = list(pair) if number % 2 == 0 else list(pair)[::-1]
            for name in order:
                measurement = measure(pair[name], client, model, f"bench-{name}-{number}", [address])
                runs[name].append(measurement)
                print(f"pair {number + 1} {name}: {asdict(measurement)}", file=sys.stderr, flush=True)

    summary = summarise(runs)
    result = {
        "threads": options.threads,
        "runs": {name: [asdict(m) for m in of] for name, of in runs.items()},
        "summary": summary,
    }
    (work / "side_by_side.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(summary, indent=1))
    print(table(summary))


if __name__ == "__main__":
    main()
