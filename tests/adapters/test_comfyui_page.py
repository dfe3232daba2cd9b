"""The pack on ComfyUI's page, in a headless Chromium; see `comfyui_server` for what names a server.

``COMFYUI_SCREENSHOTS`` names a folder for pictures of what the tests saw, to be looked at.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from comfyui_server import MARKS, PACK

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [*MARKS, pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")]
pytest_plugins = ["comfyui_fixtures"]

FLAGS = ["--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader"]
PATIENCE = 300_000
"""Milliseconds to wait for anything: only a broken page takes them."""

EXAMPLES = ("restore_image", "diagnose_then_restore", "restore_video_frames")
RESTORES = "window.app.graph.nodes.find(node => node.type === 'DFPIRRestore')"
REPORT = f"{RESTORES}?.widgets.find(widget => widget.name === '$$node-text-preview')?.value"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def open_page(server, browser):
    """Returns a function that opens the page in a language; only the server can be reached."""
    pages = []

    def reach(route):
        local = (f"http://127.0.0.1:{server.port}", "data:", "blob:")
        return route.continue_() if route.request.url.startswith(local) else route.abort()

    def show(language="en"):
        settings = {
            "Comfy.TutorialCompleted": True,
            "Comfy.Locale": language,
            "Comfy.VueNodes.Enabled": False,
        }
        for name, value in settings.items():
            server.post(f"/settings/{name}", value)
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        pages.append(page)
        page.set_default_timeout(PATIENCE)
        page.route("**/*", reach)
        page.goto(f"http://127.0.0.1:{server.port}", wait_until="domcontentloaded")
        page.wait_for_function(
            "window.app?.graph && window.LiteGraph?.registered_node_types.DFPIRRestore"
            " && window.app.extensionManager && !window.app.extensionManager.spinner"
        )
        return page

    yield show
    for page in pages:
        page.close()


def command(page, name):
    page.evaluate(f"window.app.extensionManager.command.execute({name!r}), null")


def load_example(page, name):
    graph = json.loads((PACK / f"example_workflows/{name}.json").read_text(encoding="utf-8"))
    page.evaluate("graph => window.app.loadGraphData(graph)", graph)
    page.wait_for_function(RESTORES)
    command(page, "Comfy.Canvas.FitView")


def help_of_our_node(page, words):
    page.evaluate(f"window.app.canvas.selectNode({RESTORES})")
    page.locator("[data-testid='info-button'], .help-button").first.click()
    page.get_by_text(words).first.wait_for()


def keep_picture(page, name):
    folder = os.environ.get("COMFYUI_SCREENSHOTS")
    if folder:
        page.wait_for_timeout(1500)
        page.screenshot(path=Path(folder) / f"{name}.png")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_loads_runs_and_shows_its_result(server, degraded, open_page, name):
    server.give("example.png", degraded["noise-25"])
    server.give_video("video.mp4", [degraded["noise-25"]] * 2)
    page = open_page()
    load_example(page, name)
    page.locator("[data-testid='queue-button']").first.click()
    page.wait_for_function(REPORT)
    assert "Gaussian noise" in page.evaluate(REPORT)
    shown = "node.imgs?.length || node.videoContainer"
    page.wait_for_function(
        f"window.app.graph.nodes.some(node => node.type.startsWith('Save') && ({shown}))"
    )
    keep_picture(page, name)


def test_the_way_of_a_newcomer(server, degraded, open_page):
    """Find the node by what it is for, add it, run it, read about it."""
    server.give("example.png", degraded["rain"])
    page = open_page()
    page.evaluate("window.app.graph.clear()")
    knows_aliases = "search_aliases" in server.get("/object_info/DFPIRRestore")["DFPIRRestore"]
    command(page, "Workspace.SearchBox.Toggle")
    page.keyboard.type("denoise" if knows_aliases else "restore image", delay=50)
    found = page.get_by_text("Restore Image (DFPIR)").last  # the first may be in a preview
    found.wait_for()
    keep_picture(page, "search")
    found.click()
    page.wait_for_function(RESTORES)
    # Newer pages hang the node on the mouse, a moment after it is there, until the next click.
    page.wait_for_function(f"!{RESTORES}.flags.ghost || window.app.canvas.state.ghostNodeId")
    page.locator("#graph-canvas").click(position={"x": 700, "y": 400})  # once nothing covers it
    page.wait_for_function(f"!{RESTORES}.flags.ghost")
    page.evaluate(
        "file => {"
        f" const restores = {RESTORES};"
        " const [loads, shows] = ['LoadImage', 'PreviewImage'].map(kind => {"
        "  const node = LiteGraph.createNode(kind); window.app.graph.add(node); return node; });"
        " loads.widgets.find(widget => widget.name === 'image').value = file;"
        " loads.pos = [restores.pos[0] - 340, restores.pos[1]];"
        " shows.pos = [restores.pos[0] + 340, restores.pos[1]];"
        " loads.connect(0, restores, 0); restores.connect(0, shows, 0); }",
        "example.png",
    )
    page.locator("[data-testid='queue-button']").first.click()
    page.wait_for_function(REPORT)
    assert "rain" in page.evaluate(REPORT)
    help_of_our_node(page, "It works at once, on weights that ship with it")
    keep_picture(page, "newcomer")


def test_the_page_speaks_chinese(open_page):
    page = open_page("zh")
    load_example(page, "diagnose_then_restore")
    titles = page.evaluate("window.app.graph.nodes.map(node => node.getTitle())")
    assert {"图像复原（DFPIR）", "图像退化诊断（DFPIR）"} <= set(titles)
    help_of_our_node(page, "使用自带的权重，装好即可运行")
    keep_picture(page, "chinese")


def test_examples_are_among_the_templates(open_page):
    page = open_page()
    command(page, "Comfy.BrowseTemplates")
    page.get_by_text("dfpir", exact=True).first.click()
    for name in EXAMPLES:
        page.get_by_test_id(f"template-workflow-{name}").first.wait_for()
    keep_picture(page, "templates")
