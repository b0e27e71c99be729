"""Wrong configurations exit with status 2 and say what to type, before weights are loaded."""

import copy
import dataclasses
import difflib
import inspect
import io
import math
import re
import string
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, get_args, get_origin, get_type_hints, Literal

import pytest
import yaml
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flowalign.bundled import CONFIGS
from flowalign.cli import main
from flowalign.config.load import load_config
from flowalign.config.resolved import resolve
from flowalign.config.sections import Config
from flowalign.errors import UserError
from flowalign.settings.merging import parse_override
from flowalign.settings.yaml_files import parse_yaml, read_yaml

SHIPPED = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent != CONFIGS / "base")
SCENE = {"rewards": {"scene_match": 1.0}, "evaluation": {"rewards": {"scene_match": 1.0}}}
"""Rewards that cost milliseconds."""
TYPE = re.compile(
    "write|choose|must be|Did you mean|has |missing|give|rename|nearest|name |It belongs|use "
    "|take |are |remove|set ",
    re.IGNORECASE,
)
"""How a message says what to type."""


@pytest.fixture(autouse=True, scope="module")
def no_weights():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionPipeline, "from_pretrained", classmethod(_accepted))
        yield


def _accepted(*_: Any, **__: Any) -> None:
    raise AssertionError("accepted")


def examples(count: int) -> Any:
    return settings(max_examples=count, derandomize=True, deadline=None, database=None)


@cache
def loaded(path: Path) -> Config:
    return load_config(path)


@cache
def _resolved(path: Path) -> dict[str, Any]:
    return resolve(loaded(path))


def resolved(path: Path) -> dict[str, Any]:
    """The file with every key that it could have."""
    return copy.deepcopy(_resolved(path))


