"""Commands and their options. Each command's work is done elsewhere; here is what a person types and sees.

Exit codes: 0 done, 1 failed while running, 2 wrong input (option, configuration, file, model), 128 and the
signal's number when interrupted.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import trio
import typer

from kwaainet_bridge import __version__, defaults
from kwaainet_bridge.cli.dht_commands import dht_app
from kwaainet_bridge.cli.options import (
    BootstrapOption,
    ConfigOption,
    JsonOption,
    KwaaiOption,
    found_from_here,
    load,
    networks_of,
    swarm_of,
)
from kwaainet_bridge.cli.view_commands import add_view_commands
from kwaainet_bridge.config import (
    AUTO,
    EMBEDDED_MODEL,
    load_config,
)
from kwaainet_bridge.errors import BridgeError, CheckpointError, ConfigError, NetworkError
from kwaainet_bridge.malloc import keep_freed_memory

app = typer.Typer(
    name="kwaainet-bridge",
    help="One node for two volunteer networks that serve large language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Work with configuration files.", no_args_is_help=True)
app.add_typer(config_app, name="config")
bench_app = typer.Typer(help="Measure.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

app.add_typer(dht_app, name="dht")


def main() -> None:
    """Run the command line; errors of this package end it with a message instead of a traceback."""
    keep_freed_memory()
    try:
        app()
    except* KeyboardInterrupt:
        sys.exit(130)
    except* BridgeError as group:
        errors = list(_leaves(group))
        for error in errors:
            typer.secho(f"error: {error}", fg="red", err=True)
        wrong_input = isinstance(errors[0], ConfigError | CheckpointError)
        sys.exit(2 if wrong_input and not isinstance(errors[0], NetworkError) else 1)
    finally:
        # An interpreter that ends looks through all that lives for garbage: a million objects of torch and
        # transformers, more than a second. The system takes them back as well.
        gc.freeze()


def _leaves(group: BaseExceptionGroup[BridgeError]) -> Iterator[BaseException]:
    """The errors inside the groups that nurseries put them in."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _version(value: bool) -> None:
    if value:
        typer.echo(f"kwaainet-bridge {__version__}")
        raise typer.Exit


@app.callback()
def root(
    _show: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Where to write node.yaml and identity.key.")] = Path(),
    kind: Annotated[str, typer.Option("--key", help="Kind of key: rsa or ed25519.")] = "rsa",
) -> None:
    """Write a commented configuration and an identity to start from."""
    from kwaainet_bridge.cli.init import write_node_files

    for line in write_node_files(folder, kind):
        typer.echo(line)


