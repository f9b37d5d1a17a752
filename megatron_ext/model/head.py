"""Output layer and cross-entropy as one step, for CPUs: logits live in one buffer that is used
again.

With a vocabulary of 49152 a micro-batch's logits and their gradients are the largest tensors of a
step; megatron-core makes several of them, each of fresh pages. Here a chunk of tokens is taken from
hidden states to the gradient of its logits while they are in memory, and both gradients are made
from it at once.

Shapes: T tokens of a micro-batch, h hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

CHUNK_ELEMENTS = 2**25
"""Logits in the buffer (128 MiB in fp32): the weight gradient is read and written once per
chunk.
"""

BLOCK_ELEMENTS = 2**19
"""Logits that the softmax works on at a time, so that its passes stay in the cache."""


class LinearCrossEntropy(torch.autograd.Function):
    """loss_t = -log softmax(x_t W^T)[label_t] for tokens with mask 1, and 0 for the others."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, buffer: Tensor
    ) -> Tensor:
        """hidden [T, h], weight [V, h], labels [T], mask [T], buffer [rows, V] -> [T]."""
        trains_weight = ctx.needs_input_grad[1]
        needs_gradient = ctx.needs_input_grad[0] or trains_weight
        losses = hidden.new_empty(hidden.shape[0])
        if needs_gradient:
            grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if trains_weight else None
        for start in range(0, hidden.shape[0], buffer.shape[0]):
            end = min(start + buffer.shape[0], hidden.shape[0])
            logits = buffer[: end - start]
            torch.mm(hidden[start:end], weight.t(), out=logits)
            _losses_and_gradients(logits, labels[start:end], mask[start:end], losses[start:end])
            if needs_gradient:
                torch.mm(logits, weight, out=grad_hidden[start:end])
            if grad_weight is not None:
                grad_weight.addmm_(logits.t(), hidden[start:end])
        if needs_gradient:
            ctx.save_for_backward(weight, mask, grad_hidden, grad_weight)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, mask, grad_hidden, grad_weight = ctx.saved_tensors
        # Gradients were made before this one was known: all trained tokens must weigh the same.
        trained = grads[0][mask > 0]
        scale = trained[0] if trained.numel() else mask.new_zeros(())
        if not torch.equal(trained, scale.expand_as(trained)):
            raise RuntimeError("the trained tokens of a micro-batch have unequal weights")
        if grad_weight is None:
            return grad_hidden * scale, None, None, None, None
        if getattr(weight, "fuses_gradient", False):
            weight.main_grad.add_(grad_weight, alpha=float(scale))
            return grad_hidden * scale, None, None, None, None
        return grad_hidden * scale, grad_weight * scale, None, None, None


def _losses_and_gradients(logits: Tensor, labels: Tensor, mask: Tensor, losses: Tensor) -> None:
    """Losses of a chunk, and its logits replaced by the gradient of their masked sum."""
    rows = max(1, BLOCK_ELEMENTS // logits.shape[1])
    for start in range(0, logits.shape[0], rows):
        block, here = logits[start : start + rows], slice(start, start + rows)
        index, weight = labels[here].unsqueeze(1), mask[here].unsqueeze(1).to(logits.dtype)
        block.sub_(block.amax(1, keepdim=True))
        target = block.gather(1, index)
        total = block.exp_().sum(1, keepdim=True)
        losses[here] = (total.log().sub_(target) * weight).squeeze(1)
        block.mul_(weight / total)
        block.scatter_add_(1, index, -weight)


class LlamaMoeModel(GPTModel):
    """GPTModel whose loss on CPU comes from `LinearCrossEntropy`, where one rank has the
    vocabulary.

    `loss_mask` must be given with the labels, and the loss be summed over its tokens.
    """

    _logits_buffer: Tensor | None = None

    def _preprocess(self, *args: Any, padding_mask: Tensor | None = None, **values: Any) -> Any:
        """megatron-core cuts the padding mask for sequence parallelism on the first stage only."""
        if padding_mask is not None and not self.pre_process and self.config.sequence_parallel:
            group = parallel_state.get_tensor_model_parallel_group()
            padding_mask = padding_mask.chunk(group.size(), 1)[group.rank()]
        return super()._preprocess(*args, padding_mask=padding_mask, **values)

    def _postprocess(self, hidden_states: Tensor, **values: Any) -> Tensor:
        labels, mask = values.get("labels"), values.get("loss_mask")
        fused = (
            self.post_process
            and hidden_states.device.type == "cpu"
            and self.config.tensor_model_parallel_size == 1
        )
        if not fused or labels is None or mask is None:
            return super()._postprocess(hidden_states=hidden_states, **values)
        shared = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if shared else self.output_layer.weight
        s, b, hidden = hidden_states.shape
        rows = min(s * b, max(1, CHUNK_ELEMENTS // weight.shape[0]))
        if self._logits_buffer is None or self._logits_buffer.shape[0] < rows:
            self._logits_buffer = hidden_states.new_empty(rows, weight.shape[0])
        losses = LinearCrossEntropy.apply(
            hidden_states.reshape(s * b, hidden),
            weight,
            labels.t().reshape(-1),
            mask.t().reshape(-1),
            self._logits_buffer,
        )
        return losses.view(s, b).t()
