"""Shares of an all-reduce for members whose bandwidths differ: the linear program of stock peers.

Source: hivemind 1.1.12, ``averaging/load_balancing.py``. Nothing about the result is sent, and the optimum is not
unique, so every member must use the same solver: scipy's interior-point method.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kwaainet_bridge.errors import RemoteError

log = logging.getLogger(__name__)

_DECIMALS: Final = 9


def balanced_scores(bandwidths: Sequence[float | None]) -> list[float]:
    """What each member averages, in proportion. At least one bandwidth is positive; None: the mean of those given.

    A member with share ``w`` sends and receives ``1 + (n - 2) * w`` times the tensors; the time of the slowest one is
    made as short as it can be. Takes milliseconds for a usual group, a second for hundreds: not for an event loop.

    Raises RemoteError for bandwidths that are none, or beyond what float64 can compute with: stock peers refuse them.
    """
    if not all(bandwidth is None or bandwidth >= 0 for bandwidth in bandwidths):
        raise RemoteError(f"bandwidths {list(bandwidths)!r:.200}: all must be at least 0")
    given = [bandwidth for bandwidth in bandwidths if bandwidth]
    # the solver warns of its age, and of bandwidths that have no solution
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        mean = float(np.mean(given))
        each = np.array([mean if bandwidth is None else bandwidth for bandwidth in bandwidths])
        order = np.argsort(-each)  # stock peers sort; the solver's answer depends on it
        try:
            shares = _solve(each[order])
        except ValueError as e:
            raise RemoteError(f"bandwidths {each.tolist()!r:.200}: {e}") from e
    if shares is None:
        log.warning("averaging: bandwidths %s cannot be balanced, all members get the same", each.tolist())
        shares = np.ones(len(each))
    return [float(share) for share in shares[np.argsort(order)]]


def _solve(bandwidths: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    """Shares and the longest time, such that the latter is least. The order of the rows is part of the answer."""
    from scipy.optimize import linprog

    size = len(bandwidths)
    averages = bandwidths > 0
    shares = np.eye(size, size + 1)
    time_is_least = np.zeros(size + 1)
    time_is_least[-1] = 1.0
    seconds_per_share = (size - 2.0) / np.maximum(bandwidths, 10.0**-_DECIMALS)
    time_of_each = np.hstack([np.diag(seconds_per_share), -np.ones((size, 1))])
    rows = [-shares, time_is_least[None] - 1.0, time_of_each[averages], shares]
    limits = [np.zeros(size), np.array([-1.0]), -1.0 / bandwidths[averages], averages.astype(np.float64)]
    solution = linprog(
        time_is_least, A_ub=np.concatenate(rows), b_ub=np.concatenate(limits), method="interior-point"
    )
    return np.round(solution.x[:size], _DECIMALS) if solution.success else None
