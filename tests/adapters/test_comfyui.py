"""The ComfyUI pack against a ComfyUI of straw: what it declares, and what it does with images."""

import ast
import asyncio
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from comfyui_stubs import PACK, Host, Interrupted, OldInterrupted, ProgressBar, load_pack

from dfpir import Degradation, checkpoint, weights
from dfpir import restorer as core

ROOT = PACK.parent
NODES = ("DFPIRRestore", "DFPIRLoadModel", "DFPIRClassify")
LANGUAGES = ("en", "zh")


def start(host, monkeypatch):
    """Load the pack in a host; returns its nodes by id."""
    for name, stub in host.modules.items():
        monkeypatch.setitem(sys.modules, name, stub)
    name = f"custom_nodes_x_{id(host)}"
    for part in ("", ".host", ".nodes"):
        monkeypatch.delitem(sys.modules, name + part, raising=False)
    extension = asyncio.run(load_pack(name=name).comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    return {node.define_schema().node_id: node for node in nodes}


@pytest.fixture(params=["0.33", "0.3.64"])
def host(request, tmp_path):
    return Host(tmp_path, old=request.param == "0.3.64")


@pytest.fixture
def nodes(host, monkeypatch):
    return start(host, monkeypatch)


@pytest.fixture
def schemas(nodes):
    return {name: node.define_schema() for name, node in nodes.items()}


@pytest.fixture
def small(nodes, tiny_model, host, tmp_path):
    """The restoring node with a tiny network in place of the bundled one."""
    path = host.models / "dfpir" / "tiny.safetensors"
    checkpoint.save(tiny_model, path)
    (model,) = nodes["DFPIRLoadModel"].execute("tiny.safetensors").result

    def restore(image, *arguments, **options):
        return nodes["DFPIRRestore"].execute(image, *arguments, **{"model": model, **options})

    return restore


def test_nodes_are_named_once_and_for_ever(schemas):
    assert tuple(schemas) == NODES


def test_class_names_are_the_literal_ids():
    # ComfyUI-Manager reads the source to learn which pack a missing node is in.
    tree = ast.parse((PACK / "nodes.py").read_text(encoding="utf-8"))
    found = {
        each.name: call.value
        for each in tree.body
        if isinstance(each, ast.ClassDef)
        for node in ast.walk(each)
        if isinstance(node, ast.keyword) and node.arg == "node_id"
        for call in [node.value]
    }
    assert found == {name: name for name in NODES}


def test_ids_are_distinct(schemas):
    for schema in schemas.values():
        ids = [each.id for each in (*schema.inputs, *schema.outputs)]
        assert len(ids) == len(set(ids)) and all(ids)


def test_everything_is_explained(schemas):
    for schema in schemas.values():
        assert schema.display_name and schema.description and schema.category == "image/restoration"
        for each in (*schema.inputs, *schema.outputs):
            assert each.tooltip, f"{schema.node_id}.{each.id}"
        for each in schema.outputs:  # servers of 2025 show the type where there is no such name
            assert each.facts["display_name"] == each.id


def test_search_finds_the_nodes(schemas, host):
    if host.interruption is Interrupted:
        assert {"denoise", "derain", "dehaze", "deblur", "low light"} <= set(
            schemas["DFPIRRestore"].search_aliases
        )
        assert all(schema.search_aliases for schema in schemas.values())


def test_choices_are_the_cores(schemas):
    (choice,) = [each for each in schemas["DFPIRRestore"].inputs if each.id == "degradation"]
    assert choice.facts["options"] == ["auto", *(member.value for member in Degradation)]


def test_help_names_every_input_and_output(schemas):
    for name, schema in schemas.items():
        for page in (PACK / f"web/docs/{name}.md", PACK / f"web/docs/{name}/zh.md"):
            text = page.read_text(encoding="utf-8")
            for each in (*schema.inputs, *schema.outputs):
                assert f"`{each.id}`" in text, f"{page.name}: {each.id}"


def test_english_locale_is_the_schema(schemas):
    locale = json.loads((PACK / "locales/en/nodeDefs.json").read_text(encoding="utf-8"))
    assert locale == {
        name: {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {
                each.id: {"name": each.id, "tooltip": each.tooltip} for each in schema.inputs
            },
            "outputs": {
                str(number): {"name": each.id, "tooltip": each.tooltip}
                for number, each in enumerate(schema.outputs)
            },
        }
        for name, schema in schemas.items()
    }


def keys(tree):
    return {key: keys(value) for key, value in tree.items()} if isinstance(tree, dict) else None


def test_chinese_locale_is_complete_and_chinese():
    read = {
        language: json.loads((PACK / f"locales/{language}/nodeDefs.json").read_text("utf-8"))
        for language in LANGUAGES
    }
    assert keys(read["zh"]) == keys(read["en"])
    for text in re.findall(
        r'"(?:name|tooltip|display_name|description)": "(.*)"',
        json.dumps(read["zh"], ensure_ascii=False, indent=1),
    ):
        assert re.search(r"[\u4e00-\u9fff]", text), text


@pytest.mark.parametrize(
    "path", sorted(PACK.glob("example_workflows/*.json")), ids=lambda p: p.stem
)
def test_examples_fit_the_nodes(path, schemas):
    graph = json.loads(path.read_text(encoding="utf-8"))
    ours = [node for node in graph["nodes"] if node["type"].startswith("DFPIR")]
    assert ours and path.with_suffix(".jpg").is_file()
    for node in ours:
        schema = schemas[node["type"]]
        widgets = [each for each in schema.inputs if each.kind in ("COMBO", "FLOAT", "INT")]
        assert {each["name"] for each in node["inputs"]} <= {each.id for each in schema.inputs}
        assert [each["name"] for each in node["outputs"]] == [each.id for each in schema.outputs]
        for value, widget in zip(node["widgets_values"], widgets, strict=True):
            assert value in widget.facts.get("options", [value])


def test_every_node_is_in_an_example_or_optional():
    shown = {
        node["type"]
        for path in PACK.glob("example_workflows/*.json")
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]
    }
    assert {"DFPIRRestore", "DFPIRClassify"} <= shown


