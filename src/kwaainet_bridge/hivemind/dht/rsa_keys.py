"""RSA as Hivemind uses it: PSS over SHA-256 with the longest salt, signatures in base64, keys in OpenSSH's form.

Source: hivemind 1.1.12, ``utils/crypto.py``.
"""

from __future__ import annotations

import base64
from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from kwaainet_bridge import defaults

_EXPONENT: Final = 65537
_BITS: Final = 2048
_PADDING: Final = padding.PSS(mgf=padding.MGF1(SHA256()), salt_length=padding.PSS.MAX_LENGTH)


def generate_key() -> rsa.RSAPrivateKey:
    """A key like those that stock makes. Takes some 0.1 s."""
    return rsa.generate_private_key(_EXPONENT, _BITS)


def public_bytes(key: rsa.RSAPrivateKey) -> bytes:
    """The public key in one line: ``ssh-rsa AAAA…``."""
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def sign(key: rsa.RSAPrivateKey, data: bytes) -> bytes:
    """The signature in base64: 344 bytes for a key of 2048 bits. Takes about 1 ms."""
    return base64.b64encode(key.sign(data, _PADDING, SHA256()))


def verify(public_key: bytes, data: bytes, signature: bytes) -> bool:
    """Whether ``signature`` is that of ``data`` by the owner of an OpenSSH key. Never raises for bad input.

    Keys that would take long to check count as wrong: over ``defaults.DHT_MAX_RSA_BITS``, or with an exponent
    beyond the usual one.
    """
    key = _load(public_key)
    if key is None:
        return False
    try:
        key.verify(base64.b64decode(signature), data, _PADDING, SHA256())
    except (ValueError, InvalidSignature):
        return False
    return True


@lru_cache(maxsize=1024)
def _load(public_key: bytes) -> rsa.RSAPublicKey | None:
    if len(public_key) > defaults.DHT_MAX_RSA_BITS // 4:
        return None
    try:
        key = load_ssh_public_key(public_key)
    except (ValueError, UnsupportedAlgorithm):
        return None
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size > defaults.DHT_MAX_RSA_BITS:
        return None
    return key if key.public_numbers().e <= _EXPONENT else None
