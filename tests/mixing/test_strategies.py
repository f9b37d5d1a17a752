"""Strategies against the papers' figures and references written anew."""

import json
import logging
import math
import pkgutil
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mixing.made_signals import LLAMA_MOE, SFT, iterate, loads, signals

from megatron_ext.errors import UserError
from megatron_ext.mixing.strategies import STRATEGIES, make_strategy, published
from megatron_ext.mixing.strategies.base import allowed_options

SEVEN = ("en_cc", "en_c4", "github", "en_wikipedia", "en_book", "en_arxiv", "en_stack")

# MoLM's, 32 experts, from the same place.
MOLM = """
55 10 54 47 7286 40 3 743 4422 3 1051 0 43 40 5073 13233
    10569 0 4032 1273 35 987 291 2129 1 16 1055 22 93 2535 30 5
2319 5 151 86 8469 280 2288 3223 4811 77 1098 0 1292 494 12031 16821
    1983 0 2638 1240 18 1134 112 2114 17 37 421 131 511 7241 190 44
241 1 475 240 3173 1992 81 3356 5081 3291 480 0 12886 5469 23834 18833
    2229 0 1761 1133 53 2639 134 384 119 247 1172 1141 1938 23060 459 718
952 37 1266 455 18308 246 50 19013 17415 4576 1288 0 30468 16694 73932 62748
    17438 4 10364 3994 170 6253 499 3995 473 496 4384 1687 11807 68306 1087 31"""


class TestRouterLoad:
    """The paper's update, iterated on fixed loads that its repository ships."""

    @pytest.mark.parametrize(
        ("rounds", "expected"),
        [
            (1, [0.252, 0.264, 0.244, 0.240]),
            (5, [0.257, 0.315, 0.222, 0.206]),
            (10, [0.256, 0.370, 0.199, 0.175]),
            (20, [0.242, 0.452, 0.166, 0.140]),
        ],
    )
    def test_llama_moe(self, rounds: int, expected: list[float]) -> None:
        strategy = make_strategy("router_load", SFT)
        history = iterate(strategy, [0.25] * 4, rounds, counts=loads(LLAMA_MOE))
        assert history[rounds].round(3).tolist() == expected
        assert math.fsum(history[rounds]) == pytest.approx(1, abs=1e-15)

    def test_llama_moe_from_loads_of_four_digits(self) -> None:
        digits = np.round(loads(LLAMA_MOE) / loads(LLAMA_MOE).sum(1, keepdims=True) * 1e4)
        strategy = make_strategy("router_load", SFT)
        first = strategy.update(signals([0.25] * 4, digits.astype(np.int64)))
        assert first.round(3).tolist() == [0.252, 0.263, 0.244, 0.240]
        assert round(strategy.report()["distances"][0][2], 4) == 0.0326

    def test_llama_moe_distances(self) -> None:
        strategy = make_strategy("router_load", SFT)
        strategy.update(signals([0.25] * 4, loads(LLAMA_MOE)))
        report = strategy.report()
        assert np.round(report["distance"], 4).tolist() == [0.0254, 0.0301, 0.0220, 0.0203]
        pairs = np.array(report["distances"])
        upper = [round(pairs[i, j], 4) for i in range(4) for j in range(i + 1, 4)]
        assert upper == [0.0392, 0.0325, 0.0299, 0.0427, 0.0383, 0.0129]

    def test_molm(self) -> None:
        strategy = make_strategy("router_load", SFT, {"c": 0.8})
        history = iterate(strategy, [0.25] * 4, 40, counts=loads(MOLM))
        distance = strategy.report()["distance"]
        assert np.round(distance, 4).tolist() == [0.2013, 0.1412, 0.1467, 0.1260]
        for rounds in (5, 40):
            assert history[rounds].round(3).tolist() == [0.286, 0.239, 0.242, 0.233]
        assert np.allclose(history[40], history[39], atol=1e-15)

    @pytest.mark.parametrize("distance", ["l2", "cosine", "inverse"])
    def test_against_scalar_reference(self, distance: str) -> None:
        counts = loads(LLAMA_MOE)
        share = [[int(c) / sum(map(int, row)) for c in row] for row in counts]

        def dot(a: list[float], b: list[float]) -> float:
            return math.fsum(x * y for x, y in zip(a, b, strict=True))

        if distance == "cosine":
            delta = [
                1 - sum(dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) for b in share) / 4
                for a in share
            ]
        else:
            delta = [sum(math.dist(a, b) for b in share) / 4 for a in share]
        if distance == "inverse":  # largest and smallest swap, and so do the two in between
            order = sorted(range(4), key=lambda i: delta[i])
            values = [delta[i] for i in order]
            for place, i in enumerate(order):
                delta[i] = values[3 - place]
        weights = [0.1, 0.2, 0.3, 0.4]
        raised = [w * math.exp(10 * d) for w, d in zip(weights, delta, strict=True)]
        expected = [0.95 * r / sum(raised) + 0.05 / 4 for r in raised]
        result = make_strategy("router_load", SFT, {"distance": distance}).update(
            signals(weights, counts)
        )
        assert np.allclose(result, expected, rtol=1e-13, atol=0)

    def test_several_layers_are_averaged(self) -> None:
        stack = np.stack([loads(LLAMA_MOE), loads(LLAMA_MOE)[::-1]], 1)[None]
        strategy = make_strategy("router_load", SFT)
        both = []
        for layers in ((0,), (1,), (0, 1)):
            strategy.update(replace(signals([0.25] * 4), counts=stack, layers=layers))
            both.append(strategy.report()["distance"])
        assert np.allclose(np.add(both[0], both[1]) / 2, both[2], rtol=1e-14)

    def test_paused_and_unseen_data_sets(self) -> None:
        counts = loads(LLAMA_MOE)
        three = make_strategy("router_load", SFT[:3]).update(
            signals([0.2, 0.3, 0.5], counts[[0, 1, 3]])
        )
        four = make_strategy("router_load", SFT)
        paused = four.update(signals([0.2, 0.3, 0.0, 0.5], counts))
        assert paused[2] == 0 and np.allclose(paused[[0, 1, 3]], three, rtol=1e-14)
        assert four.report()["distance"][2] is None

        unseen = counts.copy()
        unseen[2] = 0
        strategy = make_strategy("router_load", SFT, {"c": 0.0})
        kept = strategy.update(signals([0.2, 0.3, 0.1, 0.4], unseen))
        assert kept[2] == pytest.approx(0.1, rel=1e-14) and kept[1] > 0.3

    def test_few_data_sets(self, caplog: pytest.LogCaptureFixture) -> None:
        with pytest.raises(UserError, match="compares data sets"):
            make_strategy("router_load", ["only"])
        strategy = make_strategy("router_load", SFT)
        with caplog.at_level(logging.WARNING):
            strategy.initial([1, 1, 1, 0], [1] * 4)
        assert not caplog.records
        with caplog.at_level(logging.WARNING):
            strategy.initial([1, 1, 0, 0], [1] * 4)
        assert "only smoothed" in caplog.text
        weights = iterate(strategy, [0.9, 0.1, 0, 0], 400, counts=loads(LLAMA_MOE))[400]
        assert np.allclose(weights, [0.5, 0.5, 0, 0])  # indeed


