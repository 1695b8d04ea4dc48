"""Three daemons in two networks, one of them killed every 20 tokens. ``bench/failover.py`` measures the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trio
from failover_processes import generate_while_killing
from failover_world import PROMPT
from node_support import TINY as MODEL
from simulator import TINY, generate_locally

from kwaainet_bridge.engine import load_client_weights

pytestmark = pytest.mark.slow

TOKENS = 200


async def test_a_daemon_killed_every_twenty_tokens_changes_nothing(tmp_path: Path) -> None:
    weights = load_client_weights(str(MODEL), dtype=torch.float32)
    undisturbed = generate_locally(TINY, PROMPT, TOKENS, boundaries=[])
    with trio.fail_after(240):
        outcome = await generate_while_killing(tmp_path, weights, tokens=TOKENS, every=20)
    assert outcome.tokens == undisturbed
    assert len(outcome.killed) == 9
    assert set(outcome.killed) == {"petals", "kwaainet"}
