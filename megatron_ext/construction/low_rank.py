"""What two matrices differ by, as LoRA's two factors: a truncated singular value decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

_OVERSAMPLING = 16
_ITERATIONS = 4
_NOTHING = 1e-6  # singular values below this share of the largest are rounding


def factorise(delta: Tensor, rank: int, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    """Factors A, B with scale B A as near to a matrix as rank r allows (Eckart and Young, 1936).

    The largest singular values come from a randomised decomposition (Halko et al., 2011, algorithm
    4.4): products of the matrix with r + 16 vectors instead of a decomposition of the whole. A and
    B share each singular value out evenly. Where nothing is left, as of a zero matrix, B's column
    is 0 and A's row drawn as for a fresh adapter, so that training can use it.

    Args:
        delta: [out, in], of any floating type; r must not be above min(out, in).
        rank: r.
        scale: alpha / r, above 0.
        seed: of all that is drawn.

    Returns:
        A [r, in] and B [out, r] in fp32.
    """
    matrix = delta.float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        a = torch.rand(rank, matrix.shape[1]).mul_(2).sub_(1).mul_(matrix.shape[1] ** -0.5)
        b = torch.zeros(matrix.shape[0], rank)
        if not matrix.any():
            return a, b
        width = min(rank + _OVERSAMPLING, *matrix.shape)
        u, s, v = torch.svd_lowrank(matrix, width, _ITERATIONS)
    found = int((s[:rank] > _NOTHING * s[0]).sum())
    root = (s[:found] / scale).sqrt()
    a[:found] = (v[:, :found] * root).T
    b[:, :found] = u[:, :found] * root
    return a, b
