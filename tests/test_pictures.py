"""The documentation's pictures show the committed results."""

import json
from xml.etree import ElementTree

import plot_results
import pytest
from pictures import terminal

MEDIA = plot_results.MEDIA
RECORDING = json.loads((plot_results.RESULTS / "recording.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("speedup", plot_results.speedup_chart),
        ("heads", plot_results.heads_chart),
        ("recording", lambda: terminal.draw(RECORDING)),
    ],
)
def test_a_picture_is_what_its_script_draws_from_the_results(name, draw):
    picture = (MEDIA / f"{name}.svg").read_text(encoding="utf-8")
    assert picture == draw()
    assert len(picture) < 100_000
    assert all(
        element.tag.rpartition("}")[2] != "script" for element in ElementTree.fromstring(picture).iter()
    )


def test_the_recording_is_one_text_at_two_speeds():
    off, exact = RECORDING["sides"]["off"], RECORDING["sides"]["exact"]
    for slow, fast in zip(off, exact, strict=True):
        assert slow["text"] == fast["text"] == "".join(piece for _, piece in fast["pieces"])
        assert slow["decode_steps"] == slow["decode_tokens"] > fast["decode_steps"]


def test_every_piece_of_the_recording_is_in_its_picture():
    words = "".join(ElementTree.fromstring(terminal.draw(RECORDING)).itertext()).split()
    for turn in [*RECORDING["sides"]["off"], *RECORDING["sides"]["exact"]]:
        assert set(turn["text"].split()) <= set(words)
