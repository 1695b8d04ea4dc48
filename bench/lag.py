"""How even a node of ours works while 16 sessions decode: their steps, and how late its event loop is.

``python -m bench.lag`` runs a node with the middling model of the other benchmarks, on all cores, and beside it on the
same cores a stock Petals client with 16 sessions. The node measures its loop twice a second; printed are the bounds
within which half and 99 of 100 of its turns came, and the same of the client's steps. Exit status 1 above a target.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

from stock_swarm import StockEnvironment, start_bootstrap

from bench.node_metrics import lag_quantile, metrics_of, milliseconds
from bench.petals import BLOCKS, ROOT, random_llama, start_client, starters

SESSIONS = 16
TOKENS = 100
"""Of each session, one after the other until the time is over."""
TARGET_SECONDS = 0.02
STEPS_TARGET = 2.0
"""Most that the p99 of steps may be, in multiples of their p50."""
WITHIN = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lag", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="of 16 sessions (default: %(default)s)")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "bench", help="folder of model and logs"
    )
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    stock = StockEnvironment.find(work, threads=os.cpu_count() or 1)
    model = random_llama(stock, work / "random-llama")
    bootstrap, address = start_bootstrap(stock)
    with (
        bootstrap,
        start_client(stock, threads=1) as client,
        starters(stock, model, work)["ours"]("lag", [address], BLOCKS),
    ):
        load = {"model": str(model), "prefix": "lag", "peers": [address], "reference": False}
        client.ask("load", key="lag", **load)
        socket = work / f"lag-{BLOCKS.start}.key.sock"
        before = metrics_of(socket)
        work_of = {"sessions": SESSIONS, "tokens": TOKENS, "within": WITHIN}
        steps = [client.ask("steps_at_once", key="lag", **work_of) for _ in range(options.rounds)]
        after = metrics_of(socket)
    lag = {f"p{round(share * 100)}": lag_quantile(before, after, share) for share in (0.5, 0.99)}
    step = {name: statistics.median(of[name] for of in steps) for name in ("p50", "p99")}
    found = {"event_loop_lag_seconds": lag, "step_ms": step, "of_a_step_ms": milliseconds(before, after)}
    print(json.dumps(found, indent=1))
    missed = [
        f"event loop's p99 <= {TARGET_SECONDS:g} s" * (lag["p99"] > TARGET_SECONDS),
        f"p99 of steps <= {STEPS_TARGET:g} p50" * (step["p99"] > STEPS_TARGET * step["p50"]),
    ]
    print(f"targets missed: {', '.join(filter(None, missed)) or 'none'}")
    sys.exit(any(missed))


if __name__ == "__main__":
    main()
