"""Scores of the classifier: measures against known values, and the cases that are judged."""

import json

import numpy as np
import pytest
import torch
from skimage import data

from dfpir.classifier import KINDS
from dfpir.cli import main
from dfpir.degradation import CLEAN, Degradation, Diagnosis
from dfpir.evaluation import EvaluationError
from dfpir.files import write_image
from dfpir.synthesis import degrade
from dfpir.verdicts import (
    CLEAN_PICTURES,
    PUBLIC,
    SEVERE,
    SEVERITIES,
    UNTOUCHED,
    Judgement,
    Scores,
    calibration_error,
    evaluate_verdicts,
)


def judged(kind, named, confidence=0.9, sigma=None, estimate=None):
    """A judgement: `named` got this probability, another kind the rest."""
    rest = next(each for each in reversed(KINDS) if each != named)
    names = {"noise": "noise-25"}
    probabilities = {names.get(named, named): confidence, names.get(rest, rest): 1 - confidence}
    verdict = "clean" if named == CLEAN else "degraded"
    degradation = None
    if confidence < 0.6:
        verdict = "unsure"
    if named != CLEAN:
        degradation = Degradation.from_name(names.get(named, named))
    return Judgement(kind, Diagnosis(verdict, degradation, probabilities, estimate), sigma)


def test_scores_of_known_judgements():
    scores = Scores.of(
        [
            judged("noise", "noise", sigma=25.0, estimate=27.0),
            judged("noise", "noise", sigma=50.0, estimate=49.0),
            judged("rain", "rain"),
            judged("rain", "noise", estimate=20.0),
            judged(CLEAN, CLEAN),
            judged(CLEAN, "haze"),
            judged(CLEAN, "haze", 0.5),  # unsure, and so returned as it is
        ]
    )
    assert scores.recall == {"noise": 1.0, "rain": 0.5, CLEAN: pytest.approx(1 / 3)}
    assert scores.balanced_accuracy == pytest.approx((1 + 0.5 + 1 / 3) / 3)
    assert scores.untouched == pytest.approx(2 / 3)
    assert scores.unsure == pytest.approx(1 / 7)
    assert scores.sigma_error == 1.5
    assert scores.sigma_ratio == pytest.approx((2 / 2.5 + 1 / 5) / 2)


def test_the_brier_score_is_that_of_its_definition():
    right, wrong, even = judged("rain", "rain", 0.9), judged("haze", "rain", 0.9), 0.5
    assert Scores.of([right]).brier == pytest.approx(0.1**2 + 0.1**2)
    assert Scores.of([wrong]).brier == pytest.approx(0.9**2 + 0.1**2 + 1)
    assert Scores.of([judged("rain", "rain", even)]).brier == pytest.approx(0.5)


def test_one_who_is_right_as_often_as_believed_is_calibrated():
    generator = np.random.default_rng(0)
    confidences = generator.uniform(0.3, 1.0, 30_000)
    right = generator.uniform(size=confidences.size) < confidences
    assert calibration_error(confidences, right) < 0.02
    assert calibration_error(confidences, np.ones_like(right)) == pytest.approx(0.35, abs=0.01)
    assert calibration_error(np.array([0.8]), np.array([False])) == pytest.approx(0.8)


@pytest.fixture
def pictures(tmp_path):
    for folder in ("CBSD68", "Rain100L/input", "Rain100L/target", "W2S/input", "W2S/target"):
        (tmp_path / folder).mkdir(parents=True)
        grey = folder.startswith("W2S")
        picture = data.camera()[:64, :80] if grey else data.astronaut()[:70, 150:235]
        for name in ("a.png", "b.png"):
            write_image(tmp_path / folder / name, np.ascontiguousarray(picture))
    return tmp_path


def test_every_case_is_judged_once(pictures):
    seen = []
    found = evaluate_verdicts(pictures, on_progress=lambda *step: seen.append(step))
    severe = 2 * sum(map(len, SEVERITIES.values()))
    # Noise at three levels and clean; rain and clean; grey noise and clean.
    public = 2 * (3 + 1) + 2 * 2 + 2 * 2
    counts = {name: scores.cases for name, scores in found.groups.items()}
    assert counts == {PUBLIC: public, SEVERE: severe, UNTOUCHED: 2 + len(CLEAN_PICTURES)}
    assert seen[-1][0] == seen[-1][1] == len(seen) == public + severe + len(CLEAN_PICTURES)
    assert list(found.groups[SEVERE].recall) == [kind for kind in KINDS if kind != CLEAN]
    assert found.groups[PUBLIC].recall["noise"] > 0.5
    less = [evaluate_verdicts(pictures, sets=["Rain100L"], limit=1) for _ in range(2)]
    assert less[0].groups[PUBLIC].cases == 2 and SEVERE not in less[0].groups
    assert less[0].groups == less[1].groups


def test_the_command_writes_table_and_figures(pictures, tmp_path, capsys):
    written, readme = tmp_path / "verdicts.json", tmp_path / "README.md"
    readme.write_text("<!-- verdicts -->\n<!-- /verdicts -->\n", encoding="utf-8")
    command = ["evaluate", "--data", pictures, "--verdicts", "--sets", "Rain100L"]
    options = ["--json", written, "--fill", readme]
    assert main([str(each) for each in [*command, *options]]) == 0
    table = capsys.readouterr().out
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1 and "clean pictures" in table
    assert table.strip() in readme.read_text(encoding="utf-8")
    facts = json.loads(written.read_text(encoding="utf-8"))
    assert facts["groups"][PUBLIC]["cases"] == 4 and facts["severities"]["rain"]


def test_what_does_not_fit_is_refused(pictures, capsys):
    assert main(["evaluate", "--data", str(pictures), "--verdicts", "--blind"]) == 2
    assert "--blind does not go with --verdicts" in capsys.readouterr().err
    with pytest.raises(EvaluationError, match="at least 1"):
        evaluate_verdicts(pictures, limit=0)


@pytest.mark.parametrize("degradation", SEVERITIES)
def test_what_is_listed_as_more_severe_changes_more(degradation, photograph):
    pixels = torch.from_numpy(photograph).permute(2, 0, 1)[None].float() / 255
    pixels = pixels.expand(8, -1, -1, -1)
    changes = [
        (degrade(pixels, degradation, torch.Generator().manual_seed(1), severity) - pixels)
        .square()
        .mean()
        for severity in SEVERITIES[degradation]
    ]
    assert changes == sorted(changes) and changes[0] < 0.9 * changes[-1]
