"""TransformerEngine's Python classes without its compiled extension, on a machine without a GPU.

Nothing can be computed with them. But megatron-core's wrappers, the layer specs and the modules are
the real ones, built with the arguments that a GPU run would pass.
"""

from __future__ import annotations

import enum
import importlib
import importlib.machinery
import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import torch

ABSENT = ("transformer_engine_torch", "einops", "onnx", "onnxscript", "onnxscript.ir")
"""The extension, and what TransformerEngine imports besides: where one is missing, a stand-in."""


class _Absent(ModuleType):
    """A module that has any name: enumerations with the members that the source uses, or mocks."""

    __path__: list[str] = []

    def __init__(self, name: str, source: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self._source = source

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        used = set(re.findall(rf"\b{name}\.(k?[A-Z]\w+)", self._source)) - {"kX"}  # a comment's
        is_enumeration = name[0].isupper() and used
        value = enum.IntEnum(name, sorted(used), start=0) if is_enumeration else MagicMock()
        setattr(self, name, value)
        return value


def install(source: Path) -> str:
    """Let `import transformer_engine` find the package unpacked in `source`. Once per process, and
    before megatron-core is imported.

    Returns:
        Its version.
    """
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its own switch: load no CUDA library
    sys.path.insert(0, str(source))
    files = (source / "transformer_engine" / "pytorch").rglob("*.py")
    text = "\n".join(file.read_text() for file in files)
    for name in ABSENT:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = _Absent(name, text)
    # The older versions take it by `import *`, which finds no name that was not asked for yet.
    sys.modules["transformer_engine_torch"].get_cudnn_version = lambda: 91900  # type: ignore[attr-defined]
    import transformer_engine

    transformer_engine.common.load_framework_extension = lambda framework: None
    for name in [name for name in sys.modules if name.startswith("transformer_engine.pytorch")]:
        del sys.modules[name]  # half imported: it had asked for the extension
    import transformer_engine.pytorch

    return str(transformer_engine.__version__)


def pretend_gpu() -> None:
    """What modules ask before they let themselves be built. After `platform.setup("cpu")`."""
    h100 = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)
    for name, answer in (
        ("is_available", True),
        ("get_device_capability", (9, 0)),
        ("get_device_properties", h100),
        ("_lazy_init", None),
    ):
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
