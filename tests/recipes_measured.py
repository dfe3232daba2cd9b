"""Short trainings of equal length, by which a recipe is chosen.

    python tests/recipes_measured.py DATA [--seconds 300] [--only NAME ...] [--json FILE]
                                     [--fill FILE]

Each recipe starts from the same seed and trains for so many seconds of one processor core, two of
them side by side; what is slow has fewer steps. DATA is a folder as `dfpir train --data` takes it.
Printed is the PSNR of the averaged weights on the validation pictures, by task and in the mean,
which `--json` writes too; `--fill` puts the table into a page, between the marks of "recipes". So
short a training tells which recipes learn fast, and no more.
"""

# ruff: noqa: T201 - a script; printing is what it is for

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from dfpir import markdown, training
from dfpir.degradation import NOISES
from dfpir.model import DFPIRConfig, _Definition
from dfpir.training import Pictures, Trainer, TrainingSettings, draw_part, validate

SETTINGS = TrainingSettings(patches=1, warmup=400, average=0.995, seed=1)
"""Patches follow from the time."""


class Unweighted(Trainer):
    """Every task's error counts by itself."""

    def backward(self, restored, part):
        errors = (restored.float() - part.targets).abs().mean(dim=(1, 2, 3))
        (part.weight * errors).sum().backward()
        return part.weight * errors.detach().sum()


class Charbonnier(Trainer):
    """A smooth absolute error, and a tenth of that of the spectra."""

    def backward(self, restored, part):
        difference = restored.float() - part.targets
        smooth = (difference.square() + 1e-6).sqrt().mean(dim=(1, 2, 3))
        spectrum = torch.fft.rfft2(difference, norm="ortho").abs().mean(dim=(1, 2, 3))
        errors = difference.abs().mean(dim=(1, 2, 3)).detach()
        (part.weight * (smooth + 0.1 * spectrum) * training.balance(errors)).sum().backward()
        return part.weight * errors.sum()


