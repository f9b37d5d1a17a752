"""One tree of dataclasses is the YAML recipe and the command line; all validation that needs no process group.

Names are Megatron's where Megatron has one. The text under a field is its `--help`.
"""

from __future__ import annotations

import difflib
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import yaml

from megatron_ext.errors import UserError

BALANCE_LOSSES = ("cv2", "aux_loss", "seq_aux_loss", "global_aux_loss", "none")


@dataclass
class ModelConfig:
    """Shape of the network: LLaMA, and LLaMA-MoE where `num_experts` is set."""

    num_layers: int = 32
    """Decoder layers L."""
    hidden_size: int = 4096
    """Width of the residual stream."""
    ffn_hidden_size: int = 11008
    """Width d_h of a dense FFN."""
    num_attention_heads: int = 32
    """Query heads."""
    num_query_groups: int | None = None
    """Key/value heads (grouped-query attention); none: as many as query heads."""
    kv_channels: int | None = None
    """Width of a head; none: hidden_size / num_attention_heads."""
    vocab_size: int = 32000
    """Entries of the embedding."""
    max_position_embeddings: int = 4096
    """Longest sequence that the dense model was trained for."""
    norm_epsilon: float = 1e-5
    """Epsilon of RMSNorm."""
    rotary_base: float = 10000.0
    """RoPE theta."""
    rope_scaling_factor: float | None = None
    """Llama-3 RoPE scaling factor (low/high frequency factors 1 and 4, original length 8192); none: no scaling."""
    untie_embeddings_and_output_weights: bool = True
    """Whether the output layer has weights of its own."""
    init_method_std: float = 0.02
    """Standard deviation of freshly initialised weights."""

    num_experts: int | None = None
    """Experts E of a MoE layer; none: a dense model."""
    moe_router_topk: int = 2
    """Experts k that a token is sent to."""
    moe_ffn_hidden_size: int | None = None
    """Width m of an expert; none: ffn_hidden_size / num_experts."""
    moe_shared_expert_intermediate_size: int | None = None
    """Width of the always-on residual expert (all residual blocks together); none: there is none."""
    moe_dense_first_layers: int = 0
    """How many of the first layers stay dense."""
    moe_dense_last_layers: int = 0
    """How many of the last layers stay dense."""
    moe_score_scale: float | list[float] = 1.0
    """Factor on the chosen experts' outputs (LLaMA-MoE: E/k), one number or one per layer."""
    moe_gate: Literal["linear", "mlp"] = "linear"
    """Router: `linear` [E, hidden], or LLaMA-MoE's `mlp` (linear, tanh, linear [E, E])."""

    @property
    def is_moe(self) -> bool:
        return self.num_experts is not None

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def expert_width(self) -> int:
        """m: width of one expert."""
        if self.num_experts is None:
            raise ValueError("a dense model has no experts")
        return self.moe_ffn_hidden_size or self.ffn_hidden_size // self.num_experts

    @property
    def moe_layers(self) -> list[int]:
        """Indices (from 0) of the layers that are MoE layers."""
        if not self.is_moe:
            return []
        return list(range(self.moe_dense_first_layers, self.num_layers - self.moe_dense_last_layers))

    def score_scale(self, layer: int) -> float:
        """Factor on expert outputs in layer `layer` (from 0)."""
        scale = self.moe_score_scale
        return scale[layer] if isinstance(scale, list) else scale

    def validate(self) -> None:
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}",
                "set kv_channels",
            )
        if self.num_attention_heads % self.kv_heads:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_query_groups={self.kv_heads}"
            )
        if self.num_experts is None:
            return
        if not 1 <= self.moe_router_topk <= self.num_experts:
            raise UserError(
                f"moe_router_topk={self.moe_router_topk} must lie between 1 and num_experts={self.num_experts}"
            )
        if self.moe_ffn_hidden_size is None and self.ffn_hidden_size % self.num_experts:
            raise UserError(
                f"ffn_hidden_size={self.ffn_hidden_size} is not a multiple of num_experts={self.num_experts}",
                "choose a divisor, or set moe_ffn_hidden_size",
            )
        if not self.moe_layers:
            raise UserError(
                f"moe_dense_first_layers={self.moe_dense_first_layers} and "
                f"moe_dense_last_layers={self.moe_dense_last_layers} leave no MoE layer of {self.num_layers}"
            )
        if isinstance(self.moe_score_scale, list) and len(self.moe_score_scale) != self.num_layers:
            raise UserError(
                f"moe_score_scale has {len(self.moe_score_scale)} values for {self.num_layers} layers"
            )


