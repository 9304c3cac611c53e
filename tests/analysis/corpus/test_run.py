"""`python -m analysis`: artefacts, resuming, reading and refusals, on tiny checkpoints."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from analysis import attribution as dfa
from analysis import store
from analysis.__main__ import main
from analysis.corpus import run
from analysis.corpus.features import describe
from analysis.detection import Detected, detected
from analysis.labels import Labels
from analysis.search import Tokens
from analysis.store import Analysis
from tests.helpers import tiny_run
from trainer.__main__ import main as train
from trainer.checkpoint import Checkpoint, CheckpointError, save
from trainer.data.documents import hash_fraction
from trainer.model.lm import LanguageModel

TABLES = [
    "features",
    "examples",
    "contexts",
    "heads",
    "patterns",
    "copying",
    "pairs",
    "merging",
    "detection",
    "counts",
    "tokens",
]
OPTIONS = ["--tokens=600", "--score_tokens=600", "--examples=5", "--quantile_examples=3", "--device=cpu"]
NAMES = ["block-l1_1", "dense", "batchtopk"]


@pytest.fixture(scope="module")
def analysed(trained, tmp_path_factory):
    """Three kinds of checkpoint of one layer, analysed together."""
    folder = tmp_path_factory.mktemp("analysed")
    for name in NAMES:
        shutil.copytree(trained / name, folder / name)
    assert main([*(str(folder / name) for name in NAMES), *OPTIONS]) == 0
    return folder


class Now:
    """Ctrl-C comes at once."""

    def __enter__(self):
        return lambda: True

    def __exit__(self, *error):
        return False


class After(Now):
    """Ctrl-C comes during the n-th forward."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __enter__(self):
        return self

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


def silence(path, features: slice) -> None:
    """Let only these features of each head of a checkpoint fire."""
    checkpoint = Checkpoint(path)
    kept = torch.zeros_like(checkpoint.sae.b_enc, dtype=torch.bool)
    kept[:, features] = True
    checkpoint.sae.b_enc[~kept] = -1000
    save(path, checkpoint.sae, checkpoint.config)


def tables(path) -> dict[str, pd.DataFrame]:
    return {name: pq.read_table(path / "analysis" / f"{name}.parquet").to_pandas() for name in TABLES}


def test_artefacts_agree_with_the_model(analysed):
    for name in NAMES:
        checkpoint = Checkpoint(analysed / name)
        lm, sae = checkpoint.open_model(), checkpoint.sae
        corpus = checkpoint.open_text(lm.tokenizer)
        analysis = Analysis(checkpoint)
        n_contexts = analysis.meta["n_tokens"] // 31
        assert analysis.meta["n_tokens"] == 20 * 31
        contexts = corpus.held_out(n_contexts)
        f = sae.encode(lm.layer(1).z(contexts))
        f[:, 0] = 0
        density = (f > 0).float().sum((0, 1)).flatten() / analysis.meta["n_tokens"]
        assert np.allclose(analysis.features["density"], density, atol=2e-3)
        assert analysis.meta["L0"] == pytest.approx(float(density.sum()), rel=1e-2)
        feature = int(density.argmax())
        shown = analysis.examples(feature)
        assert (shown["kind"] == "top").sum() == 5 and (shown["kind"] == "quantile").sum() == 3
        of_feature = f.flatten(2)[..., feature]
        assert shown["activation"].iloc[0] == pytest.approx(float(of_feature.max()), rel=1e-3)
        for row in shown.itertuples():
            assert row.token_ids.tolist() == contexts[row.context].tolist()
            assert np.allclose(row.activations, of_feature[row.context], atol=2e-3 * float(of_feature.max()))
            constant = analysis.feature(feature)["constant"]
            assert row.dfa_sum + constant == pytest.approx(row.activation, abs=1e-3)
            assert set(analysis.strings) >= set(row.token_ids)
        documents = corpus.documents(contexts)
        assert shown["document"].tolist() == documents[shown["context"].tolist(), shown["position"].tolist()].tolist()


