"""Mixtures of degradations: what is done to pictures, and how the results are counted."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from dfpir.cli import main
from dfpir.evaluation import EvaluationError
from dfpir.files import write_image
from dfpir.mixtures import MIXTURES, MixtureScore, evaluate_mixtures, pairs


@pytest.fixture
def folder(tmp_path, photograph):
    (tmp_path / "CBSD68").mkdir()
    for name, part in (("a.png", photograph[:50]), ("b.png", photograph[60:110])):
        write_image(tmp_path / "CBSD68" / name, np.ascontiguousarray(part))
    return tmp_path


class Halfway:
    """Goes half the way to grey, in two steps."""

    weights, weights_sha256 = "somewhere/fake.safetensors", "f" * 64

    def restore_pixels(self, pixels, most_steps):
        assert most_steps == 3
        return SimpleNamespace(image=(pixels + 0.5) / 2, steps=("one", "two"))


def test_scores_of_known_results():
    score = MixtureScore.of([(20.0, 25.0, 2), (20.0, 19.8, 1), (20.0, 19.0, 3), (20.0, 20.0, 0)])
    assert score == MixtureScore(4, 20.0, 20.95, 0.25, 0.25, 1.5)


def test_every_mixture_is_scored_on_every_picture(folder):
    seen = []
    found = evaluate_mixtures(
        folder, restorer=Halfway(), on_progress=lambda *step: seen.append(step)
    )
    assert list(found.scores) == list(MIXTURES)
    assert all(score.images == 2 and score.steps == 2 for score in found.scores.values())
    assert seen == [(number, 2 * len(MIXTURES)) for number in range(1, 2 * len(MIXTURES) + 1)]
    rows = [line for line in found.markdown().splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(MIXTURES) and len({row.count("|") for row in rows}) == 1
    assert evaluate_mixtures(folder, restorer=Halfway()).scores == found.scores
    assert (
        "only the first 1"
        in evaluate_mixtures(folder, restorer=Halfway(), limit=1).markdown().lower()
    )


@pytest.mark.parametrize("name", MIXTURES)
def test_both_parts_of_a_mixture_are_there(folder, name):
    paths = sorted((folder / "CBSD68").iterdir())
    [(mixed, clean), _] = pairs(paths, MIXTURES[name], 0)
    [(first, _), _] = pairs(paths, MIXTURES[name][:1], 0)
    assert mixed.shape == clean.shape == (48, 160, 3) and mixed.dtype == np.uint8
    assert not np.array_equal(first, clean) and not np.array_equal(mixed, first)


def test_the_command_writes_table_and_figures(folder, tmp_path, tiny_weights, capsys):
    written, readme = tmp_path / "mixtures.json", tmp_path / "README.md"
    readme.write_text("<!-- mixtures -->\n<!-- /mixtures -->\n", encoding="utf-8")
    command = ["evaluate", "--data", folder, "--mixtures", "--weights", tiny_weights]
    options = ["--json", written, "--fill", readme, "--device", "cpu"]
    assert main([str(each) for each in [*command, *options]]) == 0
    assert capsys.readouterr().out.strip() in readme.read_text(encoding="utf-8")
    facts = json.loads(written.read_text(encoding="utf-8"))
    assert facts["most_steps"] == 3 and set(facts["scores"]) == set(MIXTURES)
    assert facts["weights"]["name"] == tiny_weights.name


def test_what_does_not_fit_is_refused(folder, capsys):
    with pytest.raises(EvaluationError, match="at least 1"):
        evaluate_mixtures(folder, restorer=Halfway(), limit=0)
    with pytest.raises(ValueError, match="most_steps is 0; expected 1 to 3"):
        evaluate_mixtures(folder, restorer=Halfway(), most_steps=0)
    with pytest.raises(EvaluationError, match="no such folder"):
        evaluate_mixtures(folder / "CBSD68", restorer=Halfway())
    assert main(["evaluate", "--data", str(folder), "--mixtures", "--sets", "CBSD68"]) == 2
    assert "--sets does not go with --mixtures" in capsys.readouterr().err
