"""Our DHT nodes and stock ones in one network."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import trio
from child_processes import Driver, PeerError
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from dht_pairs import Node, live, our_node
from stock_swarm import START_SECONDS, StockEnvironment

from kwaainet_bridge.errors import HandlerError
from kwaainet_bridge.hivemind.dht import (
    AccessToken,
    DhtId,
    FoundEntry,
    Item,
    RsaSignatureValidator,
    TokenAuthorizer,
    rsa_keys,
    signatures,
)
from kwaainet_bridge.hivemind.dht.storage import LocalStorage


@pytest.fixture(scope="module")
def driver(stock: StockEnvironment) -> Iterator[Driver]:
    with stock.script("dht_peer.py") as driver:
        driver.event("ready", within=START_SECONDS)
        yield driver


@pytest.fixture
def stock_nodes(driver: Driver) -> Iterator[Driver]:
    yield driver
    driver.ask("shutdown")


@pytest.mark.parametrize("seed", range(10))
def test_storage_accepts_what_stock_storage_accepts(stock_nodes: Driver, seed: int) -> None:
    rng = random.Random(seed)

    def offer(n: int) -> tuple[int, str | None, str, float]:
        ttl = -5.0 if rng.random() < 0.1 else 500.0 + n // 20 + rng.randrange(-3, 4)
        return rng.randrange(5), rng.choice([None, "a", "b", "c"]), str(n), ttl

    offers = [offer(n) for n in range(1000)]
    storage, now = LocalStorage(max_bytes=1 << 24), 1e9
    ours = [
        storage.store(DhtId(key), value.encode(), now + ttl, now=now)
        if subkey is None
        else storage.store_subkey(DhtId(key), subkey, value.encode(), now + ttl, now=now)
        for key, subkey, value, ttl in offers
    ]
    assert ours == stock_nodes.ask("offer", offers=offers)
    assert 100 < sum(ours) < 900


async def test_a_stock_dht_joins_through_our_node(stock_nodes: Driver) -> None:
    async with our_node() as ours:
        theirs = await stock_nodes.aask("dht", initial_peers=ours.host.addresses())
        assert [str(contact.peer) for contact in ours.dht.neighbours()] == [theirs["peer"]]

        expiration = time.time() + 300
        assert (await ours.dht.store("plain", [1, 2.5, "three"], expiration)).ok
        assert (await ours.dht.store("both", {"b": True}, expiration, subkey="ours")).ok
        items = [
            {"key": "their plain", "value": {"a": [1, None]}, "ttl": 300},
            {"key": "both", "value": "theirs", "ttl": 200, "subkey": "stock"},
        ]
        assert await stock_nodes.aask("store", node=theirs["node"], items=items) == [True, True]

        keys = ["plain", "both", "their plain", "nothing"]
        found = await stock_nodes.aask("get", node=theirs["node"], keys=keys)
        assert found["plain"] == {"value": [1, 2.5, "three"], "expiration": expiration}
        assert found["both"]["subkeys"]["ours"] == {"value": {"b": True}, "expiration": expiration}
        assert found["both"]["subkeys"]["stock"]["value"] == "theirs"
        assert found["nothing"] is None

        read = await ours.dht.get_many(keys)
        assert read["their plain"].value == {"a": [1, None]}
        assert read["both"].value["ours"] == FoundEntry({"b": True}, expiration)
        assert read["both"].value["stock"].value == "theirs"
        assert read["nothing"] is None


async def test_our_node_joins_through_a_stock_dht(stock_nodes: Driver) -> None:
    theirs = await stock_nodes.aask("dht", initial_peers=[])
    items = [
        {"key": "before", "value": 1, "ttl": 300},
        {"key": "both", "value": "theirs", "ttl": 300, "subkey": "stock"},
    ]
    assert await stock_nodes.aask("store", node=theirs["node"], items=items) == [True, True]
    async with our_node() as ours:
        await ours.join(theirs["addresses"][:1])
        assert (await ours.dht.get("before")).value == 1
        result = await ours.dht.store("both", "ours", time.time() + 300, subkey="bridge")
        assert {str(peer) for peer in result.accepted} == {theirs["peer"], str(ours.host.peer_id)}
        found = await stock_nodes.aask("get", node=theirs["node"], keys=["both"])
        assert {key: entry["value"] for key, entry in found["both"]["subkeys"].items()} == {
            "stock": "theirs",
            "bridge": "ours",
        }
        assert await ours.dht.ping(ours.dht.neighbours()[0].peer) < 3


async def test_clients_of_either_kind_are_served_and_not_remembered(stock_nodes: Driver) -> None:
    async with our_node() as ours, our_node(client_mode=True) as our_client:
        their_client = await stock_nodes.aask("start", initial_peers=ours.host.addresses(), client_mode=True)
        theirs = await stock_nodes.aask("start", initial_peers=ours.host.addresses())
        await our_client.join(theirs["addresses"][:1])

        item = {"key": "from their client", "value": 1, "ttl": 300}
        assert await stock_nodes.aask("store", node=their_client["node"], items=[item]) == [True]
        assert (await our_client.dht.store("from our client", 2, time.time() + 300)).ok
        assert (await our_client.dht.get("from their client")).value == 1
        found = await stock_nodes.aask("get", node=their_client["node"], keys=["from our client"])
        assert found["from our client"]["value"] == 2

        assert [str(contact.peer) for contact in ours.dht.neighbours()] == [theirs["peer"]]
        known = await stock_nodes.aask("known", node=theirs["node"])
        assert known == [str(ours.host.peer_id)]


async def test_a_stock_node_refuses_us_when_our_clock_is_wrong(stock_nodes: Driver) -> None:
    async with our_node(clock=lambda: time.time() + 10) as ours:
        with pytest.raises(PeerError, match="local time must be within 3 seconds"):
            await stock_nodes.aask("start", initial_peers=ours.host.addresses())


async def test_later_records_win_on_both_sides(stock_nodes: Driver) -> None:
    async with our_node() as ours:
        theirs = await stock_nodes.aask("start", initial_peers=ours.host.addresses())
        now = time.time()
        assert (await ours.dht.store("key", "later", now + 300)).ok
        item = {"key": "key", "value": "earlier", "ttl": 200}
        assert await stock_nodes.aask("store", node=theirs["node"], items=[item]) == [False]
        item = {"key": "key", "value": "latest", "ttl": 400}
        assert await stock_nodes.aask("store", node=theirs["node"], items=[item]) == [True]
        assert (await ours.dht.get("key")).value == "latest"
        result = await ours.dht.store("key", "later again", now + 350)
        assert len(result.refused) == 2
        # a subkey replaces an earlier value, a value replaces an earlier dictionary
        assert (await ours.dht.store("key", 1, now + 500, subkey="sub")).ok
        found = await stock_nodes.aask("get", node=theirs["node"], keys=["key"])
        assert found["key"]["subkeys"] == {"sub": {"value": 1, "expiration": now + 500}}


async def test_a_mixed_swarm_finds_everything(stock_nodes: Driver) -> None:
    """8 stock nodes and 4 of ours: every key that one kind stores, all of the other kind find."""
    async with AsyncExitStack() as stack:
        ours = [await stack.enter_async_context(our_node()) for _ in range(4)]
        theirs = [await stock_nodes.aask("start", initial_peers=ours[0].host.addresses())]
        addresses = [ours[0].host.addresses()[0], theirs[0]["addresses"][0]]
        for number, node in enumerate(ours[1:]):
            await node.join([addresses[number % 2]])
        theirs += [
            await stock_nodes.aask("start", initial_peers=[addresses[number % 2]]) for number in range(7)
        ]

        expiration = time.time() + 300
        for number, node in enumerate(ours):
            items = [Item(f"ours {number} {n}", [number, n], expiration) for n in range(8)]
            items.append(Item("all", number, expiration, subkey=f"ours {number}"))
            results = await node.dht.store_many(items)
            assert all(len(result.accepted) == 5 for result in results), results
        for number, node in enumerate(theirs):
            items = [{"key": f"theirs {number} {n}", "value": [number, n], "ttl": 300} for n in range(4)]
            items.append({"key": "all", "value": number, "ttl": 300, "subkey": f"theirs {number}"})
            assert all(await stock_nodes.aask("store", node=node["node"], items=items))

        our_keys = {f"ours {number} {n}": [number, n] for number in range(4) for n in range(8)}
        their_keys = {f"theirs {number} {n}": [number, n] for number in range(8) for n in range(4)}
        members = {f"ours {n}": n for n in range(4)} | {f"theirs {n}": n for n in range(8)}
        for node in theirs:
            found = await stock_nodes.aask("get", node=node["node"], keys=[*our_keys, "all"])
            everyone = found.pop("all")["subkeys"]
            assert {key: value and value["value"] for key, value in found.items()} == our_keys
            assert {subkey: entry["value"] for subkey, entry in everyone.items()} == members

        async def read(node: Node) -> None:
            found = await node.dht.get_many([*their_keys, "all"])
            everyone = found.pop("all").value
            assert {key: value and value.value for key, value in found.items()} == their_keys
            assert {subkey: entry.value for subkey, entry in everyone.items()} == members

        async with trio.open_nursery() as nursery:
            for node in ours:
                nursery.start_soon(read, node)


async def test_protected_records_are_kept_for_their_owners_on_both_sides(stock_nodes: Driver) -> None:
    key = rsa_keys.generate_key()
    own = "ours " + signatures.owner_marker(key).decode()
    async with our_node(validator=RsaSignatureValidator(key)) as ours, our_node(client_mode=True) as vandal:
        theirs = await stock_nodes.aask("dht", initial_peers=ours.host.addresses(), signing=True)
        their_vandal = await stock_nodes.aask("start", initial_peers=ours.host.addresses(), client_mode=True)
        await vandal.join([*ours.host.addresses(), theirs["addresses"][0]])
        subkeys = {own: {"epoch": 1}, "theirs " + theirs["owner"]: {"epoch": 2}, "free": {"epoch": 3}}

        result = await ours.dht.store("progress", {"epoch": 1}, time.time() + 200, subkey=own)
        assert len(result.accepted) == 2, result
        for subkey, value in list(subkeys.items())[1:]:
            item = {"key": "progress", "subkey": subkey, "value": value, "ttl": 200}
            assert await stock_nodes.aask("store", node=theirs["node"], items=[item]) == [True]

        for subkey in list(subkeys)[:2]:  # nobody else can store them, by either implementation
            result = await vandal.dht.store("progress", "forged", time.time() + 300, subkey=subkey)
            assert len(result.refused) == 2, result
            item = {"key": "progress", "subkey": subkey, "value": "forged", "ttl": 300}
            await stock_nodes.aask("store", node=their_vandal["node"], items=[item])

        read = (await ours.dht.get("progress")).value
        assert {subkey: entry.value for subkey, entry in read.items()} == subkeys
        found = await stock_nodes.aask("get", node=theirs["node"], keys=["progress"])
        assert {key: entry["value"] for key, entry in found["progress"]["subkeys"].items()} == subkeys


class Members(TokenAuthorizer):
    """The rules of ``stock/dht_peer.py``."""

    def __init__(self, authority: rsa.RSAPrivateKey) -> None:
        super().__init__(rsa_keys.generate_key(), clock=time.time)
        self._authority = authority

    async def get_token(self) -> AccessToken:
        await trio.lowlevel.checkpoint()
        token = AccessToken(
            username="ours", public_key=self.public_key, expiration_time=str(time.time() + 60)
        )
        token.signature = rsa_keys.sign(self._authority, self._signed(token))
        return token

    def is_token_valid(self, token: AccessToken) -> bool:
        public = rsa_keys.public_bytes(self._authority)
        return (
            rsa_keys.verify(public, self._signed(token), token.signature)
            and float(token.expiration_time) > time.time()
        )

    def needs_refresh(self, token: AccessToken) -> bool:
        return float(token.expiration_time) < time.time() + 5

    @staticmethod
    def _signed(token: AccessToken) -> bytes:
        return f"{token.username} {token.public_key} {token.expiration_time}".encode()


async def test_members_of_a_private_swarm_work_together_and_strangers_stay_out(stock_nodes: Driver) -> None:
    authority = rsa_keys.generate_key()
    der = authority.private_bytes(Encoding.DER, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    async with our_node(authorizer=Members(authority)) as ours, our_node(client_mode=True) as stranger:
        theirs = await stock_nodes.aask("start", initial_peers=ours.host.addresses(), authority=der.hex())
        expiration = time.time() + 100
        result = await ours.dht.store("ours", 1, expiration)
        assert {str(peer) for peer in result.accepted} == {str(ours.host.peer_id), theirs["peer"]}
        item = {"key": "theirs", "value": 2, "ttl": 100}
        assert await stock_nodes.aask("store", node=theirs["node"], items=[item]) == [True]
        assert (await ours.dht.get("theirs")).value == 2
        found = await stock_nodes.aask("get", node=theirs["node"], keys=["ours"])
        assert found["ours"]["value"] == 1

        for address in (ours.host.addresses()[0], theirs["addresses"][0]):
            peer = await stranger.host.connect(address)
            (joined,) = await stranger.dht.bootstrap([peer])
            assert isinstance(joined.error, HandlerError)
        assert not (await stranger.dht.store("theirs", 3, expiration + 1)).ok
        with pytest.raises(PeerError, match="none of the initial_peers responded"):
            await stock_nodes.aask("start", initial_peers=ours.host.addresses())
        assert (await ours.dht.get("theirs")).value == 2


@pytest.mark.slow
async def test_a_mixed_swarm_keeps_every_record_when_a_fifth_of_it_dies(stock_nodes: Driver) -> None:
    """Ten of ours and ten of stock's join in turns, each through one of the other kind."""
    async with trio.open_nursery() as lives:
        ours: list[Node] = [await lives.start(live, {}) for _ in range(10)]
        theirs: list[dict[str, Any]] = []
        for number, node in enumerate(ours):
            if theirs:
                await node.join([theirs[number // 2]["addresses"][0]])
            theirs.append(await stock_nodes.aask("start", initial_peers=ours[number // 2].host.addresses()))

        our_values: dict[str, Any] = {}
        their_values: dict[str, Any] = {}

        async def store_ours(number: int, name: str) -> None:
            items = [Item(f"{name} ours {number} {n}", [number, n], time.time() + 600) for n in range(4)]
            items.append(Item("all", number, time.time() + 600, subkey=f"ours {number}"))
            results = await ours[number].dht.store_many(items)
            assert all(result.ok for result in results), results
            our_values.update({item.key: item.value for item in items[:-1]})

        async def store_theirs(number: int, name: str) -> None:
            items = [
                {"key": f"{name} theirs {number} {n}", "value": [number, n], "ttl": 600} for n in range(4)
            ]
            items.append({"key": "all", "value": number, "ttl": 600, "subkey": f"theirs {number}"})
            assert all(await stock_nodes.aask("store", node=theirs[number]["node"], items=items))
            their_values.update({item["key"]: item["value"] for item in items[:-1]})

        for number in range(10):
            await store_ours(number, "before")
            await store_theirs(number, "before")

        for number in (2, 7):  # fewer than the replicas: no key may be lost
            await stock_nodes.aask("kill", node=theirs[number]["node"])
            ours[number].doomed.set()
        alive = [number for number in range(10) if number not in (2, 7)]
        async with trio.open_nursery() as nursery:
            for number in (0, 5):
                nursery.start_soon(store_ours, number, "after")
                nursery.start_soon(store_theirs, number, "after")

        values = our_values | their_values
        members = {f"{kind} {n}": n for kind in ("ours", "theirs") for n in range(10)}

        async def read_ours(number: int) -> None:
            found = await ours[number].dht.get_many([*values, "all"])
            everyone = found.pop("all").value
            assert {key: value and value.value for key, value in found.items()} == values
            assert {subkey: entry.value for subkey, entry in everyone.items()} == members

        async def read_theirs(number: int) -> None:
            found = await stock_nodes.aask("get", node=theirs[number]["node"], keys=[*values, "all"])
            everyone = found.pop("all")["subkeys"]
            assert {key: value and value["value"] for key, value in found.items()} == values
            assert {subkey: entry["value"] for subkey, entry in everyone.items()} == members

        async with trio.open_nursery() as nursery:
            for number in alive:
                nursery.start_soon(read_ours, number)
                nursery.start_soon(read_theirs, number)
        for node in ours:
            node.doomed.set()
