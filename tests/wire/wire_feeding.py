"""Feed a sans-IO decoder in pieces and note everything that came of it."""

from __future__ import annotations

import itertools
from typing import Any, Protocol

from hypothesis import settings
from hypothesis import strategies as st

from kwaainet_bridge.errors import RemoteError

QUICK = settings(max_examples=60, deadline=None, database=None)


class Decoder(Protocol):
    def feed(self, data: bytes, /) -> list[Any]: ...
    def finish(self) -> None: ...


def outcome(decoder: Decoder, pieces: list[bytes]) -> tuple[list[Any], str | None]:
    """All messages, and the error that ended the stream if there was one."""
    messages: list[Any] = []
    try:
        for piece in pieces:
            messages += decoder.feed(piece)
        decoder.finish()
    except RemoteError as e:
        return messages, str(e)
    return messages, None


def cut(data: bytes, positions: list[int]) -> list[bytes]:
    edges = [0, *sorted(p % (len(data) + 1) for p in positions), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


cuts = st.lists(st.integers(0, 1 << 16), max_size=12)
