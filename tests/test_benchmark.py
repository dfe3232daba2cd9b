"""`dfpir benchmark` on tiny cases: gates, counts, tables. No time is asserted."""

import json
import subprocess

import pytest
import torch

from conftest import SMALL_COMPACT, assert_equal
from dfpir import benchmark as module
from dfpir.benchmark import Report, Row, run_benchmark
from dfpir.cli import main
from dfpir.model import DFPIRConfig


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(module, "PRESETS", {"tiny": lambda: SMALL_COMPACT})
    monkeypatch.setattr(
        module, "gemm_rate", lambda device, dtype, side: {4: 50.0, 2: 1.0}[dtype.itemsize]
    )


def tiny_run(**options):
    defaults = {
        "presets": ["tiny"],
        "sizes": [(16, 24)],
        "variants": ["plain", "dfpir"],
        "repeats": 2,
    }
    return run_benchmark(**{**defaults, "memory": False, **options})


def test_every_variant_is_checked_and_timed():
    seen = []
    report = tiny_run(on_progress=lambda done, total: seen.append((done, total)))
    assert [(row.variant, row.dtype) for row in report.rows] == [
        ("plain", "float32"),
        ("dfpir", "float32"),
    ]
    for row in report.rows:
        assert row.checked == "float64" and 1e-9 < row.error <= 1e-5
        assert len(row.seconds) == 2 and row.share > 0
    assert seen[-1] == (6, 6)
    assert json.loads(json.dumps(report.as_dict()))["rows"][1]["median"] > 0


def test_half_precision_is_measured_where_it_is_fast(monkeypatch):
    monkeypatch.setattr(module, "gemm_rate", lambda device, dtype, side: 100.0 / dtype.itemsize)
    report = tiny_run(variants=["dfpir"], repeats=1)
    assert [row.dtype for row in report.rows] == ["float32", "bfloat16", "float16"]
    assert all(row.error <= module.TOLERANCE[row.dtype] for row in report.rows)


def test_no_time_without_a_passed_check(monkeypatch):
    right = module.work_of

    def wrong(model, variant):
        return right(model, variant) if variant == "plain" else lambda pixels: pixels

    monkeypatch.setattr(module, "work_of", wrong)
    row = tiny_run().rows[1]
    assert row.seconds == [] and row.median is None and row.error > 1e-5
    assert row.note == "differs from the definition"


@pytest.mark.parametrize(
    ("error", "plain", "equal"),
    [
        (0.9e-5, None, True),
        (1.1e-5, None, False),
        (1.1e-5, 0.9e-5, False),
        (2.1e-5, 2e-5, True),
        (2.3e-5, 2e-5, False),
        (float("nan"), 2e-5, False),
        (1.1e-5, float("nan"), False),
        (float("inf"), float("inf"), False),
        (9e-5, 9e-5, True),
        (2e-4, 2e-4, False),
    ],
)
def test_equal_is_within_the_tolerance_or_as_near_as_the_definition(error, plain, equal):
    case = ("paper", 8, 8)
    row = Row(*case, "dfpir", "float32", error=error)
    definition = Row(*case, "plain", "float32", error=plain)
    coarser = Row(*case, "plain", "bfloat16", error=0.1)  # which lends no other precision its bar
    assert module.is_equal(row, [coarser, definition, row]) == equal


def test_a_definition_that_is_far_off_is_not_timed(monkeypatch):
    monkeypatch.setattr(module, "distance", lambda found, expected: 0.9)
    assert all(row.seconds == [] and row.note for row in tiny_run().rows)


def test_where_memory_is_short_strips_in_single_precision_are_the_check(monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    plain, ours = tiny_run().rows
    assert plain.note == "does not fit into memory" and plain.seconds == []
    assert ours.checked == "float32" and ours.error <= 1e-5 and ours.seconds


@pytest.mark.parametrize(
    ("kind", "side", "place", "dtype"),
    [
        ("cpu", 2048, "cpu", torch.float64),
        ("cuda", 512, "cpu", torch.float64),
        ("cuda", 513, "cuda", torch.float32),
        ("mps", 64, "mps", torch.float32),
    ],
)
def test_the_check_is_in_double_precision_where_that_is_quick(
    monkeypatch, kind, side, place, dtype
):
    monkeypatch.setattr(module, "free_memory", lambda device: 2**40)
    found = module.where_to_check(DFPIRConfig.paper(), (512, side), torch.device(kind))
    assert found == (torch.device(place), dtype)


def test_what_a_card_finds_is_checked_by_the_processor():
    expected, dtype = module.expected_result(
        SMALL_COMPACT, module.picture(16, 24), torch.device("cuda")
    )
    assert dtype == expected.dtype == torch.float64 and expected.device.type == "cpu"


def test_channels_last_changes_the_layout_and_nothing_else(monkeypatch):
    model, pixels = module.network(SMALL_COMPACT), module.picture(16, 24)
    expected = module.work_of(model, "plain")(pixels)
    seen = []
    define = module.DFPIR.define

    def look(self, pixels, degradation):
        seen.append((self.output.weight, pixels))
        return define(self, pixels, degradation)

    monkeypatch.setattr(module.DFPIR, "define", look)
    monkeypatch.setattr(module, "channels_last_is_faster", lambda device: True)
    with torch.inference_mode():
        assert_equal(module.work_of(model, "plain")(pixels), expected)
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in seen[0])
    assert model.output.weight.is_contiguous()