# What the nodes do


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_images_of_any_batch_channels_and_dtype(small, host, channels, dtype):
    image = torch.rand(2, 24, 40, channels).to(dtype) * 1.2 - 0.1
    host.intermediate = dtype
    restored, name, report = small(image, "rain").result
    expected = dtype if host.interruption is Interrupted else torch.float32
    assert restored.shape == image.shape and restored.dtype == expected
    assert name == "rain" and "rain streaks, as told; restored" in report
    assert not torch.equal(restored[..., :3], image[..., :3].to(expected))
    assert torch.equal(restored[..., 3:], image[..., 3:].to(expected))


def test_strength_0_gives_the_image(small):
    image = torch.rand(1, 20, 20, 3)
    assert torch.equal(small(image, "haze", strength=0.0).result[0], image)


def test_result_is_the_cores(small, tiny_model, host):
    image = torch.rand(2, 33, 47, 3)
    mask = torch.rand(1, 64, 64)
    options = {"strength": 0.6, "mask": mask}
    expected = core.Restorer(model=tiny_model).restore_pixels(
        image.movedim(-1, 1), "blur", **options
    )
    found = small(image, "blur", **options)
    assert torch.allclose(found.result[0], expected.image.movedim(1, -1), atol=1e-6)
    assert found.result[2] == expected.report == found.ui["text"][0]
    assert host.texts["7"].splitlines()[:2] == ["motion blur, as told;", "restored."]


def test_the_verdict_stands_first_in_short_lines(nodes, host):
    show = sys.modules[nodes["DFPIRRestore"].__module__].host.show_text
    show("rain streaks (95% sure); restored\nStrength 100%; whole statistics", "7")
    lines = ["rain streaks", "(95% sure); restored.", "Strength 100%;", "whole statistics."]
    assert host.texts["7"].splitlines() == lines


def test_sampled_statistics_measure_a_batch_once(small, monkeypatch):
    sampled = []
    sample = core.Restorer.sample
    monkeypatch.setattr(
        core.Restorer, "sample", lambda *given: sampled.append(len(given[1])) or sample(*given)
    )
    _, _, report = small(torch.rand(5, 32, 32, 3), "haze", statistics="sampled").result
    assert sampled == [5] and "sampled statistics" in report


