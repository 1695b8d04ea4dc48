"""The example of docs/training.md runs as it is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.mark.slow
def test_the_example_trains_with_its_like(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert code is not None
    script = tmp_path / "example.py"
    script.write_text(code[1].replace("epoch < 20", "epoch < 3").replace("torch.randn(16, 3)", "paced()"))
    paced = "import time\ndef paced():\n    time.sleep(0.5)\n    return torch.randn(16, 3)\n"
    script.write_text(script.read_text().replace("model = ", paced + "model = ", 1))
    first = subprocess.Popen([sys.executable, "-u", script], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        address = first.stdout.readline().removeprefix("join with:").split()[0]
        second = subprocess.run(
            [sys.executable, "-u", script, address],
            stdout=subprocess.PIPE,
            text=True,
            timeout=120,
            check=True,
        )
        rest, _ = first.communicate(timeout=60)
    finally:
        first.kill()
    assert first.returncode == 0
    assert "epoch 3" in rest
    assert "peers 2" in second.stdout + rest
