"""What is known of features in words."""

from collections.abc import Iterable

import pandas as pd

from analysis.labels import Labels
from pages.shared import live
from pages.shared.page import refuse
from trainer.checkpoint import Checkpoint, CheckpointError


def in_words(checkpoint: Checkpoint, features: Iterable[int]) -> list[str]:
    """Of each feature its user's label, else its description in the analysis, else nothing."""
    features = list(features)
    try:
        known = live.read_analysis(checkpoint).features["description"].reindex(features)
    except CheckpointError:  # there is none, or the page says why not where it needs one
        known = pd.Series(index=features, dtype=str)
    labels = written(checkpoint)["label"].reindex(features)
    return labels.where(labels.fillna("") != "", known).fillna("").tolist()


def written(checkpoint: Checkpoint) -> pd.DataFrame:
    """Labels and notes by feature; none, with a sentence, where their file is damaged."""
    try:
        return Labels(checkpoint.path).table().set_index("feature")
    except ValueError as error:
        refuse(error)
        return pd.DataFrame(columns=["label", "note"])
