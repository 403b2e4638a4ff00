"""Values that must be the same on all ranks, and which ranks are named if they differ."""

from pathlib import Path

import pytest
import torch

from trainer.errors import DesyncError, MismatchError
from trainer.ranks.consistency import (
    CODE,
    check_same,
    check_weights,
    code_sha256,
    digest_of,
    minority_positions,
    processor,
)


def test_the_digest_of_the_code_depends_on_contents_and_names(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    first = code_sha256([tmp_path])
    (tmp_path / "notes.txt").write_text("no code")
    assert code_sha256([tmp_path]) == first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert code_sha256([tmp_path]) != first
    (tmp_path / "b.py").rename(tmp_path / "a.py")
    (tmp_path / "a.py").write_text("x = 2\n")
    assert code_sha256([tmp_path]) != first


def test_the_digest_covers_all_code_of_the_trainer() -> None:
    assert [package.name for package in CODE] == ["convoy", "trainer"]
    for package, module in zip(CODE, ("processes.py", "train.py"), strict=True):
        assert (package / module).is_file()


def test_a_rank_with_other_code_is_named() -> None:
    same = {"the code of the trainer": "aa", "the data set": "d"}
    check_same([same] * 4)
    other = {**same, "the code of the trainer": "bb"}
    with pytest.raises(
        MismatchError, match="the code of the trainer differs between ranks: rank 2 has bb, the others aa"
    ):
        check_same([same, same, other, same])
    with pytest.raises(
        MismatchError, match="trainer differs between ranks: ranks 0, 2 have aa, ranks 1, 3 have bb; "
    ) as e:
        check_same([same, other, same, other])
    assert e.value.ranks == [0, 1, 2, 3]


def test_ranks_with_other_weights_are_named() -> None:
    check_weights([(1, 2)] * 3, step=7)
    with pytest.raises(DesyncError, match="differ at step 7: rank 1 differs from the others") as caught:
        check_weights([(1, 2), (1, 3), (1, 2)], step=7)
    assert caught.value.ranks == [1]
    with pytest.raises(DesyncError, match="at step 7: ranks 0, 1 disagree, and no majority") as caught:
        check_weights([(1, 2), (1, 3)], step=7)
    assert caught.value.ranks == [0, 1]


@pytest.mark.parametrize(
    ("values", "differing"),
    [
        ("a", []),
        ("aa", []),
        ("aba", [1]),
        ("baaca", [0, 3]),
        ("ab", [0, 1]),
        ("abac", [0, 1, 2, 3]),
        ("aabb", [0, 1, 2, 3]),
    ],
)
def test_without_a_majority_all_positions_differ(values: str, differing: list[int]) -> None:
    assert minority_positions(values) == differing


@pytest.mark.parametrize("bit", [0, 23, 31])
def test_one_bit_of_a_weight_changes_the_digest(bit: int) -> None:
    torch.manual_seed(0)
    weights, count = torch.randn(10, 10), torch.tensor(5)
    before = digest_of([weights, count])
    assert torch.equal(digest_of([weights.clone(), count]), before)
    weights.view(torch.int32)[3, 4] ^= 1 << bit if bit < 31 else -(1 << 31)
    assert not torch.equal(digest_of([weights, count]), before)


def test_weights_that_swap_places_change_the_digest() -> None:
    assert not torch.equal(digest_of([torch.tensor([1.0, 2.0])]), digest_of([torch.tensor([2.0, 1.0])]))


def test_the_kind_of_processor_names_its_bfloat16_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    names = set()
    for flags in ("fpu", "fpu avx512_bf16", "fpu avx512_bf16 amx_bf16"):
        monkeypatch.setattr("trainer.hardware._cpuinfo", lambda field, flags=flags: flags)
        names.add(processor(cpu))
    assert len(names) == 3
