"""Evaluation: the protocol's numbers, repeatable noise, and clear refusals of bad folders."""

import json
import sys
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dfpir import classical, evaluation, weights
from dfpir.degradation import Degradation, Diagnosis
from dfpir.evaluation import EvaluationError, evaluate, noise_level, with_noise
from dfpir.files import write_image
from dfpir.markdown import filled


class FakeRestorer:
    """Returns what `change` makes of the pixels, and remembers what it was given."""

    weights = "somewhere/fake.safetensors"
    weights_sha256 = "f" * 64
    model = SimpleNamespace(config=SimpleNamespace(degradations=tuple(Degradation)))

    def __init__(self, change=lambda pixels: pixels):
        self.change = change
        self.seen = []

    def restore_pixels(self, pixels, degradation, most_steps=1):
        self.seen.append((degradation, pixels.clone()))
        return SimpleNamespace(
            image=self.change(pixels), diagnosis=Diagnosis.from_user(degradation)
        )

    def inputs(self, degradation):
        return [pixels for told, pixels in self.seen if told is degradation]


def photograph(number, height=50, width=67):
    top = 40 * number
    return data.astronaut()[top : top + height, 150 : 150 + width]


def write(folder, name, picture):
    folder.mkdir(parents=True, exist_ok=True)
    write_image(folder / name, np.ascontiguousarray(picture))


def write_pair(folder, name, given, target):
    write(folder / "input", name, given)
    write(folder / "target", name, target)


@pytest.fixture
def pictures(tmp_path):
    for number in range(3):
        write(tmp_path / "CBSD68", f"{number}.webp", photograph(number))
        target = photograph(number + 3)
        write_pair(tmp_path / "Rain100L", f"{number}.webp", target // 2, target)
    camera = data.camera()[:70, 100:164]
    write_pair(tmp_path / "W2S", "a.webp", with_noise(camera, 50, 0, 0), camera)
    return tmp_path


def scores(result):
    return [(row.name, row.sigma, row.given, row.restored) for row in result.rows]


def test_identity_scores_as_its_input(pictures):
    fake = FakeRestorer()
    result = evaluate(pictures, restorer=fake)
    assert [(row.name, row.sigma, row.images) for row in result.rows] == [
        ("CBSD68", 15.0, 3),
        ("CBSD68", 25.0, 3),
        ("CBSD68", 50.0, 3),
        ("CBSD68", 60.0, 3),
        ("CBSD68", 75.0, 3),
        ("Rain100L", None, 3),
        ("W2S", None, 1),
    ]
    for row in result.rows:
        assert row.restored.psnr == pytest.approx(row.given.psnr, abs=1e-4)
        assert row.restored.ssim == pytest.approx(row.given.ssim, abs=1e-5)
    assert [told for told, _ in fake.seen] == [
        *[Degradation.NOISE_15] * 3,
        *[Degradation.NOISE_25] * 3,
        *[Degradation.NOISE_50] * 9,  # 60 and 75 cannot be told
        *[Degradation.RAIN] * 3,
        Degradation.NOISE_50,
    ]


def test_scores_are_those_of_scikit_image(pictures):
    result = evaluate(
        pictures, restorer=FakeRestorer(lambda pixels: pixels * 1.7), sets=["Rain100L"]
    )
    psnr, ssim = [], []
    for number in range(3):
        # 50x67 becomes 48x64 around the middle.
        target = photograph(number + 3)[1:49, 1:65] / np.float32(255)
        given = photograph(number + 3)[1:49, 1:65] // 2 / np.float32(255)
        restored = np.clip(given * np.float32(1.7), 0, 1)
        psnr.append(peak_signal_noise_ratio(target, restored, data_range=1))
        ssim.append(structural_similarity(target, restored, data_range=1, channel_axis=-1))
    assert result.rows[0].restored.psnr == pytest.approx(np.mean(psnr), abs=1e-4)
    assert result.rows[0].restored.ssim == pytest.approx(np.mean(ssim), abs=1e-5)


def test_output_is_clipped_but_not_quantised(pictures):
    target = np.full((32, 32, 3), 255, np.uint8)
    write_pair(pictures / "LowLight", "a.png", target // 5, target)
    # 1/8 of a grey level too dark, which rounding would hide; and far too bright.
    for change, expected in ((lambda p: p * 0 + 1 - 0.125 / 255, 66.19), (lambda p: p + 9, np.inf)):
        result = evaluate(pictures, restorer=FakeRestorer(change), sets=["LowLight"])
        assert result.rows[0].restored.psnr == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (31, 33), (48, 47), (50, 64)])
