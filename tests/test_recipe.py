"""Recipe, command line and checks: what is read, in which order, and what is refused."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from megatron_ext import config as config_module
from megatron_ext import model_config
from megatron_ext.checkpoint.layout import write_model_config
from megatron_ext.config import DomainConfig, ModelConfig, RunConfig
from megatron_ext.errors import UserError
from megatron_ext.recipe import from_dict, parse_run, read_yaml, to_dict
from megatron_ext.validation import validate

ROOT = Path(__file__).resolve().parents[1]
YAML_ONLY = {"domains", "options"}


def option_names() -> list[str]:
    """Names on the command line: every field of every section, but for what is YAML only."""
    sections = get_type_hints(RunConfig).values()
    return [field.name for cls in sections for field in fields(cls) if field.name not in YAML_ONLY]


def write_recipe(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


# --- layers -----------------------------------------------------------------------------------


def test_defaults_then_checkpoint_then_recipe_then_options(tmp_path: Path) -> None:
    checkpoint = tmp_path / "moe"
    checkpoint.mkdir()
    shape = {
        "num_layers": 3,
        "hidden_size": 48,
        "num_experts": 8,
        "moe_score_scale": [1.0, 2.0, 3.0],
    }
    write_model_config(checkpoint, ModelConfig(**shape))  # type: ignore[arg-type]
    recipe = write_recipe(
        tmp_path,
        f"""
model: {{moe_router_topk: 3, max_position_embeddings: 99}}
optimizer: {{lr: 0.5, min_lr: 0.25}}
checkpoint: {{load: {checkpoint}}}
data:
  domains: {{code: {{path: a/code, weight: 2}}}}
