"""Our node beside a stock Petals server: same model, same machine, same stock client, one after the other.

``python -m bench.petals`` alternates the two, so that a machine that slows down slows both, and prints the medians and
their ratios: how fast a client generates, over one server and over a chain of two, beside transformers without any
server; how soon a server serves, and how much memory it takes, of itself and for sessions that use less than they ask
for. Each server joins the same stock bootstrap peer under a name of its own: the client never sees the record of a
server that has gone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from child_processes import Driver, Process
from our_nodes import start_node, wait_until_ready
from stock_swarm import SCRIPTS, StockEnvironment, start_bootstrap, start_server, wait_until_serving

MIB = 1024 * 1024
ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests" / "vectors" / "petals-tiny-llama" / "model"
BLOCKS = range(8)
CACHE_TOKENS = 1 << 17
HELD = {"sessions": 32, "max_length": 2048, "tokens": 200}
WITHIN = 300.0


@dataclass(frozen=True)
class Row:
    """A figure, whether less of it is better, and how many times better than stock it should be."""

    name: str
    less_is_better: bool
    target: float


ROWS = (
    Row("tokens per second, mid", less_is_better=False, target=1.25),
    Row("tokens per second over two servers, mid", less_is_better=False, target=1.5),
    Row("seconds from start to serving, tiny", less_is_better=True, target=2.0),
    Row("MiB of memory, tiny", less_is_better=True, target=2.5),
    Row("cache of 32 sessions, tokens, tiny", less_is_better=True, target=1 / 0.15),
)
LOCAL = "local"
LOCAL_TARGET = 0.85
"""How fast a client should generate through our node, as a share of transformers in its own process."""

Start = Callable[[str, list[str], range], Process]


def random_llama(stock: StockEnvironment, folder: Path) -> Path:
    """The middling model (hidden size 1024, 8 blocks), made once."""
    if not (folder / "config.json").exists():
        argv = [stock.python, SCRIPTS / "random_llama.py", folder]
        subprocess.run(argv, env=stock.variables, check=True)
    return folder


def starters(stock: StockEnvironment, model: Path, work: Path) -> dict[str, Start]:
    """What starts a server of some blocks of ``model`` under a prefix, and returns once it serves."""

    def stock_server(prefix: str, peers: list[str], blocks: range) -> Process:
        options = ("--attn_cache_tokens", str(CACHE_TOKENS))
        server = start_server(stock, model, prefix=prefix, blocks=blocks, peers=peers, options=options)
        with server.killed_on_failure():
            wait_until_serving(server)
        return server

    def our_node(prefix: str, peers: list[str], blocks: range) -> Process:
        name = f"{prefix}-{blocks.start}"
        # prompts come again from run to run: each is to be computed, as a stock server does
        options = {"threads": stock.threads, "cache_tokens": CACHE_TOKENS, "share_prefixes": "off"}
        node = start_node(work, name, model=model, prefix=prefix, blocks=blocks, peers=peers, **options)
        with node.killed_on_failure():
            wait_until_ready(node)
        return node

    return {"stock": stock_server, "ours": our_node}


def start_client(stock: StockEnvironment, *, threads: int) -> Driver:
    """The benchmarks' stock client; its torch computes on so many threads."""
    script = Path(__file__).resolve().with_name("engine_client.py")
    variables = stock.variables | {"PYTHONPATH": str(SCRIPTS), "OMP_NUM_THREADS": str(threads)}
    log = stock.work / "bench-client.log"
    with Driver("bench-client", [stock.python, script], env=variables, log=log).killed_on_failure() as client:
        client.event("ready", within=60)
        return client


