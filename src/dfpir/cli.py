"""The command line: restore, classify, weights, train, evaluate, benchmark, demo."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dfpir.degradation import CLEAN, Degradation
from dfpir.routing import MOST_STEPS

if TYPE_CHECKING:
    from typing import TypeAlias

    from dfpir.folders import Estimate, Job, Outcome
    from dfpir.model import Progress
    from dfpir.restorer import Restorer
    from dfpir.stacks import Step

    Commands: TypeAlias = "argparse._SubParsersAction[Parser]"

logger = logging.getLogger(__name__)

FAILED = 1
"""Exit status when a file could not be done."""
USAGE = 2
"""Exit status when the command itself does not make sense."""


class UsageError(Exception):
    """The command does not make sense; one line says why and what to do."""


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, then how to get help."""

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with status 2."""
        self.exit(USAGE, f"{self.prog}: {message}. See `{self.prog} --help`.\n")


def strength(text: str) -> float:
    """Read a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        message = f"expected a number from 0 to 1, found {text!r}"
        raise argparse.ArgumentTypeError(message)
    return value


def size(text: str) -> tuple[int, int]:
    """Read a height and a width such as 512x768."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        message = f"expected a height and a width such as 512x768, found {text!r}"
        raise argparse.ArgumentTypeError(message)
    return int(height), int(width)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = Parser(
        prog="dfpir",
        description="Find what degraded a picture, and restore it. Works offline.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
    add_restore(commands)
    add_classify(commands)
    add_weights(commands)
    add_train(commands)
    add_evaluate(commands)
    add_benchmark(commands)
    add_demo(commands)
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the choice of weights and device."""
    parser.add_argument(
        "--weights", metavar="NAME|PATH", help="a name of `dfpir weights list`, or a file"
    )
    parser.add_argument(
        "--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps, xpu"
    )


def add_restore(commands: Commands) -> None:
    """Add `dfpir restore`."""
    parser = commands.add_parser("restore", help="restore pictures")
    parser.add_argument(
        "inputs", nargs="+", type=Path, metavar="IN", help="pictures, folders, a .zarr"
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        type=Path,
        metavar="OUT",
        help="a picture's name for one input, a .zarr for a .zarr; a folder otherwise",
    )
    parser.add_argument(
        "--degradation",
        default="auto",
        choices=["auto", *(member.value for member in Degradation)],
        help="what to remove (default: let the classifier say)",
    )
    parser.add_argument(
        "--strength",
        type=strength,
        default=1.0,
        metavar="0..1",
        help="0 keeps the input, 1 restores fully (default)",
    )
    parser.add_argument(
        "--ensemble",
        action="store_true",
        help="take the mean over eight flips and turns: a little better, eight times slower",
    )
    parser.add_argument(
        "--steps",
        type=int,
        choices=range(1, MOST_STEPS + 1),
        default=1,
        help="with auto: look again after restoring, and go on with what else is found",
    )
    parser.add_argument(
        "--compare", action="store_true", help="also write <name>-compare.png, before and after"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    add_recursive(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="leave out what an earlier run into OUT has done or failed at",
    )
    parser.add_argument(
        "--retry-failed", action="store_true", help="resume, and try again what has failed"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done, and how long it would take"
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write what became of each file, as JSON"
    )
    parser.add_argument(
        "--block",
        type=int,
        metavar="N",
        help="side of the blocks of a .zarr in pixels (default: about 1024; larger for clusters)",
    )
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="let a Dask cluster restore one .zarr picture, e.g. tcp://10.0.0.1:8786",
    )
    add_device(parser)
    parser.set_defaults(run=run_restore)


def add_recursive(parser: argparse.ArgumentParser) -> None:
    """Add the choice to look into subfolders."""
    parser.add_argument("--recursive", action="store_true", help="look into subfolders too")


def add_classify(commands: Commands) -> None:
    """Add `dfpir classify`."""
    parser = commands.add_parser("classify", help="say what is wrong with pictures")
    parser.add_argument("inputs", nargs="+", type=Path, metavar="IN", help="pictures or folders")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    add_recursive(parser)
    parser.set_defaults(run=run_classify)


