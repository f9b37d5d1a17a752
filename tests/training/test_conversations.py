"""Training on conversations: packed, padded and one by one are the same mathematics, on any grid,
and the same as transformers'.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.chats import MARKED, TALK, WITH_SYSTEM, messages, save_chat_tokenizer, write_conversations
from ranks import run_ranks
from training.runs import DOMAINS, VOCABULARY, make_run, make_trainer

from megatron_ext.config import RunConfig
from megatron_ext.errors import UserError

LENGTHS = [5, 9, 20, 32, 3, 12, 8, 8, 17, 14, 2, 30, 6, 25, 11, 7, 19, 4]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("conversations")
    for number, name in enumerate(DOMAINS):
        write_conversations(path, name, LENGTHS[number:], VOCABULARY, seed=number)
    return path


def sft_run(root: Path, packing: str = "packed", **settings: Any) -> RunConfig:
    run = make_run(root, **settings)
    run.data.task, run.data.packing = "sft", packing  # type: ignore[assignment]
    return run


def rows_of(trainer: Any, packing: str) -> tuple[list[dict[str, torch.Tensor]], list[Any]]:
    """Micro-batches of every conversation of every data set, and the conversations."""
    from megatron_ext.data.conversation_stream import ConversationStream, collate_conversations

    batches, conversations = [], []
    for domain, name in enumerate(DOMAINS):
        prefix = trainer.run.data.domains[name].path
        stream = ConversationStream(prefix, 32, 0, name, packing)  # type: ignore[arg-type]
        rows = [stream.read(index) for index in range(stream.num_samples)]
        rows += [stream.blank()] * (len(rows) % 2)
        for pair in zip(rows[::2], rows[1::2], strict=True):
            batches.append(collate_conversations(pair, np.full(2, domain), 32))
        conversations += [
            (domain, tokens.copy(), trained.copy())
            for row in rows
            for tokens, trained in zip(row.tokens, row.trained, strict=True)
        ]
    return batches, conversations


def alone(domain: int, tokens: Any, trained: Any) -> dict[str, torch.Tensor]:
    """A conversation as a micro-batch of its own: no padding, no borders, causal attention."""
    ids = torch.tensor(tokens.astype(np.int64))[None]
    mask = torch.tensor(trained.astype(np.float32))[None]
    return {
        "tokens": ids,
        "labels": ids.roll(-1, 1),
        "loss_mask": torch.cat((mask[:, 1:], torch.zeros(1, 1)), 1),
        "position_ids": torch.arange(ids.shape[1])[None],
        "domain": torch.tensor([domain]),
    }


def passes(run: RunConfig, packing: str) -> list[tuple[Any, Any, dict[str, Any]]]:
    """Sums and gradients of all conversations as rows, and one by one."""
    trainer = make_trainer(run)
    batches, conversations = rows_of(trainer, packing)
    results = []
    for micro_batches in (batches, [alone(*conversation) for conversation in conversations]):
        for chunk in trainer.model:
            chunk.train()
            chunk.zero_grad_buffer()
        sums = trainer.passes(micro_batches, forward_only=False)
        gradients = {
            name: parameter.main_grad.clone().numpy()
            for chunk in trainer.model
            for name, parameter in chunk.named_parameters()
        }
        results.append((sums.loss.numpy(), sums.counts.numpy(), gradients))
    return results


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_rows_equal_their_conversations_one_by_one(root: Path, packing: str) -> None:
    settings: dict[str, Any] = {
        "router": {"moe_balance_loss": "none"},
        "training": {"micro_batch_size": 2},
    }
    [((loss, loads, found), (expected_loss, expected_loads, expected))] = run_ranks(
        1, passes, sft_run(root, packing, **settings), packing
    )
    assert loss[1].tolist() == expected_loss[1].tolist() and loss[1].min() > 0
    np.testing.assert_allclose(loss[0], expected_loss[0], rtol=1e-6)
    assert np.array_equal(loads, expected_loads)
    tokens = sum(sum(LENGTHS[number:]) for number in range(3))
    assert loads.sum() == tokens * 4 * 2  # layers, experts of a token: no padding
    assert expected.keys() == found.keys() and len(expected) > 20
    for name, gradient in expected.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(found[name], gradient, rtol=1e-4, atol=1e-5 * scale)


GRIDS: dict[str, tuple[int, dict[str, int]]] = {
    "TP2xEP2": (2, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "TP2xPP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "PP4": (4, {"pipeline_model_parallel_size": 4}),
    "CP2xDP2": (4, {"context_parallel_size": 2}),
}


def three_steps(run: RunConfig) -> list[tuple[float, int, float, float]]:
    trainer = make_trainer(run)
    held_out = trainer.evaluate()
    steps = [trainer.train_step() for _ in range(3)]
    return [(step.loss, step.tokens, step.aux_loss, held_out["wiki"]) for step in steps]


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_every_grid_trains_alike(root: Path, packing: str) -> None:
    """With gate noise and a balance loss, which see no padding on any stage or rank."""
    settings: dict[str, Any] = {
        "router": {"moe_gate_noise": True, "moe_balance_loss": "cv2", "moe_aux_loss_coeff": 0.1},
        "training": {"micro_batch_size": 2, "recompute_granularity": "full"},
    }
    [reference] = run_ranks(1, three_steps, sft_run(root, packing, **settings))
    assert reference[0][2] > 0
    for name, (ranks, parallel) in GRIDS.items():
        run = sft_run(root, packing, parallel=parallel, **settings)
        for steps in run_ranks(ranks, three_steps, run):
            np.testing.assert_allclose(steps, reference, rtol=2e-5, err_msg=name)


def balance_gradient(run: RunConfig) -> list[Any]:
    """The last router's gradient with and without the balance loss, of the same micro-batches."""
    trainer = make_trainer(run)
    batches, _ = rows_of(trainer, "packed")
    router = trainer.passes.routers[-1]
    found = []
    for coeff in (0.0, 1.0):
        trainer.model[0].zero_grad_buffer()
        router.config.moe_cv2_coeff = coeff
        trainer.passes(batches, forward_only=False)
        found.append(router.weight.main_grad.clone().numpy())
    return found


