"""Starts stock peers: the environment they live in, a bootstrap peer, Petals servers, scripts of ``stock/``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from child_processes import Driver, Process

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).resolve().parent / "stock"
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
ADDRESS = r"/ip4/127\.0\.0\.1/tcp/\d+/p2p/\w+"
START_SECONDS = 90.0  # a stock server takes 4 to 8 s on an idle machine


@dataclass(frozen=True)
class StockEnvironment:
    """Stock Petals and Hivemind, as ``make peers`` installs them. Logs and caches of its processes go to ``work``."""

    python: Path
    work: Path
    threads: int = 1

    @classmethod
    def find(cls, work: Path, *, threads: int = 1) -> StockEnvironment:
        """KWAAINET_BRIDGE_PEERS names the folder; else ``.venv-peers`` of the repository. FileNotFoundError."""
        folder = Path(os.environ.get("KWAAINET_BRIDGE_PEERS", ROOT / ".venv-peers"))
        python = folder / "bin" / "python"
        if not python.exists():
            raise FileNotFoundError(f"{python} is missing: the stock peers are installed by `make peers`")
        return cls(python, work, threads)

    @property
    def variables(self) -> dict[str, str]:
        """Nothing of ours reaches a stock process, and no stock process reaches the internet."""
        nowhere = "http://127.0.0.1:9"
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.work),
            "PETALS_CACHE": str(self.work / "cache"),
            "HF_HOME": str(self.work / "cache"),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": str(self.threads),
            "http_proxy": nowhere,  # Petals asks the package index for a newer version of itself
            "https_proxy": nowhere,
        }

    def _log(self, name: str) -> Path:
        number = sum(1 for _ in self.work.glob(f"{name}*.log"))
        return self.work / (f"{name}-{number}.log" if number else f"{name}.log")

    def module(self, name: str, module: str, *arguments: str) -> Process:
        argv = [self.python, "-m", module, *arguments]
        return Process(name, argv, env=self.variables, log=self._log(name))

    def script(self, script: str, *arguments: str) -> Driver:
        """Start a script of ``stock/``; it tells of itself by the event ``ready``."""
        name = script.removesuffix(".py")
        argv = [self.python, SCRIPTS / script, *arguments]
        return Driver(name, argv, env=self.variables, log=self._log(name))


@dataclass(frozen=True)
class StockPeer:
    """A running ``stock/rpc_peer.py``: its identity, where it listens, and the driver that commands it."""

    id: str
    address: str
    driver: Driver

    @classmethod
    def start(cls, stock: StockEnvironment) -> StockPeer:
        with stock.script("rpc_peer.py").killed_on_failure() as driver:
            ready = driver.event("ready", within=START_SECONDS)
            return cls(ready["peer"], ready["addresses"][0], driver)


def start_bootstrap(stock: StockEnvironment) -> tuple[Process, str]:
    """A stock bootstrap peer, and its address."""
    arguments = ("--host_maddrs", LOOPBACK)
    with stock.module("bootstrap", "petals.cli.run_dht", *arguments).killed_on_failure() as process:
        return process, process.wait_for(rf"--initial_peers ({ADDRESS})", START_SECONDS)[1]


def start_server(
    stock: StockEnvironment,
    model: Path,
    *,
    prefix: str,
    blocks: range,
    peers: list[str],
    dtype: str = "float32",
    options: tuple[str, ...] = (),
) -> Process:
    """A stock Petals server of some blocks of a model folder. Returns at once: call ``wait_until_serving``."""
    return stock.module(
        "petals-server",
        "petals.cli.run_server",
        str(model),
        *("--dht_prefix", prefix),
        *("--block_indices", f"{blocks.start}:{blocks.stop}"),
        *("--initial_peers", *peers),
        *("--host_maddrs", LOOPBACK),
        *("--device", "cpu", "--torch_dtype", dtype),
        *("--throughput", "1"),  # measuring it takes minutes
        *("--num_handlers", "2"),
        *options,
    )


def wait_until_serving(server: Process) -> None:
    server.wait_for(r"\bStarted$", START_SECONDS)
