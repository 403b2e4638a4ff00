"""Tests of the small studies: the perceptron, T and C, the chain rule, the price of a FLOP, frameworks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.errors import ConfigError
from trainer.models.lecture import LectureNet
from trainer.report import figures
from trainer.studies import STUDIES, chain_rule, frameworks, load_study, perceptron_page
from trainer.studies.chain_rule import by_autograd, by_differences, make_leaves, run_backward, run_forward
from trainer.studies.flops import FlopsConfig, make_page, study_flops, training_gflops
from trainer.studies.frameworks import check_calls, numpy_forward
from trainer.studies.perceptron import (
    C_SHAPE,
    T_SHAPE,
    PerceptronConfig,
    make_exclusive_or,
    make_letters,
    make_separable,
    study_perceptron,
    train_on_letters,
    train_perceptron,
)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_perceptron_finds_a_line_where_there_is_one(seed: int) -> None:
    points, sides = make_separable(40, seed)
    assert set(sides.tolist()) == {-1.0, 1.0}
    found = train_perceptron(points, sides, passes=1000)
    assert found.is_solved
    inputs = torch.cat([points, torch.ones(40, 1, dtype=torch.float64)], dim=1)
    assert torch.equal((inputs @ found.lines[-1]).sign(), sides)


def test_a_perceptron_never_solves_exclusive_or() -> None:
    found = train_perceptron(*make_exclusive_or(), passes=50)
    assert len(found.mistakes) == 50
    assert min(found.mistakes) > 0


def test_letters_are_all_turns_at_all_places_and_shared_weights_find_them_at_new_ones() -> None:
    images, letters, places = make_letters()
    assert images.shape == (2 * 4 * 36, 1, 8, 8)
    assert set(images.sum(dim=(1, 2, 3)).tolist()) == {5.0}  # T and C have five pixels each
    assert sum(map(sum, T_SHAPE)) == sum(map(sum, C_SHAPE)) == 5
    assert len(images.flatten(1).unique(dim=0)) == len(images)
    assert torch.bincount(letters).tolist() == [144, 144]
    assert torch.bincount(places).tolist() == [8] * 36
    found = train_on_letters(filters=8, epochs=15, seed=0)
    assert found.curves["shared"][-1, 1] > 0.85 > 0.6 > found.curves["own"][-1, 1]


def test_the_chain_rule_by_hand_agrees_with_autograd_and_with_differences() -> None:
    leaves = make_leaves(3)
    gradients, known, near = run_backward(run_forward(leaves)), by_autograd(leaves), by_differences(leaves)
    for name in leaves:
        torch.testing.assert_close(gradients[name], known[name], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradients[name], near[name], rtol=1e-6, atol=1e-8)


def test_prices_are_the_lectures_and_the_users() -> None:
    assert training_gflops() == pytest.approx(4800, rel=0.01)  # 1.33 M multiply-adds, 2 * 3 * 600,000 times
    lecture, here = make_page(1000.0, 500.0).tables[0].rows
    assert lecture[3] == pytest.approx(12.7, abs=0.05)  # as on page 35
    assert here[1:] == (1000.0, 500.0, 2.0)
    assert make_page(1000.0, None).tables[0].rows[1][2:] == (None, None)


def test_calls_of_the_lecture_are_looked_up_and_numpy_computes_the_net() -> None:
    calls = {name: is_there for name, is_there, _ in check_calls()}
    assert calls["torch.gels(b, A) (page 48)"] is hasattr(torch, "gels") is False
    net = LectureNet(num_channels=1, image_size=28, num_classes=10).eval()
    images = torch.randn(3, 1, 28, 28)
    with torch.inference_mode():
        expected = net(images).numpy()
    np.testing.assert_allclose(numpy_forward(net)(images.numpy()), expected, atol=1e-5)


def test_each_study_has_a_command_line_and_a_function() -> None:
    assert load_study("chain-rule") == (chain_rule.ChainRuleConfig, chain_rule.study_chain_rule)
    assert all(run.__module__.startswith(options.__module__) for options, run in map(load_study, STUDIES))


def test_a_study_writes_its_page(tmp_path: Path) -> None:
    study_flops(FlopsConfig(size=16, seconds=0.01, device="cpu", run_dir=tmp_path / "flops"))
    assert json.loads((tmp_path / "flops/result.json").read_text())["study"] == "flops"
    assert "<script" not in (tmp_path / "flops/report.html").read_text()


def test_figures_are_drawn_without_a_warning() -> None:
    separable, letters = make_separable(10, 0), train_on_letters(filters=1, epochs=1, seed=0)
    found = train_perceptron(*separable, passes=5)
    pages = [
        perceptron_page.make_page(found, train_perceptron(*make_exclusive_or(), passes=5), letters),
        chain_rule.make_page(make_leaves(0)),
        frameworks.make_page(check_calls(), {"PyTorch": 0.001, "NumPy": 0.002}, 1e-7, 16),
    ]
    with figures.style():
        for figure in (figure for page in pages for figure in page.figures):
            for narrow in (False, True):
                assert figure.draw(narrow=narrow).axes


def test_values_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--passes"):
        study_perceptron(PerceptronConfig(passes=0, run_dir=tmp_path / "a"))
    with pytest.raises(ConfigError, match="--price"):
        study_flops(FlopsConfig(price=0, run_dir=tmp_path / "b"))