@dataclass
class RouterConfig:
    """How routers are trained; may change from run to run, unlike the model's shape."""

    moe_balance_loss: Literal["cv2", "aux_loss", "seq_aux_loss", "global_aux_loss", "none"] = "cv2"
    """Balance loss: LLaMA-MoE's CV^2 of importance and load, or one of megatron-core's."""
    moe_aux_loss_coeff: float = 0.01
    """Weight of the balance loss."""
    moe_z_loss_coeff: float | None = None
    """Weight of the router z-loss (ST-MoE); none: off."""
    moe_gate_noise: bool = False
    """Learned Gaussian noise on the logits while training (LLaMA-MoE: sigma = softplus(W x) + 0.01)."""
    moe_router_enable_expert_bias: bool = False
    """Balance without a loss: a bias per expert, moved towards even loads (megatron-core)."""
    moe_router_bias_update_rate: float = 1e-3
    """Step of that bias."""
    moe_router_dtype: Literal["fp32", "fp64"] | None = "fp32"
    """Precision of the router's logits."""


@dataclass
class ParallelConfig:
    """The grid. Data parallelism is what the world size leaves over."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each attention and dense matrix."""
    pipeline_model_parallel_size: int = 1
    """Stages that share the layers."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks a stage holds (interleaved schedule)."""
    context_parallel_size: int = 1
    """Ranks that share a sequence (TransformerEngine only)."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts; folded into tensor x context x data parallelism."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert's matrices; none: 1."""
    sequence_parallel: bool | None = None
    """Split norms and routers along the sequence; none: on with tensor parallelism (MoE needs it)."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens travel to their experts."""
    use_distributed_optimizer: bool | None = None
    """Shard optimizer state over data parallelism; none: on with CUDA and TransformerEngine or Apex."""
    overlap_grad_reduce: bool = False
    """Overlap gradient reduction with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the distributed optimizer's parameter gather with the forward pass."""

    @property
    def expert_tp(self) -> int:
        return self.expert_tensor_parallel_size or 1

    @property
    def uses_sequence_parallel(self) -> bool:
        default = self.tensor_model_parallel_size > 1
        return default if self.sequence_parallel is None else self.sequence_parallel


@dataclass
class DomainConfig:
    """One data set of the blend."""

    path: str
    """Prefix of the training .bin/.idx pair."""
    weight: float = 1.0
    """Share in the blend (normalised over domains); 0 pauses the domain."""
    valid_path: str | None = None
    """Prefix of the held-out pair; none: no validation of this domain."""
    max_epochs: float | None = None
    """Weight becomes 0 once this many epochs are drawn; none: unlimited."""


@dataclass
class DataConfig:
    """What is read."""

    data_dir: str | None = None
    """Folder written by tools/preprocess_data.py: all its domains, weighted alike unless `domains` says otherwise."""
    domains: dict[str, DomainConfig] = field(default_factory=dict)
    """Domains by name (YAML only)."""
    seq_length: int = 2048
    """Tokens in a sample."""
    num_prefetch: int = 2
    """Global batches read ahead."""
    eval_samples: int = 64
    """Held-out samples per domain and evaluation."""


@dataclass
class OptimizerConfig:
    """AdamW, and LLaMA-MoE's schedule: linear warm-up, then cosine down to `min_lr`."""

    lr: float = 2e-4
    """Peak learning rate."""
    min_lr: float = 2e-5
    """Floor of the learning rate."""
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    """Shape of the decay."""
    lr_warmup_iters: int = 100
    """Steps of linear warm-up."""
    lr_decay_iters: int | None = None
    """Steps until `min_lr` is reached; none: train_iters."""
    weight_decay: float = 0.1
    """Not applied to norms and biases."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Epsilon of Adam."""
    clip_grad: float = 1.0
    """Gradient norm that is clipped to; 0: never."""


@dataclass
class TrainingConfig:
    """The run."""

    train_iters: int = 1000
    """Optimizer steps in all (a resumed run counts from its start)."""
    micro_batch_size: int = 1
    """Samples in a forward pass of a rank."""
    global_batch_size: int = 8
    """Samples in an optimizer step."""
    rampup_batch_size: tuple[int, int, int] | None = None
    """Start size, increment and number of samples over which the global batch grows."""
    seed: int = 1234
    """Seed of initialisation, sample order and gate noise."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 with CUDA, fp32 on CPU."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: CUDA where there is one."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """auto: TransformerEngine where it is installed and CUDA is used."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass: whole layers, or chosen modules."""
    recompute_num_layers: int = 1
    """Layers per recomputed block (full)."""
    eval_interval: int = 0
    """Steps between evaluations of every domain; 0: only at the end."""
    eval_at_start: bool = False
    """Evaluate before the first step too."""
    threads: int | None = None
    """CPU threads of a rank; none: the machine's cores shared by the ranks on it."""
    exit_duration_minutes: float | None = None
    """Save and exit after this time (a job's limit)."""


