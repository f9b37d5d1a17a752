"""Models of TransformerEngine's layers, built without a GPU from its Python sources.

pip download --no-deps transformer-engine && unzip -d te transformer_engine-*.whl
TRANSFORMER_ENGINE_SOURCE=te make test ARGS=tests/model/test_transformer_engine.py

Needs torch's CUDA build, which brings triton.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import ENVIRONMENT, ROOT

SOURCE = os.environ.get("TRANSFORMER_ENGINE_SOURCE")
pytestmark = [
    pytest.mark.skipif(SOURCE is None, reason="TRANSFORMER_ENGINE_SOURCE names no unpacked wheel"),
    pytest.mark.skipif(find_spec("triton") is None, reason="torch was built for CPUs"),
]

PROGRAM = """
import json, sys
from pathlib import Path
sys.path.insert(0, "tests/model")
import stand_in
version = stand_in.install(Path(sys.argv[1]))

import torch
from megatron_ext import platform
here = platform.setup("cpu")
platform.init_process_group(here)
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron_ext.checkpoint.run_state import model_state_dict
from megatron_ext.config import ModelConfig, RunConfig
from megatron_ext.model.builder import build_model, transformer_config

stand_in.pretend_gpu()
parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
tensor_parallel.model_parallel_cuda_manual_seed(1)
run = RunConfig(model=ModelConfig(
    num_layers=3, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2,
    vocab_size=128, max_position_embeddings=64, num_experts=4, moe_dense_first_layers=1,
    moe_shared_expert_intermediate_size=32))
run.training.precision = "fp32"
h100 = platform.Platform(here.device, "transformer_engine", "", (9, 0))

def stored(model):
    state = model_state_dict([model])
    apply_factories(state)
    tensors = [part for part in nested_values(state) if isinstance(part, ShardedTensor)]
    return {part.key: (*part.global_shape, str(part.dtype)) for part in tensors}

model = build_model(run, h100)
classes = {type(module).__name__ for module in model.modules()}
names = [name for name, w in model.named_parameters() if not getattr(w, "allreduce", True)]
run.training.precision, run.training.fp8 = "auto", "delayed"
fp8 = transformer_config(run, h100)
run.training.precision, run.training.fp8 = "fp32", "none"
print(json.dumps(dict(version=version, classes=sorted(classes), experts=names,
                      theirs=stored(model), ours=stored(build_model(run, here)),
                      fp8=[fp8.fp8, fp8.fp8_recipe])))
"""


def test_a_model_of_its_layers_has_the_same_checkpoint() -> None:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(Path(SOURCE or "").resolve())]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {
        "TELayerNormColumnParallelLinear",
        "TERowParallelLinear",
        "PackedAttention",  # of TEDotProductAttention
        "TEGroupedMLP",
        "TEColumnParallelGroupedLinear",
        "LlamaMoeRouter",
    } <= set(found["classes"])
    # A run may change its backend: same keys, shapes and types.
    assert found["theirs"] == found["ours"] and len(found["ours"]) > 20
    # Experts' weights, and nothing else, are reduced over the experts' own ranks.
    assert len(found["experts"]) == 2 * 4 * 2
    assert all(".experts.linear_fc" in name for name in found["experts"])
    assert found["fp8"] == ["hybrid", "delayed"]
