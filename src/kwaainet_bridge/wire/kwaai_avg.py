"""The ids of ``/kwaai/avg/1.0.0``, see docs/protocols/kwaai-avg.md. Its messages are those of wire/averaging.py."""

from __future__ import annotations

import re
from typing import Final

PROTOCOL: Final = "/kwaai/avg/1.0.0"

_PREFIX: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_prefix(prefix: str) -> None:
    """Raises ValueError for a run's prefix that cannot be part of its calls' ids."""
    if not _PREFIX.fullmatch(prefix):
        raise ValueError(
            f"averaging prefix {prefix!r}: must be 1 to 64 letters, digits, underscores and hyphens"
        )


def run_name(prefix: str) -> str:
    """What the ids of a run's calls and its keys in the DHT begin with. Raises ValueError."""
    check_prefix(prefix)
    return f"{PROTOCOL}/{prefix}"
