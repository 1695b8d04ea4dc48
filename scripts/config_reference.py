"""Write the tables of docs/configuration.md from the configuration's schema: ``make docs`` calls it.

Each key's row has what its class says: the kind of its values, its default, and the docstring under it. There ``a``
stands for code, and ``docs/engine.md#adapters`` for a link. A new key needs its docstring and nothing here, unless its
annotation says too little (``KINDS``) or leaving it out means something else than none (``WORDS``).
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kwaainet_bridge.config import PRESETS, NodeConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

KINDS = {
    "listen": "list of addresses",
    "announce": "list of addresses",
    "networks.petals.bootstrap": "list of addresses or presets",
    "networks.kwaainet.bootstrap": "list of addresses or presets",
    "reachability.relays": "list of addresses",
    "protocols.kwaai_mux.endpoint": "address",
    "protocols.kwaai_mux.paths": "list of paths",
    "model.blocks": '`"first:end"` or `auto`',
    "model.rebalance_seconds": "number, 0 or more, or `off`",
    "model.shares": "peer ids and numbers above 0",
    "averaging.runs.prefix": "text without a dot",
    "averaging.runs.group_bits": "zeros and ones",
    "averaging.peers": "list of peer ids",
    "peers.allow": "list of peer ids",
    "peers.deny": "list of peer ids",
    "admin.listen": "`unix`, `unix:<path>`, `<IP address>:<port>` or `off`",
    "openai.listen": "`<IP address>:<port>`, `unix:<path>` or `off`",
}
"""What values are, where the annotation does not tell."""

WORDS = {
    "networks.kwaainet.bootstrap": "preset `kwaainet-public`",
    "networks.kwaainet.dht_prefix": "derived",
    "model.blocks": "all",
    "model.dht_prefix": "derived",
    "model.threads": "torch's choice",
    "model.cache_dir": "user's cache",
    "limits.connections_high": "80 %",
    "limits.connections_low": "60 %",
    "limits.strangers": "10 %",
}
"""What is said in place of a default."""

TABLE = re.compile(r"<!-- keys: ([\w ]+) -->\n(?:.*\n)*?<!-- end -->\n")
PRESET_LISTS = re.compile(r"<!-- presets -->\n(?:.*\n)*?<!-- end -->\n")


class CannotWrite(Exception):
    """The page cannot be written; the text names the key or the mark, and what to do."""


def keys(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel], FieldInfo]]:
    """Each key with a value, and each section that may be off; those of ``models`` are told as those of ``model``."""
    for name, field in section.model_fields.items():
        key = f"{path}{name}"
        below = section_in(field.annotation)
        if below is None or key == "models" or is_optional(field.annotation):
            yield key, section, field
        if below is not None and key != "models":
            yield from keys(below, f"{key}.")


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds, or holds several of."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def is_optional(annotation: Any) -> bool:
    return type(None) in get_args(annotation)


def kind(annotation: Any, bounds: tuple[Any, ...] = ()) -> str:
    """What values may be, in words; ``bounds`` are the field's own metadata."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(parts[0], (*bounds, *parts[1:]))
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in parts)
    if origin in {Union, types.UnionType}:
        *first, last = [kind(part, bounds) for part in parts if part is not type(None)]
        if section_in(annotation):
            return f"{last} or null"
        return f"{', '.join(first)}, or {last}" if first else last
    if origin is tuple:
        return f"list of {several(parts[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    words = {bool: "`true`, `false`", int: "integer", float: "number", Path: "path", str: "text"}.get(
        annotation
    )
    if words is None:
        raise CannotWrite(f"no words for values of {annotation}: add the key to KINDS")
    return words + range_of(bounds)


def several(annotation: Any) -> str:
    words = kind(annotation)
    return f"{words}s" if words in {"text", "path", "section"} else words


def range_of(bounds: tuple[Any, ...]) -> str:
    limits = {
        name: getattr(bound, name)
        for bound in flat(bounds)
        for name in ("gt", "ge", "le")
        if hasattr(bound, name)
    }
    limits = {name: value for name, value in limits.items() if value is not None}
    match limits:
        case {"ge": least, "le": most}:
            return f", {least} to {most}"
        case {"ge": least}:
            return f", {least} or more"
        case {"gt": least}:
            return f" above {least}"
    return ""


def flat(bounds: tuple[Any, ...]) -> Iterator[Any]:
    for bound in bounds:
        yield from bound.metadata if isinstance(bound, FieldInfo) else (bound,)


def default(key: str, field: FieldInfo) -> str:
    if key in WORDS:
        return WORDS[key]
    value = field.default
    if field.is_required():
        return "required"
    if section_in(field.annotation) and key not in {"model", "models"}:
        return "off" if value is None else "on"
    if value is None or value in ((), {}):
        return "none"
    if value == "":
        return "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return ", ".join(f"`{item}`" for item in (value if isinstance(value, tuple) else (value,)))


@cache
def docstrings(section: type[BaseModel]) -> dict[str, str]:
    """The texts under a section's keys, each in one line."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for statement, after in zip(definition.body, definition.body[1:], strict=False):
        match statement, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found


def description(key: str, section: type[BaseModel]) -> str:
    text = docstrings(section).get(key.rpartition(".")[2])
    if text is None:
        raise CannotWrite(f"{key} has no docstring: write one under it in {section.__module__}")
    return links(text.replace("``", "`").replace("|", r"\|"))


def links(text: str) -> str:
    def link(match: re.Match[str]) -> str:
        page, anchor = match[1], match[2] or ""
        if page == PAGE.name:
            return f"[below]({anchor})"
        return f"[{page.rpartition('/')[2]}]({page}{anchor})"

    return re.sub(r"docs/([\w/-]+\.md)(#[\w-]+)?", link, text)


def row(key: str, section: type[BaseModel], field: FieldInfo) -> str:
    values = KINDS.get(key) or kind(field.annotation, tuple(field.metadata))
    return f"| `{key}` | {values} | {default(key, field)} | {description(key, section)} |\n"


def table(name: str) -> str:
    """The keys of one section; those outside of sections are called ``the node``."""
    rows = [row(*found) for found in keys(NodeConfig) if section_of_page(found[0]) == name]
    if not rows:
        raise CannotWrite(f"no section is called {name!r}: correct the mark in {PAGE.name}")
    return "".join(["| key | values | default | meaning |\n", "|---|---|---|---|\n", *rows])


def section_of_page(key: str) -> str:
    return key.partition(".")[0] if "." in key else "the node"


def written(page: str) -> str:
    """The page with its tables and lists of presets made anew; everything else stays."""
    presets = "\n".join(
        f"`{name}`:\n\n" + "".join(f"- `{address}`\n" for address in addresses)
        for name, addresses in PRESETS.items()
    )
    page = TABLE.sub(lambda mark: f"<!-- keys: {mark[1]} -->\n{table(mark[1])}<!-- end -->\n", page)
    marks = TABLE.findall(page)
    if missing := {section_of_page(key) for key, _, _ in keys(NodeConfig)} - set(marks):
        raise CannotWrite(
            f"{PAGE.name} has no table for {', '.join(sorted(missing))}: add <!-- keys: … --> and <!-- end -->"
        )
    return PRESET_LISTS.sub(lambda _: f"<!-- presets -->\n{presets}<!-- end -->\n", page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
