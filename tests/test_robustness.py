"""What arrives damaged or meant to harm is refused; nothing is fetched, unpickled or lost."""

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import SMALL, random_model
from dfpir import checkpoint, restorer, weights
from dfpir.checkpoint import CheckpointError
from dfpir.classifier import FORMAT as CLASSIFIER_FORMAT
from dfpir.classifier import load_classifier
from dfpir.files import ImageFileError, read_image, write_image
from dfpir.weights import WeightsError

SECONDS = 10
MEMORY = 2**30
FORMATS = (
    ("p.png", np.uint8, 3),
    ("d.png", np.uint16, 3),
    ("g.png", np.uint16, None),
    ("p.jpg", np.uint8, 3),
    ("p.tif", np.uint8, 4),
    ("d.tif", np.uint16, 3),
    ("f.tif", np.float32, None),
    ("p.webp", np.uint8, 3),
)


@contextlib.contextmanager
def bounded():
    """Let what happens inside take at most `SECONDS` and `MEMORY` more than there is now."""
    resource = pytest.importorskip("resource")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)

    def late(*_):
        message = f"more than {SECONDS} s"
        raise TimeoutError(message)

    before = signal.signal(signal.SIGALRM, late)
    limit = psutil.Process().memory_info().vms + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    generator = np.random.default_rng(0)
    files = []
    for name, dtype, channels in FORMATS:
        shape = (37, 29) if channels is None else (37, 29, channels)
        array = generator.random(shape, dtype=np.float32)
        if dtype != np.float32:
            array = (array * np.iinfo(dtype).max).astype(dtype)
        write_image(folder / name, array)
        files.append((name, (folder / name).read_bytes()))
    return files


def mutate(data, draw):
    """Return a file with some bytes changed, cut out, doubled or put in."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        # The beginning holds sizes and types: it deserves as many changes as all the rest.
        reach = draw(st.sampled_from([64, len(data)]))
        place = draw(st.integers(0, max(min(reach, len(data)) - 1, 0)))
        kind = draw(st.sampled_from(["change", "number", "cut", "end", "double", "insert"]))
        if kind == "change":
            data[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "number":
            data[place : place + 4] = struct.pack(
                "<I", draw(st.sampled_from([0, 1, 2**31, 2**32 - 1]))
            )
        elif kind == "cut":
            del data[place : place + draw(st.integers(1, 64))]
        elif kind == "end":
            del data[place:]
        elif kind == "double":
            data[place:place] = data[place : place + draw(st.integers(1, 64))]
        else:
            data[place:place] = draw(st.binary(min_size=1, max_size=16))
    return bytes(data)


def test_damaged_pictures_are_read_or_refused_in_one_line(originals, tmp_path, thorough):
    """Neither a crash, nor a hang, nor a gigabyte, whatever the bytes."""
    counts = {"read": 0, "refused": 0}

    @settings(
        max_examples=5000 if thorough else 300,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(st.data())
    def damage(data):
        name, content = data.draw(st.sampled_from(originals))
        path = tmp_path / name
        path.write_bytes(mutate(content, data.draw))
        with bounded():
            try:
                picture = read_image(path)
            except ImageFileError as error:
                assert "\n" not in str(error) and name in str(error)
                counts["refused"] += 1
                return
        assert picture.array.size and np.isfinite(picture.array).all()
        assert picture.array.dtype in (np.uint8, np.uint16, np.float32)
        counts["read"] += 1

    damage()
    assert counts["read"] and counts["refused"], counts


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "weights.safetensors"
    checkpoint.save(random_model(SMALL), path)
    return path


def test_damaged_weights_are_refused_in_one_line(saved, thorough):
    whole = saved.read_bytes()
    (header_length,) = struct.unpack("<Q", whole[:8])

    @settings(
        max_examples=1000 if thorough else 100,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(st.data())
    def damage(data):
        # What is changed in the numbers alone is still a weights file, with another hash.
        head = mutate(whole[: 8 + header_length], data.draw)
        if head == whole[: 8 + header_length]:
            return
        saved.write_bytes(head + whole[8 + header_length :])
        with bounded():
            try:
                checkpoint.load(saved)
            except CheckpointError as error:
                assert "\n" not in str(error) and str(saved) in str(error)

    damage()


@pytest.mark.parametrize("load", [checkpoint.load, load_classifier])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**8) + b"{" * 100,
        struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[9999999999999,9999999999999],"data_',
        struct.pack("<Q", 59) + b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,2147483]}}',
        struct.pack("<Q", 50_000) + b'{"a":' + b"[" * 49_990,
    ],
    ids=["empty", "endless", "short", "huge shape", "beyond the end", "nested"],
)
def test_absurd_headers_are_refused(tmp_path, load, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with bounded(), pytest.raises(CheckpointError, match=str(path)):
        load(path)


@pytest.mark.parametrize(
    ("load", "form"),
    [(checkpoint.load, checkpoint.FORMAT), (load_classifier, CLASSIFIER_FORMAT)],
)
def test_a_bottomless_configuration_is_refused(tmp_path, load, form):
    path = tmp_path / "weights.safetensors"
    header = {"format": form, "config": "[" * 200_000}
    checkpoint.write_tensors(path, {"embed.weight": torch.zeros(1)}, header)
    with bounded(), pytest.raises(CheckpointError, match=str(path)):
        load(path)


class Bomb:
    """Makes a file if it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth.tar", "weights.ckpt"])
