"""Connections and handshakes by where they come from."""

from __future__ import annotations

import pytest

from kwaainet_bridge.net.origins import Origins, origin_of


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("203.0.114.7", "203.0.114.7"),
        ("2a01:4f8:1:2:3:4:5:6", "2a01:4f8:1:2::/64"),
        ("2a01:4f8:1:2::1", "2a01:4f8:1:2::/64"),
        ("::ffff:8.8.8.8", "8.8.8.8"),
        ("64:ff9b::808:808", "8.8.8.8"),
        ("127.0.0.1", None),
        ("10.1.2.3", None),
        ("172.17.0.1", None),
        ("192.168.1.1", None),
        ("100.64.0.1", None),
        ("169.254.1.1", None),
        ("::1", None),
        ("fe80::1%eth0", None),
        ("fd00::1", None),
        ("::ffff:127.0.0.1", None),
        ("64:ff9b::a00:1", None),
    ],
)
def test_who_answers_for_an_address(host: str, origin: str | None) -> None:
    assert origin_of(host) == origin


def test_connections_are_limited() -> None:
    origins = Origins(connections=2, handshakes=10)
    for _ in range(2):
        assert origins.begin("a")
        origins.connected("a")
        origins.end("a")
    assert not origins.begin("a")
    assert origins.begin("b")
    origins.disconnected("a")
    assert origins.begin("a")


def test_handshakes_are_limited_and_count_as_connections() -> None:
    origins = Origins(connections=3, handshakes=2)
    assert origins.begin("a")
    assert origins.begin("a")
    assert not origins.begin("a")
    origins.end("a")
    origins.connected("a")
    assert origins.begin("a")
    origins.end("a")
    origins.connected("a")
    assert not origins.begin("a")  # two connected, one under way


def test_nobody_is_not_limited() -> None:
    origins = Origins(connections=1, handshakes=1)
    for _ in range(5):
        assert origins.begin(None)
        origins.connected(None)
    origins.end(None)
    origins.disconnected(None)
    assert len(origins) == 0


def test_those_who_left_are_forgotten() -> None:
    origins = Origins(connections=1, handshakes=1)
    for i in range(100):
        assert origins.begin(str(i))
        origins.connected(str(i))
        origins.end(str(i))
        origins.disconnected(str(i))
    assert len(origins) == 0
