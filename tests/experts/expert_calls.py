"""What a client sends, made by hand."""

from __future__ import annotations

import uuid

import torch

from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.wire import msgpack
from kwaainet_bridge.wire.expert import ExpertRequest
from kwaainet_bridge.wire.tensors import decode_tensor, encode_tensor

HIDDEN = 64
DUMMY = torch.empty(0)
NO_HYPOTHESES = torch.empty(0, dtype=torch.int64)


def uid(blocks):
    return " ".join(f"tiny-llama-hf.{block}" for block in blocks)


def hidden(batch=1, tokens=4, seed=0):
    return torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def request(blocks, *tensors, compression=CompressionType.NONE, **metadata):
    """An ExpertRequest; floating tensors with values are compressed, as stock clients do."""
    encoded = [
        encode_tensor(t, compression if t.is_floating_point() and t.numel() else CompressionType.NONE)
        for t in tensors
    ]
    return ExpertRequest(uid=uid(blocks), tensors=encoded, metadata=msgpack.pack(metadata))


def step(blocks, inputs, prompts=DUMMY, hypo_ids=NO_HYPOTHESES, **metadata):
    metadata.setdefault("step_id", str(uuid.uuid4()))
    metadata["args_structure"] = ((b"__T0", b"__T1", b"__T2"), {})
    return request(blocks, inputs, prompts, hypo_ids, **metadata)


def output(response):
    return decode_tensor(response.tensors[0])