def add_weights(commands: Commands) -> None:
    """Add `dfpir weights list|verify|import|path`."""
    parser = commands.add_parser("weights", help="list, verify, find or import weights")
    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=Parser)
    listing = actions.add_parser("list", help="show what there is")
    listing.set_defaults(run=run_weights_list)
    verifying = actions.add_parser("verify", help="compare files with their hashes and load them")
    verifying.add_argument("names", nargs="*", metavar="NAME", help="default: all that are here")
    verifying.set_defaults(run=run_weights_verify)
    finding = actions.add_parser("path", help="print where a weights file is")
    finding.add_argument("name", nargs="?", metavar="NAME", help="default: the default weights")
    finding.set_defaults(run=run_weights_path)
    importing = actions.add_parser("import", help="convert a published .pth.tar to safetensors")
    importing.add_argument("file", type=Path, metavar="FILE")
    importing.add_argument(
        "--text-codes",
        required=True,
        type=Path,
        metavar="CODES.safetensors",
        help="CLIP text codes, one tensor of 512 values named after each degradation",
    )
    importing.add_argument("-o", "--output", type=Path, help="default: FILE's name, .safetensors")
    importing.add_argument("--overwrite", action="store_true")
    importing.set_defaults(run=run_weights_import)


def add_train(commands: Commands) -> None:
    """Add `dfpir train`."""
    parser = commands.add_parser("train", help="train weights on a folder of sharp pictures")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="OUT.safetensors", help="the weights"
    )
    parser.add_argument("--preset", choices=["compact", "paper"], help="default: compact")
    parser.add_argument("--patches", type=int, metavar="N", help="patches to see in all")
    parser.add_argument("--batch", type=int, metavar="N", help="patches per step")
    parser.add_argument("--part", type=int, metavar="N", help="patches computed together")
    parser.add_argument("--patch", type=int, metavar="N", help="side of a patch in pixels")
    parser.add_argument("--learning-rate", type=float, metavar="X")
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument("--device", metavar="DEVICE")
    parser.add_argument("--resume", action="store_true", help="go on from OUT's .state file")
    parser.add_argument(
        "--overwrite", action="store_true", help="begin anew where OUT or its .state file exists"
    )
    parser.add_argument(
        "--from",
        dest="start",
        metavar="NAME|PATH",
        help="start from these weights; a classifier takes over their first levels",
    )
    parser.add_argument(
        "--classifier", action="store_true", help="train the classifier, not the network"
    )
    parser.add_argument(
        "--specialist",
        metavar="KIND",
        help="train first levels that are for noise, rain, haze, blur or low-light alone, and add "
        "them to the weights of --from",
    )
    parser.add_argument(
        "--levels",
        type=int,
        metavar="N",
        help="first levels of a specialist's own (default: as many as it has in --from, or 2)",
    )
    parser.set_defaults(run=run_train)


def add_evaluate(commands: Commands) -> None:
    """Add `dfpir evaluate`."""
    parser = commands.add_parser("evaluate", help="score weights on public pictures")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the scores as JSON too")
    parser.add_argument(
        "--fill",
        type=Path,
        metavar="README",
        help="put the table between its lines <!-- scores --> (verdicts, mixtures)",
    )
    parser.add_argument("--sets", nargs="+", metavar="SET", help="default: all in DIR")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--verdicts", action="store_true", help="score the classifier instead, and restore nothing"
    )
    what.add_argument(
        "--mixtures", action="store_true", help="score auto on mixtures of two degradations instead"
    )
    parser.add_argument(
        "--blind",
        nargs="?",
        type=int,
        choices=range(1, MOST_STEPS + 1),
        const=1,
        default=0,
        metavar="STEPS",
        help="also restore untold, as the classifier decides, in so many steps at the most (1)",
    )
    parser.add_argument(
        "--classical", action="store_true", help="also score the best classical tool"
    )
    add_device(parser)
    parser.set_defaults(run=run_evaluate)


def add_benchmark(commands: Commands) -> None:
    """Add `dfpir benchmark`."""
    parser = commands.add_parser("benchmark", help="measure speed, memory and agreement here")
    parser.add_argument(
        "--presets", nargs="+", metavar="NAME", help="paper, compact, specialist (default: all)"
    )
    parser.add_argument("--sizes", nargs="+", type=size, metavar="HxW", help="sizes of pictures")
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", help="plain, compiled, dfpir (default: all)"
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="times each is run (default: 5)")
    parser.add_argument("--device", default="auto", metavar="DEVICE")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the times")
    parser.add_argument(
        "--fill", type=Path, metavar="README", help="put the table between its lines <!-- speed -->"
    )
    parser.set_defaults(run=run_benchmark)


