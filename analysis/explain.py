"""Explanations of features from elsewhere, scored on the examples on which descriptions are scored.

    python -m analysis.explain checkpoints/<name> --program="python ask_a_model.py" --features=17,230
    python -m analysis.explain checkpoints/<name> --file=explanations.jsonl --program="python ask_a_model.py"

A program reads requests as JSON lines from its standard input and answers in JSON lines, one a request, in any order.
It is started once for each of two tasks:

    {"task": "explain", "feature": 17, "head": 0, "examples": [{"tokens": [" the", " House"], "activations": [0, 2.5]}]}
        -> {"feature": 17, "explanation": "the word House"}
    {"task": "detect", "feature": 17, "explanation": "the word House", "examples": [{"tokens": ["<s>", " of", ...]}]}
        -> {"feature": 17, "scores": [0.9, 0.0, ...]}

A score says, between 0 and 1, whether the feature fires on the last token of an example. With --file nothing is
explained: its lines are answers to the first task, and those that have `scores` also to the second. Without a program
explanations are kept unscored. They go to `checkpoints/<name>/explanations.json`, by who made them.
"""

import argparse
import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import pandas as pd

from analysis.detection import detected
from analysis.store import Analysis
from trainer import cli
from trainer.checkpoint import Checkpoint, CheckpointError
from trainer.config import require
from trainer.errors import one_line
from trainer.files import flaw, parse_json, read_json, write_json
from trainer.sharing.pull import located

_LENGTH = msgspec.Meta(max_length=2**16)
_SHOWN = 10  # examples of a feature from which it is explained, the strongest first
Ask = Callable[[list[dict[str, Any]]], "list[Answer]"]


class Answer(msgspec.Struct):
    """A line that a program or a file answers."""

    feature: int
    explanation: Annotated[str, _LENGTH] | None = None
    scores: list[Annotated[float, msgspec.Meta(ge=0, le=1)]] | None = None


@dataclass(frozen=True)
class Explanation:
    """What somebody says that a feature is, and how well it tells where the feature fires (`analysis.detection`)."""

    feature: int
    by: str
    explanation: str
    accuracy: float | None = None
    accuracy_se: float | None = None
    auroc: float | None = None
    auroc_se: float | None = None


@dataclass(frozen=True)
class _File:
    """explanations.json."""

    weights: str
    explanations: list[Explanation]


def explain(
    checkpoint: Checkpoint,
    by: str,
    features: list[int] | None = None,
    answers: Iterable[Answer] = (),
    ask: Ask | None = None,
) -> pd.DataFrame:
    """Explain features, score the explanations, and keep both beside those that others made; returns those made.

    Args:
        by: who explains; earlier explanations of the same features by the same are replaced.
        features: to explain; all that have examples of detection, if `ask` is to explain them.
        answers: explanations that are there already, with scores or without: then nothing else is explained.
        ask: a program: requests to answers.

    Raises:
        CheckpointError: there is no analysis, or a file is damaged.
        ValueError: an answer is of no such feature, or does not fit its request.
    """
    analysis = Analysis(checkpoint)
    require(
        not analysis.is_summary,
        f"{analysis.folder} is a summary, which has no examples to score explanations on: run python -m analysis",
    )
    given = {answer.feature: answer for answer in answers}
    chosen = _scored(analysis) if features is None else features
    for feature in (*given, *chosen):
        last = len(analysis.features) - 1
        require(0 <= feature <= last, f"there is no feature {feature}: ids run from 0 to {last}")
    if ask and not given:
        told = {answer.feature: answer for answer in ask([_to_explain(analysis, feature) for feature in chosen])}
        given = {feature: told[feature] for feature in chosen if feature in told}
    texts = {feature: answer.explanation for feature, answer in given.items() if answer.explanation}
    scores = {feature: answer.scores for feature, answer in given.items() if answer.scores is not None}
    known = set(_scored(analysis))
    unscored = [feature for feature in texts if feature not in scores and feature in known]
    if ask and unscored:
        judged = ask([_to_detect(analysis, feature, texts[feature]) for feature in unscored])
        scores |= {answer.feature: answer.scores for answer in judged if answer.scores is not None}
    made = []
    for feature, text in texts.items():
        figures: dict[str, float | None] = {}
        if feature in scores and feature in known:
            examples = analysis.detection(feature)
            n = len(scores[feature])
            require(n == len(examples), f"feature {feature} has {len(examples)} examples, but {n} scores were answered")
            fires, context = examples["fires"].to_numpy(), examples["context"].to_numpy()
            found = detected(fires, np.array(scores[feature]), context)._asdict()
            figures = {name: None if math.isnan(value) else value for name, value in found.items()}
        made.append(Explanation(feature, by, text, **figures))
    _keep(checkpoint, made)
    return _table(made)


