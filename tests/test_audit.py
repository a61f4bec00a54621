"""The audit of `make check`: a known vulnerability fails it, and knowing nothing does not pass for clean."""

import audit
import pytest

CLEAN = {"name": "good", "version": "1", "vulns": []}
BAD = {"name": "bad", "version": "2", "vulns": [{"id": "CVE-0000-1", "fix_versions": ["3"]}]}
SKIPPED = {"name": "odd", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("answers", "status", "said"),
    [
        ([[CLEAN, SKIPPED]], 0, "pip-audit (pypi): 1 of 2 packages known, 0 vulnerable"),
        ([[CLEAN, BAD]], 1, "bad 2: CVE-0000-1, mended in 3"),
        ([[SKIPPED], [BAD]], 1, "pip-audit (osv): 1 of 1 packages known, 1 vulnerable"),
        ([None, None], 0, "pip-audit: not run, no vulnerability service answers here"),
        ([[SKIPPED], None], 0, "pip-audit: not run, no vulnerability service answers here"),
    ],
)
def test_what_the_audit_makes_of_answers(monkeypatch, capsys, answers, status, said):
    left = list(answers)
    monkeypatch.setattr(audit, "audit", lambda service: left.pop(0))
    assert audit.main() == status
    assert said in capsys.readouterr().out
