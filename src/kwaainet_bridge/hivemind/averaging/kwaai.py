"""``/kwaai/avg/1.0.0``: what averagers of KwaaiNet do in another way than Hivemind's.

docs/protocols/kwaai-avg.md specifies it; nobody else had it before. Every rule here can be followed without this
package's libraries: Hivemind's own take torch's names, scipy's solver and Python's random numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import torch

from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.compression.encoded import NAMES
from kwaainet_bridge.errors import RemoteError


def schema_hash(tensors: Iterable[torch.Tensor], compression: CompressionType, part_bytes: int) -> bytes:
    """SHA-256 of a text that says all that members of a group must have alike."""
    lines = [f"{NAMES[tensor.dtype]}[{','.join(map(str, tensor.shape))}]\n" for tensor in tensors]
    lines.append(f"compression={int(compression)}\npart_bytes={part_bytes}\n")
    return hashlib.sha256("".join(lines).encode()).digest()


def numbers(group_id: bytes, buckets: int, size: int) -> list[int]:
    """``size`` different numbers below ``buckets``: those whose SHA-256 with the group's id is least, in its order."""

    def hashed(number: int) -> bytes:
        return hashlib.sha256(group_id + number.to_bytes(4, "big")).digest()

    return sorted(range(buckets), key=hashed)[:size]


def scores(bandwidths: Sequence[float | None]) -> list[float]:
    """What each member averages, in proportion. At least one bandwidth is positive; None: the mean of those given.

    In a group of ``n`` a member with share ``w`` sends and receives ``1 + (n - 2) * w`` times the tensors. Those who
    average take the same time for it; who would take longer even with no share has none. Sums are made in float64,
    term by term.

    Raises RemoteError for bandwidths that are none, or of which a sum is infinite.
    """
    if not all(bandwidth is None or 0 <= bandwidth < math.inf for bandwidth in bandwidths):
        raise RemoteError(f"bandwidths {list(bandwidths)!r:.200}: all must be finite and at least 0")
    given = [float(bandwidth) for bandwidth in bandwidths if bandwidth]
    mean = _sum(given) / len(given)
    each = [mean if bandwidth is None else float(bandwidth) for bandwidth in bandwidths]
    total = _sum(each)
    if not math.isfinite(total):
        raise RemoteError(f"bandwidths {list(bandwidths)!r:.200}: their sum is infinite")
    beyond = len(each) - 2
    if beyond < 1:
        return [1.0 if bandwidth else 0.0 for bandwidth in each]
    time, together = 0.0, 0.0
    for count, bandwidth in enumerate(sorted(each, reverse=True), start=1):
        longer = (beyond + count) / (together + bandwidth)
        if count > 1 and longer * bandwidth <= 1.0:
            break
        time, together = longer, together + bandwidth
    return [max(0.0, time * bandwidth - 1.0) for bandwidth in each]


def _sum(terms: Iterable[float]) -> float:
    """Term by term; ``sum`` corrects its roundings from Python 3.12 on."""
    total = 0.0
    for term in terms:
        total += term
    return total
