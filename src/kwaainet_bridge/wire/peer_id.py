"""Peer ids: the multihash of a public key, shown in base58."""

from __future__ import annotations

from dataclasses import dataclass

import base58

from kwaainet_bridge.errors import RemoteError

_MAX_BYTES = 64  # the longest multihash in use is 38 bytes (an inlined Ed25519 key); SHA-512 would be 66


@dataclass(frozen=True, slots=True, order=True)
class PeerId:
    """The multihash bytes of a libp2p peer id.

    Equality and order are those of the bytes. RSA ids are ``12 20`` and a SHA-256 digest (34 bytes, ``Qm…``),
    Ed25519 ids an identity multihash of the public key (38 bytes, ``12D3KooW…``).
    Source: libp2p peer-ids specification; seen on hivemind 1.1.12.
    """

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) < 2 or len(self.raw) > _MAX_BYTES or self.raw[1] != len(self.raw) - 2:
            raise RemoteError(
                f"peer id of {len(self.raw)} bytes is not a multihash: {self.raw[:_MAX_BYTES].hex()}"
            )

    @classmethod
    def parse(cls, text: str) -> PeerId:
        """Read the base58 form. Raises RemoteError on anything that is not a multihash in base58."""
        if len(text) > 2 * _MAX_BYTES:
            raise RemoteError(f"peer id of {len(text)} characters is too long")
        try:
            raw = base58.b58decode(text)
        except ValueError as e:
            raise RemoteError(f"peer id {text!r} is not base58") from e
        return cls(raw)

    def __str__(self) -> str:
        return str(base58.b58encode(self.raw), "ascii")

    def __repr__(self) -> str:
        return f"<PeerId {self}>"

    @property
    def short(self) -> str:
        """The last six characters, as the field's logs name peers."""
        return f"…{str(self)[-6:]}"
