import copy
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.data.blend import UNIT, Batch, BlendPlan, quantise
from megatron_ext.errors import UserError

weight_lists = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-9, 1e-3), st.floats(0.01, 1.0)), min_size=1, max_size=40
).filter(any)


def make(weights: list[float], sizes: int | list[int] = 10**6, **options: Any) -> BlendPlan:
    names = [f"d{i}" for i in range(len(weights))]
    if isinstance(sizes, int):
        sizes = [sizes] * len(names)
    return BlendPlan(names, sizes, weights, seed=3, **options)


def counts(batch: Batch, domains: int) -> np.ndarray:
    return np.bincount(batch.domain, minlength=domains)


def same(a: Batch, b: Batch) -> bool:
    return (
        a.step == b.step and np.array_equal(a.domain, b.domain) and np.array_equal(a.draw, b.draw)
    )


class TestQuantise:
    @settings(deadline=None)
    @given(weight_lists, st.sampled_from([1.0, 1e-6, 1e6]))
    def test_multiples_that_sum_to_one_and_keep_the_live_live(
        self, weights: list[float], scale: float
    ) -> None:
        names = [str(i) for i in range(len(weights))]
        units = quantise([w * scale for w in weights], names)
        assert units.sum() == UNIT
        assert [u > 0 for u in units] == [w > 0 for w in weights]
        exact = np.array(weights) / math.fsum(weights) * UNIT
        assert np.abs(units - exact).max() <= len(weights)
        assert np.array_equal(quantise((units / UNIT).tolist(), names), units)

    def test_very_many_tiny_weights(self) -> None:
        units = quantise([1e-12] * 1024 + [1.0] * 1023, ["d"] * 2047)
        assert units.sum() == UNIT and units.min() == 1

    @pytest.mark.parametrize("weights", [[0, 0], [1, -1], [1, math.nan], [1, math.inf], [1]])
    def test_refusals(self, weights: list[float]) -> None:
        with pytest.raises(UserError):
            quantise(weights, ["a", "b"])


