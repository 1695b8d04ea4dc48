"""What is shipped beside the code: the wheel's contents, the unit, the Dockerfiles, an install without a network."""

from __future__ import annotations

import configparser
import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kwaainet_bridge import __version__, defaults

ROOT = Path(__file__).parents[2]
FILES = ROOT / "packaging"
KINDS = ("cpu", "cuda")


def run(*command: str, **options) -> str:
    result = subprocess.run(command, check=False, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files beside its sources, and takes what an earlier one left
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", ignore=ignored)
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
    run(*pip, "-w", str(folder), str(source))
    return next(folder.glob("kwaainet_bridge-*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package_and_the_command(wheel):
    package = ROOT / "src"
    files = {
        str(path.relative_to(package))
        for path in (package / "kwaainet_bridge").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry = archive.read(f"kwaainet_bridge-{__version__}.dist-info/entry_points.txt").decode()
        about = email.message_from_bytes(archive.read(f"kwaainet_bridge-{__version__}.dist-info/METADATA"))
    assert files - names == set()
    assert any(name.startswith("kwaainet_bridge/models/") and name.endswith(".safetensors") for name in names)
    assert {name.split("/")[0] for name in names} == {
        "kwaainet_bridge",
        f"kwaainet_bridge-{__version__}.dist-info",
    }
    assert "kwaainet-bridge = kwaainet_bridge.cli:main" in entry
    assert about["Requires-Python"]


@pytest.mark.slow
def test_it_installs_and_runs_without_a_network(wheel, tmp_path):
    """From a folder of wheels, as in a container; what else it needs is this environment's, to spare the copying."""
    environ = {"PATH": "/usr/bin:/bin", "PIP_CONFIG_FILE": os.devnull, "HOME": str(tmp_path)}
    python = str(tmp_path / "venv" / "bin" / "python")
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"), env=environ)
    packages = run(
        sys.executable, "-c", "import trio, os; print(os.path.dirname(os.path.dirname(trio.__file__)))"
    )
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", env=environ).strip()
    (Path(site) / "others.pth").write_text(packages)
    install = (python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--find-links")
    run(*install, str(wheel.parent), "--force-reinstall", "kwaainet-bridge", env=environ)
    command = str(tmp_path / "venv" / "bin" / "kwaainet-bridge")
    assert run(command, "--version", env=environ, cwd=tmp_path).strip() == f"kwaainet-bridge {__version__}"
    where = run(
        python, "-c", "import kwaainet_bridge; print(kwaainet_bridge.__file__)", env=environ, cwd=tmp_path
    )
    assert where.startswith(site)


UNIT_FILE = FILES / "systemd" / "kwaainet-bridge.service"


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str
    parser.read(UNIT_FILE)
    return parser


def seconds(text: str) -> float:
    number, of = re.fullmatch(r"(\d+)(min|s|)", text).groups()
    return int(number) * {"min": 60, "s": 1, "": 1}[of]


def test_the_unit_speaks_the_nodes_protocol_and_is_no_more_patient_than_it_asks_for():
    service = unit()["Service"]
    assert service["Type"] == "notify"
    assert service["RestartPreventExitStatus"] == "2"
    # a node asks for more time this often: the limits must not pass before it is asked twice
    for key in ("TimeoutStartSec", "TimeoutStopSec"):
        assert seconds(service[key]) >= defaults.SUPERVISOR_PATIENCE_SECONDS
    # an engine counts as hung only after its own patience; the watchdog must not be faster
    assert seconds(service["WatchdogSec"]) > defaults.ENGINE_PATIENCE_SECONDS + defaults.ENGINE_CHECK_SECONDS


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not on this machine")
def test_systemd_itself_is_content_with_the_unit():
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(UNIT_FILE)], check=False, capture_output=True, text=True
    )
    wrong = [line for line in result.stderr.splitlines() if UNIT_FILE.name in line]
    assert [line for line in wrong if "is not executable" not in line] == []  # it is not installed here
    judged = run("systemd-analyze", "security", "--offline=yes", "--no-pager", str(UNIT_FILE))
    assert float(re.search(r"exposure level for \S+: ([\d.]+)", judged)[1]) < 2


def docker_steps(kind: str) -> str:
    text = (FILES / "docker" / f"Dockerfile.{kind}").read_text(encoding="utf-8")
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_built_without_a_network_and_run_as_nobody_special(kind):
    steps = docker_steps(kind)
    installs = [step for step in re.split(r"\n(?=[A-Z]+ )", steps) if "pip install" in step]
    assert len(installs) == 1
    assert f"RUN --network=none --mount=type=bind,source=wheelhouse-{kind}" in installs[0]
    assert "--no-index --find-links" in installs[0]
    assert not re.search(r"apt-get|curl|wget|\bADD\b", steps)
    user = re.findall(r"^USER (.+)$", steps, re.MULTILINE)
    assert user == ["10001:10001"]
    assert re.search(r"^VOLUME /data$", steps, re.MULTILINE)
    assert re.search(r'^HEALTHCHECK [^"]+\["kwaainet-bridge", "status",', steps, re.MULTILINE)
    ignored = (FILES / "docker" / f"Dockerfile.{kind}.dockerignore").read_text(encoding="utf-8").split("\n")
    assert ignored[1:] == ["*", f"!wheelhouse-{kind}", ""]


def test_both_images_differ_in_what_cuda_needs_only():
    cpu, cuda = (docker_steps(kind).replace(f"wheelhouse-{kind}", "wheels").splitlines() for kind in KINDS)
    assert {line for line in cuda if line not in cpu} == {
        "ENV PATH=/opt/kwaainet-bridge/bin:$PATH HOME=/data HF_HOME=/data/huggingface PYTHONUNBUFFERED=1 \\",
        "    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility",
    }


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not on this machine")
@pytest.mark.parametrize("kind", KINDS)
def test_a_linter_is_content_with_the_images(kind):
    run("hadolint", str(FILES / "docker" / f"Dockerfile.{kind}"))


def test_the_wheelhouse_names_its_kinds():
    script = str(ROOT / "scripts" / "wheelhouse.sh")
    result = subprocess.run([script, "nowhere", "rocm"], check=False, capture_output=True, text=True)
    assert result.returncode == 1
    assert "rocm: cpu or cuda" in result.stderr
