"""Where peers may be dialled, and which private addresses mean anything here."""

from __future__ import annotations

import pytest

from kwaainet_bridge.net.addresses import Address, AddressBook, Vicinity, parse_address, private_block
from kwaainet_bridge.wire.peer_id import PeerId

PEER = PeerId(b"\x12\x20" + bytes(32))


def address(host: str, port: int = 1) -> Address:
    kind = "ip6" if ":" in host else "ip4" if host[0].isdigit() else "dns"
    found = parse_address(f"/{kind}/{host}/tcp/{port}")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("host", "block"),
    [
        ("8.8.8.8", None),
        ("node.example", None),
        ("2001:4860::1", None),
        ("10.1.2.3", "10.0.0.0/8"),
        ("172.31.0.1", "172.16.0.0/12"),
        ("172.32.0.1", None),
        ("192.168.7.7", "192.168.0.0/16"),
        ("100.100.0.1", "100.64.0.0/10"),
        ("169.254.0.1", "169.254.0.0/16"),
        ("127.0.0.2", "127.0.0.0/8"),
        ("0.0.0.0", "0.0.0.0/8"),
        ("::1", "::1/128"),
        ("::", "::/128"),
        ("::ffff:0.0.0.0", "0.0.0.0/8"),
        ("fe80::1%eth0", "fe80::/10"),
        ("fd12:3456:789a:1::1", "fd12:3456:789a::/48"),
        ("::ffff:10.0.0.1", "10.0.0.0/8"),
    ],
)
def test_private_blocks(host: str, block: str | None) -> None:
    assert str(private_block(host) or "None") == str(block)


@pytest.mark.parametrize(
    ("own", "teller", "heard", "dialled"),
    [
        ([], "8.8.8.8", "8.8.4.4", True),
        ([], "8.8.8.8", "node.example", True),
        (["192.168.1.2"], "8.8.8.8", "192.168.1.7", True),
        (["10.0.0.2"], "8.8.8.8", "192.168.1.7", False),
        ([], "8.8.8.8", "10.0.0.1", False),
        ([], "10.0.0.9", "10.0.0.1", True),
        ([], "8.8.8.8", "127.0.0.1", False),
        (["192.168.1.2"], "192.168.1.7", "127.0.0.1", False),
        (["192.168.1.2"], "192.168.1.7", "0.0.0.0", False),  # which is this machine, too
        ([], "127.0.0.1", "127.0.0.1", True),
        ([], "127.0.0.1", "10.0.0.1", False),
        (["fd00:1:2::1"], "8.8.8.8", "fd00:1:2:3::4", True),
        (["fd00:1:2::1"], "8.8.8.8", "fd00:1:3::4", False),
        (["8.8.8.1"], "8.8.8.8", "fe80::1", False),
        ([], "", "10.0.0.1", False),  # nobody knows who told it
    ],
)
def test_vicinity(own: list[str], teller: str, heard: str, dialled: bool) -> None:
    assert Vicinity(own).has(address(heard), told_by=teller) is dialled


def test_this_machine_has_a_vicinity() -> None:
    assert not Vicinity.here().has(address("127.0.0.1"), told_by="8.8.8.8")


def test_addresses_elsewhere_are_kept_and_not_dialled() -> None:
    book = AddressBook()
    near, far = address("8.8.8.8"), address("10.0.0.1")
    book.add(PEER, [near, far], here=lambda a: a == near)
    assert book.get(PEER) == [near, far]
    assert book.dialable(PEER) == [near]


def test_an_address_once_given_by_hand_stays_dialable() -> None:
    book = AddressBook()
    book.add(PEER, [address("10.0.0.1")])
    book.add(PEER, [address("10.0.0.1")], here=lambda _: False)
    assert book.dialable(PEER) == [address("10.0.0.1")]


def test_removing() -> None:
    book = AddressBook()
    book.add(PEER, [address("8.8.8.8"), address("8.8.4.4")])
    book.remove(PEER, address("8.8.8.8"))
    book.remove(PEER, address("8.8.8.9"))
    book.remove(PeerId(b"\x12\x20" + b"1" * 32), address("8.8.8.8"))
    assert book.get(PEER) == [address("8.8.4.4")]
