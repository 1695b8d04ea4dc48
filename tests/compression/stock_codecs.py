"""Runs in the stock environment: let hivemind encode and decode what a file of JSON asks, write its answers.

Not imported by any test; it needs hivemind. Usage: stock_codecs.py REQUESTS ANSWERS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.proto import runtime_pb2


def encode(request: dict) -> str:
    data, dtype = bytearray.fromhex(request["values"]), getattr(torch, request["dtype"])
    tensor = torch.frombuffer(data, dtype=dtype).reshape(request["shape"])
    return serialize_torch_tensor(tensor, request["compression"]).SerializeToString().hex()


def decode(request: dict) -> str:
    tensor = deserialize_torch_tensor(runtime_pb2.Tensor.FromString(bytes.fromhex(request["message"])))
    values = tensor.detach().contiguous().reshape(-1)
    return f"{tensor.dtype} {list(tensor.shape)} {values.view(torch.uint8).numpy().tobytes().hex()}"


if __name__ == "__main__":
    requests, answers = (Path(argument) for argument in sys.argv[1:])
    answers.write_text(
        json.dumps([encode(r) if "values" in r else decode(r) for r in json.loads(requests.read_text())])
    )