def test_pickles_are_never_opened(tmp_path, name):
    fuse = tmp_path / "exploded"
    path = tmp_path / name
    torch.save({"state_dict": {"embed.weight": Bomb(fuse)}}, path)
    with pytest.raises(ValueError, match=str(path)):
        restorer.Restorer(path, device="cpu")
    with pytest.raises(CheckpointError, match=str(path)):
        checkpoint.read_published(path)
    with pytest.raises(CheckpointError, match=str(path)):
        load_classifier(path)
    assert not fuse.exists()


@pytest.mark.parametrize("filename", ["../weights.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_a_manifest_cannot_point_out_of_its_folder(tmp_path, monkeypatch, saved, filename):
    entry = {
        "role": "restorer",
        "summary": "",
        "filename": filename,
        "source": "by-hand",
        "page": "",
        "command": "",
        "licence": "",
    }
    content = {"schema": 1, "default": {"restorer": "evil"}, "files": {"evil": entry}}
    (tmp_path / "weights.json").write_text(json.dumps(content))
    (tmp_path / "sub").mkdir()
    monkeypatch.setattr(weights, "manifest_path", lambda: tmp_path / "weights.json")
    monkeypatch.setenv(weights.FOLDER_VARIABLE, str(tmp_path / "sub"))
    weights.manifest.cache_clear()
    try:
        with pytest.raises(WeightsError, match="filename"):
            weights.resolve("evil")
    finally:
        weights.manifest.cache_clear()


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no symbolic links here")
def test_a_link_as_output_keeps_pointing(tmp_path):
    target, link = tmp_path / "target.png", tmp_path / "link.png"
    write_image(target, np.zeros((4, 4), np.uint8))
    link.symlink_to(target)
    write_image(link, np.full((4, 4), 9, np.uint8), overwrite=True)
    assert link.is_symlink() and read_image(target).array.max() == 9


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /dev/full")
def test_a_full_disk_leaves_the_old_output(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    write_image(path, np.zeros((64, 64), np.uint8))
    before = path.read_bytes()
    resource = pytest.importorskip("resource")
    code = f"""
    import resource, signal, numpy as np
    from dfpir.files import write_image, ImageFileError
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    try:
        write_image({str(path)!r}, noise, overwrite=True)
    except ImageFileError as error:
        print(error)
    """
    assert resource
    told = subprocess.check_output([sys.executable, "-c", textwrap.dedent(code)], text=True)
    assert str(path) in told and told.count("\n") == 1
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["picture.png"]


AUDITED = """
import sys

FORBIDDEN = {"socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname",
             "socket.sendto", "urllib.Request", "http.client.connect", "pickle.find_class",
             "marshal.loads.untrusted", "os.system", "ftplib.connect"}

def watch(event, arguments):
    if event in FORBIDDEN:
        sys.stderr.write(f"FORBIDDEN {event} {arguments}\\n")
        sys.stderr.flush()

sys.addaudithook(watch)
from dfpir.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["restore", "classify", "weights"])
def test_no_run_opens_a_connection_or_unpickles(tmp_path, photograph, command):
    picture = tmp_path / "picture.png"
    write_image(picture, photograph[:40, :48])
    arguments = {
        "restore": [picture, "-o", tmp_path / "out.png", "--degradation", "noise-25"],
        "classify": [picture, "--json"],
        "weights": ["verify"],
    }[command]
    run = subprocess.run(
        [sys.executable, "-c", AUDITED, command, *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "FORBIDDEN" not in run.stderr


def test_the_watch_itself_barks():
    """The test above would see a connection."""
    code = AUDITED.replace("from dfpir.cli import main", "import socket").replace(
        "sys.exit(main(sys.argv[1:]))",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('127.0.0.1', 9))",
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "FORBIDDEN socket.connect" in run.stderr


@pytest.mark.slow
def test_soak(thorough):
    """Restoring again and again leaks neither memory nor handles, and gives the same bits."""
    subject = restorer.Restorer(device="cpu")
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    process = psutil.Process()
    first = subject.restore(picture, "rain").image

    def restore(count):
        for _ in range(count):
            assert np.array_equal(subject.restore(picture, "rain").image, first)
        handles = process.num_fds() if hasattr(process, "num_fds") else process.num_handles()
        return process.memory_info().rss, handles, process.num_threads()

    count = 1000 if thorough else 60
    memory, handles, threads = restore(count)
    memory_after, handles_after, threads_after = restore(count)
    assert memory_after <= 1.05 * memory
    assert (handles_after, threads_after) == (handles, threads)
