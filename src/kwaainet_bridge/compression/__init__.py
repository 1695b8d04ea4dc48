"""Tensor codecs: the six compressions of Hivemind, encoded and decoded without it.

:func:`codec` gives the one for a CompressionType. All of them are plain torch and numpy, bit for bit what
stock peers send, and refuse what those cannot read.
"""

from __future__ import annotations

from typing import Final

from kwaainet_bridge.compression.blockwise import Blockwise8
from kwaainet_bridge.compression.codebook import Quantile8, Uniform8
from kwaainet_bridge.compression.codec import Codec, CompressionType
from kwaainet_bridge.compression.half import Float16, MeanStd16
from kwaainet_bridge.compression.raw import Raw
from kwaainet_bridge.errors import CompressionError

__all__ = ["Codec", "CompressionType", "codec"]

_CODECS: Final[dict[int, Codec]] = {
    codec.compression: codec
    for codec in (Raw(), Float16(), MeanStd16(), Uniform8(), Quantile8(), Blockwise8())
}


def codec(compression: int) -> Codec:
    """The codec of a CompressionType or of a peer's number for it. Raises CompressionError if unknown."""
    found = _CODECS.get(compression)
    if found is None:
        raise CompressionError(f"there is no compression {compression}")
    return found
