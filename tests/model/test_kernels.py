"""What is chosen for a GPU, as far as it can be checked without one (docs/gpu.md)."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from training.runs import VOCABULARY, make_run

from megatron_ext.config import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_ext.errors import UserError
from megatron_ext.model import kernels
from megatron_ext.platform import Platform
from megatron_ext.validation import validate

MODEL: dict[str, Any] = {"num_experts": 8, "moe_shared_expert_intermediate_size": 1376}
A100, H100, B200, V100 = (8, 0), (9, 0), (10, 0), (7, 0)
PLAIN_TORCH = ("bias_activation_fusion", "bias_dropout_fusion", "moe_shared_expert_overlap")


def gpu(capability: tuple[int, int], layers: str = "transformer_engine") -> Platform:
    return Platform(torch.device("cuda", 0), layers, "made for a test", capability)


CPU = Platform(torch.device("cpu"), "local", "made for a test")


def recipe(model: dict[str, Any] | None = None, **training: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(**MODEL | (model or {})), training=TrainingConfig(**training)
    )


@pytest.mark.parametrize(
    ("platform", "precision", "bf16"),
    [(A100, "auto", True), (H100, "auto", True), (V100, "auto", False), (H100, "fp32", False)],
)
def test_precision_follows_the_gpu(platform: tuple[int, int], precision: str, bf16: bool) -> None:
    assert kernels.uses_bf16(recipe(precision=precision), gpu(platform)) == bf16
    assert not kernels.uses_bf16(recipe(precision="auto"), CPU)


def test_fused_kernels_are_transformer_engine_s() -> None:
    fused = kernels.kernel_values(recipe(), gpu(H100))
    assert fused["moe_grouped_gemm"] and fused["moe_permute_fusion"] and fused["apply_rope_fusion"]
    assert fused["moe_shared_expert_overlap"] and "fp8" not in fused
    for platform in (CPU, gpu(H100, "local")):
        values = kernels.kernel_values(recipe(), platform)
        assert not any(value for name, value in values.items() if name != "bf16")


def test_the_fused_loss_is_for_bf16() -> None:
    """Its gradient is bf16 in both versions of megatron-core."""
    for precision, fused in (("bf16", True), ("fp32", False)):
        values = kernels.kernel_values(recipe(precision=precision), gpu(H100))
        assert values["cross_entropy_loss_fusion"] is fused


def test_a_weighed_shared_expert_waits_for_its_weight() -> None:
    weighed = kernels.kernel_values(recipe({"moe_shared_expert_gate": "xft"}), gpu(H100))
    assert not weighed["moe_shared_expert_overlap"]


@pytest.mark.parametrize(
    ("fp8", "capability", "fits"),
    [
        ("delayed", A100, False),
        ("delayed", H100, True),
        ("blockwise", H100, True),
        ("mxfp8", H100, False),
        ("mxfp8", B200, True),
    ],
)
def test_fp8_needs_a_gpu_that_has_it(fp8: Any, capability: tuple[int, int], fits: bool) -> None:
    run = recipe(fp8=fp8)
    validate(run, 8)
    if fits:
        kernels.check_kernels(run, gpu(capability))
        values = kernels.kernel_values(run, gpu(capability))
        assert (values["fp8"], values["fp8_recipe"]) == ("hybrid", fp8)
    else:
        with pytest.raises(UserError, match="needs capability"):
            kernels.check_kernels(run, gpu(capability))


def test_what_cannot_work_is_refused() -> None:
    for platform in (CPU, gpu(H100, "local")):
        with pytest.raises(UserError, match="needs TransformerEngine"):
            kernels.check_kernels(recipe(fp8="delayed"), platform)
    with pytest.raises(UserError, match="has no bf16"):
        kernels.check_kernels(recipe(precision="bf16"), gpu(V100))
    sharded = RunConfig(parallel=ParallelConfig(use_distributed_optimizer=True))
    with pytest.raises(UserError, match="could not be restored"):  # neither is installed here
        kernels.check_kernels(sharded, gpu(H100, "local"))
    kernels.check_kernels(sharded, CPU)  # a GPU's recipe runs on CPU, not sharded


@pytest.mark.parametrize(
    ("run", "problem"),
    [
        (recipe(fp8="delayed", precision="fp32"), "precision=fp32"),
        (recipe(fp8="delayed", recompute_granularity="full"), "counted twice"),
        (recipe({"moe_ffn_hidden_size": 1000}, fp8="delayed"), "expert width of a rank 1000"),
        (RunConfig(parallel=ParallelConfig(overlap_param_gather=True)), "overlap_grad_reduce"),
    ],
)
def test_what_no_gpu_can_do_is_refused_anywhere(run: RunConfig, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        validate(run, 8)


# --- what of it a CPU can run ---


def losses_and_gradients() -> list[dict[str, Any]]:
    """Of the same weights and tokens, without and with the fused forms that are plain torch."""
    from megatron_ext.model.builder import build_model, transformer_config
    from megatron_ext.training import grid as grids

    shape = {"moe_dense_first_layers": 1, "moe_shared_expert_intermediate_size": 32}
    run = make_run(Path("unused"), model=shape, router={"moe_balance_loss": "none"})
    platform = grids.initialize(run).platform
    fused = kernels.kernel_values(run, gpu(H100))
    tokens = torch.randint(VOCABULARY, (2, 33), generator=torch.Generator().manual_seed(1))
    found = []
    weights: dict[str, Any] = {}
    for names in ([], PLAIN_TORCH):
        config = transformer_config(run, platform)
        for name in names:
            assert fused[name] and not getattr(config, name)
            setattr(config, name, True)
        model: Any = build_model(run, platform, config)
        weights = weights or model.state_dict()
        model.load_state_dict(weights)
        # Without a mask of the loss it is megatron-core's own.
        loss = model(tokens[:, :-1], torch.arange(32).expand(2, 32), None, labels=tokens[:, 1:])
        loss.sum().backward()
        values = {name: p.grad.numpy() for name, p in model.named_parameters()}
        found.append(values | {"loss": loss.detach().numpy()})
    return found


def test_fused_forms_compute_the_same() -> None:
    plain, fused = run_ranks(1, losses_and_gradients)[0]
    assert plain.keys() == fused.keys() and len(plain) > 20
    for name, values in plain.items():
        np.testing.assert_allclose(fused[name], values, rtol=1e-4, atol=1e-6, err_msg=name)


# --- megatron-core, by its source ---------------------------------------------------------------


def definitions(module: str) -> dict[str, ast.ClassDef]:
    """Classes that a module's source defines, wherever: most are not defined without
    TransformerEngine.
    """
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def parameters(cls: ast.ClassDef, method: str) -> list[str]:
    for node in cls.body:
        if isinstance(node, ast.FunctionDef) and node.name == method:
            return [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
    raise AssertionError(f"{cls.name} has no {method}")


@pytest.fixture(scope="module")
def wrappers() -> dict[str, ast.ClassDef]:
    from megatron_ext import platform

    platform.setup("cpu")
    return definitions("megatron.core.extensions.transformer_engine")


def test_every_kernel_option_is_one_of_megatron_core_s(wrappers: Any) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    chosen = kernels.kernel_values(recipe(fp8="delayed"), gpu(H100))
    assert chosen.keys() <= known
    # Off without being named: CUDA graphs, and userbuffers' overlap of tensor parallelism.
    defaults = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    assert defaults.cuda_graph_impl == "none" and not defaults.tp_comm_overlap


def test_core_attention_takes_what_packed_rows_pass(wrappers: dict[str, ast.ClassDef]) -> None:
    """`packed.attends_to_packed_rows` derives from this class and calls it."""
    attention = wrappers["TEDotProductAttention"]
    expected = ["self", "query", "key", "value", "attention_mask", "attn_mask_type"]
    found = parameters(attention, "forward")
    assert found[:6] == expected and "packed_seq_params" in found
    # The layout of packed rows is read from these fields, of which ours has two more.
    source = ast.unparse(attention)
    assert "dataclasses.fields(PackedSeqParams)" in source and "self.config = config" in source


def test_grouped_experts_keep_the_checkpoint_s_names(wrappers: dict[str, ast.ClassDef]) -> None:
    """One name for all experts of a layer, as `LocalExperts` writes: a run may change backend."""
    experts = definitions("megatron.core.transformer.moe.experts")["TEGroupedMLP"]
    source = ast.unparse(experts)
    assert "f'{prefix}experts.{name}.'" in source and "apply_swiglu_sharded_factory" in source
    taken = ["self", "permuted_local_hidden_states", "tokens_per_expert", "permuted_probs"]
    assert parameters(experts, "forward")[:4] == taken
    assert "_sharded_state_dict_grouped" in ast.unparse(wrappers["TEGroupedLinear"])
    for name in ("TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"):
        assert parameters(wrappers[name], "__init__")[1:4] == [
            "num_gemms",
            "input_size",
            "output_size",
        ]
