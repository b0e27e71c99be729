"""Files for real models say how they differ from what was published, and what they say is so.

Values under `PUBLISHED` were read in the released code that each file's header names.
"""

import re
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path

import pytest

from flowalign.bundled import CONFIGS
from flowalign.config.load import load_config
from flowalign.config.resolved import resolve
from flowalign.settings.yaml_files import parse_yaml

FILES = sorted(path for folder in ("sd3", "flux") for path in (CONFIGS / folder).glob("*.yaml"))
NONE = re.compile(r"^Deviations from [^:]+: none\.$", re.MULTILINE)
RULE = re.compile(r"\|[-|]+\|")
COLUMNS = ["key", "published", "here", "why"]

FLOW_GRPO = {
    "model.dtype": "float16",
    "model.height": 512,
    "model.max_sequence_length": 128,
    "model.lora.rank": 32,
    "model.lora.alpha": 64,
    "model.lora.init": "gaussian",
    "sampler.steps": 10,
    "sampler.guidance": 4.5,
    "sampler.dynamics": {"name": "flow_sde", "eta": 0.7},
    "sampler.same_noise": False,
    "objective.clip_range": 1e-4,
    "objective.kl_weight": 0.04,
    "objective.kl": "per_time",
    "advantage": {"name": "group", "std": "global", "epsilon": 1e-4, "clip": 5.0},
    "train.steps": 100000,
    "train.prompts_per_step": 48,
    "train.images_per_prompt": 24,
    "train.updates_per_step": 2,
    "train.learning_rate": 3e-4,
    "train.weight_decay": 1e-4,
    "train.max_grad_norm": 1.0,
    "train.ema.decay": 0.9,
    "train.ema.every": 8,
    "train.evaluate_every": 60,
    "evaluation.sampler.steps": 40,
}
ONE_GPU = FLOW_GRPO | {"train.prompts_per_step": 8, "train.images_per_prompt": 8}
OF_FLOW_GRPO = ("objective", "sampler.dynamics", "train.evaluate_every")
UNGUIDED = {key: FLOW_GRPO[key] for key in FLOW_GRPO if not key.startswith(OF_FLOW_GRPO)}
UNGUIDED |= {"sampler.guidance": 1.0}


def under(key: str, **values: object) -> dict[str, object]:
    """Return values by dotted key."""
    return {f"{key}.{name}": value for name, value in values.items()}


