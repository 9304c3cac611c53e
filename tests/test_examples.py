"""The notebook runs, cell by cell, from its own folder as Jupyter does; and finds what it says."""

import json

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
