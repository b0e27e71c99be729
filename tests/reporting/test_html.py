"""report.html: complete, self-contained, and harmless whatever names and prompts it shows."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch

from flowalign.reporting.html import draw_curves, write_report
from flowalign.reporting.images import save_picture
from flowalign.reporting.trackers import JsonLines

HOSTILE = "<script>alert('x')</script>"


def summary(name="scene_match", **changes):
    scores = {
        "before": {name: 0.25},
        "after": {name: 0.75},
        "difference": {name: (0.4, 0.5, 0.6)},
    }
    return {**scores, "images": 14400, "seconds": 90.0, "stopped": "finished", **changes}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "my run & <b>"
    save_picture(torch.zeros(3, 8, 8).byte(), folder / "pictures" / "before-after.png")
    (folder / "config.yaml").write_text(f'data: {{prompts: "{HOSTILE}"}}\n')
    (folder / "environment.json").write_text(json.dumps({"python": HOSTILE}))
    tracker = JsonLines(folder, 0)
    for step in (1, 2):
        tracker.log(step, {"images": 8 * step, "reward/combined": 0.1 * step, "loss": 1.0})
    return folder


def test_the_report_shows_figures_pictures_and_settings(run):
    write_report(run, summary())
    page = (run / "report.html").read_text()
    for text in ("Finished after 14,400 images in 1.5 minutes", "+0.500", "+0.400 to +0.600"):
        assert text in page
    # The sheet, and curves of the reward, the evaluation and the loss.
    assert page.count('src="data:image/png;base64,') == 1 + 3
    assert 'name="viewport"' in page


def test_whatever_the_user_wrote_is_escaped(run):
    write_report(run, summary(name=HOSTILE))
    page = (run / "report.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 3
    assert "my run &amp; &lt;b&gt;" in page


def test_the_report_asks_no_other_server(run):
    write_report(run, summary())
    addresses = []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attributes):
            addresses.extend(value for name, value in attributes if name in ("src", "href"))

    Links().feed((run / "report.html").read_text())
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    assert not re.search(r"url\(|@import", (run / "report.html").read_text())


def test_a_run_without_images_is_drawn_over_steps():
    entries = [{"step": 1, "images": 0, "loss": 2.0}, {"step": 2, "images": 0, "loss": None}]
    names = [name for name, _ in draw_curves(entries, summary(images=0))]
    assert names == ["eval/scene_match", "loss"]
