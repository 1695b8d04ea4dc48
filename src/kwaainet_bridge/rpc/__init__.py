"""Services and stubs over streams: unary and streaming calls, deadlines, cancellation, limits."""

from kwaainet_bridge.rpc.client import ClientStream, RpcClient
from kwaainet_bridge.rpc.method import StreamMethod, UnaryMethod, streaming, unary
from kwaainet_bridge.rpc.server import CallContext, RpcServer, ServerStream

__all__ = [
    "CallContext",
    "ClientStream",
    "RpcClient",
    "RpcServer",
    "ServerStream",
    "StreamMethod",
    "UnaryMethod",
    "streaming",
    "unary",
]
