"""Tables of figures where a head is constant: it has no FVU."""

from benchmarks import results_table

FIGURES = {
    "L0": 3.0, "L0_se": 0.1, "FVU": 0.2, "FVU_se": None, "norm_ratio": 0.5, "norm_ratio_se": 0.01,
    "KL_score": None, "CE_score": None, "silent_fraction": 0.0, "n_tokens": 9,
    "FVU_per_head": [0.125, None, 0.5, 0.25],
}  # fmt: skip


def test_a_constant_head_is_never_the_worst():
    row = results_table.on_text({"a": FIGURES}, "", [0, 1])[-1]
    assert "| 3.0 ± 0.1 | 0.200 ± n/m |" in row and "| 0.500 (2) | 0.12, n/m |" in row


def test_l0_at_equal_figures():
    """Between points on a log scale; better already, or beyond, where the frontier has no such value."""
    points = [{"L0": 10.0, "KL_score": 0.5, "FVU": 0.4}, {"L0": 40.0, "KL_score": 0.7, "FVU": 0.2}]

    def needed(l0: float, kl: float | None, fvu: float) -> list[str]:
        figures = {"L0": l0, "KL_score": kl, "FVU": fvu}
        return [results_table.needed(points, figures, metric) for metric in ("KL_score", "FVU")]

    assert needed(100.0, 0.6, 0.3) == ["20, 1/5.0", "20, 1/5.0"]
    assert needed(10.0, None, 0.3) == ["n/m", "20, 2.0 times"]
    assert needed(100.0, 0.4, 0.5) == ["better already at L0 10", "better already at L0 10"]
    assert needed(100.0, 0.8, 0.1) == ["beyond it", "beyond it"]
