"""Networks with first levels of their own for some degradations, and the lower ones in common."""

import copy
import dataclasses
import itertools
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from conftest import SMALL_COMPACT, assert_equal, random_model
from dfpir import checkpoint, training
from dfpir.checkpoint import CheckpointError
from dfpir.degradation import Degradation
from dfpir.model import DFPIR, LEVELS
from dfpir.restorer import Restorer
from dfpir.tiling import Tiling
from test_training import pictures as pictures  # a fixture
from test_training import trainer

NOISES = tuple(each for each in Degradation if each.sigma is not None)
LOWER = [*LEVELS[2], *LEVELS[3]]


@pytest.fixture
def specialised():
    """A network with a specialist for noise, which has two levels and details of its own."""
    model = random_model(SMALL_COMPACT)
    config = dataclasses.replace(SMALL_COMPACT, details=2, degradations=NOISES)
    model.specialise("noise", random_model(config, seed=1), LOWER)
    return model


def pixels(count=1):
    return torch.rand(count, 3, 36, 52, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("degradation", list(Degradation))
def test_each_degradation_goes_to_its_network(specialised, degradation):
    plain = random_model(SMALL_COMPACT)
    expert = specialised.specialists["noise"]
    with torch.no_grad():
        found = specialised(pixels(), degradation)
        theirs = expert(pixels(), degradation) if degradation in NOISES else None
        general = plain(pixels(), degradation)
        assert_equal(found, specialised.define(pixels(), degradation))
    if theirs is None:
        assert torch.equal(found, general)
    else:
        assert torch.equal(found, theirs) and not torch.allclose(found, general, atol=1e-2)


def test_a_mixed_batch_equals_its_images(specialised):
    kinds = [Degradation.HAZE, Degradation.NOISE_25, Degradation.RAIN, Degradation.NOISE_50]
    batch, calls = pixels(4), []
    with torch.no_grad():
        found = specialised(batch, kinds, on_progress=lambda *call: calls.append(call))
        each = [specialised(batch[i : i + 1], kind) for i, kind in enumerate(kinds)]
        assert_equal(found, torch.cat(each))
        assert_equal(specialised.define(batch, kinds), found)
        matrices = [specialised.measure(batch[i : i + 1], kind) for i, kind in enumerate(kinds)]
        attention = tuple(torch.cat(block) for block in zip(*matrices, strict=True))
        assert_equal(specialised(batch, kinds, attention=attention), found)
    fractions = [done / total for done, total in calls]
    assert fractions == sorted(fractions) and fractions[-1] == 1
    with pytest.raises(ValueError, match="different specialists"):
        specialised.measure(batch, kinds)


def test_indices_may_be_a_tensor(specialised):
    kinds = [Degradation.NOISE_15, Degradation.BLUR]
    indices = torch.tensor([kind.index for kind in kinds])
    with torch.no_grad():
        assert torch.equal(specialised(pixels(2), indices), specialised(pixels(2), kinds))


def test_the_lower_levels_are_the_same_modules(specialised):
    for model in (specialised, copy.deepcopy(specialised), specialised.double()):
        expert = model.specialists["noise"]
        for level in (2, 3):
            for path in LEVELS[level]:
                assert expert.get_submodule(path) is model.get_submodule(path)
        own = [*LEVELS[0], *LEVELS[1]]
        assert not any(expert.get_submodule(p) is model.get_submodule(p) for p in own)


def test_another_size_is_refused():
    model = DFPIR(SMALL_COMPACT)
    other = DFPIR(dataclasses.replace(SMALL_COMPACT, width=16))
    with pytest.raises(ValueError, match="expected DFPIRConfig"):
        model.specialise("noise", other, LOWER)


@pytest.mark.parametrize("tiling", [None, Tiling(32, 8, statistics="sampled")])
def test_the_restorer_restores_by_the_specialist(specialised, tiling):
    picture = (pixels()[0].permute(1, 2, 0) * 255).byte().numpy()
    expert = Restorer(model=specialised.specialists["noise"])
    found = Restorer(model=specialised).restore(picture, "noise-25", tiling=tiling).image
    assert (found == expert.restore(picture, "noise-25", tiling=tiling).image).all()


@pytest.fixture
def saved(specialised, tmp_path):
    path = tmp_path / "w.safetensors"
    checkpoint.save(specialised, path)
    return specialised, path


def rewrite(path, *, without=(), claims=None, **tensors):
    with safe_open(path, "pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    if claims is not None:
        metadata["specialists"] = claims
    kept = {key: value for key, value in found.items() if key not in without}
    save_file({**kept, **tensors}, path, metadata)


def test_specialists_come_back_and_store_their_own_alone(saved):
    model, path = saved
    loaded = checkpoint.load(path)
    states = loaded.state_dict(), model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    for degradation in Degradation:
        with torch.no_grad():
            assert_equal(loaded(pixels(), degradation), model(pixels(), degradation))
    expert = loaded.specialists["noise"]
    assert expert.latent is loaded.latent and expert.embed is not loaded.embed
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
    assert "specialists.noise.embed.weight" in keys
    assert not any(key.startswith("specialists.noise.latent") for key in keys)


CLAIM = {"degradations": ["noise-15"]}


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        (json.dumps({}), "unexpected specialists.noise"),
        (json.dumps({"noise": CLAIM, "rain": CLAIM}), None),
        (json.dumps({"noise": {"degradations": ["fog"]}}), "fog"),
        (json.dumps({"noise": {}}), "cannot be read"),
        (json.dumps({"noise": [1]}), "cannot be read"),
        (json.dumps(["noise"]), "cannot be read"),
        (json.dumps({"noise": CLAIM, "a.b": CLAIM}), "cannot be read"),
        ("5", "cannot be read"),
        ("{", "cannot be read"),
    ],
)
def test_lying_claims_are_refused(saved, claims, words):
    _, path = saved
    rewrite(path, claims=claims)
    if words is None:  # one without any tensors of its own is the network itself
        assert set(checkpoint.load(path).specialists) == {"noise", "rain"}
        return
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load(path)


