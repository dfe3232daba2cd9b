"""A real ComfyUI server with folders of its own, for the live tests and those of the page.

``COMFYUI_DIR`` names a ComfyUI checkout and ``COMFYUI_PYTHON`` a Python with its requirements;
without them the tests are skipped.
"""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PACK = ROOT / "comfyui_nodes"
COMFYUI, PYTHON = os.environ.get("COMFYUI_DIR"), os.environ.get("COMFYUI_PYTHON")

MARKS = [
    pytest.mark.comfyui,
    pytest.mark.skipif(
        not (COMFYUI and PYTHON), reason="COMFYUI_DIR and COMFYUI_PYTHON name no ComfyUI"
    ),
]

WRITE_VIDEO = """
import av, sys, numpy as np
frames = np.load(sys.argv[1])
with av.open(sys.argv[2], "w") as file:
    stream = file.add_stream("mpeg4", rate=8)
    stream.height, stream.width = frames.shape[1:3]
    stream.bit_rate = 20_000_000
    for frame in frames:
        file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
    file.mux(stream.encode())
"""


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

    def give_video(self, name, frames):
        """Write frames (H, W, 3) of uint8 by ComfyUI's own PyAV."""
        frames_file = self.base / "frames.npy"
        np.save(frames_file, np.stack(frames))
        folder = self.base / "input"
        folder.mkdir(exist_ok=True)
        command = [PYTHON, "-c", WRITE_VIDEO, str(frames_file), str(folder / name)]
        subprocess.run(command, check=True)

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
