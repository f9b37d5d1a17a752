"""Statistics of a dense model against transformers' autograd in float64, on every grid."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint import tiny
from data.chats import write_conversations
from ranks import run_ranks
from torch import Tensor
from training.runs import DOMAINS, VOCABULARY, write_data
from transformers import LlamaForCausalLM

from megatron_ext.checkpoint import experts
from megatron_ext.checkpoint.reader import CheckpointWeights
from megatron_ext.construction.clustering import balanced_kmeans
from megatron_ext.construction.statistics import Statistics
from megatron_ext.data.conversation_stream import ConversationStream
from megatron_ext.data.stream import TokenStream
from megatron_ext.errors import UserError
from megatron_ext.training import samples

LAYERS, LENGTH, SAMPLES = 4, 16, 5
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"


def tool() -> ModuleType:
    """tools/collect_statistics.py as a module."""
    name = "collect_statistics"
    if name not in sys.modules:
        path = Path(__file__).resolve().parents[2] / "tools" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of three domains, a LLaMA of transformers, and the same as our checkpoint."""
    path = tmp_path_factory.mktemp("collect")
    (path / "data").mkdir()
    write_data(path / "data")
    tiny.save_llama(path / "hf", vocab_size=VOCABULARY, num_hidden_layers=LAYERS)
    tiny.convert("import", "--source", path / "hf", "--output", path / "dense", "--skip-verify")
    return path


def collect(root: Path, output: Path, ranks: int = 1, **options: Any) -> Statistics:
    """Run the tool on that many ranks."""
    run_ranks(ranks, _collect, root, output, options)
    return Statistics.open(output)


def _collect(root: Path, output: Path, options: dict[str, Any]) -> None:
    values: dict[str, Any] = dict(
        seq_length=LENGTH, num_samples=SAMPLES, num_inputs=40, save_interval=4, device="cpu"
    )
    tool().collect(tool().Options(root / "dense", root / "data", output, **values | options))


@pytest.fixture(scope="module")
def single(root: Path) -> Statistics:
    """Groups are the domains; one process, one sample at a time."""
    return collect(root, root / "single")


def keep_gradient(seen: dict[Any, Tensor], key: Any, module: Any, args: Any) -> None:
    args[0].retain_grad()
    seen[key] = args[0]


