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


def configure_logging(
    level: str, style: Literal["auto", "text", "json"], *, stream: TextIO | None = None
) -> None:
    """Send this process's log to ``stream`` (standard error). Libraries are heard from WARNING up.

    ``auto`` is text on a terminal and JSON elsewhere. Tracebacks show no values of variables: those may be
    keys or what a caller sent.
    """
    out = stream or sys.stderr
    text = style == "text" or (style == "auto" and out.isatty())
    render: list[structlog.typing.Processor]
    if text:
        formatter = structlog.dev.plain_traceback
        render = [structlog.dev.ConsoleRenderer(colors=out.isatty(), exception_formatter=formatter)]
    else:
        transformer = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        render = [structlog.processors.ExceptionRenderer(transformer), structlog.processors.JSONRenderer()]
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_SHARED,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("kwaainet_bridge").setLevel(level.upper())
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
