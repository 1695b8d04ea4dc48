"""Protected records: those whose key or subkey names an owner, who alone can store them.

An owner is named by ``[owner:ssh-rsa …]`` anywhere in the key or the packed subkey. Such a record's value ends in
``[signature:…]``, over the msgpack tuple of key, subkey, value without signature, and expiration.
Source: hivemind 1.1.12, ``dht/crypto.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from cryptography.hazmat.primitives.asymmetric import rsa

from kwaainet_bridge.hivemind.dht import rsa_keys
from kwaainet_bridge.hivemind.dht.validation import DhtRecord, RecordValidator
from kwaainet_bridge.wire.msgpack import pack

_OWNER: Final = re.compile(rb"\[owner:(.+?)\]")
_SIGNATURE: Final = re.compile(rb"\[signature:(.+?)\]")


def owner_marker(key: rsa.RSAPrivateKey) -> bytes:
    """What a subkey must contain for its records to be those of ``key`` alone."""
    return b"[owner:" + rsa_keys.public_bytes(key) + b"]"


def names_owner(text: bytes) -> bool:
    """Whether ``text``, as part of a subkey, makes a record protected."""
    return _OWNER.search(text) is not None


class RsaSignatureValidator(RecordValidator):
    """Accepts protected records only with their owner's signature, and all others as they are.

    With ``keys`` it signs the records that name one of them as owner. A node can have only one such validator, since it
    strips signatures: two are merged. Stock also strips what looks like a signature from values of records without
    owner; this one leaves them alone.
    """

    priority = 10  # as stock: before those that unpack the value

    def __init__(self, *keys: rsa.RSAPrivateKey) -> None:
        self.keys: Mapping[bytes, rsa.RSAPrivateKey] = {owner_marker(key): key for key in keys}

    def merged_with(self, other: RecordValidator) -> RecordValidator | None:
        if not isinstance(other, RsaSignatureValidator):
            return None
        return RsaSignatureValidator(*self.keys.values(), *other.keys.values())

    def validate(self, record: DhtRecord) -> bool:
        owners = _owners(record)
        if not owners:
            return True
        signatures = _SIGNATURE.findall(record.value)
        if len(owners) != 1 or len(signatures) != 1:
            return False
        signed = _signed_bytes(record, _SIGNATURE.sub(b"", record.value))
        return rsa_keys.verify(owners.pop(), signed, signatures[0])

    def sign_value(self, record: DhtRecord) -> bytes:
        for marker, key in self.keys.items():
            if marker in record.key or marker in record.subkey:
                signature = rsa_keys.sign(key, _signed_bytes(record, record.value))
                return record.value + b"[signature:" + signature + b"]"
        return record.value

    def strip_value(self, record: DhtRecord) -> bytes:
        return _SIGNATURE.sub(b"", record.value) if _owners(record) else record.value


def _owners(record: DhtRecord) -> set[bytes]:
    return {*_OWNER.findall(record.key), *_OWNER.findall(record.subkey)}


def _signed_bytes(record: DhtRecord, value: bytes) -> bytes:
    return pack((record.key, record.subkey, value, record.expiration))
