"""Collect a dense model's statistics over a text, on any grid, in passes that can be interrupted.

Sums are reduced over the ranks and saved after every chunk. A chunk starts from zero and is added
to what was saved, so that a collection that was interrupted ends with the same bits. The leader of
each pipeline stage writes its layers: all ranks must see the directory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from megatron_ext.checkpoint import layout, run_state
from megatron_ext.config import RunConfig
from megatron_ext.construction import statistics
from megatron_ext.construction.clustering import balanced_kmeans
from megatron_ext.construction.statistics import LayerStatistics
from megatron_ext.model.builder import build_model, transformer_config
from megatron_ext.training import probe as probes
from megatron_ext.training.grid import Grid
from megatron_ext.training.passes import run_schedule
from megatron_ext.training.probe import Probe
from megatron_ext.training.samples import MicroBatch, SamplePool, sentence_embeddings
from megatron_ext.training.step import place, run_model
from megatron_ext.training.unfinished import INPUT_GROUPS, INPUTS, Settings, Unfinished
from megatron_ext.validation import check_vocabulary

SUMMED = (probes.TOKENS, probes.INPUT_SUM, probes.IMPORTANCE, probes.GRADIENT)


def load_frozen(run: RunConfig, grid: Grid) -> Any:
    """This rank's stage of a checkpoint, frozen: no gradient or optimizer memory."""
    config = transformer_config(run, grid.platform)
    config.perform_initialization = False
    chunk: Any = build_model(run, grid.platform, config)
    if config.bf16:
        from megatron.core.transformer.module import Float16Module

        chunk = Float16Module(config, chunk)
    assert run.checkpoint.load
    run_state.load_run(run.checkpoint.load, [chunk])
    return chunk.requires_grad_(False).eval()


