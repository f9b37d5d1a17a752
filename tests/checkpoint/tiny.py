"""Tiny random LLaMAs as transformers saves them, and runs of the tool in this process."""

from __future__ import annotations

import importlib.util
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.tensors import FC1, layer_key, tensor_shapes
from megatron_ext.checkpoint.writer import write_weights
from megatron_ext.config import ModelConfig

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def save_llama(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any
) -> Path:
    """A LLaMA with grouped queries and no weight at its default, in several safetensors files."""
    values: dict[str, Any] = dict(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**values | options))
    for name, parameter in model.named_parameters():
        # Norms around 1, matrices wide enough for attention and SiLU to matter.
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.15)
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def tool() -> ModuleType:
    """tools/convert_llama.py as a module."""
    name = "convert_llama"
    if name not in sys.modules:
        path = Path(__file__).resolve().parents[2] / "tools" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def convert(*arguments: Any) -> None:
    """Run the tool as the command line would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert_llama.py", *map(str, arguments)])
        tool().main()


class RandomWeights:
    """Any model of ours with random weights (`tensors.Weights`)."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.dtype = model, dtype
        self.asked: list[str] = []

    def tensor(self, key: str) -> Tensor:
        self.asked.append(key)
        shape = tensor_shapes(self.model)[key]
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        mean = 1.0 if "norm" in key else 0.0
        return (torch.randn(shape, generator=generator) * 0.15 + mean).to(self.dtype)

    def gate_up(self, layer: int) -> tuple[Tensor, Tensor]:
        gate, up = self.tensor(layer_key(layer, FC1)).chunk(2)
        return gate, up


def save_checkpoint(folder: Path, model: ModelConfig, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint directory of `RandomWeights`."""
    folder.mkdir()
    layout.write_model_config(folder, model)
    write_weights(layout.iteration_dir(folder, 0), RandomWeights(model, dtype))
    layout.write_latest(folder, 0)
    return folder


def small_model(**options: Any) -> ModelConfig:
    """The shape of `save_llama` as our configuration."""
    values: dict[str, Any] = dict(
        num_layers=3,
        hidden_size=48,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=101,
        max_position_embeddings=256,
    )
    return ModelConfig(**values | options)
