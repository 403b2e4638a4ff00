"""Tests of the numbers that the page's section Lecture draws."""

from tests.conftest import ROOT
from trainer.studies.capacity import CapacityConfig, first_points, fit_polynomials
from trainer.studies.page_data import PATH, make_data, to_module


def test_the_page_has_the_studies_numbers() -> None:
    assert PATH.read_text() == to_module(make_data(ROOT / "benchmarks" / "results"))


def test_the_points_are_those_of_the_studys_figure() -> None:
    config = CapacityConfig()
    x, y = first_points(config.num_points, config.noise, config.seed)
    drawn = fit_polynomials(config.num_points, config.noise, 1, config.seed)
    assert x.tolist() == drawn.x.tolist()
    assert y.tolist() == drawn.y.tolist()


def test_all_networks_have_both_errors() -> None:
    networks = make_data(ROOT / "benchmarks" / "results")["networks"]
    assert len(networks["widths"]) == len(networks["train"]) == len(networks["test"])
