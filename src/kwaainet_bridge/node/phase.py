"""The phases that a node and each of its models pass through, and what is kept of announcements."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kwaainet_bridge.node.announcing import AnnounceReport


class Phase(enum.StrEnum):
    STARTING = "starting"
    BOOTSTRAPPING = "bootstrapping"
    LOADING = "loading"
    SERVING = "serving"
    PAUSED = "paused"
    DRAINING = "draining"
    STOPPED = "stopped"


def of_all(phases: Iterable[Phase], *, paused: bool = False) -> Phase:
    """The phase of a node whose models are in these: it serves if any of them does, or if there is none.

    ``paused``: it is to take no work, which a node without models does at once.
    """
    found = set(phases)
    if not found:
        return Phase.PAUSED if paused else Phase.SERVING
    order = (Phase.SERVING, Phase.PAUSED, Phase.DRAINING)
    return next((phase for phase in order if phase in found), Phase.LOADING)


@dataclass(slots=True)
class Announced:
    """The rounds of announcements in one network: the latest, when it ended, and sums over all."""

    last: AnnounceReport
    at: float
    rounds: int = 0
    records: int = 0
    acknowledged: int = 0
    by_others: int = 0

    def add(self, report: AnnounceReport, now: float) -> None:
        self.last, self.at = report, now
        self.rounds += 1
        self.records += report.records
        self.acknowledged += report.acknowledged
        self.by_others += report.by_others
