"""The audit of `make lint`: a finding fails, and a service that knows nothing is said, not taken for a clean bill."""

import json
import subprocess

import pytest

from tests import audit

VULNERABLE = {"name": "jinja2", "version": "2.10", "vulns": [{"id": "CVE-2019-10906"}]}
FINE = {"name": "idna", "version": "3.10", "vulns": []}
UNKNOWN = {"name": "jinja2", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("answers", "status", "said"),
    [
        ([[VULNERABLE], [VULNERABLE, FINE]], 1, "jinja2 2.10: CVE-2019-10906"),
        ([[VULNERABLE], [FINE, UNKNOWN]], 0, "no known vulnerability"),
        ([[UNKNOWN]], 0, "skipped"),
        ([None], 0, "skipped"),
        (["hangs"], 0, "skipped"),
        ([[VULNERABLE], None], 0, "skipped"),
    ],
)
def test_a_finding_fails_and_silence_is_no_clean_bill(monkeypatch, capsys, answers, status, said):
    left = iter(answers)

    def answer(command, timeout, **options):
        found = next(left)
        if found == "hangs":
            raise subprocess.TimeoutExpired(command, timeout)
        text = "" if found is None else json.dumps({"dependencies": found})
        return subprocess.CompletedProcess(command, 1, text, "Traceback")

    monkeypatch.setattr(audit.subprocess, "run", answer)
    assert audit.main() == status and said in capsys.readouterr().out
