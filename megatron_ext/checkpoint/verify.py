"""Is a converted checkpoint the model that it came from? Logits compared in fp32 on the CPU."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.checkpoint.experts import recorded_neurons
from megatron_ext.checkpoint.layout import PathLike, read_construction
from megatron_ext.checkpoint.reader import CheckpointWeights
from megatron_ext.checkpoint.tensors import (
    EXPERTS_FC1,
    EXPERTS_FC2,
    FC2,
    SHARED_FC1,
    SHARED_FC2,
    Weights,
    layer_key,
    tensor_shapes,
)
from megatron_ext.config import ModelConfig, RunConfig, TrainingConfig
from megatron_ext.construction.partition import NeuronMap
from megatron_ext.errors import UserError

PARITY = 1e-4
"""Largest difference of logits to another implementation, over the largest logit."""
EXACT = 1e-5
"""The same between our own models."""
PROMPT_TOKENS = 24


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def prompt(model: ModelConfig, tokens: int = PROMPT_TOKENS, sequences: int = 2) -> Tensor:
    """Random token numbers [sequences, tokens], the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.vocab_size, (sequences, tokens), generator=generator)


def build_model(model: ModelConfig) -> Any:
    """A megatron-core model of one process in fp32 on the CPU, with weights to be filled in."""
    from megatron_ext import platform as platforms

    platform = platforms.setup("cpu")
    platforms.init_process_group(platform)
    from megatron.core import parallel_state, tensor_parallel

    from megatron_ext.model import builder

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    run = RunConfig(model=model, training=TrainingConfig(precision="fp32"))
    config = builder.transformer_config(run, platform)
    config.perform_initialization = False
    return builder.build_model(run, platform, config).eval()


def sharded_weights(model: Any) -> dict[str, Any]:
    """The model's sharded_state_dict without megatron-core's empty extra states."""
    metadata = {"non_homogeneous_layers": True}
    state = model.sharded_state_dict(metadata=metadata)
    return {name: item for name, item in state.items() if not name.endswith("_extra_state")}


def fill(model: Any, weights: Weights) -> Any:
    """Set a one-process model's parameters from weights in our layout."""
    parameters = dict(model.named_parameters())
    filled = set()
    with torch.no_grad():
        for name, item in sharded_weights(model).items():
            parameters[name].copy_(weights.tensor(item.key))
            filled.add(name)
    assert filled == parameters.keys(), parameters.keys() ^ filled
    return model


def load(model: Any, folder: Path) -> Any:
    """Set a one-process model's parameters through megatron-core's own loader."""
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load(sharded_weights(model), str(folder))
    missing, unexpected = model.load_state_dict(
        {name: value for name, value in state.items() if torch.is_tensor(value)}, strict=False
    )
    missing = [name for name in missing if not name.endswith("_extra_state")]
    assert not missing and not unexpected, (missing, unexpected)
    return model


def logits(model: Any, tokens: Tensor) -> Tensor:
    """[b, s] -> [b, s, vocabulary] of a megatron-core model."""
    positions = torch.arange(tokens.shape[1])[None].expand_as(tokens)
    with torch.no_grad():
        result: Tensor = model(tokens, positions, None)
    return result.float()


def hf_logits(model: Any, tokens: Tensor) -> Tensor:
    """The same of a transformers model."""
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=tokens, use_cache=False).logits
    return result.float()


def hf_model(path: PathLike, dtype: torch.dtype) -> Any:
    """A transformers model whose weights are rounded to `dtype`, in fp32."""
    from transformers import AutoModelForCausalLM

    path = Path(path)
    where = {"pretrained_model_name_or_path": str(path)}
    if path.is_file():
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return AutoModelForCausalLM.from_pretrained(**where, dtype=dtype).float()


