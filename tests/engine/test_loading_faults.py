"""What may go wrong with weights of a hub: its servers, what they send, the disk, and others in the same folder."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from hub_support import WEIGHTS, Pauses, cache, check, kept, record
from local_hub import COMMIT, REPOSITORY, LocalHub
from safetensors.torch import load_file, save_file

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import Engine, EngineConfig, LoadProgress, Storage, load_client_weights
from kwaainet_bridge.engine.checkpoint import Checkpoint
from kwaainet_bridge.engine.weights import header
from kwaainet_bridge.engine.weights.partial_file import bytes_of
from kwaainet_bridge.engine.weights.room import remove
from kwaainet_bridge.errors import CheckpointError, ModelUnreachable

pytestmark = pytest.mark.usefixtures("small_steps")

UP = [f"model.layers.{block}.mlp.up_proj.weight" for block in range(6)]
ONE = 64 * 96 * 4
"""Bytes of one of them."""


def nothing(*_: object) -> None:
    """Hears of progress."""


def fetch(weights: Any, names: list[str], told: Any = nothing, file: str = WEIGHTS) -> None:
    weights.fetch(REPOSITORY, COMMIT, {file: names}, told)


# --- servers


async def test_weights_that_lie_elsewhere(hub: LocalHub, tmp_path: Path) -> None:
    """Large files are on other servers than the hub, whose own digests are none of the hub's."""
    hub.elsewhere = True
    await check(cache(tmp_path), range(2), hub.folder)
    assert json.loads(record(tmp_path).read_text())["etag"] == hub.etag(WEIGHTS)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_another_content_under_the_same_name(hub: LocalHub, tmp_path: Path, elsewhere: bool) -> None:
    hub.elsewhere = elsewhere
    fetch(cache(tmp_path), UP[:1])
    hub.etags[WEIGHTS] = "1" * 64
    fetch(cache(tmp_path), UP[:1])  # what is there needs no server
    with pytest.raises(CheckpointError, match="is another file on the server than the one that was begun"):
        fetch(cache(tmp_path), UP[:2])
    assert not kept(tmp_path).exists()
    fetch(cache(tmp_path), UP[:2])
    assert json.loads(record(tmp_path).read_text())["etag"] == "1" * 64


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"shift": 1}, "the server sends other bytes than it was asked for"),
        ({"more": 5}, "the server sends more than was asked for"),
        ({"encoding": "gzip"}, "the server compresses parts of files"),
        ({"broken": 1, "status": 404}, "the server answers 404"),
        ({"broken": 1, "status": 401}, "for a gated model, that HF_TOKEN is set"),
    ],
)
def test_answers_that_are_of_no_use(
    hub: LocalHub, tmp_path: Path, fault: dict[str, Any], reason: str
) -> None:
    pauses = Pauses()
    weights = cache(tmp_path, wait=pauses)
    weights.path(REPOSITORY, WEIGHTS, COMMIT)
    there = bytes_of(record(tmp_path))
    for name, value in fault.items():
        setattr(hub, name, value)
    with pytest.raises(CheckpointError, match=reason):
        fetch(weights, UP[1:2])
    assert not pauses.taken
    assert bytes_of(record(tmp_path)) - there <= ONE  # nothing beyond what was asked for


@pytest.mark.parametrize("status", [429, 500, 503])
def test_answers_after_which_it_is_tried_again(hub: LocalHub, tmp_path: Path, status: int) -> None:
    pauses = Pauses()
    hub.broken, hub.status = 2, status
    fetch(cache(tmp_path, wait=pauses), UP[:1])
    assert len(pauses.taken) == 2
    assert pauses.taken[0] < pauses.taken[1]


def test_a_hub_that_is_not_there(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}",
    )
    pauses = Pauses()
    with pytest.raises(
        ModelUnreachable, match=r"name/model\.safetensors cannot be fetched .*what has come is kept"
    ):
        cache(tmp_path, wait=pauses).path(REPOSITORY, WEIGHTS, COMMIT)
    assert len(pauses.taken) == defaults.DOWNLOAD_TRIES