def add_demo(commands: Commands) -> None:
    """Add `dfpir demo`."""
    parser = commands.add_parser("demo", help="degrade, diagnose and restore bundled pictures")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("dfpir-demo"), metavar="DIR", help="a folder"
    )
    add_device(parser)
    parser.set_defaults(run=run_demo)


def say(line: str) -> None:
    """Print a line of results."""
    print(line, flush=True)


def complain(line: str) -> None:
    """Print a line about a failure or a note to standard error."""
    print(line, file=sys.stderr, flush=True)


def complain_notes(error: BaseException) -> None:
    """Print what was noted on an error."""
    for note in getattr(error, "__notes__", ()):
        complain(note)


class Bar:
    """A progress bar for work measured as (done, total), shown after half a second."""

    def __init__(self, description: str) -> None:
        from tqdm import tqdm

        self.bar = tqdm(desc=description, delay=0.5, leave=False, disable=not sys.stderr.isatty())

    def __enter__(self) -> Progress:
        return self.update

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, done: int, total: int) -> None:
        """Show `done` of `total`."""
        self.bar.total = total
        self.bar.update(done - self.bar.n)


def show_failures(failures: Sequence[str], total: int, doing: str) -> int:
    """List the files that failed, if there were several files; return the exit status."""
    if failures and total > 1:
        complain(f"{len(failures)} of {total} pictures could not be {doing}:")
        for reason in failures:
            complain(f"  {reason}")
    return FAILED if failures else 0


def run_restore(options: argparse.Namespace) -> int:
    """Carry out `dfpir restore`."""
    from dfpir.folders import PlanError
    from dfpir.zarr_files import is_zarr

    if any(map(is_zarr, options.inputs)) or options.scheduler:
        return restore_slide(options)
    try:
        return restore_pictures(options)
    except PlanError as error:
        raise UsageError(str(error)) from error


def restore_slide(options: argparse.Namespace) -> int:
    """Restore one zarr array or OME-Zarr picture; see `dfpir.zarr_files`."""
    from dfpir.zarr_files import DONE_BEFORE, is_zarr, restore_zarr

    unfit = [
        name
        for name in (
            "ensemble",
            "compare",
            "recursive",
            "retry_failed",
            "dry_run",
            "report",
        )
        if getattr(options, name)
    ]
    unfit += ["steps"] if options.steps > 1 else []
    if len(options.inputs) != 1 or not is_zarr(options.inputs[0]):
        message = "a .zarr is restored alone, and --scheduler is for one; name one .zarr folder"
        raise UsageError(message)
    if unfit:
        message = f"--{unfit[0].replace('_', '-')} is for pictures, not for a .zarr; leave it out"
        raise UsageError(message)
    source = options.inputs[0]
    doing = ""
    with Bar(source.name) as progress:

        def show(step: Step) -> None:
            nonlocal doing
            doing = step.doing
            progress(round(1000 * step.fraction), 1000)

        done = restore_zarr(
            source,
            options.output,
            options.degradation,
            scheduler=options.scheduler,
            block=options.block,
            overwrite=options.overwrite,
            resume=options.resume,
            weights=options.weights,
            device=options.device,
            strength=options.strength,
            on_step=show,
        )
    if doing == DONE_BEFORE:
        say(f"{options.output} was done before.")
        return 0
    say(f"{source} -> {options.output}: {done.summary}")
    return 0


