"""What conversions to LoRA experts are told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_ext.commands.common import Conversion
from megatron_ext.errors import UserError
from megatron_ext.model_config import LoraTarget, ModelConfig

if TYPE_CHECKING:
    from megatron_ext.checkpoint.tensors import Weights

_PLAIN = ModelConfig()


@dataclass(kw_only=True)
class LoraConversion(Conversion):
    """A conversion that can make its experts adapters over one FFN."""

    lora_rank: int | None = None
    """Rank r of LoRA experts: adapters over the dense FFN, which a layer's experts share; none:
    each expert is an FFN of its own.
    """
    lora_alpha: float = _PLAIN.lora_alpha
    """Adapters count alpha / r."""
    lora_targets: list[LoraTarget] = dataclasses.field(
        default_factory=lambda: list(_PLAIN.lora_targets)
    )
    """Matrices of the FFN that get adapters: gate, up, down."""

    def as_lora(self, base: Weights, experts: Weights, seed: int) -> Weights:
        """Experts of full width as adapters over a dense model's FFNs, where a rank is given.

        Raises:
            UserError: a rank or other option that cannot be.
        """
        from megatron_ext.checkpoint.lora import LoraWeights

        if self.lora_rank is not None:
            rank, alpha, targets = self.lora_rank, self.lora_alpha, self.lora_targets
            return LoraWeights(base, experts, rank, alpha, targets, seed)
        for name in ("lora_alpha", "lora_targets"):
            if getattr(self, name) != getattr(_PLAIN, name):
                raise UserError(f"{name} has no meaning without lora_rank", "set lora_rank")
        return experts

    def lora_options(self) -> dict[str, Any]:
        """What construction.json says of them."""
        if self.lora_rank is None:
            return {}
        return {name: getattr(self, name) for name in ("lora_rank", "lora_alpha", "lora_targets")}
