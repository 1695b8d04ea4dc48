"""A whole swarm for people who watch it: its models, their servers, and who of them can be reached.

Source of the registry: Petals main and 2.2.0.post1, ``server/server.py`` (``_petals.models``).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import (
    ConfigError,
    NetworkError,
    ProtocolNotSupported,
    RemoteError,
)
from kwaainet_bridge.hivemind.client.block_choice import throughputs
from kwaainet_bridge.hivemind.client.coverage import Coverage
from kwaainet_bridge.hivemind.client.directory import Directory, Record, RecordSource, Span
from kwaainet_bridge.hivemind.experts.records import (
    MODEL_REGISTRY_KEY,
    ModelRecord,
    ServerState,
    check_prefix,
)
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SwarmModel:
    """A model of the swarm: the prefix of its blocks, how many there are, where it comes from."""

    prefix: str
    num_blocks: int
    repository: str | None = None

    def is_called(self, name: str) -> bool:
        """Whether ``name`` is the prefix, the repository's page, or its name on the hub with or without owner."""
        names = {self.prefix}
        if self.repository is not None:
            path = self.repository.rstrip("/").split("/")
            names |= {self.repository, "/".join(path[-2:]), path[-1]}
        return name in names


@dataclass(frozen=True, slots=True)
class Check:
    """Whether a server could be connected to just now. ``seconds`` is the round trip, None if it serves no ping;
    ``relayed`` whether that went through a relay.
    """

    reachable: bool
    seconds: float | None = None
    error: str = ""
    relayed: bool = False


@dataclass(frozen=True, slots=True)
class SurveyedModel:
    """A model and all its servers, in the order of their blocks; ``error`` if its records could not be read.

    ``left_out`` are the servers that the network's own readers pass over, each with the reason; they cover no block.
    """

    model: SwarmModel
    spans: tuple[Span, ...] = ()
    error: str = ""
    left_out: Mapping[PeerId, str] = field(default_factory=dict)

    @property
    def coverage(self) -> Coverage:
        return Coverage.of(self._used(), self.model.num_blocks)

    @property
    def throughputs(self) -> tuple[float, ...]:
        """Of each block, servers that are joining included: see :func:`block_choice.throughputs`."""
        joining = (span for span in self.spans if span.info.state is ServerState.JOINING)
        used = (span for span in self._used() if span.info.state is not ServerState.JOINING)
        return throughputs([*joining, *used], self.model.num_blocks)

    def _used(self) -> Iterator[Span]:
        return (span for span in self.spans if span.peer not in self.left_out)


async def registered_models(source: RecordSource) -> list[SwarmModel]:
    """The models that servers have registered, by prefix.

    Records that do not decode are left out and logged. Raises what the record source raises.
    """
    found: Record | None = (await source.get_many([MODEL_REGISTRY_KEY], latest=True)).get(MODEL_REGISTRY_KEY)
    if found is None:
        return []
    if not found.is_dictionary:
        log.warning("%s is no dictionary: no model can be read from it", MODEL_REGISTRY_KEY)
        return []
    models: list[SwarmModel] = []
    bad: list[str] = []
    for prefix, (value, _) in found.value.items():
        try:
            record = ModelRecord.from_value(value)
            models.append(SwarmModel(_prefix_of(prefix), record.num_blocks, record.repository or None))
        except RemoteError as e:
            bad.append(f"{prefix!r:.64}: {e}")
    if bad:
        log.warning("%s: skipped %d bad model records, the first: %s", MODEL_REGISTRY_KEY, len(bad), bad[0])
    return sorted(models, key=lambda model: model.prefix)


def _prefix_of(subkey: object) -> str:
    if not isinstance(subkey, str):
        raise RemoteError("model record: the subkey is no prefix")
    try:
        return check_prefix(subkey)
    except ConfigError as e:
        raise RemoteError(f"model record: {e}") from e


async def survey(
    source: RecordSource,
    models: Sequence[SwarmModel],
    *,
    read: Callable[[RecordSource, SwarmModel], Awaitable[SurveyedModel]] | None = None,
) -> list[SurveyedModel]:
    """Read all records of all servers of ``models``, several models at a time; the result is in their order.

    ``read`` reads one model, for networks whose records follow other rules than Petals'. A model that cannot be read
    has an error instead. Cancelled: nothing remains.
    """
    read = read or _read
    results: dict[str, SurveyedModel] = {}
    slots = trio.CapacityLimiter(defaults.SURVEYED_AT_ONCE)

    async def look_up(model: SwarmModel) -> None:
        async with slots:
            try:
                with trio.fail_after(defaults.DIRECTORY_READ_SECONDS):
                    found = await read(source, model)
            except trio.TooSlowError:
                error = f"the DHT gave no block records within {defaults.DIRECTORY_READ_SECONDS:g} s"
                results[model.prefix] = SurveyedModel(model, error=f"{model.prefix}: {error}")
            except (NetworkError, RemoteError) as e:
                results[model.prefix] = SurveyedModel(model, error=str(e))
            else:
                results[model.prefix] = replace(found, spans=tuple(sorted(found.spans, key=_by_blocks)))

    async with trio.open_nursery() as nursery:
        for model in models:
            nursery.start_soon(look_up, model)
    return [results[model.prefix] for model in models]


def _by_blocks(span: Span) -> tuple[int, int, PeerId]:
    return span.blocks.start, span.blocks.stop, span.peer


async def _read(source: RecordSource, model: SwarmModel) -> SurveyedModel:
    spans = await Directory(source, model.prefix, model.num_blocks).read(states=tuple(ServerState))
    return SurveyedModel(model, tuple(spans))


async def check_servers(
    peers: Iterable[PeerId],
    round_trip: Callable[[PeerId], Awaitable[float]],
    *,
    relayed: Callable[[PeerId], bool] = lambda _: False,
) -> dict[PeerId, Check]:
    """Connect to each of ``peers`` and measure its round trip, which ``round_trip`` gives in seconds.

    ``relayed`` tells of a connected peer whether a relay is between.

    It may raise ProtocolNotSupported for a peer that is reached and cannot be measured, other NetworkError and
    RemoteError for one that is not. Peers that had no turn within ``defaults.SERVER_CHECKS_SECONDS`` are left out.
    Cancelled: nothing remains.
    """
    checks: dict[PeerId, Check] = {}
    slots = trio.CapacityLimiter(defaults.SERVER_CHECKS_AT_ONCE)

    async def check(peer: PeerId) -> None:
        async with slots:
            with trio.move_on_after(defaults.SERVER_CHECK_SECONDS) as limit:
                try:
                    seconds = await round_trip(peer)
                    checks[peer] = Check(True, seconds, relayed=relayed(peer))
                except ProtocolNotSupported:
                    checks[peer] = Check(True, relayed=relayed(peer))
                except (NetworkError, RemoteError) as e:
                    checks[peer] = Check(False, error=str(e))
            if limit.cancelled_caught:
                error = f"no answer within {defaults.SERVER_CHECK_SECONDS:g} s"
                checks[peer] = Check(False, error=error)

    with trio.move_on_after(defaults.SERVER_CHECKS_SECONDS):
        async with trio.open_nursery() as nursery:
            for peer in dict.fromkeys(peers):
                nursery.start_soon(check, peer)
    return checks
