"""To and from SAELens: the same SAE as a folder that `sae_lens.SAE.load_from_disk` opens.

    python -m trainer.saelens export checkpoints/<name> OUT
    python -m trainer.saelens import IN checkpoints/<name> [--model NAME_OR_FOLDER] [--dataset TEXT]

SAELens knows no blocks, so a block-diagonal SAE leaves with its zeros, and an SAE that has them comes back
as one block per head. sae_lens takes seconds to import, so only the functions that need it do.
"""

import argparse
import json
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from trainer import checkpoint, cli
from trainer.block_diag import BlockDiagSAE
from trainer.checkpoint import Checkpoint
from trainer.config import require
from trainer.recipes import gated

if TYPE_CHECKING:
    from sae_lens import SAE

    from trainer.model.lm import Layer

_ARCHITECTURES = ("standard", "jumprelu", "topk", "batchtopk", "gated")
# Kept in the metadata for the way back.
_OF_TRAINING = ("recipe", "k", "l1_coefficient")
_OF_TEXT = ("context_size", "held_out_fraction", "text_column", "dataset_config", "dataset_split")


@torch.no_grad()
def to_saelens(saved: Checkpoint) -> "SAE":
    """The same SAE as a sae-lens object on the CPU, with W_enc [d_in, d_sae] and W_dec [d_sae, d_in] in full.

    relu becomes StandardSAE, jumprelu JumpReLUSAE, topk TopKSAE. It takes z [..., head, d_head]; features keep
    their ids, activations and reconstructions are the same.

    Raises:
        ValueError: it cannot be read, or is topk with k features of each head, which SAELens cannot express.
    """
    sae = saved.sae
    if sae.activation == "topk" and sae.k_scope == "head" and sae.n_blocks > 1:
        raise ValueError(
            f"SAELens has no topk with k features of each head, only over all features, so this SAE with k {sae.k} of "
            "each head cannot be exported"
        )
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata

    model, text = saved.config.model, saved.config.text
    of_training = saved.config.imported if saved.config.options is None else saved.config.options.sae
    metadata = SAEMetadata(
        sae_lens_training_version=None,  # which says that SAELens did not train it
        model_name=model.name, hook_name=model.hook_name, hook_head_index=None, prepend_bos=True,
        dataset_path=text.name, **{key: getattr(text, key) for key in _OF_TEXT},
        n_heads=model.n_heads, d_head=model.d_head, **{key: getattr(of_training, key) for key in _OF_TRAINING},
    )  # fmt: skip
    common = {
        "d_in": sae.d_in, "d_sae": sae.d_sae, "reshape_activations": "hook_z", "normalize_activations": "none",
        "apply_b_dec_to_input": False,  # b_enc holds everything
        "metadata": metadata,
    }  # fmt: skip
    if sae.activation == "topk":
        theirs = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(**common, k=sae.k, rescale_acts_by_decoder_norm=False))
    elif sae.activation == "jumprelu":
        theirs = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(**common))
    else:
        theirs = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(**common))
    # Whoever loads the SAE is told to load the model in this way. Set only now, or SAELens warns us of it too.
    metadata.model_from_pretrained_kwargs = model.processing
    ours = {name: parameter.detach().float().cpu() for name, parameter in sae.named_parameters()}
    full = {name: torch.block_diag(*p) if name.startswith("W_") else p.flatten() for name, p in ours.items()}
    theirs.load_state_dict(full)
    return theirs.eval().requires_grad_(False)


def export_checkpoint(path: Path, folder: Path) -> None:
    """Write a checkpoint as a folder for `sae_lens.SAE.load_from_disk`.

    Raises:
        ValueError: the checkpoint cannot be read or expressed, or the folder exists.
    """
    with _new_folder(folder) as partial:
        to_saelens(Checkpoint(path)).save_model(partial)


