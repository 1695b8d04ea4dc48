"""One function per decoder. Each takes any bytes, lets RemoteError through and compares what must be equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fuzz import (
    averaging_targets,
    dht_targets,
    kwaai_targets,
    net_targets,
    tensor2_targets,
    tensor_targets,
    wire_targets,
)

Target = Callable[[bytes], None]

TARGETS: Final[dict[str, Target]] = {
    **wire_targets.TARGETS,
    **tensor_targets.TARGETS,
    **dht_targets.TARGETS,
    **net_targets.TARGETS,
    **averaging_targets.TARGETS,
    **kwaai_targets.TARGETS,
    **tensor2_targets.TARGETS,
}
