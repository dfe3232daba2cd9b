"""The ComfyUI pack in a real server, over HTTP; see `comfyui_server` for what names one.

dfpir itself is not expected in ComfyUI's Python: the tests install it into a folder of their own.
"""

import json
import logging
import subprocess
import sys
import time
from io import BytesIO

import numpy as np
import psutil
import pytest
import torch
from comfyui_server import MARKS, PACK, PYTHON, ROOT, start
from PIL import Image
from safetensors.torch import save_file

from dfpir import checkpoint, cli, weights

logger = logging.getLogger(__name__)

pytestmark = MARKS
pytest_plugins = ["comfyui_fixtures"]


def by_command_line(picture, folder, *options):
    """What `dfpir restore` makes of a picture."""
    given, restored = folder / "given.png", folder / "restored.png"
    Image.fromarray(picture).save(given)
    command = ["restore", str(given), "-o", str(restored), "--overwrite", "--device", "cpu"]
    assert cli.main([*command, *options]) == 0
    return np.asarray(Image.open(restored))


def wait_until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, condition
        time.sleep(0.05)


def difference(found, expected):
    return int(np.abs(found.astype(int) - expected.astype(int)).max())


def prompt(image="picture.png", **inputs):
    """Load, restore, save; node 2 restores and node 3 saves."""
    given = {"image": ["1", 0], "degradation": "auto", "strength": 1.0, **inputs}
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": image}},
        "2": {"class_type": "DFPIRRestore", "inputs": given},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "r"}},
    }


def api_form(graph, definitions):
    """Turn a workflow as the page saves it into one as the server takes it."""
    links = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    nodes = {}
    for node in graph["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        declared = definitions[node["type"]]["input"]
        declared = {**declared.get("required", {}), **declared.get("optional", {})}
        values = iter(node["widgets_values"])
        inputs = {}
        for name, (kind, *_) in declared.items():
            widget = isinstance(kind, list) or kind in {"COMBO", "FLOAT", "INT", "STRING"}
            if widget or kind.startswith("COMFY_DYNAMICCOMBO"):
                value = next(values, None)
                if value is not None:
                    inputs[name] = value
        for slot in node["inputs"]:
            if slot["link"] is not None:
                inputs[slot["name"]] = links[slot["link"]]
        nodes[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return nodes


def example(server, name):
    graph = json.loads((PACK / f"example_workflows/{name}.json").read_text(encoding="utf-8"))
    return api_form(graph, server.get("/object_info"))


def node_of(graph, kind):
    return next(identity for identity, node in graph.items() if node["class_type"] == kind)


def test_pack_loads_without_a_warning(server):
    lines = server.log.read_text().splitlines()
    ours = [line for line in lines if "dfpir" in line.lower()]
    assert any("seconds: " in line for line in ours), "\n".join(lines)
    assert not [line for line in ours if "fail" in line.lower() or "error" in line.lower()]
    assert "Traceback" not in "\n".join(lines)
    declared = server.get("/object_info")
    assert {"DFPIRRestore", "DFPIRLoadModel", "DFPIRClassify"} <= set(declared)
    assert declared["DFPIRRestore"]["output_name"] == ["restored", "found", "report"]


def test_help_translations_and_examples_are_served(server):
    for node in ("DFPIRRestore", "DFPIRLoadModel", "DFPIRClassify"):
        for page in (f"{node}.md", f"{node}/zh.md"):
            assert server.request(f"/extensions/dfpir/docs/{page}")[0] == 200
    names = server.get("/i18n")
    assert names["zh"]["nodeDefs"]["DFPIRRestore"]["display_name"] == "图像复原（DFPIR）"
    found = server.get("/workflow_templates")["dfpir"]
    assert set(found) == {"restore_image", "diagnose_then_restore", "restore_video_frames"}
    for name in found:
        status, picture = server.request(f"/api/workflow_templates/dfpir/{name}.jpg")
        assert status == 200 and Image.open(BytesIO(picture)).format == "JPEG"


@pytest.mark.parametrize("name", ["noise-25", "rain", "haze", "blur", "low-light", "clean"])
def test_restoring_is_that_of_the_command_line(server, degraded, tmp_path, name):
    server.give("picture.png", degraded[name])
    told = () if name == "clean" else ("--degradation", name)
    graph = prompt(degradation=told[1] if told else "auto")
    (found,) = server.pictures(server.run(graph), "3")
    assert difference(found, by_command_line(degraded[name], tmp_path, *told)) <= 1


def test_example_restore_image(server, degraded, tmp_path):
    server.give("example.png", degraded["noise-25"])
    graph = example(server, "restore_image")
    outputs = server.run(graph)
    (found,) = server.pictures(outputs, node_of(graph, "SaveImage"))
    assert difference(found, by_command_line(degraded["noise-25"], tmp_path)) <= 1
    assert "Gaussian noise" in outputs[node_of(graph, "DFPIRRestore")]["text"][0]


@pytest.mark.parametrize("name", ["rain", "clean"])
def test_example_diagnose_then_restore(server, degraded, tmp_path, name):
    server.give("example.png", degraded[name])
    graph = example(server, "diagnose_then_restore")
    outputs = server.run(graph)
    (found,) = server.pictures(outputs, node_of(graph, "SaveImage"))
    assert difference(found, by_command_line(degraded[name], tmp_path)) <= 1
    assert "as told" in outputs[node_of(graph, "DFPIRRestore")]["text"][0]


def test_example_restore_video_frames(server, degraded):
    frames = [np.roll(degraded["noise-25"], 2 * shift, axis=1) for shift in range(6)]
    server.give_video("video.mp4", frames)
    graph = example(server, "restore_video_frames")
    outputs = server.run(graph)
    (saved,) = outputs[node_of(graph, "SaveVideo")]["images"]
    assert len(server.file(saved)) > 1000
    report = outputs[node_of(graph, "DFPIRRestore")]["text"][0]
    assert "restored" in report and "sampled statistics" in report


def test_strength_0_changes_nothing(server, degraded):
    server.give("picture.png", degraded["rain"])
    graph = prompt(degradation="rain", strength=0.0)
    (found,) = server.pictures(server.run(graph), "3")
    assert difference(found, degraded["rain"]) == 0


def test_odd_images(server, degraded):
    picture = degraded["noise-25"][:61, :77]
    alpha = np.full(picture.shape[:2], 200, np.uint8)
    server.give("alpha.png", np.dstack([picture, alpha]))
    server.give("grey.png", picture[..., 0])
    server.give("small.png", picture[:1, :1])
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "alpha.png"}},
        "2": {
            "class_type": "JoinImageWithAlpha",
            "inputs": {"image": ["1", 0], "alpha": ["1", 1]},
        },
        "3": {
            "class_type": "DFPIRRestore",
            "inputs": {"image": ["2", 0], "degradation": "noise-25", "strength": 1.0},
        },
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "r"}},
    }
    (found,) = server.pictures(server.run(graph), "4")
    assert found.shape == (61, 77, 4) and np.abs(found[..., 3].astype(int) - 200).max() <= 1
    for name in ("grey.png", "small.png"):
        assert server.pictures(server.run(prompt(name, degradation="haze")), "3")
    # Load Image gives a mask of 64x64 zeros where there is no transparency.
    masked = prompt("grey.png", degradation="haze", mask=["1", 1])
    outputs = server.run(masked)
    assert "mask is empty" in outputs["2"]["text"][0]


