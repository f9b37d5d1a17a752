"""Starts of routers against what they say they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_ext.construction.routers import check_router_start, router_weights
from megatron_ext.errors import UserError


@dataclass
class Seen:
    input_mean: Tensor
    centroids: Tensor | None = None


@dataclass
class Statistics:
    layers: list[Seen]

    def layer(self, layer: int) -> Seen:
        return self.layers[layer]


def draw(groups: int, hidden: int = 32, common: float = 5.0) -> Tensor:
    """Means that are mostly one direction, as those of hidden states are."""
    random = np.random.default_rng(groups)
    rows = random.normal(size=(groups, hidden)) + common * random.normal(size=(1, hidden))
    return torch.from_numpy(rows)


def test_normal_and_zero() -> None:
    weight, out = router_weights(8, 512, "mlp", "normal", 0.02, 3, 1)
    assert out is not None and out.shape == (8, 8)
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    again, _ = router_weights(8, 512, "linear", "normal", 0.02, 3, 1)
    other, none = router_weights(8, 512, "linear", "normal", 0.02, 3, 2)
    assert torch.equal(weight, again) and not torch.equal(weight, other) and none is None
    zero, zero_out = router_weights(8, 512, "mlp", "zero", 0.02, 3, 1)
    assert zero_out is not None and not zero.any() and not zero_out.any()


def test_a_recorded_router_can_be_drawn_again() -> None:
    # Numbers of the first release: a change of generator would silently change everybody's routers.
    weight, _ = router_weights(2, 3, "linear", "normal", 1.0, 1234, 0)
    first = [[-0.5066, -0.5970, 1.4460], [-0.0579, -0.3511, -1.4444]]
    torch.testing.assert_close(weight, torch.tensor(first), atol=1e-4, rtol=0)


@pytest.mark.parametrize("gate", ["linear", "mlp"])
def test_shards_of_a_replica_have_one_logit(gate: Any) -> None:
    """And replicas have different ones, so that the top k are whole replicas."""
    weight, out = router_weights(12, 32, gate, "normal", 0.02, 0, 0, repeats=3)
    x = torch.randn(50, 32, dtype=torch.float64)
    logits = x @ weight.double().T
    if out is not None:
        logits = logits.tanh() @ out.double().T
    by_replica = logits.view(50, 4, 3)
    assert torch.equal(by_replica, by_replica[:, :, :1].expand_as(by_replica))
    assert (by_replica[:, :, 0].sort(dim=1).values.diff(dim=1) > 0).all()


def test_data_rows_choose_by_the_angle_to_the_means() -> None:
    means, x = draw(6), torch.randn(500, 32, dtype=torch.float64)
    weight, out = router_weights(6, 32, "linear", "data", 0.05, 0, 0, Statistics([Seen(means)]))
    assert out is None and weight.dtype == torch.float32
    assert weight.square().mean().sqrt().item() == pytest.approx(0.05, rel=1e-5)
    logits = x @ weight.double().T
    cosine = torch.nn.functional.cosine_similarity(x[:, None], means[None], dim=-1)
    assert torch.equal(logits.argsort(dim=1), cosine.argsort(dim=1))
    # All logits of a token are off by one and the same number, which a softmax does not see.
    size = x.norm(dim=1, keepdim=True)
    factor = ((logits[:, 0] - logits[:, 1]) / (size[:, 0] * (cosine[:, 0] - cosine[:, 1]))).median()
    off = logits - factor * size * cosine
    assert (off - off[:, :1]).abs().max() < 1e-5


def test_centroid_rows_choose_as_the_clusters_were_made() -> None:
    centroids, x = draw(5).float(), torch.randn(500, 32, dtype=torch.float64)
    statistics = Statistics([Seen(draw(5), centroids)])
    weight, _ = router_weights(5, 32, "linear", "centroids", 0.02, 0, 0, statistics)
    chosen = (x @ weight.double().T).argmax(1)
    assert torch.equal(chosen, (x @ centroids.double().T).argmax(1))


def test_data_rows_repeat_for_virtual_groups() -> None:
    statistics = Statistics([Seen(draw(3))])
    weight, _ = router_weights(12, 32, "linear", "data", 0.02, 0, 0, statistics, repeats=4)
    alone, _ = router_weights(3, 32, "linear", "data", 0.02, 0, 0, statistics)
    assert torch.equal(weight, alone.repeat_interleave(4, 0))


def test_what_cannot_start_is_refused() -> None:
    two = Statistics([Seen(draw(2)), Seen(draw(2))])
    check_router_start("data", "linear", 2, [0, 1], two)
    check_router_start("data", "linear", 8, [0, 1], two, repeats=4)
    with pytest.raises(UserError, match="needs statistics"):
        check_router_start("data", "linear", 2, [0])
    with pytest.raises(UserError, match="looks at no statistics"):
        check_router_start("normal", "linear", 2, [0], two)
    with pytest.raises(UserError, match="hold 2 groups, the routers need 8"):
        check_router_start("data", "linear", 8, [1], two)
    with pytest.raises(UserError, match="no centroids of layer 1"):
        check_router_start("centroids", "linear", 2, [1], two)
    with pytest.raises(UserError, match="needs moe_gate=linear"):
        check_router_start("data", "mlp", 2, [0], two)
    with pytest.raises(UserError, match="cannot tell replicas apart"):
        check_router_start("zero", "linear", 8, [0], repeats=2)
    empty = draw(2)
    empty[1] = 0
    with pytest.raises(UserError, match="no tokens in layer 0"):
        check_router_start("data", "linear", 2, [0], Statistics([Seen(empty)]))
    same = Statistics([Seen(draw(1).expand(2, -1))])
    with pytest.raises(UserError, match="same mean hidden state"):
        router_weights(2, 32, "linear", "data", 0.02, 0, 0, same)