def test_missing_and_foreign_tensors_are_named(saved):
    _, path = saved
    rewrite(path, without=["specialists.noise.encoder.0.0.norm1.weight"])
    with pytest.raises(CheckpointError, match=r"missing encoder\.0\.0\.norm1\.weight"):
        checkpoint.load(path)
    rewrite(path, **{"specialists.noise.wrong": torch.ones(1)})
    with pytest.raises(CheckpointError, match="unexpected wrong"):
        checkpoint.load(path)


@pytest.mark.parametrize(("name", "levels"), [("noise", 2), ("rain", 1), ("blur", 3)])
def test_a_specialist_is_trained_in_its_own_levels(pictures, tmp_path, name, levels):
    begun = random_model(SMALL_COMPACT)
    run = trainer(pictures, tmp_path, specialist=name, levels=levels, patches=12)
    run.start_from(begun)
    run.run(every=4)
    kinds = {key.removesuffix(", micrographs") for key in run.log[-1]["psnr"]}
    assert kinds == {kind.value for kind in run.settings.kinds}
    result = run.result()
    assert list(result.specialists) == [name]
    general = random_model(SMALL_COMPACT).state_dict()
    state = result.state_dict()
    assert all(torch.equal(state[key], value) for key, value in general.items())
    expert = result.specialists[name]
    for path in itertools.chain(*LEVELS):
        assert (expert.get_submodule(path) is result.get_submodule(path)) == (path in run.shared)
    assert not torch.equal(expert.embed.weight, result.embed.weight)
    best = checkpoint.load(tmp_path / "run.best.safetensors")
    assert best.network_for(run.settings.kinds[0]) is best.specialists[name]


def test_a_specialist_is_trained_further(pictures, tmp_path, specialised, caplog):
    run = trainer(pictures, tmp_path, specialist="noise")
    run.config = dataclasses.replace(run.config, details=2)
    run = training.Trainer(run.config, run.settings, pictures, run.device, run.state_file)
    run.start_from(specialised)
    assert torch.equal(run.model.embed.weight, specialised.specialists["noise"].embed.weight)
    assert not caplog.records
    whole = trainer(pictures, tmp_path)
    whole.start_from(specialised)
    assert torch.equal(whole.model.embed.weight, specialised.embed.weight)
    assert not whole.result().specialists and "noise) are left behind" in caplog.text


def test_a_specialist_needs_a_network_and_a_specialty(tmp_path):
    output = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="Name one with --from"):
        training.train(tmp_path, output, specialist="noise")
    with pytest.raises(ValueError, match="choose one of: noise, rain, haze, blur, low-light"):
        training.train(tmp_path, output, start="x", specialist="fog")
