"""``/kwaai/p2p/hello/1.0.0``: a greeting for the log, and its receipt."""

from __future__ import annotations

import logging

from kwaainet_bridge.rpc import CallContext
from kwaainet_bridge.wire.kwaai_hello import RECEIVED, Hello

log = logging.getLogger(__name__)


async def greet(request: Hello, context: CallContext) -> Hello:
    """Answer ``ok``. The text, which may hold anything, is logged escaped and cut; nothing of it is kept."""
    log.debug("%s says %.200r", context.peer, request.text)
    return Hello(RECEIVED)