def test_a_size_that_cannot_be(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "MAX_WEIGHT_FILE_BYTES", 1000)
    with pytest.raises(CheckpointError, match="no usable size"):
        cache(tmp_path).path(REPOSITORY, WEIGHTS, COMMIT)
    assert not kept(tmp_path).exists()


def test_whole_files_over_a_line_that_breaks(hub: LocalHub, tmp_path: Path) -> None:
    """Without ranges each try begins anew; one that always ends at the same place is given up."""
    hub.ranges = False
    pauses = Pauses()
    hub.drops = 3  # the first of them is the answer that should have been a part
    fetch(cache(tmp_path, wait=pauses), UP[:1])
    assert len(pauses.taken) == 2
    assert kept(tmp_path).read_bytes() == (hub.folder / WEIGHTS).read_bytes()
    hub.drops = 10**6
    with pytest.raises(ModelUnreachable, match="cannot be fetched"):
        fetch(cache(tmp_path / "other", wait=pauses), UP[:1])
    assert len(pauses.taken) == 2 + defaults.DOWNLOAD_TRIES


def test_a_whole_file_that_does_not_fit(hub: LocalHub, tmp_path: Path) -> None:
    hub.ranges = False
    with pytest.raises(CheckpointError, match="do not fit into"):
        fetch(cache(tmp_path, quota=100_000), UP[:1])
    assert WEIGHTS not in hub.sent or hub.sent[WEIGHTS] < 2 * (hub.folder / WEIGHTS).stat().st_size
    assert bytes_of(record(tmp_path)) < 100_000


async def test_nobody_fetches_for_a_start_that_was_cancelled(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "DOWNLOAD_TELL_SECONDS", 0.0)
    weights, ended = cache(tmp_path), threading.Event()
    fetch_tensors = weights.fetch

    def noted(*args: Any) -> None:
        try:
            fetch_tensors(*args)
        finally:
            ended.set()

    weights.fetch = noted  # type: ignore[method-assign]
    with trio.fail_after(30), trio.CancelScope() as start:
        config = EngineConfig(REPOSITORY, blocks=range(4))

        def stop(progress: LoadProgress) -> None:
            if progress.fetched_bytes:
                start.cancel()

        await Engine.load(config, weights=weights, progress=stop)
    with trio.fail_after(30):
        await trio.to_thread.run_sync(ended.wait)
    assert bytes_of(record(tmp_path)) < (hub.folder / WEIGHTS).stat().st_size / 3


# --- headers


def tensor(*offsets: Any, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"a": tensor(0, 8), "b": tensor(4, 12)}, "b lies on another tensor"),
        ({"a": tensor(0, 10**9)}, "a lies outside of the file"),
        ({"a": tensor(8, 4)}, "a lies outside of the file"),
        ({"a": tensor(-1, 4)}, "a lies outside of the file"),
        ({"a": tensor(0, 8, shape=[3])}, "a has another size than its shape says"),
        ({"a": tensor(0, 8, shape=[-2, -1])}, "its header cannot be read"),
        ({"a": tensor(0, 8, shape="2")}, "its header cannot be read"),
        ({"a": tensor(0, 8, dtype=None)}, "its header cannot be read"),
        ({"a": tensor(0.0, 4)}, "its header cannot be read"),
        ({"a": tensor(True, 4)}, "its header cannot be read"),
        ({"a": tensor(1, 2, 3)}, "its header cannot be read"),
        ({"a": 3}, "its header cannot be read"),
        ([1], "its header cannot be read"),
    ],
)
def test_headers_that_cannot_be(told: Any, reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"org/name/x: {reason}"):
        header.places_in(json.dumps(told).encode(), 1000, "org/name/x")


def test_a_header_that_is_deep_or_none() -> None:
    for text in (b"[" * 100_000, b"\xff", b'{"a": {"data_offsets": [1e999, 3]}}'):
        with pytest.raises(CheckpointError, match="its header cannot be read"):
            header.places_in(text, 1 << 30, "x")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        header.length_of((defaults.MAX_TENSOR_HEADER_BYTES + 1).to_bytes(8, "little"), 1 << 40, "x")


# --- the disk


