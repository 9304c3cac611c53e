"""Matching: planted copies and splits come out, figures agree with brute force, and what cannot be used is refused."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from analysis.match import read
from analysis.match import score as scoring
from analysis.match.__main__ import main
from analysis.match.read import Match
from analysis.prompt.run import run_prompt
from trainer import checkpoint
from trainer.block_diag import BlockDiagSAE
from trainer.checkpoint import Checkpoint, CheckpointError

N_HEADS, D_HEAD, N_FEATURES = 3, 16, 12
OPTIONS = ["--tokens=600", "--device=cpu"]


def random_sae(seed: int, dense: bool = False) -> BlockDiagSAE:
    torch.manual_seed(seed)
    return BlockDiagSAE(1, N_HEADS * D_HEAD, N_FEATURES) if dense else BlockDiagSAE(N_HEADS, D_HEAD, N_FEATURES)


def random_firings(seed: int, n_features: int, tokens: int = 400) -> np.ndarray:
    """Activations [token, feature], about a tenth of them above 0."""
    generator = np.random.default_rng(seed)
    return (generator.random((tokens, n_features)) * (generator.random((tokens, n_features)) < 0.1)).astype(np.float32)


def fired(sae: BlockDiagSAE, f: np.ndarray) -> scoring.Fired:
    return scoring.Fired.of(sae, sp.csr_matrix(f), N_HEADS)


@torch.no_grad()
def planted() -> tuple[scoring.Fired, scoring.Fired, np.ndarray]:
    """B is A permuted within each head and scaled; of every head the last two features of A are not in B.

    Returns A, B and the feature of B that each feature of A became, -1 for none.
    """
    generator = np.random.default_rng(3)
    a, b = random_sae(0), random_sae(1)
    f = random_firings(0, a.d_sae)
    g = random_firings(1, b.d_sae)
    became = np.full(a.d_sae, -1)
    for head in range(N_HEADS):
        places = generator.permutation(N_FEATURES)
        for i in range(N_FEATURES - 2):
            scale = float(generator.uniform(0.2, 5))
            b.W_dec[head, places[i]] = a.W_dec[head, i] / scale
            g[:, head * N_FEATURES + places[i]] = f[:, head * N_FEATURES + i] * scale
            became[head * N_FEATURES + i] = head * N_FEATURES + places[i]
    return fired(a, f), fired(b, g), became


def test_a_planted_permutation_is_recovered():
    a, b, became = planted()
    found = scoring.one_to_one(a, b)
    copies = np.flatnonzero(became >= 0)
    assert dict(zip(found.pairs["a"], found.pairs["b"], strict=True)) == dict(zip(copies, became[copies], strict=True))
    assert np.allclose(found.pairs[["cosine", "jaccard", "score"]], 1, atol=1e-5)
    assert (found.pairs["head"] == found.pairs["a"] // N_FEATURES).all()
    features = found.features.set_index(["side", "feature"])
    assert features.loc["a"].query("partner < 0").index.tolist() == np.flatnonzero(became < 0).tolist()
    assert features.loc["b"].query("partner < 0").index.tolist() == sorted(set(range(36)) - set(became))
    assert (features["firings"] == np.concatenate([a.firings, b.firings])).all()


def brute_force(a: scoring.Fired, b: scoring.Fired, i: int, j: int) -> tuple[float, float]:
    """Cosine and Jaccard index of two features."""
    fires_a, fires_b = (s.fires.toarray()[:, k] > 0 for s, k in ((a, i), (b, j)))
    jaccard = (fires_a & fires_b).sum() / max((fires_a | fires_b).sum(), 1)
    return float(a.direction[i] @ b.direction[j]), float(jaccard)


def test_figures_and_assignment_against_brute_force(monkeypatch):
    """On noisy copies: every figure, the nearest of every feature, and that no other assignment has a larger sum."""
    monkeypatch.setattr("analysis.corpus.pairs._ROWS", 5)
    a, b, became = planted()
    noise = np.random.default_rng(5)
    fires = b.fires.toarray() * (noise.random(b.fires.shape) < 0.8)
    direction = b.direction + 0.1 * noise.standard_normal(b.direction.shape).astype(np.float32)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    b = scoring.Fired(sp.csr_matrix(fires), (fires > 0).sum(0), direction, b.head, b.n_blocks)
    found = scoring.one_to_one(a, b)
    score = np.zeros((36, 36))
    for i in range(36):
        for j in range(i // 12 * 12, i // 12 * 12 + 12):
            cosine, jaccard = brute_force(a, b, i, j)
            score[i, j] = np.sqrt(max(cosine, 0) * jaccard)
    for row in found.pairs.itertuples():
        cosine, jaccard = brute_force(a, b, row.a, row.b)
        assert (row.cosine, row.jaccard) == (pytest.approx(cosine, abs=1e-5), pytest.approx(jaccard, abs=1e-5))
        assert row.score == pytest.approx(score[row.a, row.b], abs=1e-5)
        assert row.score >= scoring.THRESHOLD and became[row.a] == row.b
    assert len(found.pairs) > 20
    for name, best, which in (("a", score.max(1), score.argmax(1)), ("b", score.max(0), score.argmax(0))):
        features = found.features[found.features["side"] == name]
        assert np.allclose(features["nearest_score"], best[features["feature"]], atol=1e-5)
        assert (features["nearest"] == which[features["feature"]]).all()


def test_what_is_no_pair_takes_no_pairs_place():
    """Scores 0.81 (0, 0), 0.77 (0, 1) and 0.34 (1, 0): the sum of all three would pair (0, 1) and (1, 0)."""
    fires = np.zeros((2, 200, 2), np.float32)
    fires[0, :100, 0] = fires[0, 100:, 1] = 1
    fires[1, :80, 0] = fires[1, 100:121, 0] = fires[1, 40:100, 1] = 1
    same = np.array([[1.0, 0.0], [1.0, 0.0]], np.float32)
    a, b = (scoring.Fired(sp.csr_matrix(f), (f > 0).sum(0), same, np.zeros(2, int), 1) for f in fires)
    found = scoring.one_to_one(a, b)
    assert found.pairs[["a", "b"]].to_numpy().tolist() == [[0, 0]]
    assert found.pairs["score"].tolist() == pytest.approx([0.813], abs=1e-3)
    assert found.features["nearest_score"].tolist() == pytest.approx([0.813, 0.342, 0.813, 0.775], abs=1e-3)


def test_rare_features_are_not_matched():
    a, b, _ = planted()
    fires = a.fires.toarray()
    fires[:, 0] = 0
    fires[7, 0] = 1
    copy = b.fires.toarray()
    copy[:, 0] = fires[:, 0]
    direction = b.direction.copy()
    direction[0] = a.direction[0]
    a = a._replace(fires=sp.csr_matrix(fires), firings=(fires > 0).sum(0))
    b = b._replace(fires=sp.csr_matrix(copy), firings=(copy > 0).sum(0), direction=direction)
    found = scoring.one_to_one(a, b)
    assert not {0} & set(found.pairs["a"]), "one firing, on the same token, says nothing"


def test_a_block_too_large_to_assign_is_paired_greedily(monkeypatch):
    a, b, _ = planted()
    exact = scoring.one_to_one(a, b)
    monkeypatch.setattr(scoring, "LARGEST_ASSIGNMENT", 4)
    monkeypatch.setattr("analysis.corpus.pairs._ROWS", 5)
    greedy = scoring.one_to_one(a, b)
    one, other = (each.pairs.sort_values(["a", "b"], ignore_index=True) for each in (greedy, exact))
    pd.testing.assert_frame_equal(one, other, atol=1e-6)  # a matmul of other shapes rounds differently
    row, column = scoring._greedy(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), np.array([0.8, 0.6, 0.9, 0.5]))
    assert sorted(zip(row, column, strict=True)) == [(0, 1), (1, 0)], "the largest first, then what is left"


@torch.no_grad()
def test_a_planted_split_comes_out(monkeypatch):
    """Dense feature i is the union of feature i of head 0 and of feature i of head 1; the last two are of neither."""
    monkeypatch.setattr("analysis.corpus.pairs._ROWS", 5)
    block, dense = random_sae(0), random_sae(1, dense=True)
    f = random_firings(0, block.d_sae)
    g = random_firings(1, N_FEATURES)
    for i in range(N_FEATURES - 2):
        dense.W_dec[0, i] = 0
        dense.W_dec[0, i, :D_HEAD] = 2 * block.W_dec[0, i]
        dense.W_dec[0, i, D_HEAD : 2 * D_HEAD] = block.W_dec[1, i]
        g[:, i] = f[:, i] + f[:, N_FEATURES + i]
    found = scoring.split(fired(dense, g), fired(block, f))
    for i, parts in found.pairs.groupby("a"):
        assert set(parts["b"]) == {i, N_FEATURES + i}
        parts = parts.set_index("head")
        assert np.allclose(parts["cosine"], 1, atol=1e-5) and np.allclose(parts["a_given_b"], 1)
        assert np.allclose(parts["norm_share"].loc[[0, 1]], [0.8, 0.2], atol=1e-5)
        union = (f[:, [i, N_FEATURES + i]] > 0).any(1)
        for head in (0, 1):
            share = (f[:, head * N_FEATURES + i] > 0).sum() / union.sum()
            assert parts.loc[head, "b_given_a"] == pytest.approx(share)
            assert parts.loc[head, "score"] == pytest.approx(np.sqrt(np.sqrt(share)), abs=1e-5)
    assert sorted(set(found.pairs["a"])) == list(range(N_FEATURES - 2))
    features = found.features.set_index(["side", "feature"])
    of_dense = features.loc["a"]
    assert of_dense["parts"].tolist() == [2] * (N_FEATURES - 2) + [0, 0]
    assert np.allclose(of_dense["covered"][:-2], 1) and of_dense["covered"][-2:].isna().all()
    assert of_dense["chance"].iloc[0] == pytest.approx(float((g[:, 0] > 0).mean()))
    assert np.allclose(np.stack(of_dense["norm_shares"]).sum(1), 1, atol=1e-5)
    assert features.loc["b"].query("parts == 0").index.tolist() == [10, 11, 22, 23, *range(24, 36)]


def test_coverage_is_a_share_of_activation():
    """Half of the tokens of a dense feature, with three quarters of its activation, have its part firing."""
    block, dense = random_sae(0), random_sae(1, dense=True)
    with torch.no_grad():
        dense.W_dec[0, 0, :D_HEAD] = block.W_dec[0, 0] * 10
    f, g = np.zeros((100, block.d_sae), np.float32), np.zeros((100, N_FEATURES), np.float32)
    g[:20, 0], g[20:40, 0], f[:20, 0] = 3, 1, 1
    found = scoring.split(fired(dense, g), fired(block, f))
    row = found.features.query("side == 'a'").iloc[0]
    assert (row["covered"], row["chance"]) == (pytest.approx(0.75), pytest.approx(0.2))


@pytest.mark.parametrize("dense", [False, True])
def test_saes_that_never_fire(dense):
    a, b = random_sae(0, dense), random_sae(1)
    nothing = [fired(each, np.zeros((50, each.d_sae), np.float32)) for each in (a, b)]
    found = scoring.split(*nothing) if dense else scoring.one_to_one(*nothing)
    assert found.pairs.empty and found.features.empty


@pytest.fixture(scope="module")
def matched(trained, tmp_path_factory):
    """`copy` is block-l1_1 with the features of each head in reverse order and twice the decoder; matched with it and
    with the dense one."""
    folder = tmp_path_factory.mktemp("matched")
    for name in ("block-l1_1", "block-l1_4", "dense"):
        shutil.copytree(trained / name, folder / name)
    original = Checkpoint(folder / "block-l1_1")
    sae = original.sae
    for name, axis in (("W_enc", 2), ("b_enc", 1), ("W_dec", 1)):
        tensor = getattr(sae, name)
        tensor.copy_(tensor.flip(axis) * (2 if name == "W_dec" else 1))
    checkpoint.save(folder / "copy", sae, original.config)
    assert main([*(str(folder / name) for name in ("copy", "block-l1_1", "dense")), *OPTIONS]) == 0
    return folder


def test_a_reversed_copy_on_real_text(matched):
    found = Match(Checkpoint(matched / "copy"), Checkpoint(matched / "block-l1_1"))
    assert (found.a.name, found.b.name, found.kind) == ("copy", "block-l1_1", "one-to-one")
    per_head = 32
    original = Checkpoint(matched / "block-l1_1")
    sae, lm = original.sae, original.open_model()
    reverse = lambda i: i // per_head * per_head + per_head - 1 - i % per_head  # noqa: E731
    assert per_head == sae.features_per_block
    contexts = original.open_text(lm.tokenizer).held_out(20)
    f = sae.encode(lm.layer(1).z(contexts)).flatten(2)[:, 1:]
    firings = (f > 0).sum((0, 1)).numpy()
    assert found.meta["n_tokens"] == 620
    # Other shapes, or another order of features, round differently: a firing of almost 0 may be one or none.
    surely, perhaps = (set(np.flatnonzero(firings >= scoring.MIN_FIRINGS + by).tolist()) for by in (2, -2))
    paired = set(found.pairs["b"])
    assert len(surely) > 50 and surely <= paired <= perhaps and len(paired) == len(found.pairs)
    assert (found.pairs["a"] == reverse(found.pairs["b"])).all()
    union = firings[found.pairs["b"]]
    assert np.allclose((1 - found.pairs["jaccard"]) * union, 0, atol=2.01)
    assert set(found.alone("a")["feature"]) <= {reverse(i) for i in perhaps - surely}
    assert set(found.alone("b")["feature"]) <= perhaps - surely
    of_b = found.of_side("b")
    assert (of_b["firings"] - firings[of_b["feature"]]).abs().max() <= 2
    assert found.per_head()["features"].sum() == len(found.of_side("a")) + len(of_b)


def test_either_order_is_found_and_names_follow_it(matched):
    copy, original, dense = (Checkpoint(matched / name) for name in ("copy", "block-l1_1", "dense"))
    one, other = Match(copy, original), Match(original, copy)
    assert (other.a.name, other.b.name) == ("block-l1_1", "copy")
    assert other.pairs["a"].tolist() == one.pairs["b"].tolist()
    assert other.of_side("a")["partner"].tolist() == one.of_side("b")["partner"].tolist()
    splits = [Match(copy, dense), Match(dense, copy)]
    assert [(each.a.name, each.kind) for each in splits] == [("dense", "split")] * 2
    assert splits[0].pairs.equals(splits[1].pairs)


def test_every_phase_says_how_far_it_is(matched, tmp_path, capsys):
    shutil.copytree(matched, tmp_path / "own")
    assert main([*(str(tmp_path / "own" / name) for name in ("copy", "block-l1_1", "dense")), *OPTIONS]) == 0
    told = capsys.readouterr().err
    for phase in ("Matching", "Pairing", "Splitting"):
        assert f"{phase}: 100%" in told


def test_matching_again_in_the_other_order_leaves_one(matched, tmp_path):
    for name in ("copy", "block-l1_1"):
        shutil.copytree(matched / name, tmp_path / name)
    assert main([str(tmp_path / "block-l1_1"), str(tmp_path / "copy"), *OPTIONS]) == 0
    assert not (tmp_path / "copy" / "matches" / "block-l1_1").exists()
    assert (
        Match(Checkpoint(tmp_path / "copy"), Checkpoint(tmp_path / "block-l1_1")).folder
        == tmp_path / "block-l1_1" / "matches" / "copy"
    )


def test_two_runs_of_a_prompt_aligned(matched, gpt2):
    found = Match(Checkpoint(matched / "copy"), Checkpoint(matched / "block-l1_1"))
    runs = [run_prompt(gpt2.layer(1), each.sae, "the head reads") for each in (found.a, found.b)]
    for position in (None, 3):
        table = read.aligned(found, *runs, position)
        assert len(table) and np.allclose(table["activation_a"], table["activation_b"], rtol=1e-4, atol=1e-5)
        f = runs[1].f.flatten(1)
        expected = f[1:].amax(0) if position is None else f[position]
        assert np.allclose(table["activation_b"], expected[table["b"].tolist()])
        assert (table[["activation_a", "activation_b"]].max(axis=1) > 0).all()
        assert table["head"].is_monotonic_increasing
        everything = read.aligned(found, *runs, position, firing=False)
        assert len(everything) == len(found.pairs)
    along = read.over_tokens([("here", runs[0], int(table["a"].iloc[0])), ("there", runs[1], 5)])
    assert along["position"].tolist() == 2 * list(range(1, len(f)))
    assert read.only_in(found, "a", runs[0], None).empty
    split = Match(Checkpoint(matched / "dense"), Checkpoint(matched / "copy"))
    dense = run_prompt(gpt2.layer(1), split.a.sae, "the head reads")
    table = read.split_on(split, dense, None)
    assert (table["activation"] > 0).all() and table["activation"].is_monotonic_decreasing
    assert len(read.split_on(split, dense, None, firing=False)) >= len(table)
    parts = read.parts_of(split, int(table["feature"].iloc[0]), runs[0], None)
    assert len(parts) == table["parts"].iloc[0] and parts["score"].is_monotonic_decreasing
    alone = read.only_in(split, "a", dense, None, firing=False)
    assert (alone["parts"] == 0).all() and (alone["firings"] >= scoring.MIN_FIRINGS).all()


def test_the_figures_of_a_split_on_real_text(matched):
    """Against the definitions, from activations."""
    found = Match(Checkpoint(matched / "dense"), Checkpoint(matched / "copy"))
    dense, block, lm = found.a.sae, found.b.sae, found.a.open_model()
    z = lm.layer(1).z(found.a.open_text(lm.tokenizer).held_out(20))[:, 1:].flatten(0, 1)
    f, g = (sae.encode(z).flatten(1).numpy() for sae in (dense, block))
    assert len(found.pairs)
    for row in found.pairs.sample(20, random_state=0).itertuples():
        one, two = f[:, row.a] > 0, g[:, row.b] > 0
        # Up to a token on which an activation is almost 0.
        assert row.b_given_a == pytest.approx((one & two).sum() / one.sum(), abs=1.01 / one.sum())
        assert row.a_given_b == pytest.approx((one & two).sum() / two.sum(), abs=1.01 / two.sum())
        slices = dense.W_dec[0, row.a].view(lm.n_heads, lm.d_head)
        written = block.W_dec.flatten(0, 1)[row.b]
        assert row.cosine == pytest.approx(float(torch.cosine_similarity(slices[row.head], written, dim=0)), abs=1e-4)
        assert row.norm_share == pytest.approx(float(slices[row.head].norm() ** 2 / slices.norm() ** 2), rel=1e-4)
        parts = found.pairs.loc[found.pairs["a"] == row.a, "b"]
        covers = (g[:, parts] > 0).any(1)
        of_dense = found.of_side("a").loc[row.a]
        assert of_dense["covered"] == pytest.approx(f[covers, row.a].sum() / f[:, row.a].sum(), rel=2e-3)
        assert of_dense["chance"] == pytest.approx(covers.mean(), abs=1.01 / len(covers))
    assert (found.pairs["score"] >= scoring.PART).all()
    assert found.pairs.groupby("a").size().max() <= scoring.N_PARTS


def test_refusals_of_the_command(matched, tmp_path, capsys):
    def refused(*arguments: str) -> str:
        assert main([*map(str, arguments), "--device=cpu"]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert error[-1].startswith("error: ")
        return error[-1]

    a = matched / "copy"
    other = tmp_path / "other"
    shutil.copytree(matched / "block-l1_1", other)
    assert "config.json is missing" in refused(a, tmp_path / "gone")
    assert "with itself" in refused(a, a)
    assert "tokens must be at least 1" in refused(a, other, "--tokens=0")
    config = json.loads((other / "config.json").read_text())
    for key, value, what in (("hook_layer", 0, "layer (1 and 0)"), ("fingerprint", "another", "model")):
        changed = {**config, "model": {**config["model"], key: value}}
        (other / "config.json").write_text(json.dumps(changed))
        assert f"not of the same {what}" in refused(a, other)
    assert not (other / "matches").exists()


def test_refusals_of_the_reader(matched, tmp_path):
    for name in ("copy", "block-l1_1", "block-l1_4"):
        shutil.copytree(matched / name, tmp_path / name)
    a, b = tmp_path / "copy", tmp_path / "block-l1_1"
    with pytest.raises(
        CheckpointError, match=r"have not been matched yet: run `python -m analysis.match .*copy .*l1_4`"
    ):
        Match(Checkpoint(a), Checkpoint(tmp_path / "block-l1_4"))
    file = a / "matches" / "block-l1_1" / "meta.json"
    text = file.read_text()
    for broken, message in (
        ("{", "meta.json is damaged"),
        ("[]", "meta.json is damaged"),
        (json.dumps({key: value for key, value in json.loads(text).items() if key != "kind"}), "damaged .*`kind`"),
        (json.dumps({**json.loads(text), "schema_version": 99}), "schema version 99"),
    ):
        file.write_text(broken)
        with pytest.raises(CheckpointError, match=message):
            Match(Checkpoint(b), Checkpoint(a))
    file.write_text(text)
    pairs = file.with_name("pairs.parquet")
    pairs.write_bytes(b"PAR1 not really")
    with pytest.raises(CheckpointError, match=r"pairs.parquet is damaged"):
        _ = Match(Checkpoint(a), Checkpoint(b)).pairs
    pairs.unlink()
    with pytest.raises(CheckpointError, match=r"pairs.parquet is missing: run"):
        _ = Match(Checkpoint(a), Checkpoint(b)).pairs
    weights = b / "sae.safetensors"
    shutil.copy(tmp_path / "block-l1_4" / "sae.safetensors", weights)
    with pytest.raises(CheckpointError, match="describes other weights"):
        Match(Checkpoint(a), Checkpoint(b))


def test_analysing_again_leaves_matches(matched, tmp_path):
    from analysis import store

    shutil.copytree(matched / "copy", tmp_path / "copy")
    store.write(tmp_path / "copy" / "analysis", 1, {}, {"heads": pd.DataFrame({"head": [0]})})
    assert (tmp_path / "copy" / "matches" / "block-l1_1" / "pairs.parquet").exists()