def test_the_balance_loss_does_not_grow_with_untrained_tokens(tmp_path: Path) -> None:
    """Its weight is its coefficient, whatever share of the tokens is trained."""
    gradients = []
    for folder, share in (("few", 1), ("many", 12)):
        path = tmp_path / folder
        path.mkdir()
        for number, name in enumerate(DOMAINS):
            write_conversations(path, name, [16] * 8, VOCABULARY, seed=number)
            mask = np.tile((np.arange(16) >= 16 - share).astype(np.uint8), 8)
            path.joinpath(f"{name}.mask").write_bytes(mask.tobytes())
        run = sft_run(path, router={"moe_balance_loss": "cv2"}, training={"micro_batch_size": 2})
        [(without, with_loss)] = run_ranks(1, balance_gradient, run)
        gradients.append(with_loss - without)
    scale = np.abs(gradients[0]).max()
    assert scale > 0
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=0, atol=1e-3 * scale)


def our_loss(checkpoint: str, prefix: str) -> list[float]:
    """Summed loss and trained tokens of the rows of a data set in a dense model."""
    from megatron_ext.checkpoint import verify
    from megatron_ext.checkpoint.hf import open_weights
    from megatron_ext.data.conversation_stream import ConversationStream
    from megatron_ext.data.loader import validation_batches
    from megatron_ext.model.packed import packed_rows

    weights = open_weights(Path(checkpoint))
    model = verify.fill(verify.build_model(weights.model), weights)
    stream = ConversationStream(prefix, 256, 0, "talk")
    assert stream.num_samples < len(stream._lengths)
    total = torch.zeros(2, dtype=torch.float64)
    for batch in validation_batches(stream, stream.num_samples, 2, 0, 1):
        packed = packed_rows(batch["cu_seqlens"], (2, 256), torch.device("cpu"))
        with torch.no_grad():
            losses = model(
                batch["tokens"],
                batch["position_ids"],
                None,
                labels=batch["labels"],
                loss_mask=batch["loss_mask"],
                padding_mask=batch["padding_mask"],
                packed_seq_params=packed,
            )
        mask = batch["loss_mask"]
        total += torch.stack(((losses * mask).double().sum(), mask.double().sum()))
    return total.tolist()


