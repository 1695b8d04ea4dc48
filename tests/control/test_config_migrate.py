"""Layouts of configuration files, and how older ones become the present one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from kwaainet_bridge.cli.migrate import migrate
from kwaainet_bridge.config import load_config, parse_config
from kwaainet_bridge.config.layouts import MIGRATIONS, check_layout, layout_of, migrated, present
from kwaainet_bridge.errors import ConfigError


def peers_under_networks(raw: dict[str, Any]) -> dict[str, Any]:
    """A layout that never was: bootstrap peers once stood at the top."""
    rest = {key: value for key, value in raw.items() if key != "initial_peers"}
    return {**rest, "networks": {"petals": {"bootstrap": raw.get("initial_peers", [])}}}


def seconds_to_minutes(raw: dict[str, Any]) -> dict[str, Any]:
    return {**raw, "drain_minutes": raw.get("drain_seconds", 60) / 60}


STEPS = (peers_under_networks, seconds_to_minutes)
OLD = "# mine\ninitial_peers: [a]  # the first\ndrain_seconds: 120\n"


def test_each_step_is_taken_from_where_the_file_is() -> None:
    old = {"initial_peers": ["a"], "drain_seconds": 120}
    new = migrated(old, "file", STEPS)
    assert new == {
        "version": 3,
        "drain_seconds": 120,
        "networks": {"petals": {"bootstrap": ["a"]}},
        "drain_minutes": 2.0,
    }
    assert next(iter(new)) == "version"
    assert migrated({"version": 2, "drain_seconds": 60}, "file", STEPS) == {
        "version": 3,
        "drain_seconds": 60,
        "drain_minutes": 1.0,
    }
    assert migrated(new, "file", STEPS) is new
    assert old == {"initial_peers": ["a"], "drain_seconds": 120}


@pytest.mark.parametrize("version", [0, -1, "1", 1.5, True, None, [1]])
def test_what_is_no_number_of_a_layout(version: object) -> None:
    with pytest.raises(ConfigError, match=r"file:\n  version: must be a number from 1 to 3 \(found "):
        layout_of({"version": version}, "file", STEPS)


def test_a_newer_layout_is_refused_and_an_older_one_names_the_command() -> None:
    with pytest.raises(ConfigError, match=r"layout 4, and this program reads 3 at most: take a newer"):
        check_layout({"version": 4}, "file", STEPS)
    with pytest.raises(ConfigError, match=r"layout 2.* reads 3: kwaainet-bridge config migrate file"):
        check_layout({"version": 2}, "file", STEPS)
    check_layout({"version": 3}, "file", STEPS)
    assert present() == 1 + len(MIGRATIONS)
    assert parse_config(f"version: {present()}", "file").version == present()
    with pytest.raises(ConfigError, match=f"layout {present() + 1}"):
        parse_config(f"version: {present() + 1}", "file")


def test_a_file_is_written_anew_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, backup = tmp_path / "node.yaml", tmp_path / "node.yaml.bak"
    file.write_text(OLD)
    file.chmod(0o640)
    assert not migrate(file, check=True, migrations=STEPS)
    assert (file.read_text(), backup.exists()) == (OLD, False)
    shown = capsys.readouterr().out
    assert "-initial_peers: [a]  # the first" in shown
    assert "+drain_minutes: 2.0" in shown
    assert not migrate(file, check=False, migrations=STEPS)
    assert yaml.safe_load(file.read_text())["networks"] == {"petals": {"bootstrap": ["a"]}}
    assert (backup.read_text(), file.stat().st_mode & 0o777) == (OLD, 0o640)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["node.yaml", "node.yaml.bak"]
    capsys.readouterr()
    assert migrate(file, check=True, migrations=STEPS)
    assert migrate(file, check=False, migrations=STEPS)
    assert "has the present layout, 3" in capsys.readouterr().out


def test_a_copy_that_is_there_is_not_lost(tmp_path: Path) -> None:
    file, backup = tmp_path / "node.yaml", tmp_path / "node.yaml.bak"
    file.write_text(OLD)
    backup.write_text("the copy")
    with pytest.raises(ConfigError, match=r"node\.yaml\.bak exists already: move it away"):
        migrate(file, check=False, migrations=STEPS)
    assert (file.read_text(), backup.read_text()) == (OLD, "the copy")


@pytest.mark.parametrize(
    ("text", "told"), [("a: [", "not YAML"), ("- a", "expected keys and values"), ("version: 9", "layout 9")]
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "node.yaml"
    with pytest.raises(ConfigError, match="No such file"):
        migrate(file, check=True)
    file.write_text(text)
    with pytest.raises(ConfigError, match=told):
        migrate(file, check=True)


def test_the_configurations_that_are_shipped_have_the_present_layout(tmp_path: Path) -> None:
    from kwaainet_bridge.cli.init import write_node_files

    list(write_node_files(tmp_path, "ed25519"))
    files = [tmp_path / "node.yaml", *(Path(__file__).parents[2] / "configs").glob("*.yaml")]
    assert len(files) > 3
    for file in files:
        assert migrate(file, check=True)
        assert load_config(file).version == present()


@pytest.mark.slow
def test_the_command_and_its_exit_codes(tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "kwaainet_bridge", "config", "migrate", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    (tmp_path / "node.yaml").write_text("drain_seconds: 5  # short\n")
    assert run("node.yaml", "--check") == (0, f"node.yaml: has the present layout, {present()}\n")
    assert run("node.yaml")[0] == 0
    assert (tmp_path / "node.yaml").read_text() == "drain_seconds: 5  # short\n"
    (tmp_path / "node.yaml").write_text("version: 77\n")
    code, told = run("node.yaml")
    assert (code, "take a newer" in told) == (2, True)
    code, told = run("nowhere.yaml")
    assert code == 2
