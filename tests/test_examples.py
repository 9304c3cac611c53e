"""The notebook runs, cell by cell, as Jupyter does, and finds what it says; and every piece of Python in docs runs."""

import json
import re

import pytest

from tests.helpers import ROOT


def test_first_steps(monkeypatch):
    monkeypatch.chdir(ROOT / "examples")
    notebook = json.loads((ROOT / "examples" / "first_steps.ipynb").read_text())
    names: dict = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["f"].shape == (1, names["last"] + 1, 9, 512)
    strongest = names["features"].iloc[0]
    assert strongest["slot"] == "induction" and strongest["reads from"].endswith("mat")
    assert names["sources"].loc[names["sources"]["dfa"].idxmax(), "slot"] == "induction"
    mat = names["changed"].iloc[0]
    assert mat["token"] == " mat" and mat["full probability"] < mat["probability"]
    assert len(names["induction"]) > 0 and set(names["induction"]["head"]) == {4}


PIECES = [
    pytest.param(code, id=f"{path.name} {place}")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for place, code in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text("utf-8"), re.S | re.M))
]


@pytest.mark.parametrize("code", PIECES)
def test_what_docs_say_in_python_runs(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(code, {"__name__": "__main__"})
