"""Every number of the node, with its unit and why it is what it is. YAML overrides those that it names."""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

# --- rpc ------------------------------------------------------------------------------------------------

MAX_UNARY_BYTES: Final = 4 * MIB
"""Longest body of a unary message. Stock daemons drop anything longer without an answer (4194304 exactly)."""

MAX_FRAME_BYTES: Final = 256 * MIB
"""Longest streamed message accepted. Stock peers cut tensors into 4 MiB parts and know no limit."""

STREAM_PART_BYTES: Final = 4 * MIB
"""Tensor bytes in one streamed message: what stock clients and servers use."""

READ_AHEAD_MESSAGES: Final = 5
"""Requests of one stream that wait for their handler; beyond that the peer's window closes (stock: 5)."""

FIRST_REQUEST_SECONDS: Final = 60.0
"""A peer that opens a stream and stays silent is dropped after this long."""

CLOSE_GRACE_SECONDS: Final = 5.0
"""How long a server that has nothing more to say waits for the caller's end-of-stream before it closes."""

# --- net ------------------------------------------------------------------------------------------------

# --- hivemind dht ---------------------------------------------------------------------------------------

# --- engine ---------------------------------------------------------------------------------------------

# --- experts --------------------------------------------------------------------------------------------

# --- node -----------------------------------------------------------------------------------------------
