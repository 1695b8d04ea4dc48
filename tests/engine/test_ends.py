"""What is before the first block and after the last one, of every family, against the whole model in transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from engine_support import HIDDEN
from family_models import BLOCKS, CONFIGS, SIZES, save
from safetensors.torch import load_file, save_file

from kwaainet_bridge.engine import Engine, EngineConfig, load_client_weights
from kwaainet_bridge.engine.checkpoint import INDEX
from kwaainet_bridge.errors import CheckpointError

IDS = torch.randint(0, 64, (2, 5), generator=torch.Generator().manual_seed(3))
FURTHER: dict[str, Callable[[], Any]] = {
    "gemma2-low-cap": lambda: tr.Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=1.5),
    "granite-scaled": lambda: tr.GraniteConfig(**SIZES, embedding_multiplier=12.0, logits_scaling=8.0),
    "cohere2-scaled": lambda: tr.Cohere2Config(**SIZES, logit_scale=2.5, pad_token_id=0),
    "mixtral-router": lambda: tr.MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True),
    "phi": lambda: tr.PhiConfig(**SIZES | {"num_key_value_heads": 8}),
    "bloom-own-head": lambda: tr.BloomConfig(
        hidden_size=HIDDEN, n_layer=BLOCKS, n_head=8, vocab_size=64, tie_word_embeddings=False
    ),
}
"""Ends that the models of ``family_models`` do not have: scalings and caps that matter, a head with a bias."""

Whole = tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]


def whole(folder: Path, dtype: torch.dtype = torch.float32) -> Whole:
    """The model; what goes into its first block and comes out of its last one for IDS; its logits."""
    model = tr.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.requires_grad_(requires_grad=False)
    base = getattr(model, model.base_model_prefix)
    layers = base.layers if hasattr(base, "layers") else base.h
    inputs, outputs = [], []
    layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    layers[-1].register_forward_hook(
        lambda _, _args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    logits = model(IDS, use_cache=False).logits
    return model, inputs[0], outputs[0], logits.float()


@pytest.fixture
def save_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """The folder of a new model."""
    for name, config in FURTHER.items():
        monkeypatch.setitem(CONFIGS, name, config)

    def saved(name: str, **how: Any) -> Path:
        save(name, tmp_path / name, **how)
        return tmp_path / name

    return saved


@pytest.mark.parametrize("name", [*CONFIGS, *FURTHER])
def test_both_ends_are_those_of_the_whole_model(name: str, save_family: Callable[..., Path]) -> None:
    folder = save_family(name)
    model, first, last, logits = whole(folder)
    client = load_client_weights(str(folder))
    assert torch.equal(client.embed(IDS), first)
    assert torch.equal(client.embed(IDS[:1, :1]), first[:1, :1])
    assert client.embed(IDS[:, :0]).shape == (2, 0, HIDDEN)
    variable = last.clone().requires_grad_()
    scores = client.logits(variable)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, logits, rtol=0, atol=1e-6)
    # fewer rows may be summed in another order: a few units in the last place
    torch.testing.assert_close(client.logits(last[:, -1]), logits[:, -1], rtol=1e-6, atol=1e-6)
    assert torch.autograd.grad(scores.sum(), variable)[0].abs().max() > 0
    assert client.num_blocks == model.config.num_hidden_layers


@pytest.mark.parametrize(
    "name", ["llama3.1", "gemma2", "gemma3", "bloom", "granite-scaled", "cohere2-scaled"]
)
def test_half_precision_rounds_as_the_whole_model_does(name: str, save_family: Callable[..., Path]) -> None:
    folder = save_family(name)
    _, first, last, logits = whole(folder, torch.bfloat16)
    client = load_client_weights(str(folder), dtype=torch.bfloat16)
    assert torch.equal(client.embed(IDS), first)
    assert torch.equal(client.logits(last), logits)


@pytest.mark.parametrize("name", ["gemma2", "bloom", "granite-scaled"])
def test_several_threads_compute_at_once(name: str, save_family: Callable[..., Path]) -> None:
    folder = save_family(name)
    _, first, last, logits = whole(folder)
    client = load_client_weights(str(folder))

    def once(number: int) -> bool:
        row = number % 2
        with torch.no_grad():
            scores = client.logits(last[row])
            return torch.equal(client.embed(IDS[row : row + 1])[0], first[row]) and torch.allclose(
                scores, logits[row], atol=1e-6
            )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(once, range(40)))


# --- checkpoints


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("name", ["llama2", "gemma2", "bloom-own-head", "falcon-7b"])
def test_files_and_names_of_checkpoints(
    name: str, save_family: Callable[..., Path], tmp_path: Path, *, bare: bool
) -> None:
    """In many files, of which those of blocks alone are gone; with and without the model's name before the names."""
    expected = load_client_weights(str(save_family(name)))
    folder = tmp_path / "sharded"
    save(name, folder, max_shard_size="10KB")
    index = json.loads((folder / INDEX).read_text())
    of_blocks = (".layers.", ".h.")
    for file in set(index["weight_map"].values()):
        tensors = load_file(folder / file)
        (folder / file).unlink()
        if not all(any(part in key for part in of_blocks) for key in tensors):
            prefix = "transformer." if ".h." in str(index) else "model."
            renamed = {key.removeprefix(prefix) if bare else key: value for key, value in tensors.items()}
            save_file(renamed, folder / file)
    if bare:
        names = {key.removeprefix(prefix): file for key, file in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    client = load_client_weights(str(folder))
    assert torch.equal(client.embed(IDS), expected.embed(IDS))
    hidden = client.embed(IDS)
    assert torch.equal(client.logits(hidden), expected.logits(hidden))


def test_the_text_part_of_a_model_that_sees_has_ends(tmp_path: Path) -> None:
    torch.manual_seed(7)
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tr.Gemma3Config(
        text_config=SIZES | {"sliding_window": 7},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
    )
    model = tr.Gemma3ForConditionalGeneration(config).eval().requires_grad_(requires_grad=False)
    model.save_pretrained(tmp_path)
    client = load_client_weights(str(tmp_path))
    text = model.model.language_model
    assert client.family == "gemma3_text"
    assert torch.equal(client.embed(IDS), text.embed_tokens(IDS))
    hidden = torch.randn(1, 3, HIDDEN)
    assert torch.equal(client.logits(hidden), model.lm_head(text.norm(hidden)))


@pytest.mark.parametrize("same", [True, False])
def test_a_checkpoint_with_a_head_that_the_configuration_ties(
    same: bool, save_family: Callable[..., Path], tmp_path: Path
) -> None:
    """As transformers reads it: tied where both are the same, and then in memory once; else as they are."""
    folder = save_family("llama3.1")
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] * (1 if same else 2)
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    client = load_client_weights(str(folder))
    _, _, last, logits = whole(folder)
    torch.testing.assert_close(client.logits(last), logits, rtol=0, atol=1e-6)
    own = client._ends.causal_lm
    assert (own.lm_head.weight.data_ptr() == own.model.embed_tokens.weight.data_ptr()) is same


