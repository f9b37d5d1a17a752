"""A dense LLaMA's FFNs cut into experts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_ext.commands.common import Conversion, check_paths
from megatron_ext.commands.report import write_report
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.construction.methods import Split
    from megatron_ext.construction.routers import RouterInit
    from megatron_ext.construction.statistics import Statistics


@dataclass(kw_only=True)
class Partition(Conversion):
    """Cut a dense LLaMA's FFNs into experts."""

    source: Path
    """Hugging Face directory, GGUF file, or dense checkpoint."""
    num_experts: int = 8
    """Experts E of a layer that the router chooses from."""
    moe_router_topk: int = 2
    """Experts k that a token is sent to."""
    method: Literal[
        "independent_random",
        "contiguous",
        "independent_clustering",
        "co_activation",
        "gradient",
        "sharing_inner",
        "sharing_inter",
        "gradient_split_plus",
    ] = "independent_random"
    """How experts get their neurons. Of LLaMA-MoE: independent_random, independent_clustering (by
    their weights), co_activation (by common activity), gradient (by importance, without overlap),
    sharing_inner (by importance, overlapping), sharing_inter (beside a residual expert of those
    that most experts ask for). Of LLaMA-MoE v2: contiguous, and gradient_split_plus (residual, by
    mean importance, routers from centroids).
    """
    statistics: Path | None = None
    """Directory of tools/collect_statistics.py, for methods and routers that look at data."""
    cluster_by: Literal["up", "gate", "down"] | None = None
    """Matrix whose vectors are clustered (independent_clustering); none: up."""
    metric: Literal["l2", "cosine"] | None = None
    """Distance of vectors of length 1, or angle between centred ones (independent_clustering);
    none: l2.
    """
    importance: Literal["feature_change", "feature_grad"] | None = None
    """Importance of a neuron's output h to the loss L: |h dL/dh|, or |dL/dh|; none:
    feature_change.
    """
    expert_width: int | None = None
    """Neurons m of an expert (sharing methods); none: an even share."""
    num_residual: int | None = None
    """Residual blocks R of m neurons, always on (sharing_inter, gradient_split_plus); none: 1."""
    share: bool = False
    """Let routed experts overlap beside the residual one (sharing_inter)."""
    seed: int = 1234
    """Of the neurons' deal and the routers' start."""
    moe_gate: Literal["linear", "mlp"] = "linear"
    """Router; `mlp` is LLaMA-MoE's, and cannot be exported to transformers."""
    score_scale: float | None = None
    """Factor on the chosen experts' outputs; none: E/k, as LLaMA-MoE."""
    router_init: Literal["normal", "zero", "data", "centroids"] | None = None
    """Start of the routers' weights; none: centroids for gradient_split_plus, else normal."""
    router_init_std: float = 0.02
    """Their standard deviation (data, centroids: root mean square)."""
    moe_dense_first_layers: int = 0
    """How many of the first layers stay dense."""
    moe_dense_last_layers: int = 0
    """How many of the last layers stay dense."""
    skip_verify: bool = False
    """Do not compare with the dense model (which takes the memory of one fp32 model)."""

    def run(self) -> None:
        from megatron_ext.checkpoint import experts, layout, verify
        from megatron_ext.checkpoint.hf import open_weights
        from megatron_ext.construction.methods import METHODS

        check_paths(self.source, self.output, self.force)
        dense = open_weights(self.source)
        if dense.model.is_moe:
            raise UserError("the source has experts already", "partition a dense model")
        split, scale = self._split(dense.model.ffn_hidden_size), self.score_scale
        model = experts.moe_model(
            dense.model,
            split,
            moe_router_topk=self.moe_router_topk,
            moe_score_scale=self.num_experts / self.moe_router_topk if scale is None else scale,
            moe_gate=self.moe_gate,
            moe_dense_first_layers=self.moe_dense_first_layers,
            moe_dense_last_layers=self.moe_dense_last_layers,
        )
        router_init = self.router_init or METHODS[self.method].router_init
        fingerprint = experts.fingerprint(dense)
        statistics = self._statistics(split, model.moe_layers, router_init, fingerprint)
        neurons = experts.split_layers(dense, model.moe_layers, split, statistics)
        weights = experts.PartitionedWeights(
            dense, model, neurons, self.seed, router_init, self.router_init_std, statistics
        )
        router = {"gate": self.moe_gate, "init": router_init, "std": self.router_init_std}
        source = {"name": self.source.name, "fingerprint": fingerprint}
        construction = experts.describe(split, neurons, router, source)
        with layout.staged_directory(self.output, self.force, layout.describe_job(self)) as folder:
            layout.write_construction(folder, construction)
            self.write(folder, self.source, weights)
            if not self.skip_verify:
                error = verify.check_partition(dense, folder)
                print("every expert's weights are those of its neurons: equal bit by bit")
                if error is None:
                    print("experts overlap: all of them together are not the dense model")
                else:
                    print(
                        f"all experts together against the dense model: relative error {error:.1e}"
                    )
            write_report(folder, dense, self.statistics)
        print(f"done: {self.output}")

    def _split(self, d_ffn: int) -> Split:
        """What is asked of the method, checked; what was not given is as the method has it."""
        from megatron_ext.construction.methods import METHODS, Split, check

        given = {name: getattr(self, name) for name in self._given()}
        given.setdefault("num_residual", METHODS[self.method].num_residual)
        split = Split(
            method=self.method,
            d_ffn=d_ffn,
            num_experts=self.num_experts,
            seed=self.seed,
            **given,
        )
        check(split, self._given())
        return split

    def _given(self) -> set[str]:
        names = ("cluster_by", "metric", "importance", "expert_width", "num_residual", "share")
        return {name for name in names if getattr(self, name) not in (None, False)}

    def _statistics(
        self, split: Split, layers: list[int], router_init: RouterInit, fingerprint: str
    ) -> Statistics | None:
        """The statistics, if any, when everything is known to fit together."""
        from megatron_ext.construction.methods import METHODS, check_statistics
        from megatron_ext.construction.routers import FROM_STATISTICS, check_router_start
        from megatron_ext.construction.statistics import Statistics

        for_routers = router_init in FROM_STATISTICS
        statistics = None
        if self.statistics is not None:
            statistics = Statistics.open(self.statistics)
            if not (METHODS[self.method].statistics or for_routers):
                raise UserError(
                    f"method {self.method} with router_init={router_init} looks at no statistics",
                    "leave --statistics out",
                )
        check_statistics(split, statistics)
        if statistics is not None:
            statistics.check(fingerprint)
        seen = statistics if for_routers else None
        check_router_start(router_init, self.moe_gate, self.num_experts, layers, seen)
        return statistics
