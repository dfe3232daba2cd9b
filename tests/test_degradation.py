"""Names, prompts and diagnoses."""

import pytest

from dfpir.degradation import Degradation, Diagnosis


def test_order_is_that_of_the_prompts():
    names = ["noise-15", "noise-25", "noise-50", "rain", "haze", "blur", "low-light"]
    assert [member.value for member in Degradation] == names
    assert [member.index for member in Degradation] == list(range(7))


def test_every_member_has_words():
    assert len({member.label for member in Degradation}) == 7
    assert len({member.prompt for member in Degradation}) == 7


@pytest.mark.parametrize("member", Degradation)
def test_from_name_takes_names_and_members(member):
    assert Degradation.from_name(member.value) is member
    assert Degradation.from_name(member) is member


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'snow'.*noise-15, .*low-light"):
        Degradation.from_name("snow")


@pytest.mark.parametrize(
    ("sigma", "name"),
    [(0, "noise-15"), (15, "noise-15"), (25, "noise-25"), (50, "noise-50"), (75, "noise-50")],
)
def test_nearest_noise(sigma, name):
    assert Degradation.nearest_noise(sigma).value == name


def test_confidence_counts_noise_levels_together():
    probabilities = {"noise-15": 0.5, "noise-25": 0.3, "rain": 0.1, "clean": 0.1}
    noisy = Diagnosis("degraded", Degradation.NOISE_15, probabilities)
    assert noisy.confidence == pytest.approx(0.8)
    assert Diagnosis("clean", None, probabilities).confidence == 0.1
    assert Diagnosis("degraded", Degradation.RAIN, probabilities).confidence == 0.1
