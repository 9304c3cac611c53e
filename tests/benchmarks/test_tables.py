"""Tables of figures where a head is constant: it has no FVU."""

from benchmarks import quality, results_table

FIGURES = {
    "L0": 3.0, "L0_se": 0.1, "FVU": 0.2, "FVU_se": None, "norm_ratio": 0.5, "norm_ratio_se": 0.01,
    "KL_score": None, "CE_score": None, "silent_fraction": 0.0, "n_tokens": 9,
    "FVU_per_head": [0.125, None, 0.5, 0.25],
}  # fmt: skip


def test_a_constant_head_is_never_the_worst():
    row = results_table.on_text({"a": FIGURES}, "", [0, 1])[-1]
    assert "| 3.0 ± 0.1 | 0.200 ± n/m |" in row and "| 0.500 (2) | 0.12, n/m |" in row
    assert quality.np.nanargmax(quality.per_head(FIGURES)) == 2