def refusal(wrong: dict[str, Any] | str | bytes, *overrides: str) -> str:
    """What is said of a file with this in it, which must be refused before anything is written."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "wrong.yaml"
        if isinstance(wrong, dict):
            wrong = yaml.safe_dump({"output": f"{folder}/run", **wrong}, sort_keys=False)
        path.write_bytes(wrong.encode() if isinstance(wrong, str) else wrong)
        message = said(path, *overrides)
        assert message.startswith((f"{path}: ", f"{path} ")), message
        assert [file.name for file in Path(folder).iterdir()] == ["wrong.yaml"]
    return message


def said(path: Path, *overrides: str) -> str:
    """The one line that `flowalign train` ends with."""
    with redirect_stderr(io.StringIO()) as stderr, redirect_stdout(io.StringIO()):
        status = main(["train", str(path), *overrides])
    message = stderr.getvalue()
    assert status == 2
    assert "Traceback" not in message
    assert message.count("\n") == 1, message
    return message


def helps(message: str, *keys: str) -> bool:
    return bool(TYPE.search(message)) and all(key in message for key in keys)


# what a file may say, read from the dataclasses


@cache
def keys_of(path: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """The types of all keys, by section."""
    config, raw = loaded(path), _resolved(path)
    found: dict[tuple[str, ...], dict[str, Any]] = {(): dict.fromkeys(raw, dict) | {"output": str}}
    for name in ("model", "sampler", "objective", "combine", "data", "train", "evaluation"):
        _fields((name,), type(getattr(config, name)), found)
    for key, function in (
        (("advantage",), config.advantage),
        (("sampler", "dynamics"), config.sampler.dynamics),
    ):
        function = function.func if isinstance(function, partial) else function
        arguments = inspect.signature(function).parameters.values()
        found[key] = {p.name: p.annotation for p in arguments if p.default is not p.empty}
    for key in (("objective",), ("combine",), ("advantage",), ("sampler", "dynamics")):
        found[key] = {"name": Literal["a name"], **found[key]}
    found["evaluation", "sampler"] = {
        k: v
        for k, v in found["sampler",].items()
        if k in ("steps", "guidance", "embedded_guidance")
    }
    return found


def _fields(key: tuple[str, ...], cls: Any, found: dict[tuple[str, ...], dict[str, Any]]) -> None:
    hints = get_type_hints(cls, include_extras=True)
    found[key] = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    for name, kind in found[key].items():
        if dataclasses.is_dataclass(kind):
            _fields((*key, name), kind, found)


def plain(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def at(raw: dict[str, Any], section: tuple[str, ...]) -> dict[str, Any]:
    for name in section:
        raw = raw[name]
    return raw


@st.composite
def keys(draw, files=SHIPPED, kinds=()):
    """A file, a section of it, a key that stands there, and its type."""
    path = draw(st.sampled_from(files))
    written = [
        (section, name, kind)
        for section, names in keys_of(path).items()
        for name, kind in names.items()
        if name in at(_resolved(path), section) and (not kinds or plain(kind) in kinds)
    ]
    return path, *draw(st.sampled_from(written))


@st.composite
def misspelt(draw, word):
    """A letter inserted, left out, replaced, or two swapped."""
    i, letter = (
        draw(st.integers(0, len(word) - 1)),
        draw(st.sampled_from(string.ascii_lowercase + "_")),
    )
    forms = [
        word[:i] + letter + word[i:],
        word[:i] + word[i + 1 :],
        word[:i] + letter + word[i + 1 :],
    ]
    return draw(st.sampled_from([*forms, word[:i] + word[i : i + 2][::-1] + word[i + 2 :]]))


def renamed(section: dict[str, Any], name: str, wrong: str) -> dict[str, Any]:
    return {wrong if key == name else key: value for key, value in section.items()}


def with_section(
    raw: dict[str, Any], section: tuple[str, ...], new: dict[str, Any]
) -> dict[str, Any]:
    if not section:
        return new
    at(raw, section[:-1])[section[-1]] = new
    return raw


# what is shipped, as a control


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_with_every_key_written_out_is_accepted(path, tmp_path):
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump(resolved(path)))
    assert resolve(load_config(file)) == resolved(path)


def test_what_nothing_is_wrong_with_comes_to_its_weights():
    with pytest.raises(AssertionError, match="accepted"):
        refusal(resolved(CONFIGS / "tiny" / "flow_grpo.yaml") | SCENE)


# keys


@examples(120)
@given(data=st.data(), where=keys())
def test_a_misspelt_key_is_named_and_answered_with_the_right_one(data, where):
    path, section, name, _ = where
    wrong = data.draw(misspelt(name))
    known = keys_of(path)[section]
    assume(wrong and wrong not in known)
    raw = resolved(path)
    message = refusal(with_section(raw, section, renamed(at(raw, section), name, wrong)))
    assert helps(message, ".".join([*section, wrong]) if section else repr(wrong))
    if difflib.get_close_matches(wrong, [*known], n=1, cutoff=0.5) == [name]:
        assert f"Did you mean {name!r}?" in message


@examples(30)
@given(
    data=st.data(),
    path=st.sampled_from(SHIPPED),
    key=st.sampled_from(["rewards", "evaluation.rewards"]),
)
def test_a_misspelt_reward_is_answered_with_the_right_one(data, path, key):
    wrong = data.draw(misspelt("scene_match"))
    assume(wrong not in ("", "scene_match"))
    message = refusal(resolved(path), f"{key}={{{wrong}: 1.0}}")
    assert helps(message, f"{key}: there is no reward {wrong!r}", "Did you mean 'scene_match'?")


@examples(30)
@given(data=st.data(), where=keys())
def test_a_misspelt_key_on_the_command_line_is_answered_with_the_right_one(data, where):
    path, section, name, _ = where
    wrong = data.draw(misspelt(name))
    known = keys_of(path)[section]
    assume(wrong and wrong not in known)
    message = refusal(resolved(path), f"{'.'.join([*section, wrong])}=1")
    assert helps(message, ".".join([*section, wrong]) if section else repr(wrong))
    if difflib.get_close_matches(wrong, [*known], n=1, cutoff=0.5) == [name]:
        assert f"Did you mean {name!r}?" in message


def test_settings_of_a_reward_are_answered_too():
    raw = resolved(CONFIGS / "tiny" / "flow_grpo.yaml")
    message = refusal(raw, "rewards={jpeg_size: {wieght: 2, quality: 50}}")
    assert helps(message, "rewards.jpeg_size.wieght", "Did you mean 'weight'?")
    assert helps(
        refusal(raw, "rewards={jpeg_size: {quality: high}}"), "rewards.jpeg_size.quality is 'high'"
    )


# types

TEXT = "a text"
WRONG_TYPES = {
    int: ["many", "8", 1.5, 8.0, True, None, [1], {"a": 1}],
    float: ["fast", "1.0", True, None, [1.0], {"a": 1}],
    bool: ["maybe", "true", 0, 1, 1.0, None, [True], {"a": 1}],
    str: [3, 1.5, True, None, ["a"], {"a": "b"}],
    str | None: [3, 1.5, True, ["a"], {"a": "b"}],
    list[str]: [3, TEXT, True, None, {"a": 1}, [1], [None]],
    tuple[int, int]: [3, TEXT, None, [1], [0, 1, 2], ["a", "b"], [0.5, 1], [True, False]],
    "one of": [3, True, None, "nonsense", ["a"], {"a": 1}],
    "section": [3, 1.5, TEXT, True, None, [1]],
}


def wrong_types(kind: Any) -> list[Any]:
    if get_origin(kind) is Literal:
        return WRONG_TYPES["one of"]
    return WRONG_TYPES.get(plain(kind), WRONG_TYPES["section"])


@examples(120)
@given(data=st.data(), where=keys())
def test_a_value_of_another_type_is_refused_by_its_key(data, where):
    path, section, name, kind = where
    raw = resolved(path)
    at(raw, section)[name] = data.draw(st.sampled_from(wrong_types(kind)))
    assert helps(refusal(raw), ".".join([*section, name]))


@examples(30)
@given(
    path=st.sampled_from(SHIPPED),
    key=st.sampled_from(["rewards", "evaluation.rewards"]),
    value=st.sampled_from(
        [
            "high",
            True,
            None,
            [1],
            math.nan,
            math.inf,
            {"weight": "high"},
            {"weight": math.nan},
            {"weight": None},
        ]
    ),
)
def test_a_weight_that_is_no_number_is_refused_by_its_reward(path, key, value):
    raw = resolved(path)
    *section, name = key.split(".")
    at(raw, tuple(section))[name] = {"scene_match": value}
    assert helps(refusal(raw), f"{key}.scene_match")


# ranges

COUNT, COUNT_OR_ZERO = (0, -1, 10**9), (-1, 10**9)
POSITIVE, NOT_NEGATIVE, SHARE = (0.0, -1.0), (-1.0, -1e-9), (-0.1, 1.1)
GUIDANCE, SIDE = (0.5, -1.0, 1e9), (0, -64, 8, 65, 10**9)
DECAY = {"start": COUNT_OR_ZERO, "value": SHARE, "slope": (-0.1,), "end": SHARE, "every": COUNT}
OUT_OF_RANGE: dict[str, tuple[float, ...]] = {
    **{f"model.{name}": SIDE for name in ("height", "width")},
    "model.max_sequence_length": (-1, 513, 10**9),
    **{f"model.lora.{name}": COUNT for name in ("rank", "alpha")},
    **{f"{key}.steps": COUNT for key in ("sampler", "evaluation.sampler", "train")},
    **{
        f"{key}.guidance": GUIDANCE
        for key in ("sampler", "evaluation.sampler", "objective", "objective.kl")
    },
    **{f"{key}.embedded_guidance": (-1.0, 1e9) for key in ("sampler", "evaluation.sampler")},
    "sampler.window.size": COUNT_OR_ZERO,
    "sampler.window.stay": COUNT,
    "sampler.dynamics.eta": (-0.1, 1e9),
    **{f"objective.{name}": POSITIVE for name in ("beta", "clip_range", "limit", "scale")},
    **{
        f"objective.{name}": NOT_NEGATIVE
        for name in ("kl_weight", "trust", "imitate", "liked", "disliked", "spread", "weight")
    },
    **{f"objective.{name}": COUNT for name in ("keep", "copies", "sampling_steps", "points")},
    **{f"objective.{name}": SHARE for name in ("low", "high", "start")},
    "objective.temperature": (-1.0,),
    "objective.kl_least": (-1.0, 1e9),
    "objective.label_smoothing": (-0.1, 0.5, 1.0),
    "objective.depth": (-1, 1000, 10**9),
    "objective.step": (0, 1, -1000, -(10**9)),
    "objective.enough": (-math.inf,),
    "objective.times.count": COUNT,
    "objective.times.low": (-0.1, 1.0),
    "objective.times.high": (0.0, 1.1),
    "objective.times.shift": POSITIVE,
    "objective.steps.fraction": (0.0, -1.0, 1.1),
    "objective.kl.weight": NOT_NEGATIVE,
    **{
        f"{key}.{name}": bad
        for key in ("objective.old", "objective.sampler")
        for name, bad in DECAY.items()
    },
    "advantage.epsilon": NOT_NEGATIVE,
    "advantage.clip": POSITIVE,
    "data.ranking.top": COUNT,
    "data.ranking.min_gap": NOT_NEGATIVE,
    **{
        f"train.{name}": COUNT
        for name in ("prompts_per_step", "images_per_prompt", "updates_per_step", "images_per_pass")
    },
    **{f"train.{name}": COUNT for name in ("save_every", "keep", "max_bad_steps", "ema.every")},
    **{f"train.{name}": COUNT_OR_ZERO for name in ("warmup", "cooldown", "evaluate_every")},
    "train.learning_rate": (0.0, -1e-4, 1.0, 1e9),
    "train.weight_decay": (-1e-4, 1e9),
    "train.max_grad_norm": POSITIVE,
    "train.ema.decay": (-0.1, 1.0, 1e9),
    "train.seed": (-1, 2**32, 10**30),
    "evaluation.images_per_prompt": COUNT,
}


def test_the_table_of_numbers_has_every_key():
    numeric = {
        ".".join([*section, name])
        for path in SHIPPED
        for section, names in keys_of(path).items()
        for name, kind in names.items()
        if plain(kind) in (int, float)
    }
    assert numeric <= set(OUT_OF_RANGE)


@examples(120)
@given(data=st.data(), where=keys(kinds=(int, float)))
def test_a_number_out_of_range_is_refused_by_its_key(data, where):
    path, section, name, kind = where
    key = ".".join([*section, name])
    never = (
        (math.nan, -math.inf, *(() if key == "objective.enough" else (math.inf,)))
        if plain(kind) is float
        else (math.nan,)
    )
    raw = resolved(path)
    at(raw, section)[name] = data.draw(st.sampled_from([*OUT_OF_RANGE[key], *never]))
    assert helps(refusal(raw), ".".join(section), name)


@pytest.mark.parametrize("text", ["010", "1:30", "0x10", "1,000", "10 000"])
def test_numbers_that_yaml_reads_otherwise_than_people_are_refused(text):
    raw = resolved(CONFIGS / "tiny" / "nft.yaml")
    assert helps(refusal(raw, f"train.steps={text}"), "train.steps")


# files that are not there


@pytest.mark.parametrize(
    ("file", "key", "value", "nearest"),
    [
        ("nft", "data.prompts", "assets/prompts/trian.jsonl", "train.jsonl"),
        ("nft", "evaluation.prompts", "assets/prompts/evaluatoin.jsonl", "evaluation.jsonl"),
        ("dpo", "data.pairs", "assets/pairs/trein.parquet", "train.parquet"),
        ("nft", "model.path", "assets/tiny-sd", "tiny-sd3"),
        ("dpo", "evaluation.pairs", "assets/pairs/evaluatoin.parquet", "evaluation.parquet"),
        ("nft", "data.prompts", "assets", ".jsonl"),
        ("nft", "data.prompts", "assets/prompts", ".jsonl"),
        ("nft", "data.prompts", "a" * 300 + ".txt", ""),
        ("nft", "model.path", "a" * 300, ""),
        ("dpo", "data.pairs", "a" * 300 + ".jsonl", ""),
        ("nft", "data.prompts", "nowhere/prompts.txt", ""),
        ("dpo", "data.pairs", "nowhere", ""),
        ("nft", "model.path", "./nowhere", ""),
        ("nft", "model.path", "assets/prompts", "model_index.json"),
    ],
)
def test_a_file_that_is_not_there_is_answered_with_the_nearest(
    file, key, value, nearest, monkeypatch
):
    monkeypatch.chdir(CONFIGS.parent)
    message = refusal(
        resolved(CONFIGS / "tiny" / f"{file}.yaml"),
        f"{key}={value}",
        "evaluation.rewards={scene_match: 1}",
    )
    assert all(part in message for part in (key, value, nearest))


@pytest.mark.parametrize(
    ("key", "name", "content"),
    [
        ("data.prompts", "p.txt", b" \n"),
        ("data.prompts", "p.txt", b"\xff\xfea\0"),
        ("data.prompts", "p.jsonl", b'{"prompt": 3}'),
        ("data.prompts", "p.jsonl", b'{"text": "a"}'),
        ("data.prompts", "p.jsonl", b'{"prompt": "a"'),
        ("data.prompts", "p.jsonl", b"[" * 100_000),
        ("data.pairs", "p.jsonl", b'{"prompt": "a"}'),
        ("data.pairs", "p.jsonl", b'{"prompt": "a", "image": "nowhere.png"}'),
        ("data.pairs", "p.jsonl", b'{"prompt": "a", "image": "a\\u0000b"}'),
        ("data.pairs", "p.jsonl", b'{"prompt": "a", "image": "%s"}' % (b"a" * 300)),
        ("data.pairs", "p.parquet", b"PAR1"),
        ("data.pairs", "p.png", b"\x89PNG"),
    ],
)
def test_a_file_with_something_else_in_it_is_refused_by_its_key(
    key, name, content, tmp_path, monkeypatch
):
    monkeypatch.chdir(CONFIGS.parent)
    (tmp_path / name).write_bytes(content)
    raw = resolved(CONFIGS / "tiny" / ("nft.yaml" if key == "data.prompts" else "sft.yaml"))
    message = refusal(raw, f"{key}={tmp_path / name}")
    assert message.rpartition(f"{key}: ")[2].startswith(str(tmp_path / name))


@examples(20)
@given(
    data=st.data(),
    name=st.sampled_from(["base/tiny-sd3.yaml", "tiny/nft.yaml", "sd3/pickscore.yaml"]),
)
def test_a_parent_that_is_not_there_is_answered_with_the_nearest(data, name):
    folder, _, file = name.partition("/")
    wrong = data.draw(misspelt(file.removesuffix(".yaml"))) + ".yaml"
    assume(not (CONFIGS / folder / wrong).exists())
    message = refusal({"extends": f"{folder}/{wrong}"})
    assert f"extends: there is no file {folder}/{wrong}" in message
    assert "Did you mean" in message


@pytest.mark.parametrize(
    "parent", [3, ["base/tiny-sd3.yaml"], None, True, "", "base", "a" * 300, "a\0b"]
)
def test_a_parent_that_is_no_file_is_refused(parent):
    assert "extends" in refusal({"extends": parent})


def test_a_file_to_train_by_that_is_not_there_is_answered_with_the_nearest():
    assert "Did you mean 'crd.yaml'?" in said(CONFIGS / "tiny" / "cdr.yaml")


@pytest.mark.parametrize(
    "spec", ["nowhere.py:redness", "no.module:redness", "flowalign.rewards.scene:scene_macth"]
)
@pytest.mark.parametrize("key", ["rewards", "evaluation.rewards"])
def test_a_reward_that_is_not_there_is_refused_by_its_key(spec, key):
    raw = resolved(CONFIGS / "tiny" / "nft.yaml")
    assert f"{key}.{spec}" in refusal(raw | SCENE, f"{key}={{'{spec}': 1.0}}")


# what contradicts each other

STOCHASTIC = [path for path in SHIPPED if loaded(path).objective.needs_stochastic_steps]
GIVEN = [path for path in SHIPPED if loaded(path).data.pairs]
COMPARING = [
    path
    for path in SHIPPED
    if not loaded(path).data.pairs and loaded(path).train.images_per_prompt > 1
]


@examples(30)
@given(
    path=st.sampled_from(STOCHASTIC),
    dynamics=st.sampled_from(["ode", "flow_sde", "dance_sde", "cps"]),
)
def test_an_objective_of_stochastic_steps_refuses_a_sampler_without(path, dynamics):
    section = {"name": dynamics} | ({"eta": 0.0} if dynamics != "ode" else {})
    message = refusal(resolved(path), f"sampler.dynamics={section}")
    assert helps(
        message,
        "sampler.dynamics has none; write for example sampler: {dynamics: {name: flow_sde}}",
    )


@examples(30)
@given(
    path=st.sampled_from(COMPARING),
    pairs=st.sampled_from(["assets/pairs/train.parquet", "nowhere.jsonl"]),
)
def test_pairs_for_an_objective_that_makes_its_own_images_are_refused(path, pairs):
    message = refusal(resolved(path), f"data.pairs={pairs}")
    either = ("remove data.pairs", "write images_per_prompt: 1")
    assert "data.pairs" in message
    assert any(advice in message for advice in either)


@examples(15)
@given(path=st.sampled_from(GIVEN))
def test_an_objective_of_given_pictures_asks_for_them(path):
    message = refusal(resolved(path), "data.pairs=''", "data.prompts=''")
    assert "data.pairs is missing" in message or "data.prompts is missing" in message


@examples(30)
@given(
    path=st.sampled_from(COMPARING),
    key=st.sampled_from(["rewards={}", "train.images_per_prompt=1", "data.prompts=''"]),
)
def test_what_a_comparison_needs_is_asked_for(path, key):
    assert helps(refusal(resolved(path), key), key.partition("=")[0])


@examples(30)
@given(path=st.sampled_from(GIVEN), count=st.integers(2, 1000))
def test_given_pictures_come_one_a_prompt(path, count):
    assert helps(
        refusal(resolved(path), f"train.images_per_prompt={count}"),
        "train.images_per_prompt is",
        "images_per_prompt: 1",
    )


@examples(40)
@given(
    prompts=st.integers(1, 60),
    images=st.integers(2, 24),
    updates=st.integers(2, 5),
)
def test_prompts_that_updates_cannot_share_are_answered_with_the_nearest_that_they_can(
    prompts, images, updates
):
    assume(prompts % updates)
    counts = {
        "prompts_per_step": prompts,
        "images_per_prompt": images,
        "updates_per_step": updates,
    }
    raw = resolved(CONFIGS / "tiny" / "nft.yaml") | SCENE
    raw["train"] |= counts
    message = refusal(raw)
    assert f"train.prompts_per_step is {prompts}" in message
    nearest = [int(number) for number in re.findall(r"\d+", message.rpartition(":")[2])]
    assert nearest
    assert all(number > 0 and number % updates == 0 for number in nearest)


@examples(20)
@given(
    path=st.sampled_from([p for p in SHIPPED if loaded(p).model.name == "sd3"]),
    where=st.sampled_from(["", "evaluation."]),
)
def test_embedded_guidance_for_a_model_that_has_none_is_refused(path, where):
    message = refusal(resolved(path), f"{where}sampler.embedded_guidance=2.5")
    assert helps(message, "sampler.embedded_guidance is 2.5", "write guidance")


CONTRADICTIONS = [
    ("ddpo", ["train.updates_per_step=2"], "train.updates_per_step is 2"),
    (
        "nft",
        ["sampler.same_noise=true"],
        "sampler.same_noise is true, but sampler.dynamics adds no noise",
    ),
    (
        "draft_lv",
        ["sampler.same_noise=true"],
        "sampler.same_noise is true, but the objective draft_lv makes images by the ODE",
    ),
    (
        "nft",
        ["train.updates_per_step=2", "objective.old.every=3"],
        "objective.old.every is 3 updates, but snapshots follow once a step",
    ),
    ("draft_lv", ["sampler.steps=3"], "objective.step is -5, but sampler.steps is 3"),
    ("alignprop", ["objective.depth=9"], "objective.depth is 9, but sampler.steps is 8"),
    (
        "flow_grpo",
        ["sampler.window.range=[0, 30]"],
        "sampler.window.range is [0, 30], but sampler.steps is 8",
    ),
    ("flow_grpo", ["sampler.window.range=[3, 2]"], "sampler.window.range is [3, 2]"),
    ("flow_grpo", ["sampler.window.size=4"], "sampler.window.size is 4"),
    ("flow_grpo", ["sampler.steps=1", "sampler.window.range=[0, 0]"], "sampler.steps is 1"),
    ("d3po", ["data.ranking.top=7"], "data.ranking.top is 7, but a prompt has 12 images; write 6"),
    ("crd", ["objective.kl_least=0.6"], "objective.kl_least is 0.6"),
    (
        "crd",
        ["objective.kl=0.5"],
        "write one or more of objective.kl: {weight: ..., guidance: ...}",
    ),
    ("crd", ["objective.old=0.9"], "write one or more of objective.old: {start: ..., value: ..., "),
    ("flow_grpo", ["train.ema=0.9"], "write one or more of train.ema: {decay: ..., every: ...}"),
    (
        "raft",
        ["objective.keep=12"],
        "train.images_per_prompt is 12, but images of the same prompt are compared; use 13",
    ),
    ("nft", ["objective={name: draft_k}"], "Here it is objective: {name: alignprop, depth: K}"),
    (
        "nft",
        ["objective={name: GRPO-Guard}"],
        "Here it is objective: {name: flow_grpo, ratio: normalised, step_weight: inverse",
    ),
    ("nft", ["objective={name: gdpo}"], "Here it is advantage: {name: gdpo}"),
    ("nft", ["advantage={name: Pref-GRPO}"], "Here it is advantage: {name: win_rate}"),
    ("nft", ["objective={name: NFT}"], "Did you mean 'nft'?"),
    (
        "dpo",
        ["data.pairs=''", "data.prompts=''", "train.images_per_prompt=2"],
        "data.prompts is missing; write a file with a",
    ),
    ("crd", ["objective.old={value: 0.9, end: 0.5}"], "objective.old.value is 0.9, but end 0.5"),
    ("refl", ["objective.low=0.9"], "objective.low is 0.9 and high is 0.65"),
    (
        "crd",
        ["objective.times.shared=false"],
        "objective.times.shared is false, but the images of a prompt are compared",
    ),
    (
        "dgpo",
        ["objective.times.shared=false"],
        "objective.times.shared is false, but the images of a prompt are compared",
    ),
    (
        "nft",
        ["objective.times={low: 0.6, high: 0.6}"],
        "objective.times.low is 0.6 and high is 0.6",
    ),
    ("flow_grpo_flux", ["model.max_sequence_length=0"], "model.max_sequence_length is 0"),
    ("nft", ["model.attention=flash"], "model.attention is 'flash'; choose from native, xformers"),
    ("flow_grpo_flux", ["model.attention=natve"], "Did you mean 'native'?"),
    ("nft", ["rewards={'a.py:good': 1, 'b.py:good': 1}"], "rewards: two rewards are called 'good'"),
    (
        "nft",
        ["evaluation.rewards={'a.py:good': 1, 'b.py:good': 1}"],
        "evaluation.rewards: two rewards are called 'good'",
    ),
    ("nft", ["rewards={mine: {reward: scene_mach}}"], "rewards: there is no reward 'scene_mach'"),
    ("nft", ["rewards={mine: {reward: 3}}"], "rewards: there is no reward 3"),
    ("nft", ["rewards={mine: {reward: null}}"], "rewards: there is no reward None"),
    ("nft", ["rewards={mine: {reward: {a: 1}}}"], "rewards: there is no reward {'a': 1}"),
    (
        "nft",
        ["combine={name: minimum}", "advantage={name: gdpo}"],
        "combine.name is minimum, but advantage.name gdpo weighs",
    ),
    ("nft", ["combine={name: gate}"], "combine.base is empty. Write thresholds"),
    (
        "nft",
        ["combine={name: gate, base: {scene_mtch: 1}}"],
        "combine.base names 'scene_mtch', which is not a reward",
    ),
    (
        "nft",
        ["combine={name: constrained, at_least: {scene_match: .nan}}"],
        "combine.at_least.scene_match is nan",
    ),
    ("alignprop", ["combine={name: normalised}"], "combine.name is normalised"),
    (
        "nft",
        ["evaluation.sampler={dynamics: {name: ode}}"],
        "Key evaluation.sampler.dynamics is not known",
    ),
    ("nft", ["output=README.md"], "output is 'README.md', which cannot be a folder"),
    ("nft", ["output=README.md/run"], "output is 'README.md/run', which cannot be a folder"),
    ("nft", [f"output={'a' * 300}"], "which cannot be a folder"),
    ("nft", ['output="a\\0b"'], "which cannot be a folder"),
    (
        "nft",
        ["objective={name: 'os:getcwd'}"],
        "objective.name: builtin_function_or_method must be a subclass of",
    ),
    (
        "nft",
        ["combine={name: 'os:getcwd'}"],
        "combine.name: builtin_function_or_method must be a subclass of",
    ),
    (
        "nft",
        ["advantage={name: 'os:getcwd'}"],
        "advantage.name: os:getcwd must be a function of (rewards, group)",
    ),
    (
        "nft",
        ["sampler.dynamics={name: 'os:getcwd'}"],
        "sampler.dynamics.name: os:getcwd must be a function of (x, v, t, s)",
    ),
    (
        "nft",
        ["train.stop={eval/scene_match: {faling: 2}}"],
        "train.stop.eval/scene_match.faling is not known. Did you mean 'falling'",
    ),
    (
        "nft",
        ["train.stop={eval/scene_match: {above: .nan}}"],
        "train.stop.eval/scene_match.above is nan",
    ),
]


def test_an_objective_is_written_with_its_name():
    message = refusal(resolved(CONFIGS / "tiny" / "nft.yaml"), "objective=crd")
    assert helps(message, "objective is 'crd'; write objective: {name: crd}.")


def test_a_key_is_found_by_its_initials():
    assert helps(
        refusal(resolved(CONFIGS / "tiny" / "nft.yaml"), "train.lr=1e-3"),
        "Did you mean 'learning_rate'?",
    )


@pytest.mark.parametrize(
    ("file", "overrides", "expected"), CONTRADICTIONS, ids=lambda value: str(value)[:40]
)
def test_settings_that_contradict_each_other_are_refused(file, overrides, expected, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    assert helps(refusal(resolved(CONFIGS / "tiny" / f"{file}.yaml"), *overrides), expected)


# broken text


@examples(60)
@given(data=st.data(), path=st.sampled_from(SHIPPED))
def test_a_file_cut_anywhere_in_its_braces_is_refused(data, path):
    text = yaml.safe_dump(resolved(path), default_flow_style=True, width=80)
    end = data.draw(st.integers(0, text.rindex("}")))
    message = refusal(text[:end])
    assert "is not YAML: " in message or "found nothing" in message


@examples(60)
@given(data=st.data(), path=st.sampled_from(SHIPPED), last=st.sampled_from(["model", "data"]))
def test_a_file_cut_before_a_section_that_must_be_there_is_refused(data, path, last):
    raw = resolved(path)
    text = yaml.safe_dump(
        {**{name: raw[name] for name in raw if name != last}, last: raw[last]}, sort_keys=False
    )
    end = data.draw(st.integers(0, text.index(f"\n{last}:") + len(last) + 2))
    refusal(text[:end])


@examples(40)
@given(data=st.data(), where=keys())
def test_a_key_written_twice_is_refused(data, where):
    path, section, name, _ = where
    raw = resolved(path)
    at(raw, section)[f"{name}_again"] = at(raw, section)[name]
    message = refusal(yaml.safe_dump(raw).replace(f"{name}_again:", f"{name}:"))
    assert f"the key {name!r} is written twice" in message


@pytest.mark.parametrize(
    "text",
    [
        "train:\n\tsteps: 3\n",
        "train: {steps: 3\n",
        "train: *steps\n",
        "train: &t {steps: *t}\n",
        "&all\ntrain: *all\n",
        "train: {steps: 3}\n---\ntrain: {steps: 4}\n",
        "train: {steps: 3} extra\n",
        "train: !!python/object:os.system {}\n",
        "train: !!timestamp soon\n",
        "train: !!int many\n",
        "train: !unknown 3\n",
        "%YAML 9\n",
        "'open\n",
        "? [a]\n: b\n",
        "[" * 500,
        "train: {<<: 3}\n",
        "- model\n",
        "a word\n",
        "3\n",
        "",
        "# nothing but a comment\n",
        "null\n",
    ],
)
def test_text_that_is_no_configuration_is_refused(text):
    assert re.search(
        "is not YAML: |is too large|expected sections such as `model:` and `train:`, found",
        refusal(text),
    )


def test_an_anchor_may_be_used_again():
    assert parse_override("a={b: &x {c: 1}, d: *x, e: {<<: *x, f: 2}}", parse_yaml) == {
        "a": {"b": {"c": 1}, "d": {"c": 1}, "e": {"c": 1, "f": 2}}
    }


# encodings


@examples(40)
@given(data=st.data(), path=st.sampled_from(SHIPPED))
def test_a_file_in_another_encoding_is_refused(data, path):
    text = f"# Übung\n{yaml.safe_dump(resolved(path))}"
    encoding = data.draw(
        st.sampled_from(["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp037"])
    )
    assert re.search("cannot be read: .*saved as UTF-8|is not YAML", refusal(text.encode(encoding)))


@examples(40)
@given(data=st.data(), path=st.sampled_from(SHIPPED))
def test_a_byte_that_does_not_belong_in_a_text_is_refused(data, path):
    content = bytearray(yaml.safe_dump(resolved(path)).encode())
    content.insert(
        data.draw(st.integers(0, len(content))),
        data.draw(st.sampled_from([0, 1, 7, 27, 127, 0x80, 0xC0, 0xFF])),
    )
    assert re.search("cannot be read: .*saved as UTF-8|is not YAML", refusal(bytes(content)))


def test_a_byte_order_mark_is_taken_as_what_it_is(tmp_path):
    path = CONFIGS / "tiny" / "nft.yaml"
    file = tmp_path / "marked.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_yaml(file).values == read_yaml(path).values


@pytest.mark.parametrize(
    "file",
    [
        "assets/tiny-sd3/vae/diffusion_pytorch_model.safetensors",
        "docs/pictures/before-after.png",
        "configs",
    ],
)
def test_what_is_no_text_file_is_refused(file):
    assert re.search("cannot be read: .*saved as UTF-8|is not YAML", said(CONFIGS.parent / file))


# the command line


@examples(30)
@given(
    where=keys(), text=st.sampled_from(["{} = 3", "=3", "{}:3", ".{}=3", "{}.=3", "{}..a=3", "{}"])
)
def test_an_override_that_is_none_is_answered_with_an_example(where, text):
    path, section, name, _ = where
    override = text.format(".".join([*section, name]))
    message = refusal(resolved(path), override)
    assert (
        helps(message, override)
        or helps(message, "is not a section")
        or helps(message, "is not known")
    )


@examples(40)
@given(data=st.data(), where=keys())
def test_a_map_for_a_scalar_and_a_scalar_for_a_section_are_refused(data, where):
    path, section, name, kind = where
    key = ".".join([*section, name])
    sections = {k for k in keys_of(path) if k} | {("rewards",), ("evaluation", "rewards")}
    scalar = (
        (*section, name) not in sections
        and plain(kind) is not dict
        and get_origin(kind) is not dict
    )
    override = data.draw(
        st.sampled_from(
            [f"{key}={{a: 1}}", f"{key}.a=1"] if scalar else [f"{key}=3", f"{key}=", f"{key}=[]"]
        )
    )
    assert helps(refusal(resolved(path), override), key)


@pytest.mark.parametrize(
    ("overrides", "lost"),
    [
        (["train={}"], "train={}"),
        (["evaluation.sampler={}"], "evaluation.sampler={}"),
        (["objective.beta=2", "objective={name: awm}"], "objective.beta=2"),
        (["objective.beta=2", "objective.name=awm"], "objective.beta=2"),
        (
            ["sampler.dynamics={name: cps, eta: 0.5}", "sampler.dynamics.name=ode"],
            "sampler.dynamics={name: cps, eta: 0.5}",
        ),
        (["rewards.scene_match=2", "rewards={brightness: 1}"], "rewards.scene_match=2"),
    ],
)
def test_an_override_that_would_have_no_effect_is_refused(overrides, lost):
    assert helps(
        refusal(resolved(CONFIGS / "tiny" / "nft.yaml"), *overrides),
        f"{lost!r} would have no effect",
    )


@pytest.mark.parametrize(
    "override",
    [
        "trian.steps=3",
        "extends=base/tiny-sd3.yaml",
        "steps=3",
        "foo.bar.baz=1",
        "output=",
        "output={}",
    ],
)
def test_an_override_of_what_is_no_section_is_refused(override):
    assert helps(
        refusal(resolved(CONFIGS / "tiny" / "nft.yaml"), override), re.split("[.=]", override)[0]
    )


def test_one_entry_of_a_reward_map_is_set_beside_the_others():
    path = CONFIGS / "tiny" / "nft.yaml"
    assert load_config(path, ["rewards.scene_match=3"]).rewards == {
        "scene_match": 3,
        "scene_match_graded": 1.0,
    }
    assert load_config(path, ["rewards={brightness: 1}", "rewards.contrast=2"]).rewards == {
        "brightness": 1,
        "contrast": 2,
    }


@examples(60)
@given(data=st.data(), where=keys(kinds=(int, float, bool)))
def test_an_override_applies_or_is_refused(data, where):
    path, section, name, kind = where
    key = ".".join([*section, name])
    values = {
        int: st.integers(-2, 40),
        float: st.floats(-1, 2, allow_nan=False),
        bool: st.booleans(),
    }
    override = f"{key}={str(data.draw(values[plain(kind)])).lower()}"
    try:
        config = load_config(path, [override])
    except UserError:
        refusal(resolved(path), override)
    else:
        assert (
            at(resolve(config), section)[name]
            == at(parse_override(override, parse_yaml), section)[name]
        )
