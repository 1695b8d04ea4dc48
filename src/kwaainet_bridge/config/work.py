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
    """Folder of a Hugging Face checkpoint (relative to the configuration file), hub repository, or ``austen``."""
    blocks: str | None = None
    """``first:end``, end not included; ``auto`` for ``num_blocks`` of the node's own choice; all when left out."""
    num_blocks: Positive | None = None
    """How many to serve with ``blocks: auto``, which needs it; without effect otherwise."""
    rebalance_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = defaults.REBALANCE_SECONDS
    """With ``blocks: auto``: mean time between two looks at whether others need it more; 0 or ``off`` for none."""
    balance_quality: Annotated[float, Field(ge=0, le=1)] = defaults.BALANCE_QUALITY
    """It moves if the model's weakest block has less than this share of the throughput that it could have."""
    dht_prefix: Annotated[str, checked(check_prefix)] | None = None
    """Name of the blocks in the swarm. Left out: what Petals derives from the repository's name."""
    networks: tuple[Literal["petals", "kwaainet"], ...] = ("petals", "kwaainet")
    """In which networks it is served, of those that are on."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """``auto`` is the checkpoint's own."""
    device: str = "cpu"
    """A torch device: ``cpu``, ``cuda``, ``cuda:1``."""
    cache_tokens: Annotated[int, Field(ge=defaults.MIN_CACHE_TOKENS)] = defaults.CACHE_TOKENS
    """Size of the KV cache: tokens of one sequence through all served blocks."""
    max_length: Positive = defaults.MAX_LENGTH
    """Longest session, in tokens."""
    max_batch_tokens: Positive = defaults.MAX_BATCH_TOKENS
    """Most tokens (batch x length) in one request."""
    threads: Positive | None = None
    """Threads of torch; left out: as many as cores."""
    cache_dir: Path | None = None
    """Where tensors of hub repositories are kept. Left out: in the user's cache folder."""
    cache_quota_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Most GiB that they may take; those used longest ago are removed first. Left out: as much as the disk has."""
    allow_pickled: bool = False
    """Whether pickled weights (``.bin``) are read where there are no others: as tensors alone, nothing is run."""
    shares: dict[PeerName, Share] = {}  # noqa: RUF012  # every instance gets a copy
    """Peers, by their ids, that get so many times what others get of the engine while all wait; 1 unless named."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Large matrices in eight bits (``int8``), with errors of 1 %, or in four (``nf4``), with errors of 9 %."""
    adapters: tuple[str, ...] = ()
    """LoRA adapters that requests may ask for: folders (relative to the configuration file) or hub repositories."""
    tensor_parallel: Positive = 1
    """Processes that share each block, with ``device: cuda`` one for each of the first GPUs."""
    share_prefixes: Literal["off", "peer", "all"] = "peer"
    """Which sessions compute a common beginning of their prompts once: those of one peer, or all."""
    offload_idle_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Sessions idle for so long leave the KV cache for the host's memory where others need room."""
    offload_mib: Positive = defaults.OFFLOAD_MIB
    """MiB of the host's memory for them."""
    compression: CompressionName = "NONE"
    """Compression of hidden states on the wire. All servers of a model should announce the same."""
    throughput: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] = "auto"
    """Tokens per second to announce; ``auto`` measures it at the start."""
    network_mbps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = defaults.NETWORK_MBPS
    """Speed of the link in megabits per second, for the announced throughput."""
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
    """Where the run's peers are: Hivemind's averagers in the Petals swarm, or those of ``/kwaai/avg/1.0.0``."""
    prefix: Annotated[str, Field(pattern=r"^[^.]+$")]
    """Name of the run's averagers; those of a stock optimizer with run id ``r`` are ``r_grad_averager`` and
    ``r_state_averager``."""
    kind: Literal["DecentralizedAverager", "GradientAverager", "TrainingStateAverager"] = (
        "DecentralizedAverager"
    )
    """Class of the run's averagers."""
    target_group_size: Annotated[int, Field(ge=2, le=defaults.AVERAGING_MAX_GROUP)] | None = None
    """Members of a full group. Left out: groups have no size at which they are full."""
    group_bits: Annotated[str, Field(pattern="^[01]*$")] = ""
    """Where to look for the first group, in runs whose groups form a grid."""
    compression: CompressionName = "NONE"
    """Compression of parts. All members must have the same."""
    part_kib: Positive = defaults.AVERAGING_PART_BYTES // defaults.KIB
    """KiB of one part. All members must have the same."""
    matchmaking_seconds: Seconds = defaults.AVERAGING_MATCHMAKING_SECONDS
    """How long the run's peers wait for each other (stock: ``min_matchmaking_time``, ``matchmaking_time``)."""
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
    """Ids of the only peers to average with. Left out: whoever takes part in the runs."""
    max_tensors_mib: Positive = defaults.AVERAGING_HELPED_BYTES // defaults.MIB
    """Largest tensors of a run, in MiB; up to three times that much memory is used."""

    @model_validator(mode="after")
    def _check_runs_differ(self) -> AveragingConfig:
        names = [(run.name, run.kind) for run in self.runs]
        if twice := next((name for name, kind in names if names.count((name, kind)) > 1), None):
            raise ValueError(f"runs: {twice!r} is there twice: remove one")
        return self
