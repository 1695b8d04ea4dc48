"""A token that HTTP clients must send: read from its file, compared in constant time."""

from __future__ import annotations

import hmac
from pathlib import Path

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import ConfigError


def read_token(path: Path, *, key: str) -> str:
    """The token in a file, without the blanks around it. ``key`` is the configuration's, for errors.

    Raises ConfigError for a file that cannot be read or that others can read, and for a token that is too short or has
    other than visible ASCII characters.
    """
    try:
        mode = path.stat().st_mode
        token = path.read_text(encoding="ascii").strip()
    except OSError as e:
        raise ConfigError(f"{key}: {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{key}: {path}: not ASCII text") from e
    if mode & 0o077:
        raise ConfigError(f"{key}: {path} can be used by others (mode {mode & 0o777:o}): chmod 600 it")
    if len(token) < defaults.WEB_TOKEN_CHARACTERS or not all("!" <= c <= "~" for c in token):
        raise ConfigError(
            f"{key}: {path} must hold at least {defaults.WEB_TOKEN_CHARACTERS} visible characters without "
            f"a blank: openssl rand -hex 32 > {path}"
        )
    return token


def bearer(token: str) -> str:
    """The value of the ``Authorization`` header that carries ``token``."""
    return f"Bearer {token}"


def admits(token: str, authorization: str) -> bool:
    """Whether an ``Authorization`` header carries ``token``; takes as long whatever is wrong with it."""
    return hmac.compare_digest(bearer(token).encode(), authorization.encode("utf-8", "surrogateescape"))
