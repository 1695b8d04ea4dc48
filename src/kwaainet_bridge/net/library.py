"""What this package takes from py-libp2p, and the check that the installed version still has it.

py-libp2p contributes the noise handshake with its key and peer id types. Its host and swarm are not used:
with release 0.8.1 one malformed stream ends them, 250 inbound connections in total fill them, they offer
plaintext, try one address of a peer and then refuse that peer for a minute, and none of that can be
switched off. Nothing of it is patched either: the handshake is driven through its public interfaces, the
attributes of its session and of the noise library below it that those do not promise are named in the check,
and in its table of key readers the entry for RSA is ours.
"""

from __future__ import annotations

import inspect

import libp2p
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair, KeyType, PrivateKey
from libp2p.crypto.rsa import RSAPrivateKey, RSAPublicKey
from libp2p.crypto.serialization import key_type_to_public_key_deserializer
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.security.noise.io import BaseNoiseMsgReadWriter
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.security.secure_session import SecureSession
from noise.connection import NoiseConnection
from noise.state import CipherState

from kwaainet_bridge.errors import ConfigError
from kwaainet_bridge.net.cipher import MessageCipher
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.wire.pb import keys_pb2

_NOISE_PROTOCOL = b"Noise_XX_25519_ChaChaPoly_SHA256"
_MAX_RSA_KEY_BYTES = 1200  # one of 8192 bits takes 1062
_MAX_RSA_EXPONENT_BITS = 64


def check_library() -> None:
    """Raise ConfigError, naming what moved, if py-libp2p no longer lets a finished handshake be taken
    over."""
    missing = []
    if "conn" not in inspect.signature(SecureSession.__init__).parameters:
        missing.append("SecureSession.conn")
    if "noise_state" not in inspect.get_annotations(BaseNoiseMsgReadWriter):
        missing.append("BaseNoiseMsgReadWriter.noise_state")
    noise = NoiseConnection.from_name(_NOISE_PROTOCOL)
    if not hasattr(noise, "noise_protocol"):
        missing.append("NoiseConnection.noise_protocol")
    elif not all(
        hasattr(noise.noise_protocol, name) for name in ("cipher_state_encrypt", "cipher_state_decrypt")
    ):
        missing.append("NoiseProtocol.cipher_state_*")
    if not {"k", "n"} <= vars(CipherState(noise.noise_protocol)).keys():
        missing.append("CipherState.k and .n")
    if missing:
        raise ConfigError(
            f"libp2p {libp2p.__version__} has no {' and no '.join(missing)}: install the pinned version (0.8.1)"
        )


def session_ciphers(session: SecureSession) -> tuple[MessageCipher, MessageCipher]:
    """What encrypts and what decrypts the messages that follow a finished handshake; the session's own is over."""
    protocol = session.conn.noise_state.noise_protocol
    states = protocol.cipher_state_encrypt, protocol.cipher_state_decrypt
    outbound, inbound = (MessageCipher(state.k, state.n) for state in states)
    return outbound, inbound


def _read_rsa_public_key(data: bytes) -> RSAPublicKey:
    """Read a peer's RSA key. ValueError for anything but a SubjectPublicKeyInfo of ordinary size.

    py-libp2p's own reader takes private keys too, and tests the primes of one before any signature is
    checked: four kilobytes from a stranger stop it for seconds.
    """
    if len(data) > _MAX_RSA_KEY_BYTES:
        raise ValueError(f"an RSA public key of {len(data)} bytes is too long")
    key = load_der_public_key(data)
    if not isinstance(key, rsa.RSAPublicKey) or key.public_numbers().e.bit_length() > _MAX_RSA_EXPONENT_BITS:
        raise ValueError("not an ordinary RSA public key")
    return RSAPublicKey.from_bytes(data)


def noise_transport(identity: Identity) -> NoiseTransport:
    """Make the handshake of ``identity``, under a noise key of its own."""
    key_type_to_public_key_deserializer[KeyType.RSA.value] = _read_rsa_public_key
    message = keys_pb2.PrivateKey.FromString(identity.serialized)
    if message.type == keys_pb2.ED25519:
        private_key: PrivateKey = Ed25519PrivateKey.from_bytes(message.data[:32])  # it wants the seed alone
    else:
        private_key = RSAPrivateKey.from_bytes(message.data)
    key_pair = KeyPair(private_key, private_key.get_public_key())
    return NoiseTransport(key_pair, noise_privkey=create_x25519_key_pair().private_key)
