"""Labels: several sessions, import and export, nothing lost."""

import threading

import pytest

from analysis.labels import Label, Labels
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
    monkeypatch.setattr(f"{Labels.__module__}._WAIT", PATIENCE)

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
    assert other.load(text, d_sae=4) == 2
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
    ],
)
def test_what_is_no_label_is_refused_whole(tmp_path, text, message):
    labels = Labels(tmp_path)
    labels.put(1, "kept", "", seen=0.0)
    with pytest.raises(ValueError, match=message):
        labels.load(text, d_sae=9)
    assert labels.table()["label"].tolist() == ["kept"]


def test_a_damaged_file_is_a_sentence(tmp_path):
    (tmp_path / "labels.sqlite").write_bytes(b"not a database, but long enough to look like one" * 50)
    with pytest.raises(ValueError, match=r"labels.sqlite cannot be used"):
        Labels(tmp_path).get(0)
