"""Reading a configuration: YAML in, a checked NodeConfig or every mistake with its remedy out."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import (
    BaseModel,
    ValidationError,
)

from kwaainet_bridge.admin_address import UNIX_PREFIX, UnixAddress, parse_admin_address
from kwaainet_bridge.config.layouts import check_layout
from kwaainet_bridge.config.schema import NodeConfig
from kwaainet_bridge.config.several import pick_model
from kwaainet_bridge.config.values import EMBEDDED_MODEL
from kwaainet_bridge.config.work import ModelConfig
from kwaainet_bridge.errors import ConfigError


def parse_config(
    text: str, source: str, overrides: dict[str, Any] | None = None, *, folder: Path | None = None
) -> NodeConfig:
    """Read a configuration. ``overrides`` (nested like the YAML) replace its values.

    Those of ``model`` make it one of a single model: of ``models`` the one that they name, folders of which are
    relative to ``folder``.

    Raises ConfigError that lists every mistake with its key and the remedy.
    """
    raw = _keys_of(text, source)
    check_layout(raw, source)
    asked = (overrides or {}).get("model")
    if asked and isinstance(raw.get("models"), list) and raw.get("model") is None:
        raw = pick_model(raw, asked, folder)
    try:
        return NodeConfig.model_validate(merge_settings(raw, overrides or {}))
    except ValidationError as e:
        mistakes = "".join(f"\n  {mistake}" for mistake in _explain(e.errors()))
        raise ConfigError(f"{source}:{mistakes}") from e


def load_config(path: Path, overrides: dict[str, Any] | None = None) -> NodeConfig:
    """Read a configuration file; relative paths in it are relative to its folder. Raises ConfigError."""
    return anchored(parse_config(_text_of(path), str(path), overrides, folder=path.parent), path.parent)


def read_yaml(path: Path) -> tuple[str, dict[str, Any]]:
    """A file's text and its keys, of any layout, right or wrong. Raises ConfigError for what has none."""
    text = _text_of(path)
    return text, _keys_of(text, str(path))


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(
            f"{path}: {e.strerror}; `kwaainet-bridge init` writes a configuration to start from"
        ) from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: not UTF-8 text") from e


def _keys_of(text: str, source: str) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as e:  # the latter for dates and numbers that are none
        raise ConfigError(f"{source}: not YAML: {e}") from e
    except RecursionError as e:
        raise ConfigError(f"{source}: not YAML: it is nested too deeply") from e
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: expected keys and values, found {type(raw).__name__}")
    return raw


def anchored(config: NodeConfig, folder: Path) -> NodeConfig:
    """The same configuration with its paths made absolute: from ``folder``, ~ from the home folder.

    The name of a model or an adapter is a path if it looks like one, or if there is such a folder. Raises ConfigError
    for one that looks like a path where there is none.
    """
    path = _absolute("identity.path", config.identity.path, folder)
    identity = config.identity.model_copy(update={"path": path})
    model = None if config.model is None else _anchored_model("model", config.model, folder)
    models = tuple(_anchored_model("models", model, folder) for model in config.models)
    admin = config.admin
    address = parse_admin_address(admin.listen)
    if isinstance(address, UnixAddress) and address.path is not None:
        listen = f"{UNIX_PREFIX}{_absolute('admin.listen', address.path, folder)}"
        admin = admin.model_copy(update={"listen": listen})
    if admin.token_file is not None:
        token_file = _absolute("admin.token_file", admin.token_file, folder)
        admin = admin.model_copy(update={"token_file": token_file})
    sources = [
        name if name == EMBEDDED_MODEL else _source("openai.models", name, folder)
        for name in config.openai.models
    ]
    openai = config.openai.model_copy(update={"models": tuple(sources)})
    if openai.token_file is not None:
        token_file = _absolute("openai.token_file", openai.token_file, folder)
        openai = openai.model_copy(update={"token_file": token_file})
    address = parse_admin_address(openai.listen)
    if isinstance(address, UnixAddress) and address.path is not None:
        listen = f"{UNIX_PREFIX}{_absolute('openai.listen', address.path, folder)}"
        openai = openai.model_copy(update={"listen": listen})
    changed = {"identity": identity, "model": model, "models": models, "admin": admin, "openai": openai}
    return config.model_copy(update=changed)


def _anchored_model(key: str, model: ModelConfig, folder: Path) -> ModelConfig:
    names: dict[str, Any] = {
        "adapters": tuple(_source(f"{key}.adapters", name, folder) for name in model.adapters)
    }
    if model.name != EMBEDDED_MODEL:
        names["name"] = _source(f"{key}.name", model.name, folder)
    if model.cache_dir is not None:
        names["cache_dir"] = _absolute(f"{key}.cache_dir", model.cache_dir, folder)
    return model.model_copy(update=names)


def _source(key: str, name: str, folder: Path) -> str:
    """A hub repository's name as it is, a folder's absolute. Raises ConfigError for a folder that does not exist."""
    path = _absolute(key, Path(name), folder)
    try:
        if path.is_dir():
            return str(path)
    except OSError as e:
        raise ConfigError(f"{key}: {path}: {e.strerror}") from e
    if name.startswith(("/", "./", "../", "~")):
        raise ConfigError(f"{key}: there is no folder {path}")
    return name


def _absolute(key: str, path: Path, folder: Path) -> Path:
    try:
        return (folder / path.expanduser()).absolute()
    except RuntimeError as e:
        raise ConfigError(f"{key}: {path} is in the home folder of nobody here") from e


def merge_settings(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``over``, section by section."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, dict):
            merged[key] = merge_settings(below if isinstance(below, dict) else {}, value)
        else:
            merged[key] = value
    return merged


_EXPECTED: Final = "Input should be "


def _explain(errors: Iterable[Any]) -> Iterator[str]:
    """Each mistake as "key: what is wrong; what to do (found what)"."""
    for location, group in itertools.groupby(errors, key=_location):
        alternatives = list(group)  # a value that is none of several types is reported once for each
        first, *others = (_wrong(location, error) for error in alternatives)
        message = " or ".join([first, *(other.removeprefix(_EXPECTED) for other in others)])
        found = alternatives[0].get("input")
        shown = (
            "" if "unknown key" in message or isinstance(found, dict | BaseModel) else f" (found {found!r})"
        )
        yield f"{'.'.join(location) or 'configuration'}: {message}{shown}"


def _location(error: Any) -> list[str]:
    # behind a key pydantic names the alternatives of its type, which mean nothing to a reader
    return list(itertools.takewhile(lambda part: re.fullmatch(r"[a-z_0-9]+", part), map(str, error["loc"])))


def _wrong(location: Sequence[str], error: Any) -> str:
    match error["type"]:
        case "extra_forbidden":
            known = _keys_at(location[:-1])
            close = difflib.get_close_matches(location[-1], known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
            return f"unknown key; {hint}"
        case "model_type":
            return f"holds keys and values ({', '.join(_keys_at(location))}), or is left out"
        case "tuple_type":
            return "must be a list: each value on a line of its own after a dash, or in brackets"
        case "float_parsing" | "float_type":
            return f"{_EXPECTED}a number"
    return str(error["msg"]).removeprefix("Value error, ")


def _keys_at(location: Sequence[str]) -> list[str]:
    """The keys that the schema knows below ``location``."""
    section: Any = NodeConfig
    for part in location:
        if part.isdigit():
            continue  # an entry of a list, whose section the annotation of the list names
        annotation = section.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(section.model_fields)
