"""UpIT's stage 3 against transformers' models and autograd in float64, and on grids."""

from __future__ import annotations

import functools
import json
import os
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint import tiny
from commands import ROOT
from data.chats import write_conversations
from numpy.typing import NDArray
from ranks import run_ranks
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import LlamaForCausalLM

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.reader import CheckpointWeights
from megatron_ext.checkpoint.tensors import ROUTER, layer_key, tensor_shapes
from megatron_ext.construction.buckets import assign_buckets, class_weights, hold_out
from megatron_ext.data.conversation_stream import ConversationStream
from megatron_ext.errors import UserError
from megatron_ext.training.router_progress import RouterProgress
from megatron_ext.training.seeds import SeedSamples

TP, PP, CP, EP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)
DATA_SETS = ("chat", "code", "maths", "prose")
EXPERTS, LAYERS, LENGTH, VOCABULARY = 4, 2, 32, 128
WORDS = 8
OPTIONS: dict[str, Any] = {
    "seed_fraction": 0.5,
    "held_out": 0.25,
    "epochs": 12,
    "lr": 0.02,
    "seq_length": LENGTH,
    "micro_batch_size": 2,
    "device": "cpu",
}


def tool() -> Any:
    return runpy.run_path(str(ROOT / "tools" / "initialise_router.py"))


def _initialise(root: Path, save: Path, options: dict[str, Any]) -> None:
    names = tool()
    values = {"load": root / "moe", "data_dir": root / "data", **OPTIONS, **options}
    names["initialise"](names["Options"](save=save, **values))


