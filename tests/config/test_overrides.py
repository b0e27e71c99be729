"""Overrides of the command line apply, or are answered with what to type."""

import re
from typing import get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowalign.bundled import CONFIGS
from flowalign.config.load import load_config
from flowalign.config.resolved import resolve
from flowalign.errors import UserError
from flowalign.settings.merging import parse_override
from flowalign.settings.yaml_files import parse_yaml
from tests.config.wrong import (
    at,
    examples,
    explains,
    keys,
    keys_of,
    plain,
    refusal,
    resolved,
)


@examples(30)
@given(
    where=keys(), text=st.sampled_from(["{} = 3", "=3", "{}:3", ".{}=3", "{}.=3", "{}..a=3", "{}"])
)
def test_a_malformed_override_is_answered_with_an_example(where, text):
    path, section, name, _ = where
    override = text.format(".".join([*section, name]))
    message = refusal(resolved(path), override)
    assert (
        explains(message, override)
        or explains(message, "is not a section")
        or explains(message, "is not known")
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
    assert explains(refusal(resolved(path), override), key)


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
    assert explains(
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
def test_an_override_outside_of_the_sections_is_refused(override):
    assert explains(
        refusal(resolved(CONFIGS / "tiny" / "nft.yaml"), override), re.split("[.=]", override)[0]
    )


def test_one_entry_of_a_reward_map_is_set_next_to_the_others():
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
