"""Reports of peers, and what follows from them, against numbers and bytes of Hivemind's own ProgressTracker."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_der_private_key

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.dht import CompositeValidator, DhtId, DhtRecord, RsaSignatureValidator
from kwaainet_bridge.hivemind.dht.signatures import owner_marker
from kwaainet_bridge.hivemind.optim.progress import (
    Progress,
    Rate,
    Report,
    progress_key,
    read_reports,
    run_validators,
)
from kwaainet_bridge.wire.msgpack import pack, unpack

VECTORS = Path(__file__).parents[1] / "vectors"
GOLDEN = json.loads((VECTORS / "hivemind-training.json").read_text())
NOW = 1.7e9
PEER = b"\x12\x20" + bytes(range(32))
GOOD: dict[str, Any] = {
    "peer_id": PEER,
    "epoch": 7,
    "samples_accumulated": 1234,
    "samples_per_second": 56.78125,
    "time": NOW + 0.5,
    "client_mode": False,
}


def key() -> rsa.RSAPrivateKey:
    der = json.loads((VECTORS / "hivemind-signatures.json").read_text())["private_key"]
    loaded = load_der_private_key(bytes.fromhex(der), password=None)
    assert isinstance(loaded, rsa.RSAPrivateKey)
    return loaded


OWNER = key()
VALIDATOR = CompositeValidator(run_validators("run", RsaSignatureValidator(OWNER)))


def report(**changes: Any) -> dict[str, Any]:
    return GOOD | changes


# --- records ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "value"), [(0, GOOD), (1, None)])
def test_records_are_stocks_byte_for_byte(number: int, value: dict[str, Any] | None) -> None:
    """A report, and None by which a peer takes it back; signatures differ each time, by their salt."""
    golden = GOLDEN["records"][number]
    ours = None if value is None else Report.model_validate(value).model_dump()
    record = DhtRecord(
        DhtId.of(progress_key("run")).to_bytes(), pack(owner_marker(OWNER)), pack(ours), NOW + 60.5
    )
    assert golden["key"] == record.key.hex()
    assert golden["subkey"] == record.subkey.hex()
    assert golden["value"] == record.value.hex()
    assert golden["expiration"] == record.expiration
    signed = VALIDATOR.sign_value(record)
    assert len(signed) == len(golden["signed_value"]) // 2
    for accepted in (signed, bytes.fromhex(golden["signed_value"])):
        theirs = replace(record, value=accepted)
        assert VALIDATOR.validate(theirs)
        assert unpack(VALIDATOR.strip_value(theirs)) == value


WRONG: list[Any] = [
    7,
    "report",
    [],
    {},
    report(epoch=-1),
    report(epoch=7.0),
    report(epoch=True),
    report(epoch=2**60),
    report(epoch="7"),
    report(samples_accumulated=-8),
    report(samples_accumulated=2**63),
    report(samples_per_second=-1.0),
    report(samples_per_second=math.nan),
    report(samples_per_second=math.inf),
    report(samples_per_second=1e300),
    report(time=math.nan),
    report(time="now"),
    report(client_mode=0),
    report(client_mode=None),
    report(peer_id="12D3"),
    report(peer_id=bytes(1000)),
    report(more=1),
    {k: v for k, v in GOOD.items() if k != "time"},
]


def is_valid(value: Any) -> bool:
    """Whether a node keeps it, well signed."""
    record = DhtRecord(
        DhtId.of(progress_key("run")).to_bytes(), pack(owner_marker(OWNER)), pack(value), NOW + 60
    )
    return VALIDATOR.validate(replace(record, value=VALIDATOR.sign_value(record)))


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_malformed_reports_are_neither_kept_nor_read(number: int) -> None:
    value = WRONG[number]
    assert not is_valid(value)
    reports, malformed = read_reports([GOOD, value, None, GOOD])
    assert [r.model_dump() for r in reports] == [GOOD, GOOD]
    assert malformed == 1


def test_whole_numbers_are_no_floats_to_nodes() -> None:
    """As in stock nodes, which would refuse them."""
    assert is_valid(report(samples_per_second=3.0))
    assert not is_valid(report(samples_per_second=3))
    assert not is_valid(report(time=1700000000))


def test_reports_need_an_owner_and_its_signature() -> None:
    run_key = DhtId.of(progress_key("run")).to_bytes()
    unsigned = DhtRecord(run_key, pack(owner_marker(OWNER)), pack(GOOD), NOW + 60)
    assert not VALIDATOR.validate(unsigned)
    assert not VALIDATOR.validate(replace(unsigned, subkey=pack(b"somebody")))
    plain = replace(unsigned, subkey=pack(None), value=pack(3))
    assert not VALIDATOR.validate(plain)
    other_run = replace(unsigned, key=DhtId.of(progress_key("other")).to_bytes(), subkey=pack(b"somebody"))
    assert VALIDATOR.validate(other_run)


# --- rates and conclusions --------------------------------------------------------------------------------


def test_rates_are_those_of_stock() -> None:
    rate = Rate(now=NOW)
    now = NOW
    assert rate.seconds is None
    for samples, seconds, expected in GOLDEN["rates"]:
        now += seconds
        rate.update(samples, now=now)
        assert rate.per_second == pytest.approx(expected, rel=1e-5)  # sums of floats near 1.7e9
    again = Rate(now=0.0)
    for samples, seconds, expected in GOLDEN["rates"]:
        again.measured(samples, seconds)
        assert again.per_second == pytest.approx(expected, rel=1e-12)
    assert again.seconds == pytest.approx(1 / again.per_second)


def test_a_clock_set_back_costs_nothing_but_one_measurement() -> None:
    rate = Rate(now=NOW)
    rate.update(8, now=NOW - 100)
    assert rate.per_second == 1e20  # it took no time; no report says so
    progress = Progress(PEER, 100, now=NOW)
    progress.accumulated(0, 8, now=NOW - 100)
    assert progress.own.samples_per_second == 1e15
    progress.accumulated(0, 16, now=NOW - 99)
    assert 8 < progress.own.samples_per_second < 32


@pytest.mark.parametrize("number", range(len(GOLDEN["progress"])))
def test_conclusions_are_those_of_stock(number: int) -> None:
    case = GOLDEN["progress"][number]
    progress = Progress(PEER, case["target"], now=NOW)
    if case["seconds_for_8"] is not None:
        progress.rate.measured(8, case["seconds_for_8"])
    progress.own = progress._report(case["own_epoch"], case["own_samples"], NOW)
    reports = [r and r | {"peer_id": bytes.fromhex(r["peer_id"])} for r in case["reports"]]
    progress.look(reports or None, now=NOW)
    swarm = progress.swarm
    assert (swarm.epoch, swarm.samples) == (case["epoch"], case["samples"])
    assert (swarm.peers, swarm.others, swarm.clients) == (case["peers"], case["peers"], case["clients"])
    assert swarm.end_of_epoch - NOW == pytest.approx(case["eta"], rel=1e-6, abs=1e-3)
    assert swarm.next_look - NOW == pytest.approx(case["next_fetch"], rel=1e-6, abs=1e-3)


def test_a_report_ages_no_more_than_its_record() -> None:
    progress = Progress(PEER, 1_000_000, now=NOW)
    progress.look([report(time=0.0, epoch=0, samples_per_second=10.0)], now=NOW)
    missing = 1_000_000 - 1234 - 10 * defaults.TRAINING_RECORD_SECONDS
    assert progress.swarm.end_of_epoch == pytest.approx(NOW + missing / 10.0)
    progress.look([report(time=NOW + 1e12, epoch=0, samples_per_second=10.0)], now=NOW)
    assert progress.swarm.end_of_epoch == pytest.approx(NOW + (1_000_000 - 1234) / 10.0)


# --- one peer's epochs ------------------------------------------------------------------------------------


def test_an_epoch_is_over_when_there_are_enough_samples_or_its_estimated_time_has_come() -> None:
    progress = Progress(PEER, 100, now=NOW)
    assert not progress.ready(now=NOW)
    progress.accumulated(0, 8, now=NOW + 1)
    assert progress.swarm.samples == 8
    progress.look(
        [report(epoch=0, samples_accumulated=60, samples_per_second=8.0, time=NOW + 1)], now=NOW + 1
    )
    assert not progress.ready(now=NOW + 5.9)
    assert progress.end_of_epoch(now=NOW + 2) == pytest.approx(NOW + 6)
    assert progress.ready(now=NOW + 6)
    progress.accumulated(0, 47, now=NOW + 2)
    assert progress.swarm.samples == 99
    assert not progress.ready(now=NOW + 2)
    progress.accumulated(0, 48, now=NOW + 2)
    assert progress.ready(now=NOW + 2)
    assert progress.end_of_epoch(now=NOW + 2) == NOW + 2
    progress.begin_epoch(1, now=NOW + 3)
    assert (progress.swarm.epoch, progress.swarm.samples, progress.looked) == (1, 0, False)
    assert not progress.ready(now=NOW + 1000)


def test_an_epoch_is_over_when_others_are_ahead_but_not_those_in_client_mode() -> None:
    progress = Progress(PEER, 100, now=NOW)
    progress.look([report(epoch=1, client_mode=True)], now=NOW)
    assert (progress.swarm.epoch, progress.swarm.clients) == (0, 1)
    assert not progress.ready(now=NOW)
    progress.look([report(epoch=1)], now=NOW)
    assert progress.ready(now=NOW)


def test_only_peers_with_samples_of_late_report_and_none_before_their_first() -> None:
    progress = Progress(PEER, 100, now=NOW)
    assert progress.to_tell() is None
    progress.accumulated(0, 8, now=NOW)
    assert progress.to_tell() == progress.own
    for epoch in (1, 2):
        progress.begin_epoch(epoch, now=NOW)
        assert (progress.to_tell() is not None) is (epoch < 2)
    progress.accumulated(2, 8, now=NOW)
    assert progress.to_tell() is not None


def test_epochs_that_nobody_has_shown_are_doubted_for_a_while() -> None:
    progress = Progress(PEER, 100, now=NOW)
    liar, honest = report(epoch=2**50, peer_id=b"liar"), report(epoch=1, peer_id=b"honest")
    progress.doubt(until=NOW + 60, now=NOW)  # there is nobody to doubt
    progress.look([liar, honest], now=NOW)
    assert progress.swarm.epoch == 2**50
    progress.doubt(until=NOW + 60, now=NOW)
    assert (progress.swarm.epoch, progress.swarm.others) == (1, 1)
    progress.look([liar | {"epoch": 2**50 + 1}, honest | {"epoch": 5}], now=NOW + 59)
    assert (progress.swarm.epoch, progress.swarm.others) == (5, 1)
    progress.look([liar, honest], now=NOW + 60)
    assert progress.swarm.epoch == 2**50


def test_the_next_epoch_is_never_doubted() -> None:
    progress = Progress(PEER, 100, now=NOW)
    progress.look([report(epoch=2)], now=NOW)
    progress.doubt(until=NOW + 60, now=NOW)
    assert progress.swarm.epoch == 0
    progress.begin_epoch(1, now=NOW + 1)
    progress.look([report(epoch=2)], now=NOW + 2)
    assert progress.swarm.epoch == 2


def test_a_run_needs_a_batch_size() -> None:
    with pytest.raises(ValueError, match="target_batch_size is 0"):
        Progress(PEER, 0, now=NOW)
