"""docs/configuration.md is what scripts/config_reference.py makes of the schema, and its mistakes are told as shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import config_reference as reference
import pytest
from annotated_types import Ge, Gt, Le
from pydantic import BaseModel

from kwaainet_bridge.config import NodeConfig, parse_config
from kwaainet_bridge.errors import ConfigError

PAGE = reference.PAGE.read_text(encoding="utf-8")
KEYS = {key: (section, field) for key, section, field in reference.keys(NodeConfig)}


def test_the_page_is_what_the_schema_says():
    assert reference.written(PAGE) == PAGE, "make it anew: .venv/bin/python scripts/config_reference.py"


def test_each_key_has_one_row():
    rows = re.findall(r"^\| `([\w.]+)` \|", PAGE, re.MULTILINE)
    assert sorted(rows) == sorted(KEYS)


@pytest.mark.parametrize("words", [reference.WORDS, reference.KINDS], ids=["WORDS", "KINDS"])
def test_no_word_is_kept_for_a_key_that_has_gone(words: dict[str, str]):
    assert set(words) <= set(KEYS)


@pytest.mark.parametrize("key", reference.WORDS)
def test_words_stand_only_where_a_value_would_tell_nothing(key: str):
    default = KEYS[key][1].default
    assert default is None or isinstance(default, tuple)


class Example(BaseModel):
    told: int = 0
    """In ``code``, a|b; see docs/engine.md#adapters,
    docs/configuration.md#several-models and docs/loading.md."""
    untold: int = 0


def test_a_docstring_becomes_a_description():
    assert reference.description("x.told", Example) == (
        r"In `code`, a\|b; see [engine.md](engine.md#adapters), [below](#several-models) and [loading.md](loading.md)."
    )


def test_a_key_without_a_docstring_is_named():
    with pytest.raises(reference.CannotWrite, match=r"x\.untold has no docstring"):
        reference.description("x.untold", Example)


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Annotated[int, Gt(0)] | None, "integer above 0"),
        (Annotated[float, Ge(0)], "number, 0 or more"),
        (Annotated[int, Ge(2), Le(9)], "integer, 2 to 9"),
        (Annotated[float, Ge(0)] | Literal["auto"], "number, 0 or more, or `auto`"),
        (Literal["a", "b"], "`a`, `b`"),
        (tuple[str, ...], "list of texts"),
        (tuple[Literal["a", "b"], ...], "list of `a`, `b`"),
        (bool, "`true`, `false`"),
        (Path | None, "path"),
        (Example | None, "section or null"),
        (tuple[Example, ...], "list of sections"),
    ],
    ids=str,
)
def test_what_values_may_be_is_told_in_words(annotation: object, words: str):
    assert reference.kind(annotation) == words


def test_values_without_words_are_told_of():
    with pytest.raises(reference.CannotWrite, match="add the key to KINDS"):
        reference.kind(dict[str, int])


def test_marks_that_name_no_section_or_leave_one_out_are_told_of():
    with pytest.raises(reference.CannotWrite, match="'lgo'"):
        reference.written(PAGE + "<!-- keys: lgo -->\n<!-- end -->\n")
    with pytest.raises(reference.CannotWrite, match="no table for log"):
        reference.written(PAGE.replace("<!-- keys: log -->", ""))


def test_the_mistakes_are_told_as_shown():
    with pytest.raises(ConfigError) as caught:
        parse_config("lissten: []\nmodel: {dtpe: x, blocks: 4:8}", "node.yaml")
    assert f"```\nerror: {caught.value}\n```" in PAGE
