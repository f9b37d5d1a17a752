"""Dense weights on disk under Hugging Face names, one tensor at a time: safetensors and GGUF."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_ext.errors import UserError

# llama.cpp's names; {} is the layer's number.
GGUF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
GGUF_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Source(Protocol):
    """Weights under their Hugging Face names."""

    config: dict[str, Any]
    """Contents of config.json."""
    dtype: torch.dtype
    names: set[str]

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str) -> Tensor: ...

    def prefetch(self, names: Sequence[str]) -> None:
        """Read these, and no others, in the background: they are asked for next."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes lie."""

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class SafetensorsSource:
    """A Hugging Face directory with safetensors files, read tensor by tensor.

    Read, not mapped: a page fault costs more than copying the page, and mapped pages would count
    as this process's memory. One thread reads ahead; two streams at once would be slower together.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the directory and check every file's header against the file's size.

        Raises:
            UserError: no config.json, no safetensors, a missing or truncated file, a wrong index,
                a type of numbers that is not floating point.
        """
        self.path = Path(path)
        self.config = read_hf_config(self.path)
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._ahead: dict[str, Future[Tensor]] = {}
        self._places: dict[str, _Place] = {}
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            for file in sorted(set(weight_map.values())):
                self._open(self.path / file)
            for name, file in weight_map.items():
                if name not in self._places or self._places[name].file != self.path / file:
                    raise UserError(
                        f"{self.path / file} lacks {name}, which {index.name} places there"
                    )
        elif (self.path / "model.safetensors").is_file():
            self._open(self.path / "model.safetensors")
        else:
            raise UserError(
                f"{path} holds neither model.safetensors nor model.safetensors.index.json",
                "save the model as safetensors (transformers' save_pretrained does)",
            )
        self.names = set(self._places)
        some = "model.embed_tokens.weight"
        self.dtype = self._places[some if some in self.names else min(self.names)].dtype

    def _open(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        if not file.is_file():
            raise UserError(f"weight file {file} is missing", "download the model again")
        try:
            with safe_open(
                file, "pt"
            ):  # checks the header, and that the file is as long as it says
                pass
        except SafetensorError as error:
            raise UserError(
                f"weight file {file} is truncated or damaged ({error})", "download it again"
            ) from None
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if name in self._places:
                other = self._places[name].file
                raise UserError(f"tensor {name} is in {other.name} and in {file.name}")
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                raise UserError(
                    f"{file}: {name} holds numbers of type {entry['dtype']}",
                    f"use a model that is not quantized: {', '.join(SAFETENSORS_DTYPES)}",
                )
            start, end = entry["data_offsets"]
            self._places[name] = _Place(
                file,
                8 + size + start,
                end - start,
                SAFETENSORS_DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
            )

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def tensor(self, name: str) -> Tensor:
        ahead = self._ahead.pop(name, None)
        return self._read(name) if ahead is None else ahead.result()

    def prefetch(self, names: Sequence[str]) -> None:
        for name in self._ahead.keys() - set(names):
            self._ahead.pop(name).cancel()
        for name in names:
            if name not in self._ahead:
                self._ahead[name] = self._reader.submit(self._read, name)

    def _read(self, name: str) -> Tensor:
        place = self._places[name]
        data = np.empty(place.nbytes, np.uint8)  # numpy asks for huge pages, torch does not
        left = data.data
        with place.file.open("rb", buffering=0) as stream:
            stream.seek(place.offset)
            while left:
                count = stream.readinto(left)
                if not count:
                    raise UserError(f"weight file {place.file} became shorter", "download it again")
                left = left[count:]
        return torch.from_numpy(data).view(place.dtype).view(place.shape)


class GgufSource:
    """A llama.cpp file of Llama architecture, de-quantized to fp32."""

    dtype = torch.float32

    def __init__(self, path: str | Path) -> None:
        """Open the file and read its description.

        Raises:
            UserError: not GGUF, truncated, or RoPE factors that the format does not explain.
        """
        from gguf import GGUFReader
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"weight file {path} is missing")
        try:
            reader = GGUFReader(self.path)
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
            described = load_gguf_checkpoint(str(self.path), return_tensors=False)
        except (ValueError, IndexError, KeyError) as error:
            raise UserError(
                f"{path} is not a readable GGUF file ({error})", "is the download complete?"
            ) from None
        self.config = described["config"]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = described["tokenizer_config"].get(key)
            if value is not None:
                self.config.setdefault(key, value)
        architecture = self.config.get("model_type")
        self.config["architectures"] = [
            {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}.get(
                str(architecture), str(architecture)
            )
        ]
        if "rope_freqs.weight" in self._tensors:
            raise UserError(
                f"{path} scales RoPE (rope_freqs.weight) without saying how",
                "import the Hugging Face directory of this model",
            )
        self._hf_names = {hf_name(name): name for name in self._tensors}
        self.names = set(self._hf_names)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(extent) for extent in reversed(self._tensors[self._hf_names[name]].shape))

    def tensor(self, name: str) -> Tensor:
        from gguf import dequantize

        stored = self._tensors[self._hf_names[name]]
        values = np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32)
        weight = torch.from_numpy(values)
        if name.endswith("q_proj.weight"):
            return _unpermute(weight, self.config["num_attention_heads"])
        if name.endswith("k_proj.weight"):
            return _unpermute(weight, self.config["num_key_value_heads"])
        return weight

    def prefetch(self, names: Sequence[str]) -> None:
        """Nothing: taking the numbers apart is slower than any disk."""


def hf_name(gguf_name: str) -> str:
    """Hugging Face's name of a tensor of a llama.cpp file; unknown names stay as they are."""
    if gguf_name.startswith("blk."):
        _, layer, rest = gguf_name.split(".", 2)
        return f"model.layers.{layer}.{GGUF_LAYER_NAMES.get(rest, rest)}"
    return GGUF_NAMES.get(gguf_name, gguf_name)


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """[heads d, h] from llama.cpp's RoPE order (neighbouring pairs) to Hugging Face's (halves)."""
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def read_hf_config(path: Path) -> dict[str, Any]:
    """config.json of a Hugging Face directory."""
    try:
        config: dict[str, Any] = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is not a Hugging Face directory: it has no config.json") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path / 'config.json'} is not JSON: {error}") from None
    return config