class Reference:
    """What every token does in transformers' model, in float64: [P, S, ...] for each layer."""

    def __init__(self, root: Path, counted: Tensor | None = None) -> None:
        model = LlamaForCausalLM.from_pretrained(root / "hf").double()
        pool = make_pool(root)
        self.counted = torch.ones(pool.size, LENGTH) if counted is None else counted
        self.inputs, self.change, self.gradient = ([[] for _ in range(LAYERS)] for _ in range(3))
        self.hidden = []
        for sample in range(pool.size):
            tokens = torch.from_numpy(pool.read(sample).astype(np.int64))
            seen: dict[tuple[str, int], Tensor] = {}
            hooks = []
            for layer, block in enumerate(model.model.layers):
                for name in ("gate_proj", "down_proj"):
                    see = functools.partial(keep_gradient, seen, (name, layer))
                    module = getattr(block.mlp, name)
                    hooks.append(module.register_forward_pre_hook(see))
            output = model(tokens[None, :-1], output_hidden_states=True)
            losses = torch.nn.functional.cross_entropy(
                output.logits[0], tokens[1:], reduction="none"
            )
            (losses * self.counted[sample]).sum().backward()
            self.hidden.append(output.hidden_states[-1][0].detach())
            for hook in hooks:
                hook.remove()
            for layer in range(LAYERS):
                h = seen["down_proj", layer]
                assert h.grad is not None
                self.inputs[layer].append(seen["gate_proj", layer][0].detach())
                self.change[layer].append((h * h.grad)[0].abs().detach())
                self.gradient[layer].append(h.grad[0].abs())

    def check(self, statistics: Statistics, groups: list[Tensor], tolerance: float = 1e-5) -> None:
        """Compare every sum, given the group of each token [P, S] in each layer."""
        for number in range(LAYERS):
            layer = statistics.layer(number)
            sums = {"importance": self.change, "gradient": self.gradient, "input_mean": self.inputs}
            for name, values in sums.items():
                expected = torch.zeros_like(getattr(layer, name))
                tokens = torch.zeros_like(layer.tokens)
                for sample, sample_values in enumerate(values[number]):
                    for position in range(LENGTH):
                        if self.counted[sample, position]:
                            group = int(groups[number][sample, position])
                            expected[group] += sample_values[position]
                            tokens[group] += 1
                assert torch.equal(layer.tokens, tokens)
                if name == "input_mean":
                    expected /= tokens.clamp(min=1).unsqueeze(1)
                assert close(getattr(layer, name), expected, tolerance), (name, number)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Within a part of the largest value of each row."""
    error = (found.double() - expected.double()).abs().amax(1)
    return bool((error <= tolerance * expected.double().abs().amax(1)).all())


def make_pool(root: Path, num_inputs: int = 40) -> samples.SamplePool:
    streams = {
        name: TokenStream(root / "data" / name, LENGTH, 1234, name) for name in sorted(DOMAINS)
    }
    return samples.SamplePool(streams, SAMPLES, LENGTH, num_inputs, 1234)


def by_sample(groups: Any) -> list[Tensor]:
    """Groups of samples [P] as groups of tokens in every layer."""
    return [torch.as_tensor(groups).unsqueeze(1).expand(-1, LENGTH)] * LAYERS


@pytest.fixture(scope="module")
def reference(root: Path) -> Reference:
    return Reference(root)


def test_sums_are_those_of_autograd(root: Path, single: Statistics, reference: Reference) -> None:
    assert single.groups == sorted(DOMAINS)
    assert single.fingerprint == experts.fingerprint(CheckpointWeights(root / "dense"))
    reference.check(single, by_sample(make_pool(root).domains))
    assert not (root / "single" / "partial").exists()


def test_kept_inputs_are_those_of_the_picked_tokens(
    root: Path, single: Statistics, reference: Reference
) -> None:
    pool = make_pool(root)
    sample, position = np.divmod(pool.picked, LENGTH)
    assert len(set(pool.picked.tolist())) == 40
    for number in range(LAYERS):
        layer = single.layer(number)
        assert layer.inputs is not None and layer.input_groups is not None
        expected = torch.stack(
            [reference.inputs[number][i][j] for i, j in zip(sample, position, strict=True)]
        )
        assert layer.inputs.dtype == torch.float32 and close(layer.inputs, expected)
        assert layer.input_groups.tolist() == pool.domains[sample].tolist()


GRIDS: dict[str, tuple[int, dict[str, Any]]] = {
    "micro-batches of 4, with padding": (1, {"micro_batch_size": 4}),
    "one chunk": (1, {"micro_batch_size": 2, "save_interval": 100}),
    "DP2": (2, {"micro_batch_size": 2}),
    "TP2": (2, {TP: 2}),
    "PP2": (2, {PP: 2}),
    "TP2xPP2": (4, {TP: 2, PP: 2, "micro_batch_size": 2}),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_changes_nothing(grid: str, root: Path, single: Statistics, tmp_path: Path) -> None:
    ranks, options = GRIDS[grid]
    found = collect(root, tmp_path / "out", ranks, **options)
    assert found.meta["tokens"] == single.meta["tokens"] == 3 * SAMPLES * LENGTH
    assert found.meta["loss"] == pytest.approx(single.meta["loss"], rel=1e-6)
    for number in range(LAYERS):
        layer, expected = found.layer(number), single.layer(number)
        for field in dataclasses.fields(expected):
            ours, theirs = getattr(layer, field.name), getattr(expected, field.name)
            if theirs is None:
                assert ours is None
            elif theirs.dtype == torch.int64:
                assert torch.equal(ours, theirs), field.name
            else:
                assert close(ours, theirs), field.name


@pytest.mark.parametrize("options", [{}, {PP: 2, TP: 2}], ids=["one rank", "TP2xPP2"])
def test_positions_without_loss_are_left_out(
    options: dict[str, Any], root: Path, tmp_path: Path
) -> None:
    """Nor do they move: their loss is in no gradient."""
    run_ranks(4 if options else 1, _collect_masked, root, tmp_path / "out", options)
    mask = torch.ones(3 * SAMPLES, LENGTH)
    mask[:, 3::4] = 0
    masked = Reference(root, mask)
    masked.check(Statistics.open(tmp_path / "out"), by_sample(make_pool(root).domains))
    kept = Statistics.open(tmp_path / "out").layer(0).inputs
    assert kept is not None and len(kept) == int((make_pool(root).picked % 4 != 3).sum())


def _collect_masked(root: Path, output: Path, options: dict[str, Any]) -> None:
    whole = samples.SamplePool.micro_batches

    def masked(*arguments: Any) -> list[dict[str, Tensor]]:
        batches = whole(*arguments)
        for batch in batches:
            batch["loss_mask"][:, 3::4] = 0
        return batches

    samples.SamplePool.micro_batches = masked  # type: ignore[method-assign]
    _collect(root, output, options)


@pytest.mark.parametrize("groups", ["domains", "hidden", "centroids"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_interrupted_collection_ends_with_the_same_bits(
    groups: str, ranks: int, root: Path, tmp_path: Path
) -> None:
    options = {"groups": groups, "num_clusters": 3, PP: ranks}
    collect(root, tmp_path / "whole", ranks, **options)
    for chunk in (1, 3):
        with pytest.raises(AssertionError, match="power cut"):
            run_ranks(ranks, _interrupted, root, tmp_path / "parts", options, chunk)
        with pytest.raises(UserError, match="not finished"):
            Statistics.open(tmp_path / "parts")
    assert (tmp_path / "parts" / "partial" / "progress.json").is_file()
    collect(root, tmp_path / "parts", ranks, **options)
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(files) == LAYERS + 1
    assert files == sorted(path.name for path in (tmp_path / "parts").iterdir())
    for name in files:
        ours, theirs = ((tmp_path / place / name).read_bytes() for place in ("parts", "whole"))
        assert ours == theirs, name


def _interrupted(root: Path, output: Path, options: dict[str, Any], chunk: int) -> None:
    """Stop in the middle of writing the last pass's chunk."""
    from megatron_ext.training.collect import Collector

    save = Collector._save_progress

    def stop(self: Any, name: str, done: int, loss: list[float]) -> None:
        if name == "sums" and done == chunk:
            raise RuntimeError("power cut")
        save(self, name, done, loss)

    Collector._save_progress = stop  # type: ignore[method-assign]
    _collect(root, output, options)


