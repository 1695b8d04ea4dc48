"""Runs in the environment of the stock peers: what the Hivemind there writes for the inputs of the golden vectors.

``stock_wire.py GOLDEN FOLDER`` writes into FOLDER ``hivemind.json``: the vectors of GOLDEN that can be made anew,
``hivemind-messages.json``: the number and type of every protobuf field, and ``versions.json``. What this Hivemind
refuses to make is an ``error`` in its place.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import json
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from stock_frames import frames


def or_error(make: Callable[..., Any], *arguments: Any) -> Any:
    """What ``make`` returns, or what it raises: a release that fails differs, and the comparison goes on."""
    try:
        return make(*arguments)
    except Exception as e:
        return {"error": f"{type(e).__name__}: {e}"}


def plain_bytes(tensor: torch.Tensor) -> str:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().hex()


# -- tensors --


def tensor_of(vector: dict[str, Any]) -> torch.Tensor:
    data = bytearray.fromhex(vector["input_hex"])
    dtype = getattr(torch, vector["dtype"].removeprefix("torch."))
    values = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return values.reshape(vector["shape"]).requires_grad_(vector["requires_grad"])


def compressed(vector: dict[str, Any], tensor: torch.Tensor) -> dict[str, Any]:
    from hivemind.compression import base, deserialize_torch_tensor, serialize_torch_tensor
    from hivemind.proto import runtime_pb2

    made = {"name": vector["name"], "type": vector["type"]}
    base.USE_LEGACY_BFLOAT16 = vector["name"] != "bf16_nonlegacy"
    try:
        message = serialize_torch_tensor(tensor, runtime_pb2.CompressionType.Value(vector["type"]))
        restored = deserialize_torch_tensor(message)
    except Exception as e:
        return made | {"error": f"{type(e).__name__}: {e}"}
    return made | {
        "pb_hex": message.SerializeToString().hex(),
        "output_dtype": str(restored.dtype),
        "output_requires_grad": restored.requires_grad,
        "output_hex": plain_bytes(restored),
    }


def compressions(vectors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A vector that records a refusal has its input in another one of the same name."""
    inputs = {v["name"]: tensor_of(v) for v in vectors if "input_hex" in v}
    return [compressed(v, tensor_of(v) if "input_hex" in v else inputs[v["name"]]) for v in vectors]


def split_sizes() -> list[dict[str, Any]]:
    from hivemind.compression import serialize_torch_tensor
    from hivemind.utils.streaming import split_for_streaming

    return [
        {
            "chunks": part.chunks,
            "dtype": part.dtype,
            "size": list(part.size),
            "buflen": len(part.buffer),
            "compression": part.compression,
        }
        for part in split_for_streaming(serialize_torch_tensor(torch.zeros(40000)), 65536)
    ]


# -- values and ids --


def named_values() -> dict[str, Any]:
    """The values that the vectors name by their Python text."""
    from hivemind.dht.storage import DictionaryDHTValue
    from hivemind.utils import MSGPackSerializer
    from hivemind.utils.tensor_descr import BatchTensorDescriptor

    record = DictionaryDHTValue()
    record.frozen = True  # what expired long ago is kept
    record.store("sub", MSGPackSerializer.dumps("v1"), 1000.5)
    record.store(b"peer", MSGPackSerializer.dumps(True), 2000.25)
    plain = [b"key1", 42, ["a", 1], "ffn.", None, True, (), -1]
    return {repr(value): value for value in plain} | {
        "DictionaryDHTValue{sub:(dumps('v1'),1000.5), b'peer':(dumps(True),2000.25)}": record,
        "BatchTensorDescriptor.from_tensor(zeros(3,4))": BatchTensorDescriptor.from_tensor(torch.zeros(3, 4)),
    }


def packed(vectors: list[dict[str, str]]) -> list[dict[str, str]]:
    from hivemind.utils import MSGPackSerializer

    values = named_values()
    return [{"py": v["py"], "hex": MSGPackSerializer.dumps(values[v["py"]]).hex()} for v in vectors]


def dht_ids(vectors: list[dict[str, str]]) -> list[dict[str, str]]:
    """All but that of None, which stands for a random id."""
    from hivemind.dht.routing import DHTID

    values = {name: value for name, value in named_values().items() if value is not None}
    names = [v["py"] for v in vectors if v["py"] in values]
    return [{"py": name, "hex": DHTID.generate(values[name]).to_bytes().hex()} for name in names]


