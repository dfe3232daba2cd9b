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
from dfpir import checkpoint, cli, training
from dfpir.checkpoint import CheckpointError
from dfpir.degradation import Degradation
from dfpir.model import DFPIR, LEVELS
from dfpir.restorer import Restorer
from dfpir.tiling import Tiling
from test_training import SETTINGS, trainer
from test_training import pictures as pictures  # a fixture

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


def specialist_for(*degradations, **changed):
    return DFPIR(dataclasses.replace(SMALL_COMPACT, degradations=degradations, **changed))


def test_what_does_not_fit_is_refused(specialised):
    with pytest.raises(ValueError, match="expected DFPIRConfig"):
        specialised.specialise("rain", specialist_for(Degradation.RAIN, width=16), LOWER)
    for degradations in [(), (Degradation.RAIN, Degradation.NOISE_25)]:
        with pytest.raises(ValueError, match="no other specialist has"):
            specialised.specialise("rain", specialist_for(*degradations), LOWER)
    rainless = DFPIR(dataclasses.replace(SMALL_COMPACT, degradations=NOISES))
    with pytest.raises(ValueError, match="is for rain; expected"):
        rainless.specialise("rain", specialist_for(Degradation.RAIN), LOWER)
    specialised.specialise("noise", specialist_for(*NOISES), LOWER)  # in place of the other


def test_a_specialist_without_details_may_be_part_of_a_network_with_some(tmp_path):
    model = random_model(dataclasses.replace(SMALL_COMPACT, details=1))
    plain = dataclasses.replace(SMALL_COMPACT, degradations=(Degradation.RAIN,))
    model.specialise("rain", random_model(plain, seed=1), LOWER)
    checkpoint.save(model, tmp_path / "w.safetensors")
    loaded = checkpoint.load(tmp_path / "w.safetensors")
    with torch.no_grad():
        found = loaded(pixels(), Degradation.RAIN)
        assert_equal(found, model(pixels(), Degradation.RAIN))


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


SHARED = [path for level in LEVELS[2:] for path in level]
CLAIM = {"degradations": ["noise-15"], "shared": SHARED}


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        (json.dumps({}), "unexpected specialists.noise"),
        (json.dumps({"noise": CLAIM, "rain": CLAIM}), "'rain' shares"),
        (json.dumps({"noise": CLAIM | {"degradations": ["fog"]}}), "fog"),
        (json.dumps({"noise": CLAIM | {"degradations": []}}), "for nothing"),
        (json.dumps({"noise": CLAIM | {"shared": [*SHARED, "all"]}}), "'noise' shares"),
        (json.dumps({"noise": CLAIM | {"shared": SHARED[1:]}}), "missing down.1"),
        (json.dumps({"noise": CLAIM | {"shared": [["latent"]]}}), "cannot be read"),
        (json.dumps({"noise": {"degradations": ["noise-15"]}}), "cannot be read"),
        (json.dumps({"noise": {}}), "cannot be read"),
        (json.dumps({"noise": [1]}), "cannot be read"),
        (json.dumps(["noise"]), "cannot be read"),
        (json.dumps({"noise": CLAIM, "a.b": CLAIM}), "'a.b' shares"),
        ("5", "cannot be read"),
        ("{", "cannot be read"),
    ],
)
def test_lying_claims_are_refused(saved, claims, words):
    _, path = saved
    rewrite(path, claims=claims)
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


DETAILED = dataclasses.replace(SMALL_COMPACT, details=2)


def noise_trainer(pictures, folder, **changed):
    settings = dataclasses.replace(SETTINGS, **{"specialist": "noise", **changed})
    state = folder / "run.state"
    return training.Trainer(DETAILED, settings, pictures, torch.device("cpu"), state)