@pytest.mark.parametrize("verdict", ["one for all", "one each"])
def test_verdicts_are_for_all_or_each(small, monkeypatch, verdict):
    found = iter(["noise-25", "haze", "haze"])

    def classify(*_):
        member = Degradation.from_name(next(found))
        return [core.Diagnosis("degraded", member, {each.value: 1 / 7 for each in Degradation})]

    monkeypatch.setattr(core, "classify_with", classify)
    _, name, report = small(torch.rand(3, 16, 16, 3), verdict=verdict).result
    assert name == "haze"
    assert report.count("restored") == (1 if verdict == "one for all" else 2)


def test_steps_go_on_with_what_else_is_found(small, monkeypatch):
    found = iter([("rain", 0.9), ("haze", 0.8), ("clean", 0.9)])

    def classify(*_):
        name, sure = next(found)
        verdict = "clean" if name == "clean" else "degraded"
        member = None if name == "clean" else Degradation.from_name(name)
        return [core.Diagnosis(verdict, member, {name: sure})]

    monkeypatch.setattr(core, "classify_with", classify)
    assert (
        small(torch.rand(1, 16, 16, 3), steps=2)
        .result[2]
        .startswith("rain streaks (90% sure); restored, then haze")
    )


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (1, 0, 8, 3), (1, 8, 8, 5), (1, 8, 8, 2)])
def test_what_is_no_image_is_refused_in_a_sentence(small, shape):
    with pytest.raises(ValueError, match=r"^[^\n]{20,200}$"):
        small(torch.zeros(shape), "rain")


def test_nan_is_refused(small):
    with pytest.raises(ValueError, match="NaN"):
        small(torch.full((1, 8, 8, 3), torch.nan))


def test_progress_and_previews(small):
    small(torch.rand(3, 16, 16, 3), "rain")
    calls = ProgressBar.made[-1].calls
    values = [value for value, _, _ in calls]
    assert values == sorted(values) and calls[-1][0] == calls[-1][1]
    previews = [preview for _, _, preview in calls if preview]
    assert [(kind, picture.size, side) for kind, picture, side in previews] == [
        ("JPEG", (16, 16), 512)
    ] * 2


@pytest.mark.parametrize("judging", [False, True])
def test_cancel(small, host, judging):
    host.interrupted = True
    with pytest.raises((Interrupted, OldInterrupted)) as caught:
        small(torch.rand(1, 16, 16, 3), "auto" if judging else "rain")
    assert caught.type is host.interruption


@pytest.mark.parametrize("old", [False, True])
def test_cancel_is_not_taken_for_want_of_memory(tmp_path, monkeypatch, tiny_model, old):
    class OutOfMemory(RuntimeError):
        pass

    host = Host(tmp_path, old=old)
    nodes = start(host, monkeypatch)
    checkpoint.save(tiny_model, host.models / "dfpir" / "tiny.safetensors")
    model = nodes["DFPIRLoadModel"].execute("tiny.safetensors").result[0]
    calls = []

    def forward(*_, **options):
        calls.append(1)
        host.interrupted = True
        options["on_progress"](1, 2)
        raise AssertionError

    monkeypatch.setattr(model.patcher().model, "forward", forward)
    with pytest.raises(host.interruption):
        nodes["DFPIRRestore"].execute(torch.rand(1, 16, 16, 3), "rain", model=model)
    assert calls == [1]


def test_out_of_memory_goes_on_with_less(small, nodes, monkeypatch, host):
    run_once = core.Restorer.run_once
    ways = []

    def short(self, pixels, degradation, way, *rest):
        ways.append(way)
        if not isinstance(way, core.Tiling):
            message = "CUDA out of memory. Tried to allocate 2.00 GiB"
            raise torch.cuda.OutOfMemoryError(message)
        return run_once(self, pixels, degradation, way, *rest)

    monkeypatch.setattr(core.Restorer, "run_once", short)
    restored, _, report = small(torch.rand(1, 40, 40, 3), "rain").result
    assert restored.isfinite().all() and len(ways) > 1
    assert "Memory was short" in report


