"""What happened to a node lately, for people who look at it: the newest events, and no more of them than fit."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from kwaainet_bridge import defaults


@dataclass(frozen=True, slots=True)
class Event:
    """``at`` is in unix time; ``kind`` one of a few words; ``text`` may hold what peers said."""

    at: float
    kind: str
    text: str


class Events:
    """The newest ``defaults.EVENTS_KEPT`` events, oldest first; ``noted`` counts all there ever were."""

    def __init__(self) -> None:
        self._kept: deque[Event] = deque(maxlen=defaults.EVENTS_KEPT)
        self.noted = 0

    def add(self, event: Event) -> None:
        self._kept.append(event)
        self.noted += 1

    def __iter__(self) -> Iterator[Event]:
        return iter(self._kept)
