"""Seed inputs of each target: recorded bytes of stock peers where there are any, else what we would send.

``write`` puts them under a folder, one folder for each target; nothing but regressions is kept in the repository.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from fuzz import kwaai_seeds, tensor2_targets
from fuzz.averaging_targets import OWN, PEER, SCHEMA
from fuzz.net_targets import PROPOSED
from fuzz.tensor_targets import codec_layout
from kwaainet_bridge.compression import CompressionType, Encoded
from kwaainet_bridge.compression.encoded import DTYPES
from kwaainet_bridge.hivemind.averaging.group import Group, leader_message
from kwaainet_bridge.hivemind.dht import messages
from kwaainet_bridge.hivemind.dht.id import DhtId
from kwaainet_bridge.hivemind.dht.messages import StoreItem
from kwaainet_bridge.hivemind.dht.values import dictionary
from kwaainet_bridge.hivemind.experts.records import ServerInfo, ServerState
from kwaainet_bridge.net.addresses import Address
from kwaainet_bridge.net.identify import encode_identify
from kwaainet_bridge.net.yamux_frames import DATA, FIN, GO_AWAY, SYN, WINDOW_UPDATE, encode_header
from kwaainet_bridge.wire import frames
from kwaainet_bridge.wire.averaging import AveragingData, DownloadData, MessageCode
from kwaainet_bridge.wire.circuit import (
    CircuitLimit,
    HopMessage,
    HopType,
    PunchType,
    StopMessage,
    StopType,
    encode_hop,
    encode_punch,
    encode_stop,
)
from kwaainet_bridge.wire.envelope import DelimitedDecoder
from kwaainet_bridge.wire.expert import ExpertRequest, ExpertResponse
from kwaainet_bridge.wire.msgpack import pack
from kwaainet_bridge.wire.pb import autonat_pb2, averaging_pb2, dht_pb2, kad_pb2
from kwaainet_bridge.wire.pb.expert_pb2 import ExpertInfo
from kwaainet_bridge.wire.peer_id import PeerId
from kwaainet_bridge.wire.tensors import TensorMessage, split_tensor
from kwaainet_bridge.wire.varint import encode_uvarint

_HERE: Final = Path(__file__).parent
_VECTORS: Final = _HERE.parent / "tests" / "vectors"
_MESSAGES: Final = _VECTORS / "petals-tiny-llama" / "messages"

_PEER: Final = PeerId(
    bytes.fromhex("002408011220036dc7dd792a98f2b0c74d8573dc4dc4c0e91a1592ff19844512841cd34b5c48")
)
_ADDRESSES: Final = (
    Address("ip4", "127.0.0.1", 4001),
    Address("ip6", "::1", 4001),
    Address("dns4", "a.example", 443),
)

Seed = tuple[str, bytes]
"""A target's name and an input."""


def seeds() -> Iterator[Seed]:
    """All seeds, regressions excluded."""
    golden = json.loads((_VECTORS / "hivemind.json").read_text())
    yield from _wire(golden)
    yield from _tensors(golden)
    yield from _petals()
    yield from _dht()
    yield from _net()
    yield from _averaging(golden)
    yield from kwaai_seeds.seeds()
    yield from tensor2_targets.seeds()


def regressions() -> Iterator[tuple[str, Path]]:
    """Inputs that once broke a target, kept in the repository."""
    for path in sorted((_HERE / "regressions").glob("*/*")):
        yield path.parent.name, path


