"""Dense LLaMAs whose FFNs are copied into experts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from megatron_ext.commands.common import check_paths
from megatron_ext.commands.lora import LoraConversion
from megatron_ext.commands.report import write_report
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.checkpoint.tensors import Weights
    from megatron_ext.construction.statistics import Statistics

Method = Literal["copies", "virtual_groups", "drop_upcycling", "branch_train_mix", "xft"]
_ONLY_FOR: dict[str, tuple[Method, ...]] = {
    "granularity": ("virtual_groups",),
    "weight_scaling": ("virtual_groups",),
    "noise": ("copies", "virtual_groups", "xft"),
    "drop_ratio": ("drop_upcycling",),
    "drop_indices": ("drop_upcycling",),
    "base": ("branch_train_mix",),
}


@dataclass(kw_only=True)
class Upcycle(LoraConversion):
    """Copy dense FFNs into experts: a model that is larger, but computes the same per token.

    copies: experts are whole FFNs (sparse upcycling). virtual_groups: they are shards of FFNs.
    drop_upcycling: copies, a share of whose units is drawn anew. branch_train_mix: experts are the
    FFNs of several models of one seed, all other weights their mean (the seed model can be one of
    them). xft: copies beside a shared one, which `merge` makes dense again.
    """

    source: Annotated[list[Path], tyro.conf.UseAppendAction]
    """Hugging Face directory, GGUF file, or dense checkpoint; branch_train_mix: once per model."""
    method: Method = "copies"
    """How experts are made."""
    num_experts: int | None = None
    """Experts E that the router chooses from; none: 8, or one per source."""
    moe_router_topk: int = 2
    """Experts k that a token is sent to (xft: besides the shared one)."""
    granularity: int = 1
    """Shards G of an FFN, each an expert (virtual_groups): E and k are multiples of it."""
    weight_scaling: Literal["score", "fc2", "cube_root"] = "score"
    """What makes up for shards weighing 1/G (virtual_groups): the router's score scale G, fc2 times
    G, or (approximate) fc1 and fc2 times G^(1/3).
    """
    noise: float = 0.0
    """Standard deviation of noise on copies, as a share of each matrix's own."""
    drop_ratio: float = 0.5
    """Share of units that are drawn anew (drop_upcycling)."""
    drop_indices: Literal["shared", "per_matrix"] = "shared"
    """Whether gate, up and down drop the same units (drop_upcycling)."""
    base: Path | None = None
    """Model of all weights but the experts' (branch_train_mix); none: the sources' mean."""
    seed: int = 1234
    """Of all that is drawn."""
    moe_gate: Literal["linear", "mlp"] = "linear"
    """Router; `mlp` is LLaMA-MoE's, and cannot be exported to transformers."""
    router_init: Literal["normal", "zero", "data", "centroids"] = "normal"
    """Start of the routers' weights."""
    router_init_std: float = 0.02
    """Their standard deviation (data, centroids: root mean square)."""
    statistics: Path | None = None
    """Directory of tools/collect_statistics.py (router_init data and centroids)."""
    moe_dense_first_layers: int = 0
    """How many of the first layers stay dense."""
    moe_dense_last_layers: int = 0
    """How many of the last layers stay dense."""
    moe_layer_freq: list[int] = dataclasses.field(default_factory=lambda: [1])
    """Which of the layers between get experts: every n-th from layer 0, or 1 or 0 for each layer.
    """
    skip_verify: bool = False
    """Do not compare with the dense model (which takes the memory of the fp32 mixture)."""

    def run(self) -> None:
        from megatron_ext.checkpoint import layout, verify
        from megatron_ext.checkpoint.hf import READ_AHEAD, open_weights
        from megatron_ext.checkpoint.upcycled import UpcycledWeights, check_sources
        from megatron_ext.construction.upcycling import Alteration, replica_map, weight_factors

        places = [*self.source, *([self.base] if self.base else [])]
        for place in places:
            check_paths(place, self.output, self.force)
        self._check_options()
        # Shared among the sources, so that memory does not grow with their number.
        opened = [open_weights(place, READ_AHEAD // len(places)) for place in places]
        check_sources(opened, [str(place) for place in places])
        sources, dense = opened[: len(self.source)], opened[0]
        model = self._model(dense.model)
        assert model.num_experts is not None
        neurons = replica_map(model.ffn_hidden_size, self.granularity, model.num_experts)
        _, fc1_factor, fc2_factor = weight_factors(self.weight_scaling, self.granularity)
        alteration = Alteration(
            seed=self.seed,
            noise=self.noise,
            drop_ratio=self.drop_ratio if self.method == "drop_upcycling" else 0.0,
            drop_indices=self.drop_indices,
            fc1_factor=fc1_factor,
            fc2_factor=fc2_factor,
        )
        copied = UpcycledWeights(
            sources,
            model,
            neurons,
            alteration,
            self.router_init,
            self.router_init_std,
            self.granularity,
            self._statistics(model, dense),
            opened[-1] if self.base else None,
        )
        weights = self.as_lora(dense, copied, self.seed)
        job = layout.describe_job(self)
        with layout.staged_directory(self.output, self.force, job) as folder:
            layout.write_construction(folder, self._describe(places, opened))
            self.write(folder, self.source[0], weights)
            if not self.skip_verify:
                exact = self._is_exact(dense.dtype)
                for place, source in zip(self.source, sources, strict=True):
                    error = verify.check_upcycled(source, folder, exact)
                    print(f"logits at step 0 against {place.name}: relative error {error:.1e}")
            write_report(folder, dense, self.statistics)
        print(f"done: {self.output}")

    def _check_options(self) -> None:
        for name, methods in _ONLY_FOR.items():
            default = next(f.default for f in dataclasses.fields(self) if f.name == name)
            if getattr(self, name) != default and self.method not in methods:
                raise UserError(
                    f"{name} has no meaning for method {self.method}",
                    f"it is for {', '.join(methods)}",
                )
        if self.seed < 0 or self.noise < 0:
            raise UserError(f"seed={self.seed} and noise={self.noise} must not be negative")
        if self.lora_rank is not None and (self.method != "copies" or self.noise):
            raise UserError(
                f"LoRA experts start as the dense FFN, not with method {self.method}, noise "
                f"{self.noise}",
                "use method copies without noise: adapters start from random numbers",
            )
        if not 0 <= self.drop_ratio <= 1:
            raise UserError(f"drop_ratio={self.drop_ratio} must lie between 0 and 1")
        several = self.method == "branch_train_mix"
        if not self.source or several != (len(self.source) > 1):
            raise UserError(
                f"method {self.method} takes {'several sources' if several else 'one source'}, "
                f"not {len(self.source)}",
                "give --source once per model with method branch_train_mix",
            )
        if self.method == "virtual_groups" and self.granularity < 2:
            raise UserError(
                f"granularity={self.granularity} must be at least 2 for virtual_groups",
                "set granularity, or use method copies",
            )
        if self.moe_router_topk % self.granularity:
            raise UserError(
                f"moe_router_topk={self.moe_router_topk} is not a multiple of "
                f"granularity={self.granularity}: the chosen shards would not make whole FFNs",
                f"use {self.granularity} or a multiple of it",
            )

    def _model(self, dense: Any) -> Any:
        """The mixture's ModelConfig."""
        from megatron_ext.construction.upcycling import weight_factors

        experts = self.num_experts or (len(self.source) if len(self.source) > 1 else 8)
        scale = weight_factors(self.weight_scaling, self.granularity)[0]
        xft = self.method == "xft"
        if self.moe_router_topk == 1 and not xft:
            scale *= experts  # our router gives one chosen expert its share of all, about 1/E
        freq = self.moe_layer_freq
        model = dataclasses.replace(
            dense,
            num_experts=experts,
            moe_router_topk=self.moe_router_topk,
            moe_ffn_hidden_size=dense.ffn_hidden_size // max(self.granularity, 1),
            moe_shared_expert_intermediate_size=dense.ffn_hidden_size if xft else None,
            moe_shared_expert_gate="xft" if xft else "none",
            moe_score_scale=scale,
            moe_gate=self.moe_gate,
            moe_dense_first_layers=self.moe_dense_first_layers,
            moe_dense_last_layers=self.moe_dense_last_layers,
            moe_layer_freq=freq[0] if len(freq) == 1 else freq,
        )
        model.validate()
        return model

    def _statistics(self, model: Any, dense: Weights) -> Statistics | None:
        from megatron_ext.checkpoint.experts import fingerprint
        from megatron_ext.construction.routers import check_router_start
        from megatron_ext.construction.statistics import Statistics

        found = None
        if self.statistics is not None:
            found = Statistics.open(self.statistics)
            found.check(fingerprint(dense))
        check_router_start(
            self.router_init,
            self.moe_gate,
            model.num_experts,
            model.moe_layers,
            found,
            self.granularity,
        )
        return found

    def _is_exact(self, source: Any) -> bool:
        """Whether step 0 must be the dense model to rounding."""
        from megatron_ext.checkpoint.tensors import DTYPES

        copied = self.method in ("copies", "virtual_groups", "xft") and not self.noise
        alone = self.num_experts == 1
        sums_to_one = self.moe_router_topk > 1 or self.method == "xft" or alone
        sums_to_one = sums_to_one or self.router_init == "zero"
        whole_bits = DTYPES.get(self.dtype, source) == DTYPES["fp32"]
        power_of_two = self.granularity & (self.granularity - 1) == 0
        scaled = self.weight_scaling == "score" or (
            self.weight_scaling == "fc2" and (whole_bits or power_of_two)
        )
        return copied and sums_to_one and scaled

    def _describe(self, places: list[Path], opened: list[Weights]) -> dict[str, Any]:
        """Contents of construction.json."""
        from megatron_ext.checkpoint.experts import fingerprint

        options = {name: getattr(self, name) for name, m in _ONLY_FOR.items() if self.method in m}
        options |= self.lora_options()
        if self.base is not None:
            options["base"] = self.base.name
        router: dict[str, Any] = {
            "gate": self.moe_gate,
            "init": self.router_init,
            "std": self.router_init_std,
        }
        if self.statistics is not None:
            router["statistics"] = self.statistics.name
        return {
            "method": self.method,
            "seed": self.seed,
            "options": options,
            "router": router,
            "sources": [
                {"name": place.name, "fingerprint": fingerprint(weights)}
                for place, weights in zip(places, opened, strict=True)
            ],
        }
