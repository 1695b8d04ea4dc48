"""What is taken from py-libp2p, and when it is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from libp2p.crypto.keys import KeyType
from libp2p.crypto.serialization import key_type_to_public_key_deserializer
from libp2p.security.noise.io import BaseNoiseMsgReadWriter

from kwaainet_bridge.errors import ConfigError
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.net.library import check_library, noise_transport


def test_the_pinned_version_fits() -> None:
    check_library()


def test_what_moved_is_named(monkeypatch) -> None:
    monkeypatch.setattr(BaseNoiseMsgReadWriter, "__annotations__", {})
    with pytest.raises(ConfigError, match=r"no BaseNoiseMsgReadWriter\.noise_state: install the pinned"):
        check_library()


def test_the_memory_network_does_not_load_it() -> None:
    code = "import sys, kwaainet_bridge.net.memory, kwaainet_bridge.net; print('libp2p' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


def test_a_private_key_is_no_public_key() -> None:
    """py-libp2p's own reader takes it and tests its primes, which a stranger can make take seconds."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    noise_transport(Identity.generate("ed25519"))
    read = key_type_to_public_key_deserializer[KeyType.RSA.value]
    assert read(public).to_bytes() == public
    private = key.private_bytes(Encoding.DER, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    for data in (private, public + bytes(1200), b"", public[:-1]):
        with pytest.raises(ValueError):
            read(data)
