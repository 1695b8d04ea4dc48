"""How many connections the operating system's limit of file descriptors allows."""

from __future__ import annotations

from types import ModuleType

import structlog

from kwaainet_bridge import defaults

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def affordable_connections(connections: int) -> int:
    """``connections``, or as many as file descriptors allow, after raising their usual limit of 1024 if possible.

    Where the system has no such limit, as Windows, all of them.
    """
    resource = _limits_of_unix()
    if resource is None:
        return connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + defaults.SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    affordable: int = max(soft - defaults.SPARE_DESCRIPTORS, soft // 2)
    log.warning("few file descriptors", connections=affordable, remedy=f"ulimit -n {wanted}")
    return affordable


def _limits_of_unix() -> ModuleType | None:
    try:
        import resource
    except ImportError:
        return None
    return resource
