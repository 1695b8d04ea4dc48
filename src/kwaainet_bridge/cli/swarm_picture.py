"""How ``kwaainet-bridge swarm`` draws networks: for each model a bar of its blocks, its gaps, its servers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from rich.console import Console
from rich.text import Text

from kwaainet_bridge.bridge.shared_models import SharedModel
from kwaainet_bridge.cli.printing import counted, print_table, printable
from kwaainet_bridge.hivemind.client import Check, Coverage, Span, SurveyedModel
from kwaainet_bridge.hivemind.experts.records import ServerState
from kwaainet_bridge.wire.peer_id import PeerId

Checks = Mapping[PeerId, Check] | None
"""What was found of each server that was dialled, None if nobody was."""

_PLAIN: Final = (".", "1", "#")
"""Cells without colour: no server, one, several."""

_COLOURED: Final = (("░", "red"), ("█", "yellow"), ("█", "green"))

_WIDE: Final = 160  # columns with room for whole peer ids
_MAX_CELLS: Final = 128
_NAME_CHARACTERS: Final = 40
_TITLE_CHARACTERS: Final = 120
_ERROR_CHARACTERS: Final = 300

_FIXED: Final = ("network", "peer", "blocks", "state", "rate", "relay", "connected", "cache")
_COLUMNS: Final = (
    "network",
    "peer",
    "name",
    "blocks",
    "state",
    "rate",
    "version",
    "relay",
    "connected",
    "adapters",
    "cache",
)


def print_network(
    out: Console,
    network: str,
    models: Sequence[SurveyedModel],
    checks: Checks,
    *,
    left_out: int = 0,
    advice: Callable[[SurveyedModel], str] = lambda _surveyed: "",
) -> None:
    """Print one network alone: a header, then its models, each with a line of ``advice`` if there is any."""
    print_header(out, network, len(models), left_out=left_out)
    for surveyed in models:
        out.print()
        print_model(out, surveyed, checks, advice(surveyed))


def print_header(out: Console, network: str, models: int, *, left_out: int = 0, error: str = "") -> None:
    """How many models a network has, or ``error``: why nobody knows."""
    told = printable(error, limit=_ERROR_CHARACTERS) if error else counted(models, "model")
    out.print(Text(f"{network}: {told}", style="bold"))
    if left_out:
        out.print(Text(f"{left_out} more are registered: see one with --model"))


def print_model(out: Console, surveyed: SurveyedModel, checks: Checks, advice: str = "") -> None:
    """Print a model of one network."""
    model, coverage = surveyed.model, surveyed.coverage
    title = Text(printable(model.prefix, limit=_TITLE_CHARACTERS), style="bold")
    out.print(title.append(f"  {_size_and_page([surveyed])}", style="default"))
    if surveyed.error:
        out.print(Text(_unread(surveyed)))
        return
    size, bar = draw_bar(coverage, out)
    out.print(Text("0 ").append_text(bar).append(f" {model.num_blocks}"))
    _print_cell_size(out, size)
    out.print(Text(gaps_in_words(coverage)))
    if advice:
        out.print(Text(advice))
    _print_servers(out, {"": surveyed}, checks)


def print_shared(out: Console, model: SharedModel, checks: Checks, advice: str = "") -> None:
    """Print a model of several networks as one: a bar for each, what they have together, all servers."""
    names = (
        f"{printable(seen.model.prefix, limit=_TITLE_CHARACTERS)} ({network})"
        for network, seen in model.by_network.items()
    )
    title = Text(", ".join(names), style="bold")
    seen = list(model.by_network.values())
    out.print(title.append(f"  {_size_and_page(seen)}", style="default"))
    width = max(map(len, model.by_network))
    size = 1
    for network, surveyed in model.by_network.items():
        label = f"{network:<{width}} "
        if surveyed.error:
            out.print(Text(label + _unread(surveyed)))
            continue
        size, bar = draw_bar(surveyed.coverage, out, taken=len(label))
        out.print(Text(f"{label}0 ").append_text(bar).append(f" {model.num_blocks}"))
    _print_cell_size(out, size)
    for network, surveyed in model.by_network.items():
        if not surveyed.error:
            out.print(Text(f"{network}: {gaps_in_words(surveyed.coverage)}"))
    if len(model.by_network) > 1 and not model.unknown_in:
        out.print(Text(f"together: {union_in_words(model)}"))
    if advice:
        out.print(Text(advice))
    _print_servers(out, model.by_network, checks)


def union_in_words(model: SharedModel) -> str:
    """Which blocks have servers in none of two networks, in one, in both: ``neither has 4:8; both have 0:4``."""
    told = []
    for networks, words in ((0, "neither has"), (1, "one has"), (2, "both have")):
        runs = model.held_in(networks)
        if runs:
            told.append(f"{words} " + ", ".join(f"{run.start}:{run.stop}" for run in runs))
    return "; ".join(told)


def _size_and_page(seen: Sequence[SurveyedModel]) -> str:
    page = next((surveyed.model.repository for surveyed in seen if surveyed.model.repository), None)
    told = "" if page is None else f", {printable(page, limit=_TITLE_CHARACTERS)}"
    return counted(seen[0].model.num_blocks, "block") + told


def _unread(surveyed: SurveyedModel) -> str:
    return printable(f"its records could not be read: {surveyed.error}")


def _print_cell_size(out: Console, size: int) -> None:
    if size > 1:
        out.print(Text(f"a cell is {size} blocks, drawn as the worst of them"))


def _print_servers(out: Console, by_network: Mapping[str, SurveyedModel], checks: Checks) -> None:
    """The table of all servers, then what is wrong with some: who is not reached, whom readers leave out."""
    rows = [
        [network, *_row(span, checks, whole_ids=out.width >= _WIDE)]
        for network, surveyed in by_network.items()
        for span in surveyed.spans
    ]
    if rows:
        print_table(out, _COLUMNS, rows, fixed=_FIXED)
    for network, surveyed in by_network.items():
        for peer, why in surveyed.left_out.items():
            told = f"left out by readers of {network or 'the network'}: {peer.short}, {why}"
            out.print(Text(printable(told, limit=_ERROR_CHARACTERS)))
    peers = dict.fromkeys(span.peer for surveyed in by_network.values() for span in surveyed.spans)
    for peer in peers:
        check = None if checks is None else checks.get(peer)
        if check is not None and not check.reachable:
            out.print(Text(printable(f"not connected: {check.error}", limit=_ERROR_CHARACTERS)))


def draw_bar(coverage: Coverage, out: Console, *, taken: int = 0) -> tuple[int, Text]:
    """The blocks that one cell stands for, and the cells: in colour where there is any, else as characters.

    ``taken`` columns of the line are used already.
    """
    room = out.width - taken - len(f"0  {len(coverage.counts)}")
    size, counts = coverage.cells(max(1, min(room, _MAX_CELLS)))
    coloured = out.color_system is not None and not out.no_color and out.encoding.startswith("utf")
    bar = Text()
    for count in counts:
        level = min(count, 2)
        bar.append(*_COLOURED[level]) if coloured else bar.append(_PLAIN[level])
    return size, bar


def gaps_in_words(coverage: Coverage) -> str:
    gaps = coverage.gaps
    if not gaps:
        return "every block is served"
    if gaps[0] == range(len(coverage.counts)):
        return "no server is online"
    return "no server is online for blocks " + ", ".join(f"{gap.start}:{gap.stop}" for gap in gaps)


def _row(span: Span, checks: Checks, *, whole_ids: bool) -> list[str]:
    info = span.info
    texts = [info.public_name or "", info.version or "", ", ".join(info.adapters)]
    name, version, adapters = (printable(text, limit=_NAME_CHARACTERS) for text in texts)
    state = info.state.name if info.state is not ServerState.ONLINE else "online"
    return [
        str(span.peer) if whole_ids else span.peer.short,
        name,
        f"{span.blocks.start}:{span.blocks.stop}",
        state,
        f"{info.throughput:.4g}",
        version,
        {None: "", True: "yes", False: "no"}[info.using_relay],
        _connected(checks, span.peer),
        adapters,
        "" if info.cache_tokens_left is None else str(info.cache_tokens_left),
    ]


def _connected(checks: Checks, peer: PeerId) -> str:
    check = None if checks is None else checks.get(peer)
    if check is None:
        return "not checked"
    if not check.reachable:
        return "no"
    found = "yes" if check.seconds is None else f"{check.seconds * 1e3:.1f} ms"
    return f"{found} by relay" if check.relayed else found
