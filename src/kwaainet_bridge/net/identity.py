"""A node's identity: a private key in a file, and the peer id that follows from it.

The file is what Hivemind calls ``identity_path``: a bare protobuf ``PrivateKey{type, data}``, where
``data`` is PKCS#1 DER for RSA and seed and public key (32 + 32 bytes) for Ed25519. Either program reads
what the other wrote, except that Hivemind itself parses only RSA once it has initial peers. Source:
hivemind 1.1.12, p2p_daemon.py and utils/crypto.py; libp2p peer-ids specification.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
)
from filelock import FileLock, Timeout
from google.protobuf.message import DecodeError

from kwaainet_bridge.errors import IdentityError
from kwaainet_bridge.wire.pb import keys_pb2
from kwaainet_bridge.wire.peer_id import PeerId

KeyKind = Literal["rsa", "ed25519"]

_RSA_BITS: Final = 2048
_RSA_BITS_ACCEPTED: Final = (2048, 8192)  # what Go peers accept
_MAX_FILE_BYTES: Final = 16 * 1024  # an 8192-bit RSA key takes 4.7 KiB
_INLINE_KEY_BYTES: Final = 42  # longer public keys are hashed into the id

_PrivateKey = rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


class Identity:
    """A private key and its peer id. From a file it holds that file's lock until :meth:`release`.

    ``serialized`` is the private key as the file has it, ``public_key`` the protobuf ``PublicKey`` that peers
    exchange. A context manager that releases at its end.
    """

    def __init__(self, serialized: bytes, *, path: Path | None = None, lock: FileLock | None = None) -> None:
        self.serialized = serialized
        self.path = path
        self.public_key = _public_key(_parse(serialized, path))
        self.peer_id = _peer_id(self.public_key)
        self._lock = lock

    @classmethod
    def generate(cls, kind: KeyKind = "rsa") -> Identity:
        """Make an identity that lives in memory only."""
        return cls(_generate(kind))

    def release(self) -> None:
        """Let another process use the file. May be repeated."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


def load_identity(path: str | os.PathLike[str], *, kind: KeyKind = "rsa") -> Identity:
    """Read the identity at ``path``, or create one of ``kind`` there (mode 0600), and lock it.

    An existing file keeps its kind. The lock is ``<path>.lock`` beside it, and lasts until ``release()``
    or the end of the process. Raises IdentityError, which names the file and the remedy, if the file is
    held by another process, can be read by group or others, or holds no usable key.
    """
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{file}.lock", mode=0o600)
        lock.acquire(timeout=0)
    except Timeout as e:
        raise IdentityError(
            f"identity {file} is in use by a running node; "
            "stop that node, or give this one another identity file"
        ) from e
    except OSError as e:
        raise IdentityError(
            f"identity {file} cannot be locked: {e}; choose a folder that can be written"
        ) from e
    try:
        return Identity(_read_or_create(file, kind), path=file, lock=lock)
    except BaseException:
        lock.release()
        raise


def _read_or_create(file: Path, kind: KeyKind) -> bytes:
    try:
        if not file.exists():
            _create(file, _generate(kind))
        return _read(file)
    except OSError as e:
        raise IdentityError(f"identity {file}: {e.strerror or e}") from e


def _create(file: Path, serialized: bytes) -> None:
    # Written beside and moved into place: a crash never leaves half a key under the final name.
    draft = file.with_name(f"{file.name}.{os.getpid()}.new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as f:
            f.write(serialized)
            f.flush()
            os.fsync(f.fileno())
        draft.rename(file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _read(file: Path) -> bytes:
    with file.open("rb") as f:
        mode = stat.S_IMODE(os.fstat(f.fileno()).st_mode)
        if mode & 0o077:
            raise IdentityError(
                f"identity {file} can be used by others (mode {mode:04o}); run: chmod 600 {file}"
            )
        return f.read(_MAX_FILE_BYTES + 1)


def _generate(kind: KeyKind) -> bytes:
    if kind == "rsa":
        key = rsa.generate_private_key(public_exponent=65537, key_size=_RSA_BITS)
        data = key.private_bytes(Encoding.DER, PrivateFormat.TraditionalOpenSSL, NoEncryption())
        return keys_pb2.PrivateKey(type=keys_pb2.RSA, data=data).SerializeToString()
    if kind == "ed25519":
        seed = ed25519.Ed25519PrivateKey.generate()
        data = seed.private_bytes_raw() + seed.public_key().public_bytes_raw()
        return keys_pb2.PrivateKey(type=keys_pb2.ED25519, data=data).SerializeToString()
    raise IdentityError(f"identity kind {kind!r} is neither 'rsa' nor 'ed25519'")


def _parse(serialized: bytes, path: Path | None) -> _PrivateKey:
    name = f"identity {path}" if path is not None else "identity"
    remedy = "restore it from a copy, or move it away to have a new one made"
    try:
        message = keys_pb2.PrivateKey.FromString(serialized)
    except DecodeError as e:
        raise IdentityError(f"{name} is not a libp2p private key; {remedy}") from e
    if message.type == keys_pb2.RSA:
        try:
            key = load_der_private_key(message.data, password=None)
        except (ValueError, TypeError) as e:
            raise IdentityError(f"{name} holds a damaged RSA key; {remedy}") from e
        low, high = _RSA_BITS_ACCEPTED
        if not isinstance(key, rsa.RSAPrivateKey) or not low <= key.key_size <= high:
            raise IdentityError(f"{name} holds no RSA key of {low} to {high} bits; {remedy}")
        return key
    if message.type == keys_pb2.ED25519:
        # Older files repeat the public key once more.
        if len(message.data) not in (64, 96):
            raise IdentityError(f"{name} holds a damaged Ed25519 key; {remedy}")
        ed25519_key = ed25519.Ed25519PrivateKey.from_private_bytes(message.data[:32])
        if ed25519_key.public_key().public_bytes_raw() != message.data[32:64]:
            raise IdentityError(f"{name} holds an Ed25519 key whose halves do not match; {remedy}")
        return ed25519_key
    kind = keys_pb2.KeyType.Name(message.type)
    raise IdentityError(f"{name} holds a key of kind {kind}; only RSA and ED25519 are supported")


def _public_key(key: _PrivateKey) -> bytes:
    if isinstance(key, rsa.RSAPrivateKey):
        data = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return keys_pb2.PublicKey(type=keys_pb2.RSA, data=data).SerializeToString()
    data = key.public_key().public_bytes_raw()
    return keys_pb2.PublicKey(type=keys_pb2.ED25519, data=data).SerializeToString()


def _peer_id(public_key: bytes) -> PeerId:
    if len(public_key) <= _INLINE_KEY_BYTES:
        return PeerId(bytes([0x00, len(public_key)]) + public_key)
    return PeerId(b"\x12\x20" + hashlib.sha256(public_key).digest())
