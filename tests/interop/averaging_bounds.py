"""How far an average may be from the exact one when parts travel compressed; from what each codec does to a value.

A member's part x arrives as x + e, the difference d that comes back as d + e'. Its reducer's average A is off by at most
the weighted mean of the senders' e; the member ends with A - e + e', the reducer itself with A.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kwaainet_bridge.compression import CompressionType, decode, encode

FLOAT32 = 2.0**-24  # rounding to nearest, relative
_FLOAT16 = 2.0**-11
_LEAST_FLOAT16 = 2.0**-25  # half the spacing of the smallest float16 numbers
_BLOCK = 4096
_BLOCKWISE = 0.0071  # of a block's largest magnitude; docs/codecs.md


def error_bound(values: torch.Tensor, compression: CompressionType) -> torch.Tensor:
    """The largest error of each of these values, which are one part."""
    match compression:
        case CompressionType.NONE:
            return torch.zeros_like(values)
        case CompressionType.FLOAT16:
            return values.abs() * _FLOAT16 + _LEAST_FLOAT16
        case CompressionType.MEANSTD_16BIT:  # float16 of the distance from the mean in standard deviations
            centered = values - values.mean()
            deviation = centered.square().mean().sqrt()
            rounding = 4 * FLOAT32 * values.abs().max()
            return centered.abs() * _FLOAT16 + deviation * _LEAST_FLOAT16 + rounding
        case CompressionType.BLOCKWISE_8BIT:
            blocks = [block.abs().max().expand(len(block)) for block in values.split(_BLOCK)]
            return torch.cat(blocks) * _BLOCKWISE
        case (
            CompressionType.UNIFORM_8BIT
        ):  # 256 buckets over six standard deviations, the outermost take the rest
            centered = values - values.mean()
            scale = 6 * centered.norm() / max(len(values) - 1, 1) ** 0.5 / 256
            return _extent_of_buckets(values, (centered / scale + 128).round().clamp(0, 255).long())
        case CompressionType.QUANTILE_8BIT:  # 256 buckets of equally many
            borders = torch.quantile(values, torch.linspace(0, 1, 257, dtype=values.dtype))[1:-1]
            return _extent_of_buckets(values, torch.bucketize(values, borders))
    raise AssertionError(compression)


def _extent_of_buckets(values: torch.Tensor, buckets: torch.Tensor) -> torch.Tensor:
    """A value becomes the mean of its bucket, so it errs by less than the bucket extends.

    Rounding may put a value into the next bucket: the widest of the three counts, and the step between them.
    """
    lowest = torch.full((256,), torch.inf, dtype=values.dtype).scatter_reduce_(0, buckets, values, "amin")
    highest = torch.full((256,), -torch.inf, dtype=values.dtype).scatter_reduce_(0, buckets, values, "amax")
    padded = torch.nn.functional.pad
    low = torch.stack([padded(lowest, (1, 1), value=torch.inf)[k : k + 256] for k in range(3)]).amin(0)
    high = torch.stack([padded(highest, (1, 1), value=-torch.inf)[k : k + 256] for k in range(3)]).amax(0)
    # values at the edge of the three may have been beside one more
    return (high - low)[buckets]


def average_bound(
    parts: Mapping[int, torch.Tensor],
    weights: Mapping[int, float],
    owner: int,
    compression: CompressionType,
) -> torch.Tensor:
    """How far the owner of a part may be from the exact weighted mean of ``parts`` by member."""
    total = sum(weights.values())
    codec = sum(
        weights[n] / total * error_bound(part, compression) for n, part in parts.items() if n != owner
    )
    return codec + _rounding(parts)


def member_bound(
    parts: Mapping[int, torch.Tensor],
    member: int,
    average: torch.Tensor,
    compression: CompressionType,
) -> torch.Tensor:
    """How far ``member`` may be from the ``average`` that the part's owner ended with."""
    part = parts[member]
    arrived = decode(encode(part.float(), compression)).double()
    return error_bound(part, compression) + error_bound(average - arrived, compression) + _rounding(parts)


def _rounding(parts: Mapping[int, torch.Tensor]) -> float:
    """Each member's product and sum, the division, the differences from it and their sums are rounded to float32."""
    largest = max(float(part.abs().max()) for part in parts.values())
    return (len(parts) + 6) * FLOAT32 * largest
