"""Properties of the splits."""

import hashlib
from random import Random

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from trainer.data.split import hash_split, stratified_split
from trainer.errors import ConfigError

LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=200).map(lambda labels: torch.tensor(labels))
SEEDS = st.integers(0, 2**70)


@given(labels=LABELS, seed=SEEDS, data=st.data())
@settings(max_examples=150, deadline=None)
def test_disjoint_complete_stratified_deterministic(labels: torch.Tensor, seed: int, data: st.DataObject) -> None:
    counts = torch.bincount(labels)
    num_held_out = data.draw(st.integers(0, len(labels) - int((counts > 0).sum())))
    kept, held_out = stratified_split(labels, num_held_out, seed)
    assert len(held_out) == num_held_out
    assert torch.cat([kept, held_out]).sort().values.tolist() == list(range(len(labels)))
    for part in (kept, held_out):
        assert part.dtype == torch.int64
        assert part.tolist() == sorted(part.tolist())
    shares = torch.bincount(labels[held_out], minlength=len(counts))
    assert bool(((counts - shares)[counts > 0] >= 1).all())  # each class keeps a training sample
    quotas = counts * num_held_out / len(labels)
    if bool((quotas <= counts - 1)[counts > 0].all()):  # no class gave its share to another
        assert bool(((shares - quotas).abs() < 1).all())
    again = stratified_split(labels.clone(), num_held_out, seed)
    assert torch.equal(again[0], kept)
    assert torch.equal(again[1], held_out)


def test_the_seed_decides_and_its_stream_is_frozen() -> None:
    labels = torch.arange(1000) % 10
    first, second = (stratified_split(labels, 100, seed)[1] for seed in (0, 1))
    assert not torch.equal(first, second)
    assert first[:8].tolist() == EXPECTED  # a change would move every user's validation set


EXPECTED = [3, 16, 22, 28, 55, 76, 91, 103]


@pytest.mark.parametrize(("num_held_out", "seed"), [(-1, 0), (19, 0), (20, 0), (5, -1)])
def test_impossible_requests(num_held_out: int, seed: int) -> None:
    with pytest.raises(ConfigError):
        stratified_split(torch.arange(20) % 2, num_held_out, seed)


def test_an_empty_data_set() -> None:
    kept, held_out = stratified_split(torch.zeros(0, dtype=torch.int64), 0, 0)
    assert len(kept) == len(held_out) == 0


# An image is its content and its label. Some contents occur several times, also in several classes.
IMAGES = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 3)), max_size=120)


def hold_out(images: list[tuple[int, int]]) -> set[str]:
    return held_out_of([digest(content) for content, _ in images], [label for _, label in images])


def held_out_of(digests: list[str], labels: list[int]) -> set[str]:
    rows = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 32)
    held_out = hash_split(rows, np.array(labels, np.int64))
    found = {each for each, is_held_out in zip(digests, held_out, strict=True) if is_held_out}
    assert held_out.tolist() == [each in found for each in digests]  # duplicates are on one side
    return found


def digest(content: int) -> str:
    return hashlib.sha256(str(content).encode()).hexdigest()


def by_class(images: list[tuple[int, int]]) -> list[set[str]]:
    return [{digest(content) for content, label in images if label == wanted} for wanted in range(4)]


@given(images=IMAGES, order=st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_content_alone_decides_what_is_held_out(images: list[tuple[int, int]], order: Random) -> None:
    held_out = hold_out(images)
    assert held_out == hold_out(order.sample(images, len(images))) == hold_out(images + images)
    for own in by_class(images):
        assert not own or own - held_out  # the class keeps a training image
        if len(own) > 1 and not any(own & other for other in by_class(images) if other != own):
            assert own & held_out


@given(images=IMAGES, others=IMAGES)
@settings(max_examples=150, deadline=None)
def test_other_images_do_not_move_an_image(images: list[tuple[int, int]], others: list[tuple[int, int]]) -> None:
    tenth = f"{2**256 // 10:064x}"
    for before, after in zip(by_class(images), by_class(images + others), strict=True):
        if min(before, default="1") < tenth <= max(before, default="1"):  # the class has images on both sides
            alone = held_out_of(list(before), [0] * len(before))
            assert alone == held_out_of(list(after), [0] * len(after)) & before


def test_a_tenth_is_held_out() -> None:
    images = [(number, number % 4) for number in range(10_000)]
    held_out = hold_out(images)
    assert all(len(own & held_out) == pytest.approx(250, abs=45) for own in by_class(images))
    first = [number for number in range(60) if digest(number) in held_out]
    assert first == [9, 39, 49, 51, 55]  # a change would move every user's test set
