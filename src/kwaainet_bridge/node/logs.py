"""Logging: readable on a terminal, JSON otherwise; one line per event, on standard error."""

from __future__ import annotations

import logging
import sys
from typing import Literal, TextIO

import structlog

_SHARED: list[structlog.typing.Processor] = [
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.stdlib.ExtraAdder(),
]

_NOISY = ("libp2p", "multiaddr", "urllib3", "httpx", "httpcore", "filelock", "transformers", "websockets")


def configure_logging(
    level: str, style: Literal["auto", "text", "json"], *, stream: TextIO | None = None
) -> None:
    """Send this process's log to ``stream`` (standard error). Libraries are heard from WARNING up.

    ``auto`` is text on a terminal and JSON elsewhere.
    """
    out = stream or sys.stderr
    text = style == "text" or (style == "auto" and out.isatty())
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=out.isatty()) if text else structlog.processors.JSONRenderer()
    )
    steps: list[structlog.typing.Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if not text:
        steps.append(structlog.processors.dict_tracebacks)
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=_SHARED, processors=[*steps, renderer])
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("kwaainet_bridge").setLevel(level.upper())
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_SHARED,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.processors.StackInfoRenderer(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
