"""Validators, and nodes that have some."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pytest
import trio
from annotated_types import Ge
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_private_key
from dht_nodes import START, clock, swarm
from pydantic import BaseModel
from trio.testing import MockClock

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.dht import (
    CompositeValidator,
    DhtId,
    DhtRecord,
    FoundEntry,
    Item,
    ProtectedSubkey,
    RecordValidator,
    RsaSignatureValidator,
    SchemaValidator,
    rsa_keys,
    signatures,
)
from kwaainet_bridge.hivemind.dht.messages import StoreItem
from kwaainet_bridge.hivemind.dht.validation import stripped, valid_part
from kwaainet_bridge.hivemind.dht.values import Regular, dictionary
from kwaainet_bridge.wire.msgpack import pack

GOLDEN = json.loads((Path(__file__).parents[1] / "vectors" / "hivemind-signatures.json").read_text())
KEY = DhtId.of("key")
LATER = START + 1000.0
NIL = pack(None)


def load(der_hex: str) -> rsa.RSAPrivateKey:
    key = load_der_private_key(bytes.fromhex(der_hex), password=None)
    assert isinstance(key, rsa.RSAPrivateKey)
    return key


OWNER = load(GOLDEN["private_key"])


@pytest.fixture(scope="module")
def stranger() -> rsa.RSAPrivateKey:
    return rsa_keys.generate_key()


def record(
    value: bytes = b"v", *, subkey: object = None, key: bytes = b"k" * 20, at: float = 5.0
) -> DhtRecord:
    return DhtRecord(key, pack(subkey), value, at)


def golden(number: int) -> tuple[DhtRecord, bytes]:
    row = GOLDEN["records"][number]
    key, subkey, value = (bytes.fromhex(row[name]) for name in ("key", "subkey", "value"))
    return DhtRecord(key, subkey, value, row["expiration"]), bytes.fromhex(row["signed_value"])


# --- signatures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(GOLDEN["records"])))
def test_records_signed_by_stock_are_valid_and_ours_are_made_the_same_way(number: int) -> None:
    unsigned, signed_value = golden(number)
    validator = RsaSignatureValidator(OWNER)
    assert signatures.owner_marker(OWNER) == GOLDEN["marker"].encode()
    signed = replace(unsigned, value=signed_value)
    assert validator.validate(signed)
    assert RsaSignatureValidator().validate(signed)
    assert validator.strip_value(signed) == unsigned.value
    wanted = bytes.fromhex(GOLDEN["records"][number]["signed_bytes"])
    assert signatures._signed_bytes(unsigned, unsigned.value) == wanted
    ours = validator.sign_value(unsigned)
    assert len(ours) == len(signed_value)
    assert RsaSignatureValidator().validate(replace(unsigned, value=ours))


def test_protected_records_need_their_owners_signature_over_all_of_them(stranger: rsa.RSAPrivateKey) -> None:
    unsigned, signed_value = golden(0)
    signed = replace(unsigned, value=signed_value)
    check = RsaSignatureValidator()
    for wrong in (
        unsigned,
        replace(signed, value=b"\xc3" + signed_value),
        replace(signed, value=signed_value + signed_value[-357:]),
        replace(signed, key=b"k" * 20),
        replace(signed, subkey=signed.subkey + b" "),
        replace(signed, expiration=signed.expiration + 1),
        replace(signed, value=unsigned.value + b"[signature:AAAA]"),
        replace(signed, value=unsigned.value + b"[signature:!]"),
        replace(signed, value=RsaSignatureValidator(stranger).sign_value(unsigned)),
        replace(signed, subkey=signed.subkey + signatures.owner_marker(stranger)),
    ):
        assert not check.validate(wrong)
    assert RsaSignatureValidator(stranger).sign_value(unsigned) == unsigned.value  # not its own


def test_records_without_owner_pass_as_they_are() -> None:
    validator = RsaSignatureValidator(OWNER)
    for plain in (record(), record(b"a[signature:b]c", subkey="peer")):
        assert validator.validate(plain)
        assert validator.sign_value(plain) == plain.value
        assert validator.strip_value(plain) == plain.value
    assert signatures.names_owner(b"x[owner:y]")
    assert not signatures.names_owner(b"x[owner:]")


def test_owners_of_other_or_costly_keys_sign_nothing() -> None:
    ed = ed25519.Ed25519PrivateKey.generate().public_key()
    large = rsa.RSAPublicNumbers(65537, (1 << defaults.DHT_MAX_RSA_BITS) + 1).public_key()
    slow = rsa.RSAPublicNumbers((1 << 2000) + 1, OWNER.public_key().public_numbers().n).public_key()
    keys = [k.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) for k in (ed, large, slow)]
    for public in [*keys, b"ssh-rsa", b"ssh-rsa AAAA", b"\xff", bytes(100_000)]:
        assert not rsa_keys.verify(public, b"data", b"AAAA")
        assert rsa_keys._load(public) is None
        wrong = record(b"v[signature:AAAA]", subkey=b"[owner:" + public + b"]")
        assert not RsaSignatureValidator().validate(wrong)


# --- schemas ----------------------------------------------------------------------------------------------


class Progress(BaseModel):
    epoch: Annotated[int, Ge(0)]
    rate: float


class Run(BaseModel):
    progress: dict[ProtectedSubkey, Progress]
    steps: int
    names: list[str]
    alias: str | None = None


SCHEMA = SchemaValidator({"run": Run})
MARKED = b"[owner:ssh-rsa x]"


@pytest.mark.parametrize(
    ("key", "subkey", "value", "valid"),
    [
        ("run_steps", None, 3, True),
        ("run_steps", None, 3.0, False),
        ("run_steps", None, "3", False),
        ("run_steps", None, True, False),
        ("run_steps", "sub", 3, False),
        ("run_names", None, ["a", "b"], True),
        ("run_names", None, ("a", "b"), False),
        ("run_names", None, [b"a"], False),
        ("run_alias", None, None, True),
        ("run_alias", None, "x", True),
        ("run_progress", MARKED, {"epoch": 1, "rate": 0.5}, True),
        ("run_progress", MARKED, {"rate": 0.5, "epoch": 1}, True),
        ("run_progress", MARKED, {"epoch": 1, "rate": 1}, False),
        ("run_progress", MARKED, {"epoch": -1, "rate": 0.5}, False),
        ("run_progress", MARKED, {"epoch": 1, "rate": 0.5, "more": 0}, False),
        ("run_progress", MARKED, {"epoch": 1}, False),
        ("run_progress", b"nobody", {"epoch": 1, "rate": 0.5}, False),
        ("run_progress", "text", {"epoch": 1, "rate": 0.5}, False),
        ("run_progress", None, {MARKED: {"epoch": 1, "rate": 0.5}}, False),
        ("other", None, object, True),
    ],
)
def test_values_fit_their_schema_without_conversion(
    key: str, subkey: object, value: object, valid: bool
) -> None:
    packed = b"\xc1" if value is object else pack(value)
    offered = record(packed, subkey=subkey, key=DhtId.of(key).to_bytes())
    assert SCHEMA.validate(offered) is valid
    if key == "other":
        assert not SchemaValidator({"run": Run}, others=False).validate(offered)
    else:
        assert not SCHEMA.validate(replace(offered, value=b"\xc1"))
        assert not SCHEMA.validate(replace(offered, subkey=b"\xc1"))


def test_an_empty_prefix_names_keys_by_their_fields_alone() -> None:
    validator = SchemaValidator({"": Run})
    assert not validator.validate(record(pack("x"), key=DhtId.of("steps").to_bytes()))
    assert validator.validate(record(pack("x"), key=DhtId.of("run_steps").to_bytes()))


# --- several ----------------------------------------------------------------------------------------------


class Suffix(RecordValidator):
    def __init__(self, text: bytes, priority: int) -> None:
        self.text = text
        self.priority = priority

    def validate(self, record: DhtRecord) -> bool:
        return record.value.endswith(self.text)

    def sign_value(self, record: DhtRecord) -> bytes:
        return record.value + self.text

    def strip_value(self, record: DhtRecord) -> bytes:
        return record.value.removesuffix(self.text)


def test_validators_sign_in_order_and_check_in_the_opposite_one() -> None:
    both = CompositeValidator([Suffix(b"<late", 5), Suffix(b"<early", 1)])
    signed = both.sign_value(record(b"v"))
    assert signed == b"v<early<late"
    assert both.validate(record(signed))
    assert both.strip_value(record(signed)) == b"v"
    assert not both.validate(record(b"v<late<early"))
    assert not both.validate(record(b"v<late"))
    assert CompositeValidator([]).validate(record())


def test_a_signed_value_is_checked_against_its_schema_without_the_signature() -> None:
    both = CompositeValidator([SCHEMA, RsaSignatureValidator(OWNER)])
    subkey = signatures.owner_marker(OWNER)
    key = DhtId.of("run_progress").to_bytes()
    for value, valid in (({"epoch": 1, "rate": 0.5}, True), ({"epoch": "1", "rate": 0.5}, False)):
        unsigned = record(pack(value), subkey=subkey, key=key)
        assert both.validate(replace(unsigned, value=both.sign_value(unsigned))) is valid


async def test_the_valid_entries_of_a_dictionary_are_kept() -> None:
    check = Suffix(b"!", 0)
    entries = [(n, b"v!" if n % 3 else b"v", LATER) for n in range(50)]
    kept = await valid_part(check, KEY, dictionary(entries))
    assert kept == dictionary([entry for entry in entries if entry[0] % 3])
    assert await valid_part(check, KEY, dictionary(entries[:1])) is None
    whole = dictionary(entries[1:3])
    assert await valid_part(check, KEY, whole) is whole
    assert stripped(check, KEY, whole) == dictionary([(1, b"v", LATER), (2, b"v", LATER)])
    assert await valid_part(check, KEY, Regular(b"v", LATER)) is None
    plain = Regular(b"v!", LATER)
    assert await valid_part(check, KEY, plain) is plain
    assert stripped(check, KEY, plain) == Regular(b"v", LATER)


# --- nodes ------------------------------------------------------------------------------------------------


async def test_nodes_keep_protected_records_for_their_owner_alone(
    autojump_clock: MockClock, stranger: rsa.RSAPrivateKey
) -> None:
    async with swarm(4, validator=RsaSignatureValidator()) as nodes:
        owner = await nodes.start(validator=RsaSignatureValidator(OWNER))
        thief = await nodes.start(validator=RsaSignatureValidator(stranger))
        vandal = await nodes.start(client_mode=True)  # has no validator
        marker = signatures.owner_marker(OWNER)
        result = await owner.store("key", {"n": 1}, LATER, subkey=marker)
        assert len(result.accepted) == 5
        assert (await owner.store("key", "plain", LATER, subkey="other")).ok
        for node in nodes.nodes[:-1]:
            for latest in (True, False):
                found = await node.get("key", latest=latest)
                assert found.value[marker] == FoundEntry({"n": 1}, LATER)
                assert found.value["other"] == FoundEntry("plain", LATER)
        with pytest.raises(ValueError, match="record validator refuses"):
            await thief.store("key", {"n": 2}, LATER + 1, subkey=marker)
        result = await vandal.store("key", {"n": 2}, LATER + 1, subkey=marker)
        assert len(result.refused) == 5
        assert (await owner.get("key")).value[marker] == FoundEntry({"n": 1}, LATER)


async def test_invalid_answers_are_left_out_and_the_valid_ones_read(autojump_clock: MockClock) -> None:
    async with swarm(1, validator=RsaSignatureValidator(OWNER)) as nodes:
        liar = await nodes.start()
        marker = signatures.owner_marker(OWNER)
        await nodes.nodes[0].store("key", 1, LATER, subkey=marker)
        liar._storage.store_subkey(KEY, marker, pack(2), LATER + 5, now=clock())
        liar._storage.store_subkey(KEY, "other", pack(3), LATER, now=clock())
        liar._storage.store_subkey(DhtId.of("all wrong"), marker, pack(2), LATER, now=clock())
        found = await nodes.nodes[0].get("key")
        assert found.value == {marker: FoundEntry(1, LATER), "other": FoundEntry(3, LATER)}
        assert await nodes.nodes[0].get("all wrong") is None
        assert (await liar.get("key")).value["other"].value == 3


async def test_whole_dictionaries_are_kept_in_their_valid_part(autojump_clock: MockClock) -> None:
    async with swarm(2, validator=RsaSignatureValidator()) as nodes:
        marker = signatures.owner_marker(OWNER)
        whole = dictionary([(marker, pack(1), LATER), ("other", pack(2), LATER)])
        peer = nodes.nodes[1].peer_id
        assert await nodes.nodes[0]._remote.store(peer, [StoreItem.of_record(KEY, whole)]) == [False]
        held = nodes.nodes[1]._storage.get(KEY, now=clock())
        assert held == dictionary([("other", pack(2), LATER)])


async def test_what_fits_no_schema_is_neither_stored_nor_sent(autojump_clock: MockClock) -> None:
    async with swarm(3, validator=SCHEMA) as nodes:
        with pytest.raises(ValueError, match="run_steps"):
            await nodes.nodes[0].store_many([Item("free", 1, LATER), Item("run_steps", "x", LATER)])
        await trio.sleep(1)
        assert await nodes.nodes[1].get("free") is None
        assert (await nodes.nodes[0].store("run_steps", 7, LATER)).ok
        assert (await nodes.nodes[2].get("run_steps")).value == 7


async def test_whole_seconds_are_signed_as_they_travel(autojump_clock: MockClock) -> None:
    async with swarm(2, validator=RsaSignatureValidator(OWNER)) as nodes:
        result = await nodes.nodes[0].store("key", 1, int(LATER), subkey=signatures.owner_marker(OWNER))
        assert len(result.accepted) == 2


async def test_validators_added_to_a_running_node_count_from_then_on(
    autojump_clock: MockClock, stranger: rsa.RSAPrivateKey
) -> None:
    """As stock's optimizers do: each run adds its schema, and the same kind of signatures."""
    async with swarm(2) as nodes:
        first, second = nodes.nodes
        assert (await first.store("run_steps", "wrong", LATER)).ok
        for node in (first, second):
            node.add_validators([SCHEMA, RsaSignatureValidator()])
        first.add_validators([SchemaValidator({"other": Run}), RsaSignatureValidator(OWNER)])
        for wrong in ("run_steps", "other_steps"):
            with pytest.raises(ValueError, match=wrong):
                await first.store(wrong, "wrong", LATER + 1)
        assert await second.get("run_steps", latest=True) is not None  # what was there stays
        marker = signatures.owner_marker(OWNER)
        assert len((await first.store("key", 1, LATER, subkey=marker)).accepted) == 2
        vandal = await nodes.start()
        assert (await vandal.store("key", 2, LATER + 1, subkey=marker)).accepted == (vandal.peer_id,)
        assert (await second.get("key")).value == {marker: FoundEntry(1, LATER)}


def test_two_signature_validators_become_one_that_signs_for_both(stranger: rsa.RSAPrivateKey) -> None:
    both = CompositeValidator([RsaSignatureValidator(OWNER), SCHEMA, RsaSignatureValidator(stranger)])
    nested = CompositeValidator([RsaSignatureValidator(), both])
    for key in (OWNER, stranger):
        unsigned = record(subkey=signatures.owner_marker(key))
        signed = replace(unsigned, value=nested.sign_value(unsigned))
        assert nested.validate(signed)
        assert signed.value.count(b"[signature:") == 1
        assert nested.strip_value(signed) == b"v"
    assert RsaSignatureValidator().merged_with(SCHEMA) is None
    assert SCHEMA.merged_with(SchemaValidator({})) is None
