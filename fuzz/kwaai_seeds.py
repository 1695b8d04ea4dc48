"""Seeds of KwaaiNet's messages: as its own serialisers write them, bytes as integers, and as this node does."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgpack
import torch

from kwaainet_bridge.compression.kwaai import quantise_blocks
from kwaainet_bridge.wire import kwaai_tensor as tensors


def seeds() -> Iterator[tuple[str, bytes]]:
    ids = {
        "session_id": 12345,
        "seq_pos": 0,
        "payload_type": "token_ids",
        "shape": [4],
        "data": struct.pack("<4I", 1, 42, 999, 32000),
    }
    hidden = ids | {"payload_type": "hidden_states", "shape": [1, 2, 4], "data": bytes(range(200, 216))}
    answer = {
        "session_id": 12345,
        "response_type": "logits",
        "shape": [1, 1, 4],
        "data": bytes(range(124, 132)),
        "error": None,
    }
    failed = answer | {"shape": [], "data": b"", "error": "node warming up"}
    for pack in (msgpack.packb, _as_integers):
        for fields in (ids, hidden, hidden | {"later": [1, {"a": b"\xcc"}]}):
            yield "kwaai-inference-request", pack(fields)
        for fields in (answer, answer | {"response_type": "hidden_states", "shape": [1, 2, 2]}, failed):
            yield "kwaai-inference-response", pack(fields)
    outcomes: list[Any] = [
        {"Granted": {"lease_id": 1, "ttl_secs": 30}},
        {"DeniedAtCapacity": {"retry_after_secs": 5}},
        "DeniedWrongModel",
    ]
    for value in (*outcomes, {"model": None}, {"model": "llama3.1:8b"}):
        yield "kwaai-lease", msgpack.packb(value)
    yield "kwaai-hello", "grüß dich 💬".encode()
    for content in (bytes(range(100, 256)), b"\xcc" * 9, b"\xcc\xcc\x01" * 5, b""):
        items = b"".join(msgpack.packb(byte) for byte in content)
        yield "kwaai-octets", len(content).to_bytes(2, "big") + items
    http = {"request_id": 7, "method": "POST", "path": "/v1/models", "body": b'{"a": 1}\xcc', "lease_id": 1}
    messages: list[Any] = [
        {"Request": http},
        {"Request": http | {"lease_id": None}},
        {"Response": {"request_id": 7, "status": 200, "body": b"{}\xff"}},
        {"LeaseRequest": {"request_id": 1, "model": None}},
        *({"LeaseResponse": {"request_id": 1, "outcome": outcome}} for outcome in outcomes),
        {"LeaseRelease": {"lease_id": 3}},
        {"LeaseKeepalive": {"lease_id": 3}},
        {"Later": {"a": [1, 2]}},
        "Later",
    ]
    frames = [_framed(_as_integers(message)) for message in messages]
    for frame in frames:
        yield "kwaai-mux", frame
    yield "kwaai-mux", b"".join(frames)
    message = tensors.tensor_message("g", quantise_blocks(torch.tensor([0, 1, -2, 0.5])), metadata="m")
    both = [tensors.encode_frame(message), tensors.encode_frame(tensors.receipt(message))]
    for frame in (*both, b"".join(both)):
        yield "kwaai-tensor", frame


def _framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


def _as_integers(value: Any) -> bytes:
    packed: bytes = msgpack.packb(_lists(value))
    return packed


def _lists(value: Any) -> Any:
    if isinstance(value, bytes):
        return list(value)
    return {k: _lists(v) for k, v in value.items()} if isinstance(value, dict) else value