# --- what does not fit


def test_a_model_whose_head_is_not_behind_one_norm_is_refused(tmp_path: Path) -> None:
    """nanochat has its final norm before the first block as well."""
    torch.manual_seed(7)
    tr.NanoChatForCausalLM(tr.NanoChatConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"no client for model_type nanochat: what follows its last block is not one norm",
    ):
        load_client_weights(str(tmp_path))


Forward = Callable[..., Any]


def positioned(forward: Forward) -> Forward:
    """Embeddings that depend on the position, as older models have them."""

    def changed(self: Any, input_ids: Any = None, inputs_embeds: Any = None, **further: Any) -> Any:
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
            inputs_embeds = inputs_embeds + torch.arange(inputs_embeds.shape[1])[None, :, None].to(
                inputs_embeds
            )
        return forward(self, inputs_embeds=inputs_embeds, **further)

    return changed


def pooled(forward: Forward) -> Forward:
    def changed(self: Any, **inputs: Any) -> Any:
        output = forward(self, **inputs)
        output.logits = output.logits.mean(1)
        return output

    return changed


def broken(_forward: Forward) -> Forward:
    def changed(self: Any, **_inputs: Any) -> Any:
        return self.head_of_another_name

    return changed


def doubled(forward: Forward) -> Forward:
    def changed(self: Any, *args: Any, **inputs: Any) -> Any:
        output = forward(self, *args, **inputs)
        output.last_hidden_state = output.last_hidden_state * 2
        return output

    return changed


@pytest.mark.parametrize(
    ("owner", "change", "reason"),
    [
        (tr.LlamaModel, positioned, "its embeddings depend on the position of a token"),
        (tr.LlamaModel, doubled, "what follows its last block is not one norm"),
        (tr.LlamaForCausalLM, pooled, r"its head gives \[1, 64\], not a score for each entry"),
        (tr.LlamaForCausalLM, broken, r"its definition does not run without blocks \(.*head_of_another_name"),
    ],
    ids=["positions", "behind the norm", "pooled", "broken"],
)
async def test_a_definition_that_does_not_fit_is_refused(
    owner: Any,
    change: Callable[[Forward], Forward],
    reason: str,
    save_family: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the client. A node serves the blocks all the same, and knows of its model what can be told without weights."""
    folder = save_family("llama2")
    monkeypatch.setattr(owner, "forward", change(owner.forward))
    with pytest.raises(CheckpointError, match=f"no client for model_type llama: {reason}"):
        load_client_weights(str(folder))
    engine = await Engine.load(EngineConfig(str(folder), blocks=range(1)))
    assert (engine.model.no_ends is None) is (change is positioned)
    await engine.aclose()


def test_a_scale_that_its_class_does_not_compute_is_refused(
    save_family: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_family("gemma3")
    monkeypatch.setattr(tr.Gemma3ForCausalLM, "_init_weights", lambda _self, _module: None)
    with pytest.raises(
        CheckpointError, match=r"does not say how model\.embed_tokens\.embed_scale is computed"
    ):
        load_client_weights(str(folder))


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("llama2", "lm_head.weight"),
        ("llama2", "model.norm.weight"),
        ("bloom", "transformer.word_embeddings_layernorm.bias"),
        ("falcon-7b", "transformer.word_embeddings.weight"),
    ],
)
def test_a_tensor_that_is_missing_is_named(
    name: str, lost: str, save_family: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(save_family(name), tmp_path / "lossy")
    tensors = load_file(folder / "model.safetensors")
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=lost.removeprefix("transformer.").replace(".", r"\.")):
        load_client_weights(str(folder))


def test_a_head_of_another_size_is_refused(save_family: Callable[..., Path]) -> None:
    folder = save_family("phi")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.bias"] = tensors["lm_head.bias"][:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lm_head\.bias in .* has shape \[63\], the configuration says \[64\]"
    ):
        load_client_weights(str(folder))