NFT = {
    "sampler.dynamics.name": "dpm2, of second order",
    "objective.beta": 1.0,
    "objective.limit": 5.0,
    "objective.times.shared": False,
    "objective.kl.weight": 1e-4,
    **under("objective.old", start=0, value=0.0, slope=1e-3, end=0.5),
    "train.updates_per_step": 1,
    "train.ema.every": 1,
}
AWM = {
    "sampler.dynamics.name": "SA-Solver without noise",
    "sampler.steps": 14,
    "objective.weighting": "ghuber",
    "objective.scale": 0.2,  # advantage_max 1 over the clip of 5
    "objective.clip_range": 1.0,
    "objective.trust": 1.0,
    "objective.kl.weight": 1e-4,
    "objective.old.slope": 1e-3,
    "objective.old.end": 0.3,
    "objective.times.count": 6,
    "objective.times.points": 14,
    "objective.times.shift": 3.0,
    "train.prompts_per_step": 24,
    "train.updates_per_step": 1,
    "train.ema.decay": 0.99,
    "train.ema.every": 1,
    "train.evaluate_every": 50,
}
DGPO = {
    "sampler.dynamics.name": "DPM-Solver++",
    "model.dtype": "bfloat16",
    "model.lora.rank": 64,
    "model.lora.alpha": 128,
    "objective.times.count": 4,
    "objective.times.points": 10,
    "objective.times.shift": 3.0,
    "objective.times.shared": True,
    "objective.old.slope": 1e-3,
    "objective.old.end": 0.3,
    "train.steps": "no end",
    "train.prompts_per_step": 8,
    "train.updates_per_step": 1,
    "train.evaluate_every": 60,
}
CRD = {
    "sampler.dynamics.name": "ode",
    "model.dtype": "bfloat16",
    "objective.beta": 1.0,
    "objective.adaptive": True,
    "objective.form": "mse",
    "objective.temperature": 0.0,  # the released -1: equal weights
    "objective.limit": 5.0,
    "objective.kl": {"weight": 0.1, "guidance": 4.5},
    "objective.kl_least": 1e-4,
    **under("objective.old", start=0, value=0.25, slope=0.005, end=0.999),
    **under("objective.sampler", start=75, value=0.0, slope=0.0075, end=0.999),
    "objective.times.count": 20,
    "objective.times.points": 10,
    "objective.times.shift": 3.0,
    "train.steps": "no end",
    "train.ema.decay": 0.995,
    "train.ema.every": "10 steps",
    "train.evaluate_every": 20,
}
FLUX = {
    **{key: FLOW_GRPO[key] for key in FLOW_GRPO if key.startswith(("train.", "advantage"))},
    "model.dtype": "bfloat16",
    "model.lora.rank": 64,
    "model.lora.alpha": 128,
    "sampler.steps": 6,
    "sampler.embedded_guidance": 3.5,
    "objective.clip_range": 1e-4,
    "objective.kl_weight": 0.0,
    "train.evaluate_every": 30,
    "evaluation.sampler.steps": 28,
}
PUBLISHED = {
    "sd3/geneval.yaml": FLOW_GRPO,
    "sd3/ocr.yaml": FLOW_GRPO,
    "sd3/pickscore.yaml": FLOW_GRPO | {"objective.kl_weight": 0.01},
    **{f"sd3/{name}_{gb}gb.yaml": ONE_GPU for name in ("geneval", "ocr") for gb in (24, 80)},
    **{f"sd3/pickscore_{gb}gb.yaml": ONE_GPU for gb in (24, 80)},
    "sd3/flow_grpo_fast.yaml": FLOW_GRPO
    | {
        "sampler.guidance": 1.0,
        "sampler.dynamics": {"name": "cps", "eta": 0.8},
        "sampler.window.size": 3,
        "sampler.window.range": [0, 5],
        "objective.clip_range": 1e-5,
        "objective.kl_weight": 0.0,
        "train.prompts_per_step": 64,
        "train.images_per_prompt": 18,
    },
    "sd3/grpo_guard.yaml": FLOW_GRPO
    | {
        "objective.clip_range": 4e-6,
        "objective.kl_weight": 0.0,
        "objective.ratio": "normalised",
        "train.learning_rate": 1e-4,
        "train.evaluate_every": 30,
        "advantage": {"name": "group", "std": "group", "epsilon": 1e-4, "clip": 5.0},
    },
    "sd3/nft.yaml": UNGUIDED | NFT,
    "sd3/awm.yaml": UNGUIDED | AWM,
    "sd3/crd.yaml": UNGUIDED | CRD,
    "sd3/crd_ocr.yaml": UNGUIDED | CRD,
    "sd3/crd_geneval.yaml": UNGUIDED | CRD,
    "sd3/dgpo.yaml": UNGUIDED
    | DGPO
    | {
        "objective.beta": 100.0,
        "objective.clip_range": 1e-3,
        "objective.kl": {"weight": 0.02, "guidance": 4.5},
        "train.images_per_prompt": 16,
        "evaluation.sampler.steps": 10,
    },
    "sd3/dgpo_pickscore.yaml": UNGUIDED
    | DGPO
    | {
        "sampler.guidance": 4.5,
        "objective.guidance": 1.0,
        "objective.beta": 10.0,
        "objective.clip_range": 5e-2,
        "objective.kl": {"weight": 1e-3, "guidance": None},
        "evaluation.sampler.steps": 14,
    },
    "flux/pickscore_80gb.yaml": FLUX | {"sampler.dynamics": {"name": "flow_sde", "eta": 0.9}},
    "flux/geneval_80gb.yaml": FLUX
    | {
        "sampler.dynamics": {"name": "cps", "eta": 0.8},
        "sampler.window.size": 3,
        "sampler.window.range": [0, 3],
        "objective.clip_range": 1e-5,
    },
    "flux/mix_grpo_80gb.yaml": {
        "model.dtype": "bfloat16",
        "model.height": 720,
        "sampler.steps": 25,
        "sampler.dynamics": {"name": "flow_sde", "eta": 0.7},
        "sampler.same_noise": True,
        "sampler.window.size": 4,
        "sampler.window.moves": "progressive",
        "sampler.window.stay": 25,
        "objective.clip_range": 1e-4,
        "objective.kl_weight": 0.0,
        "advantage.clip": 5.0,
        "train.steps": 300,
        "train.prompts_per_step": 32,
        "train.images_per_prompt": 12,
        "train.updates_per_step": 4,
        "train.learning_rate": 1e-5,
        "train.weight_decay": 1e-4,
        "train.max_grad_norm": 1.0,
        "train.ema.decay": 0.0,
        "train.save_every": 50,
    },
}


