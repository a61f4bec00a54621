"""Reads the Medusa repository's accuracy tables as a `HeadCalibration`.

Three kinds are told apart by their content:

- `assets/medusa_acc.csv`, an export of training runs: a row per run, columns ending in `medusa{h}_top{r}`;
- a plain CSV with the columns `head`, `top1`, `top2`, ... and a row per head, and `count` if it is known;
- `*_heads_accuracy.pt` of `medusa/eval/heads_accuracy.py`: per head a bool tensor [positions, ranks].

Both CSV kinds hold cumulative top-r accuracies; a rank's own is the increment. The reference divides every
head's hits by the same number of positions, though later heads have fewer; the tensors tell their own.
"""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medusa_core.checkpoints.weight_files import UNPICKLING_FAILURES
from medusa_core.draft.accuracy import HeadCalibration
from medusa_core.errors import DataError, first_line

RUN_COLUMN = re.compile(r"(?:^|/)medusa(\d+)_top(\d+)$")
HEAD_COLUMN = re.compile(r"top(\d+)$")
TENSOR_SUFFIXES = (".pt", ".pth", ".bin")
DECIMALS = 6
MAX_COUNT = 2**63

Row = Mapping[str, str]


def read_accuracy_table(path: Path, run: str | None = None) -> HeadCalibration:
    """Accuracies, and counts where the table has them. `run` names the row of a table of several runs.

    Temperatures, expected lengths and step times stay empty: such heads get a static tree and tau 1. Raises
    `DataError` saying what is wrong with the file.
    """
    try:
        if path.suffix in TENSOR_SUFFIXES:
            return _from_tensors(path, torch.load(path, map_location="cpu", weights_only=True))
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, csv.Error, *UNPICKLING_FAILURES) as error:
        raise DataError(f"cannot read the accuracy table {path}: {first_line(error)}") from error
    if not rows:
        raise DataError(f"the accuracy table {path} has no rows")
    if any(RUN_COLUMN.search(name or "") for name in rows[0]):
        return _from_run(path, _choose(path, rows, run))
    return _from_heads(path, rows)


def _from_run(path: Path, row: Row) -> HeadCalibration:
    heads: dict[int, dict[int, float]] = {}
    for name, text in row.items():
        if found := RUN_COLUMN.search(name or ""):
            heads.setdefault(int(found[1]), {})[int(found[2])] = _share(path, name, text)
    if sorted(heads) != list(range(len(heads))):
        raise DataError(f"{path} skips a head: it has {sorted(heads)}")
    return HeadCalibration(
        accuracies=tuple(_increments(path, head, heads[head]) for head in range(len(heads)))
    )


def _from_heads(path: Path, rows: Sequence[Row]) -> HeadCalibration:
    if not any(HEAD_COLUMN.match(name or "") for name in rows[0]):
        raise DataError(f"{path} has neither columns top1, top2, ... nor ones ending in medusa0_top1, ...")
    accuracies, counts = [], []
    for head, row in enumerate(_in_order(path, rows)):
        tops = {
            int(found[1]): _share(path, name, text)
            for name, text in row.items()
            if (found := HEAD_COLUMN.match(name or ""))
        }
        accuracies.append(_increments(path, head, tops))
        if row.get("count"):
            counts.append(_count(path, row["count"]))
    if counts and len(counts) < len(accuracies):
        raise DataError(f"{path} has a count for some heads and not for others")
    return HeadCalibration(accuracies=tuple(accuracies), counts=tuple(counts))


def _in_order(path: Path, rows: Sequence[Row]) -> list[Row]:
    """Rows by their column `head`, counted from 0 or 1; as they stand where there is no such column."""
    if "head" not in rows[0]:
        return list(rows)
    by_head = {str(row["head"]).strip(): row for row in rows}
    for first in (0, 1):
        names = [str(head) for head in range(first, first + len(rows))]
        if by_head.keys() == set(names):
            return [by_head[name] for name in names]
    raise DataError(f"{path}: column head must count the rows from 0 or 1, not {', '.join(by_head)}")


def _from_tensors(path: Path, heads: Any) -> HeadCalibration:
    is_list = isinstance(heads, list | tuple) and len(heads) > 0
    if not is_list or not all(isinstance(h, Tensor) and h.ndim == 2 and h.numel() for h in heads):
        raise DataError(f"{path} is no list of hit tensors [positions, ranks], one per head")
    return HeadCalibration(
        accuracies=tuple(
            tuple(round(x, DECIMALS) for x in hits.bool().double().mean(dim=0).tolist()) for hits in heads
        ),
        counts=tuple(len(hits) for hits in heads),
    )


def _choose(path: Path, rows: Sequence[Row], run: str | None) -> Row:
    names = [row.get("Name", "") for row in rows]
    if run is None and len(rows) == 1:
        return rows[0]
    if names.count(run or "") == 1:
        return rows[names.index(run or "")]
    raise DataError(f"{path} holds {len(rows)} runs: name one of them, {', '.join(names)}")


def _increments(path: Path, head: int, tops: Mapping[int, float]) -> tuple[float, ...]:
    """Accuracy of each rank from cumulative top-r accuracies."""
    if not tops or sorted(tops) != list(range(1, len(tops) + 1)):
        raise DataError(f"{path}: head {head} needs top1, top2, ... without a gap, and has {sorted(tops)}")
    values = [0.0, *(tops[rank] for rank in sorted(tops))]
    if any(high < low for low, high in pairwise(values)):
        raise DataError(f"{path}: the cumulative accuracies of head {head} fall: {values[1:]}")
    return tuple(round(high - low, DECIMALS) for low, high in pairwise(values))


def _share(path: Path, name: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= 1.0:
        raise DataError(f"{path}: {name} must be a share between 0 and 1, not {text!r}")
    return value


def _count(path: Path, text: str) -> int:
    if not text.strip().isdecimal() or not 0 < int(text) < MAX_COUNT:
        raise DataError(f"{path}: count must be a whole number above 0, not {text!r}")
    return int(text)