def restore_pictures(options: argparse.Namespace) -> int:
    """Plan, restore and report; see `dfpir.folders`."""
    from dfpir import folders

    jobs = folders.plan(options.inputs, options.output, recursive=options.recursive)
    single = jobs[0].target == options.output
    for name in ("resume", "retry_failed") if single else ():
        if getattr(options, name):
            option = name.replace("_", "-")
            message = f"--{option} needs an output folder, which holds the journal; name one by -o"
            raise UsageError(message)
    if options.block is not None:
        message = "--block is for a .zarr, which is restored block by block; leave it out"
        raise UsageError(message)
    settings = folders.Settings(
        degradation=options.degradation,
        strength=options.strength,
        ensemble=options.ensemble,
        most_steps=options.steps,
        compare=options.compare,
        overwrite=options.overwrite,
        resume=options.resume or options.retry_failed,
        retry_failed=options.retry_failed,
    )
    journal = None if single else folders.Journal(options.output)
    folders.check(jobs, settings, journal)
    if options.report and not options.report.parent.is_dir():
        message = f"--report: there is no folder {options.report.parent}; make it first"
        raise UsageError(message)
    restorer = load_restorer(options)
    if options.dry_run:
        jobs = folders.left_to_do(jobs, restorer, settings, journal)
        in_strips = restorer.device.type != "cpu"
        return show_estimate(jobs, folders.estimate(jobs, restorer, settings), in_strips=in_strips)
    report, started = folders.Report(), time.monotonic()
    try:
        for outcome in folders.restore_files(
            jobs,
            restorer,
            settings,
            journal=journal,
            progress_of=lambda job: Bar(job.source.name),
        ):
            report.outcomes.append(outcome)
            show_outcome(outcome)
    finally:
        report.seconds = time.monotonic() - started
        if options.report:
            text = json.dumps(report.as_dict(), indent=2) + "\n"
            options.report.write_text(text, encoding="utf-8")
        left = len(jobs) - len(report.outcomes)
        if left and len(jobs) > 1:
            complain(f"{left} of {len(jobs)} pictures are left; go on with --resume.")
    skipped = sum(outcome.status == "skipped" for outcome in report.outcomes)
    if skipped:
        say(f"{skipped} of {len(jobs)} pictures were done before.")
    return show_failures([each.text for each in report.failed], len(jobs), "restored")


def show_outcome(outcome: Outcome) -> None:
    """Say what became of one file."""
    for note in outcome.notes:
        complain(note)
    if outcome.status == "failed":
        complain(f"failed: {outcome.text}")
    elif outcome.status != "skipped":
        say(f"{outcome.job.source} -> {outcome.job.target}: {outcome.text}")


def show_estimate(jobs: Sequence[Job], estimate: Estimate, *, in_strips: bool) -> int:
    """Say what would be done, and what it would take, at once or, where that may be, in strips."""
    for job in jobs:
        say(f"{job.source} -> {job.target}")
    for line in estimate.unreadable:
        complain(f"would fail: {line}")
    minutes = estimate.seconds / 60
    lasting = f"{minutes:.0f} min" if minutes >= 2 else f"{estimate.seconds:.0f} s"
    less = ", or less in strips" if in_strips else ""
    say(
        f"{estimate.pictures} pictures, {estimate.megapixels:.1f} megapixels: about {lasting} "
        f"here if all are restored; the largest takes {estimate.memory / 1e6:,.0f} MB{less}. "
        "Nothing was written."
    )
    return FAILED if estimate.unreadable else 0


def run_classify(options: argparse.Namespace) -> int:
    """Carry out `dfpir classify`."""
    from dfpir.files import find_images, read_image
    from dfpir.record import describe
    from dfpir.restorer import classify

    paths = find_images(options.inputs, recursive=options.recursive)
    failures = []
    for path in paths:
        try:
            diagnosis = classify(read_image(path).array)
        except ValueError as error:
            failures.append(str(error) if str(path) in str(error) else f"{path}: {error}")
            complain(f"failed: {failures[-1]}")
            continue
        if options.json:
            say(json.dumps({"file": str(path), **describe(diagnosis)}))
            continue
        ranked = sorted(diagnosis.probabilities.items(), key=lambda item: -item[1])[:3]
        likely = ", ".join(f"{name} {p:.0%}" for name, p in ranked)
        found = diagnosis.degradation.value if diagnosis.degradation else CLEAN
        verdict = f"unsure, perhaps {found}" if diagnosis.verdict == "unsure" else found
        say(f"{path}: {verdict} ({likely})")
    return show_failures(failures, len(paths), "diagnosed")