class TestReferenceLoss:
    reference = {"a": 1.5, "b": 2.0, "c": 0.7}

    @pytest.mark.parametrize("clipped", [False, True])
    def test_against_scalar_reference(self, clipped: bool) -> None:
        # LLM-Shearing: alpha = softmax(log w + diff), then 1e-4 spread evenly.
        losses, weights = [1.9, 1.2, 0.8], [0.6, 0.1, 0.3]
        strategy = make_strategy(
            "reference_loss", "abc", {"references": self.reference, "clipped": clipped}
        )
        for _ in range(30):
            excess = [loss - self.reference[n] for n, loss in zip("abc", losses, strict=True)]
            if clipped:
                excess = [max(0.0, e) for e in excess]
            result = strategy.update(signals(weights, valid_loss=np.array(losses)))
            logits = [math.log(w) + e for w, e in zip(weights, excess, strict=True)]
            total = math.fsum(map(math.exp, logits))
            weights = [(1 - 1e-4) * math.exp(x) / total + 1e-4 / 3 for x in logits]
            assert np.allclose(result, weights, rtol=1e-13, atol=0)
            losses = [loss * 0.98 for loss in losses]

    def test_llama_moe_paper_variant(self) -> None:
        # w * exp(max(0, L - L_ref)), normalised, no smoothing; references by name.
        options = {"references": "llama2_7b_slimpajama", "clipped": True, "c": 0}
        strategy = make_strategy("reference_loss", SEVEN, options)
        weights = make_strategy("llama", SEVEN).initial([1] * 7, [1] * 7)
        losses = np.array([1.9, 2.0, 0.9, 1.7, 2.0, 1.3, 1.4])
        reference = [1.6916865110397339, 2.074881076812744, 0.6984495520591736]
        reference += [1.5899001359939575, 1.925248146057129, 1.2408167123794556, 1.4974864721298218]
        expected = weights * np.exp(np.maximum(losses - reference, 0))
        result = strategy.update(signals(weights, valid_loss=losses))
        assert np.allclose(result, expected / expected.sum(), rtol=1e-14)

    def test_train_loss_unknown_and_paused(self) -> None:
        strategy = make_strategy(
            "reference_loss", "abc", {"references": self.reference, "loss": "train", "c": "1e-4"}
        )
        assert strategy.needs == {"train_loss"}
        folds = np.zeros((2, 3, 2))
        folds[:, 0] = [[30, 20], [26, 15]]  # 1.6; none of b
        folds[:, 2] = [[7, 10], [7, 10]]
        result = strategy.update(signals([0.5, 0.2, 0.3], train_loss=folds))
        assert strategy.report()["loss"] == [1.6, None, 0.7]
        assert result[1] == pytest.approx(0.2 * (1 - 1e-4) + 1e-4 / 3, rel=1e-14)
        assert result[0] > 0.5 and result.sum() == pytest.approx(1)
        paused = strategy.update(signals([0.5, 0.0, 0.5], train_loss=folds))
        assert paused[1] == 0 and np.isfinite(paused).all()

    @pytest.mark.parametrize("references", [None, {"a": 1.0}, "no_such", {"a": 1, "b": 1, "d": 1}])
    def test_references_that_do_not_fit(self, references: Any) -> None:
        with pytest.raises(UserError, match="references"):
            make_strategy("reference_loss", "abc", {"references": references})

    def test_a_domain_far_above_its_reference_takes_all_without_overflow(self) -> None:
        options = {"references": {"a": -1e4, "b": 0.0, "c": 0.0}}
        result = make_strategy("reference_loss", "abc", options).update(
            signals([0.2, 0.4, 0.4], valid_loss=np.ones(3))
        )
        assert np.allclose(result, [1 - 1e-4 * 2 / 3, 1e-4 / 3, 1e-4 / 3])