class Adam(Trainer):
    """AdamW for the matrices too."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        settings = self.settings
        rate = torch.tensor(settings.learning_rate)
        self.optimizers = [
            torch.optim.AdamW(
                self.model.parameters(),
                lr=rate,
                betas=(0.9, 0.99),
                weight_decay=settings.weight_decay,
                fused=True,
            )
        ]


def name_degradations(trainer, seconds):
    """Let the encoder learn first to name the degradation, from all of its levels.

    References
    ----------
    .. [1] Hu et al., "Universal image restoration pre-training via degradation classification",
       ICLR 2025.
    """
    config = trainer.config
    wide = sum(config.channels(depth) for depth in range(3))
    head = nn.Linear(wide, len(config.degradations))
    learnt = [*trainer.model.embed.parameters(), *trainer.model.encoder.parameters()]
    learnt += [*trainer.model.down[:2].parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(learnt, lr=5e-4)
    step, started = 0, time.process_time()
    while time.process_time() - started < seconds:
        part = draw_part(trainer.pictures, trainer.settings, 10**6 + step, 0, trainer.device)
        with torch.autocast("cpu", torch.bfloat16, enabled=trainer.bfloat16):
            levels = trainer.model.descend(part.inputs, _Definition(part.indices))
            seen = torch.cat([features.float().mean(dim=(2, 3)) for features in levels], dim=1)
        optimizer.zero_grad()
        F.cross_entropy(head(seen), part.indices).backward()
        optimizer.step()
        step += 1
    trainer.average.load_state_dict(trainer.model.state_dict())


@dataclass(frozen=True)
class Recipe:
    """What differs from the usual."""

    config: dict[str, object] = field(default_factory=dict)
    settings: dict[str, float] = field(default_factory=dict)
    trainer: type[Trainer] = Trainer
    first: Callable[[Trainer, float], None] | None = None


RECIPES = {
    "as it is": Recipe(),
    "another seed": Recipe(settings={"seed": 2}),
    "narrower, deeper": Recipe({"width": 24, "blocks": (2, 3, 3, 4)}),
    "wider, shallower": Recipe({"width": 48, "blocks": (1, 1, 1, 1)}),
    "full resolution": Recipe({"width": 16, "stem": 1}),
    "patches of 96": Recipe(settings={"patch": 96, "batch": 8, "part": 4}),
    "patches of 128": Recipe(settings={"patch": 128, "batch": 4, "part": 4}),
    "batch of 4": Recipe(settings={"batch": 4, "part": 4}),
    "batch of 64": Recipe(settings={"batch": 64}),
    "learning rate 0.0003": Recipe(settings={"learning_rate": 3e-4}),
    "learning rate 0.003": Recipe(settings={"learning_rate": 3e-3}),
    "AdamW alone": Recipe(trainer=Adam),
    "tasks unweighted": Recipe(trainer=Unweighted),
    "Charbonnier, frequencies": Recipe(trainer=Charbonnier),
    "degradations named first": Recipe(first=name_degradations),
}


def train(name, data, seconds):
    """Train by one recipe for so many seconds of this core; return what came of it."""
    torch.set_num_threads(1)
    recipe = RECIPES[name]
    trainer = recipe.trainer(
        replace(DFPIRConfig.compact(), **recipe.config),
        replace(SETTINGS, **recipe.settings),
        Pictures.load(data),
        torch.device("cpu"),
        Path("unused.state"),
    )
    started = time.process_time()
    if recipe.first is not None:
        recipe.first(trainer, seconds / 4)
    used = time.process_time() - started
    errors = []
    begun = used
    while used < seconds:
        # The learning rate falls with the time that is left, whatever a step takes.
        progress = (used - begun) / (seconds - begun)
        patches = round(trainer.seen / progress) if trainer.step > 10 else 10**6
        trainer.settings = replace(trainer.settings, patches=patches)
        errors.append(trainer.train_step())
        used = time.process_time() - started
    scores = validate(trainer.average, trainer.pictures, trainer.device)
    settings = trainer.settings
    return {
        "name": name,
        "config": recipe.config,
        "settings": {**recipe.settings, "seed": settings.seed},
        "seconds": round(used, 1),
        "steps": trainer.step,
        "megapixels": round(trainer.seen * settings.patch**2 / 1e6, 1),
        "values": sum(value.numel() for value in trainer.model.parameters()),
        "error": round(training.mean_of(errors[-50:]), 5),
        "psnr": scores,
        "mean": round(sum(scores.values()) / len(scores), 3),
    }


TASKS = {
    "noise": tuple(kind.value for kind in NOISES),
    "rain": ("rain",),
    "haze": ("haze",),
    "blur": ("blur",),
    "low light": ("low-light",),
    "micrographs": tuple(f"{kind.value}, micrographs" for kind in NOISES),
}
"""Columns of the table, and of which scores each is the mean."""


def line(found):
    """Return a row of the table."""
    scores = [sum(found["psnr"][kind] for kind in kinds) / len(kinds) for kinds in TASKS.values()]
    cells = [
        found["name"],
        str(found["settings"]["seed"]),
        f"{found['values'] / 1e6:.1f}",
        str(found["steps"]),
        f"{found['megapixels']:.1f}",
        *(f"{score:.2f}" for score in scores),
        f"{found['mean']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def table(runs):
    """Return all rows, the best first."""
    titles = ["recipe", "seed", "values, million", "steps", "megapixels", *TASKS, "mean"]
    rows = sorted(runs, key=lambda found: -found["mean"])
    return "\n".join(
        [
            f"| {' | '.join(titles)} |",
            f"| --- |{' ---: |' * (len(titles) - 1)}",
            *map(line, rows),
            "",
            f"PSNR in dB on the validation pictures; {rows[0]['seconds']:.0f} s of a core each.",
        ]
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), metavar="NAME")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--fill", type=Path)
    options = parser.parse_args()
    runs = []
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        names = options.only or list(RECIPES)
        waiting = [pool.submit(train, name, options.data, options.seconds) for name in names]
        for future in as_completed(waiting):
            runs.append(future.result())
            print(line(runs[-1]), flush=True)
            if options.json:
                facts = {"torch": torch.__version__, "settings": asdict(SETTINGS), "runs": runs}
                options.json.write_text(json.dumps(facts, indent=1) + "\n")
    if options.fill:
        markdown.fill(options.fill, "recipes", table(runs))


if __name__ == "__main__":
    main()
