"""The report parses, shows the right numbers, needs nothing from outside and lets nothing in."""

import base64
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from diwa_core.errors import DataError
from diwa_core.evaluate.report import CheckpointEntry, DemoResult, ImageStrip, SkillResult, build_report, write_report
from diwa_core.evaluate.statistics import Estimate, compare_paired, pool_mean, success_rate

VOID = {"meta", "img", "rect", "path"}


class StrictParser(HTMLParser):
    """Fails on tags that do not nest; collects tags and visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(page: str) -> StrictParser:
    parser = StrictParser()
    parser.feed(page)
    parser.close()
    assert not parser.open
    return parser


def frames(seed: int, count: int = 5) -> np.ndarray:
    smooth = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)
    return np.stack([cv2.resize(image, (64, 64), interpolation=cv2.INTER_CUBIC) for image in smooth])


def result(**changes) -> DemoResult:
    values = {
        "title": "Demo",
        "command": "make demo",
        "seed": 7,
        "started": "2025-01-02 03:04 UTC",
        "duration_s": 61.0,
        "skills": [SkillResult("open_drawer", [True, True, False], [31, 47, 72]), SkillResult("turn_on_led", [], [])],
        "latencies_ms": {"camera to chunk": [10.0] * 98 + [20.0, 30.0]},
        "strips": [ImageStrip("open_drawer", "open loop", frames(0), frames(1), list("abcde"))],
        "checkpoints": [CheckpointEntry("world model", "world_model", "f" * 16 + "0" * 48)],
        "machine": {"cpu": "two cores"},
        "notes": ["A note."],
    }
    return DemoResult(**(values | changes))


def test_page_shows_the_numbers() -> None:
    page = parse(build_report(result()))
    text = " ".join(" ".join(page.text).split())
    rate = success_rate(2, 3)
    expected = ("2 of 3", "seed 7", "61 s", "2/3", "67 %", f"{100 * rate.low:.0f}–{100 * rate.high:.0f}", "31 47 ×", "turn_on_led not run")
    for part in (*expected, "make demo", "f" * 16, "two cores", "A note.", "camera to chunk 10.0 10.0 20.1 30.0", "a b c d e"):
        assert part in text, part
    bar = next(attributes for tag, attributes in page.tags if tag == "rect" and attributes["class"] == "rate")
    assert float(bar["width"]) == pytest.approx(200 * 2 / 3, abs=0.1)


def test_base_beside_finetuned_shows_paired_gains_and_their_mean() -> None:
    random = np.random.default_rng(0)
    skills = []
    for name in ("a", "b"):
        base, tuned = (random.random(100) < 0.5).tolist(), (random.random(100) < 0.8).tolist()
        skills.append(SkillResult(name, tuned, [40] * 100, base, Estimate(0.8, 0.7, 0.9), Estimate(0.5, 0.4, 0.6)))
    text = " ".join(" ".join(parse(build_report(result(skills=skills))).text).split())
    gains = {skill.skill: compare_paired(skill.base_outcomes, skill.outcomes).difference for skill in skills}
    for gain in (*gains.values(), pool_mean(gains)):
        assert f"{100 * gain.value:+.0f} {100 * gain.low:+.0f} to {100 * gain.high:+.0f}" in text
    assert "80 % 70–90 50 % 40–60" in text and "50 % 43–57" in text and "median 40" in text and "base only" not in text
    before, after = (sum(sum(outcomes) for outcomes in side) for side in zip(*[(s.base_outcomes, s.outcomes) for s in skills], strict=True))
    assert f"{after} of 200 episodes succeeded after fine-tuning, {before} of 200" in text
    skills[1].base_outcomes = None  # its outcomes are then the base's: said so, counted apart, and no mean over both kinds
    text = " ".join(" ".join(parse(build_report(result(skills=skills))).text).split())
    assert text.count(" to +") == 1 and "b base only" in text and "mean of skills" not in text
    assert f"{sum(skills[0].outcomes)} of 100 episodes succeeded after fine-tuning, {sum(skills[0].base_outcomes)} of 100" in text


def test_nothing_from_outside_and_no_scripts(tmp_path) -> None:
    path = write_report(tmp_path / "new" / "report.html", result())
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link|<iframe", page)
    assert all(attributes["src"].startswith("data:image/webp;base64,") for tag, attributes in parse(page).tags if tag == "img")


def test_text_is_escaped_everywhere() -> None:
    evil = "<script>alert(1)</script>\"'&"
    strip = ImageStrip(evil, evil, frames(0, 1), frames(1, 1), [evil])
    page = build_report(
        result(
            title=evil,
            command=evil,
            started=evil,
            skills=[SkillResult(evil, [True], [1]), SkillResult(evil, [], [])],
            latencies_ms={evil: [1.0]},
            strips=[strip],
            checkpoints=[CheckpointEntry(evil, evil, evil)],
            machine={evil: evil},
            notes=[evil],
        )
    )
    parsed = parse(page)
    assert "<script" not in page and "script" not in {tag for tag, _ in parsed.tags}
    assert sum(evil in text for text in parsed.text) >= 12


def test_strip_holds_camera_prediction_and_error() -> None:
    camera, predicted = frames(2), frames(3)
    page = parse(build_report(result(strips=[ImageStrip("s", "c", camera, predicted, list("abcde"))])))
    source = next(attributes["src"] for tag, attributes in page.tags if tag == "img")
    data = np.frombuffer(base64.b64decode(source.split(",")[1]), dtype=np.uint8)
    picture = cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB).astype(float)
    assert picture.shape == (3 * 64, 5 * 64, 3)
    error = np.abs(camera.astype(float) - predicted).mean(-1, keepdims=True).repeat(3, -1)
    for row, expected in enumerate((camera, predicted, (255 - 2 * error).clip(0, 255))):
        assert np.abs(picture[row * 64 : row * 64 + 64] - np.concatenate([*expected], axis=1)).mean() < 6


def test_many_strips_stay_small(tmp_path) -> None:
    strips = [ImageStrip(str(i), "", frames(i, 9), frames(i + 50, 9), list("abcdefghi")) for i in range(24)]
    assert write_report(tmp_path / "r.html", result(strips=strips)).stat().st_size < 3e6


def test_empty_result_is_still_a_page() -> None:
    text = " ".join(parse(build_report(result(skills=[], latencies_ms={}, strips=[], checkpoints=[], machine={}))).text)
    assert "0 of 0" in text and "Not measured" in text and "No frames" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skills": [SkillResult("a", [True], [])]}, "expected steps of 1 episodes, found 0"),
        ({"skills": [SkillResult("a", [True], [3], [True, False])]}, "the same 1 starts, found 2"),
        ({"strips": [ImageStrip("s", "", frames(0), frames(0, 4), list("abcde"))]}, "'s', predicted: expected uint8"),
        ({"strips": [ImageStrip("s", "", frames(0) / 255, frames(0), list("abcde"))]}, "'s', camera: expected uint8"),
        ({"strips": [ImageStrip("s", "", frames(0), frames(0), ["a"])]}, "expected 5 labels, found 1"),
    ],
)
def test_results_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_report(result(**changes))
