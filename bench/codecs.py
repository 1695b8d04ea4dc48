"""Every codec beside Hivemind's own and a memory copy: MB of float32 values per second, both ways.

``python -m bench.codecs`` alternates the two, each in its own process and environment, so that a machine that slows
down slows both, and prints the medians and their ratios as a table and as JSON. Measured is the whole way: from a
tensor to the bytes of its protobuf message and back.
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
from pathlib import Path

SIZES = {"18 KB": 4608, "1 MB": 1 << 18, "64 MB": 1 << 24}
CODECS = {
    "NONE": 0,
    "FLOAT16": 2,
    "MEANSTD_16BIT": 1,
    "UNIFORM_8BIT": 4,
    "QUANTILE_8BIT": 3,
    "BLOCKWISE_8BIT": 5,
}
ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 0.02
Work = Callable[[], object]


def values(count: int):
    import torch

    return torch.randn(count, generator=torch.Generator().manual_seed(count)).view(-1, 512)


def seconds(work: Work) -> float:
    """Of one run, from as many as fill LEAST_SECONDS."""
    runs, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < LEAST_SECONDS:
        work()
        runs += 1
    return spent / runs


def stock_work(codec: int, count: int) -> dict[str, Work]:
    from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
    from hivemind.proto.runtime_pb2 import Tensor

    tensor = values(count)
    data = serialize_torch_tensor(tensor, codec).SerializeToString()
    return {
        "stock encode": lambda: serialize_torch_tensor(tensor, codec).SerializeToString(),
        "stock decode": lambda: deserialize_torch_tensor(Tensor.FromString(data)),
    }


def our_work(codec: int, count: int) -> dict[str, Work]:
    from kwaainet_bridge.wire.tensors import TensorMessage, decode_tensor, encode_tensor

    tensor = values(count)
    data = b"".join(encode_tensor(tensor, codec).parts())
    return {
        "ours encode": lambda: b"".join(encode_tensor(tensor, codec).parts()),
        "ours decode": lambda: decode_tensor(TensorMessage.read(data)),
        "copy": tensor.clone,
    }


def frame_copies(count: int = SIZES["1 MB"]) -> list[str]:
    """The objects of the buffer's size that one uncompressed tensor in a stream frame takes, in order."""
    import tracemalloc

    from kwaainet_bridge.wire.expert import ExpertResponse
    from kwaainet_bridge.wire.frames import encode_message
    from kwaainet_bridge.wire.tensors import encode_tensor

    tensor = values(count)
    steps = []
    tracemalloc.start()
    parts = ExpertResponse(tensors=[encode_tensor(tensor)]).parts()
    steps.append(("parts of the message", tracemalloc.get_traced_memory()[1]))
    encode_message(*parts)
    steps.append(("frame", tracemalloc.get_traced_memory()[1]))
    tracemalloc.stop()
    return [f"{name}: {peak / (4 * count):.2f} buffers so far" for name, peak in steps]


def serve_stock(threads: int) -> None:
    """The stock side: a line of JSON in, [codec, count], a line of seconds by name out."""
    import torch

    torch.set_num_threads(threads)
    work: dict[tuple[int, int], dict[str, Work]] = {}
    for line in sys.stdin:
        key = tuple(json.loads(line))
        if key not in work:
            work = {key: stock_work(*key)}
            for run in work[key].values():
                run()
        print(json.dumps({name: seconds(run) for name, run in work[key].items()}), flush=True)


def measure(stock: subprocess.Popen[str], codec: int, count: int, pairs: int) -> dict[str, float]:
    ours = our_work(codec, count)
    for run in ours.values():
        run()
    found: dict[str, list[float]] = {}
    for number in range(-1, pairs):  # the first one warms up
        stock.stdin.write(json.dumps([codec, count]) + "\n")
        stock.stdin.flush()
        of_pair = json.loads(stock.stdout.readline()) | {name: seconds(run) for name, run in ours.items()}
        for name, taken in of_pair.items():
            if number >= 0:
                found.setdefault(name, []).append(taken)
    return {name: statistics.median(taken) for name, taken in found.items()}


def row(codec: str, size: str, taken: dict[str, float]) -> dict[str, object]:
    megabytes = 4 * SIZES[size] / 1e6
    result: dict[str, object] = {"codec": codec, "size": size, "copy MB/s": round(megabytes / taken["copy"])}
    for way in ("encode", "decode"):
        result |= {
            f"{way} MB/s": round(megabytes / taken[f"ours {way}"]),
            f"{way} us": round(taken[f"ours {way}"] * 1e6, 1),
            f"{way} stock MB/s": round(megabytes / taken[f"stock {way}"]),
            f"{way} ratio": round(taken[f"stock {way}"] / taken[f"ours {way}"], 2),
        }
    return result


def table(rows: list[dict[str, object]]) -> str:
    columns = list(rows[0])
    widths = [max(len(c), *(len(str(r[c])) for r in rows)) for c in columns]
    lines = [[str(c) for c in columns], *([str(r[c]) for c in columns] for r in rows)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.codecs", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--pairs", type=int, default=5, help="measurements of each side (default: %(default)s)")
    add("--threads", type=int, default=1, help="torch threads of each side (default: %(default)s)")
    add("--codec", choices=CODECS, action="append", help="only this one; may be repeated")
    add("--size", choices=SIZES, action="append", help="only this one; may be repeated")
    add("--stock", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stock:
        serve_stock(options.threads)
        return

    import torch

    torch.set_num_threads(options.threads)
    python = Path(os.environ.get("KWAAINET_BRIDGE_PEERS", ROOT / ".venv-peers")) / "bin" / "python"
    command = [python, "-W", "ignore", Path(__file__), "--stock", "--threads", str(options.threads)]
    env = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    rows = []
    load = os.getloadavg()[0]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    ) as stock:
        for codec in options.codec or CODECS:
            for size in options.size or SIZES:
                rows.append(row(codec, size, measure(stock, CODECS[codec], SIZES[size], options.pairs)))
                print(codec, size, file=sys.stderr)
        stock.stdin.close()
    result = {"threads": options.threads, "load before": load, "rows": rows, "frame of 1 MB": frame_copies()}
    print(json.dumps(result, indent=1))
    print(table(rows))
    print("\n".join(result["frame of 1 MB"]))


if __name__ == "__main__":
    main()