@app.command()
def run(
    config: ConfigOption = None,
    bootstrap: BootstrapOption = None,
    public_swarm: Annotated[
        bool, typer.Option("--public-swarm", help="Join the public Petals swarm.")
    ] = False,
    new_swarm: Annotated[
        bool, typer.Option("--new-swarm", help="Start a private swarm: contact no other peer.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help=f"Folder, hub repository, or '{EMBEDDED_MODEL}' (in the package).")
    ] = None,
    dht_prefix: Annotated[
        str | None, typer.Option(help="Name of the blocks in the swarm; derived from the model if left out.")
    ] = None,
    blocks: Annotated[str | None, typer.Option(help="Blocks to serve, first:end.", metavar="A:B")] = None,
    auto: Annotated[
        bool, typer.Option("--auto", help="Serve the blocks that the networks lack most; with --num-blocks.")
    ] = False,
    num_blocks: Annotated[int | None, typer.Option(min=1, help="How many blocks, with --auto.")] = None,
    listen: Annotated[
        list[str] | None, typer.Option(help="Address to listen on. May be repeated.", metavar="ADDR")
    ] = None,
) -> None:
    """Run a node until it is told to stop. SIGTERM or Ctrl-C drains it, a second one ends it at once."""
    if sum((bool(bootstrap), public_swarm, new_swarm)) > 1:
        raise ConfigError("--initial-peers, --public-swarm and --new-swarm exclude each other: give one")
    if auto and blocks is not None:
        raise ConfigError("--auto and --blocks exclude each other: give one")
    overrides: dict[str, Any] = {}
    if bootstrap or public_swarm or new_swarm:
        peers = bootstrap or (["petals-public"] if public_swarm else [])
        overrides["networks"] = {"petals": {"bootstrap": peers}}
    served = {
        "name": found_from_here(model),
        "dht_prefix": dht_prefix,
        "blocks": AUTO if auto else blocks,
        "num_blocks": num_blocks,
    }
    if any(value is not None for value in served.values()):
        overrides["model"] = {key: value for key, value in served.items() if value is not None}
    if listen:
        overrides["listen"] = listen
    node_config = load(config, overrides)
    if num_blocks is not None and (node_config.model is None or node_config.model.blocks_to_choose is None):
        raise ConfigError("--num-blocks says how many blocks the node chooses: give --auto, too")

    # OpenMP reads these when torch is imported. Its threads otherwise spin for milliseconds while they wait for
    # work, which on a machine that does anything else makes a step up to ten times slower, and costs its owner
    # a core. Not to spin at all costs a wake-up for each matrix; so much outlasts what lies between two.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # What is imported now makes no garbage, and looking for it takes a third of the time. The node switches
    # the collector on again.
    gc.disable()
    from kwaainet_bridge.cli.run import run_until_signalled

    read = None if config is None else partial(load, config, overrides)
    trio.run(partial(run_until_signalled, node_config, read=read))


@config_app.command("check")
def config_check(path: Annotated[Path, typer.Argument(help="Configuration file.")]) -> None:
    """Check a configuration; name each mistake's key and its remedy."""
    load_config(path)
    typer.echo(f"{path}: good")


@config_app.command("migrate")
def config_migrate(
    path: Annotated[Path, typer.Argument(help="Configuration file.")],
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit code 1 if the file has an older layout.")
    ] = False,
) -> None:
    """Write a configuration of an older layout in the present one, and print what changes."""
    from kwaainet_bridge.cli.migrate import migrate

    if not migrate(path, check=check) and check:
        raise typer.Exit(1)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    bootstrap: BootstrapOption = None,
    kwaainet_peers: KwaaiOption = None,
    config: ConfigOption = None,
    model: Annotated[str | None, typer.Option(help="As in `run`.")] = None,
    dht_prefix: Annotated[
        str | None, typer.Option(help="Name of the blocks in the swarm; derived from the model if left out.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the continuation, in tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; higher is bolder.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from this share of probability.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from this many tokens; 0 for all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(min=0.01, help="Above 1 avoids repetition.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter that the servers must have.")] = None,
    show_route: Annotated[
        bool, typer.Option("--show-route", help="Print which peers hold which blocks.")
    ] = False,
) -> None:
    """Continue a text with a model that a swarm serves, in one network or both."""
    overrides = networks_of(bootstrap, kwaainet_peers)
    asked = {"name": found_from_here(model), "dht_prefix": dht_prefix}
    overrides["model"] = {key: value for key, value in asked.items() if value is not None}
    node_config = load(config, overrides)

    from kwaainet_bridge.cli.generate import GenerateOptions, generate_text, sampling_of

    options = GenerateOptions(
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling_of(temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty),
        seed=seed,
        show_route=show_route,
        adapter=adapter,
    )
    trio.run(generate_text, node_config, options)


@app.command()
def ping(
    address: Annotated[str, typer.Argument(help="Address that ends in /p2p/<peer id>.", metavar="ADDR")],
    count: Annotated[int, typer.Option(min=1, help="Calls to time.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Connect to a peer and time calls to it, in milliseconds and in round trips of the connection."""
    from kwaainet_bridge.cli.network import ping_peer

    trio.run(ping_peer, address, count, as_json)


@app.command()
def doctor(
    addresses: Annotated[
        list[str] | None,
        typer.Argument(
            help="Peers to examine, or presets; left out: the configuration's bootstrap peers.",
            metavar="ADDR...",
        ),
    ] = None,
    config: ConfigOption = None,
    listen: Annotated[
        str | None, typer.Option(help="Listen here and see whether each peer calls back.", metavar="ADDR")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Examine the way to bootstrap peers step by step, and say what would mend the step that fails."""
    node_config = load(config, swarm_of(addresses))

    from kwaainet_bridge.cli.doctor import examine_peers

    if not trio.run(examine_peers, node_config, listen, as_json):
        raise typer.Exit(1)


@app.command()
def status(
    config: ConfigOption = None,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every 2 seconds, until Ctrl-C.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what the node of this configuration, which runs on this machine, does and whether it is well."""
    node_config = load(config, {})

    from kwaainet_bridge.cli.status import STATUS
    from kwaainet_bridge.cli.watching import show_view

    show_view(node_config, STATUS, watch=watch, as_json=as_json)


add_view_commands(app)


@app.command()
def drain(
    config: ConfigOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return once the node has ended.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Have the node of this configuration take no new sessions, finish those that run, and end."""
    from kwaainet_bridge.cli import control

    control.drain(load(config, {}), wait=wait, as_json=as_json)


@app.command()
def pause(
    config: ConfigOption = None,
    now: Annotated[bool, typer.Option("--now", help="End the sessions that run.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Have the node of this configuration take no new work until it is resumed; it stays in its networks."""
    from kwaainet_bridge.cli import control

    control.pause(load(config, {}), now=now, as_json=as_json)


@app.command()
def resume(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Have the paused node of this configuration take work again."""
    from kwaainet_bridge.cli import control

    control.resume(load(config, {}), as_json=as_json)


@app.command()
def reload(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Have the node of this configuration read its file again, and apply what it can without a restart."""
    from kwaainet_bridge.cli import control

    control.reload(load(config, {}), as_json=as_json)


@app.command()
def swarm(
    bootstrap: BootstrapOption = None,
    kwaainet_peers: KwaaiOption = None,
    config: ConfigOption = None,
    model: Annotated[
        str | None, typer.Option(help="Only this one: its prefix, or its name or page on the hub.")
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option("--prefix", "--dht-prefix", help="Only the model whose blocks have this name."),
    ] = None,
    blocks_total: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=defaults.MAX_MODEL_BLOCKS,
            help="Blocks of a model that is not registered; with --prefix.",
        ),
    ] = None,
    num_blocks: Annotated[
        int | None,
        typer.Option(min=1, help="Say where a node of so many blocks would help most; a third if left out."),
    ] = None,
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not dial the servers.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the models of one network or both, who serves which blocks, what is missing, and who can be reached."""
    node_config = load(config, networks_of(bootstrap, kwaainet_peers))

    from kwaainet_bridge.cli.swarm import show_swarm
    from kwaainet_bridge.cli.swarm_models import Wanted

    wanted = Wanted(model, prefix, blocks_total)
    show = partial(
        show_swarm, node_config, wanted, check=not no_check, as_json=as_json, num_blocks=num_blocks
    )
    trio.run(show)


@app.command()
def average(
    bootstrap: BootstrapOption = None,
    peers: Annotated[int, typer.Option(min=2, max=64, help="Peers on this machine.")] = 8,
    group_size: Annotated[
        int, typer.Option(min=2, max=64, help="Members of a group; more peers form several.")
    ] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of averaging.")] = 4,
    elements: Annotated[
        int, typer.Option(min=1, max=100_000_000, help="Numbers that each peer averages.")
    ] = 100_000,
    compression: Annotated[
        str, typer.Option(help="NONE, FLOAT16, MEANSTD_16BIT, UNIFORM_8BIT, QUANTILE_8BIT or BLOCKWISE_8BIT.")
    ] = "NONE",
    matchmaking: Annotated[
        float, typer.Option(min=0.5, help="Seconds that peers wait for each other.")
    ] = 2.0,
    prefix: Annotated[str, typer.Option(help="Name of the averagers, without a dot.")] = "demo",
    listen: Annotated[
        str, typer.Option(help="Address of each peer; its port must be 0.", metavar="ADDR")
    ] = "/ip4/127.0.0.1/tcp/0",
    seed: Annotated[int, typer.Option(help="Of the numbers that the peers begin with.")] = 1,
) -> None:
    """Watch peers on this machine average random numbers until all have the mean."""
    from kwaainet_bridge.cli.average import AverageOptions, average_peers

    if "." in prefix or not prefix:
        raise ConfigError(f"--prefix {prefix!r}: must be text without a dot")
    network = load(None, swarm_of(bootstrap)).networks.petals
    assert network is not None
    options = AverageOptions(
        peers=peers,
        group_size=group_size,
        rounds=rounds,
        elements=elements,
        compression=compression,
        matchmaking_seconds=matchmaking,
        prefix=prefix,
        bootstrap=network.bootstrap,
        listen=listen,
        seed=seed,
    )
    trio.run(average_peers, options)


@bench_app.command("net")
def bench_net(
    address: Annotated[
        str | None, typer.Argument(help="What --serve printed on the other machine.", metavar="ADDR")
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Be the other machine, until Ctrl-C.")] = False,
    listen: Annotated[
        str, typer.Option(help="Where --serve listens.", metavar="ADDR")
    ] = "/ip4/0.0.0.0/tcp/0",
    megabytes: Annotated[int, typer.Option(min=1, max=16_384, help="To send each way.")] = 256,
    as_json: JsonOption = False,
) -> None:
    """Measure a connection's throughput both ways; without ADDR that of two processes on this machine."""
    from kwaainet_bridge.cli.network import measure_net, serve_net

    if serve and address is not None:
        raise ConfigError("--serve waits for others: give it no address to measure")
    if serve:
        trio.run(serve_net, listen)
    else:
        trio.run(measure_net, address, megabytes, as_json)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the two nodes keep their files.")] = Path("run"),
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "It is a truth universally acknowledged",
    once: Annotated[bool, typer.Option("--once", help="Stop the nodes after the first text.")] = False,
) -> None:
    """Start a private swarm of two nodes on this machine and generate text through both."""
    from kwaainet_bridge.cli.demo import run_demo

    interrupted = trio.run(run_demo, folder, prompt, once)
    if interrupted is not None:
        raise typer.Exit(128 + interrupted)
