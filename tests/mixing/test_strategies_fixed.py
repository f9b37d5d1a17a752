"""Strategies that look at nothing that is measured."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mixing.made_signals import LLAMA_MOE, SFT, loads, signals

from megatron_ext.data.blend import BlendPlan
from megatron_ext.errors import UserError
from megatron_ext.mixing.strategies import make_strategy, published
from megatron_ext.mixing.strategies.distances import distance_weights

SEVEN = ("en_cc", "en_c4", "github", "en_wikipedia", "en_book", "en_arxiv", "en_stack")


class TestFixedWeights:
    def test_initial_weights(self) -> None:
        sizes = [100, 300, 600]
        assert make_strategy("static", "abc").initial([2, 1, 1], sizes).tolist() == [
            0.5,
            0.25,
            0.25,
        ]
        assert np.allclose(make_strategy("uniform", "abc").initial([2, 1, 1], sizes), 1 / 3)
        by_size = make_strategy("data_size", "abc").initial([2, 1, 1], sizes)
        assert np.allclose(by_size, [0.1, 0.3, 0.6])
        paused = make_strategy("uniform", "abc").initial([2, 0, 1], sizes)
        assert paused.tolist() == [0.5, 0, 0.5]
        dynamic = make_strategy("router_load", "abc", {"initial": "data_size"})
        assert np.allclose(dynamic.initial([1, 1, 1], sizes), by_size)
        assert not make_strategy("uniform", "abc").changes

    def test_published_mixtures(self) -> None:
        for row, values in published.MIXTURES.items():
            assert math.fsum(values.values()) == pytest.approx(1, abs=2e-3), row
        mixture = make_strategy("sheared_llama", SEVEN).initial([1] * 7, [1] * 7)
        assert np.allclose(mixture, [0.361, 0.492, 0.008, 0.031, 0.091, 0.007, 0.01])
        pajama = ["RedPajamaArXiv", "RedPajamaC4", "RedPajamaBook", "RedPajamaCommonCrawl"]
        pajama += ["RedPajamaGithub", "RedPajamaStackExchange", "RedPajamaWikipedia"]
        mixture = make_strategy("llama", pajama).initial([1] * 7, [1] * 7)
        assert np.allclose(mixture, [0.025, 0.15, 0.045, 0.67, 0.045, 0.02, 0.045])

    def test_published_mixture_of_other_domains(self) -> None:
        with pytest.raises(UserError, match="cc, c4, github, wiki, book, arxiv, stack") as error:
            make_strategy("llama", SFT).initial([1] * 4, [1] * 4)
        assert "code, math, orca, sharegpt" in str(error.value)

    def test_random_depends_on_seed_and_round_only(self) -> None:
        strategy = make_strategy("random", "abcd")
        drawn = [strategy.update(signals([0.25] * 4, round=r)) for r in range(200)]
        again = make_strategy("random", "abcd").update(signals([0.1, 0.2, 0.3, 0.4], round=5))
        assert np.array_equal(drawn[5], again)
        assert not np.array_equal(drawn[5], strategy.update(signals([0.25] * 4, round=5, seed=8)))
        assert np.allclose(np.mean(drawn, 0), 0.25, atol=0.04) and np.std(drawn) > 0.1
        paused = strategy.update(signals([0.5, 0, 0.5, 0]))
        assert (paused > 0).tolist() == [True, False, True, False]

    def test_sequential(self) -> None:
        strategy = make_strategy("sequential", ["m", "a", "z", "b"], {"period": 2})
        weights = strategy.initial([1, 1, 0, 1], [1] * 4)
        assert weights.tolist() == pytest.approx([1e-5, 1, 0, 1e-5], rel=3e-5)
        chosen = [int(weights.argmax())]
        initial = weights
        for number in range(6):
            given = signals(weights, round=number, initial_weights=initial)
            weights = strategy.update(given)
            chosen.append(int(weights.argmax()))
        assert chosen == [1, 1, 3, 3, 0, 0, 1]
        used_up = strategy.update(
            signals([1e-5, 1, 0, 0], round=1, initial_weights=np.array([0.3, 0.3, 0, 0.4]))
        )
        assert used_up.argmax() == 0 and used_up[3] == 0


class TestWeightsOfAnotherRun:
    """Static weights, or another start, from a weights log."""

    @staticmethod
    def write(path: Path) -> str:
        lines = [
            {"step": 0, "weights": {"a": 0.25, "b": 0.5, "c": 0.25}, "reason": "initial"},
            {"step": 9, "weights": {"c": 0.125, "b": 0.25, "a": 0.625}, "reason": "round 0"},
            {"step": 20, "weights": {"a": 1, "b": 0, "c": 0}, "reason": "x", "automatic": True},
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    def test_the_last_decision_is_the_start(self, tmp_path: Path) -> None:
        log = self.write(tmp_path / "blend_weights.jsonl")
        for name in ("static", "router_load", "load_progress"):
            strategy = make_strategy(name, "abc", {"initial": log})
            assert strategy.initial([1, 1, 1], [9, 9, 9]).tolist() == [0.625, 0.25, 0.125]
            paused = strategy.initial([1, 0, 1], [9, 9, 9])
            assert paused.tolist() == pytest.approx([0.625 / 0.75, 0, 0.125 / 0.75])

    def test_other_data_sets_and_a_missing_log_are_refused(self, tmp_path: Path) -> None:
        log = self.write(tmp_path / "blend_weights.jsonl")
        with pytest.raises(UserError, match="one for each of a, b"):
            make_strategy("static", "ab", {"initial": log})
        with pytest.raises(UserError, match="nothing.jsonl"):
            make_strategy("static", "ab", {"initial": str(tmp_path / "nothing.jsonl")})


class TestDistanceWeights:
    def test_against_a_reference_written_out(self) -> None:
        """Delta_i = sum_j |x_i - x_j| / n; in proportion, over two layers their mean."""
        features = np.random.default_rng(0).normal(size=(4, 2, 5))
        delta = [
            math.fsum(
                math.dist(features[i, layer], features[j, layer])
                for j in range(4)
                for layer in (0, 1)
            )
            for i in range(4)
        ]
        expected = [part / math.fsum(delta) for part in delta]
        assert distance_weights(features).tolist() == pytest.approx(expected, rel=1e-14)
        assert np.allclose(distance_weights(features * 1000), expected, rtol=1e-13)
        flat = distance_weights(features[:, 0])
        assert np.array_equal(flat, distance_weights(features[:, :1]))

    def test_loads_that_moe_sft_ships(self) -> None:
        counts = loads(LLAMA_MOE)
        weights = distance_weights(counts / counts.sum(1, keepdims=True))
        assert weights.round(3).tolist() == [0.260, 0.307, 0.225, 0.207]

    def test_equal_data_sets_have_equal_weights(self) -> None:
        assert distance_weights(np.ones((3, 7))).tolist() == [1 / 3] * 3


class TestPresets:
    def test_inverse_is_the_papers_counter_check(self) -> None:
        given = signals([0.25] * 4, loads(LLAMA_MOE))
        inverse = make_strategy("inverse", SFT, {"eta": 5}).update(given)
        spelled = make_strategy("router_load", SFT, {"distance": "inverse", "eta": 5}).update(given)
        assert np.array_equal(inverse, spelled)
        rule = make_strategy("router_load", SFT, {"eta": 5}).update(given)
        assert inverse.argsort().tolist() == rule.argsort()[::-1].tolist()
        with pytest.raises(UserError, match="no option 'distance'"):
            make_strategy("inverse", SFT, {"distance": "l2"})


class TestSchedule:
    def test_changes_at_the_very_step(self) -> None:
        entries = [{"step": 3, "weights": {"a": 0, "b": 1}}, {"step": 5, "weights": [1, 3]}]
        strategy = make_strategy("schedule", "ab", {"schedule": entries})
        weights = strategy.initial([1, 1], [1, 1])
        plan = BlendPlan("ab", [1000, 1000], weights.tolist(), seed=1)
        log = strategy.weights_log(weights)
        assert log is not None
        plan.replay(log)
        shares = [np.bincount(plan.next_batch(8).domain, minlength=2).tolist() for _ in range(7)]
        assert shares == [[4, 4]] * 3 + [[0, 8]] * 2 + [[2, 6]] * 2

    def test_replays_a_logged_run_to_the_same_samples(self, tmp_path: Path) -> None:
        plan = BlendPlan("ab", [40, 1000], [1, 2], seed=5, max_epochs=2)
        batches = []
        for step in range(30):
            if step % 7 == 6:
                plan.schedule([step, 11], step, "router_load")
            batches.append(plan.next_batch(8))
        names = "ab"
        lines = [
            json.dumps(e | {"weights": dict(zip(names, e["weights"], strict=True))})
            for e in plan.weights_log
        ]
        assert any(e["automatic"] for e in plan.weights_log)
        path = tmp_path / "blend_weights.jsonl"
        # As a killed and resumed run leaves it: some of it twice.
        path.write_text("\n".join(lines[:3] + lines[2:]) + "\n")
        strategy = make_strategy("schedule", names, {"log": str(path)})
        weights = strategy.initial([1, 1], [1, 1])
        again = BlendPlan("ab", [40, 1000], weights.tolist(), seed=5, max_epochs=2)
        log = strategy.weights_log(weights)
        assert log is not None
        again.replay(log)
        for batch in batches:
            other = again.next_batch(8)
            assert np.array_equal(batch.domain, other.domain)
            assert np.array_equal(batch.draw, other.draw)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"schedule": []},
            {"schedule": [{"step": 1}]},
            {"schedule": [{"step": 1, "weights": [1]}]},
            {"schedule": [{"step": 1, "weights": {"a": 1, "c": 1}}]},
            {"schedule": [{"step": 2, "weights": [1, 1]}, {"step": 2, "weights": [1, 1]}]},
            {"schedule": [{"step": -1, "weights": [1, 1]}]},
            {"schedule": [{"step": 1, "weights": [1, -1]}]},
            {"log": "no/such/file.jsonl"},
        ],
    )
    def test_refusals(self, options: dict[str, Any]) -> None:
        with pytest.raises(UserError):
            make_strategy("schedule", "ab", options)
