"""The table of docs/reliability.md: `make faults` runs every trial, `make test` a few of each."""

from collections.abc import Callable
from pathlib import Path

import pytest

_rows: dict[tuple[str, str], list[tuple[int, str]]] = {}  # filled where the reports arrive: not in xdist's workers


@pytest.fixture
def tries(request) -> Callable[[int, int], int]:
    """`tries(short, full)`: how often to try, in `make test` and in `make faults`."""
    return lambda short, full: full if request.config.getoption("--reliability") else short


@pytest.fixture
def fault(record_property) -> Callable[[str, str, int, str], None]:
    """`fault(area, what, tries, result)`: a row of the table, called when everything was tried and held."""
    return lambda area, what, n, result: record_property("fault", (area, what, n, result))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name, value in report.user_properties:
        if name == "fault" and report.when == "call":
            area, what, n, result = value
            _rows.setdefault((area, what), []).append((n, "FAILED" if report.failed else result))
    if report.failed and report.when == "call" and not report.user_properties:
        _rows.setdefault(("failed", report.nodeid), []).append((1, "FAILED"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--reliability")
    if file and not hasattr(session.config, "workerinput"):
        write_table(Path(file))


def write_table(file: Path) -> None:
    """Replace the table between the two marks of a page; what is around it is written by hand."""
    lines = ["| area | fault | tries | result |", "|---|---|---|---|"]
    for (area, what), trials in sorted(_rows.items()):
        results = "; ".join(dict.fromkeys(result for _, result in trials))
        lines.append(f"| {area} | {what} | {sum(n for n, _ in trials):,} | {results} |")
    begin, end = "<!-- make faults -->", "<!-- end -->"
    head, _, rest = file.read_text().partition(begin)
    file.write_text("\n".join([head + begin, "", *lines, "", end + rest.partition(end)[2]]))
