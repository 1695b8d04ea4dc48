"""Which blocks of a model can be served to KwaaiNet."""

from __future__ import annotations

import pytest
import torch

from kwaainet_bridge.engine import ModelInfo
from kwaainet_bridge.errors import ConfigError
from kwaainet_bridge.kwaai.model import check_ends


def model(no_ends: str | None = None) -> ModelInfo:
    return ModelInfo("toy", None, "llama", 64, 8, torch.float32, 4, 2, 16, 100, no_ends=no_ends)


@pytest.mark.parametrize(
    ("blocks", "ends"), [((0, 3), (True, False)), ((2, 8), (False, True)), ((0, 8), (True, True))]
)
def test_ends_are_of_models_whose_embeddings_and_head_can_be_computed(blocks, ends) -> None:
    assert check_ends(model(), range(*blocks)) == ends
    with pytest.raises(
        ConfigError,
        match=r"models of type llama have in another form \(it has two norms\); serve blocks 1:7, or another",
    ):
        check_ends(model("it has two norms"), range(*blocks))


def test_the_middle_is_anybodys() -> None:
    assert check_ends(model("it has two norms"), range(1, 7)) == (False, False)
