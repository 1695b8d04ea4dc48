"""Which blocks of each network's models are served, for people who look at the dashboard."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import structlog
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, RemoteError
from kwaainet_bridge.hivemind.experts.records import ServerState
from kwaainet_bridge.node.state import NodeState

if TYPE_CHECKING:
    from kwaainet_bridge.hivemind.client import Span, SurveyedModel

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class CoverageWatch:
    """The latest survey of each network, read in ``nursery`` when somebody wants it and the last one is old.

    ``version`` grows with each network that was read.
    """

    def __init__(
        self, state: NodeState, nursery: trio.Nursery, *, period: float = defaults.SURVEY_PERIOD_SECONDS
    ) -> None:
        self.version = 0
        self._state = state
        self._nursery = nursery
        self._period = period
        self._due: dict[str, float] = {}
        self._told: dict[str, dict[str, Any]] = {}

    def refresh(self) -> None:
        """Begin to read the networks whose last survey is a period ago, or was none. For callers that show it."""
        now = self._state.now
        for network, read in self._state.surveys.items():
            if self._due.get(network, now) <= now:
                self._due[network] = now + self._period
                self._nursery.start_soon(self._read, network, read)

    def as_json(self) -> dict[str, Any]:
        """What is known, by network."""
        return {network: self._told[network] for network in sorted(self._told)}

    async def _read(self, network: str, read: Callable[[], Awaitable[Sequence[SurveyedModel]]]) -> None:
        try:
            with trio.fail_after(self._period):
                models, error = await read(), ""
        except trio.TooSlowError:
            models, error = (), f"the DHT gave no answer within {self._period:g} s"
        except (NetworkError, RemoteError) as e:
            models, error = (), str(e)
        except Exception as e:  # a page is no reason to end the node
            log.exception("survey failed", network=network)
            models, error = (), f"this is a defect of the node: {e!r}"
        host = self._state.host
        own = None if host is None else str(host.peer_id)
        self._told[network] = {
            "at": round(self._state.unix_time(self._state.now), 3),
            "error": error[: defaults.MAX_ERROR_CHARACTERS],
            "models": [_model(model, own) for model in models],
        }
        self.version += 1


def _model(surveyed: SurveyedModel, own: str | None) -> dict[str, Any]:
    size, cells = surveyed.coverage.cells(defaults.DASHBOARD_CELLS)
    # this node's first, or it could be among those beyond the limit
    spans = sorted(surveyed.spans, key=lambda span: str(span.peer) != own)
    return {
        "prefix": surveyed.model.prefix,
        "repository": surveyed.model.repository,
        "num_blocks": surveyed.model.num_blocks,
        "blocks_per_cell": size,
        "servers_per_cell": cells,
        "gaps": [[gap.start, gap.stop] for gap in surveyed.coverage.gaps][: defaults.DASHBOARD_CELLS],
        "error": surveyed.error[: defaults.MAX_ERROR_CHARACTERS],
        "servers_total": sum(span.info.state is not ServerState.OFFLINE for span in surveyed.spans),
        "servers": [
            _server(span, own, surveyed.left_out.get(span.peer, ""))
            for span in spans[: defaults.DASHBOARD_SERVERS]
            if span.info.state is not ServerState.OFFLINE
        ],
    }


def _server(span: Span, own: str | None, left_out: str) -> dict[str, Any]:
    info = span.info
    return {
        "peer": str(span.peer),
        "own": str(span.peer) == own,
        "name": (info.public_name or "")[:80],
        "first": span.blocks.start,
        "end": span.blocks.stop,
        "state": info.state.name.lower(),
        "throughput": info.throughput if math.isfinite(info.throughput) else None,
        "using_relay": bool(info.using_relay),
        "version": (info.version or "")[:80],
        "left_out": left_out[: defaults.MAX_ERROR_CHARACTERS],
    }
