"""Tensors from a hub: only what is needed, kept, found again, verified, and removed for others."""

from __future__ import annotations

import json
import os
import pickle
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_support import BLOCKS, Reference, close
from hub_support import WEIGHTS, Pauses, cache, check, kept, load, record
from hypothesis import given
from hypothesis import strategies as st
from local_hub import COMMIT, REPOSITORY, LocalHub
from safetensors import safe_open

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import Engine, EngineConfig, LoadProgress, Storage
from kwaainet_bridge.engine.weights.partial_file import bytes_of, merged, without
from kwaainet_bridge.errors import CheckpointError, ConfigError, ModelUnreachable

pytestmark = pytest.mark.usefixtures("small_steps")


async def test_only_needed_tensors_are_fetched_and_found_again(hub: LocalHub, tmp_path: Path) -> None:
    size = (hub.folder / WEIGHTS).stat().st_size
    seen: list[LoadProgress] = []
    engine = await load(cache(tmp_path), range(2, 4), seen)
    await engine.aclose()
    assert 0.3 < hub.sent[WEIGHTS] / size < 0.5  # two blocks of six, embeddings and head are small
    fetching = [progress for progress in seen if progress.missing_bytes]
    assert fetching[-1].fetched_bytes == fetching[-1].missing_bytes
    assert kept(tmp_path).stat().st_size == size
    assert bytes_of(record(tmp_path)) == hub.sent[WEIGHTS]

    before, asked = dict(hub.sent), hub.requests
    await check(cache(tmp_path), range(2, 4), hub.folder)
    assert hub.sent[WEIGHTS] == before[WEIGHTS]
    assert hub.requests - asked <= 4  # what the hub's own library asks about small files

    await check(cache(tmp_path), range(3, 5), hub.folder)  # a move: only what is new
    assert 0.1 < (hub.sent[WEIGHTS] - before[WEIGHTS]) / size < 0.25


def all_tensors(hub: LocalHub) -> dict[str, list[str]]:
    with safe_open(hub.folder / WEIGHTS, "pt") as file:
        return {WEIGHTS: list(file.keys())}


def test_all_of_a_file_is_compared_with_the_hubs_digest(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "DOWNLOAD_GAP_BYTES", 1 << 20)
    hub.etags[WEIGHTS] = "0" * 64
    with pytest.raises(CheckpointError, match="has another SHA-256 than the hub says"):
        cache(tmp_path).fetch(REPOSITORY, COMMIT, all_tensors(hub), lambda *_: None)
    assert not kept(tmp_path).exists()
    hub.etags.clear()
    cache(tmp_path).fetch(REPOSITORY, COMMIT, all_tensors(hub), lambda *_: None)
    assert kept(tmp_path).read_bytes() == (hub.folder / WEIGHTS).read_bytes()


async def test_a_download_that_breaks_off_goes_on(hub: LocalHub, tmp_path: Path) -> None:
    pauses = Pauses()
    weights = cache(tmp_path, wait=pauses)
    weights.path(REPOSITORY, WEIGHTS, COMMIT)  # with the header there, long ranges follow
    hub.drops = 3
    await check(weights, range(BLOCKS), hub.folder)
    assert len(pauses.taken) == 3
    assert all(0.5 <= pause <= 1 for pause in pauses.taken)  # each brought something: not longer and longer
    assert hub.sent[WEIGHTS] <= (hub.folder / WEIGHTS).stat().st_size  # nothing came twice


