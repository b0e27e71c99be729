"""Text that is not a configuration is refused: broken YAML, other encodings, other files."""

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flowalign.bundled import CONFIGS
from flowalign.settings.merging import parse_override
from flowalign.settings.yaml_files import parse_yaml, read_yaml
from tests.config.wrong import (
    at,
    examples,
    keys,
    refusal,
    resolved,
    SHIPPED,
    train_error,
)

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
def test_text_that_is_not_a_configuration_is_refused(text):
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


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path):
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
def test_a_file_that_is_not_text_is_refused(file):
    assert re.search(
        "cannot be read: .*saved as UTF-8|is not YAML", train_error(CONFIGS.parent / file)
    )
