"""A person in a browser: opens a deployment's form, changes the guidance, starts it and looks at the grid.

Needs `pip install playwright` and a Chromium (Debian: `apt-get install chromium`), which CI machines need not have.
REPAE_SCREENSHOTS=folder keeps the pictures; those in docs/images were made so, with REPAE_STACK_API.
"""

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import served
import tiny

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
STACK = os.environ.get("REPAE_STACK_API")  # of a compose stack that has finished full-pipeline/dev
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]


@pytest.fixture
def pictures(tmp_path) -> Path:
    return Path(os.environ.get("REPAE_SCREENSHOTS", tmp_path))


def dev_deployments(server: served.Served) -> dict[str, dict[str, Any]]:
    """Flow name -> its deployment `dev`."""
    flows = {flow["id"]: flow["name"] for flow in server.ask("flows/filter", {})}
    return {flows[d["flow_id"]]: d for d in server.ask("deployments/filter", {}) if d["name"] == "dev"}


def field(page, title: str):
    """The form's field with its input."""
    label = page.get_by_text(f"{title} (Optional)", exact=True)
    return label.locator("xpath=ancestor::div[contains(concat(' ', @class, ' '), ' p-label ')][1]")


def choose(page, title: str, choice: str) -> None:
    """Pick from a list, with the keyboard: the list closes again under a click that is as quick as a script's."""
    field(page, title).locator("button.p-select-button__control").press("ArrowDown")
    page.get_by_role("option", name=choice, exact=True).click()


def submit(page) -> dict[str, Any]:
    """Press the button, again where the server asks for it; the new flow run."""
    for _ in range(5):
        with page.expect_response(lambda answer: "create_flow_run" in answer.url) as answered:
            page.get_by_role("button", name="Submit").click()
        if answered.value.status != served.BUSY:
            break
        page.wait_for_timeout(2000)
    assert answered.value.status == 201, answered.value.text()
    return answered.value.json()


def generate_from_the_form(server: served.Served, pictures: Path) -> dict[str, Any]:
    """Start `generate/dev` with another guidance, wait for its end, look at the grid; the run's parameters."""
    ui, deployment = server.api.removesuffix("/api"), dev_deployments(server)["generate"]
    with playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.set_default_timeout(90_000)
        page.goto(f"{ui}/deployments/deployment/{deployment['id']}/run")
        choose(page, "Untrained Baseline", "false")
        field(page, "Guidance").locator("input").first.fill("2.5")
        field(page, "Guidance").scroll_into_view_if_needed()
        page.screenshot(path=pictures / "prefect-form.png")
        run = submit(page)
        page.goto(f"{ui}/runs/flow-run/{run['id']}")
        page.get_by_text("Completed", exact=True).first.wait_for(timeout=600_000)
        page.screenshot(path=pictures / "prefect-run.png")
        page.get_by_role("tab", name="Artifacts").or_(page.get_by_text("Artifacts", exact=True)).first.click()
        page.get_by_text("samples", exact=True).first.click()
        grid = page.locator("img[src^='data:image/jpeg']")
        grid.wait_for()
        assert grid.evaluate("image => image.naturalWidth") > 0
        page.screenshot(path=pictures / "prefect-grid.png")
        browser.close()
    return server.ask(f"flow_runs/{run['id']}", None, method="GET")["parameters"]


def with_the_choices(overrides: dict[str, Any]) -> dict[str, Any]:
    """What must arrive: what nobody touched in the form stays as in the preset."""
    expected = copy.deepcopy(overrides)
    expected.setdefault("generate", {})["guidance"] = 2.5
    expected.setdefault("evaluate", {})["untrained_baseline"] = False
    return expected


def chosen(overrides: dict[str, Any]) -> dict[str, Any]:
    """Without the sections that say nothing."""
    kept = {name: chosen(value) if isinstance(value, dict) else value for name, value in overrides.items()}
    return {name: value for name, value in kept.items() if value != {}}


def test_one_stage_from_the_ui(tmp_path, pictures):
    usual = served.overrides(tiny.write_images(tmp_path / "images"))
    with served.serve(tmp_path) as server:
        # The tiny settings become what the forms of these deployments are filled with.
        for name in ("full-pipeline", "generate"):
            parameters = {"preset": "quickstart", "overrides": usual}
            identifier = dev_deployments(server)[name]["id"]
            server.ask(f"deployments/{identifier}", {"parameters": parameters}, method="PATCH")
        assert server.run("full-pipeline/dev").returncode == 0
        assert chosen(generate_from_the_form(server, pictures)["overrides"]) == with_the_choices(usual)


@pytest.mark.skipif(STACK is None, reason="REPAE_STACK_API does not say where a compose stack's Prefect API is")
def test_one_stage_from_the_ui_of_the_stack(pictures):
    server = served.Served({"PREFECT_API_URL": str(STACK)})
    assert chosen(generate_from_the_form(server, pictures)["overrides"]) == with_the_choices({})