def test_network_is_loaded_whole_with_room_for_the_image(small, host):
    small(torch.rand(1, 64, 96, 3), "rain")
    ((patcher,), options) = host.loads[-1]
    needed = core.memory_needed(patcher.model.config, (64, 96), torch.float32)
    assert options == {"memory_required": needed, "force_full_load": True}


@pytest.mark.parametrize(
    ("precision", "flagged", "expected"),
    [
        ("auto", torch.float32, "float32"),
        ("auto", torch.bfloat16, "bfloat16"),
        ("auto", torch.float8_e4m3fn, "float32"),
        ("bfloat16", torch.float32, "bfloat16"),
    ],
)
def test_precision_is_the_nodes_or_the_hosts(small, host, precision, flagged, expected):
    host.flagged = flagged
    report = small(torch.rand(1, 16, 16, 3), "rain", precision=precision).result[2]
    assert expected + " on cpu" in report


def test_works_alone_on_the_bundled_weights(nodes):
    image = torch.full((1, 32, 32, 3), 0.5) + 0.2 * torch.randn(1, 32, 32, 3)
    restored, name, _ = nodes["DFPIRRestore"].execute(image, "noise-50").result
    assert name == "noise-50" and restored.std() < image.std() / 2


def test_weights_are_read_once_and_again_when_changed(nodes, host, tiny_model):
    path = host.models / "dfpir" / "mine.safetensors"
    checkpoint.save(tiny_model, path)
    loader = nodes["DFPIRLoadModel"]
    first = loader.execute("mine.safetensors").result[0]
    assert loader.execute("mine.safetensors").result[0].patcher() is first.patcher()
    stamp = loader.fingerprint_inputs("mine.safetensors")
    os.utime(path, ns=(1, 1))
    assert loader.fingerprint_inputs("mine.safetensors") != stamp
    assert loader.execute("mine.safetensors").result[0].patcher() is not first.patcher()


def test_choice_of_weights_is_bundled_and_files(nodes, host, tiny_model):
    for name in ("mine.safetensors", "notes.txt"):
        (host.models / "dfpir" / name).write_bytes(b"")
    (choice,) = nodes["DFPIRLoadModel"].define_schema().inputs
    assert choice.facts["options"] == [weights.default_name(), "mine.safetensors"]
    assert choice.facts["default"] == weights.default_name()
    assert nodes["DFPIRLoadModel"].validate_inputs(weights.default_name()) is True


def test_absent_weights_are_explained(nodes, host):
    refuse = nodes["DFPIRLoadModel"].validate_inputs
    folder = str(host.models / "dfpir")
    assert folder in refuse("mine.safetensors") and "press R" in refuse("mine.safetensors")
    by_hand = [each for each in weights.entries("restorer") if each.source == "by-hand"]
    for entry in by_hand:
        message = refuse(entry.filename)
        assert entry.page in message and "SHA-256" in message and folder in message


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 a pickle", b"\x08" + 7 * b"\0" + b"{}      "]
)
def test_damaged_and_foreign_weights_are_refused_in_a_line(nodes, host, content):
    (host.models / "dfpir" / "bad.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.safetensors: [^\n]{10,}$"):
        nodes["DFPIRLoadModel"].execute("bad.safetensors")


def test_diagnosis(nodes):
    noisy = (0.5 + 0.1 * torch.randn(2, 64, 64, 3)).clamp(0, 1)
    output = nodes["DFPIRClassify"].execute(noisy)
    name, confidence, report = output.result
    assert name.startswith("noise") and 0.6 <= confidence <= 1
    assert report.startswith("images 1-2: Gaussian noise") and output.ui["text"][0] == report
    assert nodes["DFPIRClassify"].define_schema().is_output_node


# The pack as a folder


def run_python(code, cwd, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=kept | environment,
        capture_output=True,
        text=True,
    )


def test_import_is_light(tmp_path):
    code = (
        "import sys, runpy\n"
        f"sys.path.insert(0, {str(ROOT / 'src')!r})\n"
        "import importlib.util as u\n"
        f"s = u.spec_from_file_location('pack', {str(PACK / '__init__.py')!r})\n"
        "m = u.module_from_spec(s); sys.modules['pack'] = m; s.loader.exec_module(m)\n"
        "print(sorted({'torch', 'numpy', 'PIL', 'comfy'} & set(sys.modules)))"
    )
    result = run_python(code, tmp_path)
    assert result.stdout.strip() == "[]", result.stderr