def test_holes_are_never_read_as_zeros(hub: LocalHub, tmp_path: Path) -> None:
    """Somebody removes the cache between fetching and reading."""
    weights = cache(tmp_path)
    checkpoint = Checkpoint(REPOSITORY, weights=weights)
    checkpoint.fetch_tensors(UP[:1])
    shutil.rmtree(tmp_path / "weights")
    ((_, tensor),) = checkpoint.read({UP[0]: [96, 64]})
    assert torch.equal(tensor, load_file(hub.folder / WEIGHTS)[UP[0]])


def test_a_folder_that_cannot_be_written(hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("a file")
    with pytest.raises(CheckpointError, match=r"weights cannot be kept in .*another model\.cache_dir"):
        fetch(cache(tmp_path), UP[:1])


def test_a_disk_that_is_full_in_the_middle(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    weights = cache(tmp_path)
    weights.path(REPOSITORY, WEIGHTS, COMMIT)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"No space left on device\. Make room"):
            fetch(weights, UP[1:2])
    fetch(weights, UP[1:2])


def entry(folder: Path, name: str, *, used: int, size: int = 10_000) -> Path:
    """A file of another model, used at this time."""
    path = folder / "weights" / f"org--{name}" / ("1" * 40) / WEIGHTS
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * size)
    told = {"size": size, "etag": "e", "parts": [[0, size, "d"]]}
    path.with_name(WEIGHTS + ".parts.json").write_text(json.dumps(told))
    os.utime(path, (used, used))
    return path