class TestCounts:
    @settings(max_examples=150, deadline=None)
    @given(weight_lists, st.lists(st.integers(1, 50), min_size=1, max_size=60))
    def test_within_one_sample_of_the_weights_at_every_prefix(
        self, weights: list[float], sizes: list[int]
    ) -> None:
        """Any batch sizes, also ones below the number of domains, and tiny and zero weights."""
        plan = make(weights)
        target = np.array(plan.weights) * UNIT
        for done, size in enumerate(sizes):
            batch = plan.next_batch(size)
            assert len(batch.domain) == len(batch.draw) == size
            drawn_exactly = plan.drawn * UNIT - target.astype(np.int64) * sum(sizes[: done + 1])
            assert np.abs(drawn_exactly).max() < UNIT
            assert not plan.drawn[target == 0].any()

    def test_bound_holds_where_largest_remainders_break_it(self) -> None:
        """Groups of nearly equal weights and small batches: largest remainders reach 1.13."""
        rng = np.random.default_rng(0)
        for _ in range(60):
            group = rng.integers(0, 4, rng.integers(20, 80))
            plan = make(
                (np.array([1, 1.01, 0.2, 0.5])[group] + 1e-3 * rng.random(group.size)).tolist()
            )
            for _ in range(100):
                plan.next_batch(int(rng.integers(1, 12)))
                assert np.abs(plan.credit).max() < UNIT and plan.credit.sum() == 0

    def test_through_weight_changes_counts_follow_the_sum_of_the_weights(self) -> None:
        """Many changes, small batches: counts stay near their target since the start."""
        rng = np.random.default_rng(1)
        for _ in range(40):
            domains, size = int(rng.integers(2, 50)), int(rng.integers(1, 20))
            plan = make(rng.random(domains).tolist(), lag=0)
            target = np.zeros(domains)
            for step in range(120):
                if step % int(rng.integers(1, 20)) == 0:
                    plan.schedule((rng.random(domains) ** 3).tolist(), step, "test")
                batch = plan.next_batch(size)
                assert len(batch.domain) == size and plan.credit.sum() == 0
                target += np.array(plan.weights) * size
                assert np.abs(plan.drawn - target).max() < 1.5

    def test_a_batch_is_never_exceeded_when_too_much_falls_due_at_once(self) -> None:
        """The take-back: eight domains are owed two thirds of a sample each, sixteen are ahead."""
        plan = make([1.0] * 24, lag=0)
        plan.next_batch(16)
        owed = plan.drawn == 0
        assert owed.sum() == 8
        plan.schedule(
            (owed + 1e-3).tolist(), plan.step, "all of them due with the next few samples"
        )
        for _ in range(40):
            batch = plan.next_batch(3)
            assert len(batch.domain) == 3 and plan.credit.sum() == 0
        assert np.abs(plan.credit).max() < UNIT

    def test_pausing_and_resuming(self) -> None:
        """A paused domain is never drawn and is owed nothing when it comes back."""
        rng = np.random.default_rng(2)
        plan = make([1.0] * 30, lag=0)
        for step in range(600):
            if step % 3 == 0:
                weights = rng.random(30) * (rng.random(30) < 0.4)
                weights[rng.integers(30)] = 0.5
                plan.schedule(weights.tolist(), step, "test")
            batch = plan.next_batch(7)
            paused = np.array(plan.weights) == 0
            assert not counts(batch, 30)[paused].any() and not plan.credit[paused].any()
            assert counts(batch, 30).sum() == 7 and plan.credit.sum() == 0
            assert np.abs(plan.credit).max() < 2 * UNIT

    def test_frequent_changes_starve_nobody(self) -> None:
        """Domains that earn far less than a sample between changes are drawn all the same."""
        plan = make([20.0] + [1.0] * 63, lag=0)
        for step in range(1000):
            plan.schedule([20.0 + step % 2] + [1.0] * 63, step, "test")
            plan.next_batch(8)
        expected = 8000 / 83.5
        assert np.abs(plan.drawn[1:] - expected).max() < 2

    def test_draws_of_a_domain_are_consecutive(self) -> None:
        plan = make([0.5, 0.3, 0.2])
        seen: list[list[int]] = [[], [], []]
        for size in (3, 8, 1, 20, 5):
            batch = plan.next_batch(size)
            for domain in range(3):
                seen[domain] += sorted(batch.draw[batch.domain == domain].tolist())
        for domain in range(3):
            assert seen[domain] == list(range(int(plan.drawn[domain])))

    @pytest.mark.parametrize("ranks, micro", [(2, 1), (4, 1), (8, 1), (8, 2)])
    def test_every_rank_sees_the_mixture(self, ranks: int, micro: int) -> None:
        """Greedy order with strided ranks gives each of 8 ranks one of 4 equal domains for ever."""
        plan = make([0.25] * 4)
        per_rank = np.zeros((ranks, 4))
        for _ in range(150):
            slots = plan.next_batch(64).domain.reshape(-1, ranks, micro)
            for rank in range(ranks):
                per_rank[rank] += np.bincount(slots[:, rank].ravel(), minlength=4)
        share = per_rank / per_rank.sum(axis=1, keepdims=True)
        assert np.abs(share - 0.25).max() < 0.05


class TestSchedule:
    def test_takes_effect_lag_steps_after_the_decision(self) -> None:
        plan = make([1.0, 0.0], lag=2)
        for step in range(6):
            if step == 1:
                assert plan.schedule([0.0, 1.0], plan.step, "switch") == 3
            batch = plan.next_batch(4)
            assert set(batch.domain.tolist()) == ({0} if step < 3 else {1})
        assert plan.weights_log == [
            {"step": 0, "weights": [1.0, 0.0], "reason": "initial", "automatic": False},
            {"step": 3, "weights": [0.0, 1.0], "reason": "switch", "automatic": False},
        ]

    def test_a_later_decision_for_the_same_step_replaces(self) -> None:
        plan = make([1.0, 1.0])
        plan.schedule([1.0, 0.0], 0, "first")
        plan.schedule([0.0, 1.0], 0, "second")
        plan.next_batch(4)
        assert set(plan.next_batch(4).domain.tolist()) == {1}
        assert [entry["reason"] for entry in plan.weights_log] == ["initial", "second"]

    def test_the_past_and_nonsense_are_refused(self) -> None:
        plan = make([1.0, 1.0])
        for _ in range(5):
            plan.next_batch(4)
        with pytest.raises(UserError, match="step 5 comes next"):
            plan.schedule([1.0, 1.0], 3, "late")
        with pytest.raises(UserError):
            plan.schedule([math.nan, 1.0], 5, "broken")
        with pytest.raises(UserError):
            plan.schedule([1.0], 5, "short")


