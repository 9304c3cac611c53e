"""The language model agrees with Hugging Face, stops at the hook, and splices exactly."""

from copy import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from trainer.model.lm import LanguageModel, _unusual, leave_cores


@pytest.fixture(params=["gpt2", "llama"])
def pair(request):
    lm = request.getfixturevalue(request.param)
    return lm, AutoModelForCausalLM.from_pretrained(request.getfixturevalue(f"{request.param}_folder"))


TOKENS = torch.arange(1, 41).view(2, 20)


def test_logits_are_hugging_faces(pair):
    lm, hf = pair
    resid, _ = lm.layer(1).prefix(TOKENS)
    with torch.no_grad():
        theirs = hf(TOKENS).logits.log_softmax(-1)
    assert torch.allclose(lm.layer(1).logits(resid).log_softmax(-1), theirs, atol=1e-4)


def test_z_is_the_pattern_times_the_values_of_every_query_head(pair):
    lm, _ = pair
    z, v, pattern = lm.layer(2).attention(TOKENS)
    assert v.shape == z.shape == (2, 20, lm.n_heads, lm.d_head)
    assert torch.allclose(torch.einsum("bhqs,bshd->bqhd", pattern, v), z, atol=1e-5)
    assert torch.equal(z, lm.layer(2).z(TOKENS))


def test_splicing_z_back_changes_no_logit(pair):
    lm, _ = pair
    resid, z = lm.layer(1).prefix(TOKENS)
    clean = lm.layer(1).logits(resid)
    assert torch.equal(lm.layer(1).logits(resid, z), clean)
    assert not torch.allclose(lm.layer(1).logits(resid, torch.zeros_like(z)), clean, atol=1e-3)


def test_nothing_after_the_hook_is_computed(gpt2):
    ran = []
    names = [name for name, _ in gpt2.model.named_modules() if name.startswith("blocks.1.") or name == "ln_final"]
    handles = [
        gpt2.model.get_submodule(name).register_forward_hook(lambda *a, name=name: ran.append(name)) for name in names
    ]
    try:
        gpt2.layer(0).z(TOKENS)
        assert ran == []
        gpt2.layer(1).z(TOKENS)
    finally:
        for handle in handles:
            handle.remove()
    # hook_z itself raises, so its own module never finishes; the attention's output never begins.
    assert "blocks.1.attn.hook_pattern" in ran
    assert not [name for name in ran if "mlp" in name or "resid_mid" in name or name == "ln_final"]


def test_no_hook_stays_behind_but_those_of_others(gpt2):
    def fail(z):
        raise ValueError("edited in vain")

    point, seen = gpt2.model.hook_dict["blocks.1.attn.hook_z"], []
    point.add_hook(lambda value, hook: seen.append(value.shape))
    try:
        gpt2.layer(1).attention(TOKENS)
        with pytest.raises(ValueError, match="edited in vain"):
            gpt2.layer(1).edited(TOKENS, fail)
        assert len(seen) == 2 and len(point.fwd_hooks) == 1
    finally:
        point.remove_hooks()
    assert not [name for name, point in gpt2.model.hook_dict.items() if point.fwd_hooks]


