import pytest
import torch

from megatron_ext.construction import partition
from megatron_ext.errors import UserError


def ffn(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def test_contiguous_experts_are_slices() -> None:
    assert partition.contiguous(6, 3).tolist() == [[0, 1], [2, 3], [4, 5]]


def test_a_map_knows_whether_it_is_complete() -> None:
    experts = torch.tensor([[0, 3], [1, 5]])
    assert partition.NeuronMap(experts, torch.tensor([2, 4])).is_complete(6)
    assert not partition.NeuronMap(experts, torch.tensor([2, 3])).is_complete(6)
    assert not partition.NeuronMap(experts).is_complete(6)


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
def test_slicing_is_bit_exact(dtype: torch.dtype) -> None:
    gate, up, down = (torch.randn(*s).to(dtype) for s in ((24, 6), (24, 6), (6, 24)))
    neurons = partition.independent_random(24, 3, 1, 4)
    fc1, fc2 = partition.slice_experts(gate, up, down, neurons)
    for expert, chosen in enumerate(neurons):
        assert torch.equal(fc1[expert], torch.cat([gate[chosen], up[chosen]]))
        assert torch.equal(fc2[expert], down[:, chosen])


def test_experts_must_divide_the_ffn() -> None:
    with pytest.raises(UserError, match="ffn_hidden_size=96 is not a multiple of num_experts=7"):
        partition.independent_random(96, 7, 0, 0)
