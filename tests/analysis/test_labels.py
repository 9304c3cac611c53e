"""Labels: several sessions, import and export, nothing lost."""

import os
import sqlite3
import threading
from contextlib import closing

import pandas as pd
import pytest

from analysis.labels import Label, Labels
from analysis.spreadsheet import guarded, unguarded
from tests.helpers import PATIENCE


def test_write_read_and_remove(tmp_path):
    labels = Labels(tmp_path)
    assert labels.get(3) == Label()
    assert labels.table().empty
    assert not list(tmp_path.iterdir()), "reading makes no file"
    labels.put(3, " <b>of</b> ", "reads\nthe", seen=0.0)
    found = labels.get(3)
    assert (found.label, found.note) == ("<b>of</b>", "reads\nthe")
    labels.put(3, "", " ", seen=found.changed)
    assert labels.get(3) == Label()


def test_a_change_of_another_session_is_not_overwritten(tmp_path):
    one, two = Labels(tmp_path), Labels(tmp_path)
    one.put(1, "mine", "", seen=0.0)
    with pytest.raises(ValueError, match="changed in another session: it is 'mine' now"):
        two.put(1, "theirs", "", seen=0.0)
    assert one.get(1).label == "mine"
    seen = two.get(1).changed
    one.put(1, "", "", seen=seen)
    with pytest.raises(ValueError, match="it is gone now"):
        two.put(1, "theirs", "", seen=seen)


def test_many_sessions_at_once_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("analysis.database._WAIT", PATIENCE)

    def write(session: int) -> None:
        for index in range(10):
            Labels(tmp_path).put(session * 100 + index, f"{session} {index}", "", seen=0.0)

    threads = [threading.Thread(target=write, args=(session,)) for session in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    table = Labels(tmp_path).table()
    assert len(table) == 80
    assert all(row.label == f"{row.feature // 100} {row.feature % 100}" for row in table.itertuples())


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_export_and_import(tmp_path, kind):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    labels = Labels(tmp_path / "a")
    labels.put(3, 'with "quotes", commas', "two\nlines é ‮", seen=0.0)
    labels.put(0, "zero", "", seen=0.0)
    text = labels.table().to_json(orient="records") if kind == "json" else labels.table().to_csv(index=False)
    other = Labels(tmp_path / "b")
    assert other.load(text.encode(), d_sae=4) == 2
    columns = ["feature", "label", "note"]
    assert other.table()[columns].equals(labels.table()[columns])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"feature": 9, "label": "x"}]', "there is no feature 9"),
        ('[{"label": "x"}]', "a column feature"),
        ("[1", "a column feature"),
        ("nothing", "a column feature"),
        ("feature,label\nx,y\n", "a column feature"),
        ("", "a column feature"),
        ('[{"feature": 1.5, "label": "x"}]', "Expected `int`"),
        ('[{"feature": true, "label": "x"}]', "Expected `int`"),
        ('[{"feature": 1, "label": ["x"]}]', "Expected `str"),
        ('[{"a":' * 100_000, "nested too deeply"),
        ('[{"feature": ' + "9" * 5000 + "}]", "out of range"),
        ("feature,label\n1,a,b\n", "more cells than the header"),
        ('feature,label\n1,"a\n', "unexpected end of data"),
        ("feature,label\n1," + "a" * 100_000 + "\n", "length <= 65536"),
        ("feature,label\n1,é\n".encode("latin-1"), "utf-8"),
    ],
)
def test_what_is_no_label_is_refused_whole(tmp_path, text, message):
    labels = Labels(tmp_path)
    labels.put(1, "kept", "", seen=0.0)
    with pytest.raises(ValueError, match=message):
        labels.load(text if isinstance(text, bytes) else text.encode(), d_sae=9)
    assert labels.table()["label"].tolist() == ["kept"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_spreadsheet_writes_its_own_encoding(tmp_path, encoding):
    Labels(tmp_path).load("feature,label,note\r\n1,null,é\r\n".encode(encoding), d_sae=4)
    assert Labels(tmp_path).table().iloc[0, :3].tolist() == [1, "null", "é"]


def _sql(*statements: str):
    def write(file):
        with sqlite3.connect(file) as connection:
            for statement in statements:
                connection.execute(statement)
        connection.close()

    return write


_TABLE = (
    "CREATE TABLE labels (feature INTEGER PRIMARY KEY, label TEXT NOT NULL, note TEXT NOT NULL, changed REAL NOT NULL)"
)
_ENDLESS = "WITH RECURSIVE n(feature) AS (SELECT 1 UNION ALL SELECT feature + 1 FROM n) SELECT feature FROM n"


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.write_bytes(b"not a database, but long enough to look like one" * 50),
        lambda file: file.mkdir(),
        os.mkfifo,
        lambda file: file.symlink_to(file),
        _sql("CREATE TABLE labels (feature INTEGER)"),
        _sql("CREATE TABLE other (feature INTEGER)"),
        _sql(f"CREATE VIEW labels AS {_ENDLESS}"),
        _sql(_TABLE, "CREATE TRIGGER t AFTER INSERT ON labels BEGIN DELETE FROM labels; END"),
        _sql(_TABLE, "INSERT INTO labels VALUES (0, x'ff00', '', 0.0)"),
        _sql(_TABLE, "INSERT INTO labels VALUES (0, '', '', 'yesterday')"),
        _sql(_TABLE, "INSERT INTO labels VALUES (0, '', '', 1e300)"),
        _sql(_TABLE, "INSERT INTO labels VALUES (0, CAST(x'ff' AS TEXT), '', 0.0)"),
    ],
    ids=["no database", "directory", "pipe", "loop", "other columns", "other table", "endless view", "trigger", "blob",
         "text for a time", "no time", "no UTF-8"],
)  # fmt: skip
def test_a_file_that_holds_no_labels_is_a_sentence(tmp_path, write):
    write(tmp_path / "labels.sqlite")
    for ask in (lambda labels: labels.get(0), lambda labels: labels.table()):
        with pytest.raises(ValueError, match=r"labels.sqlite cannot be used") as refused:
            ask(Labels(tmp_path))
        assert len(str(refused.value)) < 500 and "\n" not in str(refused.value)


