"""One tree of dataclasses is the YAML recipe and the command line (read by `recipe.py`).

All validation that needs no process group. Names are Megatron's where Megatron has one. The text
under a field is its `--help`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_ext.model_config import ModelConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DomainConfig",
    "LoggingConfig",
    "MixingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RouterConfig",
    "RunConfig",
    "TrainingConfig",
]


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
    """Learned Gaussian noise on the logits while training (LLaMA-MoE: sigma = softplus(W x) +
    0.01).
    """
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
    """Ranks that share each sequence, two chunks a rank."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts; folded into tensor x context x data parallelism."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert's matrices; none: 1."""
    sequence_parallel: bool | None = None
    """Split norms and routers along the sequence; none: on with tensor parallelism (MoE needs
    it).
    """
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens travel to their experts."""
    use_distributed_optimizer: bool | None = None
    """Shard optimizer state over data parallelism; none: on with CUDA and TransformerEngine or
    Apex.
    """
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

    path: str = ""
    """Prefix of the training .bin/.idx pair; empty: the pair of this name in data_dir."""
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
    """Folder written by tools/preprocess_data.py: all its domains, weighted alike unless `domains`
    says otherwise.
    """
    domains: dict[str, DomainConfig] = field(default_factory=dict)
    """Domains by name (YAML only)."""
    seq_length: int = 2048
    """Tokens in a sample."""
    task: Literal["pretrain", "sft"] = "pretrain"
    """Streams of text, or conversations (tools/preprocess_data.py --task sft)."""
    packing: Literal["packed", "padded"] = "packed"
    """(sft) As many conversations in a sample as fit, each attending to itself only; or one."""
    num_prefetch: int = 2
    """Global batches read ahead."""
    eval_samples: int = 64
    """Held-out samples per domain and evaluation."""


@dataclass
class MixingConfig:
    """How the blend's weights change while training (docs/mixing.md)."""

    strategy: str = "static"
    """What decides on the weights: static, router_load, reference_loss, load_progress, ...; or
    module:Class of your own.
    """
    interval: int = 100
    """Steps between decisions m."""
    signal: Literal["online", "probe"] = "online"
    """Router loads of the training tokens since the last decision, at no cost; or of fixed held-out
    samples in evaluation mode (as the paper).
    """
    layers: str | None = None
    """MoE layers whose loads count: last, all, or numbers separated by commas; none: what the
    strategy prefers.
    """
    probe_samples: int = 80
    """Held-out samples of each data set in a probe."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the strategy (YAML only)."""


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
    """auto: bf16 on GPUs that have it (A100 and newer), else fp32."""
    fp8: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"] = "none"
    """Matrix products in fp8 with this scaling recipe of TransformerEngine's; none: in `precision`.
    H100 has the first three, B200 mxfp8 too, A100 none.
    """
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: CUDA where there is one."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """auto: TransformerEngine where it is installed and CUDA is used."""
    freeze: Literal["none", "router", "reference", "base"] = "none"
    """Leave the routers as they are; `reference`: and the experts' gate projections, as MoE-SFT's
    code does by a match of names; `base`: all but LoRA adapters and routers.
    """
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
    async_save: bool = False
    """Write checkpoints while the training goes on, from a copy in host memory."""
    keep_latest: int = 2
    """Checkpoints kept in the run directory; 0: all."""
    keep_best: bool = False
    """Save where the mean held-out loss is lowest, and keep that checkpoint too."""


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
    """Peak of one device for MFU; none: known for A100 (312) and H100 (989), measured sgemm on
    CPU.
    """
    generate_tokens: int = 0
    """(sft) Longest answer to generate for a held-out conversation of each data set at evaluations;
    0: none. Every token is a pass over whole samples.
    """
    progress: bool = True
    """Progress bar on a terminal."""


@dataclass
class RunConfig:
    """A training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mixing: MixingConfig = field(default_factory=MixingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
