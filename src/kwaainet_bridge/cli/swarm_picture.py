"""How ``kwaainet-bridge swarm`` draws a network: for each model a bar of its blocks, its gaps, its servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from rich.console import Console
from rich.text import Text

from kwaainet_bridge.cli.printing import counted, print_table, printable
from kwaainet_bridge.hivemind.client import Check, Coverage, Span, SurveyedModel
from kwaainet_bridge.hivemind.experts.records import ServerState
from kwaainet_bridge.wire.peer_id import PeerId

_PLAIN: Final = (".", "1", "#")
"""Cells without colour: no server, one, several."""

_COLOURED: Final = (("░", "red"), ("█", "yellow"), ("█", "green"))

_WIDE: Final = 160  # columns with room for whole peer ids
_MAX_CELLS: Final = 128
_NAME_CHARACTERS: Final = 40
_ERROR_CHARACTERS: Final = 300

_FIXED: Final = ("peer", "blocks", "state", "rate", "relay", "connected", "cache")
_COLUMNS: Final = (
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
    checks: Mapping[PeerId, Check] | None,
    *,
    left_out: int = 0,
) -> None:
    """Print one network: a header, then its models. ``checks`` is None if nobody was dialled."""
    out.print(Text(f"{network}: {counted(len(models), 'model')}", style="bold"))
    if left_out:
        out.print(Text(f"{left_out} more are registered: see one with --model"))
    for surveyed in models:
        out.print()
        print_model(out, surveyed, checks)


def print_model(out: Console, surveyed: SurveyedModel, checks: Mapping[PeerId, Check] | None) -> None:
    model, coverage = surveyed.model, surveyed.coverage
    page = "" if model.repository is None else f", {printable(model.repository, limit=120)}"
    title = Text(printable(model.prefix, limit=120), style="bold")
    out.print(title.append(f"  {counted(model.num_blocks, 'block')}{page}", style="default"))
    if surveyed.error:
        out.print(Text(printable(f"its records could not be read: {surveyed.error}")))
        return
    size, bar = draw_bar(coverage, out)
    out.print(Text("0 ").append_text(bar).append(f" {model.num_blocks}"))
    if size > 1:
        out.print(Text(f"a cell is {size} blocks, drawn as the worst of them"))
    out.print(Text(gaps_in_words(coverage)))
    if surveyed.spans:
        rows = [_row(span, checks, whole_ids=out.width >= _WIDE) for span in surveyed.spans]
        print_table(out, _COLUMNS, rows, fixed=_FIXED)
    for span in surveyed.spans:
        check = None if checks is None else checks.get(span.peer)
        if check is not None and not check.reachable:
            out.print(Text(printable(f"not connected: {check.error}", limit=_ERROR_CHARACTERS)))


def draw_bar(coverage: Coverage, out: Console) -> tuple[int, Text]:
    """The blocks that one cell stands for, and the cells: in colour where there is any, else as characters."""
    room = out.width - len(f"0  {len(coverage.counts)}")
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


def _row(span: Span, checks: Mapping[PeerId, Check] | None, *, whole_ids: bool) -> list[str]:
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


def _connected(checks: Mapping[PeerId, Check] | None, peer: PeerId) -> str:
    check = None if checks is None else checks.get(peer)
    if check is None:
        return "not checked"
    if not check.reachable:
        return "no"
    found = "yes" if check.seconds is None else f"{check.seconds * 1e3:.1f} ms"
    return f"{found} by relay" if check.relayed else found