def test_another_programs_database_is_left_as_it_is(tmp_path):
    file = tmp_path / "labels.sqlite"
    _sql("CREATE TABLE other (feature INTEGER)")(file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="another program's"):
        Labels(tmp_path).put(1, "mine", "", seen=0.0)
    assert file.read_bytes() == before


def test_a_file_that_another_program_locks_is_a_sentence_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr("analysis.database._WAIT", 0.05)
    labels = Labels(tmp_path)
    labels.put(1, "kept", "", 0.0)
    with closing(sqlite3.connect(labels._file)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ValueError, match="in use by another program"):
            labels.put(2, "new", "", 0.0)
        with pytest.raises(ValueError, match="in use by another program"):
            labels.get(1)
    assert labels.get(1).label == "kept"


def test_an_export_that_a_spreadsheet_opens_holds_no_formula_and_comes_back(tmp_path):
    texts = ["=1+1", "+1", "-1", "@x", "\tx", " =1", "'=1", "''-1", "'quoted'", "plain", "1"]
    table = pd.DataFrame({"feature": range(len(texts)), "label": texts, "number": -1.5})
    safe = guarded(table)
    assert not safe["label"].str.strip().str.startswith(("=", "+", "-", "@")).any()
    assert safe["number"].tolist() == table["number"].tolist() and safe["label"].tolist()[-3:] == texts[-3:]
    assert [unguarded(text) for text in safe["label"]] == texts
    labels = Labels(tmp_path)
    labels.load(safe[["feature", "label"]].to_csv(index=False).encode(), len(texts))
    assert labels.table()["label"].tolist() == texts
