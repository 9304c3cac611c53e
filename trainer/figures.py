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


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one text; docs/metrics.md defines them. None: not measurable there."""

    n_tokens: Positive
    L0: NotNegative
    L0_per_head: list[NotNegative]
    L0_histogram_per_head: list[list[Count]]
    MSE: NotNegative
    MSE_per_head: list[NotNegative]
    FVU: NotNegative
    FVU_per_head: list[NotNegative | None]
    dead_fraction: Share
    dead_fraction_per_head: list[Share]
    CE_clean: float
    CE_clean_se: float
    CE_sae: float
    CE_sae_se: float
    CE_zero: float
    CE_zero_se: float
    CE_mean: float
    CE_mean_se: float
    CE_score: float | None
    CE_score_se: float | None
    KL_score: float | None
    KL_score_se: float | None
    n_tokens_per_head: Positive = 1
    KL_sae_per_head: list[float] | None = None
    KL_zero_per_head: list[float] | None = None
    CE_score_per_head: list[float | None] | None = None
    CE_score_per_head_se: list[float | None] | None = None
    KL_score_per_head: list[float | None] | None = None
    KL_score_per_head_se: list[float | None] | None = None

    def __post_init__(self) -> None:
        for name in ("CE_score", "KL_score"):
            for of in (name, f"{name}_per_head"):
                scores, errors = ([value is None for value in _as_list(getattr(self, key))] for key in (of, f"{of}_se"))
                if scores != errors:
                    raise ValueError(f"{of} and {of}_se are not measurable together")
        if not all(any(of_head) for of_head in self.L0_histogram_per_head):
            raise ValueError("L0_histogram_per_head has a head without tokens")

    def require_sizes(self, n_blocks: int, n_heads: int) -> None:
        """Raise ValueError unless every list has a value per block (of what is counted by feature) or per head."""
        for name in (each.name for each in fields(self) if "_per_head" in each.name):
            n = n_blocks if name.startswith(("L0", "dead")) else n_heads
            values = getattr(self, name)
            if isinstance(values, list) and len(values) != n:
                raise ValueError(f"{name} has {len(values)} values, not {n}")


@dataclass(frozen=True, kw_only=True)
class Evaluation(Figures):
    """eval.json: the figures on held-out text, and on repeated random tokens."""

    induction: Figures


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


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
