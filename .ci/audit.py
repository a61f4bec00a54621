"""Known vulnerabilities of the pinned packages, by pip-audit; says so where no service can be asked.

pip-audit ends with 0 when its service knows none of the packages, as a mirror of the package index does not,
and with 1 both for a vulnerability and for a service it cannot reach. Only a vulnerability fails here.
"""

import json
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
SERVICES = ("pypi", "osv")
TIMEOUT = 240  # seconds for all packages, of one service


def audit(service: str) -> list[dict] | None:
    """What the service says of each package; None if it cannot be asked."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(CONSTRAINTS), "--no-deps"]
    command += ["--disable-pip", "--vulnerability-service", service, "--format", "json"]
    command += ["--progress-spinner", "off", "--timeout", "10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        return json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, json.JSONDecodeError, KeyError):
        return None


def main() -> int:
    """The exit status: 1 for a known vulnerability."""
    for service in SERVICES:
        packages = audit(service) or []
        known = [package for package in packages if "skip_reason" not in package]
        if known:
            return report(service, known, len(packages))
    print(f"pip-audit: not run, no vulnerability service answers here ({', '.join(SERVICES)})")
    return 0


def report(service: str, known: list[dict], total: int) -> int:
    """Print what is wrong, or that nothing is."""
    bad = [package for package in known if package["vulns"]]
    for package in bad:
        for flaw in package["vulns"]:
            fixed = ", ".join(flaw["fix_versions"]) or "no version yet"
            print(f"{package['name']} {package['version']}: {flaw['id']}, mended in {fixed}")
    print(f"pip-audit ({service}): {len(known)} of {total} packages known, {len(bad)} vulnerable")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
