"""The page that the hub shows of a repository: its SAEs, their figures as a whole and by head, and how to load them.

Every figure is from an eval.json, everything else from a config.json. Texts of these files stand as code, so that
nothing in them is Markdown, HTML or a link.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import yaml

import trainer
from trainer.checkpoint import Checkpoint
from trainer.errors import one_line
from trainer.saelens import why_not

_END = "<!-- written by python -m trainer.hub; what stands below this line is kept when more is pushed -->"
_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_FIGURES = {"L0": ".1f", "FVU": ".3f", "CE_score": ".3f", "KL_score": ".3f"}
_TAGS = ["sparse-autoencoder", "mechanistic-interpretability", "attention-heads", "saelens"]


def write_card(repo: str, checkpoints: Sequence[Checkpoint], licence: str | None = None, before: str = "") -> str:
    """The card of a repository, in Markdown.

    Args:
        repo: OWNER/REPO.
        checkpoints: all that it holds, by name.
        licence: an identifier of the hub, as mit; None for that of the card before, if it has one.
        before: the card that it has; what somebody wrote into it is kept.

    Raises:
        CheckpointError: an eval.json is damaged.
    """
    front, below = _read(before)
    licence = licence or front.get("license")
    header = {"library_name": "saelens", "tags": _TAGS, **({"license": licence} if licence else {})}
    for_saelens = [each for each in checkpoints if why_not(each.config.sae) is None]
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {repo.partition('/')[2]}",
        "Sparse autoencoders (SAEs) on the outputs z of attention heads. A block-diagonal one has a block for each "
        "head, so that every feature reads and writes one head; a dense one has a single block for all heads of its "
        f"layer. Pushed from attn-saes {trainer.__version__}, which evaluated them.",
        "## SAEs",
        _summary(checkpoints),
        "L0: active features on a token. FVU: fraction of z's variance that is not explained. CE and KL score: what is "
        "left of the layer's effect on predictions with the SAE in place of z, 1 all, 0 as with z zeroed; ± is one "
        "standard error. All on held-out tokens, and L0 and KL score again on random tokens repeated once. *Not "
        "measurable*: on this text zeroing z changes too little for a score.",
        "## What they read",
        _sources(checkpoints),
        "The hook is TransformerLens' name, and z is that of the model loaded with these options.",
        "## By head",
        *(f"{_code(each.name)}\n\n{_by_head(each)}" for each in checkpoints),
        "## Load",
        "Into attn-saes, which shows what every head and feature does:",
        f"```bash\npython -m trainer.hub pull {repo}\npython -m analysis hf://{repo}/{checkpoints[0].name}\n```",
        *_saelens(repo, checkpoints, for_saelens),
        _END,
    ]
    return "\n\n".join(parts) + "\n" + below


def _read(card: str) -> tuple[dict[str, Any], str]:
    """The front matter of a card, and what somebody wrote below ours."""
    found = _FRONT.match(card)
    front, text = (found[1], card[found.end() :]) if found else ("", card)
    try:
        parsed = yaml.safe_load(front)
    except yaml.YAMLError:
        parsed = None
    written = text.split(_END, 1)[-1].strip("\n")
    return parsed if isinstance(parsed, dict) else {}, f"\n{written}\n" if written else ""


def _summary(checkpoints: Sequence[Checkpoint]) -> str:
    rows = []
    for each in checkpoints:
        figures, config = each.eval, each.config
        repeated = figures and figures.get("induction")
        rows.append([
            _code(each.name), each.layer, _code(each.recipe), _code(each.sparsity), f"{config.sae.d_sae:,}",
            "not recorded" if config.tokens_seen is None else f"{config.tokens_seen:,}",
            *(_figure(figures, name) for name in _FIGURES), _figure(repeated, "L0"), _figure(repeated, "KL_score"),
        ])  # fmt: skip
    return _table(
        ["SAE", "layer", "recipe", "sparsity", "d_sae", "tokens seen", "L0", "FVU", "CE score", "KL score",
         "L0 repeated", "KL score repeated"], rows,
    )  # fmt: skip


def _sources(checkpoints: Sequence[Checkpoint]) -> str:
    rows = []
    for each in checkpoints:
        model, text, figures = each.config.model, each.config.text, each.eval or {}
        loaded = ", ".join(f"{key}={value}" for key, value in model.processing.items())
        scored = figures.get("n_tokens")
        rows.append([
            _code(each.name), _code(model.name), f"{model.n_heads} × {model.d_head}", _code(model.hook_name),
            _code(loaded), _code(text.name), text.context_size, "none" if scored is None else f"{scored:,}",
        ])  # fmt: skip
    return _table(["SAE", "model", "heads", "hook", "loaded with", "text", "context", "tokens scored"], rows)


def _by_head(checkpoint: Checkpoint) -> str:
    """A row for each figure and a column for each head: as wide as a layer, and short where there are many of them."""
    figures = checkpoint.eval
    if figures is None:
        return "Not evaluated."
    rows = []
    for name in _FIGURES:
        if name == "L0" and checkpoint.is_dense:
            continue  # its features belong to no head
        values = figures.get(f"{name}_per_head")
        if values is None:
            rows.append([_title(name), *["not measured"] * checkpoint.n_heads])
            continue
        errors = figures.get(f"{name}_per_head_se") or [None] * len(values)
        rows.append([_title(name), *map(partial(_number, name), values, errors)])
    return _table(["head", *range(checkpoint.n_heads)], rows)


def _saelens(repo: str, checkpoints: Sequence[Checkpoint], for_saelens: Sequence[Checkpoint]) -> list[str]:
    parts = []
    if for_saelens:
        name = for_saelens[0].name
        code = f'from sae_lens import SAE\n\nsae = SAE.from_pretrained(release="{repo}", sae_id="{name}")'
        parts += [
            "Into SAELens, which knows no blocks: `sae_weights.safetensors` has all the zeros between them, "
            "`sae.safetensors` the blocks alone. The model is loaded with "
            "`sae.cfg.metadata.model_from_pretrained_kwargs`.",
            f"```python\n{code}  # z [batch, pos, head, d_head]\n```",
        ]
    if kept_out := [each for each in checkpoints if each not in for_saelens]:
        names = ", ".join(_code(each.name) for each in kept_out)
        parts.append(f"Not for SAELens, which has no topk with k features of each head: {names}.")
    return parts


def _figure(figures: dict[str, Any] | None, name: str) -> str:
    if figures is None:
        return "not evaluated"
    if name not in figures:
        return "not measured"
    return _number(name, figures[name], figures.get(f"{name}_se"))


def _number(name: str, value: float | None, error: float | None = None) -> str:
    if value is None:
        return "not measurable"
    how = _FIGURES[name]
    return f"{value:{how}}" + ("" if error is None else f" ± {error:{how}}")


def _title(name: str) -> str:
    return name.replace("_", " ")


def _table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _code(text: str) -> str:
    """A text from a file as a span of code, also in a cell of a table."""
    line = one_line(text)
    if not line:
        return ""
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    edge = " " if "`" in (line[0], line[-1]) else ""
    return f"{fence}{edge}{line}{edge}{fence}".replace("|", "\\|")
