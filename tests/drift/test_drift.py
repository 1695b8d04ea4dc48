"""Which release is compared with which, and with what result."""

from __future__ import annotations

from pathlib import Path

import drift
import drift_releases
import pytest
from drift_releases import CannotTell, Release


def test_every_pin_is_found():
    assert set(drift_releases.pins()) == {"hivemind", "petals", "libp2p", "transformers"}
    assert drift_releases.pins()["hivemind"] == "1.1.12"


@pytest.mark.parametrize(
    "text",
    ["# reason\nlibp2p==0.8.1\n", '    "libp2p==0.8.1",', "libp2p==0.8.1  # why", "libp2p==0.8.1; x>1"],
)
def test_a_pin(text):
    assert drift_releases.pin_in(text, "libp2p") == "0.8.1"


@pytest.mark.parametrize("text", ["", "libp2p>=0.8", "py-libp2p==1", "# libp2p==0.8.1", "libp2p-extra==1"])
def test_no_pin(text):
    with pytest.raises(ValueError, match="no pin of libp2p"):
        drift_releases.pin_in(text, "libp2p")


def test_the_newest_release_that_the_index_names():
    assert (
        drift_releases.newest_in("petals (2.2.0.post1)\nAvailable versions: 2.2.0.post1, 2.2.0\n", "petals")
        == "2.2.0.post1"
    )
    with pytest.raises(ValueError, match="names no version of petals"):
        drift_releases.newest_in("", "petals")


@pytest.mark.parametrize(
    ("pinned", "found", "chosen", "differs"),
    [
        ("1.1.9", "1.1.12", False, True),
        ("1.1.12", "1.1.12", False, False),
        ("1.1.12", "1.1.9", False, False),
        ("1.1.12", "1.1.9", True, True),
        ("2.2.0", "2.2.0.post1", False, True),
        ("1.0", "1.0.0", True, False),
    ],
)
def test_what_is_worth_comparing(pinned, found, chosen, differs):
    assert Release("x", pinned, found, chosen).differs is differs


def test_the_table():
    releases = [Release("libp2p", "0.8.1", "0.10.0"), Release("hivemind", "1.1.12", "1.1.12")]
    assert drift_releases.version_table(releases).splitlines() == [
        "package   pinned  compared",
        "libp2p    0.8.1   0.10.0    differs",
        "hivemind  1.1.12  1.1.12    same",
    ]


def test_a_chosen_release():
    (release,) = drift_releases.chosen_releases(["petals==2.1.0"])
    assert (release.found, release.differs) == ("2.1.0", True)


@pytest.mark.parametrize("text", ["petals", "petals>=2", "petals==2.*", "torch==2.0", "petals==2,<3", "=="])
def test_no_release_is_chosen(text):
    with pytest.raises(ValueError):
        drift_releases.chosen_releases([text])


def test_what_pytest_says_failed():
    output = """E   ERROR inside
FAILED tests/a.py::b[x y] - ValueError: no - really
FAILED tests/a.py::c
ERROR tests/d.py - ImportError: gone
2 failed, 1 error in 2s"""
    assert drift.failed_in(output) == ["tests/a.py::b[x y]", "tests/a.py::c", "tests/d.py"]


def test_only_what_fails_twice_and_not_with_the_pins_counts(monkeypatch, capsys):
    runs = {"t": ["once", "always", "new"], "t-again": ["always", "new"], "t-pins": ["always"]}
    asked = {}

    def pytest_of(name, where, selection, _work):
        asked[name] = (where, selection)
        return runs[name], "3 failed"

    monkeypatch.setattr(drift, "pytest", pytest_of)
    newer = drift.Environments(Path("newer"), Path("peers"))
    assert drift.compare_tests("t", newer, ["tests"], Path("work")) == ["new"]
    assert asked["t-again"] == (newer, runs["t"])
    assert asked["t-pins"] == (drift.pinned_environments(), runs["t-again"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-3:] == [
        "  once: passes when repeated",
        "  always: fails with the pins too",
        "  new: fails",
    ]


SAME = Release("petals", "2", "2")
NEWER_STOCK = Release("hivemind", "1.1", "1.2")
NEWER_OURS = Release("libp2p", "0.8", "0.9")


def never(*_):
    raise AssertionError("nothing is newer")


def cannot(*_):
    raise CannotTell("no such wheel")


def finds(*changes):
    return lambda *_: list(changes)


@pytest.mark.parametrize(
    ("releases", "stock", "ours", "status", "said"),
    [
        ([SAME], never, never, 0, "Nothing is newer"),
        ([SAME, NEWER_OURS], never, finds(), 0, "Nothing changed"),
        ([NEWER_STOCK], finds("frames / x: ~ 0 -> 1"), never, 1, "1 changes"),
        ([NEWER_STOCK, NEWER_OURS], finds("a"), finds("b", "c"), 1, "3 changes"),
        ([NEWER_STOCK, NEWER_OURS], cannot, finds("FAILED b"), 2, "no such wheel"),
    ],
)
def test_exit_status(monkeypatch, capfd, releases, stock, ours, status, said):  # noqa: PLR0917 - a table of cases
    monkeypatch.setattr(drift, "compare_stock", stock)
    monkeypatch.setattr(drift, "compare_ours", ours)
    assert drift.watch(releases, Path("work")) == status
    assert said in "".join(capfd.readouterr())


def test_a_missing_environment_ends_with_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("KWAAINET_BRIDGE_PEERS", str(tmp_path / "none"))
    assert drift.main(["--pinned", "--work", str(tmp_path)]) == 2
    assert "none/bin/python" in capsys.readouterr().err


@pytest.mark.interop
def test_the_pinned_hivemind_writes_the_golden_vectors(tmp_path):
    assert drift.main(["--pinned", "--work", str(tmp_path)]) == 0
