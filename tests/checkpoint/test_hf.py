"""Reading Hugging Face directories and GGUF files."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from megatron_ext.checkpoint import verify
from megatron_ext.checkpoint.hf import HfWeights, model_from_hf, open_weights, rope_to_hf
from megatron_ext.checkpoint.sources import (
    GGUF_LAYER_NAMES,
    GGUF_NAMES,
    GgufSource,
    SafetensorsSource,
)
from megatron_ext.checkpoint.tensors import tensor_shapes
from megatron_ext.errors import UserError
from tests.checkpoint.tiny import LLAMA3_ROPE, save_llama


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True},
        {"rope_parameters": LLAMA3_ROPE},
        {"head_dim": 16, "num_key_value_heads": 1},
        {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ],
    ids=["grouped", "tied", "llama3", "wide-heads", "theta"],
)
def test_logits_equal_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    weights = open_weights(save_llama(tmp_path, **options))
    tokens = verify.prompt(weights.model, 200)
    theirs = verify.hf_logits(LlamaForCausalLM.from_pretrained(tmp_path), tokens)
    ours = verify.logits(verify.fill(verify.build_model(weights.model), weights), tokens)
    assert theirs.abs().max() > 1  # or the comparison would say little
    assert verify.relative_error(ours, theirs) <= 1e-5


def test_rope_is_read_in_the_form_of_every_transformers_version(tmp_path: Path) -> None:
    save_llama(tmp_path, rope_parameters=LLAMA3_ROPE)
    new = json.loads((tmp_path / "config.json").read_text())
    model = model_from_hf(new)
    assert (model.rotary_base, model.rope_scaling_factor) == (10000.0, 4.0)
    assert rope_to_hf(model) == LLAMA3_ROPE
    rope = new.pop("rope_parameters")
    old = new | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert model_from_hf(old) == model
    plain = new | {"rope_theta": 5e5, "rope_scaling": None}
    assert model_from_hf(plain).rotary_base == 5e5
    assert model_from_hf(plain).rope_scaling_factor is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM is not a dense LLaMA"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "linear"),
        ({"rope_parameters": LLAMA3_ROPE | {"high_freq_factor": 8.0}}, "high_freq_factor=8.0"),
        ({"num_hidden_layers": 4}, "lacks model.layers.3.input_layernorm.weight"),
        ({"num_hidden_layers": 2}, "holds model.layers.2.input_layernorm.weight"),
    ],
)
def test_what_is_not_a_llama_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    edit_config(save_llama(tmp_path), **change)
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path)


def test_sliding_windows_are_refused_and_full_mistral_is_read(tmp_path: Path) -> None:
    save_llama(tmp_path)
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    edit_config(tmp_path, **mistral, sliding_window=64)
    with pytest.raises(UserError, match="sliding_window=64 is below max_position_embeddings=256"):
        open_weights(tmp_path)
    edit_config(tmp_path, **mistral, sliding_window=None)
    weights = open_weights(tmp_path)
    tokens = verify.prompt(weights.model)
    theirs = verify.hf_logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens)
    ours = verify.logits(verify.fill(verify.build_model(weights.model), weights), tokens)
    assert verify.relative_error(ours, theirs) <= 1e-5


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    save_llama(tmp_path)
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    whole = first.read_bytes()
    first.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=f"{first.name} is truncated or damaged"):
        open_weights(tmp_path)
    first.write_bytes(whole[:5])
    with pytest.raises(UserError, match=f"{first.name} is truncated or damaged"):
        open_weights(tmp_path)
    first.unlink()
    with pytest.raises(UserError, match=f"{first.name} is missing"):
        open_weights(tmp_path)
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match=f"is in {first.name} and in {second.name}"):
        open_weights(tmp_path)


def test_unknown_tensors_are_refused_and_known_leftovers_ignored(tmp_path: Path) -> None:
    save_llama(tmp_path)
    first = min(tmp_path.glob("*.safetensors"))
    index = tmp_path / "model.safetensors.index.json"

    def add(name: str) -> None:
        save_file(load_file(first) | {name: torch.zeros(2)}, first)
        contents = json.loads(index.read_text())
        contents["weight_map"][name] = first.name
        index.write_text(json.dumps(contents))

    add("model.layers.0.self_attn.rotary_emb.inv_freq")
    open_weights(tmp_path)
    add("model.layers.0.self_attn.q_proj.bias")
    with pytest.raises(UserError, match="q_proj.bias, which a LLaMA has not"):
        open_weights(tmp_path)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config.json"):
        open_weights(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        open_weights(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="neither model.safetensors nor"):
        open_weights(tmp_path)


def write_gguf(path: Path, source: SafetensorsSource) -> None:
    """What llama.cpp's converter makes of a LLaMA: its names, RoPE order, and Q8_0 matrices."""
    config = source.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    names = {hf: ours for ours, hf in GGUF_NAMES.items()}
    layer_names = {hf: ours for ours, hf in GGUF_LAYER_NAMES.items()}
    for name in sorted(source.names):
        values = source.tensor(name).numpy()
        heads = {"q": "num_attention_heads", "k": "num_key_value_heads"}
        for which, count in heads.items():
            if name.endswith(f"{which}_proj.weight"):
                shape = (config[count], 2, values.shape[0] // config[count] // 2, -1)
                values = values.reshape(shape).swapaxes(1, 2).reshape(values.shape)
        if name in names:
            stored = names[name]
        else:
            _, _, layer, rest = name.split(".", 3)
            stored = f"blk.{layer}.{layer_names[rest]}"
        if values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, np.array(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    save_llama(tmp_path / "hf", hidden_size=64, vocab_size=96, tie_word_embeddings=True)
    file = tmp_path / "gguf" / "model.gguf"
    file.parent.mkdir()
    write_gguf(file, SafetensorsSource(tmp_path / "hf"))
    ours = HfWeights(GgufSource(file))
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).state_dict()
    assert ours.source.names == theirs.keys() - {"lm_head.weight"}
    for name in ours.source.names:
        assert torch.equal(ours.source.tensor(name), theirs[name]), name
    exact = open_weights(tmp_path / "hf")
    assert ours.model.kv_heads == 2 and not ours.model.untie_embeddings_and_output_weights
    for key in tensor_shapes(ours.model):  # 8 bits of the same weights
        assert verify.relative_error(ours.tensor(key), exact.tensor(key)) < 0.01, key


def test_damaged_gguf_is_refused(tmp_path: Path) -> None:
    save_llama(tmp_path / "hf", hidden_size=64, vocab_size=96)
    file = tmp_path / "model.gguf"
    write_gguf(file, SafetensorsSource(tmp_path / "hf"))
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(UserError, match="not a readable GGUF file"):
        open_weights(file)
    file.write_bytes(b"hello")
    with pytest.raises(UserError, match="not a readable GGUF file"):
        open_weights(file)