def test_several_layers_share_every_forward_and_say_what_each_says_alone(gpt2_folder, text_file, tmp_path, monkeypatch):
    more = ("--hook_layer=[0,3]", "--k=5", "--total_training_steps=8", "--batch_size=64", "--cache_gb=0")
    assert train(tiny_run(gpt2_folder, text_file, tmp_path / "one", *more)) == 0
    shutil.copytree(tmp_path / "one", tmp_path / "all")
    names = sorted(path.name for path in (tmp_path / "one").iterdir() if not path.name.startswith("."))
    alone = [str(tmp_path / "one" / name) for name in names]
    ran = []
    entered = LanguageModel.attentions

    def attentions(lm, tokens, layers):
        ran.append((len(tokens), sorted(layers)))
        return entered(lm, tokens, layers)

    monkeypatch.setattr(LanguageModel, "attentions", attentions)
    assert main([str(tmp_path / "all" / name) for name in reversed(names)] + OPTIONS) == 0
    shared = [layers for _, layers in ran if len(layers) > 1]
    assert shared and all(layers == [0, 3] for layers in shared)
    for path in alone:
        assert main([path, *OPTIONS]) == 0
    for name in names:
        one, other = tables(tmp_path / "one" / name), tables(tmp_path / "all" / name)
        for table, frame in one.items():
            assert_close(frame, other[table], (name, table))


def assert_close(one, other, where) -> None:
    """Forwards that end at another layer run in other parts: floats agree to rounding, everything else exactly."""
    assert list(one) == list(other) and len(one) == len(other), where
    for column in one:
        a, b = one[column], other[column]
        if len(a) and isinstance(a.iloc[0], np.ndarray):
            a, b = (np.concatenate(list(each)) if len(each) else np.empty(0) for each in (a, b))
        if pd.api.types.is_float_dtype(np.asarray(a).dtype):
            assert np.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True), (where, column)
        elif table_text(a):
            continue
        else:
            assert (np.asarray(a) == np.asarray(b)).all(), (where, column)


def table_text(values) -> bool:
    """Sentences and strips hold figures: rounding may write them otherwise."""
    return np.asarray(values).dtype == object


def test_heads_and_features_add_up(analysed):
    for name in NAMES:
        analysis = Analysis(Checkpoint(analysed / name))
        heads, features = analysis.heads, analysis.features
        assert len(heads) == 4
        assert heads["L0"].sum() == pytest.approx(analysis.meta["L0"], rel=1e-5)
        for share in ("L0_share", "explained_share", "KL_share"):
            assert heads[share].sum() == pytest.approx(1, abs=1e-5), share
        assert heads["dead"].sum() == (features["firings"] == 0).sum()
        for prefix in ("", "repeated_"):
            for what in ("attention", "dfa"):
                rows = heads[[f"{prefix}{what}_{slot}" for slot in dfa.SLOTS]].sum(1)
                assert np.allclose(rows[rows > 0], 1, atol=1e-5)
        deviants = np.concatenate(heads["mono_deviants"].tolist())
        role = dict(zip(heads["head"], heads["mono_role"], strict=True))
        assert set(heads.loc[heads["mono_role"].isin(dfa.RESIDUAL), "mono_unclassified"]) <= {True}
        assert heads.loc[heads["mono_unclassified"], "mono_share"].isna().all()
        classified = features["head"].isin(heads.loc[~heads["mono_unclassified"], "head"])
        judged = features[features["role"].notna() & classified]
        differs = judged[judged["role"] != judged["head"].map(role)]
        assert sorted(deviants) == sorted(differs["feature"]), "deviants are those whose role differs, and are named"
        merging = analysis.merging
        assert (merging["L0"] <= analysis.meta["redundancy"]["l0"] + 1e-9).all()
        assert merging.groupby("criterion")["L0"].apply(lambda l0: l0.is_monotonic_decreasing).all()


