"""What all tests share: tolerances, small networks, pictures."""

import os

import numpy as np
import pytest
import torch

from dfpir import checkpoint
from dfpir.degradation import Degradation
from dfpir.model import DFPIR, DFPIRConfig

if not torch.cuda.is_available():
    # Triton decides when it is imported whether kernels are compiled or interpreted.
    os.environ["TRITON_INTERPRET"] = "1"

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 5e-2,
    torch.float16: 5e-3,
}
"""Largest relative L2 distance at which two results count as equal, by precision."""

SMALL = DFPIRConfig(width=8, blocks=(1, 1, 1, 1), refinement_blocks=1)
SMALL_COMPACT = DFPIRConfig(
    width=8,
    blocks=(1, 1, 1, 1),
    refinement_blocks=1,
    expansion=2.0,
    stem=2,
    perturbation_skip=True,
)


def distance(found, expected):
    """Relative L2 distance."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def assert_equal(found, expected, dtype=torch.float32):
    assert found.shape == expected.shape
    assert distance(found, expected) <= TOLERANCE[dtype]


def random_model(config, seed=0):
    """A network whose every parameter is away from its initial value."""
    torch.manual_seed(seed)
    model = DFPIR(config)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn_like(value))
        for block in model.perturbations:
            for row in block.perturbation.permutations:
                row.copy_(torch.randperm(len(row)))
    return model.eval()


def pytest_addoption(parser):
    parser.addoption(
        "--thorough",
        action="store_true",
        help="more damaged files, kills and repeated restores than a quick run tries",
    )


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def thorough(request):
    """Whether to try many more cases."""
    return request.config.getoption("--thorough")


@pytest.fixture(params=[SMALL, SMALL_COMPACT], ids=["paper-like", "compact-like"])
def model(request):
    return random_model(request.param)


@pytest.fixture
def tiny_model():
    return random_model(SMALL_COMPACT).requires_grad_(False)


@pytest.fixture
def tiny_weights(tiny_model, tmp_path):
    """A file of tiny weights."""
    path = tmp_path / "tiny.safetensors"
    checkpoint.save(tiny_model, path)
    return path


@pytest.fixture(scope="session")
def photograph():
    """A colour photograph, (128, 160, 3) of uint8."""
    from skimage.data import astronaut

    return np.ascontiguousarray(astronaut()[:128, 150:310])


@pytest.fixture
def both():
    return [Degradation.RAIN, Degradation.HAZE]
