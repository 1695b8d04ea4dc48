from __future__ import annotations

import pytest

from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.compression.adaptive import TensorInfo, TensorRole, always, by_key, by_role, by_size
from kwaainet_bridge.errors import CompressionError

RAW, HALF, BYTE = (always(CompressionType[name]) for name in ("NONE", "MEANSTD_16BIT", "BLOCKWISE_8BIT"))


def test_size_threshold_belongs_to_the_large():
    choice = by_size(1000, less=RAW, greater_equal=BYTE)
    assert [choice(TensorInfo(n)).name for n in (0, 999, 1000, 2**33)] == ["NONE"] * 2 + [
        "BLOCKWISE_8BIT"
    ] * 2


def test_roles():
    choice = by_role(
        {TensorRole.GRADIENT: BYTE, TensorRole.PARAMETER: by_size(10, less=RAW, greater_equal=BYTE)},
        default=HALF,
    )
    chosen = {role.name: choice(TensorInfo(5, role)).name for role in TensorRole}
    assert chosen == {
        "ACTIVATION": "MEANSTD_16BIT",
        "PARAMETER": "NONE",
        "GRADIENT": "BLOCKWISE_8BIT",
        "OPTIMIZER": "MEANSTD_16BIT",
        "UNSPECIFIED": "MEANSTD_16BIT",
    }
    assert choice(TensorInfo(10, TensorRole.PARAMETER)).name == "BLOCKWISE_8BIT"
    with pytest.raises(CompressionError, match="without a role get the default"):
        by_role({TensorRole.UNSPECIFIED: RAW}, default=HALF)


def test_keys():
    choice = by_key({"embedding": BYTE, 3: RAW})
    assert choice(TensorInfo(1, key="embedding")) is CompressionType.BLOCKWISE_8BIT
    assert choice(TensorInfo(1, key=3)) is CompressionType.NONE
    with pytest.raises(CompressionError, match="no compression was chosen for tensor 'head'"):
        choice(TensorInfo(1, key="head"))
