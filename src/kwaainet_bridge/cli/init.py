"""``kwaainet-bridge init``: a configuration that explains itself, and the key that goes with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kwaainet_bridge.errors import ConfigError

TEMPLATE = """\
# A node of kwaainet-bridge. Start it with: kwaainet-bridge run -c {name}
# All keys with their defaults: docs/configuration.md. Check changes with: kwaainet-bridge config check {name}

identity:
  path: identity.key        # who this node is; keep it, and never run two nodes with one key
  kind: {kind}

listen:                     # port 0 takes any free one; a fixed one can be forwarded by a router
  - /ip4/0.0.0.0/tcp/31330
# announce:                 # what others dial, when it differs from the above
#   - /ip4/203.0.113.7/tcp/31330

networks:
  petals:
    bootstrap: []           # empty: a new private swarm. Else addresses of its peers, or: [petals-public]
#   dht: client             # hold no records of others; auto: only if they cannot dial this node
# kwaainet:
#   bootstrap: [kwaainet-public]

model:
  name: austen              # in the package; else a folder or a hub repository of a Llama-family model
# blocks: "0:4"             # which blocks to serve; all when left out
# dtype: auto               # float32, bfloat16 or float16; auto is the checkpoint's own
# device: cpu               # or cuda
# cache_tokens: 16384       # room for the KV cache, in tokens
# public_name: my machine   # shown by swarm monitors

drain_seconds: 60           # how long running sessions may go on after a stop signal
"""


def write_node_files(folder: Path, kind: Any) -> Iterator[str]:
    """Write ``node.yaml`` and ``identity.key`` into ``folder``; yield what a person should read.

    Raises ConfigError for an unknown kind of key, for a folder that cannot be written, and for a configuration
    that exists already: it is never overwritten. An existing key is kept.
    """
    from kwaainet_bridge.net.identity import load_identity

    if kind not in ("rsa", "ed25519"):
        raise ConfigError(f"--key {kind}: choose rsa or ed25519")
    config = folder / "node.yaml"
    key = folder / "identity.key"
    try:
        if config.exists():
            raise ConfigError(f"{config} exists already: edit it, or remove it first")
        folder.mkdir(parents=True, exist_ok=True)
        with load_identity(key, kind=kind) as identity:
            peer_id = identity.peer_id
        config.write_text(TEMPLATE.format(name=config, kind=kind), encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{folder} cannot be written: {e.strerror}; choose another folder") from e
    yield f"peer id        {peer_id}"
    yield f"identity       {key}"
    yield f"configuration  {config}"
    yield f"Next: kwaainet-bridge run -c {config}"
