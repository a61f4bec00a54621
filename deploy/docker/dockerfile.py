"""What a Dockerfile and a .dockerignore say, as plain data: as much of both as this project uses."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass(frozen=True, slots=True)
class Instruction:
    """`flags` are those of the instruction, such as --from; `text` is what follows them."""

    word: str
    flags: dict[str, str]
    text: str

    @property
    def command(self) -> list[str]:
        """What to execute: a list as it stands, anything else by a shell."""
        listed = _listed(self.text)
        return ["/bin/sh", "-c", self.text] if listed is None else listed

    @property
    def is_exec_form(self) -> bool:
        return _listed(self.text) is not None

    @property
    def pairs(self) -> dict[str, str]:
        """NAME=value of ENV, ARG and LABEL, quotes removed."""
        found = re.findall(r'([\w.]+)=("[^"]*"|\S+)', self.text)
        return {name: value.strip('"') for name, value in found}


@dataclass(frozen=True, slots=True)
class Stage:
    """One FROM and what follows it. `base`: an image, or the name of a stage before."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def last(self, word: str) -> Instruction | None:
        found = [instruction for instruction in self.instructions if instruction.word == word]
        return found[-1] if found else None


def read_dockerfile(path: Path) -> dict[str, Stage]:
    """The stages by name, in order. Variables in FROM are resolved from the ARGs before the first."""
    lines = (line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    stages: dict[str, Stage] = {}
    before: dict[str, str] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction = _parse(line)
        if instruction.word == "FROM":
            base, _, name = expand(instruction.text, before).split()
            stages[name] = Stage(name, base)
        elif stages:
            stages[name].instructions.append(instruction)
        else:
            before |= instruction.pairs
    return stages


def lineage(stages: dict[str, Stage], name: str) -> list[Stage]:
    """A stage after those it stands on."""
    stage = stages[name]
    return [*(lineage(stages, stage.base) if stage.base in stages else []), stage]


def expand(text: str, variables: dict[str, str]) -> str:
    return VARIABLE.sub(lambda match: variables.get(match[1] or match[2], ""), text)


def in_context(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore lets a file in: the last pattern that matches it or a folder above decides."""
    parts = path.split("/")
    places = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    is_in = True
    for pattern in patterns:
        if any(_matcher(pattern.removeprefix("!")).fullmatch(place) for place in places):
            is_in = pattern.startswith("!")
    return is_in


def read_patterns(path: Path) -> list[str]:
    lines = map(str.strip, path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _matcher(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern).replace(r"\[", "[").replace(r"\]", "]")
    return re.compile(escaped.replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*"))


def _parse(line: str) -> Instruction:
    word, _, text = line.partition(" ")
    flags: dict[str, str] = {}
    while match := re.match(r"--([\w-]+)=(\S+)\s+", text):
        flags[match[1]] = match[2]
        text = text[match.end() :]
    return Instruction(word.upper(), flags, text.strip())


def _listed(text: str) -> list[str] | None:
    text = text.removeprefix("CMD ").strip()  # of HEALTHCHECK
    if not text.startswith("["):
        return None
    return [str(item) for item in json.loads(text)]