def test_interrupted_and_resumed_equals_uninterrupted(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("analysis.corpus.passes._LM_TOKENS", 128)  # five forwards a pass
    for name in ("a", "b"):
        shutil.copytree(trained / "batchtopk", tmp_path / name)
    assert main([str(tmp_path / "a"), *OPTIONS]) == 0
    real = run.deferred_interrupts
    asked = 0
    # Thrice in the first pass, the last time at its end, so that nothing of it is left; once in the second.
    stops = iter([After(2), After(1), After(2), After(9), After(3)])
    monkeypatch.setattr(run, "deferred_interrupts", lambda: next(stops, None) or real())
    arguments = [str(tmp_path / "b"), *OPTIONS]
    while main([*arguments, "--resume"]) == 130:
        asked += 1
        assert not (tmp_path / "b" / "analysis").exists(), "half an artefact"
        assert asked < 6
    assert asked == 4
    one, two = tables(tmp_path / "a"), tables(tmp_path / "b")
    for name in TABLES:
        pd.testing.assert_frame_equal(one[name], two[name], check_exact=True)
    assert not [p for p in (tmp_path / "b").iterdir() if p.name.startswith(".analysis")], "the state is gone"


def test_one_behind_the_other_catches_up(trained, tmp_path, monkeypatch):
    """--resume of two checkpoints of which one was stopped and one was never begun."""
    monkeypatch.setattr("analysis.corpus.passes._LM_TOKENS", 128)
    for name, kind in (("a", "batchtopk"), ("b", "dense")):
        shutil.copytree(trained / kind, tmp_path / name)
    real = run.deferred_interrupts

    monkeypatch.setattr(run, "deferred_interrupts", Now)
    assert main([str(tmp_path / "a"), *OPTIONS]) == 130
    monkeypatch.setattr(run, "deferred_interrupts", real)
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), *OPTIONS, "--resume"]) == 0
    assert {Analysis(Checkpoint(tmp_path / name)).meta["n_tokens"] for name in ("a", "b")} == {620}


def test_one_of_two_interrupted_together_goes_on_alone(trained, tmp_path, monkeypatch):
    """The second pass of both reads contexts that one alone does not need."""
    monkeypatch.setattr("analysis.corpus.passes._LM_TOKENS", 32)  # a forward a context
    few = ["--tokens=600", "--examples=1", "--quantile_examples=0", "--device=cpu"]
    for name, features in (("a", slice(0, 1)), ("b", slice(9, 11)), ("whole", slice(0, 1))):
        shutil.copytree(trained / "block-l1_1", tmp_path / name)
        silence(tmp_path / name, features)
    assert main([str(tmp_path / "whole"), *few]) == 0
    real, stops = run.deferred_interrupts, iter([After(99), After(3)])
    monkeypatch.setattr(run, "deferred_interrupts", lambda: next(stops, None) or real())
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), *few]) == 130
    assert main([str(tmp_path / "a"), *few, "--resume"]) == 0
    pd.testing.assert_frame_equal(*(tables(tmp_path / name)["examples"] for name in ("a", "whole")), check_exact=True)


def test_an_sae_that_never_fires(trained, tmp_path):
    shutil.copytree(trained / "block-l1_1", tmp_path / "a")
    silence(tmp_path / "a", slice(0, 0))
    assert main([str(tmp_path / "a"), *OPTIONS]) == 0
    silent = Analysis(Checkpoint(tmp_path / "a"))
    assert (silent.features["description"] == "never fires").all() and silent.examples(0).empty


