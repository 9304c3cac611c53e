"""An SAE that another program trained becomes a checkpoint, and is evaluated."""

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from trainer import checkpoint
from trainer.config import require
from trainer.files import new_folder
from trainer.imports.source import read
from trainer.optimise.initialise import input_scale

if TYPE_CHECKING:
    from trainer.data.text import Corpus
    from trainer.model.lm import Layer

_STATISTICS_ROWS = 32_768  # from which a lost scale is estimated
_CONTEXTS = 16  # in one forward


def import_checkpoint(
    source: str,
    path: Path,
    model: str | None = None,
    dataset: str | None = None,
    text_column: str | None = None,
    fold_value_biases: bool | None = None,
    normalize: str | None = None,
    eval_tokens: int = 8192,
) -> None:
    """Write an SAE of others as a checkpoint, and evaluate it.

    Args:
        source: as `trainer.imports.source.read` takes it.
        path: the new checkpoint directory.
        model, dataset, text_column: as `python -m trainer` takes them; None for what the SAE says.
        fold_value_biases: whether its model was loaded so, where it does not say that.
        normalize: how its inputs were scaled, where the factor is lost: global, per_head or none.
        eval_tokens: held-out tokens for eval.json.

    Raises:
        ValueError: the SAE cannot be read or expressed, does not fit the model, or the checkpoint exists.
    """
    require(eval_tokens >= 1, f"eval_tokens must be at least 1, got {eval_tokens}")
    with new_folder(path) as partial:
        theirs = read(source)
        model, dataset = model or theirs.model, dataset or theirs.dataset
        require(bool(model), f"{source} does not say which model it was trained on: name it with --model")
        require(bool(dataset), f"{source} does not say which text it was trained on: name one with --dataset")
        require(
            (normalize is None) or theirs.scale is None,
            f"{source} says how its inputs were scaled: leave out --normalize",
        )
        require(
            normalize is not None or theirs.scale is not None,
            f"{source} was trained on inputs scaled to one mean norm, and the factor is lost: say --normalize=global "
            "(or per_head) to estimate it from the text, or --normalize=none where its weights hold it (SAELens 3.12.4 "
            "to 5 folds it when training ends, in folders called final_...)",
        )

        # They import transformer_lens, for which a wrong option should not wait.
        from trainer.data.text import Corpus
        from trainer.evaluate import evaluate_checkpoints
        from trainer.model.lm import LanguageModel

        lm = LanguageModel.load(str(model))
        layer = lm.layer(theirs.layer)
        n_heads, d_head, d_in = layer.n_heads, layer.d_head, len(theirs.b_dec)
        require(
            d_in == n_heads * d_head,
            f"{source} reads {d_in} dimensions, but {lm.name} has {n_heads} heads of {d_head} = {n_heads * d_head}",
        )
        folds = theirs.folds_value_biases if fold_value_biases is None else fold_value_biases
        b_V = layer.folded_b_V.float().cpu()
        require(
            folds is not None or not b_V.any(),
            f"{source} does not say whether its model was loaded with value biases folded, and {lm.name} has some: say "
            "--fold_value_biases=true (HookedTransformer.from_pretrained) or false (from_pretrained_no_processing)",
        )
        b_V = torch.zeros_like(b_V) if folds else b_V
        fraction, column = theirs.held_out_fraction or 0.05, text_column or theirs.text_column or "text"
        context_size = min(theirs.context_size or 128, lm.n_ctx)
        is_theirs = str(dataset) == theirs.dataset
        part = (theirs.dataset_config, theirs.dataset_split or "train") if is_theirs else (None, "train")
        corpus = Corpus(str(dataset), lm.tokenizer, context_size, fraction, column, *part)
        scale = torch.full((n_heads, d_head), 1.0 if theirs.scale is None else theirs.scale)
        if normalize in ("global", "per_head"):
            scale = input_scale(_rows(layer, corpus) + b_V, normalize)
        sae = theirs.for_raw_z(n_heads, scale.flatten(), b_V.flatten())
        config = checkpoint.Config(
            sae=checkpoint.Sizes.of(sae),
            model=checkpoint.Model.of(layer),
            text=checkpoint.Text.of(corpus),
            group=Path(lm.name).name,
            imported=checkpoint.Imported(
                theirs.source, theirs.recipe or theirs.source, theirs.l1_coefficient, theirs.k, folds, normalize
            ),
        )
        checkpoint.save(partial, sae, config)
        evaluate_checkpoints([partial], eval_tokens)


def _rows(layer: "Layer", corpus: "Corpus") -> Float[Tensor, "row head d_head"]:
    """z of the first training contexts, with BOS as SAELens counts it."""
    contexts = list(islice(corpus.train(), -(-_STATISTICS_ROWS // corpus.context_size)))
    batches = torch.stack(contexts).split(_CONTEXTS)
    return torch.cat([layer.z(batch).flatten(0, 1).float().cpu() for batch in batches])