def run_weights_list(options: argparse.Namespace) -> int:
    """Carry out `dfpir weights list`."""
    from dfpir import weights

    defaults = {weights.default_name(role) for role in ("restorer", "classifier")}
    absent = False
    for entry in weights.entries():
        here = "here" if weights.locate(entry) else "absent"
        mark = "*" if entry.name in defaults else " "
        say(f"{mark} {entry.name:<24} {entry.role:<10} {entry.source:<8} {here:<6} {entry.licence}")
        say(f"    {entry.summary}")
        if here == "absent" and entry.source == "bundled":
            say("    It belongs to dfpir and is missing: install dfpir again.")
        elif here == "absent":
            say(f"    Get it by hand from {entry.page}, then: {entry.facts['command']}")
            absent = True
    say("* used by default")
    if absent:
        say("What is got by hand is found by its name in the folder that DFPIR_WEIGHTS names.")
    return 0


def run_weights_verify(options: argparse.Namespace) -> int:
    """Carry out `dfpir weights verify`."""
    from dfpir import weights
    from dfpir.checkpoint import load
    from dfpir.classifier import load_classifier

    chosen = [weights.find_entry(name) for name in options.names] or [
        entry for entry in weights.entries() if weights.locate(entry)
    ]
    failed = 0
    for entry in chosen:
        try:
            path = weights.verified(entry)
            (load_classifier if entry.role == "classifier" else load)(path)
            say(f"{entry.name}: right ({path.stat().st_size:,} bytes, SHA-256 {entry.sha256})")
        except ValueError as error:
            complain(f"failed: {error}")
            failed = FAILED
    return failed


def run_weights_path(options: argparse.Namespace) -> int:
    """Carry out `dfpir weights path`."""
    from dfpir import weights

    say(str(weights.resolve(options.name)))
    return 0


def run_weights_import(options: argparse.Namespace) -> int:
    """Carry out `dfpir weights import`."""
    from dfpir import checkpoint

    stem = options.file.name.removesuffix(".tar").removesuffix(".pth")
    output = options.output or options.file.with_name(f"{stem}.safetensors")
    if output.exists() and not options.overwrite:
        message = f"{output} exists; add --overwrite to replace it, or name another -o"
        raise UsageError(message)
    codes = checkpoint.read_text_codes(options.text_codes)
    model = checkpoint.from_published(checkpoint.read_published(options.file), codes)
    checkpoint.save(model, output, metadata={"imported_from": options.file.name})
    names = ", ".join(degradation.value for degradation in model.config.degradations)
    say(f"{output}: written, for {names}. Use it with `--weights {output}`.")
    return 0


NETWORK_OPTIONS = (
    "preset",
    "batch",
    "part",
    "patch",
    "learning_rate",
    "device",
    "specialist",
    "levels",
)
"""Options of `dfpir train` that mean nothing to a classifier."""


def run_train(options: argparse.Namespace) -> int:
    """Carry out `dfpir train`."""
    if not options.data.is_dir():
        message = f"--data {options.data} is not a folder; name one with sharp pictures"
        raise UsageError(message)
    if options.output.suffix != ".safetensors":
        message = f"--output {options.output} should end in .safetensors"
        raise UsageError(message)
    for name in ("patches", "batch", "part", "patch", "levels"):
        value = getattr(options, name)
        if value is not None and value < 1:
            message = f"--{name} is {value}; expected 1 or more"
            raise UsageError(message)
    rate = options.learning_rate
    if rate is not None and not 0 < rate < math.inf:
        message = f"--learning-rate is {rate}; expected a number above 0"
        raise UsageError(message)
    for name in NETWORK_OPTIONS if options.classifier else ():
        if getattr(options, name) is not None:
            option = name.replace("_", "-")
            message = f"--{option} is for the network, not for the classifier; leave it out"
            raise UsageError(message)
    if options.levels is not None and not options.specialist:
        message = "--levels is for a specialist; name it with --specialist"
        raise UsageError(message)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.resume and options.overwrite:
        message = "--resume goes on from what is there, --overwrite does away with it; choose one"
        raise UsageError(message)
    if options.classifier:
        from dfpir.classifier_training import train_classifier

        given = {"patches": options.patches, "seed": options.seed}
        facts = train_classifier(
            options.data,
            options.output,
            resume=options.resume,
            overwrite=options.overwrite,
            network=options.start,
            **{name: value for name, value in given.items() if value is not None},
        )
    else:
        from dfpir.training import train

        chosen = {name: getattr(options, name) for name in (*NETWORK_OPTIONS, "patches", "seed")}
        facts = train(
            options.data,
            options.output,
            resume=options.resume,
            overwrite=options.overwrite,
            start=options.start,
            **{name: value for name, value in chosen.items() if value is not None},
        )
    say(json.dumps(facts, indent=2))
    return 0


