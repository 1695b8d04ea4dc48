from __future__ import annotations

import random

from dht_nodes import peer_id
from hypothesis import given
from hypothesis import strategies as st

from kwaainet_bridge.hivemind.dht import Contact, DhtId
from kwaainet_bridge.hivemind.dht.id import ID_BITS
from kwaainet_bridge.hivemind.dht.routing import RoutingTable

OWN = DhtId(0)
FAR = 1 << (ID_BITS - 1)  # ids from here on lie in the half that does not hold the own id


def contact(node_id: int, peer: int | None = None) -> Contact:
    return Contact(DhtId(node_id), peer_id(node_id % 2**255 if peer is None else peer))


def full_far_bucket(table: RoutingTable) -> list[Contact]:
    """With modulo 1 the half without the own id never splits."""
    contacts = [contact(FAR + n, n + 1) for n in range(table.bucket_size)]
    for c in contacts:
        assert table.add_or_update(c, now=0.0) is None
    assert table.add_or_update(contact(5, 500), now=0.0) is None  # forces the split at the root
    return contacts


@given(st.lists(st.integers(1, 2**ID_BITS - 1), max_size=300, unique=True), st.integers(0, 2**ID_BITS - 1))
def test_the_nearest_are_found_exactly(node_ids: list[int], target: int) -> None:
    table = RoutingTable(OWN, bucket_size=4)
    for number, node_id in enumerate(node_ids):
        table.add_or_update(contact(node_id, number), now=0.0)
    held = sorted((c.node_id for c in table.contacts()), key=lambda node_id: node_id ^ target)
    assert [c.node_id for c in table.nearest(DhtId(target), 7)] == held[:7]
    if held:
        rest = [c.node_id for c in table.nearest(DhtId(target), 7, exclude=held[0])]
        assert rest == held[1:8]
    assert len(table) == len(held)


def test_the_table_is_denser_near_the_own_id() -> None:
    rng = random.Random(1)
    own = DhtId.random(rng)
    table = RoutingTable(own)
    node_ids = [DhtId.random(rng) for _ in range(5000)]
    for number, node_id in enumerate(node_ids):
        table.add_or_update(Contact(node_id, peer_id(number)), now=0.0)
    nearest = sorted(node_ids, key=own.distance)[:20]
    assert [c.node_id for c in table.nearest(own, 20)] == nearest
    assert len(table) < 1500


def test_a_full_far_bucket_keeps_a_reserve_and_doubts_the_longest_silent() -> None:
    table = RoutingTable(OWN, bucket_size=3, depth_modulo=1)
    first, second, third = full_far_bucket(table)
    late = contact(FAR + 50, 50)
    assert table.add_or_update(late, now=0.0) == first
    assert late.node_id in table
    assert late not in table.nearest(late.node_id, 10)
    assert table.add_or_update(late, now=0.0) == second  # the first is doubted already
    table.add_or_update(first, now=0.0)  # it answered
    assert table.add_or_update(late, now=0.0) == third
    table.remove(second.node_id)
    assert table.nearest(late.node_id, 1) == [late]
    assert second.node_id not in table
    assert table.node_of(second.peer) is None


def test_the_reserve_is_bounded() -> None:
    table = RoutingTable(OWN, bucket_size=3, depth_modulo=1)
    full_far_bucket(table)
    late = [contact(FAR + 50 + n, 50 + n) for n in range(100)]
    for c in late:
        table.add_or_update(c, now=0.0)
    assert [c for c in late if c.node_id in table] == late[-3:]
    assert [c for c in late if table.node_of(c.peer)] == late[-3:]


def test_a_peer_that_restarts_with_a_new_node_id_leaves_its_old_one() -> None:
    table = RoutingTable(OWN)
    table.add_or_update(contact(7, peer=1), now=0.0)
    table.add_or_update(contact(9, peer=1), now=0.0)
    assert table.contacts() == [contact(9, peer=1)]
    assert table.peer_of(DhtId(7)) is None
    assert table.node_of(peer_id(1)) == DhtId(9)


def test_a_node_id_is_not_taken_over_while_its_holder_answers() -> None:
    table = RoutingTable(OWN)
    table.add_or_update(contact(7, peer=1), now=0.0)
    assert table.add_or_update(contact(7, peer=2), now=0.0) == contact(7, peer=1)  # to be pinged
    assert table.add_or_update(contact(7, peer=2), now=0.0) is None  # is being pinged
    assert table.peer_of(DhtId(7)) == peer_id(1)
    table.remove(DhtId(7))
    table.add_or_update(contact(7, peer=2), now=0.0)
    assert table.peer_of(DhtId(7)) == peer_id(2)


def test_the_own_id_is_no_contact_and_unknown_ids_may_be_removed() -> None:
    table = RoutingTable(OWN)
    assert table.add_or_update(Contact(OWN, peer_id(1)), now=0.0) is None
    table.remove(DhtId(3))
    assert table.contacts() == []
    assert table.nearest(OWN, 5) == []


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 40), st.booleans()), max_size=200))
def test_both_directions_agree_after_any_use(steps: list[tuple[int, int, bool]]) -> None:
    table = RoutingTable(OWN, bucket_size=2, depth_modulo=2)
    for node_id, peer, adding in steps:
        scattered = node_id * (2**ID_BITS // 61)
        if adding:
            table.add_or_update(contact(scattered, peer), now=0.0)
        else:
            table.remove(DhtId(scattered))
        placed = [
            (n, c.peer)
            for bucket in table._buckets.values()
            for rows in (bucket.nodes, bucket.reserve)
            for n, c in rows.items()
        ]
        assert dict(placed) == table._peers
        assert len(placed) == len(table._peers) == len(table._node_ids)
        assert {p: n for n, p in placed} == table._node_ids


def test_buckets_that_heard_of_nobody_are_to_be_refreshed_within_their_own_range() -> None:
    table = RoutingTable(OWN, bucket_size=3, depth_modulo=1)
    rng = random.Random(0)
    full_far_bucket(table)  # heard from at 0
    assert table.refresh_ids(before=0.0, rng=rng) == []
    table.add_or_update(contact(7), now=10.0)
    (far,) = table.refresh_ids(before=5.0, rng=rng)
    assert far >= FAR
    far_again, near = table.refresh_ids(before=11.0, rng=rng)
    assert far_again >= FAR > near
    assert far_again != far