def test_cudnn_rounds_as_products_do_during_a_run(monkeypatch):
    seen = []
    monkeypatch.setattr(
        module, "run_case", lambda *_, **__: seen.append(torch.backends.cudnn.allow_tf32)
    )
    usual = torch.backends.cudnn.allow_tf32
    tiny_run()
    assert seen == [torch.backends.cuda.matmul.allow_tf32]
    assert torch.backends.cudnn.allow_tf32 == usual


def test_operations_are_those_of_the_arithmetic():
    flops = module.operations(DFPIRConfig.paper(), 256, 256)
    assert flops == pytest.approx(2 * 165.5e9, rel=0.01)
    assert module.operations(SMALL_COMPACT, 64, 32) == 2 * module.operations(SMALL_COMPACT, 32, 32)


@pytest.mark.parametrize("preset", ["compact", "specialist"])
def test_memory_needed_bounds_what_a_child_takes(preset):
    taken = module.peak_in_child(preset, (512, 512), "dfpir", "float32")
    config, cpu = getattr(DFPIRConfig, preset)(), torch.device("cpu")
    needed = module.memory_needed(config, (512, 512), torch.float32, device=cpu)
    assert needed / 4 < taken < needed


def test_memory_that_cannot_be_measured_costs_no_timings(monkeypatch):
    def fail(*arguments):
        raise subprocess.CalledProcessError(-9, "python")

    monkeypatch.setattr(module, "peak_in_child", fail)
    row = Row("compact", 64, 64, "dfpir", "float32", [0.1, 0.2])
    module.measure_memory([row], torch.device("cpu"))
    assert row.peak is None and "could not be measured" in row.note


def test_table_tells_gains_losses_and_gaps():
    rows = [
        Row("paper", 8, 8, "plain", "float32", [2.0, 4.0, 3.0], 0.0, share=0.5, peak=10**9),
        Row("paper", 8, 8, "dfpir", "float32", [1.0, 1.0], 2e-6),
        Row("paper", 8, 8, "compiled", "float32", note="no compiler"),
    ]
    table = Report(
        rows, {"float32": 100.0}, dict.fromkeys(module.machine(torch.device("cpu")), "x")
    ).markdown()
    assert "| plain, float32 | 3 ± 0.5 s | 1.00x | 50% | 1.00 GB | 0e+00 |" in table
    assert "| dfpir, float32 | 1 ± 0 s | 3.00x |  |  | 2e-06 |" in table
    assert "| compiled, float32 |  |  |  |  | no compiler |" in table


def test_report_survives_json(tmp_path):
    report = tiny_run()
    module.write_json(report, tmp_path / "speed.json")
    assert module.read_json(tmp_path / "speed.json") == report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"presets": ["huge"]}, "'huge'"),
        ({"variants": ["fast"]}, "'fast'"),
        ({"repeats": 0}, "0 rep"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_run(**options)


def test_the_command_writes_everything(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n", encoding="utf-8")
    given = "--presets tiny --sizes 16x24 --variants plain dfpir --repeats 1 --no-memory"
    written = {"--json": tmp_path / "speed.json", "--plot": tmp_path / "speed.png"}
    written["--fill"] = readme
    paths = [str(each) for pair in written.items() for each in pair]
    status = main(["benchmark", *given.split(), *paths])
    assert status == 0
    table = capsys.readouterr().out
    assert "| tiny | 16x24 | dfpir, float32 |" in table
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- speed -->\n| network")
    assert text.endswith("-->\nafter\n") and "old" not in text and table.strip() in text
    assert (tmp_path / "speed.png").stat().st_size > 1000
    assert json.loads((tmp_path / "speed.json").read_text())["schema"] == 1


@pytest.mark.parametrize("size", ["16", "16x", "axb", "0x8"])
def test_a_wrong_size_is_named(size, capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", "--sizes", size])
    assert f"'{size}'" in capsys.readouterr().err
