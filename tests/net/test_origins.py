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


def begin(origins: Origins, origin: str | None, free: int = 1000) -> bool:
    return origins.begin(origin, free=free)


def test_connections_are_limited() -> None:
    origins = Origins(connections=2, handshakes=10)
    for _ in range(2):
        assert begin(origins, "a")
        origins.connected("a")
        origins.end("a")
    assert not begin(origins, "a")
    assert begin(origins, "b")
    origins.disconnected("a")
    assert begin(origins, "a")


def test_handshakes_are_limited_and_count_as_connections() -> None:
    origins = Origins(connections=3, handshakes=2)
    assert begin(origins, "a")
    assert begin(origins, "a")
    assert not begin(origins, "a")
    origins.end("a")
    origins.connected("a")
    assert begin(origins, "a")
    origins.end("a")
    origins.connected("a")
    assert not begin(origins, "a")  # two connected, one under way


def test_nobody_is_not_limited() -> None:
    origins = Origins(connections=1, handshakes=1)
    for _ in range(5):
        assert begin(origins, None)
        origins.connected(None)
    origins.end(None)
    origins.disconnected(None)
    assert len(origins) == 0


def test_those_who_left_are_forgotten() -> None:
    origins = Origins(connections=1, handshakes=1)
    for i in range(100):
        assert begin(origins, str(i))
        origins.connected(str(i))
        origins.end(str(i))
        origins.disconnected(str(i))
    assert len(origins) == 0


def test_a_few_origins_do_not_fill_a_host() -> None:
    places, origins = 100, Origins(connections=64, handshakes=64)
    taken = 0
    for _ in range(64):
        for greedy in "abcd":
            if begin(origins, greedy, places - taken):
                taken += 1
                origins.connected(greedy)
                origins.end(greedy)
    assert 75 <= taken <= 85
    assert begin(origins, "e", places - taken)


def test_the_last_place_is_for_one_that_has_none() -> None:
    origins = Origins(connections=64, handshakes=64)
    assert begin(origins, "a", 0)
    assert not begin(origins, "a", 0)
    assert begin(origins, "b", -3)