def test_batch_of_frames(server, degraded):
    server.give("picture.png", degraded["noise-25"][:64, :64])
    graph = prompt(degradation="auto", verdict="one each")
    graph["4"] = {"class_type": "RepeatImageBatch", "inputs": {"image": ["1", 0], "amount": 3}}
    graph["2"]["inputs"]["image"] = ["4", 0]
    outputs = server.run(graph)
    first, *others = server.pictures(outputs, "3")
    assert len(others) == 2 and all(np.array_equal(first, other) for other in others)
    assert "images 1-3: Gaussian noise" in outputs["2"]["text"][0]


@pytest.mark.parametrize("statistics", ["whole", "sampled"])
def test_cancel_then_go_on(server, degraded, statistics):
    process = psutil.Process(server.process.pid)
    graph = prompt(degradation="rain", statistics=statistics)
    graph["1"] = {"class_type": "DFPIRTestImage", "inputs": {"kind": "large"}}
    seen = server.log.read_text().count("DFPIRTestImage rss")
    identity = server.queue(graph)
    wait_until(lambda: server.log.read_text().count("DFPIRTestImage rss") > seen)
    used = process.cpu_times().user
    wait_until(lambda: process.cpu_times().user > used + 2)  # well into the network
    assert identity not in server.get(f"/history/{identity}")
    begun = process.cpu_times().user
    assert server.request("/interrupt", b"{}", **{"Content-Type": "application/json"})[0] == 200
    messages = dict(server.finished(identity)["status"]["messages"])
    took = process.cpu_times().user - begun
    logger.info("cancelled after %.1f s of the processor's time", took)
    assert "execution_interrupted" in messages
    assert took < 5
    server.give("picture.png", degraded["rain"])
    assert server.run(prompt(degradation="rain"))["3"]["images"]


