"""Training repeats, resumes exactly, and writes weights that load."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import reference_run
from conftest import SMALL_COMPACT
from dfpir import checkpoint, training
from dfpir.degradation import Degradation
from dfpir.files import write_image
from dfpir.recorded_steps import RecordedSteps
from dfpir.training import Pictures, Trainer, TrainingSettings

SETTINGS = TrainingSettings(patches=24, batch=4, patch=32, warmup=8, seed=5)


@pytest.fixture(scope="module")
def pictures():
    generator = np.random.default_rng(0)

    def copies():
        return [generator.integers(0, 256, (80, 72, 3), dtype=np.uint8)]

    held = [("a", copies()[0]), ("micrographs/b", copies()[0])]
    from pathlib import Path

    return Pictures(
        [copies() for _ in range(4)],
        [copies() for _ in range(2)],
        [(Path(name), array) for name, array in held],
        [f"{number}.png" for number in range(6)],
    )


def trainer(pictures, folder, **changed):
    settings = dataclasses.replace(SETTINGS, **changed)
    state = folder / "run.state"
    return Trainer(SMALL_COMPACT, settings, pictures, torch.device("cpu"), state)


def same(first, second):
    states = first.average.state_dict(), second.average.state_dict()
    return all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_runs_repeat(pictures, tmp_path):
    runs = [trainer(pictures, tmp_path) for _ in range(2)]
    losses = [[float(run.train_step()) for _ in range(3)] for run in runs]
    assert losses[0] == losses[1] and same(*runs)
    assert not same(runs[0], trainer(pictures, tmp_path, seed=6))


def test_a_resumed_run_equals_an_unbroken_one(pictures, tmp_path):
    unbroken = trainer(pictures, tmp_path)
    unbroken.run(every=100)
    broken = trainer(pictures, tmp_path)
    for _ in range(2):
        broken.train_step()
    broken.save()
    resumed = trainer(pictures, tmp_path)
    resumed.resume()
    assert resumed.seen == 8
    resumed.run(every=100)
    assert resumed.seen == 24 and same(resumed, unbroken)
    assert resumed.log[-1]["psnr"] == unbroken.log[-1]["psnr"]


def test_nothing_to_resume_is_said(pictures, tmp_path):
    with pytest.raises(ValueError, match="nothing to resume"):
        trainer(pictures, tmp_path).resume()


def test_a_state_of_another_device_resumes(pictures, tmp_path):
    trainer(pictures, tmp_path).save()
    path = tmp_path / "run.state"
    state = torch.load(path, weights_only=True)
    del state["best"], state["config"]["details"], state["settings"]["specialist"]  # an older one
    for optimizer in state["optimizers"]:
        group = optimizer["param_groups"][0]
        group |= {key: True for key in ("capturable",) if key in group} | {"lr": 0.5}
    torch.save(state, path)
    resumed = trainer(pictures, tmp_path)
    resumed.resume()
    assert not any(each.param_groups[0].get("capturable") for each in resumed.optimizers)
    resumed.set_learning_rate(0.25)
    assert all(float(each.param_groups[0]["lr"]) == 0.25 for each in resumed.optimizers)


@pytest.mark.gpu
def test_recorded_steps_are_those_of_compute(pictures, tmp_path):
    def losses(recorded):
        settings = dataclasses.replace(SETTINGS, batch=8, part=4)
        run = Trainer(
            SMALL_COMPACT, settings, pictures, torch.device("cuda"), tmp_path / "run.state"
        )
        for value in run.model.parameters():
            value.grad = torch.zeros_like(value)
        steps = RecordedSteps(run)
        found = []
        for _ in range(4):
            run.set_learning_rate(1e-3)
            found.append(float(steps.take() if recorded else steps.compute(run.draw(run.step))))
            run.step += 1
        return found

    assert losses(recorded=True) == pytest.approx(losses(recorded=False), rel=1e-2)


def test_learning_rate_rises_then_falls():
    settings = TrainingSettings(patches=1000, batch=10, warmup=100, learning_rate=1.0)
    rates = [training.learning_rate(settings, seen) for seen in range(0, 1010, 10)]
    top = rates.index(max(rates))
    assert 8 <= top <= 11 and rates[top] == pytest.approx(1.0, abs=0.01)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True) and rates[-1] < 0.01


def test_patches_keep_their_size_and_vary(pictures):
    generator = torch.Generator().manual_seed(0)
    cut = [training.cut(pictures.photographs[0], None, 32, generator) for _ in range(8)]
    assert all(patch.shape == (3, 32, 32) for patch in cut)
    assert len({patch.sum().item() for patch in cut}) > 4
    small = [np.zeros((9, 40, 3), np.uint8)]
    assert training.cut(small, None, 32, generator).shape == (3, 32, 32)


def test_shares_cover_everything():
    assert sum(training.SHARES.values()) == pytest.approx(1)
    generator = torch.Generator().manual_seed(0)
    pixels = dict.fromkeys(training.SHARES, 0)
    for number in range(2000):
        wide = training.is_wide(number)
        kinds = training.draw_kinds(8, wide=wide, generator=generator)
        assert len(kinds) == (2 if wide else 8)
        for kind in kinds:
            assert wide == (kind in training.WIDE)
            pixels[kind] += 4 if wide else 1
    for kind, share in training.SHARES.items():
        assert pixels[kind] / 16_000 == pytest.approx(share, abs=0.04)


def test_wide_patches_have_twice_the_side(pictures):
    sides = set()
    for step in range(20):
        part = training.draw_part(pictures, SETTINGS, step, 0, torch.device("cpu"))
        wide = {list(Degradation)[index] for index in part.indices} <= set(training.WIDE)
        assert part.inputs.shape == part.targets.shape
        assert part.inputs.shape[-1] == SETTINGS.patch * (2 if wide else 1)
        assert part.weight * len(part.inputs) == pytest.approx(1)
        sides.add(part.inputs.shape[-1])
    assert len(sides) == 2


def test_parts_share_a_step(pictures, tmp_path):
    run = trainer(pictures, tmp_path, batch=20, part=8)
    assert training.parts_of(run.settings) == 3
    assert [training.part_size(run.settings, part) for part in range(3)] == [8, 8, 4]
    for step in range(4):
        parts = run.draw(step)
        sizes = [len(part.inputs) for part in parts]
        full = [2 if part.inputs.shape[-1] == 64 else 8 for part in parts]
        assert sizes[:2] == full[:2] and sizes[2] == full[2] // 2
        assert sum(part.weight * len(part.inputs) for part in parts) == pytest.approx(1)


def test_patches_are_varied_and_only_narrow_ones_blended(pictures, monkeypatch):
    seen = []
    varied = training.varied

    def look(pixels, photographs, generator, *, blend):
        seen.append((pixels.shape[-1], photographs, blend))
        return varied(pixels, photographs, generator, blend=blend)

    monkeypatch.setattr(training, "varied", look)
    for step in range(20):
        part = training.draw_part(pictures, SETTINGS, step, 0, torch.device("cpu"))
        assert len(seen[-1][1]) == len(part.inputs)
    assert {(side, blend) for side, _, blend in seen} == {(32, True), (64, False)}
    assert {each for _, photographs, _ in seen for each in photographs} == {True, False}


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_products_are_in_bfloat16_where_it_is_fast(pictures, tmp_path, monkeypatch, fast, dtype):
    monkeypatch.setattr(training, "fast_bfloat16", lambda: fast)
    run, seen = trainer(pictures, tmp_path), []
    monkeypatch.setattr(run, "backward", lambda restored, part: 0)

    def network(inputs, indices):
        seen.append(torch.is_autocast_enabled("cpu"))
        return inputs

    run.learn(network, range(1))
    assert seen == [fast] and run.optimizers[0].dtype is dtype


def test_recorded_steps_compute_what_eager_ones_do(pictures, tmp_path, monkeypatch):
    """What a graphics card records, run here without a recording: within bfloat16."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(training, "fast_bfloat16", lambda: False)
    eager, rounded = (trainer(pictures, tmp_path, batch=8, part=4) for _ in range(2))
    steps = RecordedSteps(rounded)
    for _ in range(4):
        expected = float(eager.train_step())
        rounded.set_learning_rate(training.learning_rate(rounded.settings, rounded.seen))
        found = float(steps.compute(rounded.draw(rounded.step)))
        rounded.step += 1
        assert found == pytest.approx(expected, rel=0.02)
    start = trainer(pictures, tmp_path).model.parameters()
    moved, apart = 0.0, 0.0
    for first, one, other in zip(
        start, eager.model.parameters(), rounded.model.parameters(), strict=True
    ):
        assert other.dtype == torch.float32
        moved += float((one - first).detach().square().sum())
        apart += float((one - other).detach().square().sum())
    assert 0 < apart < 0.1 * moved


