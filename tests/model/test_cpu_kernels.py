"""The CPU kernels compute what they stand for: torch in float64 is the oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.model.head import LinearCrossEntropy
from megatron_ext.model.norm import CpuRmsNorm
from megatron_ext.model.rotary import Rotate, rotate_on_cpu


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("rows", [1, 4, 10, 64], ids=lambda rows: f"{rows} rows in the buffer")
def test_linear_cross_entropy(rows: int) -> None:
    torch.manual_seed(0)
    hidden, weight = double(10, 6), double(17, 6)
    labels, mask = torch.randint(0, 17, (10,)), torch.tensor([1.0] * 7 + [0.0] * 3)
    expected = F.cross_entropy(hidden @ weight.t(), labels, reduction="none") * mask
    buffer = torch.empty(rows, 17, dtype=torch.float64)
    losses = LinearCrossEntropy.apply(hidden, weight, labels, mask, buffer)
    torch.testing.assert_close(losses, expected)
    # The trainer sums the masked losses (again times the mask) and scales the sum.
    found = torch.autograd.grad(3.0 * (losses * mask).sum(), (hidden, weight))
    wanted = torch.autograd.grad(3.0 * expected.sum(), (hidden, weight))
    torch.testing.assert_close(found, wanted)


def test_linear_cross_entropy_without_gradient() -> None:
    hidden, weight = double(5, 4), double(9, 4)
    labels = torch.randint(0, 9, (5,))
    with torch.no_grad():
        losses = LinearCrossEntropy.apply(
            hidden, weight, labels, torch.ones(5), torch.empty(2, 9, dtype=torch.float64)
        )
        torch.testing.assert_close(
            losses, F.cross_entropy(hidden @ weight.t(), labels, reduction="none")
        )


def test_linear_cross_entropy_refuses_unequal_weights() -> None:
    """Its gradients are made before the caller's are known."""
    hidden, weight = double(4, 3), double(5, 3)
    losses = LinearCrossEntropy.apply(
        hidden, weight, torch.tensor([0, 1, 2, 3]), torch.ones(4), torch.empty(4, 5).double()
    )
    with pytest.raises(RuntimeError, match="unequal"):
        (losses * torch.arange(4.0)).sum().backward()


def test_linear_cross_entropy_of_a_micro_batch_with_no_trained_token() -> None:
    hidden, weight = double(4, 3), double(5, 3)
    losses = LinearCrossEntropy.apply(
        hidden, weight, torch.tensor([0, 1, 2, 3]), torch.zeros(4), torch.empty(4, 5).double()
    )
    losses.sum().backward()
    assert losses.sum() == 0
    assert hidden.grad is not None and not hidden.grad.any()


def test_rms_norm() -> None:
    x, weight = double(3, 2, 8), double(8)
    assert torch.autograd.gradcheck(lambda x, w: CpuRmsNorm.apply(x, w, 1e-2), (x, weight))
    torch.testing.assert_close(CpuRmsNorm.apply(x, weight, 1e-5), F.rms_norm(x, (8,), weight, 1e-5))


def test_rotation_is_megatron_cores() -> None:
    from megatron.core.models.common.embeddings import rope_utils

    original = rope_utils._apply_rotary_pos_emb_bshd
    t = double(6, 2, 3, 8)
    angles = torch.outer(torch.arange(6.0), 10.0 ** -torch.arange(4.0)).double()
    freqs = torch.cat((angles, angles), -1)[:, None, None]
    ours = rotate_on_cpu(original)(t, freqs, rotary_interleaved=False)
    half = t.shape[-1] // 2
    turned = torch.cat((-t[..., half:], t[..., :half]), -1)
    torch.testing.assert_close(ours, t * freqs.cos() + turned * freqs.sin())
    assert torch.autograd.gradcheck(
        lambda t: Rotate.apply(t, angles.cos()[:, None, None], angles.sin()[:, None, None]), (t,)
    )
