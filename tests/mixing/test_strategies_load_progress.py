"""The rule of our own: what it promises in docs/mixing.md, on simulated routers."""

import json
import math
from typing import Any

import numpy as np
import pytest
from mixing.made_signals import LLAMA_MOE, SFT, loads, signals

from megatron_ext.errors import UserError
from megatron_ext.mixing.strategies import Signals, Strategy, make_strategy
from megatron_ext.mixing.strategies.base import Floats
from megatron_ext.mixing.strategies.evidence import (
    DiscountedMean,
    enough_folds,
    jackknife,
    shrink,
    squared_distances,
)

FOLDS = 8
SHARES = loads(LLAMA_MOE) / loads(LLAMA_MOE).sum(1, keepdims=True)
QUARTER = np.full(4, 0.25)


def draw(shares: np.ndarray, picks: Any, rng: np.random.Generator) -> np.ndarray:
    """Picks [F, D, 1, E] of routers with these shares [D, E]."""
    picks = np.broadcast_to(picks, (FOLDS, len(shares)))
    return np.stack([rng.multinomial(n, shares) for n in picks])[:, :, None]


def exact(shares: np.ndarray, picks: int = 10**6) -> np.ndarray:
    """Folds without sampling error [F, D, 1, E]."""
    return np.round(np.repeat(shares[None, :, None] * picks, FOLDS, 0)).astype(np.int64)


def train_loss(losses: Any, rng: np.random.Generator | None = None, error: float = 0.0) -> Floats:
    """[F, D, 2]: 1000 tokens a fold, with this standard error of a fold's mean."""
    noise = rng.normal(0, error, (FOLDS, len(losses))) if rng else np.zeros((FOLDS, len(losses)))
    return np.stack([(np.asarray(losses) + noise) * 1000, np.full_like(noise, 1000.0)], -1)


def seen(weights: Floats, counts: np.ndarray, **values: Any) -> Signals:
    given = {"initial_weights": QUARTER, "layers": (0,), "train_loss": train_loss([2.0] * 4)}
    return signals(weights, **(given | {"counts": counts} | values))


def run(strategy: Strategy, weights: Floats, rounds: int, counts: np.ndarray, **values: Any) -> Any:
    for number in range(rounds):
        weights = strategy.update(seen(weights, counts, round=number, **values))
    return weights


class TestEvidence:
    def test_squared_distances_are_unbiased(self) -> None:
        rng = np.random.default_rng(1)
        shares = SHARES[[0, 0, 1]]
        picks = rng.integers(20, 400, (FOLDS, 3))
        estimates, naive = [], []
        for _ in range(400):
            counts = draw(shares, picks, rng)
            estimates.append(squared_distances(counts)[0])
            p = counts.sum(0)[:, 0] / counts.sum((0, 2, 3))[:, None]
            naive.append(8 * ((p[0] - p[1]) ** 2).sum())
        mean = np.mean(estimates, 0)
        error = np.std(estimates, 0) / math.sqrt(400)
        truth = 8 * ((shares[:, None] - shares) ** 2).sum(-1)
        assert abs(mean[0, 1]) < 4 * error[0, 1] < np.mean(naive) / 5
        for pair in ((0, 2), (1, 2)):
            assert abs(mean[pair] - truth[pair]) < 4 * error[pair]

    def test_leaving_out_a_fold_is_an_estimate_without_it(self) -> None:
        counts = draw(SHARES, 300, np.random.default_rng(2))
        _, without = squared_distances(counts)
        for fold in range(FOLDS):
            rest, _ = squared_distances(np.delete(counts, fold, 0))
            assert np.allclose(without[fold], rest, rtol=1e-9, atol=1e-15)

    def test_splitting_experts_in_two_changes_nothing(self) -> None:
        counts = draw(SHARES, 300, np.random.default_rng(3))
        halves = np.repeat(counts, 2, -1)
        once, twice = squared_distances(2 * counts)[0], squared_distances(halves)[0]
        assert np.allclose(once, twice, rtol=1e-9)

    def test_jackknife_of_a_mean(self) -> None:
        values = np.random.default_rng(4).normal(size=(9, 3))
        without = (values.sum(0) - values) / 8
        assert np.allclose(jackknife(without), values.var(0, ddof=1) / 9)

    def test_enough_folds_share_three(self) -> None:
        for folds in range(3, 12):
            count = next(n for n in range(folds + 1) if enough_folds(np.arange(folds) < n))
            assert 2 * count - folds >= 3 and 2 * (count - 1) - folds < 3

    def test_shrinking(self) -> None:
        values = np.array([1.0, 2.0, 4.0, math.nan])
        sure, share = shrink(values, np.array([1e-6] * 3 + [math.nan]), caution=2)
        assert np.allclose(sure, [1, 2, 4, 7 / 3], atol=1e-3) and share[3] == 0
        unsure, share = shrink(values, np.array([4.0] * 3 + [math.nan]), caution=2)
        assert np.allclose(unsure, 7 / 3) and not share.any()
        some, share = shrink(np.array([0.0, 1, 3, 9]), np.array([1, 1, 1, 40.0]), caution=1)
        assert 0 < share[3] < share[0] == share[1] < 1  # what is measured worse is drawn in more
        for few in ([math.nan] * 3, [1.0, math.nan, math.nan], [1.0, 2.0, math.nan]):
            result, share = shrink(np.array(few), np.zeros(3), caution=1)
            assert np.isfinite(result).all() and len(set(result)) == 1 and not share.any()

    def test_discounted_mean(self) -> None:
        mean = DiscountedMean(2, half_life=1)
        mean.add(np.array([4.0, math.nan]), np.array([1.0, math.nan]), np.array([10.0, 10.0]))
        mean.add(np.array([1.0, math.nan]), np.array([1.0, math.nan]), np.array([10.0, 10.0]))
        values, variances = mean.estimate()
        assert values[0] == 2.0 and variances[0] == pytest.approx((1 + 4) / 9)
        assert np.isnan(values[1]) and np.isnan(variances[1])


