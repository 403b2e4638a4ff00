"""Label files as editors of all systems write them; odd ones are warned of."""

import errno
from dataclasses import replace

import pytest

from serving.errors import LoadError, TransientLoadError
from serving.models.labels import read_labels
from tests.serving.models.recording_backend import make_spec

SPEC = replace(make_spec(dims="[ 3 ]"), name="m", label_files={"y": "labels.txt"})


@pytest.mark.parametrize(
    "content",
    [
        b"one\ntwo\nthree",
        b"one\ntwo\nthree\n\n\n",
        b"one\r\ntwo\r\nthree\r\n",
        b"one\rtwo\rthree\r",
        b"\xef\xbb\xbfone\ntwo  \nthree\n",
        "\ufeffone\r\ntwo\r\nthree".encode("utf-16-le"),
        "\ufeffone\ntwo\nthree\n".encode("utf-16-be"),
    ],
)
def test_labels_of_any_system(tmp_path, content, caplog):
    (tmp_path / "labels.txt").write_bytes(content)
    assert read_labels(tmp_path, SPEC) == {"y": ["one", "two", "three"]}
    assert caplog.text == ""


def test_only_ends_of_lines_divide_labels(tmp_path):
    (tmp_path / "labels.txt").write_text("a\x0bb\nc\u2028d\ne\x85f", encoding="utf-8")
    assert read_labels(tmp_path, SPEC) == {"y": ["a\x0bb", "c\u2028d", "e\x85f"]}


@pytest.mark.parametrize(
    ("content", "warning"),
    [
        ("one\ntwo\n", "m: labels.txt has 2 labels, but there are 3 classes"),
        ("one\ntwo\nthree\nfour\n", "m: labels.txt has 4 labels, but there are 3 classes"),
        ("one\ntwo\none\n", "m: labels.txt has the label 'one' more than once"),
        ("one\n\nthree\n", "m: labels.txt has no label for class 1"),
    ],
)
def test_odd_labels_are_warned_of(tmp_path, content, warning, caplog):
    (tmp_path / "labels.txt").write_text(content)
    read_labels(tmp_path, SPEC)
    assert [record.getMessage() for record in caplog.records] == [warning]


def test_labels_that_cannot_be_read(tmp_path, broken):
    with pytest.raises(LoadError, match=r"the labels in labels\.txt cannot be read: there is no such file"):
        read_labels(tmp_path, SPEC)
    (tmp_path / "labels.txt").write_bytes(b"caf\xe9")
    with pytest.raises(LoadError, match="neither UTF-8 nor UTF-16 with a byte order mark"):
        read_labels(tmp_path, SPEC)
    broken[tmp_path / "labels.txt"] = errno.EIO
    with pytest.raises(TransientLoadError, match="cannot be read: Input/output error"):
        read_labels(tmp_path, SPEC)
