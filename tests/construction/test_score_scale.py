"""Score scales against whole forward passes of the model that they are set in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint import tiny
from ranks import run_ranks
from torch import Tensor
from training.runs import VOCABULARY, write_data

from megatron_ext.checkpoint import layout, verify
from megatron_ext.construction import score_scale

SHARED = {"moe_shared_expert_intermediate_size": 8, "moe_ffn_hidden_size": 11}


def batches() -> list[dict[str, Tensor]]:
    """Two batches; two positions of every sequence do not count."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 12)
    mask[:, 3:5] = 0
    positions = torch.arange(12).expand(2, -1)
    return [
        {
            "tokens": torch.randint(101, (2, 12), generator=generator),
            "position_ids": positions,
            "loss_mask": mask,
        }
        for _ in range(2)
    ]


def build(scale: Any = 1.0, **options: Any) -> Any:
    model = tiny.small_model(**options)
    if options:
        model.moe_score_scale = scale
    return verify.fill(verify.build_model(model), tiny.RandomWeights(model))


def measured(model: Any, layer: int) -> float:
    """mean |ffn output| / mean |residual| of a layer in whole forward passes."""
    sizes = {"residual": 0.0, "output": 0.0}
    counted = torch.ones(12, dtype=torch.bool)
    counted[3:5] = False

    def add(name: str, tensor: Tensor) -> None:
        sizes[name] += float(tensor.detach()[counted].double().abs().sum())

    block = model.decoder.layers[layer]
    block.pre_mlp_layernorm.register_forward_pre_hook(lambda _, args: add("residual", args[0]))
    block.mlp.register_forward_hook(lambda _, args, output: add("output", output[0]))
    for batch in batches():
        verify.logits(model, batch["tokens"])
    return sizes["output"] / sizes["residual"]


def estimate_and_measure(options: dict[str, Any]) -> tuple[list[float], list[float], list[float]]:
    """The scales; loudness of the mixture with them; loudness of the dense model."""
    found = score_scale.estimate(build(), build(scale=7.0, **options), batches())
    layers = range(len(found))
    return (
        found,
        [measured(build(scale=found, **options), layer) for layer in layers],
        [measured(build(), layer) for layer in layers],
    )


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": 4},
        {"num_experts": 4, "moe_gate": "mlp", "moe_router_topk": 1},
        {"num_experts": 4, "moe_dense_first_layers": 1},
        {"num_experts": 8, **SHARED},
    ],
    ids=["linear gate", "mlp gate", "first layer dense", "shared expert"],
)
def test_the_mixture_is_as_loud_as_the_dense_model(options: dict[str, Any]) -> None:
    [(found, mixture, dense)] = run_ranks(1, estimate_and_measure, options)
    first = options.get("moe_dense_first_layers", 0)
    assert found[:first] == [1.0] * first and min(found[first:]) > 1.0
    assert mixture == pytest.approx(dense, rel=1e-5)


def scales_of_all_experts() -> tuple[list[float], float]:
    """Experts cut from the dense model, all chosen with equal weights; their configured scale."""
    from megatron_ext.checkpoint.tensors import FC2, layer_key

    dense = tiny.RandomWeights(tiny.small_model())
    shape = tiny.small_model(num_experts=4, moe_router_topk=4, moe_score_scale=3.0)
    experts = verify.build_model(shape)
    own = dict(experts.named_parameters())
    with torch.no_grad():
        for name, item in verify.sharded_weights(experts).items():
            key = item.key
            if "router" in key:
                own[name].zero_()
            elif "experts" not in key:
                own[name].copy_(dense.tensor(key))
        for layer in range(3):
            gate, up = (part.view(4, 24, 48) for part in dense.gate_up(layer))
            down = dense.tensor(layer_key(layer, FC2)).view(48, 4, 24).transpose(0, 1)
            parts = experts.decoder.layers[layer].mlp.experts
            parts.linear_fc1.copy_(torch.cat((gate, up), 1))
            parts.linear_fc2.copy_(down)
    found = score_scale.estimate(build(), experts, batches())
    return found, experts.config.moe_score_scale


def test_all_experts_together_need_the_scale_e() -> None:
    """Each speaks with weight 1/E, so that their sum is 1/E of the dense FFN."""
    [(found, configured)] = run_ranks(1, scales_of_all_experts)
    assert found == pytest.approx([4.0] * 3, rel=1e-5)
    assert configured == 3.0, "the model is left as it was"


def silent() -> str:
    model = build(num_experts=4)
    for parameter in model.decoder.layers[1].mlp.experts.parameters():
        parameter.data.zero_()
    with pytest.raises(score_scale.UserError) as caught:
        score_scale.estimate(build(), model, batches())
    return str(caught.value)


def test_silent_experts_are_reported() -> None:
    assert run_ranks(1, silent) == ["the experts of layer 1 put out zeros: no scale helps"]


def test_the_command_rewrites_the_model_file(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data")
    tiny.save_llama(tmp_path / "hf", vocab_size=VOCABULARY)
    experts = ("--num-experts", 4, "--output", tmp_path / "moe", "--skip-verify")
    tiny.convert("partition", "--source", tmp_path / "hf", *experts)
    before = layout.read_model_config(tmp_path / "moe")
    run_ranks(1, run_command, tmp_path)
    after = layout.read_model_config(tmp_path / "moe")
    assert before.moe_score_scale == 2.0
    assert isinstance(after.moe_score_scale, list) and len(after.moe_score_scale) == 3
    assert after.moe_score_scale != [2.0] * 3
    values = yaml.safe_load((tmp_path / "moe" / layout.MODEL_FILE).read_text())
    assert values["num_experts"] == 4
    tiny.save_llama(tmp_path / "other", seed=5, vocab_size=VOCABULARY)
    (tmp_path / "hf").rename(tmp_path / "gone")
    (tmp_path / "other").rename(tmp_path / "hf")
    with pytest.raises(score_scale.UserError, match="was not made of"):
        run_command(tmp_path)


def run_command(root: Path) -> None:
    from megatron_ext.commands.scale import Scale

    data = root / "data"
    Scale(dense=root / "hf", moe=root / "moe", data_dir=data, num_samples=3, seq_length=16).run()
