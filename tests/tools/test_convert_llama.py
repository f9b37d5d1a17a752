"""tools/convert_llama.py from the command line to what transformers computes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.mixtral import modeling_mixtral  # noqa: F401
from transformers.models.qwen2_moe import modeling_qwen2_moe  # noqa: F401

from megatron_ext.checkpoint import layout, verify
from megatron_ext.checkpoint.experts import recorded_neurons
from megatron_ext.checkpoint.reader import CheckpointWeights
from megatron_ext.checkpoint.tensors import EXPERTS_FC1, ROUTER, layer_key
from megatron_ext.errors import UserError
from tests.checkpoint.tiny import LLAMA3_ROPE, convert, save_checkpoint, save_llama, small_model


def hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def partition(source: Path, output: Path, *options: Any) -> CheckpointWeights:
    convert("partition", "--source", source, "--output", output, "--num-experts", 4, *options)
    return CheckpointWeights(output)


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_word_embeddings": True}, {"rope_parameters": LLAMA3_ROPE}],
    ids=["untied", "tied", "llama3"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_there_and_back_is_bit_exact(
    tmp_path: Path, options: dict[str, Any], dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = save_llama(tmp_path / "hf", dtype=dtype, **options)
    (hf / "tokenizer.json").write_text("{}")
    convert("import", "--source", hf, "--output", tmp_path / "ours")
    convert(
        "export",
        "--source",
        tmp_path / "ours",
        "--output",
        tmp_path / "back",
        "--max-shard-size",
        6e-5,
    )
    assert capsys.readouterr().out.count("relative error") == 2
    before, after = hf_tensors(hf), hf_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 2
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "back").config
    original = LlamaForCausalLM.from_pretrained(hf).config
    for name in ("rope_parameters", "rms_norm_eps", "tie_word_embeddings", "eos_token_id"):
        assert getattr(config, name) == getattr(original, name), name


def test_partition_keeps_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = save_llama(tmp_path / "hf")
    moe = partition(hf, tmp_path / "moe", "--seed", 3, "--moe-dense-first-layers", 1)
    assert "equal bit by bit" in capsys.readouterr().out
    assert moe.model.moe_layers == [1, 2] and moe.model.moe_score_scale == 2.0
    construction = layout.read_construction(tmp_path / "moe")
    assert construction is not None and construction["method"] == "independent_random"
    neurons = recorded_neurons(construction)
    gate = hf_tensors(hf)["model.layers.2.mlp.gate_proj.weight"]
    experts = moe.tensor(layer_key(2, EXPERTS_FC1))
    assert torch.equal(experts[3, :24], gate[neurons[2].experts[3]])
    # Against transformers too: all experts, equally, at full scale.
    error = verify.check_partition(CheckpointWeights(dense_of(hf, tmp_path)), tmp_path / "moe")
    assert error <= 1e-5


def dense_of(hf: Path, tmp_path: Path) -> Path:
    convert("import", "--source", hf, "--output", tmp_path / "dense", "--skip-verify")
    return tmp_path / "dense"


def test_a_wrong_expert_does_not_pass(tmp_path: Path) -> None:
    hf = save_llama(tmp_path / "hf")
    moe = partition(hf, tmp_path / "moe", "--skip-verify")
    construction = layout.read_construction(tmp_path / "moe")
    assert construction is not None
    first = construction["neurons"]["1"]
    first[0], first[1] = first[1], first[0]
    layout.write_construction(tmp_path / "moe", construction)
    with pytest.raises(UserError, match="gate of expert 0 in layer 1 does not come back"):
        verify.check_partition(CheckpointWeights(dense_of(hf, tmp_path)), moe.path)


def test_a_wrong_import_does_not_pass(tmp_path: Path) -> None:
    dense = dense_of(save_llama(tmp_path / "hf"), tmp_path)
    other = save_llama(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="imported model against transformers': logits differ"):
        verify.check_import(other, dense)


def test_same_seed_same_experts_from_any_format(tmp_path: Path) -> None:
    hf = save_llama(tmp_path / "hf")
    one = partition(hf, tmp_path / "one", "--skip-verify")
    two = partition(dense_of(hf, tmp_path), tmp_path / "two", "--skip-verify")
    other = partition(hf, tmp_path / "other", "--seed", 99, "--skip-verify")
    for key in one.stored:
        assert torch.equal(one.tensor(key), two.tensor(key)), key
    for key in (layer_key(1, EXPERTS_FC1), layer_key(1, ROUTER)):
        assert not torch.equal(one.tensor(key), other.tensor(key))
    constructions = [layout.read_construction(moe.path) for moe in (one, two)]
    fingerprints = {c["source"]["fingerprint"] for c in constructions if c is not None}
    assert len(fingerprints) == 1


MOES = {
    "mixtral": ({}, "MixtralForCausalLM"),
    "tied-llama3": (
        {"untie_embeddings_and_output_weights": False, "rope_scaling_factor": 4.0},
        "MixtralForCausalLM",
    ),
    "scale-per-layer": ({"moe_score_scale": [1.5, 2.0, 3.7]}, "MixtralForCausalLM"),
    "residual": ({"moe_shared_expert_intermediate_size": 16}, "Qwen2MoeForCausalLM"),
    "dense-ends": (
        {"moe_dense_first_layers": 1, "moe_dense_last_layers": 1},
        "Qwen2MoeForCausalLM",
    ),
    "top-1": ({"moe_router_topk": 1}, "Qwen2MoeForCausalLM"),
}


@pytest.mark.parametrize("name", MOES)
def test_exported_experts_compute_the_same(tmp_path: Path, name: str) -> None:
    options, architecture = MOES[name]
    values = {"num_experts": 4, "moe_score_scale": 2.0, "moe_router_topk": 2} | options
    path = save_checkpoint(tmp_path / "moe", small_model(**values))
    # The tool compares short prompts itself; here a longer one, independently.
    arguments = ["--source", path, "--output", tmp_path / "hf", "--max-shard-size", 1e-4]
    convert("export", *arguments, "--skip-verify")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(theirs).__name__ == architecture
    checkpoint = CheckpointWeights(path)
    ours = verify.load(verify.build_model(checkpoint.model), checkpoint.folder)
    tokens = verify.prompt(checkpoint.model, 100)
    our_logits = verify.logits(ours, tokens)
    assert our_logits.abs().max() > 1
    assert verify.relative_error(verify.hf_logits(theirs, tokens), our_logits) <= 1e-4


def test_exported_experts_are_the_dense_weights(tmp_path: Path) -> None:
    hf = save_llama(tmp_path / "hf", dtype=torch.bfloat16)
    moe = partition(hf, tmp_path / "moe")
    convert("export", "--source", tmp_path / "moe", "--output", tmp_path / "mixtral")
    dense, exported = hf_tensors(hf), hf_tensors(tmp_path / "mixtral")
    construction = layout.read_construction(moe.path)
    assert construction is not None
    for layer, neurons in recorded_neurons(construction).items():
        for expert, chosen in enumerate(neurons.experts):
            prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            mlp = f"model.layers.{layer}.mlp"
            assert torch.equal(
                exported[f"{prefix}.w1.weight"], dense[f"{mlp}.gate_proj.weight"][chosen]
            )
            assert torch.equal(
                exported[f"{prefix}.w3.weight"], dense[f"{mlp}.up_proj.weight"][chosen]
            )
            down = dense[f"{mlp}.down_proj.weight"][:, chosen]
            assert torch.equal(exported[f"{prefix}.w2.weight"], down * 2.0)  # E / k
    others = {name for name in dense if ".mlp." not in name}
    assert others == {name for name in exported if "block_sparse_moe" not in name}
    assert all(torch.equal(dense[name], exported[name]) for name in others)


@pytest.mark.parametrize("fault", ["expert", "topk"])
def test_a_wrong_export_does_not_pass(tmp_path: Path, fault: str) -> None:
    path = save_checkpoint(tmp_path / "moe", small_model(num_experts=4, moe_score_scale=2.0))
    output = tmp_path / "hf"
    convert("export", "--source", path, "--output", output)
    checkpoint = CheckpointWeights(path)
    assert verify.check_export(checkpoint, output, torch.float32) <= 1e-4
    if fault == "topk":
        config = json.loads((output / "config.json").read_text())
        (output / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 3}))
    else:
        tensors = load_file(output / "model.safetensors")
        tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"] *= 1.01
        save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="exported model against the checkpoint: logits differ"):
        verify.check_export(checkpoint, output, torch.float32)


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "moe", small_model(num_experts=4, moe_gate="mlp"))
    with pytest.raises(UserError, match="moe_gate=mlp has no counterpart"):
        convert("export", "--source", path, "--output", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_mistakes_are_found_before_any_work(tmp_path: Path) -> None:
    hf = save_llama(tmp_path / "hf")
    with pytest.raises(UserError, match="ffn_hidden_size=96 is not a multiple of num_experts=5"):
        convert("partition", "--source", hf, "--output", tmp_path / "moe", "--num-experts", 5)
    with pytest.raises(UserError, match="moe_router_topk=9"):
        partition(hf, tmp_path / "moe", "--moe-router-topk", 9)
    with pytest.raises(UserError, match="is not empty"):
        partition(hf, hf.parent)
    with pytest.raises(UserError, match="source and output are the same"):
        partition(hf, hf, "--force")
    with pytest.raises(UserError, match="has experts already"):
        moe = save_checkpoint(tmp_path / "moe", small_model(num_experts=4))
        partition(moe, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "moe"]


def test_nan_leaves_nothing_behind(tmp_path: Path) -> None:
    hf = save_llama(tmp_path / "hf")
    model = LlamaForCausalLM.from_pretrained(hf)
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match="layers.2.mlp.experts.*linear_fc2.* holds 1 values"):
        partition(tmp_path / "nan", tmp_path / "moe")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "nan"]


def test_inspect_tells_sizes_and_origin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partition(save_llama(tmp_path / "hf"), tmp_path / "moe", "--skip-verify")
    capsys.readouterr()
    convert("inspect", "--source", tmp_path / "moe")
    out = capsys.readouterr().out
    model = layout.read_model_config(tmp_path / "moe")
    from megatron_ext.checkpoint.tensors import count_parameters

    total, active = count_parameters(model)
    assert f"{total:,} total, {active:,} active" in out
    assert "independent_random, seed 1234" in out


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "tools/convert_llama.py", "inspect", "--source", str(tmp_path)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        command, cwd=root, env={"PYTHONPATH": str(root), "PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and "no config.json" in done.stderr


def test_generation_settings_travel(tmp_path: Path) -> None:
    moe = partition(save_llama(tmp_path / "hf"), tmp_path / "moe", "--skip-verify")
    settings = json.loads((moe.path / "tokenizer" / "generation_config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (1, 2)
    convert("export", "--source", moe.path, "--output", tmp_path / "out", "--skip-verify")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == 2 and model.config.bos_token_id == 1