def initialise(root: Path, save: Path, ranks: int = 1, **options: Any) -> dict[str, Any]:
    """Run the tool on that many ranks; its report."""
    run_ranks(ranks, _initialise, root, save, options)
    report: dict[str, Any] = json.loads((save / "router_init.json").read_text())
    return report


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets of different words, and a mixture of four models, each tuned on one of them."""
    path = tmp_path_factory.mktemp("router_init")
    (path / "data").mkdir()
    base = {"num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    tiny.save_llama(path / "base", **base)
    for number, name in enumerate(DATA_SETS):
        lengths = [5 + (7 * n + number) % 13 for n in range(30)]
        words = range(number * WORDS, (number + 1) * WORDS)
        write_conversations(path / "data", name, lengths, words.stop, number, words.start)
        tune(path / "base", words, number).save_pretrained(path / f"hf{number}")
    sources = [option for number in range(EXPERTS) for option in ("--source", path / f"hf{number}")]
    tiny.convert("upit", "--base", path / "base", *sources, "--num-experts", EXPERTS,
                 "--output", path / "moe", "--skip-verify")  # fmt: skip
    return path


def tune(base: Path, words: range, seed: int) -> LlamaForCausalLM:
    """Its FFNs, to expect nothing but these words."""
    model = LlamaForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(seed)
    ffns = [weights for name, weights in model.named_parameters() if ".mlp." in name]
    optimizer = torch.optim.Adam(ffns, 3e-3)
    for _ in range(15):
        tokens = torch.randint(words.start, words.stop, (8, LENGTH), generator=generator)
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def single(root: Path) -> dict[str, Any]:
    return initialise(root, root / "single")


def routers(folder: Path) -> Tensor:
    weights = CheckpointWeights(folder)
    layers = weights.model.moe_layers
    return torch.stack([weights.tensor(layer_key(layer, ROUTER)) for layer in layers])


# --- the reference --------------------------------------------------------------------------------


class Reference:
    """One conversation at a time through transformers' dense models in float64."""

    def __init__(self, root: Path) -> None:
        streams = {
            name: ConversationStream(root / "data" / name, LENGTH, 1234, name, "padded")
            for name in DATA_SETS
        }
        self.seeds = SeedSamples(streams, OPTIONS["seed_fraction"], LENGTH, "packed", 1234)
        models = [
            LlamaForCausalLM.from_pretrained(root / f"hf{seed}").double().requires_grad_(False)
            for seed in range(EXPERTS)
        ]
        self.model = models[-1]
        self.ffns = [[block.mlp for block in model.model.layers] for model in models]

    def use(self, expert: int) -> None:
        for layer, block in enumerate(self.model.model.layers):
            block.mlp = self.ffns[expert][layer]

    def loss(self, sample: int) -> Tensor:
        """Sum over the trained tokens."""
        talk = self.seeds._contents[sample]
        tokens = torch.from_numpy(talk.tokens[0].astype(np.int64))  # type: ignore[union-attr]
        trained = torch.from_numpy(talk.trained[0][1:].astype(np.float64))  # type: ignore[union-attr]
        logits = self.model(tokens[None], use_cache=False).logits[0]
        return (cross_entropy(logits[:-1], tokens[1:], reduction="none") * trained).sum()

    def losses(self) -> NDArray[np.float64]:
        found = np.zeros((self.seeds.size, EXPERTS))
        for expert in range(EXPERTS):
            self.use(expert)
            for sample in range(self.seeds.size):
                found[sample, expert] = self.loss(sample) / self.seeds.trained[sample]
        return found

    def step_loss(
        self, vectors: Tensor, buckets: NDArray[np.int64], samples: list[int], options: Any
    ) -> Tensor:
        """0.5 LM + 0.5 binary over all samples at once, for vectors [L, E, h]."""
        tokens = np.bincount(buckets[samples], self.seeds.lengths[samples], EXPERTS)
        own, other = map(torch.from_numpy, class_weights(tokens, options["negatives"]))
        lm, binary = torch.zeros(()), torch.zeros(())
        for sample in samples:
            bucket = int(buckets[sample])
            self.use(bucket)
            seen: list[Tensor] = []
            hooks = [
                block.mlp.register_forward_hook(
                    functools.partial(weigh, seen, vectors[layer, bucket], options["gate"])
                )
                for layer, block in enumerate(self.model.model.layers)
            ]
            lm = lm + self.loss(sample)
            for hook in hooks:
                hook.remove()
            for layer in range(LAYERS):
                logits = seen[layer] @ vectors[layer].T
                for expert in range(EXPERTS):
                    if expert == bucket:
                        binary = binary - own[expert] * logsigmoid(logits[:, expert]).sum()
                    else:
                        binary = binary - other[expert] * logsigmoid(-logits[:, expert]).sum()
        pairs = self.seeds.lengths[samples].sum() * LAYERS * EXPERTS
        return 0.5 * lm / self.seeds.trained[samples].sum() + 0.5 * binary / pairs


def weigh(
    seen: list[Tensor], vector: Tensor, gate: str, module: Any, args: Any, output: Tensor
) -> Tensor:
    """An FFN's output by its gate, and note what the FFN read."""
    seen.append(args[0][0].detach())
    weight = (args[0] @ vector).sigmoid().unsqueeze(-1)
    if gate == "straight_through":
        weight = weight + (1 - weight).detach()
    return output * weight


@pytest.fixture(scope="module")
def reference(root: Path) -> Reference:
    return Reference(root)


def test_perplexities_and_buckets(root: Path, single: Any, reference: Reference) -> None:
    losses = reference.losses()
    buckets = assign_buckets(losses, 1.0)
    trained = reference.seeds.trained
    for bucket in range(EXPERTS):
        members = np.flatnonzero(buckets == bucket)
        expected = (losses[members] * trained[members, None]).sum(0) / trained[members].sum()
        np.testing.assert_allclose(single["bucket_loss"][bucket], expected, rtol=1e-5)
    assert single["samples"] == 60 and single["bucket_sizes"] == [15] * EXPERTS
    assert single["held_out"] == EXPERTS * 3
    domains = np.array([single["bucket_domains"][name] for name in DATA_SETS])
    assert (domains.sum(0) == 15).all()
    assert domains.trace() > 40  # most are in the bucket of the expert that was tuned on the like


