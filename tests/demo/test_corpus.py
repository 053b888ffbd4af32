"""The demo's check is worth something: it knows the package and catches wrong answers."""

from __future__ import annotations

from typing import Any

import pytest

from host_client.demo import corpus
from host_client.demo.corpus import Truth, Verdict

TRUTH = Truth(frozenset({"Predict", "RLM"}), frozenset({"COPRO", "BootstrapFewShotWithRandomSearch"}))
RIGHT = {"Predict": "Predicts.", "RLM": "Recurses."}
OPTIMIZERS = {"COPRO": "Optimizes.", "BootstrapFewShotWithRandomSearch": "Searches."}


def check_modules(answer: Any) -> Verdict:
    return corpus.check_answer(answer, OPTIMIZERS, TRUTH)[0]


def test_right_answer_passes() -> None:
    assert [verdict.passed for verdict in corpus.check_answer(RIGHT, OPTIMIZERS, TRUTH)] == [True, True]


def test_missing_name_fails_and_is_named() -> None:
    verdict = check_modules({"RLM": "Recurses."})
    assert (verdict.passed, verdict.missing, verdict.precision, verdict.recall) == (
        False, frozenset({"Predict"}), 1.0, 0.5,
    )  # fmt: skip


@pytest.mark.parametrize("wrong", ["LM", "COPRO", "Nonexistent", "Module"])
def test_wrong_name_fails_and_is_named(wrong: str) -> None:
    verdict = check_modules({**RIGHT, wrong: "Something."})
    assert (verdict.passed, verdict.wrong, verdict.recall) == (False, frozenset({wrong}), 1.0)
    assert verdict.precision == pytest.approx(2 / 3)


@pytest.mark.parametrize("line", ["", "   ", None, 3, "two\nlines", "x" * 301, "[ERROR] rate limit"])
def test_name_without_one_good_line_fails(line: Any) -> None:
    verdict = check_modules({**RIGHT, "RLM": line})
    assert (verdict.passed, verdict.bad_lines) == (False, frozenset({"RLM"}))


@pytest.mark.parametrize("answer", [None, [], ["Predict", "RLM"], "Predict, RLM", {}])
def test_answer_that_is_no_dict_finds_nothing(answer: Any) -> None:
    verdict = check_modules(answer)
    assert (verdict.passed, verdict.recall) == (False, 0.0)


def test_alias_and_qualified_name_count_as_the_class() -> None:
    optimizers = {"dspy.COPRO": "Optimizes.", "BootstrapRS": "Searches."}
    assert corpus.check_answer(RIGHT, optimizers, TRUTH)[1].passed


def test_truth_comes_from_the_package_itself() -> None:
    truth = corpus.inspect_package()
    assert {"Predict", "ChainOfThought", "ReAct", "RLM"} <= truth.modules
    assert {"MIPROv2", "GEPA", "BootstrapFewShot"} <= truth.optimizers
    assert not truth.modules & truth.optimizers
    assert not {"Module", "Teleprompter", "LM", "BootstrapRS"} & (truth.modules | truth.optimizers)


def test_source_is_the_installed_package() -> None:
    source = corpus.read_source()
    assert len(source) > 100
    assert "class RLM(" in source["dspy/predict/rlm.py"]
    assert list(source) == sorted(source)


def test_public_names_hold_what_the_source_alone_does_not_show() -> None:
    names = corpus.public_names()
    assert {"Predict", "RLM", "MIPROv2"} <= set(names)
    assert not any(name.startswith("_") for name in names)
