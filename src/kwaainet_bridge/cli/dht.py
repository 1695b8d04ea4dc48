"""``kwaainet-bridge dht``: read and write records of a swarm's DHT, and see who keeps them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, Final, NoReturn

import typer

from kwaainet_bridge.cli.printing import (
    as_text,
    console,
    counted,
    expiry,
    expiry_text,
    jsonable,
    print_table,
    printable,
    spinner,
)
from kwaainet_bridge.cli.visit import Visit, visit_swarm
from kwaainet_bridge.config import NodeConfig
from kwaainet_bridge.errors import ConfigError, NetworkError
from kwaainet_bridge.hivemind.dht import DhtId, Found, FoundEntry, StoreResult
from kwaainet_bridge.hivemind.dht.walk import MetNode, Walk, walk
from kwaainet_bridge.wire.peer_id import PeerId

_REFUSED: Final = "holds something that expires no earlier, or has no room"


async def get_key(
    config: NodeConfig, key: str, subkeys: Sequence[str], *, latest: bool, as_json: bool
) -> None:
    """Read ``key`` and print what it holds; of a dictionary only ``subkeys`` if there are any.

    Raises NetworkError if nothing is found or nobody can be asked, ConfigError for a key that cannot be one.
    """
    _check_key(key)
    async with visit_swarm(config) as visit:
        with spinner("searching"):
            found = await visit.dht.get(key, latest=latest)
    told = _what_was_found(key, found, subkeys, now=time.time())
    if as_json:
        typer.echo(json.dumps(told))
    elif "entries" in told:
        _print_entries(told)
    else:
        typer.echo(f"key        {printable(key)}")
        typer.echo(f"value      {as_text(found.value if found else None)}")
        typer.echo(f"expires    {expiry_text(told)}")


def _check_key(key: str) -> None:
    try:
        DhtId.of(key)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"key {key!a}: cannot be a key of the DHT: {e}") from e


def _what_was_found(key: str, found: Found | None, subkeys: Sequence[str], *, now: float) -> dict[str, Any]:
    """The JSON object of ``dht get``. Raises NetworkError if it would hold nothing."""
    if found is None:
        raise NetworkError(f"key {printable(key)}: nobody holds it; it may have expired")
    told: dict[str, Any] = {"key": key, "dictionary": found.is_dictionary}
    if not found.is_dictionary:
        if subkeys:
            raise NetworkError(f"key {printable(key)} holds a plain value: ask without --subkey")
        return told | {"value": jsonable(found.value)} | expiry(found.expiration, now)
    entries: dict[Any, FoundEntry] = found.value
    if subkeys:
        missing = [subkey for subkey in subkeys if subkey not in entries]
        if missing:
            raise NetworkError(
                f"key {printable(key)} has no subkey {printable(missing[0])}, but {len(entries)} others: "
                "ask without --subkey to see them"
            )
        entries = {subkey: entries[subkey] for subkey in subkeys}
    rows = [
        {"subkey": jsonable(subkey), "value": jsonable(entry.value)} | expiry(entry.expiration, now)
        for subkey, entry in entries.items()
    ]
    return told | {"entries": rows}


def _print_entries(told: dict[str, Any]) -> None:
    out = console()
    out.print(f"key        {printable(told['key'])}")
    rows = [[as_text(row["subkey"]), as_text(row["value"]), expiry_text(row)] for row in told["entries"]]
    print_table(out, ["subkey", "value", "expires"], rows)


def parse_value(text: str) -> Any:
    """The value that ``text`` stands for: JSON if it is JSON as the standard has it, otherwise the text itself.

    Numbers with a point or an exponent are floats, lists are msgpack arrays, which readers get as lists.
    """

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError:
        return text
    except RecursionError as e:
        raise ConfigError("the value is nested too deeply") from e


async def store_value(
    config: NodeConfig, key: str, text: str, subkey: str | None, *, ttl: float, as_json: bool
) -> None:
    """Store a value for ``ttl`` seconds and print who keeps it.

    Raises NetworkError if nobody does, ConfigError for a key or a value that the DHT cannot carry.
    """
    value = parse_value(text)
    async with visit_swarm(config) as visit:
        expiration = time.time() + ttl
        try:
            with spinner("storing"):
                result = await visit.dht.store(key, value, expiration, subkey=subkey)
        except (TypeError, ValueError, OverflowError) as e:
            raise ConfigError(f"the value cannot be stored: {printable(str(e))}") from e
    expires = expiry(expiration, expiration - ttl)
    if as_json:
        typer.echo(json.dumps({"key": key, "subkey": subkey} | _as_json(result) | expires))
    else:
        _print_result(result)
        typer.echo(f"expires    {expiry_text(expires)}")
    if not result.ok:
        raise NetworkError(f"key {printable(key)}: no peer keeps the value")


def _as_json(result: StoreResult) -> dict[str, Any]:
    return {
        "stored": result.ok,
        "accepted": [str(peer) for peer in result.accepted],
        "refused": [str(peer) for peer in result.refused],
        "failed": {str(peer): why for peer, why in result.failed.items()},
    }


def _print_result(result: StoreResult) -> None:
    for peer in result.accepted:
        typer.echo(f"accepted   {peer}")
    for peer in result.refused:
        typer.echo(f"refused    {peer}: {_REFUSED}")
    for peer, why in result.failed.items():
        typer.echo(f"no answer  {peer}: {printable(why)}")


async def list_peers(config: NodeConfig, *, as_json: bool) -> None:
    """Walk through the DHT from the bootstrap peers and print everybody who is met.

    Raises NetworkError if none of the bootstrap peers is reached or answers as a node of the DHT.
    """
    agents: dict[PeerId, str] = {}

    async with visit_swarm(config, join=False) as visit:

        async def take_down(peer: PeerId) -> None:
            agents[peer] = await _agent(visit, peer)

        with spinner("walking through the DHT"):
            met = await walk(visit.rpc, visit.reached, own=visit.host.peer_id, on_answer=take_down)
        rows = [_row(visit, node, agents.get(node.peer)) for node in _sorted(met)]
    if all(node.error for node in met.nodes):
        errors = "\n  ".join(printable(f"{node.peer}: {node.error}") for node in met.nodes)
        raise NetworkError(f"no bootstrap peer answers as a node of the DHT:\n  {errors}")
    if as_json:
        typer.echo(json.dumps({"complete": met.complete, "peers": rows}))
    else:
        _print_peers(rows, met.complete)


def _sorted(met: Walk) -> list[MetNode]:
    return sorted(met.nodes, key=lambda node: (bool(node.error), node.seconds or 0.0, node.peer))


async def _agent(visit: Visit, peer: PeerId) -> str:
    connection = visit.host.connections.find(peer)
    if connection is not None:
        await connection.identified.wait()
    description = visit.host.description(peer)
    return "" if description is None else description.agent


def _row(visit: Visit, node: MetNode, agent: str | None) -> dict[str, Any]:
    return {
        "peer": str(node.peer),
        "node_id": None if node.node_id is None else str(node.node_id),
        "round_trip_ms": None if node.seconds is None else round(node.seconds * 1e3, 3),
        "clock_seconds": jsonable(None if node.ahead is None else round(node.ahead, 3)),
        "agent": agent,
        "neighbours": node.neighbours,
        "addresses": [text.rpartition("/p2p/")[0] for text in visit.host.known_addresses(node.peer)],
        "error": node.error,
    }


def _print_peers(rows: list[dict[str, Any]], complete: bool) -> None:
    out = console()
    cells = []
    for row in rows:
        time = "" if row["round_trip_ms"] is None else f"{row['round_trip_ms']:.1f} ms"
        clock = row["clock_seconds"]
        ahead = f"{clock:+.3f} s" if isinstance(clock, float) else clock or ""
        last = row["error"] or " ".join(row["addresses"])
        cells.append([row["peer"], row["node_id"] or "", time, ahead, row["agent"] or "", last])
    print_table(out, ["peer", "node id", "round trip", "clock", "agent", "addresses, or what failed"], cells)
    answered = sum(not row["error"] for row in rows)
    out.print(f"{counted(len(rows), 'peer')}, {answered} of them answered")
    if not complete:
        out.print("the walk was ended by its limit: there are more peers than these")
