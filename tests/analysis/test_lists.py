"""Named lists of features."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest

from analysis.labels import Labels
from analysis.lists import Lists
from tests.helpers import PATIENCE


def test_a_feature_is_put_on_lists_and_taken_off(tmp_path):
    lists = Lists(tmp_path)
    assert lists.all() == {} and not list(tmp_path.iterdir())
    lists.put(7, ["induction", " numbers "])
    lists.put(3, ["induction"])
    assert lists.all() == {"induction": [7, 3], "numbers": [7]}
    lists.put(7, ["induction"])
    assert Lists(tmp_path).all() == {"induction": [7, 3]}, "it keeps its place"
    lists.put(7, [])
    lists.put(3, [])
    assert lists.all() == {}


@pytest.mark.parametrize("name", ["", "  ", "x" * 101])
def test_a_name_that_is_none(tmp_path, name):
    lists = Lists(tmp_path)
    lists.put(1, ["a"])
    with pytest.raises(ValueError, match="the name of a list has 1 to 100 characters"):
        lists.put(1, ["b", name])
    assert lists.all() == {"a": [1]}


def test_sessions_write_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("analysis.database._WAIT", PATIENCE)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda feature: Lists(tmp_path).put(feature, ["all", str(feature % 3)]), range(60)))
    found = Lists(tmp_path).all()
    assert sorted(found["all"]) == list(range(60)) and sorted(found["2"]) == list(range(2, 60, 3))


def test_another_file_is_refused(tmp_path):
    (tmp_path / "lists.sqlite").write_bytes(b"nonsense" * 100)
    with pytest.raises(ValueError, match=r"lists\.sqlite cannot be used"):
        Lists(tmp_path).all()
    Labels(tmp_path).put(1, "a label", "", 0.0)
    (tmp_path / "labels.sqlite").rename(tmp_path / "lists.sqlite")
    with pytest.raises(ValueError, match="another program's database"):
        Lists(tmp_path).put(1, ["a"])


def test_rows_that_are_no_features(tmp_path):
    Lists(tmp_path).put(1, ["a"])
    with sqlite3.connect(tmp_path / "lists.sqlite") as connection:
        connection.execute("UPDATE lists SET feature = 'x'")
    with pytest.raises(ValueError, match=r"lists\.sqlite cannot be used"):
        Lists(tmp_path).all()


def test_a_schema_that_is_no_text(tmp_path):
    Lists(tmp_path).put(1, ["a"])
    file = tmp_path / "lists.sqlite"
    file.write_bytes(file.read_bytes().replace(b"KEY (feature", b"KEY (f\xe5ature"))
    with pytest.raises(ValueError, match=r"lists\.sqlite cannot be used") as refused:
        Lists(tmp_path).all()
    assert not isinstance(refused.value, UnicodeDecodeError)