""",
    )
    run = parse_run(["--config", recipe, "--max-position-embeddings", "77", "--lr=1e-3"])
    assert (run.model.num_layers, run.model.hidden_size) == (3, 48)  # checkpoint over default
    assert run.model.moe_score_scale == [1.0, 2.0, 3.0]
    assert run.model.moe_router_topk == 3  # recipe over checkpoint
    assert run.model.max_position_embeddings == 77  # option over recipe
    assert (run.optimizer.lr, run.optimizer.min_lr) == (1e-3, 0.25)
    assert run.optimizer.adam_beta2 == 0.95
    assert run.data.domains == {"code": DomainConfig("a/code", 2.0)}


def test_the_run_directory_comes_before_the_checkpoint_it_started_from(tmp_path: Path) -> None:
    for name, layers in (("run", 5), ("moe", 4)):
        (tmp_path / name).mkdir()
        write_model_config(tmp_path / name, ModelConfig(num_layers=layers))
    arguments = ["--load", str(tmp_path / "moe"), "--save", str(tmp_path / "run")]
    assert parse_run(arguments).model.num_layers == 5
    assert parse_run(arguments[:2]).model.num_layers == 4
    assert parse_run([*arguments[:2], "--save", str(tmp_path / "new")]).model.num_layers == 4


def test_a_written_recipe_is_read_back(tmp_path: Path) -> None:
    import yaml

    run = RunConfig(model=ModelConfig(num_experts=4, moe_score_scale=[1.0] * 32))
    run.training.rampup_batch_size = (2, 2, 100)
    run.data.domains["wiki"] = DomainConfig("w", max_epochs=1.5)
    path = write_recipe(tmp_path, yaml.safe_dump(to_dict(run)))
    assert parse_run(["--config", path]) == run
    assert from_dict(RunConfig, read_yaml(path), path) == run


def test_both_spellings_of_an_option() -> None:
    run = parse_run(["--train-iters", "7", "--lr_warmup_iters", "3", "--progress", "False"])
    assert run.training.train_iters == 7 and run.optimizer.lr_warmup_iters == 3
    assert run.logging.progress is False


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("optimiser: {lr: 1}", "unknown key 'optimiser'\n.*did you mean 'optimizer'"),
        ("optimizer: {min_rl: 1}", "unknown key 'optimizer.min_rl'\n.*did you mean 'min_lr'"),
        ("model: {num_expert: 8}", "did you mean 'num_experts'"),
        (
            "data: {domains: {code: {path: x, wieght: 2}}}",
            "unknown key 'data.domains.code.wieght'\n.*did you mean 'weight'",
        ),
        ("training: {zzz: 1}", "unknown key 'training.zzz'\n.*known: .*train_iters"),
        ("training: {train_iters: many}", "training.train_iters='many': .*integer"),
        ("training: {rampup_batch_size: [1, 2]}", "training.rampup_batch_size"),
        ("router: {moe_balance_loss: cv3}", "router.moe_balance_loss='cv3': .*'cv2'"),
        ("parallel: 4", "parallel=4"),
        ("[1, 2]", "must be a mapping"),
        ("model: {", "is not YAML"),
    ],
)
def test_recipe_is_refused(tmp_path: Path, recipe: str, message: str) -> None:
    with pytest.raises(UserError, match=re.compile(message, re.DOTALL)):
        parse_run(["--config", write_recipe(tmp_path, recipe)])


def test_missing_recipe() -> None:
    with pytest.raises(UserError, match="none.yaml does not exist"):
        parse_run(["--config", "none.yaml"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-expert", "8"], "--num-experts"),
        (["--global-batch", "8"], "--global-batch-size"),
        (["--lr", "fast"], "Error parsing --lr"),
        (["--precision", "fp8"], "bf16"),
    ],
)
def test_option_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_run(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


GRID = "tensor 1 x pipeline 1 x context 1"
IMPOSSIBLE: list[tuple[dict[str, Any], int, str]] = [
    ({"tensor_model_parallel_size": 2}, 3, "world size 3 is not a multiple of tensor 2 x .* = 2"),
    ({"tensor_model_parallel_size": 3}, 3, "num_attention_heads=4 .* tensor_model.*=3"),
    ({"tensor_model_parallel_size": 4}, 4, "num_query_groups=2 is not .*=4"),
    ({"tensor_model_parallel_size": 2, "vocab_size": 101}, 2, "vocab_size=101"),
    ({"tensor_model_parallel_size": 2, "seq_length": 33}, 2, "seq_length=33 .* tensor 2 x .* = 2"),
    ({"tensor_model_parallel_size": 2, "sequence_parallel": False}, 2, "needs sequence_parallel"),
    ({"pipeline_model_parallel_size": 3}, 3, "num_layers=4 is not .* stages=3"),
    ({"pipeline_model_parallel_size": 0}, 1, "pipeline_model_parallel_size=0 must be at least 1"),
    ({"virtual_pipeline_model_parallel_size": 2}, 1, "needs pipeline_model_parallel_size > 1"),
    (
        {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "global_batch_size": 3,
        },
        2,
        r"micro-batches per step \(3\) to be a multiple of pipeline_model_parallel_size=2",
    ),
    ({"expert_model_parallel_size": 3}, 3, "num_experts=8 .* expert_model_parallel_size=3"),
    ({"expert_model_parallel_size": 2}, 1, "world size=1 is not .* ranks=2"),
    ({"expert_tensor_parallel_size": 3}, 3, "moe_ffn_hidden_size=16 .*=3"),
    ({"num_experts": None, "expert_model_parallel_size": 2}, 2, "on a dense model"),
    ({"context_parallel_size": 2, "seq_length": 34}, 2, "seq_length=34 .* 2 x context 2 = 4"),
    (
        {
            "tensor_model_parallel_size": 4,
            "num_query_groups": 4,
            "context_parallel_size": 2,
            "seq_length": 36,
        },
        8,
        r"seq_length=36 .* tensor 4 x context 2 \(sequence_parallel\) = 8",
    ),
    ({}, 3, rf"global_batch_size=8 .* 1 x data parallel 3 \(world size 3 / \({GRID}\)\) = 3"),
    ({"micro_batch_size": 3}, 1, "global_batch_size=8 .* micro_batch_size 3"),
    ({"micro_batch_size": 0}, 1, "micro_batch_size=0 must be at least 1"),
    ({"global_batch_size": 0}, 1, "global_batch_size=0 must be at least 1"),
    ({"rampup_batch_size": (2, 4, 100)}, 1, r"global_batch_size=8 .* 2 \+ n x 4"),
    ({"rampup_batch_size": (1, 7, 100)}, 2, "rampup_batch_size .* multiple of 2"),
    ({"train_iters": 0}, 1, "train_iters=0"),
    ({"seq_length": 128}, 1, "seq_length=128 exceeds max_position_embeddings=64"),
    ({"num_experts": 7}, 1, "ffn_hidden_size=128 is not a multiple of num_experts=7"),
    ({"moe_router_topk": 9}, 1, "moe_router_topk=9 must lie between 1 and num_experts=8"),
    ({"moe_dense_first_layers": 4}, 1, "leave no MoE layer of 4"),
    ({"moe_score_scale": [1.0, 2.0]}, 1, "moe_score_scale has 2 values for 4 layers"),
    ({"num_attention_heads": 3}, 1, "hidden_size=64 is not a multiple of num_attention_heads=3"),
    ({"num_query_groups": 3}, 1, "num_attention_heads=4 .* num_query_groups=3"),
    ({"hidden_size": 0}, 1, "hidden_size=0 must be at least 1"),
]


def small_run(options: dict[str, Any]) -> RunConfig:
    values: dict[str, Any] = dict(
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=128,
        max_position_embeddings=64,
        num_experts=8,
        seq_length=32,
    )
    run = RunConfig()
    for name, value in {**values, **options}.items():
        section = next(
            part
            for key in get_type_hints(RunConfig)
            if hasattr(part := getattr(run, key), name) and is_dataclass(part)
        )
        setattr(section, name, value)
    return run


@pytest.mark.parametrize(
    ("options", "world_size", "message"), IMPOSSIBLE, ids=lambda value: str(value)
)
def test_impossible_run_is_refused_with_its_sum(
    options: dict[str, Any], world_size: int, message: str
) -> None:
    validate(small_run({}), 1)
    with pytest.raises(UserError, match=message):
        validate(small_run(options), world_size)


def test_refused_before_a_process_group_and_without_a_traceback() -> None:
    """Three ranks are promised and one is there: a process group would wait for the others."""
    environment = os.environ | {"WORLD_SIZE": "3", "RANK": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "pretrain_moe.py"), "--tensor-model-parallel-size", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: world size 3 is not a multiple of tensor 2" in done.stderr
    assert "-> launch a multiple of 2 ranks" in done.stderr


# --- help -------------------------------------------------------------------------------------


def test_names_are_unique_over_the_tree() -> None:
    """The command line has no sections."""
    assert [name for name, count in Counter(option_names()).items() if count > 1] == []


def test_every_field_says_what_it_means() -> None:
    modules = (config_module, model_config)
    trees = [ast.parse(Path(module.__file__ or "").read_text()) for module in modules]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    silent, seen = [], 0
    for cls in classes:
        for node, following in zip(cls.body, [*cls.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and cls.name != "RunConfig":
                seen += 1
                text = following.value if isinstance(following, ast.Expr) else None
                if not (isinstance(text, ast.Constant) and str(text.value).strip()):
                    silent.append(f"{cls.name}.{ast.unparse(node.target)}")
    assert seen >= len(option_names()) and not silent


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_run(["--help"])
    assert stop.value.code == 0
    shown = set(re.findall(r"--([a-z0-9-]+)", capsys.readouterr().out))
    assert {name.replace("_", "-") for name in option_names()} <= shown and "config" in shown
