import itertools

import numpy as np
import pytest
import torch

from megatron_ext.construction.clustering import balanced_kmeans, inertia
from megatron_ext.errors import UserError


def cloud(count: int, width: int, seed: int = 0, **options: torch.dtype) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), **options)


def blobs(per_blob: int, centres: torch.Tensor, spread: float) -> torch.Tensor:
    return torch.cat([c + spread * cloud(per_blob, len(c), i) for i, c in enumerate(centres)])


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(("count", "clusters"), [(96, 8), (97, 8), (5, 5), (64, 1)])
def test_sizes_are_equal(metric: str, count: int, clusters: int) -> None:
    labels, centroids = balanced_kmeans(cloud(count, 12), clusters, 3, metric)  # type: ignore[arg-type]
    sizes = torch.bincount(labels, minlength=clusters)
    assert labels.dtype == torch.int64 and centroids.shape == (clusters, 12)
    assert sizes.sum() == count and sizes.max() - sizes.min() == (1 if count % clusters else 0)


def test_sizes_may_differ_where_that_is_allowed() -> None:
    centres = 20 * torch.eye(4)
    points = torch.cat([blobs(100, centres, 1.0), blobs(30, centres[:1], 1.0)])  # 130 100 100 100
    labels, _ = balanced_kmeans(points, 4, 0, balance=0.25)
    truth = torch.cat([torch.arange(4).repeat_interleave(100), torch.zeros(30).long()])
    groups = {(int(t), int(lab)) for t, lab in zip(truth, labels, strict=True)}
    assert len(groups) == 4
    exact, _ = balanced_kmeans(points, 4, 0)
    assert torch.bincount(exact).tolist().count(107) == 2
    assert inertia(points, labels) < inertia(points, exact)
    tight, _ = balanced_kmeans(points, 4, 0, balance=0.1)
    sizes = torch.bincount(tight)
    assert sizes.min() >= 0.9 * 107.5 and sizes.max() <= 1.1 * 107.5


def test_separated_groups_are_found() -> None:
    points = blobs(40, 10 * torch.eye(6), 0.5) + 100  # far from the origin
    labels, centroids = balanced_kmeans(points, 6, 1)
    for group in labels.view(6, 40):
        assert (group == group[0]).all()
    for label in range(6):
        expected = points[labels == label].double().mean(dim=0)
        assert (centroids[label] - expected).abs().max() < 1e-4


def test_the_optimum_of_a_small_problem_is_found() -> None:
    points = cloud(8, 2, 5)
    best = min(
        inertia(points, torch.tensor([int(i in half) for i in range(8)]))
        for half in itertools.combinations(range(8), 4)
    )
    found = min(inertia(points, balanced_kmeans(points, 2, seed)[0]) for seed in range(8))
    assert found == pytest.approx(best, rel=1e-6)


def test_no_single_exchange_gains_much() -> None:
    points = cloud(48, 20, 2)
    labels, _ = balanced_kmeans(points, 4, 0)
    found = inertia(points, labels)
    shuffled = labels[torch.randperm(48, generator=torch.Generator().manual_seed(0))]
    assert found < 0.95 * inertia(points, shuffled)
    best = found
    for i, j in itertools.combinations(range(48), 2):
        if labels[i] != labels[j]:
            other = labels.clone()
            other[i], other[j] = labels[j], labels[i]
            best = min(best, inertia(points, other))
    assert best > 0.995 * found


def test_cosine_sees_directions_only() -> None:
    directions = torch.nn.functional.normalize(blobs(30, torch.eye(4) * 3, 0.3))
    directions -= directions.mean(dim=0)
    lengths = torch.rand(120, 1, generator=torch.Generator().manual_seed(1)) * 50 + 0.5
    # Lengths that leave the mean at 0, so that centring changes nothing.
    points = torch.cat([directions * lengths, -directions * lengths])
    labels, centroids = balanced_kmeans(points, 8, 0, "cosine")
    same, _ = balanced_kmeans(torch.cat([directions, -directions]), 8, 0, "cosine")
    assert torch.equal(labels, same)
    assert torch.allclose(centroids.norm(dim=1), torch.ones(8), atol=1e-5)


def test_seeds_decide_and_threads_do_not() -> None:
    points = cloud(512, 64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, _ = balanced_kmeans(points, 8, 7)
        torch.set_num_threads(2)
        two, _ = balanced_kmeans(points, 8, 7)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    other, _ = balanced_kmeans(points, 8, 8)
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_half_precision_is_clustered_in_full() -> None:
    points = cloud(128, 16).to(torch.bfloat16)
    assert torch.equal(balanced_kmeans(points, 4, 0)[0], balanced_kmeans(points.float(), 4, 0)[0])


def test_vectors_that_are_alike_do_no_harm() -> None:
    labels, centroids = balanced_kmeans(torch.ones(12, 3), 4, 0)
    assert torch.bincount(labels).tolist() == [3, 3, 3, 3] and torch.equal(
        centroids, torch.ones(4, 3)
    )


def test_inertia_is_the_sum_of_squared_distances() -> None:
    points = np.array([[0.0, 0.0], [2.0, 0.0], [5.0, 1.0], [5.0, 5.0]])
    assert inertia(torch.tensor(points), torch.tensor([0, 0, 1, 1])) == 2 * 1 + 2 * 4


@pytest.mark.parametrize(
    ("points", "clusters", "message"),
    [
        (torch.ones(3, 2), 4, "4 clusters cannot be made of 3 vectors"),
        (torch.full((8, 2), float("nan")), 2, "NaN"),
        (torch.ones(8, 2), 0, "0 clusters"),
    ],
)
def test_bad_vectors_are_refused(points: torch.Tensor, clusters: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        balanced_kmeans(points, clusters, 0)