def test_search(analysed):
    analysis = Analysis(Checkpoint(analysed / "block-l1_1"))
    everything = analysis.search()
    assert len(everything) == (analysis.features["firings"] > 0).sum()
    assert everything["firings"].is_monotonic_decreasing
    assert set(analysis.search(head=2)["head"]) == {2}
    role = everything["role"].dropna().iloc[0]
    assert set(analysis.search(role=role)["role"]) == {role}
    middle = float(everything["density"].median())
    assert (analysis.search(density=(0.0, middle))["density"] <= middle).all()
    assert analysis.search(fires_on="no such token").empty
    promoted = analysis.feature(int(everything["feature"].iloc[0]))["top_logit_ids"][0]
    for feature in analysis.search(promotes=Tokens(analysis.strings[int(promoted)], "exact"))["feature"]:
        assert promoted in analysis.feature(int(feature))["top_logit_ids"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wanted", [Tokens("e", "exact"), Tokens("E"), Tokens("[aeiou ]", "regex")])
def test_search_ranks_by_what_brute_force_counts(analysed, name, wanted):
    """Firings of every feature on the tokens, their share of its firings, and the share of the tokens it fires on."""
    checkpoint = Checkpoint(analysed / name)
    lm, analysis = checkpoint.open_model(), Analysis(checkpoint)
    contexts = checkpoint.open_text(lm.tokenizer).held_out(20)
    fires = checkpoint.sae.encode(lm.layer(1).z(contexts)).flatten(2)[:, 1:] > 0  # [context, pos, feature]
    texts = np.array(lm.token_strings(contexts[:, 1:].flatten().tolist()))
    meant = torch.from_numpy(np.isin(texts, list("aeiou ") if wanted.by == "regex" else ["e"]))
    fires = fires.flatten(0, 1)
    hits, firings = fires[meant].sum(0).numpy(), fires.sum(0).numpy()
    found = analysis.search(fires_on=wanted)
    for row in found.itertuples():  # a float's last bit may lie on the other side of 0
        assert abs(row.hits - hits[row.feature]) <= 1 and abs(row.firings - firings[row.feature]) <= 1
        assert row.precision == pytest.approx(row.hits / row.firings)
        assert row.recall == pytest.approx(row.hits / int(meant.sum()))
    low = np.array([wilson_low(h / max(n, 1), n) if n else 0 for h, n in zip(hits, firings, strict=True)])
    beyond = low > float(meant.double().mean())
    assert beyond.any()
    sure = abs(low - float(meant.double().mean())) > 0.01
    assert set(np.flatnonzero(beyond & sure)) <= set(found["feature"]) <= set(np.flatnonzero(beyond | ~sure))
    ranks = [wilson_low(row.precision, row.firings) for row in found.itertuples()]
    assert ranks == sorted(ranks, reverse=True)
    for order in ("recall", "firings"):
        ordered = analysis.search(fires_on=wanted, order=order)
        assert ordered[order].is_monotonic_decreasing and len(ordered) == len(found)
    counts = analysis.table("counts")
    assert counts["firings"].sum() == analysis.features["firings"].sum()
    assert counts.groupby("feature")["reads"].sum().max() <= analysis.features["dfa_firings"].max()
    assert analysis.table("tokens")["count"].sum() == analysis.meta["n_tokens"] == len(texts)
    reading = analysis.search(reads=wanted)
    assert len(reading) and (reading["read_hits"] <= reading["dfa_firings"]).all()
    with pytest.raises(ValueError, match="ordered by recall where that is what was searched for"):
        analysis.search(reads=wanted, order="recall")
    both = analysis.search(fires_on=wanted, reads=wanted, head=1)
    assert set(both["feature"]) <= set(found["feature"]) & set(reading["feature"])


def wilson_low(share: float, n: int) -> float:
    """The lower root of (p - share)^2 = z^2 p (1 - p) / n."""
    z = 1.959964
    return float(np.roots([1 + z**2 / n, -2 * share - z**2 / n, share**2]).min())


def test_search_by_words_of_examples_descriptions_and_labels(analysed, tmp_path):
    path = shutil.copytree(analysed / "batchtopk", tmp_path / "a")
    analysis = Analysis(Checkpoint(path))
    found = analysis.search(in_examples="READS")
    assert len(found) and found["examples"].is_monotonic_decreasing
    for feature in analysis.search()["feature"].head(30):
        n = 0
        for row in analysis.examples(int(feature)).itertuples():
            around = row.token_ids[max(0, row.position - 14) : row.position + 15]  # a word of five letters may overlap
            text = "".join(analysis.strings[int(i)] for i in around)
            n += "reads" in text
        assert n == (found.loc[feature, "examples"] if feature in found.index else 0)
    first, second = (int(i) for i in analysis.search()["feature"].head(2))
    labels = Labels(path)
    labels.put(first, "Old Friends", "", 0.0)
    labels.put(second, "", "an old note", 0.0)
    assert set(analysis.search(in_text="OLD", labels=labels.table())["feature"]) == {first, second}
    assert analysis.search(in_text="old").empty, "without labels only descriptions are read"
    described = analysis.search(in_text="rare")
    assert (described["description"].str.contains("rare")).all() and len(described) < len(analysis.search())


def test_what_cannot_be_searched_for_is_one_sentence(analysed):
    analysis = Analysis(Checkpoint(analysed / "batchtopk"))
    with pytest.raises(ValueError, match="is no regular expression: "):
        analysis.search(fires_on=Tokens("(", "regex"))
    with pytest.raises(ValueError, match="there is no class of tokens 'verbs': known are punctuation, newline, digit"):
        analysis.search(fires_on=Tokens("verbs", "class"))


def test_descriptions_are_scored_on_further_text(analysed):
    for name in NAMES:
        checkpoint = Checkpoint(analysed / name)
        lm, analysis = checkpoint.open_model(), Analysis(checkpoint)
        features, everything = analysis.features, checkpoint.open_text(lm.tokenizer).held_out(40)
        f = checkpoint.sae.encode(lm.layer(1).z(everything)).flatten(2)
        detection = analysis.table("detection")
        scored = features.index[features["description_auroc"].notna()]
        assert len(scored) == analysis.meta["descriptions"]["features"] == detection["feature"].nunique() > 10
        assert detection["context"].between(20, 39).all(), "the first 20 were used to write the descriptions"
        for feature in scored[:20]:
            own = analysis.detection(feature)
            value = f[own["context"].tolist(), own["position"].tolist(), feature]
            assert value[own["fires"].to_numpy(copy=True)].min() > 0
            for row in own.itertuples():
                assert row.token_ids.tolist() == everything[row.context, : row.position + 1].tolist()
            expected = detected(*(own[column].to_numpy() for column in ("fires", "score", "context")))
            found = features.loc[feature, [f"description_{name}" for name in Detected._fields]]
            assert found.tolist() == pytest.approx(list(expected), nan_ok=True)
    ordered = analysis.search(order="description_auroc")["description_auroc"]
    assert ordered.dropna().is_monotonic_decreasing and ordered.isna().iloc[-1] == ordered.isna().any()


def test_without_further_text_nothing_is_scored(trained, tmp_path):
    shutil.copytree(trained / "batchtopk", tmp_path / "a")
    assert main([str(tmp_path / "a"), *OPTIONS, "--score_tokens=0"]) == 0
    analysis = Analysis(Checkpoint(tmp_path / "a"))
    assert analysis.features["description_auroc"].isna().all() and analysis.detection(0).empty
    assert analysis.meta["descriptions"] | {"features": 0, "auroc": None} == analysis.meta["descriptions"]


def test_descriptions(analysed):
    features = Analysis(Checkpoint(analysed / "block-l1_1")).features
    assert (features.loc[features["firings"] == 0, "description"] == "never fires").all()
    judged = features[features["role"].notna()]
    assert len(judged)
    for row in judged.itertuples():
        assert f" {row.role_share:.0%}: " in row.description
        assert " | on '" in row.description


@pytest.mark.parametrize("nothing", [None, np.nan, pd.NA])
def test_a_feature_without_a_role_is_rare(nothing):
    """What a frame makes of None differs between the versions of pandas."""
    row = {"firings": 2, "role": nothing, "fires_on_ids": np.array([1, -1]), "fires_on_counts": np.array([2, 0])}
    assert describe(pd.DataFrame([row]), {1: "a"}) == ["rare | on 'a' 100%"]


def test_another_text_is_read_whole(trained, tmp_path):
    shutil.copytree(trained / "batchtopk", tmp_path / "a")
    text = tmp_path / "other.txt"
    text.write_text("a head reads back what it wrote again\n" * 40)
    assert main([str(tmp_path / "a"), f"--dataset={text}", *OPTIONS]) == 0
    meta = Analysis(Checkpoint(tmp_path / "a")).meta
    assert (meta["text"]["name"], meta["text"]["held_out"]) == (str(text), False)
    assert meta["n_tokens"] == 620


def test_refusals(trained, analysed, tmp_path, capsys):
    def refused(*arguments: str) -> str:
        assert main([*arguments, "--device=cpu"]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        return error

    path = tmp_path / "copy"
    shutil.copytree(analysed / "dense", path)
    assert "config.json is missing" in refused(str(tmp_path / "nothing"))
    assert "tokens must be at least 1" in refused(str(path), "--tokens=0")
    assert "quantile_examples" in refused(str(path), "--quantile_examples=99")
    assert "does not exist" in refused(str(path), "--dataset=gone.txt")
    assert Analysis(Checkpoint(path)).meta["n_tokens"] == 620, "what was there is still there"

    with pytest.raises(CheckpointError, match="has no analysis yet: run"):
        Analysis(Checkpoint(trained / "dense"))
    with pytest.raises(ValueError, match="there is no feature 100000"):
        Analysis(Checkpoint(path)).feature(100_000)
    meta = json.loads((path / "analysis" / "meta.json").read_text())
    (path / "analysis" / "meta.json").write_text(json.dumps({**meta, "schema_version": 99}))
    with pytest.raises(CheckpointError, match="schema version 99"):
        Analysis(Checkpoint(path))
    (path / "analysis" / "meta.json").write_text(json.dumps({**meta, "weights": "others"}))
    with pytest.raises(CheckpointError, match="other weights"):
        Analysis(Checkpoint(path))
    (path / "analysis" / "meta.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        Analysis(Checkpoint(path))


@pytest.mark.parametrize(
    ("name", "column", "value", "message"),
    [
        ("pairs", "other", 10**6, "column other has 1000000"),
        ("pairs", "other", -1, "column other has -1"),
        ("pairs", "cosine", "x", "column cosine is .*string, not float"),
        ("pairs", "cosine", None, "no column cosine"),
        ("features", "head", 99, "column head has 99"),
        ("features", "feature", 0, "not in their order"),
        ("heads", "head", 0, "not in their order"),
        ("heads", "mono_deviants", [-1], "column mono_deviants has -1"),
        ("examples", "context", 10**6, "lies in no context"),
        ("detection", "context", 10**6, "lies in no context"),
        ("detection", "position", 10**4, "outside its context"),
        ("counts", "feature", 10**6, "column feature has 1000000"),
        ("examples", "position", 10**4, "outside its context"),
        ("copying", "source", 10**4, "outside its context"),
        ("tokens", "id", 10**6, "has no token"),
    ],
)
def test_ids_and_columns_that_cannot_be_are_one_sentence(analysed, tmp_path, name, column, value, message):
    path = shutil.copytree(analysed / "block-l1_1", tmp_path / "a")
    file = path / "analysis" / f"{name}.parquet"
    table = pd.read_parquet(file)
    table[column] = [value] * len(table)
    (table.drop(columns=column) if value is None else table).to_parquet(file)
    analysis = Analysis(Checkpoint(path))

    def read_all() -> None:
        feature = int(analysis.search()["feature"].iloc[0])
        _ = analysis.features, analysis.heads, analysis.copying, analysis.examples(feature), analysis.table("pairs")
        _ = [analysis.strings[int(i)] for i in analysis.feature(feature)["top_logit_ids"]]
        scored = analysis.features["description_auroc"].idxmax()
        _ = analysis.detection(int(scored)), analysis.table("counts")

    with pytest.raises(CheckpointError, match=f"{name}.parquet is damaged .*{message}"):
        read_all()


def test_a_damaged_artefact_is_one_sentence(analysed, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(analysed / "dense", path)
    (path / "analysis" / "heads.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(CheckpointError, match=r"heads.parquet is damaged"):
        _ = Analysis(Checkpoint(path)).heads
    (path / "analysis" / "examples.parquet").unlink()
    with pytest.raises(CheckpointError, match=r"examples.parquet is missing"):
        Analysis(Checkpoint(path)).examples(0)


def test_tables_of_a_process_killed_between_two_renames_come_back(tmp_path):
    store.write(tmp_path / "analysis", 1, {"of": "before"}, {})
    (tmp_path / "analysis").rename(tmp_path / ".analysis.old")
    with pytest.raises(OSError, match="analysis could not be written"):
        store.write(tmp_path / "analysis", 1, {}, {"a/b": pd.DataFrame()})  # a name that cannot be
    assert '"before"' in (tmp_path / "analysis" / "meta.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["analysis"]


def test_resuming_another_analysis_is_refused(trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained / "batchtopk", tmp_path / "a")

    monkeypatch.setattr(run, "deferred_interrupts", Now)
    assert main([str(tmp_path / "a"), *OPTIONS]) == 130
    assert "--resume goes on" in capsys.readouterr().err
    assert main([str(tmp_path / "a"), "--tokens=900", "--device=cpu", "--resume"]) == 2
    assert "begun with other options" in capsys.readouterr().err


def test_documents_of_held_out_tokens(trained):
    checkpoint = Checkpoint(trained / "dense")
    lm = checkpoint.open_model()
    corpus = checkpoint.open_text(lm.tokenizer)
    texts = [json.loads(line)["text"] for line in Path(checkpoint.config.text.name).read_text().splitlines()]
    n = corpus.n_held_out_contexts
    contexts = corpus.held_out(n)
    documents = corpus.documents(contexts)
    assert len(documents.unique()) == sum(hash_fraction(text) < 0.05 for text in texts) > 1
    for document in documents.unique().tolist():
        inside = (documents == document)[:, 1:]
        found = {tuple(row[1:][mask].tolist()) for row, mask in zip(contexts, inside, strict=True) if mask.any()}
        whole = lm.tokenizer(texts[document])["input_ids"] + [lm.tokenizer.eos_token_id]
        assert sum(map(len, found)) <= len(whole)
        for piece in found:  # each piece is a stretch of that document
            assert any(tuple(whole[i : i + len(piece)]) == piece for i in range(len(whole)))


def test_wandb_gets_the_tables(trained, tmp_path):
    shutil.copytree(trained / "batchtopk", tmp_path / "a")
    assert main([str(tmp_path / "a"), *OPTIONS, "--wandb=offline"]) == 0
    assert list(tmp_path.glob("a/wandb/offline-run-*/*.wandb"))


def test_half_precision_and_long_strips_survive_parquet(analysed):
    """Sparse rows have the lengths that their offsets say."""
    table = pq.read_table(analysed / "dense" / "analysis" / "examples.parquet")
    n = [len(row) for row in table["source_positions"].to_pylist()]
    assert n == [len(row) for row in table["dfa"].to_pylist()] == [len(row) for row in table["attention"].to_pylist()]
    assert min(n) > 0
    assert torch.tensor(table["head"].to_pylist()).max() < 4


def test_csv(analysed, tmp_path, capsys):
    from analysis import export_csv

    assert export_csv.main([str(analysed / "block-l1_1"), str(tmp_path / "out")]) == 0
    written = [line.rsplit("/", 1)[1] for line in capsys.readouterr().out.split()]
    assert written == [f"{name}.csv" for name in (
        "checkpoint", "evaluation", "features", "heads", "copying", "pairs", "merging")]  # fmt: skip
    analysis = Analysis(Checkpoint(analysed / "block-l1_1"))
    features = pd.read_csv(tmp_path / "out" / "features.csv")
    row = features.loc[features["firings"].idxmax()]
    expected = analysis.feature(int(row["feature"]))
    assert json.loads(row["fires_on_ids"]) == [analysis.strings[int(i)] for i in expected["fires_on_ids"] if i >= 0]
    assert json.loads(row["histogram"]) == expected["histogram"].tolist()
    heads = pd.read_csv(tmp_path / "out" / "heads.csv")
    assert [json.loads(cell) for cell in heads["mono_deviants"]] == [
        d.tolist() for d in analysis.heads["mono_deviants"]
    ]
    assert len(pd.read_csv(tmp_path / "out" / "evaluation.csv")) == 4
    assert export_csv.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "config.json is missing" in capsys.readouterr().err
