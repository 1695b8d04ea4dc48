"""The methods of a Petals server. The class name in them is wire protocol (Petals 2.2.0 and main)."""

from __future__ import annotations

from kwaainet_bridge.rpc import streaming, unary
from kwaainet_bridge.wire.expert import ExpertRequest, ExpertResponse
from kwaainet_bridge.wire.pb.dht_pb2 import PingRequest, PingResponse
from kwaainet_bridge.wire.pb.expert_pb2 import ExpertInfo, ExpertUID

_HANDLER = "TransformerConnectionHandler"

RPC_INFO = unary(f"{_HANDLER}.rpc_info", ExpertUID, ExpertInfo)
RPC_FORWARD = unary(f"{_HANDLER}.rpc_forward", ExpertRequest, ExpertResponse)
RPC_BACKWARD = unary(f"{_HANDLER}.rpc_backward", ExpertRequest, ExpertResponse)
RPC_PUSH = unary(f"{_HANDLER}.rpc_push", ExpertRequest, ExpertResponse)
RPC_FORWARD_STREAM = streaming(f"{_HANDLER}.rpc_forward_stream", ExpertRequest, ExpertResponse)
RPC_BACKWARD_STREAM = streaming(f"{_HANDLER}.rpc_backward_stream", ExpertRequest, ExpertResponse)
RPC_INFERENCE = streaming(f"{_HANDLER}.rpc_inference", ExpertRequest, ExpertResponse)

ALL = (
    RPC_INFO,
    RPC_FORWARD,
    RPC_BACKWARD,
    RPC_PUSH,
    RPC_FORWARD_STREAM,
    RPC_BACKWARD_STREAM,
    RPC_INFERENCE,
)
"""What a server of blocks mounts."""

RPC_CHECK = unary("ReachabilityProtocol.rpc_check", PingRequest, PingResponse)
"""``peer.node_id`` of the request holds the bytes of a *peer id*, unlike in the DHT's ping."""
