"""The loop of a run: steps, evaluations, checkpoints, log lines."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ext.checkpoint import layout, run_state
from megatron_ext.checkpoint.background import BackgroundSaves
from megatron_ext.checkpoint.tensors import count_parameters
from megatron_ext.config import RunConfig
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.errors import UserError
from megatron_ext.mixing.controller import Update
from megatron_ext.training import held_out
from megatron_ext.training.data import TrainingData
from megatron_ext.training.flops import flops_per_token, peak_tflops
from megatron_ext.training.freeze import zero_gate_projections
from megatron_ext.training.generate import answer_held_out
from megatron_ext.training.grid import Grid
from megatron_ext.training.metrics import Metrics
from megatron_ext.training.optimizer import build_optimizer, build_training_model
from megatron_ext.training.passes import Passes, Sums
from megatron_ext.training.signals import StopRequest

logger = logging.getLogger(__name__)


@dataclass
class StepResult:
    """What one optimizer step did, the same on every rank."""

    loss: float
    """Mean loss of the trained tokens (nats)."""
    domain_loss: dict[str, float]
    """The same per data set that had tokens in this step."""
    tokens: int
    """Trained tokens."""
    positions: int
    """Tokens that went through the model: trained ones, prompts and padding."""
    aux_loss: float
    """Balance loss, mean over MoE layers and micro-batches, before its coefficient."""
    load_spread: float
    """Largest load of an expert over the mean, mean over MoE layers (1 is even)."""
    dead_experts: int
    """Experts of all MoE layers that no token reached."""
    grad_norm: float
    lr: float
    seconds: float
    update: Update | None
    """New blend weights, where this step brought them."""


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
        self.passes = Passes(run, grid, self.model, len(data.names))
        self._losses: tuple[int, dict[str, float]] = (-1, {})
        self._saved_at = -1
        self._background = BackgroundSaves() if run.checkpoint.async_save else None
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
        self._saved_at = self.iteration if source == checkpoint.save and self.iteration else -1
        if "loader" in state:
            self.data.loader.load_state_dict(state["loader"])
        if "mixing" in state:
            self.data.mixing.load_state_dict(state["mixing"])
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
            "mixing": self.data.mixing.state_dict(),
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
            self._background,
        )
        self._saved_at = self.iteration
        if metrics is not None:
            metrics.write_weights(self.data.names, self.data.plan.weights_log)
            verb = "saved" if self._background is None else "copied, and writing"
            metrics.say(f"{verb} {path} in {time.perf_counter() - start:.1f} s")

    def wait_for_save(self) -> None:
        """Until the last checkpoint is whole, where saves are in the background (collective)."""
        if self._background is not None:
            self._background.wait()
            torch.distributed.barrier()

    def _save_once(self, metrics: Metrics) -> None:
        if self._saved_at != self.iteration:
            self.save(metrics)

    def _save_if_best(self, metrics: Metrics, loss: float) -> None:
        """Keep the checkpoint of this step where no earlier one had a lower held-out loss."""
        directory = self.run.checkpoint.save
        if not (self.run.checkpoint.keep_best and directory and self.iteration):
            return
        best = layout.read_best(directory)
        if best is not None and best[1] <= loss and best[0] != self.iteration:
            return
        self._save_once(metrics)
        self.wait_for_save()
        if self.grid.is_main:
            layout.write_best(directory, self.iteration, loss)
        torch.distributed.barrier()

    # --- steps ------------------------------------------------------------------------------------

    def train_step(self) -> StepResult:
        """Draw a global batch, run it forwards and backwards, update the weights (collective).

        Raises:
            UserError: the loss is not finite; weights are as before the step.
        """
        start = time.perf_counter()
        batch_size = self._batch_size()
        batches = self.data.loader.next(batch_size)
        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.passes.forward_step.step = self.iteration
        sums = self.passes(batches, forward_only=False)
        loss = float(sums.loss[0].sum() / sums.loss[1].sum())
        if not math.isfinite(loss):
            raise UserError(
                f"loss is {loss} in step {self.iteration + 1}",
                "lower lr, raise lr_warmup_iters, or look for broken data; "
                "the last checkpoint is whole",
            )
        if self.run.training.freeze == "reference":
            zero_gate_projections(self.model)
        lr = self.optimizer.param_groups[0]["lr"]
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(1)
        self.iteration += 1
        spread, dead = self._spread(sums.counts)
        return StepResult(
            loss=loss,
            domain_loss=sums.loss_by_name(self.data.names),
            tokens=int(sums.loss[1].sum()),
            positions=batch_size * self.run.data.seq_length,
            aux_loss=sums.aux_loss,
            load_spread=spread,
            dead_experts=dead,
            grad_norm=float(grad_norm or 0.0),
            lr=lr,
            seconds=time.perf_counter() - start,
            update=self._mix(sums),
        )

    def evaluate(self) -> dict[str, float]:
        """Mean loss of each domain's held-out samples, in evaluation mode (collective)."""
        step, losses = self._losses
        if step != self.iteration or losses.keys() != self.data.valid.keys():
            losses = held_out.evaluate(self.passes, self.data)
            self._losses = (self.iteration, losses)
        return losses

    def _mix(self, sums: Sums) -> Update | None:
        """Have the blend's weights decided on, every `mixing.interval` steps (collective)."""
        mixing = self.data.mixing
        loads = (sums.counts, sums.mass)
        counts, mass = (None if part is None else part.numpy() for part in loads)
        mixing.observe(self.iteration - 1, sums.loss.numpy(), counts, mass)
        if not mixing.is_due(self.iteration):
            return None
        probed = held_out.probe(self.passes, self.data) if mixing.needs_probe else None
        losses = self.evaluate() if mixing.needs_losses else None
        return mixing.update(self.iteration, probed, losses)

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
        try:
            if training.eval_at_start and self.iteration == 0:
                self._report_evaluation(metrics)
            while self.iteration < training.train_iters:
                result = self.train_step()
                if self.iteration % run.logging.log_interval == 0:
                    self._report_step(metrics, result, peak)
                if result.update is not None:
                    self._report_update(metrics, result.update)
                metrics.advance()
                if training.eval_interval and self.iteration % training.eval_interval == 0:
                    self._report_evaluation(metrics)
                if run.checkpoint.save_interval and (
                    self.iteration % run.checkpoint.save_interval == 0
                ):
                    self._save_once(metrics)
                reason = stop.agreed()
                if reason:
                    metrics.say(f"{reason}: stopping after step {self.iteration}")
                    break
            else:
                if not training.eval_interval or self.iteration % training.eval_interval:
                    self._report_evaluation(metrics)
            self._save_once(metrics)
            self.wait_for_save()
        finally:
            stop.restore()
            metrics.close()
            self.data.loader.close()
        return reason

    def _report_step(self, metrics: Metrics, result: StepResult, peak: float) -> None:
        run = self.run
        rate = result.tokens / result.seconds
        flops = result.positions * flops_per_token(run.model, run.data.seq_length)
        tflops = flops / result.seconds / 1e12 / self.grid.world_size
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

    def _report_update(self, metrics: Metrics, update: Update) -> None:
        metrics.log_update(update)
        moved = ", ".join(
            f"{name} {update.before[name]:.3f} -> {weight:.3f}"
            for name, weight in update.after.items()
        )
        metrics.say(f"blend weights from step {update.effective + 1} on: {moved}")

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
        if self.run.logging.generate_tokens:
            self._report_answers(metrics)
        self._save_if_best(metrics, values["loss"])

    def _report_answers(self, metrics: Metrics) -> None:
        answers = answer_held_out(self.passes, self.data)
        folder = self.run.checkpoint.save or self.run.checkpoint.load
        if not (self.grid.is_main and folder):
            return
        tokenizer = load_tokenizer(Path(folder) / layout.TOKENIZER_DIR)
        texts = {
            name: (tokenizer.decode(prompt), tokenizer.decode(answer))
            for name, (prompt, answer) in answers.items()
        }
        metrics.log_answers(self.iteration, texts)
        for name, (_, answer) in texts.items():
            metrics.say(f"{name}: {answer.strip()[:200]!r}")


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
