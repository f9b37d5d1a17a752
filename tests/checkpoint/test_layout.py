from pathlib import Path

import pytest

from megatron_ext.checkpoint import layout
from megatron_ext.config import ModelConfig
from megatron_ext.errors import UserError


def test_model_config_comes_back(tmp_path: Path) -> None:
    assert layout.find_model_config(tmp_path) is None
    model = ModelConfig(num_experts=8, moe_score_scale=[4.0] * 32, moe_dense_first_layers=1)
    layout.write_model_config(tmp_path, model)
    assert layout.read_model_config(tmp_path) == model
    with pytest.raises(UserError, match="not a checkpoint"):
        layout.read_model_config(tmp_path / "elsewhere")


def test_latest_iteration(tmp_path: Path) -> None:
    assert layout.latest_iteration(tmp_path) is None
    layout.write_latest(tmp_path, 120)
    assert layout.latest_iteration(tmp_path) == 120
    assert layout.iteration_dir(tmp_path, 120).name == "iter_0000120"
    (tmp_path / layout.LATEST_FILE).write_text("release")
    with pytest.raises(UserError, match="should hold a number"):
        layout.latest_iteration(tmp_path)


def test_output_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "new" / "model"
    with pytest.raises(RuntimeError), layout.staged_directory(output) as folder:
        (folder / "weights").write_text("half")
        raise RuntimeError
    assert list((tmp_path / "new").iterdir()) == []
    with layout.staged_directory(output) as folder:
        (folder / layout.MODEL_FILE).write_text("whole")
        assert not output.exists()
    assert [path.name for path in output.iterdir()] == [layout.MODEL_FILE]


def test_force_replaces_models_only(tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "thesis"
    for folder, name in ((model, layout.MODEL_FILE), (other, "chapter1.tex")):
        folder.mkdir()
        (folder / name).write_text("old")
        with pytest.raises(UserError, match="is not empty"):
            layout.check_output(folder, force=False)
    with pytest.raises(UserError, match="holds no model"):
        layout.check_output(other, force=True)
    with layout.staged_directory(model, force=True) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in model.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "thesis"]
