"""The ComfyUI pack in a real server, over HTTP.

``COMFYUI_DIR`` names a ComfyUI checkout and ``COMFYUI_PYTHON`` a Python with its requirements;
without them the tests are skipped. dfpir itself is not expected there: the tests install it into a
folder of their own.
"""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from dfpir import Degradation, checkpoint, cli, synthesis, weights

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
PACK = ROOT / "comfyui_nodes"
COMFYUI, PYTHON = os.environ.get("COMFYUI_DIR"), os.environ.get("COMFYUI_PYTHON")

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(
        not (COMFYUI and PYTHON), reason="COMFYUI_DIR and COMFYUI_PYTHON name no ComfyUI"
    ),
]


class Server:
    """A ComfyUI server on loopback with folders of its own."""

    def __init__(self, base, port, **environment):
        self.base, self.port, self.log = base, port, base / "server.log"
        flags = ["--cpu", "--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch"]
        flags += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
        if "disable-api-nodes" in (Path(COMFYUI) / "comfy/cli_args.py").read_text("utf-8"):
            flags.append("--disable-api-nodes")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [PYTHON, "main.py", *flags],
                cwd=COMFYUI,
                env=os.environ | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self, seconds=600):
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                return self.get("/system_stats") and self
            except OSError:
                time.sleep(0.5)
        pytest.fail(f"ComfyUI did not start:\n{self.log.read_text()[-4000:]}")

    def request(self, path, data=None, **headers):
        url = f"http://127.0.0.1:{self.port}{path}"
        try:
            asked = urllib.request.Request(url, data, headers)
            with urllib.request.urlopen(asked, timeout=60) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def get(self, path):
        status, body = self.request(path)
        assert status == 200, f"{path}: {status} {body[:300]}"
        return json.loads(body)

    def post(self, path, content):
        body = json.dumps(content).encode()
        status, reply = self.request(path, body, **{"Content-Type": "application/json"})
        return status, json.loads(reply or b"{}")

    def queue(self, prompt):
        status, reply = self.post("/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex})
        assert status == 200, reply
        return reply["prompt_id"]

    def finished(self, identity, seconds=900):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            history = self.get(f"/history/{identity}")
            if identity in history:
                return history[identity]
            time.sleep(0.1)
        pytest.fail(f"The prompt did not end:\n{self.log.read_text()[-4000:]}")

    def run(self, prompt):
        done = self.finished(self.queue(prompt))
        assert done["status"]["status_str"] == "success", done["status"]
        return done["outputs"]

    def failure(self, prompt):
        """Run a prompt that has to fail; return the words shown on the node."""
        messages = dict(self.finished(self.queue(prompt))["status"]["messages"])
        return messages["execution_error"]["exception_message"].strip()

    def file(self, entry):
        query = urllib.parse.urlencode({k: entry[k] for k in ("filename", "subfolder", "type")})
        return self.request(f"/view?{query}")[1]

    def pictures(self, outputs, node):
        files = [self.file(entry) for entry in outputs[node]["images"]]
        return [np.asarray(Image.open(BytesIO(file))) for file in files]

    def give(self, name, picture):
        folder = self.base / "input"
        folder.mkdir(exist_ok=True)
        Image.fromarray(picture).save(folder / name)

    def stop(self):
        self.process.terminate()
        self.process.wait(60)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(base, place, **environment):
    """Put the pack into a new custom_nodes by `place`, and start a server on it."""
    (base / "custom_nodes").mkdir(parents=True)
    place(base / "custom_nodes")
    return Server(base, free_port(), **environment)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with dfpir as pip installs it, for PYTHONPATH."""
    site = tmp_path_factory.mktemp("site")
    command = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--target", str(site), str(ROOT)]
    subprocess.run([sys.executable, *command], check=True)
    return site


@pytest.fixture(scope="module")
def server(tmp_path_factory, installed):
    """The pack's folder, copied, beside an installed dfpir."""
    base = tmp_path_factory.mktemp("comfyui")

    def place(nodes):
        shutil.copytree(PACK, nodes / "dfpir", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(Path(__file__).with_name("comfyui_probe.py"), nodes)

    started = start(base, place, PYTHONPATH=str(installed))
    yield started.wait()
    started.stop()


@pytest.fixture(scope="module")
def degraded():
    """Pictures (H, W, 3) of uint8 by name."""
    from skimage.data import astronaut

    pixels = torch.from_numpy(np.ascontiguousarray(astronaut()[:200, 130:370]))
    pixels = pixels.movedim(-1, 0)[None].float() / 255
    pictures = {"clean": pixels}
    for number, name in enumerate(("noise-25", "rain", "haze", "blur", "low-light")):
        generator = torch.Generator().manual_seed(number)
        pictures[name] = synthesis.degrade(pixels, Degradation.from_name(name), generator)
    return {
        name: (value[0].movedim(0, -1) * 255).round().byte().numpy()
        for name, value in pictures.items()
    }


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
    assert {"DFPIRRestore", "DFPIRLoadModel", "DFPIRClassify"} <= set(server.get("/object_info"))


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
    code = (
        "import av, sys, numpy as np\n"
        "frames = np.load(sys.argv[1])\n"
        "with av.open(sys.argv[2], 'w') as file:\n"
        "    stream = file.add_stream('mpeg4', rate=8)\n"
        "    stream.height, stream.width = frames.shape[1:3]\n"
        "    stream.bit_rate = 20_000_000\n"
        "    for frame in frames:\n"
        "        file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, 'rgb24')))\n"
        "    file.mux(stream.encode())\n"
    )
    frames = np.stack([np.roll(degraded["noise-25"], 2 * shift, axis=1) for shift in range(6)])
    np.save(server.base / "frames.npy", frames)
    video = server.base / "input/video.mp4"
    video.parent.mkdir(exist_ok=True)
    subprocess.run([PYTHON, "-c", code, str(server.base / "frames.npy"), str(video)], check=True)
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


def test_cancel_then_go_on(server, degraded):
    process = psutil.Process(server.process.pid)
    graph = prompt(degradation="rain")
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
    graph["5"] = {"class_type": "DFPIRLoadModel", "inputs": {"model_name": "damaged.safetensors"}}
    words = server.failure(graph)
    assert "damaged.safetensors" in words and "\n" not in words
    graph["5"]["inputs"]["model_name"] = "absent.safetensors"
    status, reply = server.post("/prompt", {"prompt": graph})
    assert status == 400
    details = reply["node_errors"]["5"]["errors"][0]["details"]
    assert "absent.safetensors is not in" in details and str(folder) in details
    graph["5"]["inputs"]["model_name"] = weights.default_name()
    assert server.run(graph)["3"]["images"]


def test_bad_images_are_explained_and_the_server_goes_on(server, degraded):
    server.give("picture.png", degraded["rain"])
    for kind, words in (("empty", "nothing to restore"), ("five", "5 channels"), ("nan", "NaN")):
        graph = prompt(degradation="rain")
        graph["1"] = {"class_type": "DFPIRTestImage", "inputs": {"kind": kind}}
        message = server.failure(graph)
        assert words in message and len(message) < 250
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
