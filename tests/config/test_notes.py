"""One file serves every objective: unused settings are notes, only contradictions are errors."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flowalign.batch import Examples, Pairs, Prompts
from flowalign.bundled import CONFIGS
from flowalign.cli import main
from flowalign.config.load import build_config, load_config
from flowalign.config.sections import Config
from flowalign.errors import UserError
from flowalign.objectives import OBJECTIVES
from flowalign.objectives.base import Objective
from flowalign.settings.by_name import imported
from flowalign.settings.merging import overridden
from flowalign.settings.yaml_files import parse_yaml, read_yaml

SHIPPED = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent != CONFIGS / "base")

NOTES = [
    ("alignprop", ["advantage.std=group"], "`advantage` is not used by the objective alignprop."),
    ("dpo_online", ["advantage.clip=2"], "`advantage` is not used by the objective dpo."),
    ("raft", ["advantage={name: win_rate}"], "`advantage` is not used by the objective raft."),
    ("dpo", ["advantage={name: win_rate}"], "`advantage` is not used by the objective dpo."),
    (
        "dpo",
        ["combine={name: minimum}"],
        "`combine` is not used with data.pairs, because no images are generated.",
    ),
    (
        "alignprop",
        ["train.drop_equal_groups=true"],
        "`train.drop_equal_groups` is not used by the objective alignprop.",
    ),
    ("crd", ["data.ranking.top=2"], "`data.ranking` is not used by the objective crd."),
    (
        "dpo",
        ["data.ranking.top=2"],
        "`data.ranking.top` is not used with data.pairs, because no images are generated.",
    ),
    (
        "dpo",
        ["data.ranking.by=dominance"],
        "`data.ranking.by` is not used with data.pairs, because no images are generated.",
    ),
    (
        "d3po",
        ["data.ranking={by: dominance, top: 2}"],
        "`data.ranking.top` is not used with data.ranking.by: dominance.",
    ),
    (
        "crd",
        ["sampler.window.size=2"],
        "`sampler.window` is not used without noise: sampler.dynamics is deterministic.",
    ),
    (
        "dpo",
        ["sampler.same_noise=true"],
        "`sampler.same_noise` is not used with data.pairs, because no images are generated.",
    ),
    (
        "crd",
        ["train.ema={decay: 0, every: 2}"],
        "`train.ema.every` is not used while train.ema.decay is 0.",
    ),
    (
        "crd",
        ["train.ema={decay: 0, warmup: false}"],
        "`train.ema.warmup` is not used while train.ema.decay is 0.",
    ),
    ("crd", ["model.revision=main"], "`model.revision` is not used for a local folder."),
]


@pytest.mark.parametrize(("file", "overrides", "note"), NOTES)
def test_a_setting_without_effect_is_noted(file, overrides, note):
    assert load_config(CONFIGS / "tiny" / f"{file}.yaml", overrides).notes == [note]


@pytest.mark.parametrize(("file", "noted"), [("flow_grpo", True), ("prdp", True), ("nft", False)])
def test_compiled_blocks_are_noted_where_ratios_of_paths_count(file, noted):
    notes = load_config(CONFIGS / "tiny" / f"{file}.yaml", ["model.compile=true"]).notes
    assert ["`flowalign check` measures" in note for note in notes] == [True] * noted


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_file_needs_no_note(path):
    assert load_config(path).notes == []


def test_a_command_prints_the_notes(capsys, monkeypatch):
    monkeypatch.setattr("flowalign.diagnostics.plan.report", lambda *_: [])
    path = CONFIGS / "tiny" / "crd.yaml"
    assert main(["plan", str(path), "data.ranking.top=2"]) == 0
    assert "`data.ranking` is not used by the objective crd." in capsys.readouterr().out


# one override for another objective

Rule = Callable[[Config, type[Objective]], bool]


def uses_pairs(objective: type[Objective]) -> bool:
    return objective.learns_from in (Pairs, Examples)


def generates(config: Config, objective: type[Objective]) -> bool:
    return not config.data.pairs and objective.learns_from is not Examples


def without_noise(config: Config, objective: type[Objective]) -> bool:
    return generates(config, objective) and not config.sampler.stochastic_steps(0, 0)


CONTRADICTIONS: dict[str, Rule] = {
    "data.pairs is given, but the objective": lambda c, o: bool(c.data.pairs) and not uses_pairs(o),
    "data.pairs is missing": lambda c, o: not c.data.pairs and o.learns_from is Examples,
    "images of the same prompt are compared": lambda c, o: (
        generates(c, o) and o.learns_from is not Prompts and c.train.images_per_prompt < 2
    ),
    "learns from stochastic steps, but sampler.dynamics has none": lambda c, o: (
        # Paths of votes are made again, so given pairs need the steps too.
        o.needs_stochastic_steps and not c.sampler.stochastic_steps(0, 0)
    ),
    "so all images of a prompt would be equal": lambda c, o: (
        c.sampler.same_noise and without_noise(c, o)
    ),
    "ddpo learns from a rollout once": lambda c, o: (
        o.__name__ == "DDPO" and generates(c, o) and c.train.updates_per_step > 1
    ),
}
"""Why a shipped file and a built-in objective cannot train together, as the message says it."""


FILES = {path: read_yaml(path) for path in SHIPPED}


@pytest.fixture(scope="module")
def shipped() -> dict[Path, Config]:
    return {path: build(path) for path in SHIPPED}


def build(path: Path, *overrides: str) -> Config:
    file = FILES[path]
    return build_config(overridden(file.values, list(overrides), parse_yaml), path, file.folders)


def refusal(path: Path, *overrides: str) -> str:
    """The message of an error, or nothing."""
    try:
        build(path, *overrides)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_shipped_file_takes_the_objective_by_one_override_unless_they_contradict(
    name, shipped
):
    objective = imported(OBJECTIVES[name], "objective", OBJECTIVES)
    loaded = 0
    for path, config in shipped.items():
        reasons = [text for text, rule in CONTRADICTIONS.items() if rule(config, objective)]
        message = refusal(path, f"objective={{name: {name}}}")
        loaded += not message
        if type(config.objective) is objective:
            assert not message
        else:
            assert bool(message) == bool(reasons), f"{path}: {message or reasons}"
            assert not message or any(reason in message for reason in reasons), message
    assert loaded
