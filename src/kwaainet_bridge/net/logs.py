"""The one place that sets log levels of foreign libraries, for applications to call."""

from __future__ import annotations

import logging


def quiet_libp2p_logs(level: int = logging.ERROR) -> None:
    """Keep the loggers of py-libp2p and of its address library to ``level``.

    At DEBUG the address library logs each address it parses, several times. Nothing in this package calls
    this.
    """
    for name in ("libp2p", "multiaddr"):
        logging.getLogger(name).setLevel(level)