def test_the_loss_is_transformers(tmp_path: Path) -> None:
    """From JSON Lines to the loss, against transformers' template, mask, model and loss."""
    import json

    from data.corpora import options
    from transformers import AutoTokenizer, LlamaForCausalLM

    from megatron_ext.data.preprocess import preprocess
    from tests.checkpoint.tiny import save_llama

    path = save_chat_tokenizer(tmp_path / "tokenizer", MARKED)
    talks = [TALK, WITH_SYSTEM, TALK[:2], [*WITH_SYSTEM[:2], TALK[3]]]
    source = tmp_path / "talk.jsonl"
    source.write_text("".join(json.dumps(messages(turns)) + "\n" for turns in talks))
    preprocess(options(tmp_path, path, str(source), task="sft", valid_fraction=0.0, seq_length=256))
    save_llama(tmp_path / "llama", vocab_size=500)

    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "llama").eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    expected = torch.zeros(2, dtype=torch.float64)
    for turns in talks:
        output = tokenizer.apply_chat_template(
            messages(turns)["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = torch.tensor([output["input_ids"]]), torch.tensor([output["assistant_masks"]])
        with torch.no_grad():
            loss = theirs(ids, labels=ids.masked_fill(mask == 0, -100)).loss
        expected += torch.stack((loss.double() * mask.sum(), mask.sum().double()))
    [found] = run_ranks(1, our_loss, str(tmp_path / "llama"), str(tmp_path / "out/train/talk"))
    assert found[1] == expected[1]
    assert found[0] / found[1] == pytest.approx(float(expected[0] / expected[1]), rel=1e-5)


def thd_attention() -> None:
    """The wrapper for kernels of variable length against the local attention."""
    from types import SimpleNamespace

    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_ext.model.attention import SdpaAttention
    from megatron_ext.model.builder import transformer_config
    from megatron_ext.model.packed import attends_to_packed_rows, packed_rows
    from megatron_ext.training import grid as grids

    class VariableLength(torch.nn.Module):
        """Takes what TransformerEngine takes: [tokens, heads, d] and where sequences end."""

        config = SimpleNamespace(context_parallel_size=1)

        def forward(
            self, query: Any, key: Any, value: Any, mask: Any, packed_seq_params: Any
        ) -> Any:
            assert packed_seq_params.qkv_format == "thd" and query.shape == (2 * 32, 4, 16)
            ends = packed_seq_params.cu_seqlens_q.tolist()
            assert max(b - a for a, b in zip(ends, ends[1:], strict=False)) <= 32
            out = []
            for a, b in zip(ends, ends[1:], strict=False):
                scores = torch.einsum("shd,thd->hst", query[a:b], key[a:b].repeat_interleave(2, 1))
                later = torch.ones(b - a, b - a, dtype=torch.bool).triu(1)
                weights = (scores / 4).masked_fill(later, -torch.inf).softmax(-1)
                out.append(
                    torch.einsum("hst,thd->shd", weights, value[a:b].repeat_interleave(2, 1))
                )
            return torch.cat(out).flatten(1)

    config = transformer_config(
        make_run(Path("unused")), grids.initialize(make_run(Path())).platform
    )
    local = SdpaAttention(
        config, pg_collection=ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
    )
    ends = torch.tensor([0, 5, 32, 33, 50, 64], dtype=torch.int32)
    rows = packed_rows(ends, (2, 32), torch.device("cpu"))
    torch.manual_seed(0)
    q, k, v = (torch.randn(32, 2, heads, 16, dtype=torch.float64) for heads in (4, 2, 2))
    wrapped = attends_to_packed_rows(VariableLength)()
    found = local(q, k, v, None, packed_seq_params=rows)
    torch.testing.assert_close(found, wrapped(q, k, v, None, packed_seq_params=rows))
    assert not torch.allclose(found, local(q, k, v, None))


def test_kernels_of_variable_length() -> None:
    run_ranks(1, thd_attention)


def test_the_task_must_fit_the_files(root: Path, tmp_path: Path) -> None:
    from training.runs import write_data

    from megatron_ext.training.data import open_data

    with pytest.raises(UserError, match="holds conversations"):
        open_data(make_run(root), 0, 1, True)
    write_data(tmp_path)
    with pytest.raises(UserError, match=r"no file .*code.mask"):
        open_data(sft_run(tmp_path), 0, 1, True)
