"""Logging: readable on a terminal, JSON otherwise; one line per event, on standard error."""

from __future__ import annotations

import logging
import os
import sys
from typing import Literal, TextIO

import structlog

from kwaainet_bridge.config import NodeConfig
from kwaainet_bridge.node.log_ring import LogRing
from kwaainet_bridge.node.web.tokens import read_token

_SHARED: list[structlog.typing.Processor] = [
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.stdlib.ExtraAdder(),
]


def configure_logging(
    level: str,
    style: Literal["auto", "text", "json"],
    *,
    stream: TextIO | None = None,
    ring: LogRing | None = None,
) -> None:
    """Send this process's log to ``stream`` (standard error), and to ``ring`` if there is one. Libraries are heard from
    WARNING up.

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
    handler.setFormatter(_formatter(*render))
    handlers: list[logging.Handler] = [handler]
    if ring is not None:
        ring.setFormatter(_formatter(structlog.processors.format_exc_info, ring.render))
        handlers.append(ring)
    root = logging.getLogger()
    root.handlers[:] = handlers
    root.setLevel(logging.WARNING)
    set_level(level)
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
        cache_logger_on_first_use=False,  # 1.5 us an event, and what is configured anew is heard
    )


def set_level(level: str) -> None:
    """Have events of this package logged from ``level`` up; libraries stay as they are."""
    logging.getLogger("kwaainet_bridge").setLevel(level.upper())


def _formatter(*render: structlog.typing.Processor) -> logging.Formatter:
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_SHARED,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
    )


def log_ring(config: NodeConfig) -> LogRing:
    """What keeps the newest records of a node with this configuration, without the tokens that it knows.

    Raises ConfigError for a token file that cannot be used.
    """
    secrets = [os.environ.get("HF_TOKEN", "")]
    for key, path in (
        ("admin.token_file", config.admin.token_file),
        ("openai.token_file", config.openai.token_file),
    ):
        if path is not None:
            secrets.append(read_token(path, key=key))
    return LogRing(secrets=secrets)