def averaging(vectors: dict[str, Any]) -> dict[str, Any]:
    """The parts that depend on Hivemind's code alone, and not on a running group."""
    from hivemind import compression
    from hivemind.averaging.averager import compute_schema_hash
    from hivemind.averaging.partition import TensorPartContainer
    from hivemind.utils import MSGPackSerializer

    def partition(vector: dict[str, Any]) -> dict[str, Any]:
        container = TensorPartContainer(
            [torch.zeros(shape) for shape in vector["shapes"]],
            vector["fractions"],
            compression=getattr(compression, vector["compression"])(),
            part_size_bytes=vector["part_size_bytes"],
        )
        parts = [[part.numel() for part, _ in peer] for peer in container._input_parts_by_peer]  # noqa: SLF001 - no other access
        return vector | {"parts_by_peer": parts}

    schemas = [
        [torch.zeros(10), torch.zeros(3, 2, dtype=torch.float16)],
        [torch.nn.Parameter(torch.zeros(2))],
    ]
    return {
        "schema_hash": [
            {"tensors": vector["tensors"], "hex": compute_schema_hash(tensors).hex()}
            for vector, tensors in zip(vectors["schema_hash"], schemas, strict=True)
        ],
        "data_for_gather": MSGPackSerializer.dumps([None, 0, MSGPackSerializer.dumps({"who": 1})]).hex(),
        "partition": [or_error(partition, vector) for vector in vectors["partition"]],
    }


# -- protobuf messages --


def fields(prefix: str, messages: Any) -> Iterator[tuple[str, dict[str, str]]]:
    for message in messages:
        name = f"{prefix}.{message.name}"
        yield name, {str(f.number): describe(f) for f in sorted(message.field, key=lambda f: f.number)}
        yield from enums(name, message.enum_type)
        yield from fields(name, message.nested_type)


def describe(field: Any) -> str:
    label = {1: "optional", 2: "required", 3: "repeated"}[field.label]
    kind = field.type_name or type(field).Type.Name(field.type).removeprefix("TYPE_").lower()
    unpacked = field.options.HasField("packed") and not field.options.packed
    return f"{label} {kind} {field.name}" + (" unpacked" if unpacked else "")


def enums(prefix: str, kinds: Any) -> Iterator[tuple[str, dict[str, str]]]:
    for kind in kinds:
        yield f"{prefix}.{kind.name}", {str(value.number): value.name for value in kind.value}


def messages() -> dict[str, dict[str, str]]:
    """Field number -> description, for each message and enum of ``hivemind.proto``."""
    import hivemind.proto
    from google.protobuf.descriptor_pb2 import FileDescriptorProto

    found: dict[str, dict[str, str]] = {}
    for module in pkgutil.iter_modules(hivemind.proto.__path__):
        if module.name.endswith("_pb2"):
            file = FileDescriptorProto()
            importlib.import_module(f"hivemind.proto.{module.name}").DESCRIPTOR.CopyToProto(file)
            prefix = module.name.removesuffix("_pb2")
            found |= dict(fields(prefix, file.message_type)) | dict(enums(prefix, file.enum_type))
    return found


def vectors(golden: dict[str, Any]) -> dict[str, Any]:
    made_frames = or_error(lambda: asyncio.run(frames(golden["frames"])))
    return {
        "compression": or_error(compressions, golden["compression"]),
        "msgpack": or_error(packed, golden["msgpack"]),
        "dhtid": or_error(dht_ids, golden["dhtid"]),
        "frames": made_frames | {"split_for_streaming_160000_bytes": or_error(split_sizes)},
        "averaging": or_error(averaging, golden["averaging"]),
    }


def versions() -> dict[str, str]:
    return {
        name: importlib.metadata.version(name)
        for name in ("hivemind", "petals", "torch", "numpy", "bitsandbytes")
    }


if __name__ == "__main__":
    source, folder = (Path(argument) for argument in sys.argv[1:])
    results = {
        "hivemind.json": vectors(json.loads(source.read_text())),
        "hivemind-messages.json": or_error(messages),
        "versions.json": versions(),
    }
    for name, result in results.items():
        (folder / name).write_text(json.dumps(result, indent=1) + "\n")
