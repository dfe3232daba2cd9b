"""A training of 200 steps that anybody can repeat: a yardstick for changes of the training.

    python tests/reference_run.py [--write]

says how far the mean absolute error of its steps is from the one in
`tests/data/reference_run.json`, or writes that. One thread, a fixed seed, float32, photographs of
scikit-image.
"""

# ruff: noqa: T201 - a script; printing is what it is for

import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from skimage import data

from dfpir import training
from dfpir.model import DFPIRConfig
from dfpir.training import Pictures, Trainer, TrainingSettings, pyramid

LOG = Path(__file__).parent / "data" / "reference_run.json"

STEPS = 200

SETTINGS = TrainingSettings(patches=4 * STEPS, batch=4, patch=32, warmup=80, seed=7)


def losses(steps, state_file):
    """Return the mean absolute errors of the first steps."""
    photographs = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    micrographs = [np.repeat(data.microaneurysms()[..., None], 3, axis=-1)]
    pictures = Pictures(
        [pyramid(array, 96) for array in photographs],
        [pyramid(array, 96) for array in micrographs],
        validation=[],
    )
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with mock.patch.object(training, "fast_bfloat16", lambda: False):
            trainer = Trainer(
                DFPIRConfig.compact(), SETTINGS, pictures, torch.device("cpu"), state_file
            )
            return [float(trainer.train_step()) for _ in range(steps)]
    finally:
        torch.set_num_threads(usual)


def difference(found, expected):
    """Return the largest relative difference between two lists of errors."""
    return max(abs(a - b) / b for a, b in zip(found, expected, strict=True))


def main():
    found = losses(STEPS, Path("unused.state"))
    if sys.argv[1:] != ["--write"]:
        logged = json.loads(LOG.read_text(encoding="utf-8"))["losses"]
        print(f"largest relative difference from the log: {difference(found, logged):.2g}")
        return
    log = {"steps": STEPS, "torch": torch.__version__, "losses": [round(each, 7) for each in found]}
    LOG.write_text(json.dumps(log) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
