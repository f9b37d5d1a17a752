"""Checkpoints of an instruction-tuning run become experts (UpIT, arXiv 2410.01610).

Experts and their expansion are here. Routers start as those of the other conversions; the paper's,
trained on the data that each expert is best at, are made by tools/initialise_router.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from megatron_ext.checkpoint import layout
from megatron_ext.commands.common import check_paths
from megatron_ext.commands.lora import LoraConversion
from megatron_ext.commands.report import write_report
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ext.checkpoint.tensors import Weights
    from megatron_ext.construction.expansion import Child, Merge, Selection
    from megatron_ext.construction.statistics import Statistics

# Options, and what they are for.
_ONLY_FOR: dict[str, tuple[str, tuple[str, ...]]] = {
    "dare_drop": ("merge", ("dare",)),
    "dare_mask": ("merge", ("dare",)),
    "ties_share": ("merge", ("ties",)),
    "merge_scale": ("merge", ("dare", "task_arithmetic", "ties")),
    "alpha_concentration": ("merge", ("dare", "task_arithmetic", "ties")),
    "similarity": ("parents", ("dissimilar",)),
}


@dataclass(frozen=True)
class Place:
    """Where a model lies; `RUN@100` is iteration 100 of a run."""

    path: Path
    iteration: int | None = None

    @classmethod
    def of(cls, text: Path) -> Place:
        """Read what stands on the command line.

        Raises:
            UserError: the run does not hold that iteration.
        """
        name, at, number = str(text).rpartition("@")
        if text.exists() or not at or not number.isdigit():
            return cls(text)
        place = cls(Path(name), int(number))
        if place.path.exists() and not place.files.is_dir():
            kept = ", ".join(map(str, layout.kept_iterations(place.path))) or "no iteration"
            raise UserError(f"{name} holds no iteration {number}", f"it holds {kept}")
        return place

    @property
    def files(self) -> Path:
        """The directory or file of the weights."""
        if self.iteration is None:
            return self.path
        return layout.iteration_dir(self.path, self.iteration)

    @property
    def name(self) -> str:
        at = "" if self.iteration is None else f"@{self.iteration}"
        return f"{self.path.name}{at}"

    def open(self) -> Weights:
        """A dense model; a mixture of one expert (LoRA tuning) counts as one."""
        from megatron_ext.checkpoint.hf import open_weights
        from megatron_ext.checkpoint.lora import as_dense
        from megatron_ext.checkpoint.reader import CheckpointWeights

        if self.iteration is None:
            return as_dense(open_weights(self.path))
        return as_dense(CheckpointWeights(self.path, self.iteration))


@dataclass(kw_only=True)
class Upit(LoraConversion):
    """Make the checkpoints of an instruction-tuning run experts, and merge more out of them.

    The first experts are the checkpoints' FFNs. Each further one is the base plus a merge of two
    experts' differences to it: of the two that are least alike, unless told otherwise. With
    --lora-rank every difference becomes an adapter of that rank over the base's FFN.
    """

    base: Path
    """What the run started from: Hugging Face directory, GGUF file, or dense checkpoint."""
    source: Annotated[list[Path], tyro.conf.UseAppendAction]
    """A dense checkpoint of the run, once for each: a directory or file, or RUN@100 for an
    iteration of a run.
    """
    iterations: str | None = None
    """Iterations of the one source, a run, separated by commas; `all`: those it still holds."""
    num_experts: int
    """Experts n: the m checkpoints and n - m merged ones."""
    moe_router_topk: int = 2
    """Experts k that a token is sent to."""
    merge: Literal["dare", "average", "task_arithmetic", "ties"] = "dare"
    """How two experts' differences to the base become one: entries dropped at random and the rest
    rescaled; their mean; their weighted sum; the mean of large entries of the same sign.
    """
    dare_drop: float = 0.5
    """Probability that an entry is dropped (dare)."""
    dare_mask: Literal["each", "sum"] = "each"
    """Whether each weighted difference has entries dropped, or their sum (dare)."""
    ties_share: float = 0.2
    """Share of a matrix's entries, the largest, that are kept (ties)."""
    merge_scale: float = 1.0
    """Factor on the merged difference (all but average)."""
    alpha_concentration: float = 1.0
    """a of the first parent's weight, drawn from Beta(a, a); 1: uniform, larger: nearer to a half
    (all but average).
    """
    parents: Literal["dissimilar", "random"] = "dissimilar"
    """Which two experts are merged."""
    similarity: Literal["cosine", "l2"] = "cosine"
    """Of the FFNs' differences to the base (dissimilar parents)."""
    scope: Literal["model", "layer"] = "model"
    """Whether a merged expert has the same parents in every layer, or each layer's own."""
    child_joins: bool = False
    """Whether a merged expert can be a parent."""
    repeat_pairs: bool = False
    """Whether two parents are merged again while another pair was merged less often."""
    rest: Literal["last", "average", "base"] = "last"
    """Where attention, embeddings and norms are from: the source named last, the sources' mean, or
    the base.
    """
    router_init: Literal["normal", "zero", "data", "centroids"] = "normal"
    """Start of the routers' weights."""
    router_init_std: float = 0.02
    """Their standard deviation (data, centroids: root mean square)."""
    statistics: Path | None = None
    """Directory of tools/collect_statistics.py (router_init data and centroids): of the base where
    rest is base, else of the source named last.
    """
    seed: int = 1234
    """Of all that is drawn."""
    skip_verify: bool = False
    """Do not compare with the checkpoints (which takes the memory of the fp32 mixture)."""

    def run(self) -> None:
        from megatron_ext.checkpoint import verify
        from megatron_ext.checkpoint.expanded import (
            ExpandedWeights,
            MeanWeights,
            check_checkpoints,
        )
        from megatron_ext.checkpoint.reader import CheckpointWeights
        from megatron_ext.checkpoint.upcycled import check_sources
        from megatron_ext.construction.expansion import Merge, Selection, check_expansion

        places = [*self._sources(), Place.of(self.base)]
        for place in places:
            check_paths(place.path, self.output, self.force)
        merge = Merge(self.merge, self.dare_drop, self.dare_mask, self.ties_share, self.merge_scale)
        selection = Selection(
            self.parents,
            self.similarity,
            self.child_joins,
            self.repeat_pairs,
            self.alpha_concentration,
        )
        self._check_options()
        check_expansion(len(places) - 1, self.num_experts, self.seed, selection, merge)
        opened = [place.open() for place in places]
        check_sources(opened, [str(place.path) for place in places])
        *checkpoints, base = opened
        reference = base if self.rest == "base" else checkpoints[-1]
        model = self._model(base.model)
        statistics = self._statistics(model, reference)
        plans, grams = self._plan(base, checkpoints, model.moe_layers, selection, merge)
        experts = ExpandedWeights(
            base,
            checkpoints,
            MeanWeights(checkpoints) if self.rest == "average" else reference,
            model,
            {layer: plans[self._plan_name(layer)] for layer in model.moe_layers},
            merge,
            self.seed,
            self.router_init,
            self.router_init_std,
            statistics,
        )
        weights = self.as_lora(base, experts, self.seed)
        files = [place.files for place in places]
        job = layout.describe_job(
            dataclasses.replace(self, source=files[:-1], base=files[-1], iterations=None)
        )
        with layout.staged_directory(self.output, self.force, job) as folder:
            construction = self._describe(places, opened, plans, grams)
            layout.write_construction(folder, construction)
            self.write(folder, places[-2].path, weights)
            stored = CheckpointWeights(folder)
            if self.lora_rank is None:
                check_checkpoints(stored, checkpoints)
            else:
                construction["lost"] = self._lost(stored, experts, base)
                layout.write_construction(folder, construction)
            if not self.skip_verify:
                for place, source in zip(places[:-1], checkpoints, strict=True):
                    error = verify.check_upcycled(source, folder, exact=False)
                    print(f"logits at step 0 against {place.name}: relative error {error:.1e}")
            write_report(folder, reference, self.statistics)
        print(f"done: {self.output}")

    def _lost(self, stored: Weights, experts: Weights, base: Weights) -> dict[str, list[float]]:
        """Share of each expert's difference to the base that its adapters lack, layer by layer."""
        from megatron_ext.checkpoint.lora import lost

        shares = lost(stored, experts, base)
        for expert, share in enumerate(shares.mean(0).tolist()):
            print(f"expert {expert}: adapters lack {100 * share:.2g} % of its difference to base")
        return {
            str(layer): row
            for layer, row in zip(stored.model.moe_layers, shares.tolist(), strict=True)
        }

    def _sources(self) -> list[Place]:
        """The checkpoints, each once."""
        places = [Place.of(source) for source in self.source]
        if self.iterations is not None:
            run = places[0].path
            if len(places) != 1 or places[0].iteration is not None or not run.is_dir():
                raise UserError(
                    "iterations are of one run",
                    "give its directory as the only --source, or --source RUN@100 for each",
                )
            numbers = self.iterations.split(",")
            if self.iterations == "all":
                numbers = [str(number) for number in layout.kept_iterations(run)]
            elif not all(number.strip().isdigit() for number in numbers):
                raise UserError(
                    f"iterations={self.iterations} are not numbers separated by commas",
                    "as in --iterations 100,200",
                )
            places = [Place.of(Path(f"{run}@{number.strip()}")) for number in numbers]
        seen = set()
        for place in places:
            if (key := (place.path.resolve(), place.iteration)) in seen:
                raise UserError(f"source {place.name} is given twice")
            seen.add(key)
        return places

    def _check_options(self) -> None:
        for name, (choice, values) in _ONLY_FOR.items():
            default = next(f.default for f in dataclasses.fields(self) if f.name == name)
            chosen = getattr(self, choice)
            if getattr(self, name) != default and chosen not in values:
                raise UserError(
                    f"{name} has no meaning for {choice}={chosen}", f"it is for {', '.join(values)}"
                )

    def _model(self, dense: Any) -> Any:
        """The mixture's ModelConfig."""
        # Our router gives one chosen expert its share of all, about 1 / E.
        scale = float(self.num_experts) if self.moe_router_topk == 1 else 1.0
        model = dataclasses.replace(
            dense,
            num_experts=self.num_experts,
            moe_router_topk=self.moe_router_topk,
            moe_ffn_hidden_size=dense.ffn_hidden_size,
            moe_score_scale=scale,
        )
        model.validate()
        return model

    def _statistics(self, model: Any, reference: Weights) -> Statistics | None:
        from megatron_ext.checkpoint.experts import fingerprint
        from megatron_ext.construction.routers import check_router_start
        from megatron_ext.construction.statistics import Statistics

        found = None
        if self.statistics is not None:
            found = Statistics.open(self.statistics)
            found.check(fingerprint(reference))
        check_router_start(self.router_init, "linear", model.num_experts, model.moe_layers, found)
        return found

    def _plan_name(self, layer: int) -> str:
        """What the plan that a layer follows is recorded under."""
        return str(layer) if self.scope == "layer" else "all"

    def _plan(
        self,
        base: Weights,
        checkpoints: list[Weights],
        layers: list[int],
        selection: Selection,
        merge: Merge,
    ) -> tuple[dict[str, list[Child]], dict[str, Tensor]]:
        """The children by plan, and the Gram matrices that they were chosen by."""
        from megatron_ext.checkpoint.expanded import delta_grams
        from megatron_ext.construction.expansion import plan_expansion

        m = len(checkpoints)
        grams: dict[str, Tensor] = {}
        if self.parents == "dissimilar" and self.num_experts > m:
            for layer, gram in delta_grams(base, checkpoints, layers).items():
                name = self._plan_name(layer)
                grams[name] = grams.get(name, 0) + gram
        plans = {}
        for stream, name in enumerate(dict.fromkeys(map(self._plan_name, layers))):
            plans[name] = plan_expansion(
                m, self.num_experts, self.seed, selection, merge, grams.get(name), stream
            )
            for number, child in enumerate(plans[name], m):
                (j, k), (alpha, beta) = child.parents, child.weights
                where = f" in layer {name}" if self.scope == "layer" else ""
                print(f"expert {number}{where}: {alpha:.2f} of {j}, {beta:.2f} of {k}")
        return plans, grams

    def _describe(
        self,
        places: list[Place],
        opened: list[Weights],
        plans: dict[str, list[Child]],
        grams: dict[str, Tensor],
    ) -> dict[str, Any]:
        """Contents of construction.json; expert i < m is source i, the children follow."""
        from megatron_ext.checkpoint.experts import fingerprint

        names = ("merge", "parents", "scope", "child_joins", "repeat_pairs", "rest")
        options = {name: getattr(self, name) for name in names}
        for name, (choice, values) in _ONLY_FOR.items():
            if getattr(self, choice) in values:
                options[name] = getattr(self, name)
        options |= self.lora_options()
        router: dict[str, Any] = {
            "gate": "linear",
            "init": self.router_init,
            "std": self.router_init_std,
        }
        if self.statistics is not None:
            router["statistics"] = self.statistics.name
        return {
            "method": "upit",
            "seed": self.seed,
            "options": options | {"base": places[-1].name},
            "router": router,
            "sources": [
                {"name": place.name, "fingerprint": fingerprint(weights)}
                for place, weights in zip(places, opened, strict=True)
            ],
            "children": {
                name: [
                    {"parents": child.parents, "alpha": child.alpha, "beta": child.weights[1]}
                    for child in children
                ]
                for name, children in plans.items()
            },
            "gram": {name: gram.tolist() for name, gram in grams.items()},
        }