@pytest.mark.parametrize("grid", [(1, {}), (2, {PP: 2}), (2, {TP: 2})], ids=["one", "PP2", "TP2"])
def test_groups_by_last_hidden_states(
    grid: tuple[int, dict[str, Any]], root: Path, reference: Reference, tmp_path: Path
) -> None:
    ranks, options = grid
    found = collect(root, tmp_path / "out", ranks, groups="hidden", num_clusters=3, **options)
    means = torch.stack([hidden.mean(0) for hidden in reference.hidden])
    labels, _ = balanced_kmeans(means, 3, 1234)
    assert found.groups == ["cluster_0", "cluster_1", "cluster_2"]
    reference.check(found, by_sample(labels))


@pytest.mark.parametrize("grid", [(1, {}), (2, {TP: 2}), (4, {PP: 2})], ids=["one", "TP2", "DPxPP"])
def test_groups_by_centroids_of_ffn_inputs(
    grid: tuple[int, dict[str, Any]], root: Path, reference: Reference, tmp_path: Path
) -> None:
    ranks, options = grid
    found = collect(root, tmp_path / "out", ranks, groups="centroids", num_clusters=4, **options)
    groups = []
    for number in range(LAYERS):
        layer = found.layer(number)
        assert layer.centroids is not None and layer.inputs is not None
        _, expected = balanced_kmeans(layer.inputs, 4, 1234)
        assert torch.equal(layer.centroids, expected)
        inputs = torch.stack(reference.inputs[number])
        groups.append((inputs @ layer.centroids.double().t()).argmax(-1))
        assert layer.input_groups is not None
        assert torch.equal(layer.input_groups, (layer.inputs @ layer.centroids.t()).argmax(-1))
    reference.check(found, groups)


