"""What serves after promotions, roll-backs and pins; the file that says so appears whole or not at all."""

import json

import pytest

from convoy.promotion import (
    PROMOTION_FILE,
    Promotion,
    PromotionError,
    parse_promotion,
    pin,
    promote,
    read_promotion,
    roll_back,
    served_before,
    to_bytes,
    unpin,
    write_promotion,
)


def first(promotion, present):
    return promotion.order(present)[0]


def test_a_promoted_version_serves_until_a_newer_one_is_exported():
    promotion = promote(None, 3, 5, [1, 3, 4, 5])
    assert promotion.order([1, 3, 4, 5]) == [3, 1], "neither 4 nor 5, which it replaces"
    assert promotion.order([1, 3, 4, 5, 6, 7]) == [7, 6, 3, 1]
    assert promotion.describe() == "version 3 is promoted"


def test_a_pinned_version_serves_whatever_is_exported_until_it_is_unpinned():
    pinned = pin(None, 3, 5, [3, 4, 5])
    assert pinned.order([3, 4, 5, 6]) == [3]
    with pytest.raises(PromotionError, match="version 3 is pinned: unpin it first, or pin version 6 instead"):
        promote(pinned, 6, 3, [3, 4, 5, 6])
    assert promote(pinned, 3, 3, [3, 4, 5, 6]) == pinned
    assert first(pin(pinned, 6, 3, [3, 4, 5, 6]), [3, 4, 5, 6]) == 6
    assert first(unpin(pinned), [3, 4, 5]) == 3, "5, which it replaced, does not come back"
    assert first(unpin(pinned), [3, 4, 5, 6]) == 6
    with pytest.raises(PromotionError, match="no version is pinned"):
        unpin(None)


def test_a_roll_back_goes_to_what_served_before():
    """Not to the number before, and a second one goes on backwards."""
    present = [1, 2, 3, 4]
    choice = promote(None, 2, 4, present)
    choice = promote(choice, 3, 2, present)
    assert served_before(choice, 3, present) == [2, 4, 1]
    assert served_before(choice, 3, [1, 3, 4]) == [4, 1], "2 is removed"
    choice = roll_back(choice, 2, 3, present)
    assert (first(choice, present), choice.describe()) == (2, "rolled back from version 3 to version 2")
    assert served_before(choice, 2, present) == [4, 1]
    choice = roll_back(choice, 4, 2, present)
    assert first(choice, present) == 4
    assert first(choice, [*present, 5]) == 5


def test_without_a_choice_a_roll_back_goes_to_the_next_older_version():
    present = [1, 2, 5]
    assert served_before(None, 5, present) == [2, 1]
    choice = roll_back(None, 2, 5, present)
    assert (first(choice, present), first(choice, [*present, 6])) == (2, 6)
    assert served_before(choice, 2, present) == [1]


def test_a_roll_back_of_a_version_that_took_over_by_itself():
    choice = promote(None, 3, 5, [3, 4, 5])
    present = [3, 4, 5, 6, 7]
    assert served_before(choice, 6, [3, 4, 5, 6]) == [3, 5, 4]
    assert served_before(choice, 7, present) == [6, 3, 5, 4]
    rolled = roll_back(choice, 6, 7, present)
    assert served_before(rolled, 6, present) == [3, 5, 4]


def test_a_roll_back_does_not_go_to_what_failed_before():
    choice = promote(promote(promote(None, 2, 5, [1, 2, 5]), 1, 2, [1, 2, 5]), 5, 1, [1, 2, 5])
    assert (choice.version, choice.history) == (5, (2, 1))
    assert served_before(choice, 5, [1, 2, 5]) == [1, 2]
    assert served_before(choice, 2, [1, 2, 5]) == [1], "5 does not load; 1 served after 2, and is older"
    assert served_before(choice, None, [1, 2, 5]) == [5, 1, 2]


def test_a_roll_back_of_a_pinned_version_pins_the_one_before():
    choice = roll_back(pin(None, 5, 4, [4, 5]), 4, 5, [4, 5])
    assert (choice.pinned, choice.version) == (True, 4)


def test_the_file_is_read_as_it_was_written(tmp_path):
    assert read_promotion(tmp_path) is None
    choice = roll_back(promote(None, 2, 4, [2, 4]), 4, 2, [2, 4])
    write_promotion(tmp_path, choice)
    assert read_promotion(tmp_path) == choice
    write_promotion(tmp_path, pin(choice, 2, 4, [2, 4]))
    assert read_promotion(tmp_path).pinned
    assert [file.name for file in tmp_path.iterdir()] == [PROMOTION_FILE]
    with pytest.raises(OSError, match="No such file"):
        write_promotion(tmp_path / "gone", choice)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 0},
        {"version": "3"},
        {"version": True},
        {"newest_known": None},
        {"history": [1, "2"]},
        {"history": 7},
        {"format_version": 2},
    ],
)
def test_an_invalid_file_is_refused(change):
    document = json.loads(to_bytes(Promotion(version=3, newest_known=5))) | change
    with pytest.raises(PromotionError, match=r"serving\.json "):
        parse_promotion(json.dumps(document).encode())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is not JSON: "),
        (b"[]", "a value is of a wrong type: "),
        (b"{", "it is not JSON: "),
        (b"\xff", "it is not JSON: it is not UTF-8$"),
        (b"[" * 100_000, "its values are nested too deep$"),
        (b'{"version": 3}', "it has no 'newest_known'$"),
        (b'{"version": 0}', "0 is not the number of a version$"),
    ],
)
def test_what_is_no_promotion_is_refused_in_plain_words(content, reason):
    with pytest.raises(PromotionError, match=rf"^serving\.json cannot be read: {reason}"):
        parse_promotion(content)
