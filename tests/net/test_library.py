"""What is taken from py-libp2p, and when it is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest
from libp2p.security.noise.io import BaseNoiseMsgReadWriter

from kwaainet_bridge.errors import ConfigError
from kwaainet_bridge.net.library import check_library


def test_the_pinned_version_fits() -> None:
    check_library()


def test_what_moved_is_named(monkeypatch) -> None:
    monkeypatch.setattr(BaseNoiseMsgReadWriter, "__annotations__", {})
    with pytest.raises(ConfigError, match=r"no BaseNoiseMsgReadWriter\.noise_state: install the pinned"):
        check_library()


def test_the_memory_network_does_not_load_it() -> None:
    code = "import sys, kwaainet_bridge.net.memory, kwaainet_bridge.net; print('libp2p' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