def test_bad_weights_are_explained_and_the_server_goes_on(server, degraded):
    server.give("picture.png", degraded["rain"])
    folder = server.base / "models/dfpir"
    assert folder.is_dir()
    (folder / "damaged.safetensors").write_bytes(b"PK not weights at all")
    graph = prompt(degradation="rain", model=["5", 0])
    graph["5"] = {"class_type": "DFPIRLoadModel", "inputs": {}}
    save_file({"weight": torch.zeros(3, 3)}, folder / "foreign.safetensors")
    for name in ("damaged.safetensors", "foreign.safetensors"):
        graph["5"]["inputs"]["model_name"] = name
        words = server.failure(graph)
        logger.info("%s: %s", name, words)
        assert name in words and "\n" not in words and len(words) < 300
    graph["5"]["inputs"]["model_name"] = "absent.safetensors"
    status, reply = server.post("/prompt", {"prompt": graph})
    assert status == 400
    details = reply["node_errors"]["5"]["errors"][0]["details"]
    logger.info("absent.safetensors: %s", details)
    assert "absent.safetensors is not in" in details and str(folder) in details
    graph["5"]["inputs"]["model_name"] = weights.default_name()
    assert server.run(graph)["3"]["images"]


def test_bad_images_are_explained_and_the_server_goes_on(server, degraded):
    server.give("picture.png", degraded["rain"])
    for kind, words in (("empty", "nothing to restore"), ("five", "5 channels"), ("nan", "NaN")):
        graph = prompt(degradation="rain")
        graph["1"] = {"class_type": "DFPIRTestImage", "inputs": {"kind": kind}}
        message = server.failure(graph)
        logger.info("%s: %s", kind, message)
        assert words in message and "\n" not in message and len(message) < 250
    assert server.run(prompt(degradation="rain"))["3"]["images"]


def growth(server, images, model):
    """How many bytes the server's memory grows by while it restores test images."""
    graph = {
        "1": {"class_type": "DFPIRTestImage", "inputs": {"kind": images}},
        "2": {
            "class_type": "DFPIRRestore",
            "inputs": {"image": ["1", 0], "degradation": "noise-25", "strength": 1.0},
        },
        "3": {"class_type": "DFPIRTestSink", "inputs": {"image": ["2", 0]}},
        "4": {"class_type": "DFPIRLoadModel", "inputs": {"model_name": model}},
    }
    graph["2"]["inputs"]["model"] = ["4", 0]
    process = psutil.Process(server.process.pid)
    identity, levels = server.queue(graph), []
    while identity not in server.get(f"/history/{identity}"):
        levels.append(process.memory_info().rss)
        time.sleep(0.05)
    assert server.get(f"/history/{identity}")[identity]["status"]["status_str"] == "success"
    ready = [line for line in server.log.read_text().splitlines() if "DFPIRTestImage rss" in line]
    grown = max(levels) - int(ready[-1].rpartition(" ")[2])
    logger.info("%s, %s: memory grew by %.0f MB", images, model, grown / 1e6)
    return grown


def test_memory_of_a_long_batch(server, tiny_model):
    """64 frames of 512x512 take the output's own bytes and 100 MB at most.

    What a frame takes is seen with the bundled network, what a batch leaves behind with a small
    one, which is done in a fraction of the time.
    """
    checkpoint.save(tiny_model, server.base / "models/dfpir/tiny.safetensors")
    frame = 512 * 512 * 3 * 4
    growth(server, "frame", "tiny.safetensors")  # what is imported and kept once
    one = growth(server, "frame", weights.default_name())
    many = growth(server, "frames", "tiny.safetensors")
    assert one < frame + 100e6
    assert many < 64 * frame + 100e6


def test_clone_of_the_repository_works(tmp_path, degraded):
    """A plain clone in custom_nodes, without an installation."""

    def place(nodes):
        clone = nodes / "my-clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)

    server = start(tmp_path / "base", place).wait()
    try:
        assert "DFPIRRestore" in server.get("/object_info")
        assert server.request("/extensions/my-clone/docs/DFPIRRestore.md")[0] == 200
        server.give("picture.png", degraded["rain"])
        (found,) = server.pictures(server.run(prompt(degradation="rain")), "3")
        expected = by_command_line(degraded["rain"], tmp_path, "--degradation", "rain")
        assert difference(found, expected) <= 1
        assert "Traceback" not in server.log.read_text()
    finally:
        server.stop()


def test_pip_would_change_nothing_else(tmp_path):
    """In ComfyUI's own environment the requirements bring dfpir and nothing more."""
    build = ["-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run([sys.executable, *build], check=True, capture_output=True)
    command = ["-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", "--no-index"]
    command += ["--find-links", str(tmp_path), "--requirement", str(PACK / "requirements.txt")]
    result = subprocess.run([PYTHON, *command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    names = [each["metadata"]["name"] for each in json.loads(result.stdout)["install"]]
    assert names == ["dfpir"]