def test_threads_run_parts_of_a_batch_and_give_the_whole(pair):
    lm, _ = pair
    layer, tokens = lm.layer(1), torch.randint(1, 200, (5, 16), generator=torch.Generator().manual_seed(0))
    resid, z = layer.prefix(tokens)
    others = z.roll(1, 0)  # of each context other ones
    by_one = [z, *layer.attention(tokens), layer.final(resid, others), layer.edited(tokens, lambda z: 2 * z)]
    ran = []
    handle = lm.model.blocks[0].register_forward_pre_hook(lambda block, inputs: ran.append(len(inputs[0])))
    torch.set_num_threads(2)
    try:
        z = layer.z(tokens)
        by_two = [z, *layer.attention(tokens), layer.final(resid, others), layer.edited(tokens, lambda z: 2 * z)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
        handle.remove()
    assert sorted(ran) == [1] * 3 + [2] * 6
    for one, two in zip(by_one, by_two, strict=True):
        assert torch.allclose(one, two, atol=1e-5)
    assert not torch.allclose(by_one[4], layer.final(resid, z), atol=1e-3)


@pytest.mark.parametrize(("cores", "threads"), [(None, 1), (1, 1), (2, 1), (8, 4)])
def test_half_of_the_cores_are_left(cores, threads, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    try:
        leave_cores()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_sizes_are_read_from_the_model(llama):
    assert (llama.n_layers, llama.n_heads, llama.d_head, llama.d_vocab) == (3, 6, 8, 257)


@pytest.mark.parametrize(
    ("name", "value"),
    [("attn_scores_soft_cap", 4.0), ("output_logits_soft_cap", 4.0), ("attn_scale", 3.0), ("rotary_base_local", 1e4),
     ("use_NTK_by_parts_rope", True)],
)  # fmt: skip
def test_the_fingerprint_tells_what_no_weight_does(llama, monkeypatch, name, value):
    before = llama.fingerprint()
    assert _unusual(llama.model.cfg) == []  # so that the hashes in checkpoints of such models hold
    monkeypatch.setattr(llama.model.cfg, name, value)
    assert llama.fingerprint() != before
    if name == "use_NTK_by_parts_rope":
        before = llama.fingerprint()
        monkeypatch.setattr(llama.model.cfg, "NTK_by_parts_factor", 32.0)
        assert llama.fingerprint() != before


def test_a_folder_that_transformer_lens_gets_wrong_is_refused(llama_folder, tmp_path, monkeypatch):
    """With another rotary base the weights load, but the model is not the one in the folder."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(llama_folder, copy)
    original = AutoModelForCausalLM.from_pretrained

    def other_base(*args, **kwargs):
        model, info = original(*args, **kwargs)
        model.config.rope_theta = 10.0
        return model, info

    monkeypatch.setattr("trainer.model.loading.AutoModelForCausalLM.from_pretrained", other_base)
    with pytest.raises(ValueError, match="computes other head outputs than Hugging Face"):
        LanguageModel.load(str(copy))


def test_bad_names_and_prompts_are_sentences(gpt2, tmp_path):
    with pytest.raises(ValueError, match="unknown model 'nonsense'"):
        LanguageModel.load("nonsense")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        LanguageModel.load(str(tmp_path))
    with pytest.raises(ValueError, match="layers 0 to 5"):
        gpt2.layer(6).z(TOKENS)
    with pytest.raises(ValueError, match="empty"):
        gpt2.to_tokens("")


def test_a_single_token(gpt2):
    """The tokenizer has bytes only."""
    assert gpt2.token_strings([gpt2.single_token("q")]) == ["q"]
    with pytest.raises(ValueError, match=r"' Mary' is 5 tokens of .* and not one: \[' ', 'M', 'a', 'r', 'y'\]"):
        gpt2.single_token(" Mary")
    with pytest.raises(ValueError, match="'' is 0 tokens"):
        gpt2.single_token("")


def test_a_named_model_that_is_not_in_the_cache_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="model 'pythia-14m' could not be loaded"):
        LanguageModel.load("pythia-14m")


def test_bytes_that_are_no_character_are_written_out(gpt2):
    class Tokenizer:
        """A byte-level BPE cuts characters into tokens; others name bytes themselves."""

        def batch_decode(self, ids, **options):
            return ["\ufffd", " \ufffd", "\ufffd", "\u00d7"]

        def convert_ids_to_tokens(self, ids):
            return ["\u00d7", "\u0120\u00a9", "<0xD7>", "\u00c3\u0139"]

    other = copy(gpt2)
    other.tokenizer = Tokenizer()
    assert other.token_strings([0, 1, 2, 3]) == ["<D7>", " <A9>", "<0xD7>", "\u00d7"]
