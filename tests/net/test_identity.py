"""Identity files."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kwaainet_bridge.errors import IdentityError
from kwaainet_bridge.net.identity import Identity, load_identity
from kwaainet_bridge.wire.pb import keys_pb2


@pytest.mark.parametrize(("kind", "prefix"), [("rsa", "Qm"), ("ed25519", "12D3KooW")])
def test_created_once_and_read_again(tmp_path: Path, kind, prefix: str) -> None:
    path = tmp_path / "folder" / "identity.key"
    with load_identity(path, kind=kind) as identity:
        assert str(identity.peer_id).startswith(prefix)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with load_identity(path) as again:
        assert again.peer_id == identity.peer_id


def test_rsa_file_is_laid_out_as_hivemind_writes_it(tmp_path: Path) -> None:
    with load_identity(tmp_path / "identity.key"):
        data = (tmp_path / "identity.key").read_bytes()
    assert data[:3] == b"\x08\x00\x12"  # the type is written although it is zero
    key = keys_pb2.PrivateKey.FromString(data)
    assert key.data[:2] == b"\x30\x82"
    assert key.data[4:7] == b"\x02\x01\x00"  # PKCS#1, not PKCS#8: the modulus follows at once
    assert key.data[7:9] == b"\x02\x82"


def test_known_ed25519_id() -> None:
    # RFC 8032, test 1; the id is an identity multihash of the protobuf public key
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    public = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    identity = Identity(keys_pb2.PrivateKey(type=keys_pb2.ED25519, data=seed + public).SerializeToString())
    assert identity.peer_id.raw == bytes.fromhex("002408011220") + public
    assert identity.public_key == bytes.fromhex("08011220") + public


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_readable_by_others(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.key"
    load_identity(path, kind="ed25519").release()
    path.chmod(mode)
    with pytest.raises(IdentityError, match=f"chmod 600 {path}"):
        load_identity(path)


def test_hivemind_mode_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    load_identity(path, kind="ed25519").release()
    path.chmod(0o400)
    load_identity(path).release()


def test_locked_while_held(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    with load_identity(path, kind="ed25519"):
        code = (
            "import sys; from kwaainet_bridge.net.identity import load_identity\n"
            "from kwaainet_bridge.errors import IdentityError\n"
            "try: load_identity(sys.argv[1])\n"
            "except IdentityError as e: print(e)"
        )
        result = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
        )
        assert f"{path} is in use" in result.stdout
        assert "another identity file" in result.stdout
    load_identity(path).release()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"-----BEGIN PRIVATE KEY-----\n",
        keys_pb2.PrivateKey(type=keys_pb2.RSA, data=b"\x30\x82").SerializeToString(),
        keys_pb2.PrivateKey(type=keys_pb2.ED25519, data=bytes(64)).SerializeToString(),
        keys_pb2.PrivateKey(type=keys_pb2.ED25519, data=bytes(10)).SerializeToString(),
        keys_pb2.PrivateKey(type=keys_pb2.SECP256K1, data=bytes(32)).SerializeToString(),
        bytes(20_000),
    ],
    ids=["empty", "pem", "rsa", "halves", "short", "secp256k1", "large"],
)
def test_unusable_key_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(IdentityError, match=str(path)):
        load_identity(path)
    path.unlink()
    load_identity(path, kind="ed25519").release()  # the lock was let go


def test_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="neither 'rsa' nor 'ed25519'"):
        load_identity(tmp_path / "identity.key", kind="dsa")
    assert [file.name for file in tmp_path.iterdir()] == ["identity.key.lock"]
