"""Demo: every degradation once, true numbers, a contact sheet that opens."""

import json
import sys

import numpy as np
import pytest
from PIL import Image, ImageFont

from dfpir import demo
from dfpir.degradation import Degradation, Diagnosis
from dfpir.demo import CLEAN_SUBJECTS, SIDE, SUBJECTS, DemoError, run_demo
from dfpir.restorer import Restoration

NAMES = [each.value for each in Degradation]


class FakeRestorer:
    """Halves the error of degraded pictures; misnames or spoils what it is told to."""

    weights = "somewhere/fake.safetensors"
    weights_sha256 = "f" * 64

    def __init__(self, misnamed=(), spoilt=()):
        self.originals = {subject.name: demo.original(subject) for subject in SUBJECTS}
        self.waiting = list(SUBJECTS)
        self.misnamed, self.spoilt = misnamed, spoilt

    def restore(self, array):
        for name, clean in self.originals.items():
            if np.array_equal(array, clean):
                image = 255 - array if name in self.spoilt else array.copy()
                return Restoration(image, Diagnosis("clean", None, {"clean": 0.9}), (), None)
        subject = self.waiting.pop(0)
        found = subject.degradation
        if found in self.misnamed:
            found = Degradation.RAIN
        image = ((array.astype(int) + self.originals[subject.name]) // 2).astype(np.uint8)
        return Restoration(image, Diagnosis("degraded", found, {found.value: 0.8}), (found,), None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One good run for all tests that only look at what it left: report, folder, progress."""
    folder = tmp_path_factory.mktemp("demo") / "new/demo"
    steps = []
    report = run_demo(folder, restorer=FakeRestorer(), on_progress=lambda *step: steps.append(step))
    return report, folder, steps


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def psnr(first, second):
    return 10 * np.log10(255**2 / np.mean((first.astype(float) - second) ** 2))


def test_every_degradation_once_each_on_its_own_picture():
    assert [subject.degradation for subject in SUBJECTS] == list(Degradation)
    names = [subject.name for subject in SUBJECTS]
    assert len(set(names)) == len(names)
    assert set(CLEAN_SUBJECTS) <= set(names)


def test_report_agrees_with_the_written_pictures(finished):
    report, folder, steps = finished
    assert steps == [(number, 11) for number in range(1, 12)]
    facts = json.loads((folder / "report.json").read_text())
    assert [each["degradation"] for each in facts["degraded"]] == NAMES
    for each, result in zip(facts["degraded"], report.degraded, strict=True):
        clean, degraded, restored = (
            read(folder / name / f"{each['degradation']}.png")
            for name in ("clean", "degraded", "restored")
        )
        assert clean.shape == degraded.shape == restored.shape == (SIDE, SIDE, 3)
        assert each["psnr_degraded"] == pytest.approx(psnr(degraded, clean), abs=1e-3)
        assert each["psnr_restored"] == pytest.approx(psnr(restored, clean), abs=1e-3)
        assert result.after > result.before + 3
        assert each["named_rightly"]
    assert facts["weights"] == {"name": "fake.safetensors", "sha256": "f" * 64}
    assert "somewhere" not in json.dumps(facts)
    assert report.lines()[-1] == (
        "7 of 7 degradations named rightly, 4 of 4 clean pictures left alone."
    )


def test_contact_sheet_has_its_size_and_its_pictures(finished):
    _, output, _ = finished
    sheet = read(output / "contact-sheet.png")
    width, height = demo.sheet_size(len(SUBJECTS))
    assert sheet.shape == (height, width, 3)
    for number, name in enumerate(NAMES):
        left = demo.MARGIN + demo.GUTTER + number * (SIDE + demo.GAP)
        for row, folder in enumerate(("degraded", "restored", "clean")):
            top = demo.row_top(row)
            part = sheet[top : top + SIDE, left : left + SIDE]
            assert np.array_equal(part, read(output / folder / f"{name}.png"))
    # Nothing is drawn into the margins.
    for margin in (sheet[: demo.MARGIN], sheet[-demo.MARGIN :]):
        assert (margin == 255).all()
    for margin in (sheet[:, : demo.MARGIN - 4], sheet[:, -demo.MARGIN :]):
        assert (margin == 255).all()


def test_words_stay_within_their_column(finished):
    doubtful = Diagnosis("unsure", Degradation.LOW_LIGHT, {"low-light": 1.0})
    for result in finished[0].degraded:
        texts = [
            (demo.HEADING_SIZE, result.degradation.label),
            *((demo.TEXT_SIZE, demo.verdict(each)) for each in (doubtful, result.diagnosis)),
            *((demo.TEXT_SIZE, caption) for caption in demo.captions(result)),
        ]
        for size, text in texts:
            assert ImageFont.load_default(size).getlength(text) < SIDE
            assert text.isascii()


def test_what_is_wrong_is_said(tmp_path):
    fake = FakeRestorer(misnamed=[Degradation.HAZE, Degradation.NOISE_25], spoilt=["coffee"])
    report = run_demo(tmp_path, restorer=fake)
    wrong = [each.degradation for each in report.degraded if not each.named_rightly]
    assert wrong == [Degradation.NOISE_25, Degradation.HAZE]
    assert [each.picture for each in report.clean if not each.unchanged] == ["coffee"]
    assert report.lines()[-1] == (
        "5 of 7 degradations named rightly, 3 of 4 clean pictures left alone."
    )


def test_unsure_is_not_right():
    diagnosis = Diagnosis("unsure", Degradation.RAIN, {"rain": 0.5})
    result = demo.DegradedResult("rocket", Degradation.RAIN, diagnosis, 20.0, 20.0)
    assert not result.named_rightly
    assert demo.found(diagnosis) == "unsure: rain"


def test_table_is_aligned(finished):
    report, folder, _ = finished
    table = report.lines()[: 1 + 7 + 4]
    assert len({len(line) for line in table}) == 1
    assert str(folder / "contact-sheet.png") in report.lines()[-2]


def test_an_earlier_demo_is_replaced_and_the_rest_is_left(tmp_path):
    (tmp_path / "degraded").mkdir()
    for name in ("contact-sheet.png", "report.json", "degraded/rain.png"):
        (tmp_path / name).write_bytes(b"old")
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "degraded/mine.png").write_bytes(b"mine")
    report = run_demo(tmp_path, restorer=FakeRestorer())
    facts = json.loads((tmp_path / "report.json").read_text())
    assert (
        facts["summary"]
        == report.summary
        == ("7 of 7 degradations named rightly, 4 of 4 clean pictures left alone")
    )
    for name in ("contact-sheet.png", "degraded/rain.png"):
        assert read(tmp_path / name).ndim == 3
    assert (tmp_path / "degraded/mine.png").read_bytes() == b"mine"
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_file_in_the_way_is_refused_before_anything_is_done(tmp_path):
    (tmp_path / "taken").write_text("mine")
    for output in (tmp_path / "taken", tmp_path / "taken/demo"):
        with pytest.raises(DemoError, match="a file in the way"):
            run_demo(output, restorer=None)
    assert (tmp_path / "taken").read_text() == "mine"


def test_missing_scikit_image_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(DemoError, match=r'pip install "dfpir\[cli\]"'):
        run_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_bundled_weights_name_all_and_leave_the_clean_alone(tmp_path):
    report = run_demo(tmp_path)
    assert report.lines()[-1] == (
        "7 of 7 degradations named rightly, 4 of 4 clean pictures left alone."
    ), "\n".join(report.lines())
    for result in report.degraded:
        assert result.after > result.before, result