@torch.no_grad()
def from_saelens(
    theirs: "SAE", n_heads: int, scale: float = 1.0, b_V: Float[Tensor, "head d_head"] | None = None
) -> BlockDiagSAE:
    """A sae-lens SAE of hook_z as an SAE for raw hook_z, with the same features active and the same reconstructions.

    One block per head where every feature reads and writes one head, and heads have equally many in order; else one
    dense block. gated and batchtopk become jumprelu. Unless it is topk, decoder rows get norm 1
    (`BlockDiagSAE.fold_scale`), which rescales a feature's activation by a constant.

    Args:
        theirs: of architecture standard, jumprelu, topk, batchtopk (as SAELens trains it) or gated.
        n_heads: of the model; d_in is a multiple of it.
        scale: factor of the inputs that it was trained on.
        b_V: value biases in the z that it was trained on, which are not in ours.

    Raises:
        ValueError: a weight is not finite, or k does not fit.
    """
    architecture = theirs.cfg.architecture()
    p = {name: value.detach().float().cpu() for name, value in theirs.state_dict().items()}
    require(all(value.isfinite().all() for value in p.values()), "the SAELens SAE holds values that are not finite")
    W_enc, W_dec, b_dec = p["W_enc"], p["W_dec"], p["b_dec"]
    threshold = p.get("threshold")
    subtracted = b_dec if theirs.cfg.apply_b_dec_to_input else torch.zeros_like(b_dec)  # from the encoder's input
    if architecture == "gated":
        trained = p | {"b_enc": p["b_gate"], "b_dec": subtracted}
        folded = gated.for_use({name: value[None] for name, value in trained.items()}, torch.empty(0))
        W_enc, b_enc, threshold = (folded[name][0] for name in ("W_enc", "b_enc", "threshold"))
    else:
        b_enc = p["b_enc"] - subtracted @ W_enc
    if b_V is not None:
        more = scale * b_V.detach().float().cpu().flatten()  # their input is ours + b_V
        b_enc, b_dec = b_enc + more @ W_enc, b_dec - more
    if getattr(theirs.cfg, "rescale_acts_by_decoder_norm", False):  # selected by, and counted in, |d_i| pre
        norm = W_dec.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        W_enc, b_enc, W_dec = W_enc * norm, b_enc * norm, W_dec / norm[:, None]
    if architecture == "batchtopk":
        threshold = p["topk_threshold"].expand_as(b_enc)

    fits = len(b_enc) % n_heads == 0
    is_block_diagonal = fits and all(torch.block_diag(*_blocks(W, n_heads)).equal(W) for W in (W_enc, W_dec))
    n_blocks = n_heads if is_block_diagonal else 1
    activation = "topk" if architecture == "topk" else "relu" if threshold is None else "jumprelu"
    k = theirs.cfg.k if activation == "topk" else None
    sae = BlockDiagSAE(n_blocks, len(b_dec) // n_blocks, len(b_enc) // n_blocks, activation, k, "layer")
    sae.W_enc.copy_(_blocks(W_enc, n_blocks))
    sae.W_dec.copy_(_blocks(W_dec, n_blocks))
    sae.b_enc.copy_(b_enc.view_as(sae.b_enc))
    sae.b_dec.copy_(b_dec.view_as(sae.b_dec))
    if threshold is not None:
        sae.threshold.copy_(threshold.view_as(sae.threshold))
    sae.fold_scale(torch.full_like(sae.b_dec, scale))
    return sae.eval().requires_grad_(False)


def import_checkpoint(
    folder: Path, path: Path, model: str | None, dataset: str | None, text_column: str | None, eval_tokens: int
) -> None:
    """Turn a SAELens SAE of hook_z on disk into a checkpoint, and evaluate it.

    Args:
        folder: what SAELens saved: cfg.json and sae_weights.safetensors.
        path: the new checkpoint directory.
        model, dataset, text_column: as `python -m trainer` takes them; None for what the SAE says.
        eval_tokens: held-out tokens for eval.json.

    Raises:
        ValueError: the SAE cannot be read or expressed, does not fit the model, or the checkpoint exists.
    """
    require(eval_tokens >= 1, f"eval_tokens must be at least 1, got {eval_tokens}")
    with _new_folder(path) as partial:
        theirs, scale = _load_saelens(folder)
        metadata = theirs.cfg.metadata
        model, dataset = model or metadata.model_name, dataset or metadata.dataset_path
        hook = re.fullmatch(r"blocks\.(\d+)\.attn\.hook_z", str(metadata.hook_name))
        if hook is None:
            raise ValueError(f"{folder} reads {metadata.hook_name}, not the head outputs of a layer (attn.hook_z)")
        require(metadata.hook_head_index is None, f"{folder} reads head {metadata.hook_head_index} only, not all heads")
        require(model is not None, f"{folder} does not say which model it was trained on: name it with --model")
        require(dataset is not None, f"{folder} does not say which text it was trained on: name one with --dataset")

        # They import transformer_lens, for which a wrong option should not wait.
        from trainer.evaluate import evaluate_checkpoints
        from trainer.model.lm import LanguageModel

        layer = LanguageModel.load(model).layer(int(hook[1]))
        sae = _fitted(theirs, scale, layer, folder)
        checkpoint.save(partial, sae, _describe(theirs, sae, layer, dataset, text_column))
        evaluate_checkpoints([partial], eval_tokens)


def _fitted(theirs: "SAE", scale: float, layer: "Layer", folder: Path) -> BlockDiagSAE:
    """The SAE for the z of this model, or ValueError where it was not trained on that."""
    n_heads, d_head = layer.n_heads, layer.d_head
    require(
        theirs.cfg.d_in == n_heads * d_head,
        f"{folder} reads {theirs.cfg.d_in} dimensions, but {layer.lm.name} has {n_heads} heads of {d_head} = "
        f"{n_heads * d_head}",
    )
    # SAELens trains on models loaded without processing: value biases are then in z, and here in b_O. If the SAE
    # does not say how its model was loaded, it was as TransformerLens loads by default, and as here (Kissane et al.).
    loading = theirs.cfg.metadata.model_from_pretrained_kwargs or {}
    folded = loading.get("fold_value_biases", not loading)
    return from_saelens(theirs, n_heads, scale, None if folded else layer.folded_b_V)


def _describe(
    theirs: "SAE", sae: BlockDiagSAE, layer: "Layer", dataset: str, text_column: str | None
) -> checkpoint.Config:
    """config.json, as far as it is known how the SAE was trained."""
    from trainer.data.text import Corpus

    architecture, metadata, lm = theirs.cfg.architecture(), theirs.cfg.metadata, layer.lm
    fraction, column = metadata.held_out_fraction or 0.05, text_column or metadata.text_column or "text"
    is_theirs = dataset == metadata.dataset_path
    config, split = (metadata.dataset_config, metadata.dataset_split or "train") if is_theirs else (None, "train")
    size = min(metadata.context_size or 128, lm.n_ctx)
    corpus = Corpus(dataset, lm.tokenizer, size, fraction, column, config, split)
    source = f"SAELens {architecture}"  # tells it from what was trained here
    return checkpoint.Config(
        sae=checkpoint.Sizes.of(sae),
        model=checkpoint.Model.of(layer),
        text=checkpoint.Text.of(corpus),
        group=Path(lm.name).name,
        imported=checkpoint.Imported(source, metadata.recipe or source, metadata.l1_coefficient, metadata.k or sae.k),
    )


def _load_saelens(folder: Path) -> tuple[Any, float]:
    """An SAE that SAELens saved, in float32, and the factor by which its inputs were scaled."""
    try:
        architecture = json.loads((folder / "cfg.json").read_text()).get("architecture", "standard")
        if architecture not in _ARCHITECTURES:
            raise ValueError(f"its architecture is {architecture}, not one of {', '.join(_ARCHITECTURES)}")
        import sae_lens

        # batchtopk becomes jumprelu when its training ends; until then SAELens opens it only for training.
        kind = sae_lens.TrainingSAE if architecture == "batchtopk" else sae_lens.SAE
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on how to load the model, which is checked below
            theirs = kind.load_from_disk(folder, dtype="float32")
        normalize, scaler = theirs.cfg.normalize_activations, folder / "activation_scaler.json"
        scale = 1.0 if normalize == "none" else None
        if normalize == "expected_average_only_in" and scaler.exists():  # it was still in training
            scale = json.loads(scaler.read_text())["scaling_factor"]
        if not scale:
            raise ValueError(f"its inputs were normalised ({normalize}), and it does not hold the scale to fold")
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2]) or type(error).__name__
        raise ValueError(f"{folder} cannot be imported as a SAELens SAE: {reason}") from error
    return theirs, scale


