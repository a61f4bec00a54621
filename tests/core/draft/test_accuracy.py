"""Calibration as data: what is written is read, what is damaged is refused, taus between temperatures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_core.draft.accuracy import (
    FILE_NAME,
    TYPICAL_ACCURACIES,
    HeadCalibration,
    default_calibration,
    load_calibration,
    save_calibration,
    wilson_interval,
)
from medusa_core.errors import CheckpointError

WHOLE = HeadCalibration(
    accuracies=((0.6, 0.1), (0.4, 0.2), (0.3, 0.1)),
    counts=(100, 90, 80),
    temperatures={0.0: (1.0, 2.0, 3.0), 0.5: (2.0, 2.0, 2.0), 1.0: (0.5, 1.0, 4.0)},
    expected={"static": {2: 1.6, 4: 1.9}, "dynamic": {2: 1.6, 4: 2.0}},
    step_seconds={1: 0.01, 2: 0.011},
    tree_nodes=4,
    machine="x86_64 cpu float32",
)


def test_round_trip(tmp_path: Path) -> None:
    assert load_calibration(tmp_path) is None
    assert save_calibration(WHOLE, tmp_path) == tmp_path / FILE_NAME
    assert load_calibration(tmp_path) == WHOLE
    save_calibration(default_calibration(2), tmp_path)  # replaces it
    assert load_calibration(tmp_path) == default_calibration(2)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


Change = Callable[[dict[str, Any]], object]
BROKEN: dict[str, tuple[Change, str]] = {
    "another version": (lambda data: data.update(format=2), "another format version"),
    "no version": (lambda data: data.pop("format"), "'format'"),
    "no accuracies": (lambda data: data.update(accuracies=[]), "no accuracies"),
    "an empty row": (lambda data: data.update(accuracies=[[0.5], []]), "no accuracies"),
    "text for a number": (lambda data: data["accuracies"][0].append("much"), "could not convert"),
    "not a number": (lambda data: data["accuracies"][0].append(float("nan")), "must be finite"),
    "negative": (lambda data: data["accuracies"][0].append(-0.1), "must be finite and not negative"),
    "null": (lambda data: data.update(accuracies=None), "NoneType"),
    "missing key": (lambda data: data.pop("temperatures"), "'temperatures'"),
    "too few taus": (lambda data: data["temperatures"].update({"0.5": [1.0]}), "need 3 divisors above 0"),
    "a tau of 0": (lambda data: data["temperatures"].update({"0.5": [1.0, 0.0, 1.0]}), "need 3 divisors"),
    "an infinite length": (
        lambda data: data["expected"]["static"].update({"4": float("inf")}),
        "must be finite",
    ),
    "expected is a list": (lambda data: data.update(expected=[1]), "no attribute 'items'"),
    "nodes in words": (lambda data: data.update(tree_nodes="many"), "invalid literal"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_values_are_refused(tmp_path: Path, case: str) -> None:
    change, message = BROKEN[case]
    file = save_calibration(WHOLE, tmp_path)
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=f"{FILE_NAME} is not a calibration file .*{message}"):
        load_calibration(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a calibration file of this version"):
        load_calibration(tmp_path)


@pytest.mark.parametrize(
    ("temperature", "taus"),
    [
        (0.0, (1.0, 2.0, 3.0)),
        (0.5, (2.0, 2.0, 2.0)),
        (1.0, (0.5, 1.0, 4.0)),
        (0.25, (1.5, 2.0, 2.5)),
        (0.9, (0.8, 1.2, 3.6)),
        (1.7, (0.5, 1.0, 4.0)),  # beyond what was calibrated: the nearest
    ],
)
def test_taus_between_calibrated_temperatures(temperature: float, taus: tuple[float, ...]) -> None:
    assert WHOLE.taus(temperature, 3) == pytest.approx(taus)
    assert WHOLE.taus(temperature, 2) == pytest.approx(taus[:2])


def test_taus_below_the_least_calibrated_temperature() -> None:
    calibration = HeadCalibration(accuracies=((0.5,),), temperatures={0.5: (2.0,), 1.0: (3.0,)})
    assert calibration.taus(0.1, 1) == (2.0,)


def test_uncalibrated_heads_get_published_accuracies() -> None:
    calibration = default_calibration(7)
    assert calibration.num_heads == 7
    assert calibration.accuracies[:5] == TYPICAL_ACCURACIES
    assert calibration.accuracies[5:] == (TYPICAL_ACCURACIES[4],) * 2
    assert calibration.taus(0.7, 7) == (1.0,) * 7
    for row in calibration.accuracies:
        assert list(row) == sorted(row, reverse=True)
        assert sum(row) < 1.0


def test_wilson_interval_of_the_textbook() -> None:
    # 10 of 20: (0.2993, 0.7007); none of 10: (0, 0.2775)
    assert wilson_interval(0.5, 20) == pytest.approx((0.2993, 0.7007), abs=1e-4)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    low, high = wilson_interval(0.0, 0)
    assert low <= 0.0 < high <= 1.0
