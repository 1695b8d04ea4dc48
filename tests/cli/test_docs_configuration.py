"""docs/configuration.md tells every key of the schema, its default and its choices, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from kwaainet_bridge.config import PRESETS, NodeConfig, parse_config
from kwaainet_bridge.errors import ConfigError

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")

# Where the page has a word instead of the value: what is left out, or too long for a table.
WORDS = {
    "announce": "none",
    "model": "none",
    "models": "none",
    "networks.petals": "on",
    "networks.petals.bootstrap": "none",
    "networks.kwaainet": "off",
    "networks.kwaainet.bootstrap": "preset `kwaainet-public`",
    "model.blocks": "all",
    "model.num_blocks": "none",
    "model.dht_prefix": "derived",
    "model.threads": "torch's choice",
    "model.offload_idle_seconds": "none",
    "model.public_name": "none",
    "limits.connections_high": "80 %",
    "limits.connections_low": "60 %",
    "limits.connections_per_network.petals": "none",
    "limits.connections_per_network.kwaainet": "none",
    "limits.strangers": "10 %",
    "reachability.relays": "none",
    "networks.kwaainet.dht_prefix": "derived",
    "protocols.kwaai_mux": "off",
    "protocols.kwaai_mux.endpoint": "required",
    "protocols.kwaai_mux.paths": "required",
    "averaging.runs.prefix": "required",
    "averaging.runs.target_group_size": "none",
    "averaging.runs.group_bits": "empty",
    "averaging.runs.bandwidth": "none",
    "averaging.runs.max_rms": "none",
    "averaging.peers": "none",
    "admin.token_file": "none",
    "model.adapters": "none",
    "model.shares": "none",
    "model.cache_dir": "user's cache",
    "model.cache_quota_gib": "none",
    "openai.token_file": "none",
    "openai.models": "none",
    "openai.requests_per_minute": "none",
}
VALUES_OF_WORDS = {"none": (None, (), {}), "off": (None,), "all": (None,), "derived": (None,)} | {
    "torch's choice": (None,),
    "user's cache": (None,),
    "80 %": (None,),
    "60 %": (None,),
    "10 %": (None,),
    "empty": ("",),
    "required": (PydanticUndefined,),
    "preset `kwaainet-public`": (PRESETS["kwaainet-public"],),
}


def section_of(annotation: Any) -> type[BaseModel] | None:
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def walk(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each key with a value, and each section that may be off: its path, its annotation and its default.

    The keys of ``models`` are told as those of ``model``.
    """
    for name, field in section.model_fields.items():
        key = f"{path}{name}"
        below = section_of(field.annotation)
        if below is None or type(None) in get_args(field.annotation) or key == "models":
            yield key, field.annotation, field.default
        if below is not None and key != "models":
            yield from walk(below, f"{key}.")


def choices(annotation: Any) -> set[str]:
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return {choice for part in get_args(annotation) for choice in choices(part)}


KEYS = {key: (annotation, default) for key, annotation, default in walk(NodeConfig)}
ROWS = {
    key: (kind, default)
    for key, kind, default in re.findall(r"^\| `([\w.]+)` \| ([^|]+) \| ([^|]+) \|", PAGE, re.MULTILINE)
}


def test_the_page_has_exactly_the_keys_of_the_schema():
    assert set(ROWS) == set(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_the_default_is_that_of_the_schema(key: str):
    default = KEYS[key][1]
    told = ROWS[key][1]
    if key in WORDS:
        assert told == WORDS[key]
        if told == "on":
            assert isinstance(default, BaseModel)
        else:
            assert default in VALUES_OF_WORDS[told]
    elif isinstance(default, tuple):
        assert told == ", ".join(f"`{item}`" for item in default)
    elif isinstance(default, bool):
        assert told == f"`{str(default).lower()}`"
    else:
        assert told == f"`{default}`"


@pytest.mark.parametrize("key", [key for key, (annotation, _) in KEYS.items() if choices(annotation)])
def test_the_choices_are_those_of_the_schema(key: str):
    assert set(re.findall(r"`([^`]+)`", ROWS[key][0])) == choices(KEYS[key][0])


def test_the_presets_are_told_in_full():
    for name, addresses in PRESETS.items():
        assert f"`{name}`:\n\n" + "".join(f"- `{address}`\n" for address in addresses) in PAGE


def test_the_examples_can_be_read():
    examples = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert examples
    for text in examples:
        parse_config(text, "docs/configuration.md")


def test_the_mistakes_are_told_as_shown():
    with pytest.raises(ConfigError) as caught:
        parse_config("lissten: []\nmodel: {dtpe: x, blocks: 4:8}", "node.yaml")
    assert f"```\nerror: {caught.value}\n```" in PAGE
