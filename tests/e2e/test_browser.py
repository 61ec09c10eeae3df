"""A person in a browser: opens a deployment's form, changes the guidance, starts it and looks at the grid.

Needs `pip install playwright` and a Chromium (Debian: `apt-get install chromium`), which CI machines need not have.
REPAE_SCREENSHOTS=folder keeps the pictures; those in docs/images were made so.
"""

import copy
import os
import shutil
from pathlib import Path

import pytest
import served
import tiny

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]


def field(page, title: str):
    """The form's field with its input."""
    label = page.get_by_text(f"{title} (Optional)", exact=True)
    return label.locator("xpath=ancestor::div[contains(concat(' ', @class, ' '), ' p-label ')][1]")


def choose(page, title: str, choice: str) -> None:
    """Pick from a list, with the keyboard: the list closes again under a click that is as quick as a script's."""
    field(page, title).locator("button.p-select-button__control").press("ArrowDown")
    page.get_by_role("option", name=choice, exact=True).click()


def submit(page) -> None:
    """Press the button, again where the server asks for it."""
    for _ in range(5):
        with page.expect_response(lambda answer: "create_flow_run" in answer.url) as answered:
            page.get_by_role("button", name="Submit").click()
        if answered.value.status != served.BUSY:
            break
        page.wait_for_timeout(2000)
    assert answered.value.status == 201, answered.value.text()


def started(server: served.Served, flow: str) -> str:
    """The flow's only run."""
    (run,) = (run for run in server.ask("flow_runs/filter", {}) if run["flow_id"] == flow)
    return str(run["id"])


def test_one_stage_from_the_ui(tmp_path):
    pictures = Path(os.environ.get("REPAE_SCREENSHOTS", tmp_path))
    usual = served.overrides(tiny.write_images(tmp_path / "images"))
    with served.serve(tmp_path) as server, playwright.sync_playwright() as player:
        # The tiny settings become what the forms of these deployments are filled with.
        flows = {flow["id"]: flow["name"] for flow in server.ask("flows/filter", {})}
        dev = {flows[d["flow_id"]]: d for d in server.ask("deployments/filter", {}) if d["name"] == "dev"}
        for name in ("full-pipeline", "generate"):
            parameters = {"preset": "quickstart", "overrides": usual}
            server.ask(f"deployments/{dev[name]['id']}", {"parameters": parameters}, method="PATCH")
        assert server.run("full-pipeline/dev").returncode == 0

        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.set_default_timeout(90_000)
        ui = server.api.removesuffix("/api")
        page.goto(f"{ui}/deployments/deployment/{dev['generate']['id']}/run")
        choose(page, "Untrained Baseline", "false")
        field(page, "Guidance").locator("input").first.fill("2.5")
        field(page, "Guidance").scroll_into_view_if_needed()
        page.screenshot(path=pictures / "prefect-form.png")
        submit(page)
        page.goto(f"{ui}/runs/flow-run/{started(server, dev['generate']['flow_id'])}")
        page.get_by_text("Completed", exact=True).first.wait_for(timeout=180_000)
        page.screenshot(path=pictures / "prefect-run.png")
        page.get_by_role("tab", name="Artifacts").or_(page.get_by_text("Artifacts", exact=True)).first.click()
        page.get_by_text("samples", exact=True).first.click()
        grid = page.locator("img[src^='data:image/jpeg']")
        grid.wait_for()
        assert grid.evaluate("image => image.naturalWidth") > 0
        page.screenshot(path=pictures / "prefect-grid.png")
        browser.close()

        run = server.ask(f"flow_runs/{started(server, dev['generate']['flow_id'])}", None, method="GET")
        expected = copy.deepcopy(usual)
        expected["generate"]["guidance"] = 2.5
        expected["evaluate"]["untrained_baseline"] = False
        assert run["parameters"]["overrides"] == expected, "what nobody touched in the form stays as in the preset"