def test_specialists_are_compressed_with_their_network(specialised, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MANY_VALUES", 500)
    path = tmp_path / "small.safetensors"
    checkpoint.save(specialised, path, compress=True)
    loaded = checkpoint.load(path)
    expert = loaded.specialists["noise"]
    assert checkpoint.shared_modules(loaded, expert) == LOWER
    for key, value in specialised.specialists["noise"].named_parameters():
        found = expert.get_parameter(key)
        assert ((found - value).abs() <= value.abs().max() / 250).all(), key


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_a_specialist_is_trained_further(pictures, tmp_path, specialised, levels):
    run = noise_trainer(pictures, tmp_path, levels=levels, batch=20)
    run.start_from(specialised)
    before = specialised.specialists["noise"].embed.weight
    assert torch.equal(run.model.embed.weight, before)
    with training.threads(len(run.replicas)) as pool:
        run.train_step(pool)
    assert not torch.equal(run.average.embed.weight, before)
    run.average.eval()
    kind = Degradation.NOISE_25
    with torch.no_grad():
        assert_equal(run.result()(pixels(), kind), run.average(pixels(), kind))


def test_details_add_nothing_at_first_and_learn(pictures, tmp_path):
    begun, run = random_model(SMALL_COMPACT), noise_trainer(pictures, tmp_path)
    run.start_from(begun)
    run.average.eval()
    with torch.no_grad():
        expected = begun(pixels(), Degradation.NOISE_15)
        assert_equal(run.average(pixels(), Degradation.NOISE_15), expected)
    run.train_step()
    assert all(bool((each.second.weight != 0).any()) for each in run.model.details)


def test_training_the_network_takes_specialists_along(pictures, tmp_path, specialised, caplog):
    whole = trainer(pictures, tmp_path)
    whole.start_from(specialised)
    assert torch.equal(whole.model.embed.weight, specialised.embed.weight)
    whole.train_step()
    result = whole.result()
    before, after = specialised.specialists["noise"], result.specialists["noise"]
    assert "train them anew" in caplog.text
    assert checkpoint.shared_modules(result, after) == LOWER
    for path in itertools.chain(*LEVELS[:2]):
        states = (each.get_submodule(path).state_dict() for each in (before, after))
        assert all(map(torch.equal, *(state.values() for state in states)))
    assert not torch.equal(result.latent[0].norm1.bias, specialised.latent[0].norm1.bias)


def test_what_has_a_specialist_is_learnt_little_and_not_scored(pictures, tmp_path, specialised):
    alone, whole = trainer(pictures, tmp_path), trainer(pictures, tmp_path)
    assert alone.settings.shares == pytest.approx(training.SHARES)
    assert alone.settings.kinds == tuple(Degradation)
    whole.start_from(specialised)
    shares = whole.settings.shares
    assert sum(shares.values()) == pytest.approx(1)
    ratios = {kind: shares[kind] / training.SHARES[kind] for kind in shares}
    rarely = ratios.pop(None)
    assert all(ratio == pytest.approx(rarely / training.SPECIALISED) for ratio in ratios.values())
    whole.run(every=4)
    assert set(whole.log[-1]["psnr"]) == {each.value for each in Degradation} - {
        each.value for each in NOISES
    }


def test_where_all_have_specialists_all_is_learnt():
    every = tuple(sorted(each.value for each in Degradation))
    settings = dataclasses.replace(SETTINGS, specialised=every)
    assert settings.kinds == tuple(Degradation)
    assert settings.shares == pytest.approx(training.SHARES)


def test_a_network_resumes_with_the_specialists_that_it_began_with(pictures, tmp_path, specialised):
    run = trainer(pictures, tmp_path)
    run.start_from(specialised)
    run.train_step()
    run.save()
    with pytest.raises(ValueError, match="same preset, specialist, levels and --from"):
        trainer(pictures, tmp_path).resume()
    other = copy.deepcopy(specialised)
    with torch.no_grad():
        other.specialists["noise"].embed.weight += 1
    for start, words in ((other, "give the same --from"), (specialised, None)):
        again = trainer(pictures, tmp_path)
        again.start_from(start)
        if words is None:
            again.resume()
            assert list(again.result().specialists) == ["noise"]
        else:
            with pytest.raises(ValueError, match=words):
                again.resume()


def test_a_specialist_resumes_as_what_it_is(pictures, tmp_path, specialised):
    run = noise_trainer(pictures, tmp_path)
    with pytest.raises(ValueError, match="Name one with --from"):
        run.run()
    run.start_from(specialised)
    run.train_step()
    run.save()

    def resume(start=specialised, **changed):
        resumed = noise_trainer(pictures, tmp_path, **changed)
        resumed.start_from(start)
        resumed.resume()
        return resumed

    resumed = resume()
    for each in (run, resumed):
        each.train_step()
    assert torch.equal(resumed.average.embed.weight, run.average.embed.weight)
    for changed in ({"specialist": "rain"}, {"levels": 1}, {"specialist": ""}):
        with pytest.raises(ValueError, match="same preset, specialist, levels and --from"):
            resume(**changed)
    other = random_model(SMALL_COMPACT, seed=3)
    with pytest.raises(ValueError, match="give the same --from"):
        resume(other)
    rainless = random_model(dataclasses.replace(SMALL_COMPACT, degradations=NOISES))
    with pytest.raises(ValueError, match="know no rain"):
        noise_trainer(pictures, tmp_path, specialist="rain").start_from(rainless)


def test_a_specialist_needs_a_network_and_a_specialty(tmp_path):
    output = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="Name one with --from"):
        training.train(tmp_path, output, specialist="noise")
    with pytest.raises(ValueError, match="choose one of: noise, rain, haze, blur, low-light"):
        training.train(tmp_path, output, start="x", specialist="fog")
    with pytest.raises(ValueError, match="1 to 4 levels; found 5"):
        training.train(tmp_path, output, start="x", specialist="rain", levels=5)
    assert cli.main(["train", "--data", str(tmp_path), "-o", str(output), "--levels", "1"]) == 2


@pytest.mark.parametrize(("chosen", "levels"), [({}, 3), ({"levels": 1}, 1)])
def test_a_specialist_keeps_its_levels_unless_told_otherwise(
    pictures, tmp_path, monkeypatch, chosen, levels
):
    run = trainer(pictures, tmp_path, specialist="rain", levels=3)
    run.start_from(random_model(SMALL_COMPACT, seed=1))
    start = tmp_path / "start.safetensors"
    checkpoint.save(run.result(), start)
    for preset in ("compact", "specialist"):
        monkeypatch.setattr(training.DFPIRConfig, preset, classmethod(lambda cls: SMALL_COMPACT))
    monkeypatch.setattr(training.Pictures, "load", classmethod(lambda cls, data: pictures))
    facts = training.train(
        tmp_path,
        tmp_path / "more.safetensors",
        start=start,
        specialist="rain",
        patches=4,
        batch=4,
        patch=32,
        device="cpu",
        **chosen,
    )
    assert facts["settings"]["levels"] == levels