def check_import(source: PathLike, output: PathLike) -> float:
    """Relative error of an imported dense checkpoint against transformers' model of its source.

    Raises:
        UserError: it is above 1e-4.
    """
    checkpoint = CheckpointWeights(output)
    tokens = prompt(checkpoint.model)
    theirs = hf_logits(hf_model(source, checkpoint.dtype), tokens)
    ours = logits(load(build_model(checkpoint.model), checkpoint.folder), tokens)
    return _within(relative_error(ours, theirs), PARITY, "imported model against transformers'")


def check_partition(dense: Weights, output: PathLike) -> float | None:
    """Compare a partitioned checkpoint with the dense model that it was cut from.

    Every matrix of every expert must be, bit by bit, what the recorded neuron map says, and all
    other weights those of the dense model. Where the experts have every neuron exactly once, the
    logits with all experts chosen are compared too: with k = E, equal router logits and scale = E
    every expert has weight 1, and their sum (with the residual expert's, where there is one) is the
    dense FFN.

    Returns:
        Relative error of the logits; None where experts overlap, so that it says nothing.

    Raises:
        UserError: the error is above 1e-5, or a bit differs.
    """
    checkpoint = CheckpointWeights(output)
    construction = read_construction(checkpoint.path)
    assert construction is not None
    maps = recorded_neurons(construction)
    rounded = _Rounded(dense, checkpoint.dtype)
    _check_cut(rounded, checkpoint, maps)
    if not all(map_.is_complete(dense.model.ffn_hidden_size) for map_ in maps.values()):
        return None
    model = checkpoint.model
    tokens = prompt(model)
    dense_logits = logits(fill(build_model(dense.model), rounded), tokens)
    assert model.num_experts is not None
    everyone = dataclasses.replace(
        model, moe_router_topk=model.num_experts, moe_score_scale=float(model.num_experts)
    )
    experts = load(build_model(everyone), checkpoint.folder)
    for name, parameter in experts.named_parameters():
        if ".router." in name:
            parameter.data.zero_()
    error = relative_error(logits(experts, tokens), dense_logits)
    return _within(error, EXACT, "experts put together against the dense model")


def _check_cut(dense: Weights, checkpoint: CheckpointWeights, maps: dict[int, NeuronMap]) -> None:
    """Experts hold the neurons that their map says, and all other weights are unchanged."""
    for key in tensor_shapes(dense.model).keys() & tensor_shapes(checkpoint.model).keys():
        _equal(key, dense.tensor(key), checkpoint.tensor(key))
    for layer, map_ in maps.items():
        cut = [("expert", EXPERTS_FC1, EXPERTS_FC2, map_.experts)]
        if len(map_.residual):
            cut.append(("residual expert", SHARED_FC1, SHARED_FC2, map_.residual[None]))
        gate, up = dense.gate_up(layer)
        down = dense.tensor(layer_key(layer, FC2))
        for kind, key1, key2, neurons in cut:
            fc1, fc2 = (checkpoint.tensor(layer_key(layer, key)) for key in (key1, key2))
            fc1 = fc1.view(len(neurons), -1, fc1.shape[-1])  # the residual expert has no [E]
            fc2 = fc2.view(len(neurons), -1, fc2.shape[-1])
            for number, chosen in enumerate(neurons):
                place = f"of {kind} {number} in layer {layer}"
                _equal(f"gate {place}", gate[chosen], fc1[number, : len(chosen)])
                _equal(f"up {place}", up[chosen], fc1[number, len(chosen) :])
                _equal(f"down {place}", down[:, chosen], fc2[number])


def _equal(name: str, expected: Tensor, found: Tensor) -> None:
    if not torch.equal(expected, found):
        raise UserError(
            f"{name} does not come back bit by bit", "this is a fault of the converter: report it"
        )


