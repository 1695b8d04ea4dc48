"""``kwaainet-bridge dht``: its commands and their options. What they do is in ``dht.py``."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import trio
import typer

from kwaainet_bridge import defaults
from kwaainet_bridge.cli.options import BootstrapOption, ConfigOption, JsonOption, load, swarm_of

dht_app = typer.Typer(help="Look at a swarm's DHT, and write to it.", no_args_is_help=True)

KeyArgument = Annotated[str, typer.Argument(help="Key, as text.")]


@dht_app.command("get")
def dht_get(
    key: KeyArgument,
    bootstrap: BootstrapOption = None,
    config: ConfigOption = None,
    subkey: Annotated[
        list[str] | None, typer.Option(help="Of a dictionary only this entry. May be repeated.")
    ] = None,
    first: Annotated[
        bool, typer.Option("--first/--latest", help="Take the first find, or ask all near nodes and merge.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print what the DHT holds under a key."""
    node_config = load(config, swarm_of(bootstrap))

    from kwaainet_bridge.cli.dht import get_key

    trio.run(partial(get_key, node_config, key, subkey or (), latest=not first, as_json=as_json))


@dht_app.command("store")
def dht_store(
    key: KeyArgument,
    value: Annotated[str, typer.Argument(help="JSON, or else text.")],
    bootstrap: BootstrapOption = None,
    config: ConfigOption = None,
    subkey: Annotated[str | None, typer.Option(help="Store it as this entry of a dictionary.")] = None,
    ttl: Annotated[
        float, typer.Option(min=1.0, max=defaults.DHT_RETENTION_SECONDS, help="Seconds until it expires.")
    ] = defaults.STORE_TTL_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Store a value in the DHT and print which peers keep it."""
    node_config = load(config, swarm_of(bootstrap))

    from kwaainet_bridge.cli.dht import store_value

    trio.run(partial(store_value, node_config, key, value, subkey, ttl=ttl, as_json=as_json))


@dht_app.command("peers")
def dht_peers(
    bootstrap: BootstrapOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """Walk through the DHT and print every peer that is met."""
    node_config = load(config, swarm_of(bootstrap))

    from kwaainet_bridge.cli.dht import list_peers

    trio.run(partial(list_peers, node_config, as_json=as_json))