def test_nodes_import_no_more_than_comfyui_ships(tmp_path):
    allowed = {"PIL", "dfpir", "kornia", "kornia_rs", "numpy", "safetensors", "torch", "tqdm"}
    allowed |= {"mpmath", "sympy"}  # torch's own
    code = (
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT / 'tests/adapters')!r}, {str(ROOT / 'src')!r}]\n"
        "import torch, PIL.Image\n"
        "before = set(sys.modules)\n"
        "from comfyui_stubs import Host, load_pack\n"
        f"host = Host({str(tmp_path)!r}); sys.modules.update(host.modules)\n"
        "import asyncio\n"
        "nodes = asyncio.run(asyncio.run(load_pack().comfy_entrypoint()).get_node_list())\n"
        "nodes[0].execute(torch.rand(1, 16, 16, 3))\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    stubs = {
        "comfy",
        "comfy_api",
        "comfyui_stubs",
        "folder_paths",
        "server",
        "custom_nodes_x_dfpir",
    }
    foreign = {
        name
        for name in result.stdout.split()
        if name not in allowed | stubs | set(sys.stdlib_module_names)
    }
    assert not {name for name in foreign if not name.startswith("_")}


def test_clone_finds_its_own_sources(tmp_path):
    clone = tmp_path / "any-name"
    clone.mkdir()
    for name in ("__init__.py", "comfyui_nodes", "src"):
        (clone / name).symlink_to(ROOT / name)
    code = (
        "import sys, importlib.util as u\n"
        f"p = {str(clone)!r}\n"
        "s = u.spec_from_file_location(p, p + '/__init__.py', submodule_search_locations=[p])\n"
        "m = u.module_from_spec(s); sys.modules[p] = m; s.loader.exec_module(m)\n"
        "import dfpir; print(m.WEB_DIRECTORY, m.comfy_entrypoint.__name__, dfpir.__file__)"
    )
    result = run_python(code, tmp_path)
    web, entry, found = result.stdout.split()
    assert (clone / web / "docs").is_dir() and entry == "comfy_entrypoint"
    assert Path(found).samefile(ROOT / "src/dfpir/__init__.py")


def test_root_file_is_guarded():
    # Test runners import it without a package, where a relative import would fail.
    assert run_python(f"exec(open({str(ROOT / '__init__.py')!r}).read())", ROOT).returncode == 0


def test_a_missing_core_is_named(tmp_path):
    (tmp_path / "__init__.py").write_bytes((PACK / "__init__.py").read_bytes())
    code = (
        "import os, sys\n"
        "absent = lambda p: 'site-packages' in p or os.path.isdir(os.path.join(p, 'dfpir'))\n"
        "sys.path = [p for p in sys.path if not absent(p)]\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
        f"exec(compile(open({str(tmp_path / '__init__.py')!r}).read(), 'x', 'exec'), "
        f"{{'__file__': {str(tmp_path / '__init__.py')!r}, '__name__': 'x'}})"
    )
    result = run_python(code, tmp_path)
    assert "pip install dfpir" in result.stderr.splitlines()[-1]


def test_metadata_is_the_projects():
    ours = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    root = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for field in ("name", "version", "requires-python"):
        assert ours[field] == root[field]
    assert ours["dependencies"] == [f"dfpir>={root['version']}"]
    assert (PACK / "requirements.txt").read_text().split() == ours["dependencies"]
    assert (PACK / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


FLAGGED = re.compile(
    r"\b(subprocess|os\.environ|os\.system|urllib|requests|socket|pickle|eval|exec|__import__|ctypes)\b"
)


def test_archive_holds_nothing_that_gets_packs_flagged():
    for path in PACK.rglob("*.py"):
        assert not FLAGGED.search(path.read_text(encoding="utf-8")), path
    suffixes = {path.suffix for path in PACK.rglob("*") if path.is_file()} - {".pyc"}
    assert suffixes == {".py", ".md", ".json", ".jpg", ".toml", ".txt", ""}
    assert not list(PACK.rglob("*test*"))