def dynamic_run(plan: BlendPlan, steps: int, rng: np.random.Generator) -> list[Batch]:
    """A run with random weight changes and ramp-up, deciding as a controller would."""
    batches = []
    for step in range(steps):
        if rng.random() < 0.3:
            weights = rng.random(len(plan.names)) * (rng.random(len(plan.names)) < 0.7)
            weights[rng.integers(len(weights))] += 0.1
            plan.schedule(weights.tolist(), plan.step, f"decision {step}")
        batches.append(plan.next_batch(4 + 2 * (step // 5)))
    return batches


class TestState:
    @settings(max_examples=12, deadline=None)
    @given(st.integers(0, 2**32), st.integers(2, 12), st.integers(0, 3))
    def test_resume_at_every_step_equals_the_uninterrupted_run(
        self, seed: int, domains: int, lag: int
    ) -> None:
        steps = 24
        rng = np.random.default_rng(seed)
        weights = (rng.random(domains) + 0.01).tolist()
        sizes = rng.integers(20, 200, domains).tolist()
        options: dict[str, Any] = {"lag": lag, "max_epochs": [None] + [1.0] * (domains - 1)}

        plan = make(weights, sizes, **options)
        states, generators, batches = [], [], []
        for step in range(steps):
            states.append(json.dumps(plan.state_dict()))
            generators.append(copy.deepcopy(rng))
            weights_given = (rng.random(domains) + 1e-3) if step % 4 == 2 else None
            if weights_given is not None:
                plan.schedule(weights_given.tolist(), plan.step, "test")
            batches.append(plan.next_batch(5 + step // 6))
        for stop in range(steps):
            resumed, again = make(weights, sizes, **options), generators[stop]
            resumed.load_state_dict(json.loads(states[stop]))
            for step in range(stop, steps):
                if step % 4 == 2:
                    resumed.schedule((again.random(domains) + 1e-3).tolist(), step, "test")
                assert same(resumed.next_batch(5 + step // 6), batches[step])
            assert resumed.state_dict() == plan.state_dict()

    def test_fork_leaves_the_original_alone(self) -> None:
        plan = make([0.5, 0.3, 0.2], [30, 30, 1000], max_epochs=1)
        plan.schedule([0.2, 0.2, 0.6], 0, "later")
        before = copy.deepcopy(plan.state_dict())
        ahead = plan.fork()
        expected = [ahead.next_batch(16) for _ in range(20)]
        assert plan.state_dict() == before
        assert all(same(plan.next_batch(16), batch) for batch in expected)
        assert plan.state_dict() == ahead.state_dict()

    def test_another_blend_is_refused(self) -> None:
        state = make([1.0, 1.0]).state_dict()
        with pytest.raises(UserError, match="d0, d1, d2"):
            make([1.0] * 3).load_state_dict(state)
        with pytest.raises(UserError, match="domain d1 had 1000000 samples"):
            make([1.0, 1.0], [10**6, 5]).load_state_dict(state)
        with pytest.raises(UserError, match="seed"):
            BlendPlan(["d0", "d1"], [10**6] * 2, [1, 1], seed=4).load_state_dict(state)

    @pytest.mark.parametrize("lag", [0, 1, 3])
    def test_replay_of_the_log_gives_the_same_samples(self, lag: int) -> None:
        sizes = [40, 300, 10**6, 10**6]
        plan = make([0.4, 0.3, 0.2, 0.1], sizes, max_epochs=[1, 1, None, None], lag=lag)
        batches = dynamic_run(plan, 60, np.random.default_rng(5))
        log = json.loads(json.dumps(plan.weights_log))
        assert any(entry["automatic"] for entry in log) and len(log) > 10
        again = make([1.0] * 4, sizes, max_epochs=[1, 1, None, None])
        again.replay(log)
        for step, batch in enumerate(batches):
            assert same(again.next_batch(4 + 2 * (step // 5)), batch)
        assert again.weights_log == plan.weights_log
        with pytest.raises(UserError, match="from step 0"):
            again.replay(log)

    def test_known_order_never_changes(self) -> None:
        plan = make([0.5, 0.25, 0.25])
        plan.next_batch(8)
        batch = plan.next_batch(8)
        assert batch.domain.tolist() == [2, 0, 1, 2, 1, 0, 0, 0]
        assert batch.draw.tolist() == [3, 7, 3, 2, 2, 4, 6, 5]


class TestUsedUp:
    def test_a_domain_leaves_after_max_epochs_and_the_rest_is_renormalised(self) -> None:
        plan = make([0.5, 0.3, 0.2], [100, 10**6, 10**6], max_epochs=[1.5, None, None])
        drawn = np.zeros(3, int)
        for _ in range(50):
            drawn += counts(plan.next_batch(20), 3)
        assert drawn[0] == 150 and drawn.sum() == 1000
        assert plan.epochs_used()[0] == 1.5
        assert plan.weights[0] == 0
        assert plan.weights[1] == pytest.approx(0.6, abs=1e-5)
        # Until then 30 % and 20 %, afterwards 60 % and 40 %.
        assert abs(drawn[1] - (0.3 * 300 + 0.6 * 700)) < 2
        last = plan.weights_log[-1]
        assert last["automatic"] and last["reason"] == "used up: d0" and last["step"] == 15

    def test_running_out_within_a_batch_fills_it_from_the_others(self) -> None:
        plan = make([0.8, 0.1, 0.1], [10, 10, 1000], max_epochs=1)
        batch = plan.next_batch(100)
        assert counts(batch, 3).tolist() == [10, 10, 80]
        assert sorted(batch.draw[batch.domain == 2].tolist()) == list(range(80))

    def test_empty_domain_is_never_drawn(self) -> None:
        plan = make([0.5, 0.5, 0.0], [0, 100, 0])
        for _ in range(20):
            assert set(plan.next_batch(16).domain.tolist()) == {1}
        assert plan.epochs_used() == [0.0, 3.2, 0.0]

    def test_weights_given_later_to_a_used_up_domain_are_taken_off_again(self) -> None:
        plan = make([0.9, 0.1], [10, 1000], max_epochs=1, lag=0)
        plan.next_batch(50)
        plan.schedule([0.7, 0.3], plan.step, "a controller that does not know")
        assert set(plan.next_batch(20).domain.tolist()) == {1}

    def test_everything_used_up_is_said_and_leaves_the_plan_unchanged(self) -> None:
        plan = make([0.5, 0.5, 0.0], [32, 32, 100], max_epochs=1)
        for _ in range(4):
            plan.next_batch(16)
        plan.schedule([1, 1, 0], plan.step, "pending")
        before = plan.state_dict()
        with pytest.raises(UserError, match="every domain with a weight is used up"):
            plan.next_batch(16)
        assert plan.state_dict() == before

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.integers(0, 60), min_size=1, max_size=10),
        st.integers(1, 40),
        st.floats(0, 3),
        st.integers(0, 2**31),
    )
    def test_never_beyond_the_limit_and_everything_is_used_in_the_end(
        self, sizes: list[int], batch_size: int, epochs: float, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        plan = make((rng.random(len(sizes)) + 1e-6).tolist(), sizes, max_epochs=epochs, lag=0)
        limit = np.array([int(size * epochs) for size in sizes])
        for step in range(10**4):
            if rng.random() < 0.2:
                plan.schedule((rng.random(len(sizes)) + 1e-6).tolist(), step, "test")
            try:
                plan.next_batch(batch_size)
            except UserError:
                break
            assert (plan.drawn <= limit).all() and np.isfinite(plan.weights).all()
        assert limit.sum() - plan.drawn.sum() < batch_size


@pytest.mark.parametrize(
    "arguments",
    [
        {"names": []},
        {"names": ["a", "a"]},
        {"num_samples": [1]},
        {"num_samples": [1, -1]},
        {"seed": -1},
        {"lag": -1},
        {"max_epochs": [1.0]},
        {"max_epochs": -1.0},
        {"max_epochs": math.nan},
    ],
)
def test_nonsense_is_refused(arguments: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "names": ["a", "b"],
        "num_samples": [10, 10],
        "weights": [1, 1],
        "seed": 0,
    }
    BlendPlan(**good)
    with pytest.raises(UserError):
        BlendPlan(**(good | arguments))


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(UserError):
        make([1.0]).next_batch(0)