@pytest.mark.parametrize(
    ("gate", "negatives"), [("sigmoid", "others"), ("straight_through", "none")]
)
def test_vectors_are_those_of_autograd(
    root: Path, reference: Reference, tmp_path: Path, gate: str, negatives: str
) -> None:
    """Three steps over all data; conversations are packed in ours, alone in the reference."""
    options = {"gate": gate, "negatives": negatives, "epochs": 3, "global_batch_size": 64}
    report = initialise(root, tmp_path / "out", **options)
    buckets = assign_buckets(reference.losses(), 1.0)
    samples = np.flatnonzero(~hold_out(buckets, OPTIONS["held_out"], 1234)).tolist()
    start = routers(root / "moe").double()
    vectors = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([vectors], OPTIONS["lr"])
    losses = []
    for step in range(3):
        optimizer.param_groups[0]["lr"] = OPTIONS["lr"] * (1 + np.cos(np.pi * step / 3)) / 2
        optimizer.zero_grad()
        loss = reference.step_loss(vectors, buckets, samples, options)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found = [(epoch["lm"] + epoch["binary"]) / 2 for epoch in report["epochs"]]
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    assert losses[-1] < losses[0]
    moved, expected = routers(tmp_path / "out").double() - start, vectors.detach() - start
    assert (moved - expected).norm() <= 1e-3 * expected.norm()


# --- what comes out -------------------------------------------------------------------------------

GRIDS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2xEP2": (2, {TP: 2, EP: 2}),
    "PP2 of noisy copies": (2, {PP: 2, "packing": "padded"}),
    "CP2xEP2": (2, {CP: 2, EP: 2, "micro_batch_size": 1}),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_changes_nothing(grid: str, root: Path, single: Any, tmp_path: Path) -> None:
    ranks, options = GRIDS[grid]
    expected, folder, source = single, root / "single", root / "moe"
    if "copies" in grid:  # the first stage has no router; one conversation a row
        source, folder = tmp_path / "copies", tmp_path / "one"
        tiny.convert("upcycle", "--source", root / "base", "--output", source, "--noise", 0.1,
                     "--num-experts", 4, "--moe-layer-freq", 0, 1, "--skip-verify")  # fmt: skip
        options = {"load": source, "epochs": 2, **options}
        expected = initialise(root, folder, **{**options, PP: 1})
    found = initialise(root, tmp_path / "grid", ranks, **options)
    for name in ("bucket_sizes", "bucket_domains", "chance", "held_out"):
        assert found[name] == expected[name]
    np.testing.assert_allclose(found["bucket_loss"], expected["bucket_loss"], rtol=1e-5)
    moved = routers(folder) - routers(source)
    assert (routers(tmp_path / "grid") - routers(folder)).norm() <= 1e-3 * moved.norm()
    for moment in ("before", "after"):
        np.testing.assert_allclose(
            found[moment]["by_bucket"], expected[moment]["by_bucket"], atol=0.02
        )


def test_routers_find_the_expert_of_a_bucket(root: Path, single: Any) -> None:
    """On samples that they were not trained on, in the mixture as it then is."""
    assert single["chance"] == [0.25, 0.5]
    assert single["before"]["mean"][0] < 0.4
    assert single["after"]["mean"][0] > 0.5
    assert single["after"]["mean"][1] > 0.75


def test_only_routers_are_others(root: Path, single: Any) -> None:
    before, after = CheckpointWeights(root / "moe"), CheckpointWeights(root / "single")
    for key in tensor_shapes(before.model):
        same = torch.equal(before.tensor(key), after.tensor(key))
        assert same != key.endswith(ROUTER), key
    construction = layout.read_construction(root / "single")
    source = layout.read_construction(root / "moe")
    assert construction is not None and source is not None
    assert construction["router"]["init"] == "trained" and construction["router"]["epochs"] == 12
    assert {**construction, "router": source["router"]} == source


def _interrupted(root: Path, save: Path, options: dict[str, Any], passes: int) -> None:
    """Stops as a signal stops it, after that many passes."""
    keep = RouterProgress.keep

    def stop(self: RouterProgress, *args: Any) -> None:
        keep(self, *args)
        if self.passes == passes:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RouterProgress, "keep", stop)
        _initialise(root, save, options)


