"""What eval.json and metrics.jsonl must hold to be drawn; what they hold besides is kept, and not looked at."""

from dataclasses import dataclass, fields
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from trainer.files import parse_json

# JSON has integers without end, a frame has not.
Count = Annotated[int, Meta(ge=0, le=2**53)]
Positive = Annotated[int, Meta(ge=1, le=2**53)]
Number = Annotated[int, Meta(ge=-(2**53), le=2**53)] | float
Share = Annotated[float, Meta(ge=0, le=1)]
NotNegative = Annotated[float, Meta(ge=0)]
Error = NotNegative | None
Errors = list[NotNegative | None] | None
SCHEMA_VERSION = 2  # of eval.json; 1, without the field, had errors over tokens


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one text; docs/metrics.md defines them. None: not measurable there, or not measured yet at the time."""

    n_tokens: Positive
    n_contexts: Positive | None = None
    L0: NotNegative
    L0_se: Error = None
    L0_per_head: list[NotNegative]
    L0_per_head_se: Errors = None
    L0_histogram_per_head: list[list[Count]]
    MSE: NotNegative
    MSE_se: Error = None
    MSE_per_head: list[NotNegative]
    MSE_per_head_se: Errors = None
    FVU: NotNegative
    FVU_se: Error = None
    FVU_per_head: list[NotNegative | None]
    FVU_per_head_se: Errors = None
    norm_ratio: NotNegative | None = None
    norm_ratio_se: Error = None
    norm_ratio_per_head: list[NotNegative | None] | None = None
    norm_ratio_per_head_se: Errors = None
    bias: float | None = None
    bias_se: Error = None
    bias_per_head: list[float | None] | None = None
    bias_per_head_se: Errors = None
    silent_fraction: Share
    silent_fraction_per_head: list[Share]
    CE_clean: float
    CE_clean_se: Error = None
    CE_sae: float
    CE_sae_se: Error = None
    CE_zero: float
    CE_zero_se: Error = None
    CE_mean: float
    CE_mean_se: Error = None
    CE_score: float | None
    CE_score_se: Error = None
    KL_score: float | None
    KL_score_se: Error = None
    n_tokens_per_head: Positive = 1
    n_contexts_per_head: Positive | None = None
    CE_clean_per_head: list[float] | None = None
    CE_sae_per_head: list[float] | None = None
    CE_sae_per_head_se: Errors = None
    CE_zero_per_head: list[float] | None = None
    CE_zero_per_head_se: Errors = None
    KL_sae_per_head: list[float] | None = None
    KL_sae_per_head_se: Errors = None
    KL_zero_per_head: list[float] | None = None
    KL_zero_per_head_se: Errors = None
    CE_score_per_head: list[float | None] | None = None
    CE_score_per_head_se: Errors = None
    KL_score_per_head: list[float | None] | None = None
    KL_score_per_head_se: Errors = None

    def __post_init__(self) -> None:
        if not all(any(of_head) for of_head in self.L0_histogram_per_head):
            raise ValueError("L0_histogram_per_head has a head without tokens")

    def require_sizes(self, n_blocks: int, n_heads: int) -> None:
        """Raise ValueError unless every list has a value per block (of what is counted by feature) or per head."""
        for name in (each.name for each in fields(self) if "_per_head" in each.name):
            n = n_blocks if name.startswith(("L0", "silent")) else n_heads
            values = getattr(self, name)
            if isinstance(values, list) and len(values) != n:
                raise ValueError(f"{name} has {len(values)} values, not {n}")


@dataclass(frozen=True, kw_only=True)
class Evaluation(Figures):
    """eval.json: the figures on held-out text, and on repeated random tokens."""

    schema_version: Annotated[int, Meta(ge=SCHEMA_VERSION, le=SCHEMA_VERSION)]
    n_documents: Positive | None = None
    induction: Figures


def parse_evaluation(data: dict[str, Any], n_blocks: int, n_heads: int) -> dict[str, Any]:
    """eval.json as it is now.

    Raises:
        ValueError: a figure is missing or cannot be.
    """
    if "schema_version" not in data:
        data = _from_schema_1(data) | {"schema_version": SCHEMA_VERSION}
    known = msgspec.convert(data, Evaluation)
    for each in (known, known.induction):
        each.require_sizes(n_blocks, n_heads)
    return data


def _from_schema_1(data: dict[str, Any]) -> dict[str, Any]:
    """Until version 0.1: errors were over tokens, too small, so none is known; silent features were called dead."""
    found = {key.replace("dead_", "silent_"): value for key, value in data.items() if not key.endswith("_se")}
    if isinstance(found.get("induction"), dict):
        found["induction"] = _from_schema_1(found["induction"])
    return found


@dataclass(frozen=True)
class Line:
    """metrics.jsonl: one logged step, and of each head what a page draws."""

    step: Count
    tokens: Count | None = None
    tokens_per_second: NotNegative | None = None
    loss: float | None = None
    L0: NotNegative | None = None
    MSE: NotNegative | None = None
    FVU: NotNegative | None = None
    dead_fraction: Share | None = None
    L0_per_head: list[NotNegative] | None = None
    MSE_per_head: list[NotNegative] | None = None
    FVU_per_head: list[NotNegative | None] | None = None
    dead_fraction_per_head: list[Share] | None = None


def parse_line(line: bytes) -> dict[str, Any]:
    """One line of metrics.jsonl: numbers, lists of numbers, null.

    Raises:
        ValueError: it is something else.
    """
    figures = parse_json(line, dict[str, Number | list[Number | None] | None])
    msgspec.convert(figures, Line)
    return figures