class TestMakeStrategy:
    def test_every_built_in_name_resolves(self) -> None:
        for name in STRATEGIES:
            options: dict[str, Any] = {
                "reference_loss": {"references": dict.fromkeys(SFT, 1.0)},
                "schedule": {"schedule": [{"step": 0, "weights": [1, 2, 3, 4]}]},
            }.get(name, {})
            strategy = make_strategy(name, SFT, options)
            assert json.loads(json.dumps(strategy.state_dict())) == strategy.state_dict()

    def test_users_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = (
            "from megatron_ext.mixing.strategies import Strategy\n"
            "class Mine(Strategy):\n"
            "    def __init__(self, names, *, factor=0.5, **options):\n"
            "        super().__init__(names, **options)\n"
            "        self.factor = factor\n"
            "    def update(self, signals):\n"
            "        return signals.weights * [self.factor, 2 - self.factor]\n"
        )
        (tmp_path / "my_lab_mixing.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        options = {"factor": 0.25, "initial": "uniform"}
        strategy = make_strategy("my_lab_mixing:Mine", "ab", options)
        assert strategy.initial([3, 1], [1, 1]).tolist() == [0.5, 0.5]
        assert strategy.update(signals([0.5, 0.5])).tolist() == [0.125, 0.875]
        with pytest.raises(UserError, match="no option 'facto'.*\n.*factor, initial"):
            make_strategy("my_lab_mixing:Mine", "ab", {"facto": 1})

    def test_the_example_of_the_docs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        text = (Path(__file__).parents[2] / "docs" / "mixing.md").read_text()
        (example,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        (tmp_path / "docs_mixing_example.py").write_text(example)
        monkeypatch.syspath_prepend(tmp_path)
        strategy = make_strategy("docs_mixing_example:Temperature", "abc", {"temperature": 2})
        losses = np.array([1.0, 3.0, math.nan])
        result = strategy.update(signals([0.5, 0.5, 0], valid_loss=losses))
        assert result[1] / result[0] == pytest.approx(math.e) and result[2] == 0

    def test_the_docs_name_every_strategy_mixture_and_option(self) -> None:
        text = (Path(__file__).parents[2] / "docs" / "mixing.md").read_text()
        names = {*STRATEGIES, *published.REFERENCE_LOSSES}
        for name in ("sequential", "schedule", "reference_loss", "router_load", "load_progress"):
            names |= set(allowed_options(pkgutil.resolve_name(STRATEGIES[name])))
        assert [name for name in sorted(names) if f"`{name}" not in text] == []

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("router_laod", "did you mean 'router_load'"),
            ("no_such_module:X", "cannot be imported"),
            ("json:NoSuch", "cannot be imported"),
            ("json:JSONDecoder", "not a subclass"),
        ],
    )
    def test_unknown_names(self, name: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            make_strategy(name, SFT)

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("router_load", {"etta": 1}, "it takes eta, c, distance, initial"),
            ("router_load", {"eta": "fast"}, "eta='fast'"),
            ("router_load", {"eta": math.nan}, "eta=nan"),
            ("router_load", {"c": 1.5}, "at least 0 and at most 1"),
            ("router_load", {"distance": "l1"}, "l2, cosine, inverse"),
            ("static", {"initial": "lama"}, "recipe, uniform, data_size, llama"),
            ("llama", {"initial": "uniform"}, "it takes none"),
            ("sequential", {"period": 1.5}, "whole number"),
            ("sequential", {"order": "size"}, "alphabetical"),
            ("reference_loss", {"references": {}, "loss": "eval"}, "references"),
        ],
    )
    def test_bad_options(self, name: str, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            make_strategy(name, SFT, options)

    def test_numbers_that_yaml_reads_as_text(self) -> None:
        assert make_strategy("router_load", SFT, {"c": "5e-2"}).c == 0.05  # type: ignore
