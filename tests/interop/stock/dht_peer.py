"""Stock Hivemind DHT nodes in one process, each with a daemon of its own; driven over stdin and stdout (lines.py).

Commands::

    start {initial_peers, client_mode, authority,          -> {node, peer, addresses}; ``authority``, a private key in
           node_id, schema, options}                          hex, makes it a member of that authority's swarm;
                                                              ``node_id`` in hex; ``schema`` has it check SCHEMA;
                                                              ``options`` are those of DHTNode.create
    dht   {initial_peers, signing}                         -> the same, for a ``hivemind.DHT`` in its own process;
                                                              ``signing`` gives it a validator; ``owner`` is the marker of its key
    kill  {node}                                           -> null; its daemon ends without a word to anybody
    freeze {node}, thaw {node}                             -> null; its daemon stops to run, and goes on
    store {node, items: [{key, subkey, value, ttl}]}       -> list of bool; ``expiration`` instead of ``ttl`` is absolute
    store_many {node, items}                               -> the same in one call for all items
    get   {node, keys, latest}                             -> {key: null | {value, expiration} | {subkeys: {...}}}
    holds {node, key}                                      -> {"storage", "cache"}: expiration there, or null
    banned {node}                                          -> peer ids that it leaves alone
    waiting {node, key}                                    -> how many gets wait for that key
    known {node}                                           -> peer ids in its routing table
    offer {offers: [[key, subkey, value, ttl]]}       -> list of bool, from a storage of its own without a node
    shutdown {}                                            -> null, once all nodes have ended

Event: ``ready``.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from typing import Any

import hivemind
from cryptography.hazmat.primitives.serialization import load_der_private_key
from hivemind.dht import DHTNode
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.routing import DHTID
from hivemind.dht.schema import SchemaValidator
from hivemind.dht.storage import DHTLocalStorage
from hivemind.proto.auth_pb2 import AccessToken
from hivemind.utils import ValueWithExpiration, get_dht_time
from hivemind.utils.auth import TokenAuthorizerBase
from hivemind.utils.crypto import RSAPrivateKey
from lines import Lines
from pydantic.v1 import BaseModel, StrictInt, StrictStr

lines = Lines()
LOOPBACK = {"host_maddrs": ["/ip4/127.0.0.1/tcp/0"], "nat_port_map": False, "auto_nat": False}


def readable(found: Any) -> Any:
    """What a get returned, as JSON."""
    if found is None:
        return None
    value, expiration = found.value, found.expiration_time
    if isinstance(value, dict) and all(isinstance(entry, ValueWithExpiration) for entry in value.values()):
        subkeys = {key: {"value": e.value, "expiration": e.expiration_time} for key, e in value.items()}
        return {"subkeys": subkeys, "expiration": expiration}
    return {"value": value, "expiration": expiration}


class Members(TokenAuthorizerBase):
    """Tokens that an authority has signed. Each peer is the authority itself here, and makes its own."""

    def __init__(self, authority: bytes) -> None:
        super().__init__(RSAPrivateKey())
        self._authority = RSAPrivateKey()
        self._authority._private_key = load_der_private_key(authority, password=None)

    async def get_token(self) -> AccessToken:
        token = AccessToken(
            username="stock",
            public_key=self.local_public_key.to_bytes(),
            expiration_time=str(time.time() + 60),
        )
        token.signature = self._authority.sign(self._signed(token))
        return token

    def is_token_valid(self, access_token: AccessToken) -> bool:
        public = self._authority.get_public_key()
        return (
            public.verify(self._signed(access_token), access_token.signature)
            and float(access_token.expiration_time) > time.time()
        )

    def does_token_need_refreshing(self, access_token: AccessToken) -> bool:
        return float(access_token.expiration_time) < time.time() + 5

    @staticmethod
    def _signed(token: AccessToken) -> bytes:
        return f"{token.username} {token.public_key} {token.expiration_time}".encode()


class Schema(BaseModel):
    """SCHEMA: what the keys ``run_title`` and ``run_steps`` may hold."""

    title: StrictStr
    steps: dict[StrictStr, StrictInt]


def expiration_of(item: dict[str, Any]) -> float:
    return item["expiration"] if "expiration" in item else get_dht_time() + item["ttl"]


class Commands:
    def __init__(self) -> None:
        self._nodes: list[Any] = []

    def _added(self, node: Any, peer: Any, maddrs: list[Any]) -> dict[str, Any]:
        self._nodes.append(node)
        return {
            "node": len(self._nodes) - 1,
            "peer": peer.to_base58(),
            "addresses": [str(maddr) for maddr in maddrs],
        }

    async def start(
        self,
        initial_peers: list[str],
        *,
        client_mode: bool = False,
        authority: str | None = None,
        node_id: str | None = None,
        schema: bool = False,
        options: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        node = await DHTNode.create(
            initial_peers=initial_peers,
            client_mode=client_mode,
            authorizer=None if authority is None else Members(bytes.fromhex(authority)),
            node_id=None if node_id is None else DHTID(int(node_id, 16)),
            record_validator=SchemaValidator(Schema, prefix="run") if schema else None,
            **(options or {}),
            **LOOPBACK,
        )
        return self._added(node, node.peer_id, await node.get_visible_maddrs())

    async def dht(self, initial_peers: list[str], *, signing: bool = False) -> dict[str, Any]:
        validator = RSASignatureValidator()
        dht = await asyncio.to_thread(
            hivemind.DHT,
            initial_peers=initial_peers,
            start=True,
            await_ready=True,
            record_validators=[validator] if signing else [],
            **LOOPBACK,
        )
        added = self._added(dht, dht.peer_id, dht.get_visible_maddrs())
        return added | {"owner": validator.local_public_key.decode()}

    async def kill(self, node: int) -> None:
        self._nodes[node].p2p._child.kill()
        self._nodes[node] = None

    async def freeze(self, node: int) -> None:
        self._nodes[node].p2p._child.send_signal(signal.SIGSTOP)

    async def thaw(self, node: int) -> None:
        self._nodes[node].p2p._child.send_signal(signal.SIGCONT)

    async def store_many(self, node: int, items: list[dict[str, Any]]) -> list[bool]:
        stored = await self._nodes[node].store_many(
            [item["key"] for item in items],
            [item["value"] for item in items],
            [expiration_of(item) for item in items],
            subkeys=[item.get("subkey") for item in items],
        )
        return [bool(ok) for ok in stored.values()]

    async def store(self, node: int, items: list[dict[str, Any]]) -> list[bool]:
        stored = []
        for item in items:
            expiration = expiration_of(item)
            target, subkey = self._nodes[node], item.get("subkey")
            if isinstance(target, hivemind.DHT):
                ok = await asyncio.to_thread(
                    target.store, item["key"], item["value"], expiration, subkey=subkey
                )
            else:
                ok = await target.store(item["key"], item["value"], expiration, subkey=subkey)
            stored.append(bool(ok))
        return stored

    async def get(self, node: int, keys: list[str], *, latest: bool = True) -> dict[str, Any]:
        target = self._nodes[node]
        if isinstance(target, hivemind.DHT):
            return {key: readable(await asyncio.to_thread(target.get, key, latest=latest)) for key in keys}
        expiration = float("inf") if latest else None
        found = await target.get_many(keys, sufficient_expiration_time=expiration)
        return {key: readable(value) for key, value in found.items()}

    async def holds(self, node: int, key: str) -> dict[str, float | None]:
        protocol, key_id = self._nodes[node].protocol, DHTID.generate(key)
        found = {"storage": protocol.storage.get(key_id), "cache": protocol.cache.get(key_id)}
        return {where: None if item is None else item.expiration_time for where, item in found.items()}

    async def banned(self, node: int) -> list[str]:
        return [peer.to_base58() for peer, _ in self._nodes[node].blacklist.banned_peers.items()]

    async def waiting(self, node: int, key: str) -> int:
        return len(self._nodes[node].pending_get_requests[DHTID.generate(key)])

    async def offer(self, offers: list[list[Any]]) -> list[bool]:
        storage, now = DHTLocalStorage(), get_dht_time()
        return [
            storage.store(DHTID(key), value.encode(), now + ttl, subkey=subkey)
            for key, subkey, value, ttl in offers
        ]

    async def known(self, node: int) -> list[str]:
        return [peer.to_base58() for peer in self._nodes[node].protocol.routing_table.peer_id_to_uid]

    async def shutdown(self) -> None:
        nodes, self._nodes = self._nodes, []
        for node in filter(None, nodes):
            if isinstance(node, hivemind.DHT):
                await asyncio.to_thread(node.shutdown)
            else:
                await node.shutdown()


async def main() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    commands = Commands()
    running: set[asyncio.Task[None]] = set()

    async def run(request: dict[str, Any]) -> None:
        arguments = {k: v for k, v in request.items() if k not in ("id", "do")}
        try:
            lines.result(request, await getattr(commands, request["do"])(**arguments))
        except Exception as e:
            lines.error(request, e)

    lines.event("ready")
    while line := await reader.readline():
        task = asyncio.create_task(run(json.loads(line)))
        running.add(task)
        task.add_done_callback(running.discard)
    await commands.shutdown()
    os._exit(0)  # threads of the library may still wait for what the test left open


if __name__ == "__main__":
    asyncio.run(main())
