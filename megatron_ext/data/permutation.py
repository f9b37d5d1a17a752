"""A keyed pseudo-random permutation of range(n), computed per element: no index is ever stored.

The generalised Feistel cipher of Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA
2002): an index is written as a pair (left, right) in Z_a x Z_b with a*b just above n, each round
adds a keyed hash of one half to the other (which can be undone, hence a bijection), and a result
outside range(n) is sent through again (cycle walking). With a = ceil(sqrt(n)) at most 2*sqrt(n) of
the pairs lie outside, so for large n hardly any element walks.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_SIZE = 2**50
ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 2**64 - 1

U64 = NDArray[np.uint64]


def hash_words(words: U64) -> U64:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014); one to one on 64 bits."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def mix_key(*parts: ArrayLike) -> U64:
    """One 64-bit key from several integers; arrays broadcast, giving a key per element.

    The order of the parts counts, and at least one dimension is returned.
    """
    key = np.full(1, _GOLDEN, np.uint64)
    for part in parts:
        word = np.atleast_1d(np.asarray(part)).astype(np.uint64)
        key = hash_words((key ^ word) + np.uint64(_GOLDEN))
    return key


def permute(
    index: int | NDArray[np.int64],
    size: int | NDArray[np.int64],
    key: int | tuple[ArrayLike, ...],
) -> NDArray[np.int64]:
    """Where a keyed permutation of range(size) sends `index`.

    `size` and the parts of `key` may be arrays too and broadcast against `index`, so that elements
    of many permutations are computed in one call. The cost is per element and does not depend on
    `size`.

    Args:
        index: one index or an array of them, each in range(size).
        size: number of elements permuted, 1 to 2**50.
        key: names the permutation; integers, or arrays of them.

    Returns:
        int64, of the broadcast shape; 0-dimensional for a scalar.

    Raises:
        ValueError: an index outside range(size), or a size outside 1 to 2**50.
    """
    keys = mix_key(*(key if isinstance(key, tuple) else (key,)))
    scalar = np.ndim(index) == 0 and np.ndim(size) == 0 and keys.size == 1
    indices, sizes, keys = np.broadcast_arrays(np.atleast_1d(index), np.atleast_1d(size), keys)
    if np.any(sizes < 1) or np.any(sizes > MAX_SIZE):
        raise ValueError(f"a permutation has 1 to 2**50 elements, not {sizes.min()}..{sizes.max()}")
    if np.any(indices < 0) or np.any(indices >= sizes):
        raise ValueError("an index to permute is outside range(size)")

    shape = indices.shape
    number, n, k = indices.ravel().astype(np.uint64), sizes.ravel().astype(np.uint64), keys.ravel()
    a = np.ceil(np.sqrt(n.astype(np.float64))).astype(np.uint64)
    b = (n + a - np.uint64(1)) // a
    number = _encrypt(number, a, b, k)
    while (outside := np.flatnonzero(number >= n)).size:
        number[outside] = _encrypt(number[outside], a[outside], b[outside], k[outside])
    result = number.astype(np.int64).reshape(shape)
    return result[0] if scalar else result


def _encrypt(number: U64, a: U64, b: U64, key: U64) -> U64:
    """A permutation of range(a*b); all arguments [elements]."""
    right, left = np.divmod(number, a)
    for round_ in range(ROUNDS):
        round_key = key + np.uint64(round_ * _GOLDEN & _WORD)
        if round_ % 2 == 0:
            left = (left + hash_words(right ^ round_key) % a) % a
        else:
            right = (right + hash_words(left ^ round_key) % b) % b
    return right * a + left
