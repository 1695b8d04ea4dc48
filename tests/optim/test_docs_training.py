"""The example of docs/training.md runs as it is."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.mark.slow
def test_the_example_trains_with_its_like(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert code is not None
    paced = "import time\ndef paced():\n    time.sleep(0.5)\n    return torch.randn(16, 3)\n"
    script = tmp_path / "example.py"
    text = code[1].replace("epoch < 20", "epoch < 1000").replace("torch.randn(16, 3)", "paced()")
    script.write_text(text.replace("model = ", paced + "model = ", 1))
    with example(script) as first:
        assert first.stdout is not None
        address = first.stdout.readline().removeprefix("join with:").split()[0]
        with example(script, address) as second:
            assert second.stdout is not None
            assert any("peers 2" in line for line in second.stdout)  # the first such line


@contextmanager
def example(script: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-u", str(script), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()