@dataclass
class CheckpointConfig:
    """What is loaded and saved."""

    load: str | None = None
    """Run directory to resume (its latest checkpoint), or a converted checkpoint to start from."""
    save: str | None = None
    """Run directory: checkpoints, metrics, recipe. A run found there is resumed."""
    finetune: bool = False
    """Take only the weights of `load`: step 0, fresh optimizer and sample order."""
    save_interval: int = 0
    """Steps between checkpoints; 0: only at the end and on a signal."""
    keep_latest: int = 2
    """Checkpoints kept in the run directory; 0: all."""


@dataclass
class LoggingConfig:
    """What is shown. Metrics always go to metrics.jsonl in the run directory."""

    log_interval: int = 1
    """Steps between log lines."""
    wandb_project: str | None = None
    """Weights & Biases project; none: not used. WANDB_MODE=offline needs no account."""
    wandb_name: str | None = None
    """Run name; none: the run directory's name."""
    peak_tflops: float | None = None
    """Peak of one device for MFU; none: known for A100 (312) and H100 (989), measured sgemm on CPU."""
    progress: bool = True
    """Progress bar on a terminal."""


@dataclass
class RunConfig:
    """A training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def validate(self, world_size: int) -> None:
        """Refuse what cannot run on `world_size` ranks, with the sum that does not work out."""
        self.model.validate()
        validate_grid(self, world_size)
        if self.training.train_iters < 1:
            raise UserError(f"train_iters={self.training.train_iters} must be at least 1")
        if self.data.seq_length > self.model.max_position_embeddings and not self.model.rope_scaling_factor:
            raise UserError(
                f"seq_length={self.data.seq_length} exceeds max_position_embeddings="
                f"{self.model.max_position_embeddings}",
                "shorten seq_length, or raise max_position_embeddings if you mean to extrapolate RoPE",
            )


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """World size over TP x PP x CP; a UserError with the sum where it does not divide."""
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    model = tp * pp * cp
    if world_size % model:
        raise UserError(
            f"world size {world_size} is not a multiple of tensor {tp} x pipeline {pp} x context {cp} = {model}",
            f"launch a multiple of {model} ranks, or make the grid smaller",
        )
    return world_size // model


def validate_grid(config: RunConfig, world_size: int) -> None:
    """Every divisibility that megatron-core would assert later, checked before a process group exists."""
    model, parallel, training, data = config.model, config.parallel, config.training, config.data
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tp
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
    ):
        if getattr(parallel, name) < 1:
            raise UserError(f"{name}={getattr(parallel, name)} must be at least 1")

    def divides(part: int, whole: int, part_name: str, whole_name: str) -> None:
        if whole % part:
            raise UserError(
                f"{whole_name}={whole} is not a multiple of {part_name}={part}",
                f"choose a divisor of {whole} for {part_name}",
            )

    dp = data_parallel_size(parallel, world_size)
    divides(tp, model.num_attention_heads, "tensor_model_parallel_size", "num_attention_heads")
    divides(tp, model.kv_heads, "tensor_model_parallel_size", "num_query_groups")
    divides(tp, model.ffn_hidden_size, "tensor_model_parallel_size", "ffn_hidden_size")
    divides(tp, model.vocab_size, "tensor_model_parallel_size", "vocab_size")
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    divides(pp * chunks, model.num_layers, "pipeline stages x virtual stages", "num_layers")
    if chunks > 1 and pp == 1:
        raise UserError(
            f"virtual_pipeline_model_parallel_size={chunks} needs pipeline_model_parallel_size > 1"
        )
    if model.is_moe:
        assert model.num_experts is not None
        divides(ep, model.num_experts, "expert_model_parallel_size", "num_experts")
        divides(etp, model.expert_width, "expert_tensor_parallel_size", "moe_ffn_hidden_size")
        divides(ep * etp * pp, world_size, "expert x expert-tensor x pipeline ranks", "world size")
        if tp > 1 and not parallel.uses_sequence_parallel:
            raise UserError(
                "a MoE with tensor_model_parallel_size > 1 needs sequence_parallel", "leave it unset"
            )
    elif ep > 1 or etp > 1:
        raise UserError(
            f"expert_model_parallel_size={ep}, expert_tensor_parallel_size={etp} on a dense model",
            "convert the checkpoint to a MoE first (tools/convert_llama.py partition)",
        )
    if parallel.uses_sequence_parallel:
        divides(tp * cp, data.seq_length, "tensor x context ranks", "seq_length")
    if cp > 1:
        divides(2 * cp, data.seq_length, "2 x context_parallel_size", "seq_length")
    per_step = training.micro_batch_size * dp
    if training.global_batch_size % per_step:
        raise UserError(
            f"global_batch_size={training.global_batch_size} is not a multiple of micro_batch_size "
            f"{training.micro_batch_size} x data parallel {dp} (world size {world_size} / "
            f"(tensor {tp} x pipeline {pp} x context {cp})) = {per_step}",
            f"use a multiple of {per_step}",
        )
    if chunks > 1 and (training.global_batch_size // per_step) % pp:
        raise UserError(
            f"the interleaved schedule needs micro-batches per step ({training.global_batch_size // per_step}) "
            f"to be a multiple of pipeline_model_parallel_size={pp}"
        )


# --- YAML and command line ------------------------------------------------------------------------------


def nearest(name: str, known: Iterable[str]) -> str:
    """The fix for an unknown name: what was probably meant."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(known))}"