def header_bytes(hub: LocalHub) -> int:
    first = (hub.folder / WEIGHTS).read_bytes()[:8]
    return -(-(8 + int.from_bytes(first, "little")) // 4096) * 4096


def test_what_was_used_longest_ago_makes_room(hub: LocalHub, tmp_path: Path) -> None:
    old, newer = entry(tmp_path, "old", used=1), entry(tmp_path, "newer", used=2)
    fetch(cache(tmp_path, quota=header_bytes(hub) + ONE + 12_000), UP[:1])
    assert not old.exists()
    assert newer.exists()
    assert kept(tmp_path).exists()


def test_the_disk_bounds_as_well(hub: LocalHub, tmp_path: Path) -> None:
    old = entry(tmp_path, "old", used=1, size=100_000)
    fetch(cache(tmp_path, free=lambda _folder: 10_000 if old.exists() else 110_000), UP[:1])
    assert not old.exists()


def test_what_will_never_fit_removes_nothing(hub: LocalHub, tmp_path: Path) -> None:
    old = entry(tmp_path, "old", used=1)
    with pytest.raises(
        CheckpointError, match=r"0\.1 MiB of weights do not fit .* its quota is 0\.1 MiB.*cache_quota_gib"
    ):
        fetch(cache(tmp_path, quota=3 * ONE), UP)
    with pytest.raises(CheckpointError, match=r"its disk has 0\.0 MiB left, of which .* Serve fewer blocks"):
        fetch(cache(tmp_path, free=lambda _folder: 0), UP)
    assert old.exists()


# --- others


def test_what_another_node_uses_stays(hub: LocalHub, tmp_path: Path) -> None:
    shutil.copy(hub.folder / WEIGHTS, hub.folder / "other.safetensors")
    one, two = cache(tmp_path), cache(tmp_path, quota=header_bytes(hub) + ONE + 10_000)
    fetch(one, UP[:1])
    with pytest.raises(CheckpointError, match=r"0\.0 MiB of which are not in use"):
        fetch(two, UP[:1], file="other.safetensors")
    assert not remove(kept(tmp_path))
    one.close()  # its node has ended
    fetch(two, UP[:1], file="other.safetensors")
    assert not kept(tmp_path).exists()


def test_a_node_that_moves_makes_room_of_its_own(hub: LocalHub, tmp_path: Path) -> None:
    """The blocks before are in memory: a quota for one span is enough."""
    shutil.copy(hub.folder / WEIGHTS, hub.folder / "other.safetensors")
    weights = cache(tmp_path, quota=header_bytes(hub) + ONE + 10_000)
    fetch(weights, UP[:1])
    fetch(weights, UP[:1], file="other.safetensors")
    assert not kept(tmp_path).exists()


@pytest.mark.parametrize("by", ["quota", "disk"])
def test_what_others_are_fetching_has_its_room(hub: LocalHub, tmp_path: Path, by: str) -> None:
    """Several models of a node are loaded at the same time."""
    shutil.copy(hub.folder / WEIGHTS, hub.folder / "other.safetensors")
    room = 2 * header_bytes(hub) + 3 * ONE

    def left(folder: Path) -> int:
        return room - sum(bytes_of(path) for path in folder.glob("*/*/*.parts.json"))

    one, two = (cache(tmp_path, **({"quota": room} if by == "quota" else {"free": left})) for _ in range(2))
    refused: list[str] = []

    def meanwhile(done: int, total: int) -> None:
        if done == 0 and total:
            with pytest.raises(CheckpointError) as caught:
                fetch(two, UP[:2], file="other.safetensors")
            refused.append(str(caught.value))
            fetch(two, UP[:1], file="other.safetensors")

    fetch(one, UP[:2], meanwhile)
    assert ["0.0 MiB of which are not in use" in text for text in refused] == [True]
    with pytest.raises(CheckpointError, match="do not fit"):
        fetch(two, UP[:2], file="other.safetensors")
    one.close()
    told = json.loads(record(tmp_path).read_text())
    record(tmp_path).write_text(json.dumps(told | {"wanted": told["size"]}))  # as one that died has left it
    assert cache(tmp_path).path(REPOSITORY, WEIGHTS, COMMIT) == kept(tmp_path)  # in use, and nothing comes
    fetch(cache(tmp_path, quota=room + ONE), UP[:2], file="other.safetensors")
    assert kept(tmp_path).exists()


def test_two_nodes_fetch_a_file_once(hub: LocalHub, tmp_path: Path) -> None:
    weights = [cache(tmp_path), cache(tmp_path)]
    threads = [threading.Thread(target=fetch, args=(each, UP)) for each in weights]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert hub.sent[WEIGHTS] == bytes_of(record(tmp_path))
    told: list[tuple[int, int]] = []
    fetch(cache(tmp_path), UP, lambda *now: told.append(now))
    assert told == [(0, 0)]


def test_ends_of_a_model_lie_where_the_configuration_says(
    hub: LocalHub, tmp_path: Path, hidden: torch.Tensor
) -> None:
    client = load_client_weights(REPOSITORY, storage=Storage(cache_dir=tmp_path / "weights"))
    whole = load_client_weights(str(hub.folder))
    assert torch.equal(client.logits(hidden), whole.logits(hidden))
    assert hub.sent[WEIGHTS] < (hub.folder / WEIGHTS).stat().st_size / 2
    assert remove(kept(tmp_path))  # in memory now, and nobody else uses it


def test_pickled_ends_if_asked_for(single: Path, hidden: torch.Tensor) -> None:
    whole = load_client_weights(str(single)).logits(hidden)
    torch.save(load_file(single / WEIGHTS), single / "pytorch_model.bin")
    (single / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"model\.allow_pickled"):
        load_client_weights(str(single))
    pickled = load_client_weights(str(single), storage=Storage(allow_pickled=True))
    assert torch.equal(pickled.logits(hidden), whole)


# --- folders


def test_of_a_folder_only_needed_tensors_are_read(single: Path) -> None:
    """Beside the model's tensors the file has one of 64 GiB, which no machine that runs this could read."""
    tensors = load_file(single / WEIGHTS)
    save_file(tensors, single / WEIGHTS)
    data = (single / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    told, size = json.loads(data[8 : 8 + length]), len(data) - 8 - length
    huge = 64 << 30
    told["unused"] = {"dtype": "F32", "shape": [huge // 4], "data_offsets": [size, size + huge]}
    text = json.dumps(told).encode()
    with (single / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + data[8 + length :])
        file.truncate(8 + len(text) + size + huge)
    names = {name: list(tensor.shape) for name, tensor in tensors.items()}
    checkpoint = Checkpoint(str(single))
    assert {name: tensor.sum() for name, tensor in checkpoint.read(names)} == {
        name: tensor.sum() for name, tensor in tensors.items()
    }
