"""How many connections a node may have, by the operating system's limit of file descriptors."""

from __future__ import annotations

import resource
import sys

import pytest

from kwaainet_bridge.node.descriptors import affordable_connections


@pytest.mark.parametrize(
    ("limits", "raised_to", "connections"),
    [
        ((1024, 1_048_576), 2320, 2000),  # the usual ones
        ((1024, resource.RLIM_INFINITY), 2320, 2000),
        ((1024, 1024), 1024, 704),
        ((256, 256), 256, 128),
        ((65_536, 65_536), None, 2000),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None, 2000),
    ],
)
def test_connections_leave_descriptors_for_the_rest(monkeypatch, limits, raised_to, connections):
    changed = []
    monkeypatch.setattr(resource, "getrlimit", lambda _which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _which, new: changed.append(new))
    assert affordable_connections(2000) == connections
    assert changed == ([(raised_to, limits[1])] if raised_to else [])


def test_where_there_is_no_such_limit_all_connections_are_for_the_node(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows, where importing it fails
    assert affordable_connections(2000) == 2000
