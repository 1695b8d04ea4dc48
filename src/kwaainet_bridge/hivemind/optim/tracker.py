"""Tells a run's other peers in the DHT how far this one is, and reads how far they are."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio
from cryptography.hazmat.primitives.asymmetric import rsa

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.dht import DhtNode, RsaSignatureValidator
from kwaainet_bridge.hivemind.dht.rsa_keys import generate_key
from kwaainet_bridge.hivemind.dht.signatures import owner_marker
from kwaainet_bridge.hivemind.optim.progress import Progress, progress_key, run_validators

log = logging.getLogger(__name__)


class ProgressTracker:
    """Keeps ``progress`` up to date while ``running()`` is entered.

    The DHT node gets the run's validators. ``key`` is that of the owner of this peer's report, a new one by default.
    ``clock`` tells unix time.
    """

    def __init__(
        self,
        dht: DhtNode,
        run_id: str,
        target_batch_size: int,
        *,
        client_mode: bool = False,
        key: rsa.RSAPrivateKey | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.progress = Progress(dht.peer_id.raw, target_batch_size, client_mode=client_mode, now=clock())
        self._dht = dht
        self._run_id = run_id
        self._dht_key = progress_key(run_id)
        self._key = key
        self._clock = clock
        self._paused = False
        self._resumed = trio.Event()
        self._changed = trio.Event()
        self._marker = b""
        self._expiration = 0.0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look at the run once, then follow it and report to it within the block. To be entered once.

        Leaving it takes this peer's report back. Cancelled: tries to, too, for ``TRAINING_GOODBYE_SECONDS``.
        """
        key = await trio.to_thread.run_sync(generate_key) if self._key is None else self._key
        self._marker = owner_marker(key)
        self._dht.add_validators(run_validators(self._run_id, RsaSignatureValidator(key)))
        await self._look()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell_all)
                nursery.start_soon(self._keep_looking)
                yield
                nursery.cancel_scope.cancel()
        finally:
            if self._expiration:
                with trio.move_on_after(defaults.TRAINING_GOODBYE_SECONDS) as goodbye:
                    goodbye.shield = True
                    await self._store(None)

    # --- this peer ----------------------------------------------------------------------------------------

    def accumulated(self, epoch: int, samples: int) -> None:
        """This peer has ``samples`` towards the end of ``epoch`` now."""
        self.progress.accumulated(epoch, samples, now=self._clock())
        self._tell()

    def begin_epoch(self, epoch: int) -> None:
        """This peer is in ``epoch`` now, without samples."""
        self.progress.begin_epoch(epoch, now=self._clock())
        self._tell()

    def _tell(self) -> None:
        self._changed.set()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave ``progress.swarm`` alone within the block, and do not count its time as work."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False
            self._resumed.set()
            self._resumed = trio.Event()
            self.progress.rate.restart(now=self._clock())

    async def _tell_all(self) -> None:
        while True:
            with trio.move_on_after(defaults.TRAINING_RECORD_SECONDS / 2):
                await self._changed.wait()
            self._changed = trio.Event()
            report = self.progress.to_tell()
            if report is not None:
                await self._store(report.model_dump())
                await trio.sleep(defaults.TRAINING_REPORT_SECONDS)

    async def _store(self, value: dict[str, object] | None) -> None:
        # of two records that expire at once the first one stays
        self._expiration = max(self._clock() + defaults.TRAINING_RECORD_SECONDS, self._expiration + 1e-3)
        result = await self._dht.store(self._dht_key, value, self._expiration, subkey=self._marker)
        if not result.ok:
            log.info("training %s: nobody took our report", self._run_id)

    # --- the run ------------------------------------------------------------------------------------------

    def ready(self) -> bool:
        """Whether the epoch of this peer has ended, for all that is known."""
        return self.progress.ready(now=self._clock())

    async def _keep_looking(self) -> None:
        while True:
            await trio.sleep(max(0.0, self.progress.swarm.next_look - self._clock()))
            while self._paused:
                await self._resumed.wait()
            await self._look()

    async def _look(self) -> None:
        epoch = self.progress.own.epoch
        found = await self._dht.get(self._dht_key, latest=True)
        if self._paused or self.progress.own.epoch != epoch:
            return  # it tells of an epoch that is over
        values = (
            [entry.value for entry in found.value.values()]
            if found is not None and found.is_dictionary
            else None
        )
        self.progress.look(values, now=self._clock())
