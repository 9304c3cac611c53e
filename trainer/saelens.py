"""SAEs to and from other programs.

    python -m trainer.saelens export checkpoints/<name> OUT
    python -m trainer.saelens import SOURCE checkpoints/<name> [--model NAME_OR_FOLDER] [--dataset TEXT]

An export is a folder that `sae_lens.SAE.load_from_disk` opens; `trainer.imports` says what can be imported.
SAELens knows no blocks, so a block-diagonal SAE leaves with its zeros, and an SAE that has them comes back
as one block per head. sae_lens takes seconds to import, so only the functions that need it do.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from trainer import cli
from trainer.checkpoint import Checkpoint, Sizes
from trainer.files import new_folder
from trainer.imports.run import import_checkpoint
from trainer.sharing.pull import located

if TYPE_CHECKING:
    from sae_lens import SAE

# Kept in the metadata for the way back.
_OF_TRAINING = ("recipe", "k", "l1_coefficient")
_OF_TEXT = ("context_size", "held_out_fraction", "text_column", "dataset_config", "dataset_split")


def why_not(sizes: Sizes) -> str | None:
    """Why SAELens cannot express an SAE, or None where it can."""
    if sizes.activation == "topk" and sizes.k_scope == "head" and sizes.n_blocks > 1:
        return "SAELens has no topk with k features of each head, only over all features"
    return None


@torch.no_grad()
def to_saelens(saved: Checkpoint) -> "SAE":
    """The same SAE as a sae-lens object on the CPU, with W_enc [d_in, d_sae] and W_dec [d_sae, d_in] in full.

    relu becomes StandardSAE, jumprelu JumpReLUSAE, topk TopKSAE. It takes z [..., head, d_head]; features keep
    their ids, activations and reconstructions are the same.

    Raises:
        ValueError: it cannot be read, or is topk with k features of each head, which SAELens cannot express.
    """
    sae = saved.sae
    if reason := why_not(saved.config.sae):
        raise ValueError(f"{reason}, so this SAE with k {sae.k} of each head cannot be exported")
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


def write_saelens(saved: Checkpoint, folder: Path, named: Path | str) -> None:
    """Write cfg.json and sae_weights.safetensors into a folder, which errors name otherwise.

    Raises:
        ValueError: as `to_saelens`.
        OSError: they cannot be written, which safetensors says by an error of its own.
    """
    try:
        to_saelens(saved).save_model(folder)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{named} could not be written: {error}") from error


def export_checkpoint(path: Path | str, folder: Path) -> None:
    """Write a checkpoint as a folder for `sae_lens.SAE.load_from_disk`.

    Args:
        path: as `located` takes it.
        folder: the new folder.

    Raises:
        ValueError: the checkpoint cannot be read or expressed, or the folder exists or cannot be made.
        OSError: there is no room; the folder is named.
    """
    with new_folder(folder) as partial:
        write_saelens(Checkpoint(located(path)), partial, folder)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer.saelens", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    each = commands.add_parser("export", help="write a checkpoint for SAELens")
    each.set_defaults(run=export_checkpoint)
    each.add_argument("path", help=cli.CHECKPOINT)
    each.add_argument("folder", type=Path, help="new folder, for sae_lens.SAE.load_from_disk")
    each = commands.add_parser(
        "import",
        help="make a checkpoint of an SAE of hook_z that another program trained, and evaluate it",
        epilog="Examples: import downloads/sae checkpoints/x; import NAME.pt checkpoints/x --dataset=TEXT; "
        "import gpt2-small-hook-z-kk/blocks.5.hook_z checkpoints/x --dataset=TEXT",
    )
    each.set_defaults(run=import_checkpoint)
    each.add_argument(
        "source",
        help="folder with cfg.json and sae_weights.safetensors (SAELens, the reference); NAME.pt beside NAME_cfg.json "
        "(Kissane et al.); RELEASE/SAE_ID of SAELens' pretrained SAEs; OWNER/REPO[:FOLDER or :NAME.pt] of the "
        "Hugging Face hub",
    )
    each.add_argument("path", type=Path, help="new checkpoint directory")
    each.add_argument("--model", help="as of python -m trainer; default what the SAE names")
    each.add_argument("--dataset", help="text to evaluate on, as of python -m trainer; default what the SAE names")
    each.add_argument("--text_column", help="field of a .jsonl, .parquet or Hugging Face record; default text")
    each.add_argument(
        "--fold_value_biases",
        choices=("true", "false"),
        help="whether TransformerLens had folded value biases in the model it was trained on; default what the SAE "
        "says, or what its version of SAELens did",
    )
    each.add_argument(
        "--normalize",
        choices=("global", "per_head", "none"),
        help="where the scale of its inputs is lost: estimate it from the text, for all heads together as SAELens "
        "does, or for each; none where its weights hold it",
    )
    each.add_argument("--eval_tokens", type=int, default=8192, help="held-out tokens for eval.json; default 8192")
    options = vars(parser.parse_args(argv))
    run, folds = options.pop("run"), options.pop("fold_value_biases", None)
    if folds is not None:
        options["fold_value_biases"] = folds == "true"
    return cli.status(lambda: run(**options))


if __name__ == "__main__":
    sys.exit(main())
