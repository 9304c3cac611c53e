"""Comments with a name."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest

from analysis.comments import Comments
from tests.helpers import PATIENCE


def test_comments_are_added_in_order_and_removed(tmp_path):
    comments = Comments(tmp_path)
    assert comments.all() == [] and comments.table().empty and not list(tmp_path.iterdir())
    comments.add(7, " Ada ", "reads ' the'\n")
    comments.add(3, "Bo", "unclear")
    comments.add(7, "Bo", "agreed")
    said = [(each.feature, each.author, each.text) for each in comments.all()]
    assert said == [(7, "Ada", "reads ' the'"), (3, "Bo", "unclear"), (7, "Bo", "agreed")]
    assert comments.table()["text"].tolist() == ["reads ' the'", "unclear", "agreed"]
    first = comments.all()[0].id
    comments.remove(first)
    comments.remove(first)  # somebody else has removed it
    assert [each.text for each in Comments(tmp_path).all()] == ["unclear", "agreed"]


@pytest.mark.parametrize(("author", "text"), [("", "a"), (" ", "a"), ("x" * 61, "a"), ("a", " \n"), ("a", "x" * 5001)])
def test_one_without_a_name_or_a_text(tmp_path, author, text):
    with pytest.raises(ValueError, match="characters"):
        Comments(tmp_path).add(1, author, text)
    assert Comments(tmp_path).all() == []


def test_sessions_write_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("analysis.database._WAIT", PATIENCE)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda feature: Comments(tmp_path).add(feature, "Ada", "text"), range(60)))
    assert sorted(each.feature for each in Comments(tmp_path).all()) == list(range(60))


@pytest.mark.parametrize("value", ["feature = 'x'", "author = ''", "written = -1", "text = X'00'"])
def test_rows_that_are_no_comments(tmp_path, value):
    Comments(tmp_path).add(1, "Ada", "text")
    with sqlite3.connect(tmp_path / "comments.sqlite") as connection:
        connection.execute(f"UPDATE comments SET {value}")
    with pytest.raises(ValueError, match=r"comments\.sqlite cannot be used"):
        Comments(tmp_path).all()