def load_restorer(options: argparse.Namespace) -> Restorer:
    """Return the restorer that --weights and --device ask for."""
    from dfpir.restorer import Restorer

    return Restorer(options.weights, device=options.device)


def run_evaluate(options: argparse.Namespace) -> int:
    """Carry out `dfpir evaluate`."""
    from dfpir.evaluation import evaluate, table

    if options.verdicts or options.mixtures:
        return run_special_evaluation(options)
    restorer = load_restorer(options)
    with Bar("evaluating") as progress:
        evaluation = evaluate(
            options.data,
            restorer=restorer,
            sets=options.sets,
            blind=options.blind,
            classically=options.classical,
            on_progress=progress,
        )
    say(evaluation.markdown())
    facts = evaluation.as_dict()
    write_scores(options, facts, "scores", table(facts, timed=False))
    return 0


def run_special_evaluation(options: argparse.Namespace) -> int:
    """Carry out `dfpir evaluate --verdicts` or `--mixtures`."""
    from dfpir.mixtures import MixtureEvaluation, evaluate_mixtures
    from dfpir.verdicts import Verdicts, evaluate_verdicts

    name = "verdicts" if options.verdicts else "mixtures"
    unfit = (
        ["blind", "classical", "weights"] if options.verdicts else ["blind", "classical", "sets"]
    )
    for option in unfit:
        if getattr(options, option):
            message = f"--{option} does not go with --{name}; leave it out"
            raise UsageError(message)
    found: Verdicts | MixtureEvaluation
    with Bar("judging" if options.verdicts else "evaluating") as progress:
        if options.verdicts:
            found = evaluate_verdicts(options.data, sets=options.sets, on_progress=progress)
        else:
            restorer = load_restorer(options)
            found = evaluate_mixtures(options.data, restorer=restorer, on_progress=progress)
    say(found.markdown())
    write_scores(options, found.as_dict(), name, found.markdown())
    return 0


def write_scores(options: argparse.Namespace, facts: dict[str, Any], name: str, table: str) -> None:
    """Write scores as JSON and into a document, where that is asked for."""
    from dfpir.markdown import fill

    if options.json:
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if options.fill:
        fill(options.fill, name, table)


def run_benchmark(options: argparse.Namespace) -> int:
    """Carry out `dfpir benchmark`."""
    from dfpir import benchmark
    from dfpir.markdown import fill
    from dfpir.restorer import choose_device

    given = {name: getattr(options, name) for name in ("presets", "sizes", "variants", "repeats")}
    with Bar("measuring") as progress:
        report = benchmark.run_benchmark(
            device=choose_device(options.device),
            memory=not options.no_memory,
            on_progress=progress,
            **{name: value for name, value in given.items() if value is not None},
        )
    say(report.markdown())
    if options.json:
        benchmark.write_json(report, options.json)
    if options.plot:
        benchmark.plot(report, options.plot)
    if options.fill:
        fill(options.fill, "speed", report.markdown())
    return 0


def run_demo(options: argparse.Namespace) -> int:
    """Carry out `dfpir demo`."""
    from dfpir.demo import run_demo as demonstrate

    restorer = load_restorer(options)
    with Bar("restoring") as progress:
        report = demonstrate(options.output, restorer=restorer, on_progress=progress)
    for line in report.lines():
        say(line)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 (files failed) or 2 (usage).

    Parameters
    ----------
    arguments : sequence of str, optional
        Those of the process by default.
    """
    # It warns of damage that the refusal of the file tells anyway.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.version:
        from dfpir.record import package_version

        say(f"dfpir {package_version()}")
        return 0
    if not hasattr(options, "run"):
        parser.print_help()
        return USAGE
    try:
        status: int = options.run(options)
    except UsageError as error:
        complain(f"dfpir: {error}.")
        return USAGE
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        complain(f"dfpir: {str(error) or type(error).__name__}")
        complain_notes(error)
        return FAILED
    except KeyboardInterrupt as error:
        complain("dfpir: stopped.")
        complain_notes(error)
        return 130
    return status
