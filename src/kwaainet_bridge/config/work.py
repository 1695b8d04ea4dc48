"""The sections about what a node works on: a model's blocks, and runs of averagers. Every key is documented here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from kwaainet_bridge import defaults
from kwaainet_bridge.config.values import (
    AUTO,
    BLOCKS,
    EMBEDDED_MODEL,
    CompressionName,
    Positive,
    Seconds,
    Section,
    as_peer_id,
    checked,
)
from kwaainet_bridge.hivemind.experts.records import check_prefix
from kwaainet_bridge.wire.kwaai_avg import check_prefix as check_kwaai_prefix

PeerName = Annotated[str, checked(as_peer_id)]
Share = Annotated[float, Field(gt=0, le=1000)]


class ModelConfig(Section):
    """The blocks to serve."""

    name: str = EMBEDDED_MODEL
    """A folder in the Hugging Face layout, a hub repository (``org/name``), or ``austen``, the small model in the
    package (docs/embedded-model.md). A folder that exists wins over a repository of the same name. A name that
    starts with ``/``, ``./``, ``../`` or ``~`` is always a folder."""
    blocks: str | None = None
    """Which blocks to serve, end not included. Write it in quotes: YAML reads ``4:8`` as the number 248.
    ``auto`` takes the ``num_blocks`` blocks that the networks in which they will be listed lack most, and
    moves when that changes; docs/command-line.md#blocks-of-its-own-choice has the rules."""
    num_blocks: Positive | None = None
    """How many blocks ``auto`` chooses; it needs this. A model with fewer is served whole. Without effect
    where ``model.blocks`` names blocks."""
    rebalance_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = defaults.REBALANCE_SECONDS
    """With ``blocks: auto``, the mean time between two looks at whether other blocks are needed more; each
    pause is drawn between 0 and twice that. 0 and ``off``: the node stays where it is."""
    balance_quality: Annotated[float, Field(ge=0, le=1)] = defaults.BALANCE_QUALITY
    """With ``blocks: auto``: the node moves if the model's weakest block has less than this share of the
    throughput that it could have. 0: never."""
    dht_prefix: Annotated[str, checked(check_prefix)] | None = None
    """Name of the blocks in the swarm, without dots and spaces. Left out: what Petals derives from the name
    of the repository or folder (for Llama the last part, dots as dashes, ``-hf`` at the end)."""
    networks: tuple[Literal["petals", "kwaainet"], ...] = ("petals", "kwaainet")
    """In which networks it is served, of those that are on."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """``auto`` is the checkpoint's own. Answers and KV cache have this dtype too."""
    device: str = "cpu"
    """A torch device: ``cpu``, ``cuda``, ``cuda:1``."""
    cache_tokens: Annotated[int, Field(ge=defaults.MIN_CACHE_TOKENS)] = defaults.CACHE_TOKENS
    """Room of the KV cache for all sessions together: tokens of one sequence through all served blocks."""
    max_length: Positive = defaults.MAX_LENGTH
    """Longest session in tokens."""
    max_batch_tokens: Positive = defaults.MAX_BATCH_TOKENS
    """Most tokens (batch times length) of one forward or backward request."""
    threads: Positive | None = None
    """Threads of one torch operator on the CPU."""
    cache_dir: Path | None = None
    """Where tensors of hub repositories are kept: see docs/loading.md."""
    cache_quota_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Most GiB that they may take; those used longest ago are removed first."""
    allow_pickled: bool = False
    """Whether pickled weights (``.bin``) are read where there are no others: as tensors alone, nothing is run."""
    shares: dict[PeerName, Share] = {}  # noqa: RUF012  # every instance gets a copy
    """Peers that get so many times what others get of the engine while all wait: ``{12D3KooW…: 4}``. Others
    have 1."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Large matrices in eight bits, with errors of 1 %, or in four, with errors of 9 %: see
    docs/engine.md#fewer-bits."""
    adapters: tuple[str, ...] = ()
    """LoRA adapters that requests may ask for: folders (relative to the configuration file) or hub
    repositories; see docs/engine.md#adapters."""
    tensor_parallel: Positive = 1
    """Processes that share each block, with ``device: cuda`` one for each of the first GPUs: see
    docs/engine.md#several-gpus."""
    share_prefixes: Literal["off", "peer", "all"] = "peer"
    """Which sessions compute a prompt's beginning once that they have in common: those of one peer, or all,
    which lets peers learn from the time of an answer what others have asked; see
    docs/engine.md#common-beginnings."""
    offload_idle_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Sessions that were idle for so long leave the KV cache for the host's memory where others need the
    room; see docs/engine.md#idle-sessions. Left out: none does."""
    offload_mib: Positive = defaults.OFFLOAD_MIB
    """MiB of the host's memory for them."""
    compression: CompressionName = "NONE"
    """Compression of hidden states that this node asks of callers and answers with. All servers of one model
    should use the same."""
    throughput: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] = "auto"
    """Tokens per second to announce. ``auto`` measures it at the start, in about a second."""
    network_mbps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = defaults.NETWORK_MBPS
    """Speed of the link in megabits per second. It caps the measured throughput."""
    public_name: str | None = None
    """Shown by swarm monitors."""

    @field_validator("blocks", mode="before")
    @classmethod
    def _check_blocks(cls, value: Any) -> Any:
        if value is None or value == AUTO:
            return value
        # YAML 1.1 reads 4:8 as a number in base 60
        match = BLOCKS.match(value) if isinstance(value, str) else None
        if match is None:
            raise ValueError('write it as "first:end" in quotes, for example "0:4", or auto')
        if int(match[1]) >= int(match[2]):
            raise ValueError(f"{value} holds no block: the end comes after the last block")
        return value

    @field_validator("rebalance_seconds", mode="before")
    @classmethod
    def _check_rebalancing(cls, value: Any) -> Any:
        if value is True:
            raise ValueError("say how often, in seconds, or off")
        return 0 if value is False or value == "off" else value  # YAML 1.1 reads off as false

    @field_validator("share_prefixes", mode="before")
    @classmethod
    def _check_sharing(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML 1.1 reads off as false

    @model_validator(mode="after")
    def _check_auto_knows_how_many(self) -> ModelConfig:
        if self.blocks == AUTO and self.num_blocks is None:
            raise ValueError(
                "blocks: auto chooses which blocks, not how many: give num_blocks (--num-blocks)"
            )
        return self

    @property
    def key(self) -> str:
        """What the model is called here: unlike :attr:`name`, no two models of a node have the same."""
        return self.dht_prefix or self.name

    @property
    def blocks_to_choose(self) -> int | None:
        """How many blocks are to be chosen at the start, None if it is not left to the node which."""
        return self.num_blocks if self.blocks == AUTO else None

    @property
    def block_range(self) -> range | None:
        """``blocks`` as a range, None for all, and for those that the node chooses."""
        if self.blocks is None or self.blocks == AUTO:
            return None
        first, end = self.blocks.split(":")
        return range(int(first), int(end))


class AveragingRun(Section):
    """A run of averagers that this node helps: it averages for the others and adds nothing of its own."""

    network: Literal["petals", "kwaainet"] = "petals"
    """Where the run's peers are: Hivemind's averagers in the Petals swarm, or KwaaiNet's
    (docs/protocols/kwaai-avg.md). The network must be on."""
    prefix: Annotated[str, Field(pattern=r"^[^.]+$")]
    """Name of the run's averagers; in KwaaiNet at most 64 letters, digits, underscores and hyphens. Those of
    a stock optimizer with run id ``r`` are ``r_grad_averager`` and ``r_state_averager``."""
    kind: Literal["DecentralizedAverager", "GradientAverager", "TrainingStateAverager"] = (
        "DecentralizedAverager"
    )
    """Class of the run's averagers; the two others are those of a stock optimizer. KwaaiNet has no kinds."""
    target_group_size: Annotated[int, Field(ge=2, le=defaults.AVERAGING_MAX_GROUP)] | None = None
    """Members of a full group. Left out: groups begin at their time only."""
    group_bits: Annotated[str, Field(pattern="^[01]*$")] = ""
    """Where to look for the first group, in runs whose groups form a grid (stock: ``initial_group_bits``)."""
    compression: CompressionName = "NONE"
    """Compression of parts. All members must have the same."""
    part_kib: Positive = defaults.AVERAGING_PART_BYTES // defaults.KIB
    """KiB of one part. All members must have the same (stock: ``part_size_bytes``)."""
    matchmaking_seconds: Seconds = defaults.AVERAGING_MATCHMAKING_SECONDS
    """How long the run's peers wait for each other (stock: ``min_matchmaking_time``, an optimizer's
    ``matchmaking_time``)."""
    bandwidth: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """In the unit of the run's other peers; decides how much this node averages. Left out: their mean."""
    max_rms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Root mean square from which on a part is refused. Left out: any that cannot overflow."""

    @model_validator(mode="after")
    def _check_kwaainet_has_such_runs(self) -> AveragingRun:
        if self.network == "kwaainet":
            check_kwaai_prefix(self.prefix)
            if self.kind != "DecentralizedAverager":
                raise ValueError(f"kind {self.kind} is of Hivemind's runs alone: remove it")
        return self

    @property
    def name(self) -> str:
        """What the run is called here: its prefix, and its network if that is not Petals."""
        return self.prefix if self.network == "petals" else f"{self.prefix} ({self.network})"


class AveragingConfig(Section):
    """Averaging for runs of others; off unless runs are named."""

    runs: tuple[AveragingRun, ...] = ()
    peers: tuple[Annotated[str, checked(as_peer_id)], ...] | None = None
    """The only peers to average with. Left out: whoever takes part in the runs."""
    max_tensors_mib: Positive = defaults.AVERAGING_HELPED_BYTES // defaults.MIB
    """Largest state of a run that is accepted, in MiB. Up to three times that much memory is used."""

    @model_validator(mode="after")
    def _check_runs_differ(self) -> AveragingConfig:
        names = [(run.name, run.kind) for run in self.runs]
        if twice := next((name for name, kind in names if names.count((name, kind)) > 1), None):
            raise ValueError(f"runs: {twice!r} is there twice: remove one")
        return self