def test_crop_is_central_and_a_multiple_of_16(height, width):
    picture = np.arange(height * width).reshape(height, width)
    middle = evaluation.cropped(picture)
    assert middle.shape == (height - height % 16, width - width % 16)
    top, left = divmod(int(middle[0, 0]), width)
    bottom, right = height - top - middle.shape[0], width - left - middle.shape[1]
    assert 0 <= bottom - top <= 1
    assert 0 <= right - left <= 1


def test_noise_repeats_and_does_not_depend_on_the_other_sets(pictures):
    runs = [FakeRestorer() for _ in range(4)]
    first = evaluate(pictures, restorer=runs[0])
    again = evaluate(pictures, restorer=runs[1])
    alone = evaluate(pictures, restorer=runs[2], sets=["W2S", "CBSD68"], limit=2)
    evaluate(pictures, restorer=runs[3], sets=["CBSD68"], seed=1)
    assert scores(first) == scores(again)
    for level in (Degradation.NOISE_15, Degradation.NOISE_25):
        every, fewer, other = (runs[number].inputs(level) for number in (0, 2, 3))
        assert len(fewer) == 2
        assert all(np.array_equal(one, two) for one, two in zip(every[:2], fewer, strict=True))
        assert not np.array_equal(every[0], other[0])
    assert alone.limit == 2


def test_noise_has_its_level_and_differs_between_pictures_and_levels():
    grey = np.full((256, 256, 3), 128, np.uint8)
    noise = {
        (sigma, index): with_noise(grey, sigma, 0, index) - 128.0
        for sigma in (15, 25)
        for index in (0, 1)
    }
    for (sigma, _), values in noise.items():
        assert values.std() == pytest.approx(sigma, rel=0.01)
        assert abs(values.mean()) < 0.2
    flat = [values.ravel() for values in noise.values()]
    assert np.abs(np.corrcoef(flat) - np.eye(4)).max() < 0.02


def test_inputs_are_8_bit(pictures):
    fake = FakeRestorer()
    evaluate(pictures, restorer=fake, sets=["CBSD68"])
    for _, pixels in fake.seen:
        levels = pixels * 255
        assert (levels - levels.round()).abs().max() < 1e-4
        assert pixels.min() >= 0
        assert pixels.max() <= 1


def test_grey_set_is_scored_on_one_channel(pictures):
    # Opposite errors of two channels cancel in grey.
    def tinted(pixels):
        shift = pixels.new_tensor([0.02, 0.0, -0.02]).reshape(1, 3, 1, 1)
        return (pixels * 0.8 + 0.1) + shift

    plain = FakeRestorer(lambda pixels: pixels * 0.8 + 0.1)
    row = evaluate(pictures, restorer=plain, sets=["W2S"]).rows[0]
    shifted = evaluate(pictures, restorer=FakeRestorer(tinted), sets=["W2S"]).rows[0]
    assert shifted.restored.psnr == pytest.approx(row.restored.psnr, abs=1e-4)
    assert row.restored.psnr != pytest.approx(row.given.psnr, abs=0.1)
    assert row.as_dict()["told"] == "noise, level estimated"


def test_noise_level_follows_the_noise():
    # The values of scikit-image's estimate_sigma, which needs PyWavelets, for these pictures.
    reference = {0: 1.259, 5: 6.205, 15: 15.541, 25: 24.027, 50: 43.269}
    for sigma, expected in reference.items():
        noisy = with_noise(data.camera(), sigma, 0, 0)
        assert noise_level(noisy) == pytest.approx(expected, rel=0.01)
    assert noise_level(np.zeros((16, 16), np.uint8)) == 0


def test_json_round_trip(pictures):
    result = evaluate(pictures, restorer=FakeRestorer(), limit=1)
    facts = result.as_dict()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["schema"] == 1
    assert facts["weights"] == {"name": "fake.safetensors", "sha256": "f" * 64}
    assert {"date", "dfpir", "torch", "protocol", "seed", "limit"} <= facts.keys()
    assert facts["most_steps"] == 0
    assert facts["classifier_sha256"] == weights.file_hash(weights.resolve(role="classifier"))
    assert len(facts["rows"]) == len(result.rows)