def write(folder: Path, target: str) -> int:
    """Put the seeds and regressions of ``target`` into ``folder``; return how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {data for name, data in seeds() if name == target}
    inputs |= {path.read_bytes() for name, path in regressions() if name == target}
    for data in inputs:
        (folder / ("seed-" + hashlib.sha256(data).hexdigest()[:16])).write_bytes(data)
    return len(inputs)


def _delimited(*bodies: bytes) -> bytes:
    return b"".join(encode_uvarint(len(body)) + body for body in bodies)


def _wire(golden: dict[str, Any]) -> Iterator[Seed]:
    for n in (0, 127, 128, 300, (1 << 64) - 1):
        yield "varint", encode_uvarint(n)
    recorded = {k: bytes.fromhex(v) for k, v in golden["frames"].items() if isinstance(v, str)}
    stream = b"".join(recorded[k] for k in ("stream_message", "stream_error", "stream_end"))
    yield "frames-marker-first", stream
    yield "frames-length-first", stream
    for name, order in (("first", frames.LENGTH_FIRST), ("both", frames.MARKER_FIRST)):
        ours = order.encode_message(name.encode()) + order.encode_error("boom") + order.encode_end()
        yield "frames-length-first", ours
        yield "frames-marker-first", ours
    for name in ("unary_request", "unary_response", "unary_error"):
        (body,) = DelimitedDecoder(1 << 16).feed(recorded[name])
        yield "delimited", recorded[name]
        yield ("call" if name == "unary_request" else "answer"), body
    for vector in golden["msgpack"]:
        packed = bytes.fromhex(vector["hex"])
        for target in ("msgpack", "dht-subkey", "dht-dictionary", "metadata"):
            yield target, packed
    yield "peer-id", _PEER.raw
    yield "peer-id", str(_PEER).encode()


def _tensors(golden: dict[str, Any]) -> Iterator[Seed]:
    for vector in golden["compression"]:
        if "error" in vector:
            continue
        wire = bytes.fromhex(vector["pb_hex"])
        message = TensorMessage.read(wire)
        yield "tensor", wire
        dtype, kind = DTYPES[message.dtype], CompressionType(message.compression)
        yield "encoded", Encoded(kind, dtype, tuple(message.size), message.buffer).to_bytes()
        yield (
            "codec-" + vector["type"].lower().replace("_", "-"),
            codec_layout(message.dtype, message.size, bytes(message.buffer)),
        )
        yield "tensor-parts", _delimited(*(b"".join(p.parts()) for p in split_tensor(message, 256)))
        yield "tensor-parts", _delimited(wire, wire)
    # numbers of two bytes: see the targets
    yield "kwaai-blocks", bytes.fromhex("0040 0001 0002 0002 0003  003c 7f8101ff0040")
    yield "kwaai-blocks", bytes.fromhex("0002 0002 0001 0003  003c0038 7f8101")
    yield "kwaai-sparse", bytes.fromhex("0006 0001 0002 0002 0003  0500000000000000 0000803f")


def _petals() -> Iterator[Seed]:
    for path in sorted(_MESSAGES.glob("[0-9]*.bin")):
        data = path.read_bytes()
        method = path.name[4:].split(".")[0]
        if method == "rpc_info":
            if path.name.endswith("response.bin"):
                packed = ExpertInfo.FromString(data).serialized_info
                yield "rpc-info", packed
                yield "msgpack", packed
        elif path.name.endswith("request.bin"):
            yield "expert-request", data
            yield "metadata", ExpertRequest.read(data).metadata
        else:
            yield "expert-response", data
            tensors = ExpertResponse.read(data).tensors
            yield "tensor-parts", _delimited(*(b"".join(t.parts()) for t in tensors))
    info = ServerInfo(
        state=ServerState.ONLINE,
        throughput=10.5,
        start_block=0,
        end_block=4,
        public_name="a",
        version="2.3.0",
        network_rps=1.0,
        adapters=("x",),
        torch_dtype="bfloat16",
        using_relay=False,
        cache_tokens_left=5,
        next_pings={_PEER: 0.5},
    )
    yield "server-record", pack(info.to_value())
    yield "server-record", pack((2, 1.0))
    yield "model-record", pack({"num_blocks": 8, "repository": "https://huggingface.co/a/b"})
    yield "model-record", pack({"num_blocks": 1, "repository": None})


def _dht() -> Iterator[Seed]:
    node = dht_pb2.NodeInfo(node_id=bytes(range(20)))
    yield "dht-ping", bytes.fromhex("12160a1401010101010101010101010101010101010101011801")
    yield "dht-ping", bytes.fromhex("12160a14" + "aa" * 20 + "2100002040fc54d9412801")
    record = dictionary(
        [("sub", pack("v1"), 1500.5), (b"peer", pack(True), 2000.25), (("t", 1), pack(3), 9.0)]
    )
    keys = [DhtId(n) for n in (0, 1, 1 << 159)]
    items = [
        StoreItem.of(keys[0], "sub", pack("v"), 1500.0),
        StoreItem.of(keys[1], None, pack([1, 2]), 1500.0),
        StoreItem.of_record(keys[2], record),
    ]
    yield "dht-store", messages.store_request(items, node).SerializeToString()
    yield "dht-find", messages.find_request(keys, node).SerializeToString()
    yield "dht-dictionary", pack(record)
    found = messages.find_result(record, [])
    found.nearest_node_ids.append(bytes(20))
    found.nearest_peer_ids.append(_PEER.raw)
    plain = messages.find_result(messages.read_record(items[1]), [])
    nothing = messages.find_result(None, [])
    response = dht_pb2.FindResponse(peer=node, results=[found, plain, nothing])
    yield "dht-find-response", response.SerializeToString()


def _net() -> Iterator[Seed]:
    yield (
        "yamux",
        encode_header(WINDOW_UPDATE, SYN, 1, 0)
        + encode_header(DATA, FIN, 1, 5)
        + b"hello"
        + encode_header(GO_AWAY, 0, 0, 1),
    )
    header = _delimited(b"/multistream/1.0.0\n")
    for target in ("multistream-propose", "multistream-answer"):
        for text in (PROPOSED, "na", "ls"):
            yield target, header + _delimited(text.encode() + b"\n") + b"rest"
        yield target, header + _delimited(b"other\n", PROPOSED.encode() + b"\n")
    described = encode_identify(b"key", _ADDRESSES, [PROPOSED, "/ipfs/id/1.0.0"], _ADDRESSES[0].binary)
    (body,) = DelimitedDecoder(1 << 16).feed(described)
    yield "identify", body
    for found in _ADDRESSES:
        yield "address", found.binary
        yield "address", f"{found}/p2p/{_PEER}".encode()
    yield "address", b"/ip4/127.0.0.1/udp/4001/quic-v1"
    for kind in range(6):
        message = kad_pb2.Message(type=kind, key=_PEER.raw)
        message.closer_peers.add(id=_PEER.raw, addrs=[a.binary for a in _ADDRESSES], connection=1)
        yield "kademlia", message.SerializeToString()
    named = autonat_pb2.PeerInfo(id=_PEER.raw, addrs=[a.binary for a in _ADDRESSES])
    yield "autonat", autonat_pb2.Message(type=0, dial=autonat_pb2.Dial(peer=named)).SerializeToString()
    for answer in (
        autonat_pb2.DialResponse(status=0, addr=_ADDRESSES[0].binary),
        autonat_pb2.DialResponse(status=100, status_text="dial failed"),
    ):
        yield "autonat", autonat_pb2.Message(type=1, dial_response=answer).SerializeToString()
    limit = CircuitLimit(120, 1 << 17)
    for circuit in (
        encode_hop(HopMessage(HopType.RESERVE)),
        encode_hop(HopMessage(HopType.CONNECT, peer=_PEER)),
        encode_hop(
            HopMessage(2, status=100, expires=1 << 31, addresses=(_ADDRESSES[0].binary,), limit=limit)
        ),
        encode_stop(StopMessage(StopType.CONNECT, peer=_PEER, limit=limit)),
        encode_punch(PunchType.CONNECT, [a.binary for a in _ADDRESSES]),
        encode_punch(PunchType.SYNC),
    ):
        yield "circuit", circuit[1:]


def _averaging(golden: dict[str, Any]) -> Iterator[Seed]:
    about = bytes.fromhex(golden["averaging"]["data_for_gather"])
    yield "averaging-about", about
    for key in ("run.0b0", "run.0b1"):
        request = averaging_pb2.JoinRequest(
            schema_hash=SCHEMA, expiration=1010.0, gather=about, client_mode=True, group_key=key
        )
        yield "averaging-join", request.SerializeToString()
    begin = Group(bytes(20), (PEER, OWN), (about, about)).message()
    disbanded = leader_message(MessageCode.GROUP_DISBANDED, suggested=_PEER)
    for message in (begin, disbanded, leader_message(MessageCode.ACCEPTED)):
        yield "averaging-leader", message.SerializeToString()
        yield "averaging-group", message.SerializeToString()
    tensor = TensorMessage(values=[bytes(8)], size=[2], dtype="float32")
    part = AveragingData(code=4, group_id=bytes(20), tensor_part=tensor, weight=2.0)
    yield "averaging-data", b"".join(part.parts())
    yield "averaging-data", b"".join(AveragingData(code=MessageCode.BAD_GROUP_ID).parts())
    state = DownloadData(metadata=pack({"group_key": "0"}), tensor_part=tensor)
    yield "averaging-download", b"".join(state.parts())
