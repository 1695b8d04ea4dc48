"""What lies between averagers in simulated time: a queue of events, links with delays, and a DHT.

Nothing here waits or does I/O: ``Network.run`` takes the next event and sets the time to its moment. One seed gives
the same run again.

A link between two peers has a delay of its own, drawn once between the least and the greatest, and each message takes
up to a fifth longer. An operation on the DHT takes three round trips (two of search, one to the nodes that keep the
key): what it reads or stores is that of the moment in which its last question arrives.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kwaainet_bridge.wire.peer_id import PeerId

START = 1.7e9
JITTER = 0.2
SEARCH_ROUND_TRIPS = 2


@dataclass(frozen=True)
class Delays:
    """One way, in seconds: the least and the greatest delay of a link."""

    least: float
    greatest: float

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.greatest:
            raise ValueError(f"delays from {self.least} to {self.greatest} s: must be positive and in order")


class Network:
    """The time, what is to come, and how long messages take."""

    def __init__(self, delays: Delays, rng: random.Random) -> None:
        self.now = START
        self.rng = rng
        self.events = 0
        self._delays = delays
        self._links: dict[tuple[PeerId, PeerId], float] = {}
        self._queue: list[tuple[float, int, Callable[..., Any], tuple[Any, ...]]] = []
        self._number = 0

    def at(self, moment: float, function: Callable[..., Any], *arguments: Any) -> None:
        """Call ``function`` at ``moment``; of one moment's events, those that were asked for first come first."""
        self._number += 1
        heapq.heappush(self._queue, (max(moment, self.now), self._number, function, arguments))

    def after(self, seconds: float, function: Callable[..., Any], *arguments: Any) -> None:
        self.at(self.now + seconds, function, *arguments)

    def run(self, until: float) -> None:
        """Have everything happen that happens until then, and what follows from it."""
        while self._queue and self._queue[0][0] <= until:
            self.now, _, function, arguments = heapq.heappop(self._queue)
            self.events += 1
            function(*arguments)
        self.now = max(self.now, until)

    def delay(self, sender: PeerId, receiver: PeerId) -> float:
        """How long one message takes now."""
        link = (min(sender, receiver), max(sender, receiver))
        if link not in self._links:
            self._links[link] = self._draw()
        return self._links[link] * self.rng.uniform(1.0, 1.0 + JITTER)

    def round_trip(self) -> float:
        """Of a call to some node of the DHT."""
        return self._draw() + self._draw()

    def _draw(self) -> float:
        return self.rng.uniform(self._delays.least, self._delays.greatest)


class Dht:
    """Dictionaries under keys: each peer has an entry with an expiration, and later ones replace earlier ones."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._records: dict[str, dict[PeerId, tuple[float, bool]]] = {}

    def store(self, key: str, peer: PeerId, value: bool, expiration: float) -> None:
        """It is there some time later."""
        self._network.after(self._on_the_way(), self._keep, key, peer, value, expiration)

    def read(self, key: str, answer: Callable[[list[tuple[PeerId, float]]], None]) -> None:
        """Give ``answer`` the peers whose value is true, and the expirations, some time later."""
        self._network.after(self._on_the_way(), self._look_up, key, answer)

    def _on_the_way(self) -> float:
        """Until the last question arrives."""
        return sum(self._network.round_trip() for _ in range(SEARCH_ROUND_TRIPS)) + self._back()

    def _back(self) -> float:
        return self._network.round_trip() / 2

    def _keep(self, key: str, peer: PeerId, value: bool, expiration: float) -> None:
        entries = self._records.setdefault(key, {})
        former = entries.get(peer)
        if expiration > self._network.now and (former is None or former[0] < expiration):
            entries[peer] = (expiration, value)

    def _look_up(self, key: str, answer: Callable[[list[tuple[PeerId, float]]], None]) -> None:
        entries = self._records.get(key, {})
        for peer in [peer for peer, (expiration, _) in entries.items() if expiration <= self._network.now]:
            del entries[peer]
        found = [(peer, expiration) for peer, (expiration, value) in entries.items() if value]
        self._network.after(self._back(), answer, found)
