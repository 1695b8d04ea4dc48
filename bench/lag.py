"""How late the event loop of our node is while 16 sessions decode.

``python -m bench.lag`` runs a node with the middling model of the other benchmarks, on all cores, and beside it on the
same cores a stock Petals client with 16 sessions. The node measures its loop twice a second; printed are the bounds
within which half and 99 of 100 of its turns came. Exit status 1 above the target.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from stock_swarm import StockEnvironment, start_bootstrap

from bench.node_metrics import lag_quantile, metrics_of, milliseconds
from bench.petals import BLOCKS, ROOT, random_llama, start_client, starters

SESSIONS = 16
TOKENS = 100
"""Of each session, one after the other until the time is over."""
TARGET_SECONDS = 0.02
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
        for _ in range(options.rounds):
            client.ask("sessions_at_once", key="lag", sessions=SESSIONS, tokens=TOKENS, within=WITHIN)
        after = metrics_of(socket)
    found = {f"p{round(share * 100)}": lag_quantile(before, after, share) for share in (0.5, 0.99)}
    print(
        json.dumps({"event_loop_lag_seconds": found, "of_a_step_ms": milliseconds(before, after)}, indent=1)
    )
    met = found["p99"] <= TARGET_SECONDS
    print(f"target: p99 <= {TARGET_SECONDS:g} s: {'met' if met else 'missed'}")
    sys.exit(not met)


if __name__ == "__main__":
    main()
