"""How long a text pauses when the server that makes it is killed.

``python -m bench.failover`` runs three daemons of ours on this machine, one in Petals, one in KwaaiNet and one in both.
One client of both networks generates 200 tokens, and every 20 tokens the server in use is killed by SIGKILL. Another
daemon takes its place in the background, while the text goes on through those that are left. It prints how long each
token took.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import trio

for _folder in ("bridge", "node", "kwaainet"):
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / _folder))

from failover_processes import Outcome, generate_while_killing  # noqa: E402
from failover_world import PROMPT  # noqa: E402
from simulator import TINY, generate_locally  # noqa: E402

from kwaainet_bridge.engine import load_client_weights  # noqa: E402

TARGET_SECONDS = 2.0


def quantile(values: list[float], share: float) -> float:
    """The least value that is not exceeded by this share of them."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def summarise(outcome: Outcome, every: int) -> dict[str, object]:
    """Seconds, of all pauses, and of those right after a server was killed."""
    failovers = outcome.pauses[every - 1 :: every]
    return {
        "tokens": len(outcome.tokens),
        "killed": dict(sorted((name, outcome.killed.count(name)) for name in set(outcome.killed))),
        "median": statistics.median(outcome.pauses),
        "p99": quantile(outcome.pauses, 0.99),
        "worst": max(outcome.pauses),
        "median_after_a_kill": statistics.median(failovers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.failover", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="tokens between kills (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="texts (default: %(default)s)")
    options = parser.parse_args()

    weights = load_client_weights(str(TINY.folder), dtype=torch.float32)
    expected = generate_locally(TINY, PROMPT, options.tokens, boundaries=[])
    run = partial(generate_while_killing, weights=weights, tokens=options.tokens, every=options.every)
    everything = Outcome([], [])
    for number in range(options.runs):
        with tempfile.TemporaryDirectory() as folder:
            outcome = trio.run(run, Path(folder))
        if outcome.tokens != expected:
            sys.exit(f"run {number + 1}: the text is another one")
        print(
            f"run {number + 1}: {json.dumps(summarise(outcome, options.every))}", file=sys.stderr, flush=True
        )
        everything.tokens += outcome.tokens
        everything.pauses += outcome.pauses
        everything.killed += outcome.killed
    summary = summarise(everything, options.every)
    del summary["median_after_a_kill"]  # of single runs only
    print(json.dumps(summary, indent=1))
    met = "met" if summary["p99"] <= TARGET_SECONDS else "missed"
    print(f"target: p99 <= {TARGET_SECONDS:g} s: {met}")


if __name__ == "__main__":
    main()
