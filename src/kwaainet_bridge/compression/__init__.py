"""Tensor codecs: the six compressions of Hivemind and two of KwaaiNet, encoded and decoded without either.

:func:`encode` and :func:`decode` are all that most callers need. :func:`codec` gives the one for a
CompressionType, for callers with a message format of their own. All of them are plain torch and numpy, bit for
bit what stock peers send, and refuse what those cannot read. ``compression.adaptive`` chooses among them by size,
role or name; ``compression.kwaai`` has KwaaiNet's forms, which no CompressionType names.
"""

from __future__ import annotations

from kwaainet_bridge.compression.codec import Codec, CompressionType
from kwaainet_bridge.compression.encoded import Encoded, codec, decode, encode

__all__ = ["Codec", "CompressionType", "Encoded", "codec", "decode", "encode"]
