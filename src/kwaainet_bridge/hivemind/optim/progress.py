"""How far a training run is: what each peer reports, and what follows from all reports. No I/O; time is an argument.

A run is a row of epochs. An epoch ends when its peers have accumulated ``target_batch_size`` samples between them;
each peer tells its share in a record of its own in the DHT. Stock peers draw their conclusions by the same rules, so
that all end an epoch at about the same moment. Source: hivemind 1.1.12, ``optim/progress_tracker.py``,
``utils/performance_ema.py``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.dht import ProtectedSubkey, RsaSignatureValidator, SchemaValidator

log = logging.getLogger(__name__)

_LEAST_RATE: Final = 1e-20  # samples per second of a peer that has computed nothing yet, as stock has it
_Count = Annotated[
    int, Field(ge=0, le=2**53)
]  # what a float holds exactly: rates and ETAs are computed from these


class Report(BaseModel):
    """What one peer tells of itself: ``samples_accumulated`` towards the end of ``epoch``, at unix ``time``."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    peer_id: Annotated[bytes, Field(max_length=128)]
    epoch: _Count
    samples_accumulated: _Count
    samples_per_second: Annotated[float, Field(ge=0, le=1e15)]
    time: float
    client_mode: bool


class RunRecords(BaseModel):
    """A run's keys, below its prefix: ``{run_id}_progress``, a report by owner, None once the owner has left."""

    progress: dict[ProtectedSubkey, Report | None]


def progress_key(run_id: str) -> str:
    """The DHT key of a run's reports."""
    return f"{run_id}_progress"


def run_validators(
    run_id: str, signatures: RsaSignatureValidator
) -> tuple[SchemaValidator, RsaSignatureValidator]:
    """What nodes check a run's records with: each report fits and is signed by its owner.

    Stock nodes in the run have the same; they refuse other records.
    """
    return SchemaValidator({run_id: RunRecords}), signatures


def read_reports(values: Iterable[Any]) -> tuple[list[Report], int]:
    """The reports among ``values`` of the key, and how many were malformed. None counts as neither.

    Malformed ones are left out one by one; a stock peer stops following its run at the first.
    """
    reports: list[Report] = []
    malformed = 0
    for value in values:
        if value is None:
            continue
        try:
            reports.append(Report.model_validate(value))
        except ValidationError:
            malformed += 1
    return reports, malformed


class Rate:
    """Samples per second: a moving average of the seconds per sample, corrected for its start at zero."""

    def __init__(self, *, now: float, smoothing: float = defaults.TRAINING_RATE_SMOOTHING) -> None:
        self.per_second = _LEAST_RATE
        self._smoothing = smoothing
        self._average = 0.0
        self._updates = 0
        self._since = now

    @property
    def seconds(self) -> float | None:
        """The average seconds of one sample; None before the first."""
        return None if not self._updates else 1 / self.per_second

    def update(self, samples: float, *, now: float) -> None:
        """``samples`` took the time since the last call of any method here."""
        self.measured(samples, max(0.0, now - self._since))
        self._since = now

    def measured(self, samples: float, seconds: float) -> None:
        """``samples`` took ``seconds``."""
        self._average = self._smoothing * seconds / samples + (1 - self._smoothing) * self._average
        self._updates += 1
        corrected = self._average / (1 - (1 - self._smoothing) ** self._updates)
        self.per_second = 1 / max(corrected, _LEAST_RATE)

    def restart(self, *, now: float) -> None:
        """What passed until ``now`` was not spent on samples."""
        self._since = now


@dataclass(frozen=True, slots=True)
class SwarmProgress:
    """The run as the last look at its reports showed it, and what was added here since.

    ``samples`` are those of ``epoch``. ``peers`` counts all who report, this one too if it does; ``others`` are the
    same without it, ``clients`` those of them who cannot be called.
    ``end_of_epoch`` and ``next_look`` are unix seconds; the former is an estimate.
    """

    epoch: int
    samples: int
    peers: int
    others: int
    clients: int
    end_of_epoch: float
    next_look: float


