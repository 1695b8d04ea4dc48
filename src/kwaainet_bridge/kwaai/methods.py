"""KwaaiNet's unary protocols, declared once for mounting and for calling."""

from __future__ import annotations

from typing import Final

from kwaainet_bridge import defaults
from kwaainet_bridge.rpc import unary
from kwaainet_bridge.wire import kwaai_hello, kwaai_inference, kwaai_lease
from kwaainet_bridge.wire.kwaai_hello import Hello
from kwaainet_bridge.wire.kwaai_inference import InferenceRequest, InferenceResponse
from kwaainet_bridge.wire.kwaai_lease import LeaseReply, LeaseRequest

INFERENCE = unary(kwaai_inference.PROTOCOL, InferenceRequest, InferenceResponse)
HELLO = unary(kwaai_hello.PROTOCOL, Hello, Hello)
LEASE = unary(kwaai_lease.PROTOCOL, LeaseRequest, LeaseReply)

_VALUE_BYTES: Final = 2
_FIELDS_BYTES: Final = 1024
"""Of a message for everything but its values: envelope, keys and numbers have about 200."""


def most_tokens(hidden_size: int) -> int:
    """Tokens whose hidden states fit into one message of ``defaults.MAX_UNARY_BYTES``, one at least.

    512 of width 4096: longer prompts go in several requests. Peers that send bytes as integers fit two thirds.
    """
    return max(1, (defaults.MAX_UNARY_BYTES - _FIELDS_BYTES) // (_VALUE_BYTES * hidden_size))
