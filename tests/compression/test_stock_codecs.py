"""The codecs against hivemind itself, on tensors that no recording holds."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.errors import CompressionError
from kwaainet_bridge.wire.tensors import decode_tensor, encode_tensor

pytestmark = pytest.mark.interop

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("KWAAINET_BRIDGE_PEERS", ROOT / ".venv-peers")) / "bin" / "python"
SHAPES = [[1], [2], [3, 5], [1, 1, 64], [2, 3, 700], [4097], [3, 100_007]]
DTYPES = [torch.float32, torch.float16, torch.float64, torch.bfloat16]


@pytest.fixture(autouse=True)
def one_thread():
    """Sums over large tensors are rounded by how many threads share them, and the stock side has one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ask_stock(requests: list[dict], folder: Path) -> list[str]:
    (folder / "requests").write_text(json.dumps(requests))
    script = Path(__file__).with_name("stock_codecs.py")
    subprocess.run(
        [PYTHON, "-W", "ignore", script, folder / "requests", folder / "answers"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "USE_LEGACY_BFLOAT16": "0"},
        check=True,
        timeout=120,
    )
    return json.loads((folder / "answers").read_text())


def bits(tensor: torch.Tensor) -> str:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().hex()


def tensors():
    generator = torch.Generator().manual_seed(20)
    for dtype in DTYPES:
        for shape in SHAPES:
            normal = torch.randn(shape, generator=generator)
            for values in (
                normal,
                normal**5,
                torch.full(shape, 2.7),
                (normal * 4).round() / 4,
                torch.zeros(shape),
            ):
                yield values.to(dtype)


def encodings():
    for tensor in tensors():
        for compression in CompressionType:
            try:
                yield tensor, compression, encode_tensor(tensor, compression)
            except CompressionError:
                assert tensor.dtype == torch.bfloat16


def test_stock_reads_what_we_write(tmp_path):
    ours = [message for _, _, message in encodings()]
    answers = ask_stock([{"message": b"".join(message.parts()).hex()} for message in ours], tmp_path)
    for message, answer in zip(ours, answers, strict=True):
        decoded = decode_tensor(message)
        assert answer == f"{decoded.dtype} {list(decoded.shape)} {bits(decoded)}"


def encoded_by_stock(tensor: torch.Tensor) -> bool:
    if tensor.dtype != torch.float32:
        return False
    return all(block.any() for block in tensor.reshape(-1).split(4096))


def test_we_write_what_stock_writes(tmp_path):
    """BLOCKWISE_8BIT of float32 without a block of zeros: all else makes the stock encoder fail."""
    ours = [e for e in encodings() if e[1] != CompressionType.BLOCKWISE_8BIT or encoded_by_stock(e[0])]
    assert {compression for _, compression, _ in ours} == set(CompressionType)
    requests = [
        {
            "values": bits(tensor),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "compression": int(compression),
        }
        for tensor, compression, _ in ours
    ]
    for (tensor, compression, message), answer in zip(ours, ask_stock(requests, tmp_path), strict=True):
        assert b"".join(message.parts()).hex() == answer, (tensor.shape, tensor.dtype, compression)
