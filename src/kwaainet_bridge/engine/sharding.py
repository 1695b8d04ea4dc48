"""A model's layers split over several processes, each of which has a share of every head and matrix.

What is split, and where the processes add up what each has computed, is the tensor-parallel plan of the model's family
in transformers; the matrices are torch's DTensors. All of this runs in the compute thread of each of the processes.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard
from transformers.distributed.sharding_utils import DtensorShardOperation
from transformers.distributed.tensor_parallel import apply_tensor_parallelism, get_kv_heads_per_rank

from kwaainet_bridge import defaults
from kwaainet_bridge.engine.family import Family
from kwaainet_bridge.engine.span import Span
from kwaainet_bridge.errors import CheckpointError, ConfigError


def check(model: Family, size: int) -> None:
    """Raise CheckpointError unless transformers can split this family's layers over ``size`` processes."""
    name = f"a model of type {model.config.model_type}"
    plan = dict(getattr(model.causal_lm, "tp_plan", None) or {})
    if not plan or model.attends_itself:
        raise CheckpointError(
            f"{name} has no tensor-parallel plan in transformers: leave out tensor_parallel"
        )
    heads = int(model.config.num_attention_heads)
    if get_kv_heads_per_rank(plan, model.num_kv_heads, size) is None or heads % size:
        raise CheckpointError(
            f"{name} with {heads} heads and {model.num_kv_heads} of keys cannot be split over {size} processes: "
            "tensor_parallel must divide both"
        )


def join(store: Path, rank: int, size: int, device: torch.device) -> None:
    """Meet the other processes, which name the same file, and wait for all. Raises ConfigError, RuntimeError."""
    if distributed.is_initialized():
        raise ConfigError("only one model of a process can be split: give tensor_parallel to one of them")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=distributed.FileStore(str(store), size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=defaults.PARALLEL_SECONDS),
    )


def leave() -> None:
    """Forget the other processes."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def split(span: Span, size: int) -> None:
    """Have the span, whose parameters hold nothing yet, load this process' share of them."""
    model, device = span.model, span.device
    mesh = distributed.init_device_mesh(device.type, (size,), mesh_dim_names=("tp",))
    apply_tensor_parallelism(model.causal_lm, mesh, _plan(span))
    heads = get_kv_heads_per_rank(dict(model.causal_lm.tp_plan), model.num_kv_heads, size)
    assert isinstance(heads, int)  # as check has found
    for block in span.blocks:
        for name, parameter in model.layers[block].named_parameters():
            _check_even(f"{name} of block {block}", parameter, size)
    span.kv_heads, span.share = heads, share


def _check_even(name: str, parameter: torch.Tensor, size: int) -> None:
    """All processes must come to the same decisions, which depend on how large things are."""
    for placement in parameter.placements if isinstance(parameter, DTensor) else ():
        if hasattr(placement, "dim") and parameter.shape[placement.dim] % size:
            raise CheckpointError(
                f"{name} has the shape {list(parameter.shape)}, which {size} processes cannot share evenly: "
                "choose another tensor_parallel"
            )


def _plan(span: Span) -> dict[str, str]:
    """How transformers splits each module and parameter of the span's layers, by its name in the whole model."""
    styles = span.model.causal_lm.tp_plan
    layers = {id(span.model.layers[block]) for block in span.blocks}
    roots = [name for name, module in span.model.causal_lm.named_modules() if id(module) in layers]
    plan: dict[str, str] = {}
    for root in roots:
        for inner, module in span.model.causal_lm.get_submodule(root).named_modules():
            name = f"{root}.{inner}" if inner else root
            of_module = styles.get(replace_layer_number_by_wildcard(name))
            for own, _ in module.named_parameters(recurse=False):
                style = styles.get(replace_layer_number_by_wildcard(f"{name}.{own}"), of_module)
                if style is not None:
                    plan[f"{name}.{own}"] = style
            if of_module is not None:
                plan[name] = of_module
    return plan


def share(parameter: torch.Tensor, whole: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What of ``whole`` is here, if ``parameter`` is split; else all of it. On ``device``, in memory of its own."""
    if not isinstance(parameter, DTensor):
        return whole.to(device)
    part = DtensorShardOperation(parameter).shard_tensor(whole, device=device, dtype=whole.dtype)
    return DTensor.from_local(
        part.clone() if part.data_ptr() == whole.data_ptr() else part.contiguous(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
