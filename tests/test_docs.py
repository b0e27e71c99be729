"""The documentation agrees with the code: links, tables, layers, and the figures it repeats."""

import importlib
import json
import re
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

from flowalign.advantages import ADVANTAGES
from flowalign.config.build import build_sampler
from flowalign.config.resolved import MAY_CHANGE
from flowalign.dynamics import DYNAMICS
from flowalign.models.base import FlowModel
from flowalign.objectives import OBJECTIVES
from flowalign.rewards import REWARDS
from flowalign.rewards.combine import COMBINE
from flowalign.settings.types import settings_of
from flowalign.training.preflight import check_marginals
from tests.test_layers import ORDER

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
ROOT_PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
OBJECTIVE_PAGES = [DOCS / "objectives" / f"{name}.md" for name in OBJECTIVES]
HEADINGS = (
    "Formula",
    "When to choose it",
    "Settings",
    "Metrics to watch",
    "Expected curve",
    "Configurations",
    "Differences from the paper",
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED_PATH = re.compile(
    r"(?<![\w/.-])((?:configs|docs|assets|scripts|benchmarks|flowalign|tests)/[\w/.-]*\w)"
)
LOGGED_BY_THE_LOOP = ("reward/", "eval/")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text).strip().lower().replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", [*PAGES, *ROOT_PAGES], ids=name)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)} links to {target}"
        assert not anchor or anchor in anchors(file), f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", [*PAGES, *ROOT_PAGES], ids=name)
def test_every_file_that_a_page_names_exists(page):
    for path in NAMED_PATH.findall(page.read_text(encoding="utf-8")):
        if "NAME" in path:
            continue  # It stands for any name.
        assert (ROOT / path).exists() or any(ROOT.glob(f"{path}*")), f"{name(page)} names {path}"