class TestPromises:
    def test_sampling_noise_moves_nothing(self) -> None:
        """Routers that treat all data sets alike, seen through small and unequal samples."""
        rng = np.random.default_rng(5)
        same = np.repeat(SHARES[:1], 4, 0)
        moved, ours, papers = [], [], []
        for _ in range(30):
            rule, paper = (make_strategy(name, SFT) for name in ("load_progress", "router_load"))
            weights = others = QUARTER
            for number in range(5):
                counts = draw(same, [2000, 2000, 500, 200], rng)
                losses = train_loss([2 - 0.1 * number] * 4, rng, 0.1)
                given = {"round": number, "train_loss": losses}
                weights = rule.update(seen(weights, counts, **given))
                others = paper.update(seen(others, counts, **given))
            moved.append(np.abs(weights - QUARTER).max() > 1e-12)
            ours.append(np.abs(weights - QUARTER).max())
            papers.append(np.abs(others - QUARTER).max())
        assert np.mean(moved) < 0.1 and min(papers) > 0.01
        assert np.mean(ours) < np.mean(papers) / 10

    def test_clear_loads_move_as_the_paper_found(self) -> None:
        """With plenty of tokens, the order and about the size of MoE-SFT's last weights."""
        counts = draw(SHARES, 20000, np.random.default_rng(6))
        weights = run(make_strategy("load_progress", SFT), QUARTER, 12, counts)
        assert np.allclose(weights, [0.285, 0.320, 0.215, 0.180], atol=0.05)

    def test_a_far_but_mastered_data_set_shrinks_back(self) -> None:
        rng = np.random.default_rng(7)
        strategy = make_strategy("load_progress", SFT)
        weights, losses, history = QUARTER, np.full(4, 2.0), []
        for number in range(24):
            counts = draw(SHARES, 20000, rng)
            given = {"round": number, "train_loss": train_loss(losses, rng, 0.003)}
            weights = strategy.update(seen(weights, counts, **given))
            history.append(weights[1])
            losses = losses * [0.97, 0.97 if number < 8 else 1.0, 0.97, 0.97]
        assert history[8] > 0.31  # math is the farthest
        assert history[-1] < 0.2 and np.argmin(weights) == 1

    def test_what_is_being_forgotten_counts_as_progress(self) -> None:
        strategy = make_strategy("load_progress", SFT)
        for number in range(6):
            losses = [2 - 0.05 * number, 2 + 0.05 * number, 2 - 0.05 * number, 2.0]
            strategy.update(
                seen(QUARTER, exact(SHARES), round=number, train_loss=train_loss(losses))
            )
        progress = strategy.report()["progress"]
        assert progress[1] > 0.9 and progress[3] < 0.01

    def test_fixed_point(self) -> None:
        """Bounded, in closed form, and the same from wherever the weights come."""
        initial = np.array([0.4, 0.3, 0.2, 0.1])
        options = {"strength": 0.7, "progress": "none"}
        ends = []
        for start in (initial, np.array([0.97, 0.01, 0.01, 0.01])):
            strategy = make_strategy("load_progress", SFT, options)
            ends.append(run(strategy, start, 30, exact(SHARES), initial_weights=initial))
        assert np.allclose(ends[0], ends[1], rtol=1e-9)
        squared = ((SHARES[:, None] - SHARES) ** 2).sum(-1).sum(-1)
        target = initial * np.exp(0.7 * squared / squared.mean())
        assert np.allclose(ends[0], target / target.sum(), rtol=1e-3)

        strategy = make_strategy("load_progress", SFT, options | {"strength": 1000, "bound": 3})
        end = run(strategy, initial, 30, exact(SHARES), initial_weights=initial)
        factors = end / initial
        assert factors.max() / factors.min() == pytest.approx(9)

    def test_the_number_of_tokens_does_not_matter_but_for_its_noise(self) -> None:
        counts = draw(SHARES, 3000, np.random.default_rng(8))
        once, tenfold = (
            run(make_strategy("load_progress", SFT), QUARTER, 7, times * counts)
            for times in (1, 10)
        )
        assert np.abs(once - QUARTER).max() > 0.01
        assert np.allclose(once, tenfold, rtol=1e-9)

    def test_an_update_changes_no_pair_by_more_than_max_change(self) -> None:
        strategy = make_strategy("load_progress", SFT, {"max_change": 1.1, "strength": 5})
        weights = QUARTER
        for number in range(8):
            new = strategy.update(seen(weights, exact(SHARES), round=number))
            ratio = new / weights
            assert ratio.max() / ratio.min() <= 1.1 + 1e-12
            weights = new
        assert ratio.max() / ratio.min() == pytest.approx(1.1)