def explanations(checkpoint: Checkpoint) -> pd.DataFrame:
    """All that is kept: feature, by, explanation, accuracy, accuracy_se, auroc, auroc_se; nan where unscored.

    Raises:
        CheckpointError: the file is damaged, or of other weights.
    """
    return _table(_kept(checkpoint))


def ask_program(command: str) -> Ask:
    """A program as `explain` asks it.

    Raises:
        ValueError: it cannot be started, fails, or answers something else.
    """

    def ask(requests: list[dict[str, Any]]) -> list[Answer]:
        lines = b"".join(msgspec.json.encode(request) + b"\n" for request in requests)
        try:
            done = subprocess.run(shlex.split(command), input=lines, stdout=subprocess.PIPE, check=True)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            raise ValueError(one_line(f"{command} failed: {error}")) from error
        return answers(done.stdout, command)

    return ask


def answers(data: bytes, source: str) -> list[Answer]:
    """JSON lines.

    Raises:
        ValueError: a line is none, or holds something else; `source` is named.
    """
    found = []
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            try:
                found.append(parse_json(line, Answer))
            except ValueError as error:
                raise ValueError(one_line(f"{source}, line {number}: {error}")) from error
    return found


def _scored(analysis: Analysis) -> list[int]:
    table = analysis.features
    return table.loc[table["description_auroc"].notna(), "feature"].tolist()


def _to_explain(analysis: Analysis, feature: int) -> dict[str, Any]:
    shown = []
    for row in analysis.examples(feature).head(_SHOWN).itertuples():
        tokens: Any = row.token_ids
        values: Any = row.activations
        shown.append({"tokens": _texts(analysis, tokens), "activations": [round(float(each), 3) for each in values]})
    head = int(analysis.features["head"].iloc[feature])
    return {"task": "explain", "feature": int(feature), "head": head, "examples": shown}


def _to_detect(analysis: Analysis, feature: int, text: str) -> dict[str, Any]:
    examples = [{"tokens": _texts(analysis, ids)} for ids in analysis.detection(feature)["token_ids"]]
    return {"task": "detect", "feature": int(feature), "explanation": text, "examples": examples}


def _texts(analysis: Analysis, ids: np.ndarray) -> list[str]:
    return [analysis.strings[int(i)] for i in ids]


def _kept(checkpoint: Checkpoint) -> list[Explanation]:
    file = checkpoint.path / "explanations.json"
    try:
        kept: _File = read_json(file, _File)
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise CheckpointError(flaw(file, error)) from error
    if kept.weights != checkpoint.weights_hash:
        raise CheckpointError(f"{file} explains other weights than the checkpoint has")
    return kept.explanations


def _keep(checkpoint: Checkpoint, made: list[Explanation]) -> None:
    new = {(each.feature, each.by): each for each in [*_kept(checkpoint), *made]}
    file = _File(checkpoint.weights_hash, [new[key] for key in sorted(new)])
    write_json(checkpoint.path / "explanations.json", asdict(file))


def _table(made: list[Explanation]) -> pd.DataFrame:
    names = [field.name for field in fields(Explanation)]
    table = pd.DataFrame([asdict(each) for each in made], columns=names)
    return table.astype(dict.fromkeys(names[3:], float))


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    what, _, more = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m analysis.explain", description=what, epilog=more, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkpoint", help=cli.CHECKPOINT)
    parser.add_argument("--program", help="what explains and detects, with its arguments")
    parser.add_argument("--file", type=Path, help="explanations that are there already, as JSON lines")
    parser.add_argument("--features", help="ids with commas between; default all that can be scored")
    parser.add_argument("--by", help="who explains; default the program or the file")
    options = parser.parse_args(argv)

    def run() -> None:
        require(bool(options.program or options.file), "name a --program, a --file or both")
        given = answers(options.file.read_bytes(), str(options.file)) if options.file else []
        features = [int(each) for each in options.features.split(",")] if options.features else None
        given = [answer for answer in given if features is None or answer.feature in features]
        ask = ask_program(options.program) if options.program else None
        by = options.by or (options.file.name if options.file else options.program)
        made = explain(Checkpoint(located(options.checkpoint)), by, features, given, ask)
        scored = made[made["auroc"].notna()]
        print(f"{len(made)} explanations by {by}, {len(scored)} of them scored", end="")
        print(f": AUROC {scored['auroc'].mean():.2f} in the mean" if len(scored) else "")

    return cli.status(run)


if __name__ == "__main__":
    sys.exit(main())
