"""One self-contained HTML page per run: figures, curves, pictures, configuration."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from flowalign.reporting.trackers import read_metrics

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:900px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.3em 1em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{background:#f6f6f6;padding:1em;overflow:auto}"""


def write_report(run: Path, summary: dict[str, Any]) -> None:
    """run/report.html, from what lies in the run folder."""
    lines = read_metrics(run)
    parts = [
        f"<h1>{html.escape(run.name)}</h1>",
        f"<p>{summary['stopped']} after {summary['images']} images in {summary['seconds'] / 60:.1f} minutes.</p>",
        _table(summary),
        f"<h2>Before and after</h2>{_image((run / 'pictures' / 'before-after.png').read_bytes())}",
        f"<h2>Training</h2>{_image(_curves(lines, summary))}",
        f"<h2>Configuration</h2><pre>{html.escape((run / 'config.yaml').read_text())}</pre>",
        f"<h2>Environment</h2><pre>{html.escape(json.dumps(json.loads((run / 'environment.json').read_text()), indent=2))}</pre>",
    ]
    page = f"<!doctype html><meta charset='utf-8'><title>{html.escape(run.name)}</title><style>{STYLE}</style>{''.join(parts)}"
    (run / "report.html").write_text(page)


def _table(summary: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{summary['before'][name]:.3f}</td><td>{summary['after'][name]:.3f}</td>"
        f"<td>{mean:+.3f}</td><td>{low:+.3f} to {high:+.3f}</td></tr>"
        for name, (low, mean, high) in summary["difference"].items()
    )
    return f"<table><tr><th>reward</th><th>before</th><th>after</th><th>difference</th><th>95 % interval</th></tr>{rows}</table>"


def _curves(lines: list[dict[str, Any]], summary: dict[str, Any]) -> bytes:
    axis = "images" if summary["images"] else "step"
    last = max([line[axis] for line in lines], default=1)
    ends = {"before": 0, "after": last}
    lines = [
        *lines,
        *(
            {axis: x, **{f"eval/{name}": y for name, y in summary[end].items()}}
            for end, x in ends.items()
        ),
    ]
    lines.sort(key=lambda line: line[axis])
    names = sorted(
        {name for line in lines for name in line if name.startswith(("reward/", "eval/"))}
        - {"reward/groups_without_spread"}
    )
    names += [
        name
        for name in ("ratio/clipped", "kl", "loss", "grad_norm")
        if any(name in line for line in lines)
    ]
    rows = -(-len(names) // 3)
    figure = Figure(figsize=(9, height := 2.4 * rows))
    figure.subplots_adjust(
        left=0.06, right=0.98, top=1 - 0.3 / height, bottom=0.5 / height, wspace=0.25, hspace=0.5
    )
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(rows, 3, place)
        axes.locator_params(nbins=5)
        points = [(line[axis], line[name]) for line in lines if name in line]
        axes.plot(
            *zip(*points, strict=True),
            color="#2d52d6",
            linewidth=1.2,
            marker="o" if len(points) < 20 else None,
            markersize=3,
        )
        axes.set_title(name, fontsize=9)
        axes.set_xlabel(axis, fontsize=8)
        axes.set_xlim(0, last)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _image(png: bytes) -> str:
    return f"<img src='data:image/png;base64,{base64.b64encode(png).decode()}'>"