class _Rounded:
    """Weights rounded to a type, as the checkpoint holds them."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        self.weights, self.model, self.dtype = weights, weights.model, dtype

    def tensor(self, key: str) -> Tensor:
        return self.weights.tensor(key).to(self.dtype)

    def gate_up(self, layer: int) -> tuple[Tensor, Tensor]:
        gate, up = self.weights.gate_up(layer)
        return gate.to(self.dtype), up.to(self.dtype)


def check_upcycled(dense: Weights, output: PathLike, exact: bool) -> float:
    """Relative error of an upcycled checkpoint, as it starts, against a dense model.

    Where the construction is exact for any k, all experts are chosen in a second comparison, so
    that every copy is looked at.

    Raises:
        UserError: `exact`, but the error is above 1e-5.
    """
    checkpoint = CheckpointWeights(output)
    model, tokens = checkpoint.model, prompt(checkpoint.model)
    rounded = _Rounded(dense, checkpoint.dtype)
    expected = logits(fill(build_model(dense.model), rounded), tokens)
    choices = [model.moe_router_topk]
    if exact and (model.moe_router_topk > 1 or model.moe_shared_expert_gate == "xft"):
        assert model.num_experts is not None
        choices.append(model.num_experts)
    errors = []
    for topk in choices:
        mixture = build_model(dataclasses.replace(model, moe_router_topk=topk))
        errors.append(relative_error(logits(load(mixture, checkpoint.folder), tokens), expected))
    return (
        _within(max(errors), EXACT, "upcycled model against the dense one") if exact else errors[0]
    )


def compare(first: CheckpointWeights, second: CheckpointWeights) -> float:
    """Relative error of the second model's logits against the first's."""
    tokens = prompt(first.model)
    found = [logits(load(build_model(w.model), w.folder), tokens) for w in (second, first)]
    return relative_error(*found)


def check_export(checkpoint: CheckpointWeights, output: PathLike, dtype: torch.dtype) -> float:
    """Relative error of transformers' model of an exported directory against the checkpoint's own.

    Choosing k of E is discontinuous: where two experts are nearly tied, the last bit of a logit
    decides, and the difference spreads to all later tokens. So whole prompts are compared with all
    experts chosen; the choice of k is compared on prompts of one token, by their median.

    Our weights are rounded to the exported type first. Where the score scale is no power of two,
    folding it rounds once more, and so does adding LoRA adapters up, which 16-bit types show.

    Raises:
        UserError: it is above 1e-4 (above 2e-2 where folding rounds in a 16-bit type).
    """
    model = checkpoint.model
    compared = [(model, prompt(model))]
    if model.is_moe:
        assert model.num_experts is not None
        everyone = dataclasses.replace(model, moe_router_topk=model.num_experts)
        compared = [(model, prompt(model, 1, 33)), (everyone, prompt(model))]
    hf = hf_model(output, dtype)
    theirs = []
    for variant, tokens in compared:
        if variant is not model:
            for module in hf.modules():
                if hasattr(module, "top_k"):
                    module.top_k = variant.moe_router_topk
        theirs.append(hf_logits(hf, tokens))
    del hf
    scales = {model.score_scale(layer) for layer in model.moe_layers}
    folds = model.lora_rank is not None or any(math.frexp(scale)[0] != 0.5 for scale in scales)
    rounds = dtype != torch.float32 and folds
    bound = 2e-2 if rounds else PARITY
    errors = []
    for (variant, tokens), expected in zip(compared, theirs, strict=True):
        ours = load(build_model(variant), checkpoint.folder)
        for parameter in ours.parameters():
            parameter.data.copy_(parameter.data.to(dtype))
        error = (logits(ours, tokens) - expected).abs().amax(dim=(1, 2)) / expected.abs().max()
        errors.append(float(error.max() if variant is compared[-1][0] else error.median()))
    return _within(max(errors), bound, "exported model against the checkpoint")


def _within(error: float, bound: float, what: str) -> float:
    if not error <= bound:
        raise UserError(
            f"{what}: logits differ by {error:.1e} of the largest, more than {bound:.0e}",
            "this is a fault of the converter: report it with the source's config.json",
        )
    return error
