"""Speed and memory: the plain definition, its compilation and our passes, side by side.

All variants of a case run in one process, in turn, on the same weights and the same picture. A time
is reported only where the result equals the definition's, computed in double precision in the same
run: to a tolerance, or as nearly as the plain definition itself in the variant's precision. Memory
is measured in a process of its own.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dfpir.degradation import Degradation
from dfpir.model import DFPIR, DFPIRConfig, Progress
from dfpir.record import package_version
from dfpir.restorer import FREE_SHARE, free_memory, memory_needed

SIZES = ((256, 256), (512, 512), (1088, 1920), (2048, 2048))
"""Height and width of the default cases."""

PRESETS: dict[str, Callable[[], DFPIRConfig]] = {
    "paper": DFPIRConfig.paper,
    "compact": DFPIRConfig.compact,
    "specialist": DFPIRConfig.specialist,
}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest relative L2 distance from the definition that counts as equal."""

AS_NEAR = 1.1
"""A result counts as equal too if it is at most so many times as far off as the plain definition in
the same precision: with random weights and many pixels rounding alone exceeds the tolerance."""

LOOSEST = 10
"""But never if it is further off than so many times the tolerance."""

GEMM_SIDE = 2048
SLOW_GEMM = 5.0
"""GFLOP/s below which a precision is not looked at further."""

SECONDS = 120.0
"""A variant that has taken so long in a case is not repeated further."""

CHECK_ROWS = 64
"""Height of the strips in which the result to compare with is computed."""

CHECK_PIXELS = 512 * 512
"""Up to so many pixels the result to compare with a graphics card's comes from the processor."""


@dataclass(slots=True)
class Row:
    """One variant of one case.

    Attributes
    ----------
    preset, height, width, variant, dtype
        What was run; variants are plain, compiled and dfpir.
    seconds : list of float
        One for each repetition; empty where the result was not equal.
    error : float, optional
        Relative L2 distance from the definition.
    checked : str
        Precision of the result that it was compared with: "float64", or "float32" where that is
        too much (see `where_to_check`).
    share : float, optional
        Arithmetic of the definition over time, over the rate of matrix products measured in the
        same run.
    peak : int, optional
        Bytes at the peak, less those after loading and a small first run.
    note : str
        Why something is missing.
    """

    preset: str
    height: int
    width: int
    variant: str
    dtype: str
    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    checked: str = ""
    share: float | None = None
    peak: int | None = None
    note: str = ""

    @property
    def median(self) -> float | None:
        """Median of the times."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def spread(self) -> float | None:
        """Interquartile range of the times."""
        if len(self.seconds) < 2:
            return None
        quartiles = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return quartiles[2] - quartiles[0]


@dataclass(slots=True)
class Report:
    """Everything one run found.

    Attributes
    ----------
    rows : list of Row
    gemm : dict
        Rate of matrix products by precision, in GFLOP/s.
    machine : dict
        What it ran on, and with which versions.
    """

    rows: list[Row]
    gemm: dict[str, float]
    machine: dict[str, str]

    def as_dict(self) -> dict[str, object]:
        """Return plain values, ready for JSON."""
        rows = [
            {**asdict(row), "median": row.median, "interquartile_range": row.spread}
            for row in self.rows
        ]
        return {"schema": 1, "machine": self.machine, "gemm_gflops": self.gemm, "rows": rows}

    def baseline(self, row: Row) -> float | None:
        """Return the plain definition's median time in a row's case."""
        for other in self.rows:
            same = (other.preset, other.height, other.width) == (row.preset, row.height, row.width)
            if same and other.variant == "plain" and other.dtype == "float32":
                return other.median
        return None

    def markdown(self) -> str:
        """Return the table for people, losses and gaps included."""
        lines = [
            "| network | size | variant | time | against plain | GEMM rate | memory | error |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in self.rows:
            cells = [
                row.preset,
                f"{row.height}x{row.width}",
                f"{row.variant}, {row.dtype}",
                *(_time(row), _gain(row, self.baseline(row)), _percent(row.share)),
                "" if row.peak is None else f"{row.peak / 1e9:.2f} GB",
                row.note if row.error is None else f"{row.error:.0e}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        facts = self.machine
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in self.gemm.items())
        lines += [
            "",
            f"{facts['processor']}, {facts['threads']} threads; {facts['device']}; torch "
            f"{facts['torch']}, dfpir {facts['dfpir']} ({facts['commit']}), {facts['time']}. "
            f"Matrix products in GFLOP/s: {rates}. Times are medians with half the interquartile "
            "range; memory is what a run takes beyond the loaded network; the error is the "
            "relative L2 distance from the definition computed in float64 (in float32 where that "
            "is too much), and without a passed check there is no time.",
        ]
        return "\n".join(lines)


def _time(row: Row) -> str:
    if row.median is None:
        return ""
    spread = "" if row.spread is None else f" ± {row.spread / 2:.2g}"
    return f"{row.median:.3g}{spread} s"


def _gain(row: Row, baseline: float | None) -> str:
    return "" if baseline is None or row.median is None else f"{baseline / row.median:.2f}x"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def picture(height: int, width: int) -> Tensor:
    """Return a picture of soft shapes with noise, (1, 3, H, W), the same each time."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 9, 9, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (smooth + 0.05 * torch.randn(1, 3, height, width, generator=generator)).clamp(0, 1)


