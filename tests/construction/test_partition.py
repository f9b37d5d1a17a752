import pytest
import torch

from megatron_ext.construction import partition
from megatron_ext.errors import UserError


def ffn(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


@pytest.mark.parametrize("method", sorted(partition.METHODS))
def test_maps_are_complete_and_disjoint(method: str) -> None:
    neurons = partition.METHODS[method](96, 8, 5, 2)
    assert neurons.shape == (8, 12) and neurons.dtype == torch.long
    assert torch.equal(neurons.reshape(-1).sort().values, torch.arange(96))
    assert torch.equal(neurons, neurons.sort(dim=1).values)


def test_random_maps_depend_on_seed_and_layer_only() -> None:
    deal = partition.independent_random
    first = deal(64, 4, 1, 0)
    torch.manual_seed(99)
    assert torch.equal(first, deal(64, 4, 1, 0))
    assert not torch.equal(first, deal(64, 4, 2, 0))
    assert not torch.equal(first, deal(64, 4, 1, 1))


def test_a_recorded_map_can_be_drawn_again() -> None:
    # Numbers of the first release: a change of generator would silently change everybody's experts.
    first = [[5, 6, 7, 9], [3, 4, 10, 11], [0, 1, 2, 8]]
    assert partition.independent_random(12, 3, 1234, 0).tolist() == first


def test_experts_sum_to_the_dense_ffn() -> None:
    torch.manual_seed(0)
    gate, up, down = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((24, 6), (24, 6), (6, 24))
    )
    x = torch.randn(5, 6, dtype=torch.float64)
    neurons = partition.independent_random(24, 4, 7, 0)
    fc1, fc2 = partition.slice_experts(gate, up, down, neurons)
    assert fc1.shape == (4, 12, 6) and fc2.shape == (4, 6, 6)
    experts = [ffn(*fc1[e].chunk(2), fc2[e], x) for e in range(4)]
    dense = ffn(gate, up, down, x)
    assert (sum(experts) - dense).abs().max() <= 1e-12 * dense.abs().max()
    # Every expert is the dense FFN with the other neurons silenced.
    alone = torch.zeros(24, dtype=torch.float64)
    alone[neurons[2]] = 1
    assert torch.allclose(experts[2], ffn(gate, up, down * alone, x), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slicing_and_joining_is_bit_exact(dtype: torch.dtype) -> None:
    gate, up, down = (torch.randn(*s).to(dtype) for s in ((24, 6), (24, 6), (6, 24)))
    neurons = partition.independent_random(24, 3, 1, 4)
    joined = partition.join_experts(*partition.slice_experts(gate, up, down, neurons), neurons)
    for original, back in zip((gate, up, down), joined, strict=True):
        assert torch.equal(original, back)


def test_experts_must_divide_the_ffn() -> None:
    with pytest.raises(UserError, match="ffn_hidden_size=96 is not a multiple of num_experts=7"):
        partition.independent_random(96, 7, 0, 0)


def test_routers_start_as_asked() -> None:
    weight, out = partition.router_weights(8, 512, "mlp", "normal", 0.02, 3, 1)
    assert out is not None and out.shape == (8, 8)
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    again, _ = partition.router_weights(8, 512, "linear", "normal", 0.02, 3, 1)
    other, none = partition.router_weights(8, 512, "linear", "normal", 0.02, 3, 2)
    assert torch.equal(weight, again) and not torch.equal(weight, other) and none is None
    zero, zero_out = partition.router_weights(8, 512, "mlp", "zero", 0.02, 3, 1)
    assert zero_out is not None and not zero.any() and not zero_out.any()
