"""A wrong key, type or number exits with status 2 and is answered with what to type."""

import difflib
import math
from typing import Any, get_args, get_origin, Literal

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from flowalign.bundled import CONFIGS
from flowalign.config.load import load_config
from flowalign.config.resolved import resolve
from tests.config.wrong import (
    at,
    examples,
    explains,
    keys,
    keys_of,
    misspelt,
    plain,
    refusal,
    renamed,
    resolved,
    SCENE,
    SHIPPED,
    with_section,
)

# what is shipped, as a control


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_with_every_key_written_out_loads(path, tmp_path):
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump(resolved(path)))
    assert resolve(load_config(file)) == resolved(path)


def test_a_right_file_gets_as_far_as_loading_weights():
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
    assert explains(message, ".".join([*section, wrong]) if section else repr(wrong))
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
    assert explains(message, f"{key}: there is no reward {wrong!r}", "Did you mean 'scene_match'?")


@examples(30)
@given(data=st.data(), where=keys())
def test_a_misspelt_key_on_the_command_line_is_answered_with_the_right_one(data, where):
    path, section, name, _ = where
    wrong = data.draw(misspelt(name))
    known = keys_of(path)[section]
    assume(wrong and wrong not in known)
    message = refusal(resolved(path), f"{'.'.join([*section, wrong])}=1")
    assert explains(message, ".".join([*section, wrong]) if section else repr(wrong))
    if difflib.get_close_matches(wrong, [*known], n=1, cutoff=0.5) == [name]:
        assert f"Did you mean {name!r}?" in message


def test_settings_of_a_reward_are_answered_too():
    raw = resolved(CONFIGS / "tiny" / "flow_grpo.yaml")
    message = refusal(raw, "rewards={jpeg_size: {wieght: 2, quality: 50}}")
    assert explains(message, "rewards.jpeg_size.wieght", "Did you mean 'weight'?")
    assert explains(
        refusal(raw, "rewards={jpeg_size: {quality: high}}"), "rewards.jpeg_size.quality is 'high'"
    )


# types


TEXT = "a text"
WRONG_TYPES = {
    int: ["many", "8", 1.5, 8.0, True, None, [1], {"a": 1}],
    float: ["fast", "1.0", True, None, [1.0], {"a": 1}],
    bool: ["maybe", "true", 0, 1, 1.0, None, [True], {"a": 1}],
    str: [3, 1.5, True, None, ["a"], {"a": "b"}],
    list[str]: [3, TEXT, True, None, {"a": 1}, [1], [None]],
    tuple[int, int]: [3, TEXT, None, [1], [0, 1, 2], ["a", "b"], [0.5, 1], [True, False]],
    "one of": [3, True, None, "nonsense", ["a"], {"a": 1}],
    "section": [3, 1.5, TEXT, True, None, [1]],
}


def wrong_types(kind: Any) -> list[Any]:
    if get_origin(kind) is Literal:
        return WRONG_TYPES["one of"]
    if type(None) in get_args(kind):
        (inner,) = set(get_args(kind)) - {type(None)}
        return [value for value in wrong_types(inner) if value is not None]
    if get_origin(kind) is list and kind not in WRONG_TYPES:
        return [3, TEXT, True, None, {"a": 1}, [TEXT]]
    values = WRONG_TYPES.get(plain(kind), WRONG_TYPES["section"])
    # A place may be a text, or a mapping with details.
    return [value for value in values if not (value == TEXT and str in get_args(kind))]


@examples(120)
@given(data=st.data(), where=keys())
def test_a_value_of_another_type_is_refused_by_its_key(data, where):
    path, section, name, kind = where
    raw = resolved(path)
    at(raw, section)[name] = data.draw(st.sampled_from(wrong_types(kind)))
    assert explains(refusal(raw), ".".join([*section, name]))


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
def test_a_weight_that_is_not_a_number_is_refused_by_its_reward(path, key, value):
    raw = resolved(path)
    *section, name = key.split(".")
    at(raw, tuple(section))[name] = {"scene_match": value}
    assert explains(refusal(raw), f"{key}.scene_match")


# ranges


COUNT, COUNT_OR_ZERO = (0, -1, 10**9), (-1, 10**9)
POSITIVE, NOT_NEGATIVE, SHARE = (0.0, -1.0), (-1.0, -1e-9), (-0.1, 1.1)
GUIDANCE, SIDE = (0.5, -1.0, 1e9), (0, -64, 8, 65, 10**9)
DECAY = {"start": COUNT_OR_ZERO, "value": SHARE, "slope": (-0.1,), "end": SHARE, "every": COUNT}
OUT_OF_RANGE: dict[str, tuple[float, ...]] = {
    **{f"model.{name}": SIDE for name in ("height", "width")},
    "model.max_sequence_length": (-1, 1025, 10**9),
    "model.text_cache_gb": NOT_NEGATIVE,
    "model.largest_norm": NOT_NEGATIVE,
    **{f"model.lora.{name}": COUNT for name in ("rank", "alpha")},
    **{f"{key}.steps": COUNT for key in ("sampler", "evaluation.sampler", "train")},
    **{
        f"{key}.guidance": GUIDANCE
        for key in ("sampler", "evaluation.sampler", "objective", "objective.kl")
    },
    **{f"{key}.embedded_guidance": (-1.0, 1e9) for key in ("sampler", "evaluation.sampler")},
    "objective.tie_margin": NOT_NEGATIVE,
    "sampler.window.size": COUNT_OR_ZERO,
    "sampler.window.stay": COUNT,
    "sampler.dynamics.eta": (-0.1, 1e9),
    **{f"objective.{name}": POSITIVE for name in ("beta", "clip_range", "limit", "scale")},
    **{
        f"objective.{name}": NOT_NEGATIVE
        for name in (
            *("kl_weight", "trust", "imitate", "liked", "disliked", "spread", "weight"),
            "radius",
        )
    },
    **{
        f"objective.{name}": COUNT
        for name in ("keep", "copies", "sampling_steps", "points", "ascent_steps")
    },
    **{f"objective.{name}": SHARE for name in ("low", "high", "start")},
    "objective.temperature": (-1.0,),
    "objective.kl_least": (-1.0, 1e9),
    "objective.label_smoothing": (-0.1, 0.5, 1.0),
    "objective.depth": (-1, 1000, 10**9),
    "objective.step": (0, 1, -1000, -(10**9)),
    "objective.enough": (-math.inf,),
    "objective.times.count": COUNT,
    "objective.times.points": (*COUNT, 1),
    "objective.reference.every": COUNT_OR_ZERO,
    "objective.reference.decay": SHARE,
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
    assert explains(refusal(raw), ".".join(section), name)


@pytest.mark.parametrize("text", ["010", "1:30", "0x10", "1,000", "10 000"])
def test_numbers_that_people_and_yaml_read_differently_are_refused(text):
    raw = resolved(CONFIGS / "tiny" / "nft.yaml")
    assert explains(refusal(raw, f"train.steps={text}"), "train.steps")