def _blocks(weight: Float[Tensor, "rows columns"], n_blocks: int) -> Float[Tensor, "block row column"]:
    """The blocks on the diagonal."""
    grid = weight.unflatten(1, (n_blocks, -1)).unflatten(0, (n_blocks, -1))
    return grid.diagonal(dim1=0, dim2=2).movedim(-1, 0)


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` that takes its place in the end; after an error nothing is left."""
    if path.exists():
        raise ValueError(f"{path} exists already: choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=".saelens-") as hidden:
        partial = Path(hidden) / path.name
        partial.mkdir()
        yield partial
        partial.rename(path)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer.saelens", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    each = commands.add_parser("export", help="write a checkpoint for SAELens")
    each.set_defaults(run=export_checkpoint)
    each.add_argument("path", type=Path, help="checkpoint directory")
    each.add_argument("folder", type=Path, help="new folder, for sae_lens.SAE.load_from_disk")
    each = commands.add_parser("import", help="make a checkpoint of a SAELens SAE of hook_z, and evaluate it")
    each.set_defaults(run=import_checkpoint)
    each.add_argument("folder", type=Path, help="folder with cfg.json and sae_weights.safetensors")
    each.add_argument("path", type=Path, help="new checkpoint directory")
    each.add_argument("--model", help="as of python -m trainer; default what the SAE names")
    each.add_argument("--dataset", help="text to evaluate on, as of python -m trainer; default what the SAE names")
    each.add_argument("--text_column", help="field of a .jsonl, .parquet or Hugging Face record; default text")
    each.add_argument("--eval_tokens", type=int, default=8192, help="held-out tokens for eval.json; default 8192")
    options = vars(parser.parse_args(argv))
    run = options.pop("run")
    return cli.status(lambda: run(**options))


if __name__ == "__main__":
    sys.exit(main())
