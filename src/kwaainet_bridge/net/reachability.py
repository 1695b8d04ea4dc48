"""Whether this host can be dialled: one verdict, from what peers found when they tried. No I/O.

A host that listens may be public, sit behind a router that forwards nothing, or announce an address that leads
nowhere; it cannot know by itself.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.net.addresses import Address
from kwaainet_bridge.wire.peer_id import PeerId

_FAILURES_TO_LOSE: Final = 2
"""Failed checks after which a host that was public no longer is."""


class Verdict(enum.StrEnum):
    UNKNOWN = "unknown"
    """Nobody was asked yet, or nobody could tell."""
    PUBLIC = "public"
    """Peers dial it."""
    RELAYED = "relayed"
    """Peers do not get through to it, and reach it through relays."""
    UNREACHABLE = "unreachable"
    """Peers do not get through to it, and no relay has a place for it."""


@dataclass(frozen=True, slots=True)
class Check:
    """What ``by`` found when it dialled this host: ``method`` names how it was asked.

    ``outside``: whether it is seen at a public address. ``address`` is where it got through, if it says so; ``at`` in
    seconds of the trio clock.
    """

    by: PeerId
    method: str
    reachable: bool
    outside: bool
    at: float
    address: Address | None = None


class Reachability:
    """Weighs checks. Each peer counts once, with its latest check; those half an hour older than the last one no
    longer. While there are no new ones the verdict stands: that nobody can tell any more is no news. Peers inside the
    same private network get through where nobody else does, so they only count while no peer outside has tried.

    Half of them make a host public, as in stock Petals. A host that was public is only called private after two
    checks have failed: one may have met a bad moment of the line. ``relays`` is the number of places held at relays,
    to be kept up by the owner. ``listens``: a host that does not needs no check.
    """

    def __init__(self, *, listens: bool, clock: Callable[[], float] = trio.current_time) -> None:
        self.relays = 0
        self._listens = listens
        self._clock = clock
        # apart, so that many neighbours do not make it forget those outside
        self._checks: dict[bool, deque[Check]] = {
            outside: deque(maxlen=defaults.REMEMBERED_CHECKS) for outside in (True, False)
        }
        self._was_public = False
        self._moved_at = -math.inf

    def note(self, check: Check) -> None:
        """Take in a check."""
        if check.outside and not any(other.outside for other in self._counted()):
            self._was_public = False  # in the eyes of neighbours only
        self._checks[check.outside].append(check)
        self._was_public = self._direct() is True

    def moved(self) -> None:
        """Note that this host's addresses are others now: checks from before count only until there is one since."""
        self._moved_at = self._clock()

    @property
    def verdict(self) -> Verdict:
        direct = self._direct()
        if direct is None:
            return Verdict.UNKNOWN
        if direct:
            return Verdict.PUBLIC
        return Verdict.RELAYED if self.relays else Verdict.UNREACHABLE

    @property
    def in_doubt(self) -> bool:
        """Whether it is called public though most checks failed: one failure more ends that."""
        failures = sum(not check.reachable for check in self._counted())
        return self._was_public and failures < _FAILURES_TO_LOSE and not self._most_got_through()

    def _direct(self) -> bool | None:
        """Whether it can be dialled without a relay; None if that is not known."""
        if not self._listens:
            return False
        if not self._counted():
            return None
        return self._most_got_through() or self.in_doubt

    def _most_got_through(self) -> bool:
        latest = {check.by: check.reachable for check in self._counted()}
        return 2 * sum(latest.values()) >= len(latest)

    def _counted(self) -> list[Check]:
        """The checks that count, in order."""
        latest = max((checks[-1].at for checks in self._checks.values() if checks), default=-math.inf)
        # not by the clock: a verdict stands as it was while nobody can tell
        oldest = latest - defaults.CHECK_LIFETIME_SECONDS
        if latest >= self._moved_at:
            oldest = max(oldest, self._moved_at)
        recent = {outside: [c for c in checks if c.at >= oldest] for outside, checks in self._checks.items()}
        return recent[True] or recent[False]

    @property
    def proved(self) -> list[Address]:
        """Addresses at which peers got through lately, the latest first."""
        found = (check.address for check in reversed(self._counted()) if check.reachable)
        return list(dict.fromkeys(address for address in found if address is not None))

    @property
    def evidence(self) -> str:
        """Why the verdict is what it is, for people."""
        relays = f"; places at {self.relays} relays" if self.relays else ""
        if not self._listens:
            return f"it does not listen{relays}"
        counted = self._counted()
        if not counted:
            return f"no peer has tried to dial it yet{relays}"
        latest = {check.by: check for check in counted}
        through = [check for check in latest.values() if check.reachable]
        where = f" at {self.proved[0]}" if self.proved else ""
        ago = self._clock() - counted[-1].at
        methods = ", ".join(sorted({check.method for check in latest.values()}))
        whence = "peers" if counted[0].outside else "peers of its own network"
        return (
            f"{len(through)} of {len(latest)} {whence} got through{where} ({methods}), "
            f"the last tried {ago:.0f} s ago{relays}"
        )
