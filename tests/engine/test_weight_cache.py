"""Tensors from a hub: only what is needed, kept, found again, verified, and removed for others."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Iterator
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from engine_support import BLOCKS, Reference, close
from hypothesis import given
from hypothesis import strategies as st
from local_hub import COMMIT, REPOSITORY, LocalHub, local_hub

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import Engine, EngineConfig, LoadProgress
from kwaainet_bridge.engine.hub import HttpHub
from kwaainet_bridge.engine.partial_file import bytes_of, merged, without
from kwaainet_bridge.engine.weight_cache import WeightCache
from kwaainet_bridge.errors import CheckpointError, ConfigError, ModelUnreachable

WEIGHTS = "model.safetensors"


@pytest.fixture
def hub(single: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    with local_hub(single) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def single(save_model: Any, tmp_path: Path) -> Path:
    """A model in one file, of which a span is a part."""
    import transformers
    from engine_support import SIZES

    folder = tmp_path / "served"
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "DOWNLOAD_CHUNK_BYTES", 4096)
    monkeypatch.setattr(defaults, "DOWNLOAD_GAP_BYTES", 16)
    monkeypatch.setattr(defaults, "DOWNLOAD_PART_BYTES", 20_000)
    monkeypatch.setattr(defaults, "DISK_RESERVE_BYTES", 0)


class Pauses:
    def __init__(self) -> None:
        self.taken: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.taken.append(seconds)


def cache(folder: Path, **options: Any) -> WeightCache:
    return WeightCache(
        folder / "weights", hub=HttpHub(timeout=5), rng=random.Random(1), **{"wait": Pauses()} | options
    )


async def load(weights: WeightCache, blocks: range, seen: list[LoadProgress] | None = None) -> Engine:
    config = EngineConfig(REPOSITORY, blocks=blocks)
    return await Engine.load(config, weights=weights, progress=None if seen is None else seen.append)


async def check(weights: WeightCache, blocks: range, folder: Path) -> None:
    """These blocks compute what those of the whole model do."""
    hidden = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(2))
    whole = Reference(folder)
    expected = hidden
    for block in range(blocks.stop):
        if block == blocks.start:
            hidden = expected
        places = whole.base.rotary_emb(expected, torch.arange(5)[None])
        mask = torch.full((1, 1, 5, 5), torch.finfo(torch.float32).min).triu(1)
        output = whole.layers[block](expected, attention_mask=mask, position_embeddings=places)
        expected = output[0] if isinstance(output, tuple) else output
    engine = await load(weights, blocks)
    async with aclosing(engine):
        close(await engine.forward(hidden, blocks), expected)


def kept(folder: Path) -> Path:
    return folder / "weights" / "org--name" / COMMIT / WEIGHTS


def record(folder: Path) -> Path:
    return kept(folder).with_name(WEIGHTS + ".parts.json")


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


async def test_all_of_a_file_is_compared_with_the_hubs_digest(hub: LocalHub, tmp_path: Path) -> None:
    weights = cache(tmp_path)
    names = weights.path(REPOSITORY, WEIGHTS, COMMIT)
    assert names is not None
    hub.etags[WEIGHTS] = "0" * 64
    from safetensors import safe_open

    with safe_open(hub.folder / WEIGHTS, "pt") as file:
        tensors = list(file.keys())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defaults, "DOWNLOAD_GAP_BYTES", 1 << 20)
        other = cache(tmp_path / "other")
        with pytest.raises(CheckpointError, match="has another SHA-256 than the hub says"):
            other.fetch(REPOSITORY, COMMIT, {WEIGHTS: tensors}, lambda *_: None)
        assert not kept(tmp_path / "other").exists()
        weights.fetch(REPOSITORY, COMMIT, {WEIGHTS: tensors}, lambda *_: None)  # it was told the right one
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
    with pytest.raises(ModelUnreachable, match="cannot be fetched"):
        await load(cache(tmp_path), range(3))


def test_old_files_make_room(hub: LocalHub, tmp_path: Path) -> None:
    old, newer = (tmp_path / "weights" / "org--old" / commit / WEIGHTS for commit in ("1" * 40, "2" * 40))
    for at, path in enumerate((old, newer)):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * 10_000)
        told = {"size": 10_000, "etag": "e", "parts": [[0, 10_000, "d"]]}
        path.with_name(WEIGHTS + ".parts.json").write_text(json.dumps(told))
        os.utime(path, (at, at))
    tensors = {WEIGHTS: ["model.layers.0.mlp.up_proj.weight"]}
    header = 8 + int.from_bytes((hub.folder / WEIGHTS).read_bytes()[:8], "little")
    one = 64 * 96 * 4
    weights = cache(tmp_path, quota=header + one + 10_000 + 8192)
    weights.fetch(REPOSITORY, COMMIT, tensors, lambda *_: None)
    assert not old.exists()
    assert newer.exists()
    assert kept(tmp_path).exists()
    everything = {WEIGHTS: [f"model.layers.{block}.mlp.up_proj.weight" for block in range(BLOCKS)]}
    small = cache(tmp_path, quota=3 * one)
    with pytest.raises(
        CheckpointError, match=r"do not fit into .*weights: it holds .* quota .*cache_quota_gib"
    ):
        small.fetch(REPOSITORY, COMMIT, everything, lambda *_: None)
    full = cache(tmp_path, free=lambda _folder: 0)
    with pytest.raises(CheckpointError, match=r"its disk has 0 MiB left\. Serve fewer blocks"):
        full.fetch(REPOSITORY, COMMIT, everything, lambda *_: None)


def test_a_file_in_use_is_not_removed(hub: LocalHub, tmp_path: Path) -> None:
    one, two = cache(tmp_path), cache(tmp_path / "elsewhere")
    one.path(REPOSITORY, WEIGHTS, COMMIT)
    found = one._find(REPOSITORY, WEIGHTS, COMMIT)
    assert not isinstance(found, Path)
    assert found is not None
    two.folder = one.folder
    with found.lock:
        assert not two._remove(kept(tmp_path))
    assert two._remove(kept(tmp_path))
    assert not kept(tmp_path).exists()


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
    engine = await Engine.load(EngineConfig(str(single), allow_pickled=True))
    async with aclosing(engine):
        close(await engine.forward(hidden, engine.blocks), whole(hidden))
    (single / "pytorch_model.bin").unlink()
    half = {"a.bin": dict(list(tensors.items())[::2]), "b.bin": dict(list(tensors.items())[1::2])}
    for name, part in half.items():
        torch.save(part, single / name)
    index = {"weight_map": {name: file for file, part in half.items() for name in part}}
    (single / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    engine = await Engine.load(EngineConfig(str(single), allow_pickled=True))
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
        await Engine.load(EngineConfig(str(single), allow_pickled=True))


def test_the_quota_is_a_size() -> None:
    from kwaainet_bridge.config import parse_config

    assert parse_config("model: {cache_quota_gib: 1.5}", "x").model.cache_quota_gib == 1.5
    with pytest.raises(ConfigError, match=r"model\.cache_quota_gib"):
        parse_config("model: {cache_quota_gib: 0}", "x")