def test_the_site_lists_every_page_once():
    navigation = json.dumps(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    listed = re.findall(r'"([\w/-]+\.md)"', navigation)
    assert sorted(listed) == [str(page.relative_to(DOCS)) for page in PAGES]


def test_the_site_takes_nothing_from_the_network():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert settings["theme"]["font"] is False
    assert all((DOCS / file).is_file() for file in settings["extra_css"])
    assert "extra_javascript" not in settings


@pytest.mark.parametrize("page", OBJECTIVE_PAGES, ids=lambda page: page.stem)
def test_the_page_of_an_objective_has_all_parts_and_every_tiny_configuration(page):
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == list(HEADINGS)
    for file in (ROOT / "configs").rglob("*.yaml"):
        objective = yaml.safe_load(file.read_text()).get("objective", {})
        if objective.get("name") == page.stem and file.parent.name != "base":
            assert name(file) in text, f"{name(page)} leaves out {name(file)}"


@pytest.mark.parametrize("page", OBJECTIVE_PAGES, ids=lambda page: page.stem)
def test_the_metrics_on_the_page_of_an_objective_are_those_it_logs(page):
    section = page.read_text(encoding="utf-8").split("## Metrics to watch")[1].split("\n## ")[0]
    folder = ROOT / "flowalign" / "objectives"
    code = (folder / f"{page.stem}.py").read_text() + (folder / "terms.py").read_text()
    metrics = [
        metric
        for row in section.splitlines()
        if row.startswith("| `")
        for metric in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]
    assert metrics
    for metric in metrics:
        assert metric.startswith(LOGGED_BY_THE_LOOP) or f'"{metric}"' in code, metric


def test_measured_tables_and_curves_are_those_of_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    pages = importlib.import_module("pages")
    for page, text in pages.pages().items():
        assert page.read_text(encoding="utf-8") == text, page
    shown = re.findall(r"<!-- curve: (\w+) -->", "".join(pages.pages().values()))
    assert set(shown) == set(pages.read_results(pages.MEASURED / "objectives.json"))


def test_the_drawn_layers_are_those_that_the_imports_are_held_to():
    text = (DOCS / "how-it-works.md").read_text(encoding="utf-8")
    lines = text.split("## Layers")[1].split("```text\n")[1].split("```")[0].splitlines()
    drawn = [folder for line in reversed(lines) for folder in line.split()]
    assert drawn == [folder for folder in ORDER if folder in drawn]
    folders = {path.parent.name for path in (ROOT / "flowalign").glob("*/__init__.py")}
    assert folders <= set(drawn)


def test_the_page_s_model_is_complete_and_keeps_the_conventions(tmp_path, monkeypatch):
    page = (DOCS / "your-own-model.md").read_text(encoding="utf-8")
    (tmp_path / "my_family.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    family = importlib.import_module("my_family")
    config = family.MyConfig(name="my_family.py:MyModel", path=".", height=64, width=64)
    model = family.MyModel(config)
    cond = model.encode(["a red circle", "a blue square"])
    x = torch.randn(2, *model.latent_shape)
    assert model.velocity(x, torch.full((2,), 0.5), cond).shape == x.shape
    assert model.decode(x).shape == (2, 3, 64, 64)
    assert (model.schedule(4)[0], model.schedule(4)[-1]) == (1, 0)


def test_the_page_on_models_names_every_member_that_a_family_must_provide():
    page = (DOCS / "your-own-model.md").read_text(encoding="utf-8")
    table = page.split("### What it provides")[1].split("Some members")[0]
    assert all(f"`{member}" in table for member in FlowModel.__abstractmethods__)


def test_the_page_on_rewards_lists_every_built_in_one():
    text = (DOCS / "rewards.md").read_text(encoding="utf-8")
    assert all(f"`{reward}`" in text for reward in REWARDS)
    assert all(f"{{name: {rule}" in text for rule in COMBINE)


def test_the_page_on_objectives_lists_advantages_and_samplers():
    text = (DOCS / "objectives" / "index.md").read_text(encoding="utf-8")
    assert all(f"| `{entry}` |" in text for entry in [*ADVANTAGES, *DYNAMICS])


def test_the_page_s_sampler_step_is_a_setting_and_keeps_the_marginals(tmp_path, monkeypatch):
    page = (DOCS / "objectives" / "index.md").read_text(encoding="utf-8")
    yaml_text, code = (
        page.split("### Your own step")[1].split(f"```{language}\n")[1].split("```")[0]
        for language in ("yaml", "python")
    )
    (tmp_path / "my_sampler.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    step = build_sampler(yaml.safe_load(yaml_text)["sampler"]).dynamics
    assert settings_of(step) == {"eta": 0.5}
    times = [1.0, 0.75, 0.5, 0.25, 0.0]
    assert not check_marginals(step, times, range(3)).wrong
    latent = torch.zeros(2, 4)
    assert all(step(latent, latent, t, s).std > 0 for t, s in pairwise(times[:-1]))


def test_the_page_on_resuming_lists_the_keys_that_may_change():
    text = (DOCS / "reliability.md").read_text(encoding="utf-8")
    listed = text.split("These keys may change in between:")[1].split("Any other")[0]
    assert re.findall(r"`([\w.]+)`", listed) == list(MAY_CHANGE)


def test_the_oldest_versions_on_the_page_are_those_of_the_package():
    text = (DOCS / "quick-start.md").read_text(encoding="utf-8").split("## Versions")[1]
    rows = dict(re.findall(r"^\| (\w+)[^|]* \| ([\d.]+) \|", text, re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = dict(entry.split(">=") for entry in project["dependencies"] if ">=" in entry)
    python = project["requires-python"].removeprefix(">=")
    assert rows == {"Python": python} | {name: bounds[name] for name in rows if name in bounds}


def test_generated_pages_are_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = importlib.import_module("make_configuration_page")
    for path, text in script.pages().items():
        stale = f"{name(path)} is stale. Run python scripts/make_configuration_page.py."
        assert path.read_text(encoding="utf-8") == text, stale
