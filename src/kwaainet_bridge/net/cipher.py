"""What encrypts a connection after its noise handshake: ChaCha20-Poly1305 and a counter for each direction.

The noise library's own does the same in five calls per message, and only into new memory.
Source: Noise Protocol Framework, revision 34, sections 5.1 (CipherState) and 12.3.
"""

from __future__ import annotations

import struct
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

TAG_BYTES: Final = 16

_NONCE: Final = struct.Struct("<4xQ")


class MessageCipher:
    """One direction: ``key`` has 32 bytes, ``count`` messages have gone through already.

    The other end counts likewise, so each message goes through once, in the order in which they travel.
    """

    def __init__(self, key: bytes, count: int) -> None:
        self._cipher = ChaCha20Poly1305(key)
        self._count = count

    def seal(self, plaintext: bytes | memoryview, into: memoryview) -> None:
        """Encrypt a message into ``into``, which is TAG_BYTES longer."""
        self._cipher.encrypt_into(_NONCE.pack(self._count), plaintext, None, into)
        self._count += 1

    def open(self, ciphertext: memoryview) -> bytes:
        """Decrypt a message. Raises cryptography's InvalidTag, or ValueError if it is too short for one."""
        plaintext = self._cipher.decrypt(_NONCE.pack(self._count), ciphertext, None)
        self._count += 1
        return plaintext
