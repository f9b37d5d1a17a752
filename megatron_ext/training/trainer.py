"""The loop of a run: steps, evaluations, checkpoints, log lines."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ext.checkpoint import layout, run_state
from megatron_ext.checkpoint.tensors import count_parameters
from megatron_ext.config import RunConfig
from megatron_ext.data.loader import validation_batches
from megatron_ext.errors import UserError
from megatron_ext.mixing.ledger import LoadLedger
from megatron_ext.model.builder import routers
from megatron_ext.training.data import TrainingData
from megatron_ext.training.flops import flops_per_token, peak_tflops
from megatron_ext.training.grid import Grid
from megatron_ext.training.metrics import Metrics
from megatron_ext.training.optimizer import build_optimizer, build_training_model
from megatron_ext.training.signals import StopRequest
from megatron_ext.training.step import ForwardStep, MicroBatch

logger = logging.getLogger(__name__)


@dataclass
class StepResult:
    """What one optimizer step did, the same on every rank."""

    loss: float
    """Mean loss of the trained tokens (nats)."""
    domain_loss: dict[str, float]
    """The same per data set that had tokens in this step."""
    tokens: int
    aux_loss: float
    """Balance loss, mean over MoE layers and micro-batches, before its coefficient."""
    load_spread: float
    """Largest load of an expert over the mean, mean over MoE layers (1 is even)."""
    dead_experts: int
    """Experts of all MoE layers that no token reached."""
    grad_norm: float
    lr: float
    seconds: float


class Trainer:
    """A run on this rank.

    Args:
        run: the recipe, validated.
        grid: from `grid.initialize`.
        data: from `data.open_data`.
    """

    def __init__(self, run: RunConfig, grid: Grid, data: TrainingData) -> None:
        self.run, self.grid, self.data = run, grid, data
        self.model = build_training_model(run, grid.platform)
        self.optimizer, self.scheduler = build_optimizer(run, grid.platform, self.model)
        self.iteration = 0
        self.ledger: LoadLedger | None = None
        if run.model.is_moe:
            assert run.model.num_experts is not None
            self.ledger = LoadLedger(
                len(data.names), run.model.num_layers, run.model.num_experts, grid.platform.device
            )
        self.routers = [router for chunk in self.model for router in routers(chunk)]
        for router in self.routers:
            router.ledger = self.ledger
        self.forward_step = ForwardStep(
            self.ledger,
            len(data.names),
            grid.platform.device,
            run.training.seed,
            self.routers,
        )
        self._schedule = get_forward_backward_func()
        self._wandb_id: str | None = None
        total, active = count_parameters(run.model)
        logger.info("model: %.1f M parameters, %.1f M activated", total / 1e6, active / 1e6)

    # --- checkpoints ------------------------------------------------------------------------------

    def load(self) -> None:
        """Resume the run in `save`, or start from `load`."""
        checkpoint = self.run.checkpoint
        if checkpoint.save and layout.latest_iteration(checkpoint.save) is not None:
            source, finetune = checkpoint.save, False
        elif checkpoint.load:
            source, finetune = checkpoint.load, checkpoint.finetune
        else:
            logger.info("weights: random, seed %d", self.run.training.seed)
            return
        state = run_state.load_run(
            source,
            self.model,
            None if finetune else self.optimizer,
            None if finetune else self.scheduler,
        )
        if finetune:
            self.optimizer.reload_model_params()
        self.iteration = state["iteration"]
        if "loader" in state:
            self.data.loader.load_state_dict(state["loader"])
        self._wandb_id = state.get("wandb_id")
        logger.info("weights: %s, iteration %d", source, self.iteration)

    def save(self, metrics: Metrics | None = None) -> None:
        """Write a checkpoint of the current iteration (collective)."""
        save = self.run.checkpoint.save
        if not save:
            return
        start = time.perf_counter()
        state = {
            "loader": self.data.loader.state_dict(),
            "global_batch_size": self.run.training.global_batch_size,
            "wandb_id": metrics.run_id if metrics else None,
        }
        path = run_state.save_run(
            save,
            self.iteration,
            self.model,
            self.optimizer,
            self.scheduler,
            state,
            self.run.checkpoint.keep_latest,
        )
        if metrics is not None:
            metrics.say(f"saved {path} in {time.perf_counter() - start:.1f} s")

    # --- steps ------------------------------------------------------------------------------------

    def train_step(self) -> StepResult:
        """Draw a global batch, run it forwards and backwards, update the weights (collective).

        Raises:
            UserError: the loss is not finite; weights are as before the step.
        """
        start = time.perf_counter()
        batches = self.data.loader.next(self._batch_size())
        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.forward_step.step = self.iteration
        losses = self._run(batches, forward_only=False)
        sums, aux, counts = self._reduce(losses, len(batches))
        loss = float(sums[0].sum() / sums[1].sum())
        if not math.isfinite(loss):
            raise UserError(
                f"loss is {loss} in step {self.iteration + 1}",
                "lower lr, raise lr_warmup_iters, or look for broken data; "
                "the last checkpoint is whole",
            )
        lr = self.optimizer.param_groups[0]["lr"]
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(1)
        self.iteration += 1
        spread, dead = self._spread(counts)
        return StepResult(
            loss=loss,
            domain_loss=self._per_domain(sums),
            tokens=int(sums[1].sum()),
            aux_loss=aux,
            load_spread=spread,
            dead_experts=dead,
            grad_norm=float(grad_norm or 0.0),
            lr=lr,
            seconds=time.perf_counter() - start,
        )

    def evaluate(self) -> dict[str, float]:
        """Mean loss of each domain's held-out samples, in evaluation mode (collective)."""
        for chunk in self.model:
            chunk.eval()
        ledger_domains, self.forward_step.ledger = self.forward_step.ledger, None
        if self.ledger is not None:
            self.ledger.domains = None
        results = {}
        training = self.run.training
        try:
            for name, stream in self.data.valid.items():
                batches = list(
                    validation_batches(
                        stream,
                        min(self.run.data.eval_samples, stream.num_samples),
                        training.micro_batch_size,
                        self.grid.data_rank,
                        self.grid.data_size,
                        domain=self.data.names.index(name),
                    )
                )
                with torch.no_grad():
                    losses = self._run(batches, forward_only=True)
                sums, _, _ = self._reduce(losses, len(batches))
                results[name] = float(sums[0].sum() / sums[1].sum())
        finally:
            self.forward_step.ledger = ledger_domains
            for chunk in self.model:
                chunk.train()
        return results

    def _batch_size(self) -> int:
        """Global batch of the next step, by the ramp-up where there is one."""
        training = self.run.training
        if training.rampup_batch_size is None:
            return training.global_batch_size
        start, increment, samples = training.rampup_batch_size
        stages = (training.global_batch_size - start) // increment
        consumed = int(self.data.plan.drawn.sum())
        if stages < 1 or consumed >= samples:
            return training.global_batch_size
        return start + int(consumed / (samples / stages)) * increment

    def _run(self, batches: list[MicroBatch], forward_only: bool) -> list[dict[str, Any]]:
        """All micro-batches of this rank through megatron-core's pipeline schedule."""
        ranks, rank = self.grid.data_size, self.grid.data_rank
        numbered = [(number * ranks + rank, batch) for number, batch in enumerate(batches)]
        iterators = [cycle(numbered) for _ in self.model]
        losses: list[dict[str, Any]] = self._schedule(
            forward_step_func=self.forward_step,
            data_iterator=iterators if len(self.model) > 1 else iterators[0],
            model=self.model if len(self.model) > 1 else self.model[0],
            num_microbatches=len(batches),
            seq_length=self.run.data.seq_length,
            micro_batch_size=self.run.training.micro_batch_size,
            decoder_seq_length=self.run.data.seq_length,
            forward_only=forward_only,
        )
        return losses

    def _reduce(
        self, losses: list[dict[str, Any]], micro_batches: int
    ) -> tuple[torch.Tensor, float, torch.Tensor | None]:
        """Sums over the world: (loss and tokens per domain [2, D], balance loss, loads [D, L,
        E]).
        """
        domains, layers = len(self.data.names), self.run.model.num_layers
        device = self.grid.platform.device
        flat = torch.zeros(2 * domains + layers, dtype=torch.float64, device=device)
        if self.grid.is_last_stage and self.grid.tensor_rank == 0:
            for micro in losses:
                flat[: 2 * domains] += micro["domains"].reshape(-1)
        for router in self.routers:
            if router.aux_loss_sum is not None:
                if self.grid.counts_data:
                    flat[2 * domains + router.layer_number - 1] = router.aux_loss_sum.double()
                router.aux_loss_sum = None
        counts = self.ledger.take()[0] if self.ledger is not None else None
        if self.grid.world_size > 1:
            torch.distributed.all_reduce(flat)
            if counts is not None:
                torch.distributed.all_reduce(counts)
        aux = flat[2 * domains :] / (micro_batches * self.grid.data_size)
        moe_layers = max(len(self.run.model.moe_layers), 1)
        return flat[: 2 * domains].view(2, domains).cpu(), float(aux.sum()) / moe_layers, counts

    def _per_domain(self, sums: torch.Tensor) -> dict[str, float]:
        return {
            name: float(loss / tokens)
            for name, loss, tokens in zip(self.data.names, sums[0], sums[1], strict=True)
            if tokens > 0
        }

    def _spread(self, counts: torch.Tensor | None) -> tuple[float, int]:
        if counts is None:
            return 1.0, 0
        loads = counts.sum(0)[self.run.model.moe_layers].double()
        spread = loads.max(1).values / loads.mean(1).clamp(min=1e-9)
        return float(spread.mean()), int((loads == 0).sum())

    # --- the run ----------------------------------------------------------------------------------

    def fit(self) -> str | None:
        """Train to `train_iters`; save at intervals, at the end and on a signal.

        Returns:
            Why it stopped early, or None.
        """
        run, training = self.run, self.run.training
        metrics = Metrics(run, self.grid.is_main, self.iteration, self._wandb_id)
        stop = StopRequest(self.grid.platform.device, training.exit_duration_minutes)
        peak, peak_name = (
            (run.logging.peak_tflops, "given")
            if run.logging.peak_tflops
            else peak_tflops(self.grid.platform.device)
        )
        metrics.say(f"MFU is against {peak:.3f} TFLOP/s per rank ({peak_name})")
        reason = None
        saved_at = self.iteration if self.iteration else -1
        try:
            if training.eval_at_start and self.iteration == 0:
                self._report_evaluation(metrics)
            while self.iteration < training.train_iters:
                result = self.train_step()
                if self.iteration % run.logging.log_interval == 0:
                    self._report_step(metrics, result, peak)
                metrics.advance()
                if training.eval_interval and self.iteration % training.eval_interval == 0:
                    self._report_evaluation(metrics)
                if run.checkpoint.save_interval and (
                    self.iteration % run.checkpoint.save_interval == 0
                ):
                    self.save(metrics)
                    saved_at = self.iteration
                reason = stop.agreed()
                if reason:
                    metrics.say(f"{reason}: stopping after step {self.iteration}")
                    break
            else:
                if not training.eval_interval or self.iteration % training.eval_interval:
                    self._report_evaluation(metrics)
            if saved_at != self.iteration:
                self.save(metrics)
        finally:
            stop.restore()
            metrics.close()
            self.data.loader.close()
        return reason

    def _report_step(self, metrics: Metrics, result: StepResult, peak: float) -> None:
        run = self.run
        rate = result.tokens / result.seconds
        tflops = (
            rate * flops_per_token(run.model, run.data.seq_length) / 1e12 / self.grid.world_size
        )
        values = {
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens": result.tokens,
            "tokens_per_second": rate,
            "tflops_per_rank": tflops,
            "mfu": tflops / peak,
            "aux_loss": result.aux_loss,
            "load_spread": result.load_spread,
            "dead_experts": result.dead_experts,
            "seconds": result.seconds,
            **{f"loss/{name}": loss for name, loss in result.domain_loss.items()},
            **{
                f"epochs/{name}": epochs
                for name, epochs in zip(self.data.names, self.data.plan.epochs_used(), strict=True)
            },
        }
        metrics.log("train", self.iteration, values)
        width = len(str(run.training.train_iters))
        line = (
            f"step {self.iteration:>{width}}/{run.training.train_iters} | loss {result.loss:.4f} | "
            f"lr {result.lr:.2e} | grad norm {result.grad_norm:.2f} | {rate:,.0f} tok/s | "
            f"{tflops:.3g} TFLOP/s | MFU {100 * tflops / peak:.0f} %"
        )
        if run.model.is_moe:
            line += f" | balance {result.aux_loss:.3f} | load max/mean {result.load_spread:.2f}"
        metrics.say(line)

    def _report_evaluation(self, metrics: Metrics) -> None:
        if not self.data.valid:
            return
        losses = self.evaluate()
        values = {f"loss/{name}": loss for name, loss in losses.items()}
        values |= {f"perplexity/{name}": math.exp(min(loss, 50)) for name, loss in losses.items()}
        values["loss"] = sum(losses.values()) / len(losses)
        metrics.log("valid", self.iteration, values)
        shown = ", ".join(f"{name} {math.exp(min(loss, 50)):.2f}" for name, loss in losses.items())
        metrics.say(f"held-out perplexity at step {self.iteration}: {shown}")


def write_recipe(run: RunConfig, directory: str | None, is_main: bool) -> None:
    """Leave the recipe, the model's shape and the source's tokenizer beside the checkpoints."""
    if not directory or not is_main:
        return
    import yaml

    from megatron_ext.recipe import to_dict

    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    if run.checkpoint.load:
        layout.copy_companions(run.checkpoint.load, root)
    layout.write_model_config(root, run.model)
    (root / "recipe.yaml").write_text(yaml.safe_dump(to_dict(run), sort_keys=False))
