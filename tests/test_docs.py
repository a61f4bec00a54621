"""The documentation names what exists, and what exists is documented."""

import re
import tomllib
from pathlib import Path

import pytest
import typer
from packaging.requirements import Requirement
from packaging.version import Version

from server.cli import app
from server.observability.metrics import ServerMetrics
from server.settings import PREFIX, Settings

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
FILE = re.compile(
    r"`((?:medusa_core|server|tests|docs|deploy|examples|benchmarks|\.ci)/[\w./-]*|[\w-]+\.(?:toml|txt|md))`"
)
# Files of a model's or heads' directory, which are not in this repository.
MODEL_FILES = {"model.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in LINK.findall(text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [name for name in FILE.findall(text) if not (ROOT / name).exists() and name not in MODEL_FILES]
    assert missing == []


def test_every_setting_is_documented_and_every_documented_one_exists():
    table = re.findall(rf"^\| `({PREFIX}\w+)` \|", TEXT, re.MULTILINE)
    settings = [PREFIX + name.upper() for name in Settings.model_fields]
    assert sorted(table) == sorted(settings)
    code = [path.read_text(encoding="utf-8") for path in ROOT.glob("medusa_core/**/*.py")]
    named = set(re.findall(rf"\b{PREFIX}[A-Z][A-Z_]*\b", "\n".join([TEXT, *code])))
    assert named - set(settings) == set()


def test_every_metric_is_documented_with_its_type_and_labels():
    table = dict(re.findall(r"^\| `(medusa_[^`]+)` \| (\w+) \|", TEXT, re.MULTILINE))
    metrics = ServerMetrics()
    documented = {name.partition("{")[0]: kind for name, kind in table.items()}
    exported = {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in metrics.registry.collect()
        if not family.name.startswith("process_")  # prometheus_client's own
    }
    assert documented == exported


def test_commands_have_the_options_they_are_shown_with():
    commands = typer.main.get_command(app).commands
    shown = re.findall(
        r"^(?:.* )?(?:\.venv/bin/)?medusa (\w+)((?: .*)?)$", "\n".join(code_blocks("bash")), re.M
    )
    assert {"chat", "generate", "bench"} <= {name for name, _ in shown}
    for name, arguments in shown:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"(?<=\s)--[\w-]+", arguments)) <= known, name


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    assert set(re.findall(r"\bmake ([\w-]+)", "\n".join(code_blocks("bash")))) <= targets


def test_python_compiles():
    blocks = code_blocks("python")
    assert len(blocks) >= 2
    for block in blocks:
        compile(block, "documentation", "exec")


def test_constraints_pin_every_dependency_inside_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    wanted = [Requirement(text) for group in (project["dependencies"], *extras) for text in group]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {normal(name): Version(version) for name, version in pinned.items()}
    assert not any(version.local for version in versions.values())
    assert [str(r) for r in wanted if versions.get(normal(r.name)) not in r.specifier] == []
    torch = re.search(
        r"^TORCH := torch==(\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert torch is not None
    assert torch[1] == str(versions["torch"])


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