def _refuse_unknown(values: dict[str, Any], cls: type, where: str) -> None:
    hints = get_type_hints(cls)
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"unknown key '{where}{name}'", nearest(name, hints))
        if is_dataclass(hints[name]) and isinstance(value, dict):
            _refuse_unknown(value, hints[name], f"{where}{name}.")
        elif hints[name] == dict[str, DomainConfig] and isinstance(value, dict):
            for domain, entry in value.items():
                if isinstance(entry, dict):
                    _refuse_unknown(entry, DomainConfig, f"{where}{name}.{domain}.")


def from_dict(cls: type, values: dict[str, Any], source: str) -> Any:
    """Build a config dataclass from plain values, with types checked (pydantic).

    Raises:
        UserError: an unknown key (with the nearest known one) or a value of the wrong type.
    """
    from pydantic import TypeAdapter, ValidationError

    _refuse_unknown(values, cls, "")
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{source}: {name}={first['input']!r}: {first['msg']}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values of a config dataclass."""
    from pydantic import TypeAdapter

    return TypeAdapter(type(config)).dump_python(config, mode="json")


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A recipe file as a dict; a UserError where it is missing or not a mapping."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"recipe {path} does not exist") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not YAML: {error}") from None
    if values is not None and not isinstance(values, dict):
        raise UserError(f"recipe {path} must be a mapping of sections")
    return values or {}


def _section_of() -> dict[str, str]:
    """Section of each flat option name; the names are unique over the tree."""
    owner: dict[str, str] = {}
    for section in fields(RunConfig):
        for name in get_type_hints(get_type_hints(RunConfig)[section.name]):
            assert name not in owner, f"{name} is in {owner[name]} and {section.name}"
            owner[name] = section.name
    return owner


def _peek(arguments: Sequence[str], name: str) -> str | None:
    """Value of --name in the command line, before it is parsed."""
    for spelling in {f"--{name}", f"--{name.replace('-', '_')}"}:
        for position, argument in enumerate(arguments):
            if argument.startswith(spelling + "="):
                return argument.split("=", 1)[1]
            if argument == spelling and position + 1 < len(arguments):
                return arguments[position + 1]
    return None


def parse_run(arguments: Sequence[str] | None = None, description: str = "") -> RunConfig:
    """Read `--config RECIPE.yaml` and the command line into one RunConfig.

    The model's shape comes from the checkpoint that is loaded; recipe and command line may change only what
    does not contradict its weights (checked when it is loaded). Order: defaults < checkpoint's model < recipe <
    command line.

    Raises:
        UserError: unknown key, wrong type, missing file.
    """
    import tyro

    from megatron_ext.checkpoint.layout import find_model_config

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    recipe_path = _peek(arguments, "config")
    recipe = read_yaml(recipe_path) if recipe_path else {}
    _refuse_unknown(recipe, RunConfig, "")
    sections = recipe.get("checkpoint") or {}
    for source in ("save", "load"):
        path = _peek(arguments, source) or sections.get(source)
        found = find_model_config(path) if path else None
        if found is not None:
            recipe["model"] = {**found, **(recipe.get("model") or {})}
            break
    for name in [key for key, value in recipe.items() if value is None]:
        del recipe[name]
    default = from_dict(RunConfig, recipe, str(recipe_path or "recipe"))

    @dataclass
    class Command:
        run: tyro.conf.OmitArgPrefixes[RunConfig]
        config: Annotated[str | None, tyro.conf.arg(help="YAML recipe; options override it.")] = None

    with_prefixes = tyro.conf.OmitArgPrefixes[tyro.conf.FlagConversionOff[RunConfig]]
    cleaned = _without_option(arguments, "config")
    config: RunConfig = tyro.cli(
        with_prefixes, args=cleaned, default=default, description=_describe(description)
    )
    return config


def _describe(text: str) -> str:
    return f"{text}\n\n--config RECIPE.yaml: read a recipe first; the options below override it."


def _without_option(arguments: Sequence[str], name: str) -> list[str]:
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == f"--{name}":
            skip = True
        elif not argument.startswith(f"--{name}="):
            kept.append(argument)
    return kept


def choices(annotation: Any) -> tuple[Any, ...]:
    """Values of a Literal."""
    return get_args(annotation)