@dataclass(frozen=True)
class Row:
    """A deviation of a file."""

    key: str
    published: str
    here: str
    why: str


@dataclass(frozen=True)
class Header:
    """What the comments at the top of a file say of its deviations."""

    text: str

    @property
    def rows(self) -> list[Row]:
        """The table's: deviations that a key of the file has."""
        lines = [line for line in self.text.splitlines() if line.startswith("|")]
        cells = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in lines
            if not RULE.fullmatch(line)
        ]
        assert cells[:1] in ([], [COLUMNS])
        return [Row(*row) for row in cells[1:]]

    @property
    def others(self) -> list[str]:
        """The list's: deviations of something that is not a setting."""
        return [line for line in self.text.splitlines() if line.startswith("- ")]

    @property
    def inherited(self) -> list[str]:
        """The files whose deviations this one has too."""
        return re.findall(r"beside those of ([\w/.-]+\.yaml)", " ".join(self.text.split()))


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def header(path: Path) -> Header:
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = takewhile(lambda line: line.startswith("#"), lines)
    return Header("\n".join(line.removeprefix("#").strip() for line in comments))


def inherited(path: Path) -> list[Path]:
    """Return the files whose deviations a file has too: of its folder, or of `configs/`."""
    beside = [(path.parent / file, CONFIGS / file) for file in header(path).inherited]
    return [own if own.exists() else shared for own, shared in beside]


def all_rows(path: Path) -> dict[str, Row]:
    """Return the rows of a file and of those that it refers to, by key; its own come first."""
    rows = {}
    for file in inherited(path):
        rows |= all_rows(file)
    return rows | {row.key: row for row in header(path).rows}


@cache
def loaded(path: Path) -> dict:
    return resolve(load_config(path))


def value_at(section: object, key: str) -> object:
    """Return what a configuration has under a dotted key."""
    for part in key.split("."):
        assert isinstance(section, dict)
        assert part in section, key
        section = section[part]
    return section


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_lists_its_deviations_or_says_that_there_are_none(path):
    said = header(path)
    assert bool(said.rows or said.others) != bool(NONE.search(said.text))
    assert all(file.is_file() for file in inherited(path))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_value_that_a_table_shows_is_that_of_the_file(path):
    for row in header(path).rows:
        assert all(vars(row).values())
        assert row.published != row.here
        assert value_at(loaded(path), row.key) == parse_yaml(row.here, row.key), row


@pytest.mark.parametrize("file", PUBLISHED)
def test_published_values_are_those_of_the_file_or_stand_in_its_table(file):
    path = CONFIGS / file
    rows, differing = all_rows(path), {}
    for key, published in PUBLISHED[file].items():
        listed = rows.get(key)
        if listed is None or value_at(loaded(path), key) == published:
            differing[key] = (value_at(loaded(path), key), published)
        else:
            differing[key] = (parse_yaml(listed.published, "published"), published)
    assert not {key: pair for key, pair in differing.items() if pair[0] != pair[1]}