class Bench:
    """The peers that stay, and the servers that take turns."""

    def __init__(self, stock: StockEnvironment, client: Driver, address: str) -> None:
        self._mid = random_llama(stock, stock.work / "random-llama")
        self._stock, self._client, self._peers = stock, client, [address]
        self._turn = 0

    def local(self) -> float:
        """Tokens per second of transformers alone."""
        return float(self._client.ask("local_tokens_per_second", model=str(self._mid), within=WITHIN))

    def one(self, who: str) -> dict[str, float]:
        """All rows, each on fresh servers."""
        self._turn += 1
        single, double, start, memory, cache = (row.name for row in ROWS)
        found = {}
        with self._serving(who, "one", self._mid, [BLOCKS]) as servers:
            found[single] = servers.ask("tokens_per_second")
        with self._serving(who, "two", self._mid, [BLOCKS[:4], BLOCKS[4:]]) as servers:
            found[double] = servers.ask("tokens_per_second")
        with self._serving(who, "tiny", TINY, [BLOCKS]) as servers:
            found[start] = servers.seconds
            servers.ask("steps", count=100)
            found[memory] = servers.processes[0].resident_bytes() / MIB
            found[cache] = servers.ask("cache_held", **HELD)
        return found

    @contextmanager
    def _serving(self, who: str, what: str, model: Path, spans: list[range]) -> Iterator[_Servers]:
        """Servers of these spans of a model, which the client has loaded under their prefix."""
        prefix = f"petals-{who}-{what}-{self._turn}"
        start = starters(self._stock, model, self._stock.work)[who]
        with ExitStack() as stack:
            began = time.perf_counter()
            processes = [stack.enter_context(start(prefix, self._peers, span)) for span in spans]
            seconds = time.perf_counter() - began
            options = {"model": str(model), "prefix": prefix, "peers": self._peers}
            self._client.ask("load", key=prefix, reference=False, within=WITHIN, **options)
            stack.callback(self._client.ask, "forget", key=prefix)
            yield _Servers(self._client, prefix, processes, seconds)


@dataclass(frozen=True)
class _Servers:
    client: Driver
    prefix: str
    processes: list[Process]
    seconds: float

    def ask(self, do: str, **arguments: object) -> float:
        return float(self.client.ask(do, key=self.prefix, within=WITHIN, **arguments))


def report(samples: dict[str, dict[str, list[float]]], local: list[float]) -> None:
    """Print the table."""
    print(f"{'':42}{'stock':>10}{'ours':>10}{'times better':>14}{'target':>8}")
    for row in ROWS:
        stock, ours = (statistics.median(samples[row.name][who]) for who in ("stock", "ours"))
        better = stock / ours if row.less_is_better else ours / stock
        print(f"{row.name:42}{stock:10.2f}{ours:10.2f}{better:14.2f}{row.target:8.2f}")
    alone, ours = statistics.median(local), statistics.median(samples[ROWS[0].name]["ours"])
    print(
        f"transformers alone: {alone:.2f} tokens per second; ours {ours / alone:.2f} of it (target: {LOCAL_TARGET})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.petals", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--pairs", type=int, default=5, help="runs of each (default: %(default)s)")
    add("--threads", type=int, default=os.cpu_count(), help="torch threads of each process (default: all)")
    add("--work", type=Path, default=ROOT / "build" / "bench", help="folder of model, logs and results")
    options = parser.parse_args()

    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    stock = StockEnvironment.find(work, threads=options.threads)
    samples: dict[str, dict[str, list[float]]] = {row.name: {"stock": [], "ours": []} for row in ROWS}
    local: list[float] = []
    bootstrap, address = start_bootstrap(stock)
    with bootstrap, start_client(stock, threads=options.threads) as client:
        bench = Bench(stock, client, address)
        for number in range(options.pairs):
            for who in ["stock", "ours"] if number % 2 == 0 else ["ours", "stock"]:
                found = bench.one(who)
                print(f"pair {number + 1} {who}: {found}", file=sys.stderr, flush=True)
                for name, value in found.items():
                    samples[name][who].append(value)
            local.append(bench.local())
    (work / "petals.json").write_text(json.dumps({"samples": samples, LOCAL: local}, indent=1))
    report(samples, local)


if __name__ == "__main__":
    main()