def network(config: DFPIRConfig, device: torch.device | str = "cpu") -> DFPIR:
    """Return a network with the same random weights each time."""
    torch.manual_seed(0)
    model = DFPIR(config).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return model.to(device)


def gemm_rate(device: torch.device, dtype: torch.dtype, *, side: int = GEMM_SIDE) -> float:
    """Return the rate of square matrix products in GFLOP/s: the best of a few."""

    def rate(side: int) -> float:
        left = torch.randn(side, side, device=device).to(dtype)
        best = min(timed(partial(torch.matmul, left, left), device)[0] for _ in range(5))
        return 2 * side**3 / best / 1e9

    small = rate(max(side // 8, 1))
    # Some processors multiply half precision hundreds of times slower; that is known by now.
    return small if small < SLOW_GEMM else rate(side)


def operations(config: DFPIRConfig, height: int, width: int) -> int:
    """Return the floating-point operations of the definition's products and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model, pixels = DFPIR(config).requires_grad_(False), torch.empty(1, 3, height, width)
        with FlopCounterMode(display=False) as counter:
            model.define(pixels, torch.zeros(1, dtype=torch.int64))
    return int(counter.get_total_flops())


def timed(work: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Return the seconds that `work` takes, waiting for the device, and its result."""
    module = getattr(torch, device.type)
    if device.type != "cpu":
        module.synchronize()
    started = time.perf_counter()
    result = work()
    if device.type != "cpu":
        module.synchronize()
    return time.perf_counter() - started, result


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the relative L2 distance."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


def machine(device: torch.device) -> dict[str, str]:
    """Return what this runs on, and with which versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    tf32 = torch.backends.cuda.matmul.allow_tf32
    return {
        "device": f"{name}, TF32 {'on' if tf32 else 'off'}" if device.type == "cuda" else name,
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dfpir": package_version(),
        "commit": commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """Return the commit of a checkout, "released" without one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "released"
    return said.strip()


def peak_bytes() -> int:
    """Return the most memory that this process has held."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource  # not on every system

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """Let the peak of this process begin where it is now, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_of_run(config: DFPIRConfig, size: tuple[int, int], variant: str, dtype: str) -> int:
    """Run once on the processor; return the peak less the one after loading and a small run."""
    model = network(config).to(DTYPES[dtype])
    run = work_of(model, variant)
    pixels = picture(*size).to(DTYPES[dtype])
    with torch.inference_mode():
        run(pixels[..., :64, :64])
        forget_peak()
        before = peak_bytes()
        run(pixels)
    return peak_bytes() - before


def peak_in_child(preset: str, size: tuple[int, int], variant: str, dtype: str) -> int:
    """Do `peak_of_run` in a process of its own."""
    code = (
        "import sys; from dfpir.benchmark import PRESETS, peak_of_run; "
        "preset, height, width, *rest = sys.argv[1:]; "
        "print(peak_of_run(PRESETS[preset](), (int(height), int(width)), *rest))"
    )
    arguments = [preset, *map(str, size), variant, dtype]
    child = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return int(child.stdout)


@contextlib.contextmanager
def one_tf32() -> Iterator[None]:
    """Let cuDNN round factors to TF32 only where matrix products do, which by default do not.

    Otherwise its convolutions alone would be further from the definition than may be.
    """
    usual = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = usual


def channels_last_is_faster(device: torch.device) -> bool:
    """Whether the plain definition is to run with its channels last in memory."""
    return device.type == "cuda"


def work_of(model: DFPIR, variant: str) -> Callable[[Tensor], Tensor]:
    """Return what a variant does with pixels.

    On CUDA the plain definition has weights and pixels channels-last, the fair baseline.
    """
    layout = torch.contiguous_format
    if variant == "plain" and channels_last_is_faster(model.embed.weight.device):
        layout = torch.channels_last
        model = copy.deepcopy(model)  # the other variants keep theirs
        for value in model.parameters():
            if value.ndim == 4:
                value.data = value.data.contiguous(memory_format=layout)

    def plain(pixels: Tensor) -> Tensor:
        return model.define(pixels.contiguous(memory_format=layout), Degradation.RAIN)

    def dfpir(pixels: Tensor) -> Tensor:
        restored: Tensor = model(pixels, Degradation.RAIN)
        return restored

    if variant == "compiled":
        return torch.compile(plain)
    return plain if variant == "plain" else dfpir


def where_to_check(
    config: DFPIRConfig, size: tuple[int, int], device: torch.device
) -> tuple[torch.device, torch.dtype]:
    """Return where to compute the result to compare with, and in which precision.

    On processors in float64, which tells which of two float32 results is off, as long as it fits
    into memory. Graphics cards take minutes for depthwise filters in float64: for theirs too a
    processor computes up to `CHECK_PIXELS`, beyond that float32 has to do.
    """
    small = size[0] * size[1] <= CHECK_PIXELS
    if device.type == "cpu" or (device.type == "cuda" and small):
        processor = torch.device("cpu")
        needed = memory_needed(config, size, torch.float64, rows=CHECK_ROWS)
        if needed < FREE_SHARE * free_memory(processor):
            return processor, torch.float64
    return device, torch.float32


def expected_result(
    config: DFPIRConfig, pixels: Tensor, device: torch.device
) -> tuple[Tensor, torch.dtype]:
    """Return what all variants should find, and in which precision it was computed.

    It comes from the generic passes, in strips: no variant's way to work, and with little memory.
    """
    size = pixels.shape[-2], pixels.shape[-1]
    place, dtype = where_to_check(config, size, device)
    model = network(config, place).to(dtype)
    with torch.enable_grad():  # none is wanted, but these passes are those that can have one
        restored = model(pixels.to(place, dtype), Degradation.RAIN, rows=CHECK_ROWS)
    return restored, dtype


def is_equal(row: Row, rows: Sequence[Row]) -> bool:
    """Say whether a result counts as equal to the definition's, given all rows of its case."""
    plain = (other for other in rows if (other.variant, other.dtype) == ("plain", row.dtype))
    rounding = next((other.error for other in plain if other.error is not None), 0.0)
    tolerance = TOLERANCE[row.dtype]
    bar = max(tolerance, min(AS_NEAR * rounding, LOOSEST * tolerance))
    return row.error is not None and row.error <= bar


def run_case(
    config: DFPIRConfig,
    rows: Sequence[Row],
    *,
    device: torch.device,
    repeats: int,
    gemm: dict[str, float],
    advance: Callable[[], None],
) -> None:
    """Fill in the rows of one case: check each variant, then repeat all in turn."""
    height, width = rows[0].height, rows[0].width
    original = picture(height, width).to(device)
    flops = operations(config, height, width)
    models = {name: network(config, device).to(DTYPES[name]) for name in {r.dtype for r in rows}}
    fits = memory_needed(config, (height, width), torch.float32) < FREE_SHARE * free_memory(device)
    expected, precision = expected_result(config, original, device)
    with torch.inference_mode():
        answered: list[tuple[Row, partial[Tensor]]] = []
        for row in rows:
            if row.variant != "dfpir" and not fits:
                row.note = "does not fit into memory"
                continue
            pixels = original.to(DTYPES[row.dtype])
            row.checked = str(precision).removeprefix("torch.")
            work = partial(work_of(models[row.dtype], row.variant), pixels)
            try:
                row.error = distance(work(), expected)  # it warms up as well
            except RuntimeError as error:
                row.note = str(error).splitlines()[0]
                continue
            answered.append((row, work))
            advance()
        ready = []
        for row, work in answered:
            if is_equal(row, rows):
                ready.append((row, work))
            else:
                row.note = "differs from the definition"
        for _ in range(repeats):
            for row, work in ready:
                if sum(row.seconds) < SECONDS:
                    row.seconds.append(timed(work, device)[0])
                advance()
    for row in rows:
        median = row.median
        if median:
            row.share = flops / median / 1e9 / gemm[row.dtype]


def choose_dtypes(gemm: dict[str, float]) -> list[str]:
    """Return float32 and those precisions whose matrix products are not slower here."""
    return [name for name, rate in gemm.items() if name == "float32" or rate > gemm["float32"]]


def run_benchmark(
    *,
    presets: Sequence[str] = tuple(PRESETS),
    sizes: Sequence[tuple[int, int]] = SIZES,
    variants: Sequence[str] = ("plain", "compiled", "dfpir"),
    device: str | torch.device = "cpu",
    repeats: int = 5,
    memory: bool = True,
    gemm_side: int = GEMM_SIDE,
    on_progress: Progress | None = None,
) -> Report:
    """Measure all variants of all cases.

    Parameters
    ----------
    presets : sequence of str
        Of `PRESETS`.
    sizes : sequence of tuple of int
        Height and width.
    variants : sequence of str
        Of plain, compiled, dfpir.
    device : str or torch.device
    repeats : int
        Times each variant runs after its check.
    memory : bool
        Whether to measure memory too: on a processor, each variant again in a process of its own.
    gemm_side : int
        Side of the matrices whose product gives the rate to compare with.
    on_progress : callable, optional
        ``on_progress(done, total)``; raising from it cancels.

    Raises
    ------
    ValueError
        If a preset or variant is unknown, or there is nothing to repeat.
    """
    device = torch.device(device)
    known = ("plain", "compiled", "dfpir")
    for value, choices in [
        *((p, tuple(PRESETS)) for p in presets),
        *((v, known) for v in variants),
    ]:
        if value not in choices:
            message = f"Benchmark: {value!r} is unknown; expected {', '.join(choices)}."
            raise ValueError(message)
    if repeats < 1:
        message = f"Benchmark: {repeats} repetitions; expected at least 1."
        raise ValueError(message)
    gemm = {name: gemm_rate(device, dtype, side=gemm_side) for name, dtype in DTYPES.items()}
    report = Report([], gemm, machine(device))
    chosen = [(name, dtype) for dtype in choose_dtypes(gemm) for name in variants]
    total = len(presets) * len(sizes) * len(chosen) * (repeats + 1)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(min(done, total), total)

    for preset, size in itertools.product(presets, sizes):
        rows = [Row(preset, *size, name, dtype) for name, dtype in chosen]
        config = PRESETS[preset]()
        with one_tf32():
            run_case(config, rows, device=device, repeats=repeats, gemm=gemm, advance=advance)
            if memory:
                measure_memory(rows, device)
        report.rows.extend(rows)
    return report


def measure_memory(rows: Sequence[Row], device: torch.device) -> None:
    """Fill in the peaks of the rows that were timed."""
    for row in rows:
        size = row.height, row.width
        if not row.seconds:
            continue
        if device.type == "cpu":
            try:
                row.peak = peak_in_child(row.preset, size, row.variant, row.dtype)
            except (OSError, ValueError, subprocess.CalledProcessError):
                row.note = row.note or "its memory could not be measured"
        elif device.type == "cuda":
            row.peak = peak_on_cuda(row, device)


def peak_on_cuda(row: Row, device: torch.device) -> int:
    """Return the peak of what PyTorch allocates in one run, less what is there before."""
    model = network(PRESETS[row.preset](), device).to(DTYPES[row.dtype])
    pixels = picture(row.height, row.width).to(device, DTYPES[row.dtype])
    run = work_of(model, row.variant)
    with torch.inference_mode():
        run(pixels[..., :64, :64])
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(pixels)
    return int(torch.cuda.max_memory_allocated(device) - before)


def plot(report: Report, path: str | Path) -> None:
    """Draw the times as bars, a panel for each case; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys((row.preset, row.height, row.width) for row in report.rows))
    figure = Figure(figsize=(8, 1.2 + 1.3 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
    for panel, case in zip(panels, cases, strict=True):
        rows = [row for row in report.rows if (row.preset, row.height, row.width) == case]
        timed_rows = [row for row in rows if row.median is not None]
        names = [f"{row.variant}, {row.dtype}" for row in timed_rows]
        panel.barh(names, [row.median for row in timed_rows])
        panel.invert_yaxis()
        panel.set_title(f"{case[0]}, {case[1]}x{case[2]}", loc="left", fontsize=9)
        panel.set_xlim(left=0)
    panels[-1].set_xlabel("seconds, median")
    figure.savefig(path, dpi=120)


def write_json(report: Report, path: Path) -> None:
    """Write a report as JSON."""
    path.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Report:
    """Read what `write_json` wrote."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    extra = ("median", "interquartile_range")
    rows = [Row(**{k: v for k, v in row.items() if k not in extra}) for row in facts["rows"]]
    return Report(rows, facts["gemm_gflops"], facts["machine"])
