"""Trying again: pauses between failures, and when to give up."""

from __future__ import annotations

import logging

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, NoRoute, RemoteError
from kwaainet_bridge.hivemind.client.routing import Hop, Server, block_list, retry_delay
from kwaainet_bridge.hivemind.client.swarm import Swarm

log = logging.getLogger(__name__)

RECOVERABLE = (NetworkError, RemoteError)
"""What another server, or the same one a little later, may not suffer from."""


class Attempts:
    """The failures in a row over one range of blocks.

    They come in rounds: as long as each failure is another server's, the next one is tried at once.
    """

    def __init__(self, swarm: Swarm, blocks: range) -> None:
        self._swarm = swarm
        self._blocks = blocks
        self._failures = 0
        self._rounds = 0
        self._failed_in_round: set[Server] = set()

    async def failed(self, hop: Hop | None, error: Exception) -> None:
        """Note that ``hop`` failed, or (None) that there was no route, and pause before the next try.

        Raises NoRoute with the last error's text after ``defaults.MAX_ATTEMPTS`` rounds.
        """
        self._failures += 1
        if hop is not None:
            self._swarm.note_failure(hop, error)
        is_new_round = self._begins_round(hop)
        if self._rounds >= defaults.MAX_ATTEMPTS:
            raise NoRoute(
                f"{self._swarm.prefix}: gave up on blocks {block_list(self._blocks)} after {self._failures} "
                f"attempts, the last: {error}",
                blocks=self._blocks,
            ) from error
        pause = retry_delay(self._rounds) if is_new_round else 0.0
        where = hop or block_list(self._blocks)
        log.warning("%s: blocks %s: %s (next try in %g s)", self._swarm.prefix, where, error, pause)
        await trio.sleep(pause)

    def _begins_round(self, hop: Hop | None) -> bool:
        failed = self._failed_in_round
        if failed and hop is not None and hop.key not in failed and len(failed) < defaults.MAX_ATTEMPTS:
            failed.add(hop.key)
            return False
        self._failed_in_round = set() if hop is None else {hop.key}
        self._rounds += 1
        return True