async def test_a_stopped_download_is_resumed_by_the_next_process(hub: LocalHub, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(fetched: int, total: int) -> None:
        if fetched > total / 2:
            raise Stop

    tensors = [f"model.layers.{block}.mlp.up_proj.weight" for block in range(BLOCKS)]
    with pytest.raises(Stop):
        cache(tmp_path).fetch(REPOSITORY, COMMIT, {WEIGHTS: tensors}, stop)
    first = hub.sent[WEIGHTS]
    told: list[tuple[int, int]] = []
    cache(tmp_path).fetch(REPOSITORY, COMMIT, {WEIGHTS: tensors}, lambda *now: told.append(now))
    assert told[-1][0] == told[-1][1] < first
    last: list[tuple[int, int]] = []
    cache(tmp_path).fetch(REPOSITORY, COMMIT, {WEIGHTS: tensors}, lambda *now: last.append(now))
    assert last == [(0, 0)]


async def test_a_server_that_stays_away_is_named(hub: LocalHub, tmp_path: Path) -> None:
    hub.broken = 10**6
    pauses = Pauses()
    with pytest.raises(
        ModelUnreachable, match=r"org/name/model\.safetensors cannot be fetched \(the server answers 503"
    ):
        cache(tmp_path, wait=pauses).path(REPOSITORY, WEIGHTS, COMMIT)
    assert len(pauses.taken) == defaults.DOWNLOAD_TRIES
    assert pauses.taken[-1] > 10 * pauses.taken[0]
    assert max(pauses.taken) <= defaults.DOWNLOAD_MAX_PAUSE_SECONDS


async def test_a_server_without_ranges(hub: LocalHub, tmp_path: Path) -> None:
    hub.ranges = False
    await check(cache(tmp_path), range(1, 3), hub.folder)
    assert kept(tmp_path).read_bytes() == (hub.folder / WEIGHTS).read_bytes()


async def test_bytes_that_have_changed_on_the_disk(hub: LocalHub, tmp_path: Path, caplog: Any) -> None:
    await check(cache(tmp_path), range(2), hub.folder)
    sent = hub.sent[WEIGHTS]
    parts = json.loads(record(tmp_path).read_text())["parts"]
    start, stop, _ = parts[-1]
    with kept(tmp_path).open("r+b") as file:
        file.seek((start + stop) // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    await check(cache(tmp_path), range(2), hub.folder)
    assert "have changed on the disk: fetched again" in caplog.text
    assert 0 < hub.sent[WEIGHTS] - sent <= stop - start


@pytest.mark.parametrize("text", ["", "{", "[]", '{"size": 3, "etag": "x", "parts": [[0, 9, "x"]]}'])
async def test_a_record_that_cannot_be_is_made_anew(hub: LocalHub, tmp_path: Path, text: str) -> None:
    await check(cache(tmp_path), range(1), hub.folder)
    record(tmp_path).write_text(text)
    await check(cache(tmp_path), range(1), hub.folder)


async def test_without_a_connection_what_is_there_is_enough(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await check(cache(tmp_path), range(2), hub.folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.broken = 10**6
    await check(cache(tmp_path), range(2), hub.folder)
    with pytest.raises(ModelUnreachable, match="not in the local cache, and HF_HUB_OFFLINE forbids"):
        await load(cache(tmp_path), range(3))


def test_a_file_that_the_repository_does_not_have(hub: LocalHub, tmp_path: Path) -> None:
    assert cache(tmp_path).path(REPOSITORY, "else.safetensors", COMMIT) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 100,
        (10**12).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (40).to_bytes(8, "little") + b'{"a": {"data_offsets": [0, 99999999999]}}',
        (27).to_bytes(8, "little") + b'{"a": {"data_offsets": [5]}}',
    ],
)
def test_what_is_no_safetensors_file(hub: LocalHub, tmp_path: Path, data: bytes) -> None:
    (hub.folder / WEIGHTS).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        cache(tmp_path).path(REPOSITORY, WEIGHTS, COMMIT)


RANGES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda pair: (min(pair), max(pair))))


@given(RANGES, RANGES)
def test_ranges(wanted: list[tuple[int, int]], there: list[tuple[int, int]]) -> None:
    def points(ranges: list[tuple[int, int]]) -> set[int]:
        return {at for start, stop in ranges for at in range(start, stop)}

    left = without(wanted, there)
    assert points(left) == points(wanted) - points(there)
    assert all(start < stop for start, stop in left)
    joined = merged(wanted)
    assert points(joined) == points(wanted)
    assert all(first[1] < second[0] for first, second in pairwise(joined))


# --- pickled weights


async def test_pickled_weights_if_asked_for(single: Path, hidden: torch.Tensor) -> None:
    """One file, and several with an index; without being asked they are refused."""
    whole = Reference(single)
    from safetensors.torch import load_file

    tensors = load_file(single / WEIGHTS)
    (single / WEIGHTS).unlink()
    torch.save(tensors, single / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"or set model\.allow_pickled"):
        await Engine.load(EngineConfig(str(single)))
    engine = await Engine.load(EngineConfig(str(single), storage=Storage(allow_pickled=True)))
    async with aclosing(engine):
        close(await engine.forward(hidden, engine.blocks), whole(hidden))
    (single / "pytorch_model.bin").unlink()
    half = {"a.bin": dict(list(tensors.items())[::2]), "b.bin": dict(list(tensors.items())[1::2])}
    for name, part in half.items():
        torch.save(part, single / name)
    index = {"weight_map": {name: file for file, part in half.items() for name in part}}
    (single / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    engine = await Engine.load(EngineConfig(str(single), storage=Storage(allow_pickled=True)))
    async with aclosing(engine):
        close(await engine.forward(hidden, engine.blocks), whole(hidden))


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /nowhere/at/all",)


@pytest.mark.parametrize("what", [{"a": Evil()}, [1, 2], {"a": 1}])
async def test_a_pickle_of_anything_else_is_refused(single: Path, what: Any) -> None:
    (single / WEIGHTS).unlink()
    torch.save(what, single / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(CheckpointError, match="convert the model to safetensors"):
        await Engine.load(EngineConfig(str(single), storage=Storage(allow_pickled=True)))


def test_the_quota_is_a_size() -> None:
    from kwaainet_bridge.config import parse_config

    assert parse_config("model: {cache_quota_gib: 1.5}", "x").model.cache_quota_gib == 1.5
    with pytest.raises(ConfigError, match=r"model\.cache_quota_gib"):
        parse_config("model: {cache_quota_gib: 0}", "x")
