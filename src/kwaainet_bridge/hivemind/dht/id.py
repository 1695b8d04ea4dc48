"""Ids of DHT nodes and keys: points of one 160-bit space, near or far by exclusive or."""

from __future__ import annotations

import hashlib
import random
from typing import Any, Self

from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.msgpack import pack

ID_BYTES = 20
ID_BITS = 8 * ID_BYTES


class DhtId(int):
    """A number in [0, 2^160), written as 20 bytes big-endian.

    It is an int because tables and searches compare, hash and sort ids all the time. Node ids are random and say
    nothing about the peer id. Source: hivemind 1.1.12, ``dht/routing.py``.
    """

    __slots__ = ()

    def __new__(cls, number: int) -> Self:
        if not 0 <= number < 1 << ID_BITS:
            raise ValueError(f"a DHT id has {ID_BITS} bits, not {number.bit_length()}")
        return super().__new__(cls, number)

    @classmethod
    def of(cls, key: Any) -> DhtId:
        """Where ``key`` lies: the SHA-1 of bytes as they are, of anything else packed with msgpack.

        Raises what ``pack`` raises for a value that msgpack cannot carry.
        """
        source = key if isinstance(key, bytes) else pack(key)
        return cls(int.from_bytes(hashlib.sha1(source, usedforsecurity=False).digest(), "big"))

    @classmethod
    def random(cls, rng: random.Random) -> DhtId:
        return cls(rng.getrandbits(ID_BITS))

    @classmethod
    def from_bytes(cls, raw: bytes, *, field: str) -> DhtId:  # type: ignore[override]
        """Read an id from a peer's message. Fewer than 20 bytes are a smaller number, as for stock peers.

        More raise RemoteError, which names ``field``.
        """
        if len(raw) > ID_BYTES:
            raise RemoteError(f"{field}: a DHT id has {ID_BYTES} bytes, not {len(raw)}")
        return cls(int.from_bytes(raw, "big"))

    def to_bytes(self) -> bytes:  # type: ignore[override]
        return super().to_bytes(ID_BYTES, "big")

    def distance(self, other: DhtId) -> int:
        return self ^ other

    def __str__(self) -> str:
        return self.to_bytes().hex()

    def __repr__(self) -> str:
        return f"<DhtId {self}>"