class Collector:
    """One collection on this rank.

    Args:
        model: from `load_frozen`.
        pool: the samples, the same on every rank.
        output: the directory of statistics, checked with `unfinished.check_output`.
        sentence_model: directory of a sentence-transformers model, where it makes the groups.
    """

    def __init__(
        self,
        run: RunConfig,
        grid: Grid,
        model: Any,
        pool: SamplePool,
        settings: Settings,
        output: Path,
        sentence_model: Path | None = None,
        show_progress: bool = True,
    ) -> None:
        self.run, self.grid, self.pool, self.settings = run, grid, pool, settings
        self.model, self.output, self.sentence_model = model, output, sentence_model
        self.groups = settings.group_names()
        self.probe = Probe(run_state.unwrap(model), len(self.groups))
        self.leads_stage = grid.tensor_rank == 0 and grid.data_rank == 0
        self._show = show_progress and grid.is_main
        self.unfinished = Unfinished(output, settings)
        if self.leads_stage:
            for layer in self.probe.layers:
                self.unfinished.layer_folder(layer).mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        starts = range(0, pool.size, settings.save_interval)
        self._chunks = [(start, min(start + settings.save_interval, pool.size)) for start in starts]

    def collect(self) -> float:
        """All passes, then the files (collective).

        Returns:
            The model's mean loss on the samples (nats).
        """
        settings = self.settings
        sample_groups = np.zeros(self.pool.size, np.int64)
        if settings.groups == "domains":
            sample_groups = self.pool.domains
        elif settings.groups == "centroids":
            self._pass("inputs", sample_groups, gradients=False, keeps="inputs")
            self.probe.centroids = self._cluster_inputs()
        else:
            if settings.groups == "hidden":
                self._pass("hidden", sample_groups, gradients=False, keeps="hidden")
            sample_groups = self._cluster_samples()
        keeps = None if settings.groups == "centroids" else "inputs"
        totals = self._pass("sums", sample_groups, settings.gradients, keeps)
        return self._finish(totals)

    # --- one pass ---------------------------------------------------------------------------------

    def _pass(
        self, name: str, groups: NDArray[np.int64], gradients: bool, keeps: str | None
    ) -> dict[int, dict[str, Tensor]]:
        """Run the model over all samples, from where the pass was interrupted.

        Args:
            name: of the pass; "sums" adds up what its chunks find.
            groups: of each sample [P].
            gradients: whether to run backwards.
            keeps: "inputs" of the picked tokens, "hidden" states of the samples, or nothing.

        Returns:
            On a stage's leader, the sums of all samples by layer.
        """
        done = self.unfinished.done(name)
        totals: dict[int, dict[str, Tensor]] = {}
        if name == "sums" and self.leads_stage:
            totals = self.unfinished.read_sums(self.probe.layers, done)
        bar = tqdm(total=self.pool.size, desc=name, unit="sample", disable=not self._show)
        bar.update(sum(stop - start for start, stop in self._chunks[:done]))
        for chunk in range(done, len(self._chunks)):
            start, stop = self._chunks[chunk]
            low, high = self.pool.picked_rows(start, stop) if keeps == "inputs" else (0, 0)
            samples = stop - start if keeps == "hidden" else 0
            self.probe.reset(high - low, samples, gradients)
            loss = self._run_chunk(start, stop, groups, gradients)
            self._reduce()
            if self.leads_stage:
                self._write_kept(chunk)
                if name == "sums":
                    self._add_sums(totals, chunk)
            self._save_progress(name, chunk, loss)
            bar.update(stop - start)
            bar.set_postfix(loss=f"{loss[0] / loss[1]:.3f}")
        bar.close()
        return totals

    def _run_chunk(
        self, start: int, stop: int, groups: NDArray[np.int64], gradients: bool
    ) -> list[float]:
        """Forward and backward passes of samples start..stop; [sum of losses, tokens] of all."""
        size = self.run.training.micro_batch_size
        grid = self.grid
        batches = self.pool.micro_batches(start, stop, groups, size, grid.data_rank, grid.data_size)
        self._check_tokens(batches)
        results = run_schedule(self.run, [self.model], self._forward, batches, not gradients)
        loss = torch.zeros(2, dtype=torch.float64, device=grid.platform.device)
        if grid.is_last_stage and grid.tensor_rank == 0:
            for result in results:
                loss += result["loss"]
        torch.distributed.all_reduce(loss)
        return [float(value) for value in loss]

    def _forward(
        self, batches: Iterator[MicroBatch], model: Any, *unused: Any
    ) -> tuple[Tensor, Any]:
        """megatron-core's forward_step_func."""
        batch, packed = place(next(batches), self.grid.platform.device)
        self.probe.begin(batch)
        output = run_model(model, batch, packed)
        return output, functools.partial(_sum_loss, batch["loss_mask"])

    def _check_tokens(self, batches: list[MicroBatch]) -> None:
        largest = max(int(batch["tokens"].max()) for batch in batches)
        check_vocabulary(largest, self.run.model.vocab_size)

    def _reduce(self) -> None:
        """Add up what the ranks of this pipeline stage saw (each its tokens and its neurons)."""
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        if group.size() == 1:
            return
        for sums in self.probe.sums.values():
            for tensor in sums.values():
                torch.distributed.all_reduce(tensor, group=group)
        if self.probe.last_hidden is not None:
            torch.distributed.all_reduce(self.probe.last_hidden, group=group)

    # --- groups -----------------------------------------------------------------------------------

    def _cluster_samples(self) -> NDArray[np.int64]:
        """Group of each sample [P]: balanced k-means over their embeddings, made once."""
        file = self.unfinished.groups_file
        if self.grid.is_main and not file.exists():
            if self.settings.groups == "hidden":
                embeddings = self.unfinished.read_hidden()
            else:
                assert self.sentence_model is not None and self.run.checkpoint.load is not None
                tokenizer = Path(self.run.checkpoint.load) / layout.TOKENIZER_DIR
                embeddings = sentence_embeddings(self.pool, self.sentence_model, tokenizer)
            labels, _ = balanced_kmeans(embeddings, self.settings.num_clusters, self.settings.seed)
            statistics.write_tensors(file, {"groups": labels})
        torch.distributed.barrier()
        groups: NDArray[np.int64] = load_file(file)["groups"].numpy()
        return groups

    def _cluster_inputs(self) -> dict[int, Tensor]:
        """Centroids [C, h] of each of this stage's layers: balanced k-means over its FFN inputs.

        The ranks of the stage share the layers.
        """
        ranks = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        for number, layer in enumerate(self.probe.layers):
            file = self.unfinished.centroids_file(layer)
            if number % ranks.size() == ranks.rank() and not file.exists():
                inputs, _ = self.unfinished.read_inputs(layer)
                clusters, seed = self.settings.num_clusters, self.settings.seed
                _, centroids = balanced_kmeans(inputs, clusters, seed)
                statistics.write_tensors(file, {"centroids": centroids})
        torch.distributed.barrier()
        device = self.grid.platform.device
        return {layer: self._centroids(layer).to(device) for layer in self.probe.layers}

    def _centroids(self, layer: int) -> Tensor:
        return load_file(self.unfinished.centroids_file(layer))["centroids"]

    # --- what is kept between chunks --------------------------------------------------------------

    def _add_sums(self, totals: dict[int, dict[str, Tensor]], chunk: int) -> None:
        """Add a chunk to the sums and save them."""
        for layer, found in self.probe.sums.items():
            sums = {name: found[name].cpu() for name in SUMMED if name in found}
            if layer in totals:
                sums = {name: totals[layer][name] + tensor for name, tensor in sums.items()}
            totals[layer] = sums
            self.unfinished.write_sums(layer, chunk, sums)

    def _write_kept(self, chunk: int) -> None:
        """Save what is kept of single tokens and samples."""
        for layer, found in self.probe.sums.items():
            if INPUTS in found:
                kept = {name: found[name] for name in (INPUTS, INPUT_GROUPS)}
                self.unfinished.write_inputs(layer, chunk, kept)
        if self.probe.last_hidden is not None:
            self.unfinished.write_hidden(chunk, self.probe.last_hidden)

    def _save_progress(self, name: str, chunk: int, loss: list[float]) -> None:
        """Declare a chunk done once every stage has written it."""
        torch.distributed.barrier()
        unfinished = self.unfinished
        unfinished.advance(name, chunk)
        if name == "sums":
            both = zip(unfinished.loss, loss, strict=True)
            unfinished.loss = [before + now for before, now in both]
        if self.grid.is_main:
            unfinished.save_progress()
        torch.distributed.barrier()
        if self.leads_stage and name == "sums":
            unfinished.drop_sums(self.probe.layers, before=chunk)

    # --- the files --------------------------------------------------------------------------------

    def _finish(self, totals: dict[int, dict[str, Tensor]]) -> float:
        for layer, sums in totals.items():
            tokens = sums[probes.TOKENS].round().to(torch.int64)
            result = LayerStatistics(
                tokens=tokens,
                input_mean=statistics.group_means(sums[probes.INPUT_SUM], tokens),
                importance=sums.get(probes.IMPORTANCE),
                gradient=sums.get(probes.GRADIENT),
            )
            if self.settings.num_inputs:
                result.inputs, result.input_groups = self.unfinished.read_inputs(layer)
            if self.settings.groups == "centroids":
                assert result.inputs is not None
                result.centroids = self._centroids(layer)
                result.input_groups = (result.inputs @ result.centroids.t()).argmax(-1)
            statistics.write_layer(self.output, layer, result)
        torch.distributed.barrier()
        loss, counted = self.unfinished.loss
        if self.grid.is_main:
            statistics.write_meta(
                self.output,
                self.settings.model,
                self.groups,
                self.run.model.num_layers,
                tokens=int(counted),
                loss=loss / counted,
                settings=asdict(self.settings),
            )
            self.unfinished.remove()
        torch.distributed.barrier()
        return loss / counted


def _sum_loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the counted tokens' losses [b, s], their number, and both for the log."""
    masked = losses.float() * mask
    both = torch.stack((masked.detach().double().sum(), mask.double().sum()))
    return masked.sum(), mask.sum().int(), {"loss": both}
