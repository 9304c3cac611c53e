"""The dashboard drawn by sae-vis: every figure on the page that is ours is computed again, the obvious way."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sae_vis import data_fetching_fns
from sae_vis.data_storing_fns import SaeVisData

from analysis import sae_vis
from analysis.logits import inverse_scale
from tests.helpers import PATIENCE, find_chromium
from trainer import checkpoint
from trainer.block_diag import BlockDiagSAE
from trainer.model.lm import LanguageModel

LAYER, N = 1, 2  # features 0 and 1 of each head are shown
PATCHED = ("resid_final_pre_layernorm_to_logits", "device")
UPSTREAM = [getattr(data_fetching_fns, name) for name in PATCHED]
CASES = {  # model, blocks ("heads" or dense), options of the SAE
    "relu": ("gpt2", "heads", {}),
    "jumprelu, grouped queries": ("llama", "heads", {"activation": "jumprelu"}),
    "topk, dense": ("gpt2", "dense", {"activation": "topk", "k": 5}),
    "norm after the attention": ("gemma2", "heads", {}),
}


def make_sae(lm, blocks: str, **options) -> BlockDiagSAE:
    """A random SAE whose features 1 of block 0 and 0 of block 1 never fire."""
    torch.manual_seed(3)
    shape = (lm.n_heads, lm.d_head, 6) if blocks == "heads" else (1, lm.n_heads * lm.d_head, 24)
    sae = BlockDiagSAE(*shape, **options).requires_grad_(False)
    sae.W_enc.mul_(2)
    sae.W_dec.mul_(1.5)
    sae.W_dec[-1, 0] *= 0.02  # sae-vis would give its logits thousands of ticks
    sae.b_enc.normal_(std=0.1)
    sae.b_enc[0, 1] = -100
    if blocks == "heads":
        sae.b_enc[1, 0] = -100
    if sae.activation == "jumprelu":
        sae.threshold.fill_(0.2)
    return sae


def contexts(lm, n: int = 8, length: int = 40) -> torch.Tensor:
    tokens = torch.randint(1, lm.d_vocab, (n, length), generator=torch.Generator().manual_seed(4))
    tokens[:, 0] = lm.tokenizer.bos_token_id
    return tokens


def read(path) -> dict[int, dict]:
    """What the page is drawn from, by feature id."""
    found = re.search(r"function defineData\(\) \{\s*return (.*);\n\}", path.read_text(encoding="utf-8"))
    return {int(feature): parts for feature, parts in json.loads(found[1]).items()}


@pytest.fixture(scope="module", params=CASES)
def shown(request, tmp_path_factory) -> SimpleNamespace:
    """A page, and what is needed to compute its figures again."""
    model, blocks, options = CASES[request.param]
    lm = request.getfixturevalue(model)
    layer, sae, tokens = lm.layer(LAYER), make_sae(lm, blocks, **options), contexts(lm)
    data = sae_vis.vis_data(layer, sae, sae_vis.harvest(layer, sae, tokens, sae_vis.first_features(sae, N)))
    path = tmp_path_factory.mktemp("page") / "page.html"
    sae_vis.save(path, data, "a title", "a note")
    _, cache = lm.model.run_with_cache(tokens)
    return SimpleNamespace(lm=lm, sae=sae, tokens=tokens, cache=cache, path=path, page=read(path))


def examples(page: dict[int, dict]):
    """(feature, example) for every example on the page."""
    for feature, parts in page.items():
        for group in parts["seqMultiGroup"]:
            assert group["seqGroupData"], "an empty interval fades the colours"
            yield from ((feature, example) for example in group["seqGroupData"])


def position(token: dict) -> tuple[int, int]:
    context, at = re.fullmatch(r"\((\d+), (\d+)\)", token["tokPosn"]).groups()
    return int(context), int(at)


def z_direction(shown, feature: int) -> torch.Tensor:
    """What a feature adds to z per unit of activation, [head, d_head]."""
    block, index = divmod(feature, shown.sae.features_per_block)
    direction = torch.zeros(shown.sae.n_blocks, shown.sae.width)
    direction[block] = shown.sae.W_dec[block, index]
    return direction.view(shown.lm.n_heads, shown.lm.d_head)


def activations(shown) -> torch.Tensor:
    return shown.sae.encode(shown.cache[f"blocks.{LAYER}.attn.hook_z"]).flatten(-2)


def test_selector_has_the_first_live_features_of_each_head(shown):
    F, f = shown.sae.features_per_block, activations(shown)
    expected = [i for i in range(shown.sae.d_sae) if i % F < N and (f[:, 7:-5, i] > 0).any()]
    assert list(shown.page) == expected
    assert not {1, F} & set(expected) and len(expected) >= shown.sae.n_blocks
    for feature, parts in shown.page.items():
        density = (f[:, 1:, feature] > 0).float().mean()
        for histogram in ("actsHistogram", "logitsHistogram"):
            assert 0 < len(parts[histogram]["ticks"]) < 20
        shown_density = float(re.search(r"DENSITY = ([\d.]+)%", parts["actsHistogram"]["title"])[1]) / 100
        assert shown_density == pytest.approx(density.item(), abs=1.01 / f[:, 1:, feature].numel())


def test_activations_are_those_of_the_sae(shown):
    f = activations(shown)
    for feature, example in examples(shown.page):
        bold = [token for token in example["seqData"] if token.get("isBold")]
        assert len(bold) == 1 and f[(*position(bold[0]), feature)] > 0
        for token in example["seqData"]:
            context, at = position(token)
            assert at >= 1, "BOS is no example"
            assert token["tokID"] == shown.tokens[context, at]
            assert token.get("featAct", 0) == pytest.approx(f[context, at, feature].item(), abs=1e-4)
    for feature, parts in shown.page.items():
        first = next(t for t in parts["seqMultiGroup"][0]["seqGroupData"][0]["seqData"] if t.get("isBold"))
        assert first["featAct"] == pytest.approx(f[:, 7:-5, feature].max().item(), abs=1e-4)


def test_sources_are_the_exact_dfa(shown):
    lm, sae, b_V = shown.lm, shown.sae, shown.lm.layer(LAYER).b_V
    v, pattern = (shown.cache[f"blocks.{LAYER}.attn.hook_{name}"] for name in ("v", "pattern"))
    v = v[:, :, torch.arange(lm.n_heads) // (lm.n_heads // v.shape[2])]  # each query head's values
    f = activations(shown)
    for feature, example in examples(shown.page):
        block, index = divmod(feature, sae.features_per_block)
        encoder = torch.zeros(sae.n_blocks, sae.width)
        encoder[block] = sae.W_enc[block, :, index]
        encoder = encoder.view(lm.n_heads, lm.d_head)
        context, q = position(next(token for token in example["seqData"] if token.get("isBold")))
        exact = (pattern[context, :, q] * ((v[context] - b_V) * encoder).sum(-1).T).sum(0)
        constant = (b_V * encoder).sum() + sae.b_enc[block, index]
        assert exact.sum() + constant == pytest.approx(f[context, q, feature].item(), abs=1e-3)
        sources = example["dfaSeqData"]
        places = [position(source) for source in sources]
        top = int(exact.argmax())
        begin = min(max(top - 5, 0), shown.tokens.shape[1] - 11)
        assert places == [(context, s) for s in range(begin, begin + 11)]
        for source, (_, s) in zip(sources, places, strict=True):
            assert source["tokID"] == shown.tokens[context, s]
            assert source["dfaValue"] == pytest.approx(exact[s].item(), abs=1e-4)


def test_loss_effects_go_through_the_models_own_head(shown):
    lm, f, checked = shown.lm, activations(shown), 0
    model = lm.model
    resid = shown.cache[f"blocks.{lm.n_layers - 1}.hook_resid_post"]

    def log_probs(x: torch.Tensor) -> torch.Tensor:
        if model.cfg.normalization_type == "LNPre":
            x = x - x.mean(-1, keepdim=True)
        logits = x / (x.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt() @ model.W_U + model.b_U
        cap = model.cfg.output_logits_soft_cap
        return (cap * (logits / cap).tanh() if cap > 0 else logits).log_softmax(-1)

    for feature, example in examples(shown.page):
        context, first = position(example["seqData"][0])
        at = torch.arange(first, first + len(example["seqData"]))
        activation = f[context, at - 1, feature] * (at > 1)  # BOS has none
        z = activation[:, None, None] * z_direction(shown, feature)
        written = torch.einsum("phd,hdm->pm", z, model.blocks[LAYER].attn.W_O)
        if hasattr(model.blocks[LAYER], "ln1_post"):
            written = written * model.blocks[LAYER].ln1_post.w
            written = written / shown.cache[f"blocks.{LAYER}.ln1_post.hook_scale"][context, at - 1]
        before, token = resid[context, at - 1], shown.tokens[context, at, None]
        with_it = log_probs(before).gather(1, token)[:, 0]
        without = log_probs(before - written).gather(1, token)[:, 0]
        for i, shown_token in enumerate(example["seqData"]):
            assert ("lossEffect" in shown_token) == bool(activation[i] > 1e-5)
            if "lossEffect" in shown_token:
                assert shown_token["lossEffect"] == pytest.approx((without - with_it)[i].item(), abs=2e-4)
                assert shown_token["origProb"] == pytest.approx(with_it[i].exp().item(), abs=1e-4)
                assert shown_token["newProb"] == pytest.approx(without[i].exp().item(), abs=1e-4)
                checked += 1
    assert checked > 10


def test_page_asks_no_other_machine_and_data_cannot_end_its_script(shown):
    html = shown.path.read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)\s*=", html)
    data = html.split("function defineData()", 1)[1]
    assert data.index("<") == data.index("</script>") and data.count("</script>") == 1
    assert html.count("<title>a title</title>") == 1 and "<p class='note'>a note</p>" in html


def test_sae_vis_is_left_as_it_was(gpt2):
    def now():
        return [getattr(data_fetching_fns, name) for name in PATCHED]

    def fails():
        assert now()[0] is not UPSTREAM[0]
        raise KeyError

    assert now() == UPSTREAM
    with pytest.raises(KeyError), sae_vis._own_unembedding(gpt2):
        fails()
    assert now() == UPSTREAM
    sae, tokens = make_sae(gpt2, "heads"), contexts(gpt2)
    state = torch.get_rng_state()
    found = sae_vis.harvest(gpt2.layer(LAYER), sae, tokens, sae_vis.first_features(sae, 1))
    first = sae_vis.vis_data(gpt2.layer(LAYER), sae, found).feature_data_dict[0]["seqMultiGroup"]
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    second = sae_vis.vis_data(gpt2.layer(LAYER), sae, found).feature_data_dict[0]["seqMultiGroup"]
    assert first == second, "the same examples every time"


@pytest.fixture(scope="module")
def saved(gpt2, gpt2_folder, text_file, tmp_path_factory):
    """A checkpoint directory on the tiny model and text."""
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    sae, hook_name = make_sae(gpt2, "heads"), f"blocks.{LAYER}.attn.hook_z"
    sizes = (gpt2.n_heads, gpt2.d_head)
    model = checkpoint.Model(str(gpt2_folder), gpt2.fingerprint(), *sizes, "float32", {}, hook_name, LAYER)
    text = checkpoint.Text(str(text_file), "", 32, 0.3, "text")
    checkpoint.save(path, sae, checkpoint.Config(checkpoint.Sizes.of(sae), model, text, "tiny"))
    return path


def test_command_line_writes_a_page_that_works_offline(saved, tmp_path, capsys, monkeypatch):
    out, strings = tmp_path / "page.html", LanguageModel.token_strings
    monkeypatch.setattr(LanguageModel, "token_strings", lambda lm, ids: ["</s>", *strings(lm, ids)[1:]])  # 0 is BOS
    assert sae_vis.main([str(saved), str(out), "--features_per_head=2", "--tokens=400"]) == 0
    told = capsys.readouterr()
    assert "2 of 8 do not fire there" in told.out
    assert "Language model: 100%" in told.err and "Features: 100%" in told.err  # where no terminal is, too
    made = checkpoint.Checkpoint(saved)
    lm = made.open_model("cpu")
    contexts = made.open_text(lm.tokenizer).held_out_tokens(400)
    (factor,) = re.findall(r"here ([\d.e-]+)\.</p>", out.read_text())
    assert float(factor) == pytest.approx(inverse_scale(lm.layer(made.layer), contexts), rel=0.01)
    chromium = find_chromium()
    from playwright.sync_api import sync_playwright

    requests, errors = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
            timeout=1000 * PATIENCE,
        )
        tab = browser.new_context(offline=True).new_page()
        tab.set_default_timeout(1000 * PATIENCE)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(out.as_uri())
        features = tab.eval_on_selector_all("#select-0 option", "options => options.map(option => option.value)")
        assert [int(each) for each in features] == list(read(out))
        tab.select_option("#select-0", features[-1])
        tab.locator(f"#logitsHistogram-{features[-1]} svg").first.wait_for()
        source = tab.locator(".dfa-seq-group .token", has_text="</s>").first
        source.scroll_into_view_if_needed()
        source.hover()
        tooltip = tab.locator(".tooltip:visible")
        assert re.search(r"Token\s+</s> \(0\)\s+Dataset position\s+\(\d+, 0\)\s+DFA", tooltip.inner_text())
        assert re.fullmatch(r"[\d.-]+px", tooltip.evaluate("tooltip => tooltip.style.left")), "it follows the mouse"
        browser.close()
    assert not errors
    assert requests == [out.as_uri()]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--features_per_head=7", "--tokens=400"], "features_per_head must lie between 1 and 6"),
        (["--features_per_head=0", "--tokens=400"], "features_per_head must lie between 1 and 6"),
        (["--tokens=0"], "tokens must be at least 1"),
        (["--features_per_head=2", "--tokens=20"], "too few to choose examples from"),
    ],
)
def test_wrong_numbers_are_one_sentence(saved, tmp_path, capsys, options, says):
    assert sae_vis.main([str(saved), str(tmp_path / "page.html"), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and says in error
    assert not list(tmp_path.iterdir())


def test_wrong_places_are_one_sentence(saved, tmp_path, capsys, monkeypatch):
    for path, out, says in (
        (tmp_path / "none", tmp_path / "page.html", "config.json is missing"),
        (saved, tmp_path / "none" / "page.html", "does not exist"),
        (saved, tmp_path, "is a folder"),
    ):
        assert sae_vis.main([str(path), str(out)]) == 2
        assert says in capsys.readouterr().err
    monkeypatch.setattr(sae_vis, "_SCRIPTS", (("no-such-package", "d3.js"),))
    assert sae_vis.main([str(saved), str(tmp_path / "page.html")]) == 2
    assert "no-such-package" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_half_file(tmp_path):
    other = object.__new__(SaeVisData)
    other.save_feature_centric_vis = lambda file: Path(file).write_text("function defineData()</script>")
    with pytest.raises(ValueError, match="another page"):
        sae_vis.save(tmp_path / "page.html", other, "a title", "a note")
    assert not list(tmp_path.iterdir())
