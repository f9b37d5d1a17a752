"""The router of LLaMA-MoE on megatron-core's TopKRouter: top-k, then softmax over the chosen
logits.

Adds the Tanh-MLP gate, learned gate noise, the CV^2 balance loss, the score scale, and a count of
loads. Shapes: s positions of this rank, b sequences, T = s * b tokens, E experts.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, z_loss_func
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_ext.model.context import context_share
from megatron_ext.model.xft import xft_weights
from megatron_ext.random_keys import mixed_seed

NOISE_EPSILON = 0.01
"""Smallest standard deviation of the gate noise (LLaMA-MoE's gate_noise_epsilon)."""


def cv_squared(values: Tensor) -> Tensor:
    """Squared coefficient of variation: unbiased variance / (mean^2 + 1e-10) of [E]; 0 for one
    expert.
    """
    if values.numel() == 1:
        return values.new_zeros(())
    return values.var() / (values.mean() ** 2 + 1e-10)


def noisy_load(clean: Tensor, noisy: Tensor, sigma: Tensor, topk: int) -> Tensor:
    """Probability that each expert would be among the top k if its noise alone were drawn again.

    P = Phi((clean - threshold) / sigma), where the threshold is the (k+1)-th noisy logit for an
    expert that is among the top k and the k-th for one that is not (Shazeer et al. 2017, eq. 9).
    The reference code of LLaMA-MoE tests the noise term alone against the threshold, which puts
    experts on the wrong side; here the noisy logit is tested.

    Args:
        clean, noisy, sigma: [T, E], with topk < E.

    Returns:
        [T, E], differentiable in `clean` and `sigma`.
    """
    top = noisy.topk(topk + 1, dim=-1).values
    next_best, kth = top[:, topk : topk + 1], top[:, topk - 1 : topk]
    threshold = torch.where(noisy > next_best, next_best, kth)
    return torch.distributions.Normal(0.0, 1.0, validate_args=False).cdf(
        (clean - threshold) / sigma
    )


class LlamaMoeRouter(TopKRouter):
    """Router of one MoE layer."""

    def __init__(self, config: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        super().__init__(config=config, pg_collection=pg_collection, **kwargs)
        experts, hidden = config.num_moe_experts, config.hidden_size
        self.ledger: Any = None
        """Where loads are counted (`mixing.ledger.LoadLedger`), set by the trainer."""
        self.shared_weight: Tensor | None = None
        """[T] of the last forward pass: what XFT's shared expert weighs, taken by its layer."""
        self.aux_loss_sum: Tensor | None = None
        """Balance loss summed over the micro-batches of a step, for the log."""
        self.noise_seed = 0
        """Key of the micro-batch that runs now, set by the trainer."""
        self.trained_tokens: float | None = None
        """Tokens of that micro-batch that are trained, set by the trainer; None: all of them."""
        self.given: Any = None
        """Routing of that micro-batch, where it is not for this router to choose
        (`one_hot.OneHotRouting`).
        """
        self._trained_tokens: float | None = None
        self._to_repeat: deque[tuple[int, float | None, Any]] = deque()
        if config.moe_gate == "mlp":
            self.gate_out = self._new_parameter(experts, experts)
            if config.perform_initialization:
                config.init_method(self.gate_out)
        if config.moe_gate_noise:
            # Zero, as LLaMA-MoE: the noise starts with sigma = softplus(0) + 0.01 = 0.703.
            self.noise_weight = self._new_parameter(experts, hidden)

    def _new_parameter(self, *shape: int) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(
            torch.zeros(*shape, dtype=self.config.params_dtype, device=self.weight.device)
        )
        parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        return parameter

    @property
    def _dtype(self) -> torch.dtype | None:
        return {"fp32": torch.float32, "fp64": torch.float64}.get(self.config.moe_router_dtype)

    def gating(self, input: Tensor) -> Tensor:
        """[s, b, h] -> logits [s, b, E] (megatron-core 0.16's own needs TransformerEngine)."""
        dtype = self._dtype or input.dtype
        logits = torch.nn.functional.linear(input.to(dtype), self.weight.to(dtype))
        if self.config.moe_gate == "mlp":
            logits = torch.nn.functional.linear(torch.tanh(logits), self.gate_out.to(dtype))
        return logits

    def forward(
        self, input: Tensor, padding_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """[s, b, h] -> (weights [T, E], zero where not chosen; chosen [T, E] bool).

        Args:
            input: hidden states. padding_mask: bool [s, b], True where padding (megatron-core's
                convention, against its doc string).
        """
        self._maintain_float32_expert_bias()
        noise_seed, self._trained_tokens, given = self._recall()
        if given is not None:
            weights, routing_map = given(self, input)
            return weights, routing_map
        clean = self.gating(input)
        noisy, sigma = clean, None
        if self.config.moe_gate_noise and self.training:
            sigma = (
                torch.nn.functional.softplus(
                    torch.nn.functional.linear(
                        input.to(clean.dtype), self.noise_weight.to(clean.dtype)
                    )
                )
                + NOISE_EPSILON
            )
            noisy = clean + self._noise(clean, noise_seed) * sigma
        probs, routing_map = self.routing(noisy, padding_mask=padding_mask)
        if self.config.moe_xft_routing:
            logits = noisy.reshape(-1, noisy.shape[-1])
            routed, self.shared_weight = xft_weights(logits, routing_map)
            # megatron-core's losses hang on its own weights, which have to stay in the graph.
            probs = routed.to(probs.dtype) + 0 * probs
        if self.config.moe_balance_loss == "cv2" and self.training and torch.is_grad_enabled():
            probs = self._attach_cv2(probs, routing_map, clean, noisy, sigma, padding_mask)
        if self.ledger is not None:
            self.ledger.record(
                self.layer_number - 1, probs.detach(), routing_map, input.shape[1], padding_mask
            )
        scale = self.config.score_scale(self.layer_number - 1)
        return (probs if scale == 1.0 else probs * scale), routing_map

    def _recall(self) -> tuple[int, float | None, Any]:
        """What the trainer has set, of the micro-batch that this pass belongs to.

        A pass that recomputes activations comes when the trainer has gone on to other
        micro-batches: it takes what its first pass found. Pipeline schedules bring them back in the
        order they came.
        """
        state = (self.noise_seed, self.trained_tokens, self.given)
        if is_checkpointing():
            if torch.is_grad_enabled():
                return self._to_repeat.popleft()
            self._to_repeat.append(state)
        return state

    def _noise(self, logits: Tensor, seed: int) -> Tensor:
        """Standard normal noise [s, b, E] that depends on the micro-batch and the layer, not on the
        grid.

        The noise of the whole sequence is drawn and this rank's positions are cut out of it.
        """
        generator = torch.Generator(device=logits.device)
        generator.manual_seed(mixed_seed(seed, self.layer_number))
        s, b, experts = logits.shape
        noise = torch.randn(
            s * self._shards,
            b,
            experts,
            dtype=torch.float32,
            device=logits.device,
            generator=generator,
        )
        noise = context_share(noise, 0, self.cp_group)
        if self.config.sequence_parallel:
            noise = noise.chunk(self.tp_group.size())[self.tp_group.rank()]
        return noise.to(logits.dtype)

    def _attach_cv2(
        self,
        probs: Tensor,
        routing_map: Tensor,
        clean: Tensor,
        noisy: Tensor,
        sigma: Tensor | None,
        padding_mask: Tensor | None,
    ) -> Tensor:
        """coeff * (CV^2(importance) + CV^2(load)) of the micro-batch (LLaMA-MoE; Shazeer et al.
        2017).

        Sums run over the whole micro-batch: the tensor x context parallel ranks that share its
        tokens are reduced over, so that the grid does not change the loss.
        """
        experts = self.config.num_moe_experts
        importance = probs.float()
        if sigma is not None and self.topk < experts:
            load = noisy_load(
                clean.reshape(-1, experts).float(),
                noisy.reshape(-1, experts).float(),
                sigma.reshape(-1, experts).float(),
                self.topk,
            )
        else:
            load = routing_map.float()  # hard counts: no gradient, as in the reference
        if padding_mask is not None:
            valid = (~padding_mask).reshape(-1, 1)
            importance, load = importance * valid, load * valid
        sums = torch.stack((importance.sum(0), load.sum(0)))
        if self.tp_cp_group.size() > 1:
            sums = reduce_from_tensor_model_parallel_region(sums, self.tp_cp_group)
        loss = self.config.moe_cv2_coeff * (cv_squared(sums[0]) + cv_squared(sums[1]))
        # All ranks of the group hold the same loss of the same tokens, and reduction passes the
        # gradient through unsummed: unlike megatron-core's losses, this one is not a sum of the
        # ranks' shares.
        self._log(loss / self.config.moe_cv2_coeff)
        return MoEAuxLossAutoScaler.apply(probs, loss * self._tokens(probs))

    def _tokens(self, activation: Tensor) -> float:
        """Trained tokens of the whole micro-batch: gradients are later divided by those of the
        step.
        """
        if self._trained_tokens is not None:
            return self._trained_tokens
        return activation.shape[0] * self._shards

    @property
    def _shards(self) -> int:
        """Ranks that share the positions of a sequence."""
        return self.tp_cp_group.size() if self.config.sequence_parallel else self.cp_group.size()

    def _log(self, loss: Tensor) -> None:
        loss = loss.detach().float()
        self.aux_loss_sum = loss if self.aux_loss_sum is None else self.aux_loss_sum + loss

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attach one of megatron-core's balance losses with a weight that does not depend on the
        grid.

        Gradients are divided by all tokens of the step. 0.16 scales the loss by the tokens of one
        tensor-parallel rank instead (a TP 2 run drifts away from a TP 1 run; mended in 0.19) and
        the sequence loss by those of one sequence; both versions divide the global loss by the
        data-parallel size twice.
        """
        # A rank's share of the loss: its probabilities against the counts of all.
        total = aux_loss.detach().clone()
        if reduce_group.size() > 1:
            torch.distributed.all_reduce(total, group=reduce_group)
        self._log(total / aux_loss_coeff)
        data_parallel = (
            reduce_group.size() // self.tp_cp_group.size()
        )  # > 1 for the global loss only
        return MoEAuxLossAutoScaler.apply(
            activation, aux_loss * self._tokens(activation) * data_parallel
        )

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """ST-MoE's z-loss, mean over the tokens of the micro-batch on any grid."""
        if self.config.moe_z_loss_coeff is None or not (self.training and torch.is_grad_enabled()):
            return logits
        coeff = self.config.moe_z_loss_coeff / self._shards
        loss = z_loss_func(logits, coeff, padding_mask=padding_mask)
        return MoEAuxLossAutoScaler.apply(logits, loss * self._tokens(logits))

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count loads for the aux-free bias (megatron-core's own breaks on a padding mask)."""
        if self.enable_expert_bias and torch.is_grad_enabled():
            with torch.no_grad():
                if padding_mask is not None:
                    routing_map = routing_map & (~padding_mask).reshape(-1, 1)
                self.local_tokens_per_expert += routing_map.sum(dim=0)
