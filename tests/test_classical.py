"""The classical tools help where they should, and cost nothing where they cannot."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from dfpir import classical
from dfpir.degradation import Degradation
from dfpir.synthesis import degrade


def pair(photograph, degradation):
    pixels = torch.from_numpy(photograph).permute(2, 0, 1)[None].float() / 255
    degraded = degrade(pixels, degradation, torch.Generator().manual_seed(0))
    return degraded[0].permute(1, 2, 0).numpy(), pixels[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("degradation", Degradation)
def test_every_degradation_has_a_tool_that_does_not_harm(photograph, degradation):
    degraded, sharp = pair(photograph, degradation)
    restored = classical.restore(degraded, degradation)
    assert restored.shape == degraded.shape and restored.dtype == np.float32
    assert restored.min() >= 0 and restored.max() <= 1
    before, after = (
        peak_signal_noise_ratio(sharp, image, data_range=1) for image in (degraded, restored)
    )
    least = {"noise-15": 2, "noise-25": 3, "noise-50": 3, "low-light": 3}
    assert after >= before + least.get(degradation.value, -1.0)


@pytest.mark.parametrize("degradation", [Degradation.NOISE_25, Degradation.BLUR])
def test_grey_is_its_three_equal_channels(photograph, degradation):
    grey = photograph[..., 0] / np.float32(255)
    once = classical.restore(grey, degradation)
    thrice = classical.restore(np.repeat(grey[..., None], 3, axis=-1), degradation)
    assert once.shape == grey.shape
    if degradation is Degradation.BLUR:
        np.testing.assert_allclose(thrice, np.repeat(once[..., None], 3, axis=-1), atol=1e-5)


def test_the_noise_level_given_decides(photograph):
    degraded, _ = pair(photograph, Degradation.NOISE_50)
    little, much = (classical.restore(degraded, Degradation.NOISE_50, level) for level in (5, 60))
    assert np.abs(little - degraded).mean() < np.abs(much - degraded).mean()


def test_haze_thickens_monotonically_and_is_removed(photograph):
    sharp = photograph / np.float32(255)
    hazy = 0.5 * sharp + 0.5 * np.float32([0.9, 0.9, 0.92])
    clear = classical.dark_channel(hazy, keep=0.95, radius=3)
    assert np.square(clear.clip(0, 1) - sharp).mean() < 0.5 * np.square(hazy - sharp).mean()


def test_tuning_takes_the_best(photograph):
    pairs = [pair(photograph[:64, :64], Degradation.LOW_LIGHT)]
    best, means = classical.tune(Degradation.LOW_LIGHT, pairs)
    assert f"{best.name} {dict(best.parameters)}" == max(means, key=means.get)
    assert len(means) == len(classical.candidates(Degradation.LOW_LIGHT))