class TestRobustness:
    def test_paused_data_sets_stay_out(self) -> None:
        weights = np.array([0.4, 0.3, 0.0, 0.3])
        four, three = make_strategy("load_progress", SFT), make_strategy("load_progress", SFT[:3])
        left = [0, 1, 3]
        counts, losses = exact(SHARES), train_loss([2.0, 1.5, 1.0, 1.2])
        for number in range(5):
            given = {"round": number, "train_loss": losses * (1 - 0.01 * number)}
            others = given | {"train_loss": given["train_loss"][:, left]}
            new = four.update(seen(weights, counts, initial_weights=weights, **given))
            fewer = three.update(
                seen(weights[left], counts[:, left], initial_weights=weights[left], **others)
            )
            assert new[2] == 0 and np.allclose(new[left], fewer, rtol=1e-12)
        assert four.report()["distance"][2] is None

    def test_a_data_set_with_too_few_tokens_counts_as_the_mean(self) -> None:
        counts = exact(SHARES)
        counts[2:, 3] = 0
        strategy = make_strategy("load_progress", SFT)
        weights = run(strategy, QUARTER, 3, counts)
        report = strategy.report()
        assert report["confidence"][3] == 0 and report["distances"][3] == [None] * 4
        assert report["distance"][3] == pytest.approx(1, abs=0.05)
        assert weights[1] > weights[3] > weights[2]

    @pytest.mark.parametrize("progress", ["train", "valid", "none"])
    def test_whatever_comes_weights_are_weights(self, progress: str) -> None:
        rng = np.random.default_rng(9)
        strategy = make_strategy("load_progress", SFT, {"progress": progress})
        weights = QUARTER
        for number in range(40):
            picks = rng.choice([0, 0, 1, 3, 1000], (FOLDS, 4))
            picks[0] += 1
            picks[:3, 0] += 1
            losses = train_loss(rng.choice([0.0, 1e-9, 2.0, 1e6], 4))
            losses *= rng.choice([0, 1], (FOLDS, 4, 1))
            held_out = rng.choice([math.nan, 0.0, 1.5, math.inf], 4)
            given = {"round": number, "train_loss": losses, "valid_loss": held_out}
            new = strategy.update(seen(weights, draw(SHARES, picks, rng), **given))
            assert np.isfinite(new).all() and new.sum() == pytest.approx(1, abs=1e-12)
            assert ((new > 0) == (weights > 0)).all()
            json.dumps([strategy.state_dict(), strategy.report()], allow_nan=False)
            weights = new
            if number == 20:
                weights = np.array([0.5, 0.2, 0.3, 0.0])

    def test_a_restored_strategy_goes_on_to_the_same_bits(self) -> None:
        rng = np.random.default_rng(10)
        rounds = []
        for number in range(8):
            losses = train_loss(np.array([2, 1.5, 1, 1.2]) * 0.98**number, rng, 0.01)
            rounds.append({"counts": draw(SHARES, 5000, rng), "train_loss": losses})
        strategy = make_strategy("load_progress", SFT)
        weights = QUARTER
        for number, given in enumerate(rounds):
            if number == 4:
                saved = json.loads(json.dumps(strategy.state_dict())), weights
            weights = strategy.update(seen(weights, round=number, **given))
        other = make_strategy("load_progress", SFT)
        other.load_state_dict(saved[0])
        again = saved[1]
        for number, given in list(enumerate(rounds))[4:]:
            again = other.update(seen(again, round=number, **given))
        assert np.array_equal(weights, again)
        assert other.state_dict() == strategy.state_dict()

    def test_it_takes_three_folds(self) -> None:
        counts = exact(SHARES)
        counts[2:] = 0
        with pytest.raises(UserError, match="of 2 steps"):
            make_strategy("load_progress", SFT).update(seen(QUARTER, counts))
        counts[2] = counts[0]
        new = run(make_strategy("load_progress", SFT), QUARTER, 2, counts)
        assert new[1] > 0.25

    def test_needs_and_refusals(self) -> None:
        assert make_strategy("load_progress", SFT).needs == {"loads", "train_loss"}
        valid = make_strategy("load_progress", SFT, {"progress": "valid"})
        assert valid.needs == {"loads", "valid_loss"}
        assert make_strategy("load_progress", SFT, {"progress": "none"}).needs == {"loads"}
        for options in ({"bound": 0.5}, {"max_change": 0}, {"half_life": 0}, {"progress": "x"}):
            with pytest.raises(UserError):
                make_strategy("load_progress", SFT, options)
        with pytest.raises(UserError, match="compares data sets"):
            make_strategy("load_progress", ["only"])
