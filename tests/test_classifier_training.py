"""The classifier's training: what it draws, and that an overview learns what it should."""

import numpy as np
import pytest
import torch
from skimage import data as pictures
from torch import Generator

import dfpir.classifier_training as module
from conftest import SMALL, random_model
from dfpir.classifier import FEATURES, KINDS, ClassifierConfig, DegradationClassifier
from dfpir.classifier_examples import (
    LONGEST_WHOLE,
    WHOLE_SHARES,
    Pools,
    as_lit,
    draw_example,
    make_drawings,
    soft,
    spoilt,
)
from dfpir.classifier_training import calibration, draw_features, fit_overview, take_encoder
from dfpir.degradation import CLEAN, Degradation
from dfpir.model import DFPIRConfig


@pytest.fixture(scope="module")
def pools():
    grey = np.repeat(pictures.cell()[..., None], 3, axis=2)
    return Pools(
        [[pictures.astronaut()], [pictures.coffee()]],
        [[grey]],
        [[pictures.immunohistochemistry()]],
        make_drawings(4, 0, side=200),
    )


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(module, "OVERVIEW_STEPS", 400)


@pytest.fixture
def small():
    torch.manual_seed(0)
    return DegradationClassifier(ClassifierConfig(widths=(4, 6), hidden=8, overview=16)).eval()


def test_wholes_repeat_by_their_seed_and_fit_their_limits(pools):
    kinds = set()
    for seed in range(30):
        example = draw_example(pools, Generator().manual_seed(seed))
        again = draw_example(pools, Generator().manual_seed(seed))
        assert (example is None) == (again is None)
        if example is None:
            continue
        pixels, kind = example
        assert kind == again[1] and torch.equal(pixels, again[0])
        assert pixels.shape[:2] == (1, 3) and max(pixels.shape[2:]) <= 1.5 * LONGEST_WHOLE
        assert pixels.isfinite().all()
        if KINDS[kind] != "noise":  # raw counts are not clipped
            assert float(pixels.min()) >= 0 and float(pixels.max()) <= 1
        kinds.add(KINDS[kind])
    assert kinds == set(WHOLE_SHARES)


def test_softness_is_alike_in_all_directions_and_keeps_the_mean():
    point = torch.zeros(3, 41, 41)
    point[:, 20, 20] = 1
    for deviation in (0.5, 1.8, 3.0):
        spot = soft(point, deviation)
        assert float(spot[0].sum()) == pytest.approx(1, abs=1e-4)
        torch.testing.assert_close(spot, spot.transpose(1, 2))
        rows = torch.arange(41.0) - 20
        measured = (spot[0].sum(dim=1) * rows.square()).sum().sqrt()
        assert float(measured) == pytest.approx(deviation, rel=0.1)


def test_many_scenes_are_lit_from_near_and_depth_counts_for_haze_alone(pools):
    sharp = torch.rand(1, 3, 48, 64, generator=Generator().manual_seed(0))
    lit = [as_lit(sharp, Generator().manual_seed(seed))[0] for seed in range(40)]
    assert 5 < sum(not torch.equal(each, sharp) for each in lit) < 25
    near, far = torch.zeros(1, 1, 48, 64), torch.ones(1, 1, 48, 64)
    for kind in (Degradation.HAZE, Degradation.RAIN):
        by_depth = [spoilt(sharp, kind, depth, Generator().manual_seed(1)) for depth in (near, far)]
        assert torch.equal(*by_depth) == (kind is Degradation.RAIN)


def test_features_depend_on_their_number_alone(small, pools):
    together = draw_features(small, pools, 3, range(6))
    alone = [each for number in range(6) for each in draw_features(small, pools, 3, [number])]
    assert len(together) == len(alone)
    for (first, kind), (second, same) in zip(together, alone, strict=True):
        assert kind == same and torch.equal(first, second)


def examples_of(count, confusing):
    """Return features of which the first six, if confusing, are wrong of haze; the last tell."""
    generator = Generator().manual_seed(1)
    made = []
    for number in range(count):
        kind = number % len(KINDS)
        features = 0.1 * torch.randn(FEATURES, generator=generator)
        shown = "blur" if confusing and KINDS[kind] == "haze" else KINDS[kind]
        features[: len(KINDS)] = -4.0
        features[KINDS.index(shown)] = -0.1
        features[-1] += KINDS[kind] == "haze"
        made.append((features, kind))
    return made


def test_the_encoder_is_the_network_s_own_beginning(small):
    network = random_model(DFPIRConfig.compact())
    take_encoder(small, network)
    picture = torch.rand(1, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    described = small.encoder.describe(picture)
    whole = network.describe(picture)
    assert torch.equal(described, whole[: len(described)])
    with pytest.raises(ValueError, match="compact preset"):
        take_encoder(small, random_model(SMALL))


def test_an_overview_learns_what_the_details_confuse(small, short):
    examples = examples_of(600, confusing=True)
    features = torch.stack([each for each, _ in examples])
    kinds = torch.tensor([kind for _, kind in examples])
    before = (small.overview(features).argmax(dim=1) == kinds).float().mean()
    fit_overview(small, examples, seed=0)
    after = (small.overview(features).argmax(dim=1) == kinds).float().mean()
    assert before == pytest.approx(5 / 6, abs=0.01) and after > 0.98


def test_where_the_details_are_right_an_overview_corrects_little(small, short):
    examples = examples_of(600, confusing=False)
    features = torch.stack([each for each, _ in examples])
    fit_overview(small, examples, seed=0)
    assert float(small.overview.correction(features).abs().mean()) < 0.35
    again = small.overview(features)
    fit_overview(small, examples, seed=0)
    assert torch.equal(again, small.overview(features))


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.5])
def test_calibration_undoes_overconfidence(factor):
    generator = Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, len(KINDS), generator=generator)
    kinds = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).flatten()
    assert calibration(factor * logits, kinds) == pytest.approx(factor, rel=0.08)


def test_clean_is_among_the_kinds_of_wholes():
    assert set(WHOLE_SHARES) == set(KINDS) and WHOLE_SHARES[CLEAN] == max(WHOLE_SHARES.values())
    assert sum(WHOLE_SHARES.values()) == pytest.approx(1)
