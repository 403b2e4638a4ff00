"""The balanced accuracy, and when the text about an accuracy names it."""

import pytest

from trainer.evaluation.recall import balanced_accuracy, describe_balance


def test_a_class_of_few_images_counts_as_much_as_a_large_one() -> None:
    """66 of 70 images right, as all images of the larger class: 94.29 %, and half of what the small class is."""
    assert balanced_accuracy({"many": 1.0, "few": 0.0}) == 0.5
    assert describe_balance(66 / 70, {"many": 1.0, "few": 0.0}) == (
        ", balanced accuracy 50.00 % (worst class: 'few', recall 0.00 %)"
    )


@pytest.mark.parametrize("recalls", [{}, {"a": 0.9, "b": 0.9}, {"a": 0.91, "b": 0.86}])
def test_close_figures_add_no_text(recalls: dict[str, float]) -> None:
    assert describe_balance(0.9, recalls) == ""


def test_balanced_accuracy_may_be_the_higher_one() -> None:
    text = describe_balance(0.55, {"many": 0.5, "few": 1.0, "odd\udcff\n": 1.0})
    assert text == ", balanced accuracy 83.33 % (worst class: 'many', recall 50.00 %)"
    assert r"'odd\udcff\n'" in describe_balance(0.9, {"many": 0.9, "odd\udcff\n": 0.1})  # printable, on one line


def test_no_classes_have_no_balance() -> None:
    assert balanced_accuracy({}) == 0.0
