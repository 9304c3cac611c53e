"""The prompts of the circuits' study, and what it makes of a prompt's figures."""

import pytest

from benchmarks.circuits import correlation, prompts, said, share


def test_every_prompt_is_another_one_and_has_its_answer():
    for kind in ("IOI", "induction"):
        found = prompts(kind, 50)
        assert len({text for text, *_ in found}) == 50 and found == prompts(kind, 50)
        for text, right, wrong in found:
            assert right != wrong and right.strip() in text and wrong.strip() in text
            words = text.lower().split()
            if kind == "induction":  # the last word came before, and what followed it then is right
                assert words[words.index(words[-1]) + 1] == right.strip()
            else:
                assert words.count(right.strip().lower()) == 1 and words.count(wrong.strip().lower()) == 2


def test_figures_of_prompts():
    columns = {"layer": [0, 8, 9, 9], "attribution": [5.0, 1.0, 2.0, 3.0], "effect": [-9.0, 2.0, 4.0, 6.0]}
    assert correlation(columns, 8) == pytest.approx(1) and correlation(columns) < 0
    found = [
        {"target": 5.0, "none": 1.0, "strongest": [0.0, 2.0]},
        {"target": 1.1, "none": 1.0, "strongest": [0.0, 0.05]},
    ]
    assert share(found, "strongest", 1) == "0.50 ± 0.00"
    found[1]["strongest"][1] = 1.0  # ten times what there is to gain, of next to nothing
    assert share(found, "strongest", 1).startswith("0.73 ± ")
    assert said([1.0, 3.0]) == "2.00 ± 1.00"
