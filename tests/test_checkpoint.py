"""Files of weights: ours, the authors', and everything that is neither."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import SMALL, assert_equal, random_model
from dfpir import checkpoint
from dfpir.checkpoint import CheckpointError
from dfpir.degradation import Degradation

DATA = Path(__file__).parent / "data"
PLACES = [*(f"encoder_shuffle_channel{level}" for level in (1, 2, 3)), "latent_shuffle_channel"]


def published_weights(seed, folder=DATA, name="official_small"):
    """The weights behind the golden outputs, by formula from a seed."""
    shapes = json.loads((folder / f"{name}.keys.json").read_text())
    generator = np.random.default_rng(seed)
    weights = {}
    for key in sorted(shapes):
        shape = shapes[key]
        drawn = generator.standard_normal(shape).astype(np.float32)
        if key.endswith("attn4"):
            value = 0.2 + 0.05 * drawn
        elif key.endswith("temperature") or (key.endswith("body.weight") and len(shape) == 1):
            value = 1 + 0.1 * drawn
        elif key.endswith("bias"):
            value = 0.1 * drawn
        else:
            value = drawn / np.sqrt(np.prod(shape[1:]))
        weights[key] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    return weights


@pytest.fixture(scope="module")
def golden():
    return load_file(DATA / "official_small.safetensors")


@pytest.fixture(scope="module")
def codes(golden):
    return dict(zip(Degradation, golden["text_code"], strict=False))


@pytest.fixture(scope="module")
def published(codes):
    return checkpoint.from_published(published_weights(7), codes)


def test_channel_orders_are_the_authors(published, golden):
    for place, name in enumerate(PLACES):
        orders = published.perturbations[place].perturbation.permutations
        assert torch.equal(orders[:3], golden[f"perm_{name}"])


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("road", ["definition", "inference"])
def test_the_function_is_the_authors(published, golden, number, road):
    degradations = [list(Degradation)[number]] * 2
    with torch.no_grad():
        run = published.define if road == "definition" else published
        restored = run(golden["input"], degradations)
    assert_equal(restored, golden[f"output_{number}"])


def test_renaming_is_a_bijection(published):
    renamed = {
        checkpoint.rename(key)
        for key in published_weights(7)
        if not checkpoint.TEXT_PROJECTION.search(key)
    }
    ours = {key for key in published.state_dict() if not key.endswith("permutations")}
    assert renamed == ours


def test_a_missing_text_projection_is_named(codes):
    state = published_weights(7)
    del state["latent_shuffle_channel.linear_layer3.bias"]
    with pytest.raises(CheckpointError, match=r"latent_shuffle_channel\.linear_layer3\.bias"):
        checkpoint.from_published(state, codes)


def test_left_over_and_missing_keys_are_named(codes):
    state = published_weights(7)
    del state["output.weight"]
    state["surplus"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"missing output\.weight; unexpected surplus"):
        checkpoint.from_published(state, codes)


def test_text_codes_have_512_values():
    with pytest.raises(CheckpointError, match=r"'rain' has shape \(5,\).*\(512,\)"):
        checkpoint.from_published({}, {Degradation.RAIN: torch.zeros(5)})


@pytest.fixture
def saved(tmp_path):
    model = random_model(SMALL)
    path = tmp_path / "weights.safetensors"
    checkpoint.save(model, path)
    return model, path


def rewrite(path, *, drop=None, metadata=None, **changed):
    """Write the file anew with other tensors or another header."""
    with safe_open(path, "pt") as file:
        header = dict(file.metadata())
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors |= changed
    if drop:
        del tensors[drop]
    save_file(tensors, path, header | (metadata or {}))


def test_saved_weights_come_back(saved):
    model, path = saved
    loaded = checkpoint.load(path)
    assert loaded.config == model.config
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_files_have_the_permissions_of_any_new_file(saved, tmp_path):
    (tmp_path / "other").touch()
    assert saved[1].stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.fixture
def small(saved, tmp_path, monkeypatch):
    """A compressed file; here a thousand values are many."""
    monkeypatch.setattr(checkpoint, "MANY_VALUES", 1000)
    path = tmp_path / "small.safetensors"
    checkpoint.save(saved[0], path, compress=True)
    return path


def test_a_compressed_file_is_small_and_comes_back_nearly_the_same(saved, small, tmp_path):
    model, path = saved
    assert small.stat().st_size < 0.5 * path.stat().st_size
    loaded = checkpoint.load(small)
    stored = load_file(small)
    kinds = {value.dtype for key, value in stored.items() if not key.endswith(checkpoint.SCALE)}
    assert kinds == {torch.int8, torch.int16, torch.float16}
    for key, value in model.named_parameters():
        found = loaded.get_parameter(key)
        assert found.dtype == torch.float32
        # Half a step of 127, or 11 bits.
        largest = value.abs().amax(dim=tuple(range(1, value.ndim)), keepdim=True)
        bound = largest / 253 if value.numel() >= 1000 else value.abs() / 2000 + 1e-7
        assert ((found - value).abs() <= bound).all(), key
    again = tmp_path / "again.safetensors"
    checkpoint.save(loaded, again, compress=True)
    for key, value in load_file(again).items():
        torch.testing.assert_close(value, stored[key])  # compressed twice is compressed once


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(256, 256, 1, 1), (2**16,), (2, 2**15)])
def test_any_weights_can_be_compressed(dtype, shape):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    value[0] = 0
    found = checkpoint.expanded(checkpoint.compressed({"a": value}))["a"]
    assert float((found - value).abs().max()) <= float(value.abs().max()) / 250


def test_weights_that_are_not_finite_are_not_compressed():
    with pytest.raises(ValueError, match="a is not finite"):
        checkpoint.compressed({"a": torch.tensor([torch.nan])})


@pytest.mark.parametrize("expansion", ["Infinity", "1e400", "1" + 400 * "0"])
def test_endless_expansion_is_refused(saved, expansion):
    _, path = saved
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    text = json.dumps(config).replace(str(config["expansion"]), expansion)
    rewrite(path, metadata={"config": text})
    with pytest.raises(CheckpointError, match=str(path)):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "damage",
    [
        {"drop": f"latent.0.attention.qkv.weight{checkpoint.SCALE}"},
        {"drop": "latent.0.attention.qkv.weight"},
        {f"latent.0.attention.qkv.weight{checkpoint.SCALE}": torch.ones(192)},
        {f"latent.0.attention.qkv.weight{checkpoint.SCALE}": torch.full((192, 1, 1, 1), torch.inf)},
        {f"embed.weight{checkpoint.SCALE}": torch.ones(8, 1, 1, 1)},
        {f"latent.0.attention.qkv.weight{checkpoint.SCALE}": torch.ones(192, 1, 1, 1).double()},
        {f"latent.0.attention.qkv.weight{checkpoint.SCALE}": torch.ones(192, 1, 1, 1).short()},
        {f"orphan{checkpoint.SCALE}": torch.ones(8, 1, 1, 1, dtype=torch.int8)},
        {"embed.weight": torch.zeros((8, *[1] * 70), dtype=torch.int8)},
    ],
    ids=[
        "no scale",
        "scale alone",
        "shape",
        "infinite",
        "left over",
        "double",
        "integer",
        "orphan",
        "axes",
    ],
)
def test_scales_that_do_not_fit_are_refused(small, damage):
    rewrite(small, **damage)
    with pytest.raises(CheckpointError, match=str(small)):
        checkpoint.load(small)


def test_a_pickle_is_refused_and_explained(tmp_path):
    path = tmp_path / "weights.safetensors"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match=r"pickle, which can run code.*weights import"):
        checkpoint.load(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 64, b"\x10\0\0\0\0\0\0\0{}"])
def test_what_is_not_safetensors_is_refused(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        checkpoint.load(path)


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such weights file"):
        checkpoint.load(tmp_path / "absent.safetensors")


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not written by dfpir"):
        checkpoint.load(path)


def test_missing_tensors_are_named(saved):
    _, path = saved
    rewrite(path, drop="output.weight")
    with pytest.raises(CheckpointError, match=r"missing output\.weight"):
        checkpoint.load(path)


def test_wrong_shapes_are_named(saved):
    _, path = saved
    rewrite(path, **{"output.weight": torch.zeros(3, 16, 1, 1)})
    with pytest.raises(CheckpointError, match=r"output\.weight is \(3, 16, 1, 1\), expected"):
        checkpoint.load(path)


def test_a_channel_order_must_be_one(saved):
    model, path = saved
    name = "perturbations.0.perturbation.permutations"
    orders = torch.zeros_like(model.state_dict()[name], dtype=torch.int16)
    rewrite(path, **{name: orders})
    with pytest.raises(CheckpointError, match="not a table of permutations"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "lie",
    [
        {"width": 16},
        {"blocks": [10**9, 1, 1, 1]},
        {"heads": [1, 2, 4, 16]},
        {"expansion": 3.5},
        {"stem": 4},
    ],
)
def test_a_lying_configuration_is_refused(saved, lie):
    _, path = saved
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    rewrite(path, metadata={"config": json.dumps(config | lie)})
    with pytest.raises(CheckpointError, match=f"{next(iter(lie))} is .*, the tensors say"):
        checkpoint.load(path)


@pytest.mark.parametrize("config", ["", "[]", "{}", '{"expansion": "x"}'])
def test_an_unreadable_configuration_is_refused(saved, config):
    _, path = saved
    rewrite(path, metadata={"config": config})
    with pytest.raises(CheckpointError, match="configuration cannot be read"):
        checkpoint.load(path)


def test_published_files_are_read_without_running_code(tmp_path):
    path = tmp_path / "model.pth.tar"
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, path)
    assert list(checkpoint.read_published(path)) == ["a"]

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Trap()}, path)
    with pytest.raises(CheckpointError, match="can run code"):
        checkpoint.read_published(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[], {"epoch": 1}, {"state_dict": {"a": 1}}])
def test_published_files_need_a_state_dict(tmp_path, content):
    path = tmp_path / "model.pth.tar"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="no `state_dict` of tensors"):
        checkpoint.read_published(path)


def test_text_codes_are_named_after_degradations(tmp_path):
    path = tmp_path / "codes.safetensors"
    save_file({"rain": torch.ones(512)}, path)
    assert list(checkpoint.read_text_codes(path)) == [Degradation.RAIN]
    save_file({"snow": torch.ones(512)}, path)
    with pytest.raises(CheckpointError, match="snow"):
        checkpoint.read_text_codes(path)