def test_the_best_average_is_kept(pictures, tmp_path, monkeypatch):
    averages = {}
    scores = iter([20.0, 22.0, 21.0, 22.0, 23.0])

    def validate(model, pictures, device, kinds):
        score = next(scores)
        averages[score] = model.output.weight.detach().clone()
        return {"rain": score, "haze": score + 2}

    def best():
        kept = checkpoint.load(tmp_path / "run.best.safetensors").output.weight.detach()
        return min(averages, key=lambda score: float((averages[score] - kept).abs().max()))

    monkeypatch.setattr(training, "validate", validate)
    run = trainer(pictures, tmp_path, patches=12)
    run.run(every=4)
    assert run.best == {"patches": 8, "psnr": 23.0} and best() == 22
    resumed = trainer(pictures, tmp_path, patches=20)
    resumed.resume()
    assert resumed.best == run.best
    resumed.run(every=4)
    assert resumed.best == {"patches": 20, "psnr": 24.0} and best() == 23


def test_balance_weighs_small_errors_more_and_each_on_its_own():
    weights = training.balance(torch.tensor([0.02, 0.05, 0.2]))
    assert weights[0] > 3 * weights[2] and float(weights[1]) == pytest.approx(1)
    assert torch.equal(weights[:1], training.balance(torch.tensor([0.02])))