def test_a_perfect_score_is_no_number_in_json(pictures):
    write_pair(pictures / "GoPro", "a.png", photograph(0), photograph(0))
    row = evaluate(pictures, restorer=FakeRestorer(), sets=["GoPro"]).as_dict()["rows"][0]
    assert json.loads(json.dumps(row, allow_nan=False))["restored"] == {"psnr": None, "ssim": 1.0}


def test_markdown_has_a_row_per_set_and_its_notes(pictures):
    for name in ("SOTS_indoor", "GoPro", "LowLight"):
        write_pair(pictures / name, "a.png", photograph(1), photograph(2))
    result = evaluate(pictures, restorer=FakeRestorer())
    table = [line for line in result.markdown().splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(result.rows) == 2 + 10
    assert len({line.count("|") for line in table}) == 1
    for note in ("not the SOTS-outdoor", "not comparable with published GoPro", "not LOL"):
        assert note in result.markdown()
    rain = evaluate(pictures, restorer=FakeRestorer(), sets=["Rain100L"]).markdown()
    assert "SOTS" not in rain
    assert "fake.safetensors" in rain
    assert "somewhere" not in rain


def test_published_scores_stand_beside_the_whole_set_only(pictures):
    result = evaluate(pictures, restorer=FakeRestorer(), sets=["Rain100L"])
    assert result.rows[0].paper is None
    whole = evaluation.EvaluationRow(
        "Rain100L",
        Degradation.RAIN,
        None,
        100,
        evaluation.Score(25.5, 0.83),
        evaluation.Score(30.0, 0.9),
        0.1,
    )
    assert whole.paper is not None
    assert whole.paper.psnr == 38.65
    text = evaluation.Evaluation((whole,), "", "", 0, None, "").markdown()
    assert "38.65 / 0.982" in text
    assert "CVPR 2025" in text


class Classifying(FakeRestorer):
    """Doubles the pixels; takes everything for rain, or is not sure."""

    def __init__(self, verdict):
        super().__init__(lambda pixels: pixels * 2)
        self.verdict = verdict
        self.most_steps = set()

    def restore_pixels(self, pixels, degradation, most_steps=1):
        if degradation != "auto":
            return super().restore_pixels(pixels, degradation)
        self.most_steps.add(most_steps)
        found = Diagnosis(self.verdict, Degradation.RAIN, {"rain": 1.0})
        image = pixels * 2 if self.verdict == "degraded" else pixels
        return SimpleNamespace(image=image, diagnosis=found)


def test_untold_acts_as_the_classifier_says(pictures):
    restorers = [Classifying(verdict) for verdict in ("degraded", "unsure")]
    sure, unsure = (evaluate(pictures, restorer=each, blind=2) for each in restorers)
    assert restorers[0].most_steps == {2}
    assert sure.as_dict()["most_steps"] == 2
    for row, doubtful in zip(sure.rows, unsure.rows, strict=True):
        assert row.named == (1.0 if row.told is Degradation.RAIN else 0.0)
        assert row.blind == row.restored
        assert doubtful.named == 0.0
        # The same picture, but once from bytes and once from the floats that a restorer returns.
        assert astuple(doubtful.blind) == pytest.approx(astuple(doubtful.given))
    table = [line for line in sure.markdown().splitlines() if line.startswith("|")]
    assert "restored, untold" in table[0] and len({line.count("|") for line in table}) == 1
    assert evaluate(pictures, restorer=FakeRestorer()).rows[0].blind is None
    with pytest.raises(ValueError, match="most_steps is 4; expected 1 to 3"):
        evaluate(pictures, restorer=FakeRestorer(), blind=4)


@pytest.mark.parametrize(
    ("found", "truth", "right"),
    [
        (Degradation.NOISE_15, Degradation.NOISE_50, True),
        (Degradation.RAIN, Degradation.RAIN, True),
        (Degradation.RAIN, Degradation.HAZE, False),
        (Degradation.NOISE_15, Degradation.RAIN, False),
        (None, Degradation.RAIN, False),
    ],
)
def test_all_noise_is_one_when_names_are_compared(found, truth, right):
    assert evaluation.is_right(found, truth) is right


def test_classical_tools_are_named_beside_their_scores(pictures):
    result = evaluate(pictures, restorer=FakeRestorer(), sets=["Rain100L"], classically=True)
    row = result.as_dict()["rows"][0]
    assert row["tool"] == classical.BEST[Degradation.RAIN].name
    assert f"({row['tool']})" in result.markdown() and row["classical"]["psnr"] > 0


def test_the_readme_shows_the_scores_of_the_bundled_weights():
    entry = weights.find_entry(weights.default_name())
    scores = {"rows": entry.facts["scores"], "weights": {"name": entry.name}, "limit": None}
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert filled(readme, "scores", evaluation.table(scores, timed=False)) == readme


def test_progress_counts_pictures_and_cancels(pictures):
    seen = []
    evaluate(pictures, restorer=FakeRestorer(), on_progress=lambda *step: seen.append(step))
    assert seen == [(number, 19) for number in range(1, 20)]

    def stop(done, total):
        raise KeyboardInterrupt

    fake = FakeRestorer()
    with pytest.raises(KeyboardInterrupt):
        evaluate(pictures, restorer=fake, on_progress=stop)
    assert len(fake.seen) == 1


def empty(folder):
    for path in (folder / "Rain100L/input").iterdir():
        path.unlink()


BAD_FOLDERS = {
    "unknown": (lambda d: (d / "Rain100l").mkdir(), None, "Rain100l: not a set"),
    "unknown name": (lambda d: None, ["Rain200L"], "Rain200L: not a set"),
    "missing": (lambda d: None, ["GoPro"], "GoPro: no such folder"),
    "without input": (lambda d: (d / "GoPro/target").mkdir(parents=True), None, "input: no such"),
    "empty": (empty, ["Rain100L"], "without images"),
    "nothing wanted": (lambda d: None, [], "no set to evaluate"),
    "alone": (
        lambda d: (d / "Rain100L/target/1.webp").unlink(),
        None,
        "1.webp: has no partner",
    ),
    "alone twice": (
        lambda d: [(d / f"Rain100L/input/{n}.webp").unlink() for n in (0, 1)],
        None,
        "(nor have 1 more)",
    ),
    "unequal": (
        lambda d: write_pair(d / "Rain100L", "9.png", photograph(0), photograph(0, 51)),
        ["Rain100L"],
        "9.png: is 67x50, but its target is 67x51",
    ),
    "small": (
        lambda d: write(d / "CBSD68", "9.png", photograph(0, 15)),
        ["CBSD68"],
        "at least 16x16",
    ),
    "grey": (
        lambda d: write(d / "CBSD68", "9.png", photograph(0)[..., 0]),
        ["CBSD68"],
        "expected an 8-bit RGB picture",
    ),
    "deep": (
        lambda d: write(d / "CBSD68", "9.png", photograph(0)[..., 0].astype(np.uint16)),
        ["CBSD68"],
        "has dtype uint16",
    ),
    "coloured": (
        lambda d: write_pair(d / "W2S", "9.png", photograph(0), photograph(0)),
        ["W2S"],
        "expected an 8-bit grey picture",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_refused_in_one_line(pictures, case):
    spoil, sets, expected = BAD_FOLDERS[case]
    spoil(pictures)
    with pytest.raises(EvaluationError) as refusal:
        evaluate(pictures, restorer=FakeRestorer(), sets=sets)
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_sets_that_the_weights_do_not_know_are_named_before_the_first_picture(pictures):
    restorer = FakeRestorer()
    restorer.model = SimpleNamespace(config=SimpleNamespace(degradations=tuple(Degradation)[:3]))
    with pytest.raises(EvaluationError, match="not trained for 'rain', as which Rain100L"):
        evaluate(pictures, restorer=restorer)
    assert not restorer.seen
    assert evaluate(pictures, restorer=restorer, sets=["CBSD68"]).rows


def test_folder_that_is_none_and_limit_of_none_are_refused(tmp_path):
    with pytest.raises(EvaluationError, match="not a folder"):
        evaluate(tmp_path / "absent", restorer=FakeRestorer())
    with pytest.raises(EvaluationError, match="no set to evaluate"):
        evaluate(tmp_path, restorer=FakeRestorer())
    with pytest.raises(EvaluationError, match="at least 1"):
        evaluate(tmp_path, restorer=FakeRestorer(), limit=0)


def test_missing_scikit_image_is_named(pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(EvaluationError, match=r'pip install "dfpir\[cli\]"'):
        evaluate(pictures, restorer=FakeRestorer())
