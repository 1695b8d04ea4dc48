"""Which blocks of which families can be served to KwaaiNet."""

from __future__ import annotations

import pytest
import torch

from kwaainet_bridge.engine import ModelInfo
from kwaainet_bridge.errors import ConfigError
from kwaainet_bridge.kwaai.model import check_ends


def model(family: str) -> ModelInfo:
    return ModelInfo("toy", None, family, 64, 8, torch.float32, 4, 2, 16, 100)


@pytest.mark.parametrize(
    ("blocks", "ends"), [((0, 3), (True, False)), ((2, 8), (False, True)), ((0, 8), (True, True))]
)
def test_ends_are_of_families_whose_embeddings_and_head_are_known(blocks, ends) -> None:
    assert check_ends(model("qwen3"), range(*blocks)) == ends
    with pytest.raises(ConfigError, match=r"models of type gemma2 have in another form; serve blocks 1:7"):
        check_ends(model("gemma2"), range(*blocks))


def test_the_middle_is_anybodys() -> None:
    assert check_ends(model("gemma2"), range(1, 7)) == (False, False)