@pytest.mark.parametrize("workers", [2, 3])
def test_side_by_side_is_one_after_the_other(pictures, tmp_path, monkeypatch, workers):
    def three_steps(count):
        monkeypatch.setattr(torch, "get_num_threads", lambda: count)
        run = trainer(pictures, tmp_path, batch=20)
        assert len(run.replicas) == min(count, 3)
        with training.threads(len(run.replicas)) as pool:
            losses = [float(run.train_step(pool)) for _ in range(3)]
        return losses, run

    alone, single = three_steps(1)
    shared, several = three_steps(workers)
    assert shared == pytest.approx(alone, rel=1e-4)
    for one, other in zip(single.model.parameters(), several.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)
    again, _ = three_steps(workers)
    assert again == shared


def test_threads_that_come_after_a_training_are_as_before(pictures, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    def of_a_new_thread():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run = trainer(pictures, tmp_path, batch=20)
        assert len(run.replicas) == 2
        with training.threads(len(run.replicas)) as pool:
            assert pool.submit(torch.get_num_threads).result() == 1
        assert of_a_new_thread() == 2
    finally:
        torch.set_num_threads(usual)


def test_pictures_are_split_by_name(tmp_path):
    (tmp_path / "micrographs").mkdir()
    for number in range(50):
        folder = tmp_path / "micrographs" if number < 18 else tmp_path
        write_image(folder / f"{number}.png", np.full((64, 64), number, np.uint8))
    pictures = Pictures.load(tmp_path)
    assert (len(pictures.photographs), len(pictures.micrographs)) == (8, 2)
    held = {path.name for path, _ in pictures.validation}
    assert len(held) == 40 and not held & set(pictures.names)
    again = Pictures.load(tmp_path)
    assert [path for path, _ in again.validation] == [path for path, _ in pictures.validation]


def test_too_few_pictures_are_refused(tmp_path):
    write_image(tmp_path / "one.png", np.zeros((64, 64), np.uint8))
    with pytest.raises(ValueError, match=r"more than 1 pictures.*found 1"):
        Pictures.load(tmp_path)


def test_the_whole_command(tmp_path, monkeypatch, pictures):
    monkeypatch.setattr(training.DFPIRConfig, "compact", classmethod(lambda cls: SMALL_COMPACT))
    monkeypatch.setattr(training.Pictures, "load", classmethod(lambda cls, data: pictures))
    output = tmp_path / "new" / "weights.safetensors"
    facts = training.train(tmp_path, output, patches=8, batch=4, patch=32, device="cpu")
    assert facts["patches"] == 8 and set(facts["validation"]) >= {"rain", "noise-25, micrographs"}
    assert facts["best"]["patches"] == 8
    for path in (output, output.with_name("weights.best.safetensors")):
        assert checkpoint.load(path).config == SMALL_COMPACT
    log = json.loads(output.with_suffix(".json").read_text())
    assert log["files"] == pictures.names and log["log"][-1]["patches"] == 8
    assert output.with_suffix(".png").stat().st_size > 1000
    more = training.train(
        tmp_path, output, patches=12, batch=4, patch=32, device="cpu", resume=True
    )
    assert more["patches"] == 12
    trained = output.read_bytes()
    for kept in (output, output.with_suffix(".state")):
        with pytest.raises(ValueError, match=rf"{kept.name} exists\. .*--resume.*--overwrite"):
            training.train(tmp_path, output, patches=4, batch=4, patch=32, device="cpu")
        kept.rename(tmp_path / kept.name)
    (tmp_path / output.name).rename(output)
    assert output.read_bytes() == trained
    begun = training.train(
        tmp_path,
        tmp_path / "b.safetensors",
        patches=4,
        batch=4,
        patch=32,
        device="cpu",
        start=output,
    )
    assert begun["patches"] == 4


def test_the_reference_run_repeats(tmp_path, thorough):
    logged = json.loads(reference_run.LOG.read_text(encoding="utf-8"))["losses"]
    steps = reference_run.STEPS if thorough else 8
    found = reference_run.losses(steps, tmp_path / "run.state")
    assert reference_run.difference(found, logged[:steps]) <= 1e-3
