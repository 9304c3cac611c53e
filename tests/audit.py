"""`python -m tests.audit`: known vulnerabilities of what is installed, by pip-audit; part of `make lint`.

pip-audit calls a package that its service does not know fine, so where an index answers without knowing anything all
is fine. Therefore a version with known vulnerabilities is asked for first; where none is found, the audit is skipped.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

KNOWN = "jinja2==2.10"  # CVE-2019-10906, and later ones
IGNORED: dict[str, str] = {}  # finding: which pin forces it, and why it does not concern us
_PROBE, _AUDIT = 30, 900  # seconds


def findings(*arguments: str, seconds: int) -> list[str] | None:
    """Package, version and id of each finding; None where the service cannot be reached."""
    command = [sys.executable, "-m", "pip_audit", "--format=json", "--progress-spinner=off", "--timeout=5", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        found = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError):
        return None
    return [f"{each['name']} {each['version']}: {vuln['id']}" for each in found for vuln in each.get("vulns", ())]


def main() -> int:
    """Print what is found; the exit status is 1 where something is."""
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.txt"
        probe.write_text(KNOWN)
        reached = findings("--no-deps", "--disable-pip", f"--requirement={probe}", seconds=_PROBE)
    ignored = [f"--ignore-vuln={name}" for name in IGNORED]
    found = findings("--local", *ignored, seconds=_AUDIT) if reached else None
    if found is None:
        print("pip-audit: skipped, its vulnerability data cannot be reached from here")
        return 0
    print(*(found or ["pip-audit: no known vulnerability"]), sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