@pytest.mark.parametrize("ranks", [1, 4])
def test_conversations(ranks: int, root: Path, tmp_path: Path) -> None:
    """Packed in rows, but each on its own; only trained tokens count."""
    (tmp_path / "data").mkdir()
    for number, name in enumerate(("chat", "maths")):
        lengths = [3 + (5 * i + number) % 11 for i in range(9)]
        write_conversations(tmp_path / "data", name, lengths, VOCABULARY, number)
    (tmp_path / "dense").symlink_to(root / "dense")
    grid = {TP: 2, PP: 2, "micro_batch_size": 2} if ranks > 1 else {}
    found = collect(tmp_path, tmp_path / "out", ranks, task="sft", **grid)
    model = LlamaForCausalLM.from_pretrained(root / "hf").double()
    last = model.model.layers[-1].mlp.down_proj
    expected = torch.zeros(2, 96, dtype=torch.float64)
    trained_tokens = [0, 0]
    for number, name in enumerate(("chat", "maths")):
        stream = ConversationStream(tmp_path / "data" / name, LENGTH, 1234, name)
        for row in (stream.read(index) for index in range(min(SAMPLES, stream.num_samples))):
            for tokens, trained in zip(row.tokens, row.trained, strict=True):
                ids = torch.from_numpy(tokens.astype(np.int64))
                mask = torch.from_numpy(trained[1:].astype(np.float64))
                seen: dict[Any, Tensor] = {}
                hook = last.register_forward_pre_hook(functools.partial(keep_gradient, seen, 0))
                logits = model(ids[None, :-1]).logits[0]
                hook.remove()
                losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
                (losses * mask).sum().backward()
                assert seen[0].grad is not None
                change = (seen[0] * seen[0].grad)[0].abs().detach()
                expected[number] += (change * mask[:, None]).sum(0)
                trained_tokens[number] += int(mask.sum())
    layer = found.layer(LAYERS - 1)
    assert layer.tokens.tolist() == trained_tokens
    assert layer.importance is not None and close(layer.importance, expected)


def test_without_gradients(root: Path, single: Statistics, tmp_path: Path) -> None:
    found = collect(root, tmp_path / "out", skip_gradients=True, num_inputs=0)
    layer = found.layer(2)
    assert layer.importance is None and layer.gradient is None and layer.inputs is None
    assert torch.equal(layer.input_mean, single.layer(2).input_mean)


def test_groups_by_sentences(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--sentence-model"):
        samples.check_sentence_model(None)
    with pytest.raises(UserError, match="not a directory"):
        samples.check_sentence_model(tmp_path / "nothing")
    if importlib.util.find_spec("sentence_transformers") is None:
        with pytest.raises(UserError, match="pip install sentence-transformers"):
            samples.check_sentence_model(tmp_path)
    else:
        assert samples.check_sentence_model(tmp_path) == tmp_path


def test_what_cannot_work_is_refused(root: Path, single: Statistics, tmp_path: Path) -> None:
    def refuse(match: str, output: Path = tmp_path / "out", **options: Any) -> None:
        with pytest.raises(UserError, match=match):
            _collect(root, output, options)

    refuse("complete", root / "single")
    refuse("num_samples=0", num_samples=0)
    refuse("num_inputs=3 tokens cannot make 8", groups="centroids", num_inputs=3)
    refuse("num_clusters=50", groups="hidden", num_clusters=50)
    refuse("not a multiple", **{TP: 2})
    refuse("seq_length=1000", seq_length=1000)
    (tmp_path / "out" / "partial").mkdir(parents=True)
    settings = {"settings": single.meta["settings"] | {"seed": 7}}
    (tmp_path / "out" / "partial" / "progress.json").write_text(json.dumps(settings))
    refuse("another seed")
    moe = tiny.save_checkpoint(tmp_path / "dense", tiny.small_model(num_experts=4))
    assert moe.name == "dense"
    with pytest.raises(UserError, match="has experts"):
        _collect(tmp_path, tmp_path / "other", {})


def test_tokens_that_the_model_does_not_know(root: Path, tmp_path: Path) -> None:
    tiny.save_llama(tmp_path / "hf", vocab_size=64, num_hidden_layers=LAYERS)
    hf, dense = tmp_path / "hf", tmp_path / "dense"
    tiny.convert("import", "--source", hf, "--output", dense, "--skip-verify")
    (tmp_path / "data").symlink_to(root / "data")
    with pytest.raises(AssertionError, match="the model knows 64"):
        collect(tmp_path, tmp_path / "out")