class Progress:
    """One peer's view of its run.

    ``now`` is in unix seconds throughout. ``looked`` says whether the run's reports were read since this peer's epoch
    began.
    """

    def __init__(
        self,
        peer_id: bytes,
        target_batch_size: int,
        *,
        client_mode: bool = False,
        now: float,
        smoothing: float = defaults.TRAINING_RATE_SMOOTHING,
    ) -> None:
        if target_batch_size < 1:
            raise ValueError(f"target_batch_size is {target_batch_size}: it must be at least 1")
        self._peer_id = peer_id
        self._target = target_batch_size
        self._client_mode = client_mode
        self.rate = Rate(now=now, smoothing=smoothing)
        self.own = self._report(0, 0, now)
        self.swarm = self._alone(now)
        self.looked = False
        self._last_active = -math.inf  # the run's epoch when samples were last told
        self._reports: list[Report] = []
        self._doubt = (0, -math.inf)

    def _report(self, epoch: int, samples: int, now: float) -> Report:
        return Report(
            peer_id=self._peer_id,
            epoch=epoch,
            samples_accumulated=samples,
            samples_per_second=min(self.rate.per_second, 1e15),
            time=now,
            client_mode=self._client_mode,
        )

    # --- this peer ----------------------------------------------------------------------------------------

    def accumulated(self, epoch: int, samples: int, *, now: float) -> None:
        """This peer has ``samples`` towards the end of ``epoch`` now. Fewer than before: it began anew."""
        more = samples - self.own.samples_accumulated
        if epoch == self.own.epoch == self.swarm.epoch:
            self.swarm = replace(self.swarm, samples=self.swarm.samples + more)
        if more > 0:
            self.rate.update(more, now=now)
        else:
            self.rate.restart(now=now)
        self.own = self._report(epoch, samples, now)

    def begin_epoch(self, epoch: int, *, now: float) -> None:
        """This peer is in ``epoch`` now, without samples."""
        if epoch > self.swarm.epoch:
            self.swarm = replace(self.swarm, epoch=epoch, samples=0, end_of_epoch=math.inf)
        self.accumulated(epoch, 0, now=now)
        self.looked = False

    def to_tell(self) -> Report | None:
        """The report to store now, if any: peers without samples for more than an epoch do not count."""
        if self.own.samples_accumulated > 0:
            self._last_active = self.swarm.epoch
        return self.own if self._last_active >= self.swarm.epoch - 1 else None

    # --- the run ------------------------------------------------------------------------------------------

    def ready(self, *, now: float) -> bool:
        """Whether the epoch of this peer has ended, for all that is known."""
        return (
            self.swarm.epoch > self.own.epoch
            or self.swarm.samples >= self._target
            or now >= self.swarm.end_of_epoch
        )

    def end_of_epoch(self, *, now: float) -> float:
        """When the epoch of this peer ends, at least ``now``; an estimate."""
        return now if self.ready(now=now) else self.swarm.end_of_epoch

    def doubt(self, *, until: float, now: float) -> None:
        """Leave out the reports that are more than one epoch ahead until then: nobody has shown any such state.

        The same goes for later ones, as long as they are that far ahead.
        """
        ahead = [report.epoch for report in self._reports if report.epoch > self.own.epoch + 1]
        if ahead:
            self._doubt = (min(ahead), until)
            self.swarm = self._conclude(self._reports, now)

    def look(self, values: Iterable[Any] | None, *, now: float) -> None:
        """Take in the values of the run's key; None if there are none."""
        self.looked = True
        if values is None:
            self.swarm = self._alone(now)
            return
        reports, malformed = read_reports(values)
        if malformed:
            log.warning("training: %d malformed reports of other peers were left out", malformed)
        self._reports = reports
        self.swarm = self._conclude(reports, now)

    def _alone(self, now: float) -> SwarmProgress:
        missing = max(0, self._target - self.own.samples_accumulated)
        return SwarmProgress(
            self.own.epoch,
            self.own.samples_accumulated,
            peers=0,
            others=0,
            clients=0,
            end_of_epoch=now + missing / self.rate.per_second,
            next_look=now + defaults.TRAINING_LOOK_SECONDS,
        )

    def _conclude(self, reports: list[Report], now: float) -> SwarmProgress:
        doubtful, until = self._doubt
        if now < until:
            doubtful = max(doubtful, self.own.epoch + 2)
            reports = [report for report in reports if report.epoch < doubtful]
        # peers in client mode average with others only, so they begin no epoch
        epoch = max([self.own.epoch, *(report.epoch for report in reports if not report.client_mode)])
        current = [report for report in reports if report.epoch == epoch]
        samples = sum(report.samples_accumulated for report in current)
        by_now = samples + sum(_age(report, now) * report.samples_per_second for report in current)
        # those that are behind will soon be there and help
        rate = _LEAST_RATE + sum(report.samples_per_second for report in reports)
        seconds = max(0.0, self._target - by_now) / rate
        peers = len(reports)
        expected = max(peers + defaults.TRAINING_DRIFT_PEERS, peers * (1 + defaults.TRAINING_DRIFT_RATE))
        pause = min(
            max(seconds * peers / expected, defaults.TRAINING_LOOK_MIN_SECONDS),
            defaults.TRAINING_LOOK_MAX_SECONDS,
        )
        return SwarmProgress(
            epoch,
            samples,
            peers=peers,
            others=sum(report.peer_id != self._peer_id for report in reports),
            clients=sum(report.client_mode for report in reports),
            end_of_epoch=now + seconds,
            next_look=now + pause,
        )


def _age(report: Report, now: float) -> float:
    """Seconds since a report; it does not live longer than its record, whatever it says."""
    return min(max(0.0, now - report.time), defaults.TRAINING_RECORD_SECONDS)