def _finished(root: Path, save: Path, options: dict[str, Any], passes: int) -> None:
    """Goes on to the end, with so many passes."""
    keep, kept = RouterProgress.keep, []

    def count(self: RouterProgress, *args: Any) -> None:
        kept.append(self.passes)
        keep(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RouterProgress, "keep", count)
        _initialise(root, save, options)
    assert len(kept) == passes


@pytest.mark.parametrize(
    ("ranks", "grid", "buckets"),
    [(1, {}, "perplexity"), (2, {PP: 2}, "perplexity"), (1, {}, "random")],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(
    ranks: int, grid: dict[str, Any], buckets: str, root: Path, tmp_path: Path
) -> None:
    options = {**grid, "epochs": 3, "buckets": buckets}
    whole = initialise(root, tmp_path / "whole", ranks, **options)
    scoring = EXPERTS if buckets == "perplexity" else 0
    stops = [stop for stop in (2, EXPERTS, EXPERTS + 1) if scoring or stop < 3]
    for stop in stops:  # each goes on where the one before stopped
        run_ranks(ranks, _interrupted, root, tmp_path / "cut", options, stop)
        assert (tmp_path / ".cut.unfinished").is_file() and not (tmp_path / "cut").exists()
    run_ranks(ranks, _finished, root, tmp_path / "cut", options, scoring + 3 - stops[-1])
    assert json.loads((tmp_path / "cut" / "router_init.json").read_text()) == whole
    assert torch.equal(routers(tmp_path / "cut"), routers(tmp_path / "whole"))
    assert not (tmp_path / ".cut.unfinished").exists()


def test_another_job_does_not_go_on(root: Path, tmp_path: Path) -> None:
    save = tmp_path / "new" / "out"
    run_ranks(1, _interrupted, root, save, {"epochs": 1}, 1)
    index = next((root / "data").rglob("*.idx"))
    times = (index.stat().st_atime_ns, index.stat().st_mtime_ns)
    os.utime(index)  # as new data would
    with pytest.raises(UserError, match="differs in files of data_dir"):
        _initialise(root, save, {"epochs": 1})
    os.utime(index, ns=times)
    with pytest.raises(UserError, match="differs in lr"):
        _initialise(root, save, {"epochs": 1, "lr": 0.5})
    run_ranks(1, _finished, root, save, {"epochs": 1, "lr": 0.5, "force": True}, EXPERTS + 1)


def test_random_buckets_teach_nothing(root: Path, tmp_path: Path) -> None:
    report = initialise(root, tmp_path / "out", buckets="random")
    assert "loss" not in report and report["bucket_sizes"] == [15] * EXPERTS
    assert report["after"]["mean"][0] < 0.4


def test_what_cannot_work_is_refused(root: Path, tmp_path: Path) -> None:
    def refuse(match: str, folder: Path = root, **options: Any) -> None:
        with pytest.raises(UserError, match=match):
            _initialise(folder, tmp_path / "out", options)

    refuse("capacity=0.5", capacity=0.5)
    refuse("held_out=1.0", held_out=1.0)
    refuse("epochs=-1", epochs=-1)
    refuse("is 2, fewer than the 4 experts", seed_fraction=0.02)
    refuse("not a multiple", **{TP: 2})
    models = {
        "dense model": tiny.small_model(),
        "no routing vectors": tiny.small_model(
            num_experts=4, moe_ffn_hidden_size=96, moe_gate="mlp"
        ),
        "is 24 wide, a dense FFN 96": tiny.small_model(num_experts=4),
        "knows 30": tiny.small_model(num_experts=4, moe_ffn_hidden_size=96, vocab_size=30),
    }
    for number, (match, model) in enumerate(models.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        tiny.save_checkpoint(folder / "moe", model)
        (folder / "data").symlink_to(root / "data")
        refuse(match, folder)
    (tmp_path / "out").mkdir()
    refuse("the same directory", load=tmp_path / "out", force=True)
    (tmp_path / "out" / "file").touch()
    refuse("is not empty")
