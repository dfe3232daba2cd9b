"""Noise stronger than the network has learnt."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

from conftest import distance
from dfpir import Degradation, Restorer
from dfpir.evaluation import with_noise
from dfpir.noise import LEARNT, LOWEST_CONTRAST, contrast_for, with_contrast
from dfpir.restorer import STRONG_NOISE


@pytest.fixture(scope="module")
def restorer():
    return Restorer(device="cpu")


@given(st.floats(0, 300), st.floats(0, 50))
def test_stronger_noise_keeps_less_contrast(sigma, more):
    contrast = contrast_for(sigma)
    assert LOWEST_CONTRAST <= contrast_for(sigma + more) <= contrast <= 1
    assert (contrast == 1) == (sigma <= LEARNT)


def test_unknown_noise_is_left_alone():
    assert contrast_for(None) == 1


@pytest.mark.parametrize("contrast", [1.0, 0.8, 0.5])
def test_restoring_that_follows_the_contrast_is_not_changed_by_it(contrast):
    pixels = torch.rand(1, 3, 20, 30, generator=torch.Generator().manual_seed(0)) * 1.5 - 0.2

    def flatten(given):
        return given.mean(dim=-1, keepdim=True).expand_as(given)

    assert with_contrast(pixels, contrast, lambda given: given).allclose(pixels, atol=1e-6)
    assert with_contrast(pixels, contrast, flatten).allclose(flatten(pixels), atol=1e-6)


def test_the_range_of_the_picture_is_not_left():
    pixels = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = with_contrast(pixels, 0.6, lambda given: 3 * given - 1)
    assert float(found.min()) == 0 and float(found.max()) == 1


def noisy(sigma, name="coffee"):
    clean = getattr(data, name)()[100:292, 100:292]
    return clean, with_noise(clean, sigma, seed=0, index=0)


@pytest.mark.parametrize("name", ["coffee", "chelsea", "rocket"])
@pytest.mark.parametrize("degradation", ["auto", "noise-50"])
def test_strong_noise_is_removed_better_and_the_record_says_how(restorer, degradation, name):
    clean, given = noisy(120, name)
    pixels = torch.from_numpy(given).permute(2, 0, 1)[None] / 255
    plain = restorer.run(pixels, Degradation.NOISE_50)[0].permute(1, 2, 0).numpy()
    done = restorer.restore(given, degradation)
    assert done.record.notes.count(STRONG_NOISE) == 1
    before = peak_signal_noise_ratio(clean / 255, plain, data_range=1)
    assert peak_signal_noise_ratio(clean, done.image) > before + 0.05


def test_noise_that_was_learnt_is_restored_as_ever(restorer):
    _, given = noisy(80)
    pixels = torch.from_numpy(given).permute(2, 0, 1)[None] / 255
    done = restorer.restore_pixels(pixels, "noise-50")
    assert torch.equal(done.image, restorer.run(pixels, Degradation.NOISE_50))
    assert STRONG_NOISE not in done.record.notes


def test_eight_turns_work_at_the_same_contrast(restorer):
    _, given = noisy(120)
    one, eight = (restorer.restore(given[:64, :64], "noise-50", ensemble=each) for each in (0, 1))
    assert 0 < distance(*(torch.from_numpy(each.image / 255) for each in (eight, one))) < 0.1
    assert np.isfinite(eight.consistency).all()
    assert STRONG_NOISE in eight.record.notes
