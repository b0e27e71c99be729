"""Reading prompt files, their errors, and the prompts of a step."""

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from flowalign.data.prompts import Prompt, prompts_of_step, read_prompts
from flowalign.errors import UserError


def write_file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_text_file_has_one_prompt_per_line(tmp_path):
    path = write_file(tmp_path, "p.txt", "a red circle\n\n  ein grüner Kreis  \n")
    assert read_prompts(path) == [Prompt("a red circle"), Prompt("ein grüner Kreis")]


def test_other_fields_become_metadata(tmp_path):
    path = write_file(
        tmp_path,
        "p.jsonl",
        '{"prompt": "a circle", "tag": "colors", "include": [{"count": 1}]}\n\n{"prompt": "b"}\n',
    )
    assert read_prompts(path) == [
        Prompt("a circle", {"tag": "colors", "include": [{"count": 1}]}),
        Prompt("b"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "p.jsonl, line 2 is not JSON"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n\n{"text": "b"}\n',
            'p.jsonl, line 3 has no text in the field "prompt". Write for example',
        ),
        ("p.jsonl", '["a"]\n', 'p.jsonl, line 1 has no text in the field "prompt"'),
        ("p.jsonl", '{"prompt": 3}\n', 'p.jsonl, line 1 has no text in the field "prompt"'),
        ("p.txt", "\n  \n", "p.txt has no prompts"),
        ("p.doc", "a\n", "p.doc cannot be read as prompts. Give a .txt file"),
        ("p.csv", "title,count\na,1\n", "p.csv has the columns title, count. Name the column"),
        ("p.csv", "prompt,count\na\n", "p.csv cannot be read as a table"),
        ("p.csv", "prompt,prompt\na,b\n", "p.csv has several columns of one name"),
        ("p.parquet", "prompt\n", "p.parquet cannot be read as a table"),
        ("p.csv", "prompt,day\na,2026-11-27\n", r"p.csv holds date32\[day\] in the column day"),
    ],
)
def test_an_error_names_the_key_the_file_and_the_line(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message) as error:
        read_prompts(write_file(tmp_path, name, text))
    assert str(error.value).startswith(f"data.prompts: {tmp_path}")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"evaluation\.prompts: there is no file .*none\.txt"):
        read_prompts(tmp_path / "none.txt", key="evaluation.prompts")


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"p\.txt cannot be read"):
        read_prompts(tmp_path / "p.txt")


def test_the_prompts_of_a_step_depend_on_the_step_alone():
    late = prompts_of_step(50, 37, 8, seed=1)
    for step in range(37):
        prompts_of_step(50, step, 8, seed=1)
    assert prompts_of_step(50, 37, 8, seed=1) == late


@pytest.mark.parametrize(("count", "size"), [(12, 4), (10, 4), (3, 8), (7, 7), (1, 2)])
def test_each_prompt_occurs_once_per_epoch(count, size):
    steps = 2 * count
    indices: list[int] = []
    for step in range(steps):
        indices += prompts_of_step(count, step, size, seed=0)
    epochs = [indices[start : start + count] for start in range(0, len(indices), count)]
    assert all(Counter(epoch) == Counter(range(count)) for epoch in epochs)


def test_epochs_and_seeds_have_different_orders():
    orders = [tuple(prompts_of_step(50, step, 50, seed)) for step in range(3) for seed in range(3)]
    assert len(set(orders)) == 9


ROWS = [
    Prompt("12", {"count": 1, "tag": "numbers"}),
    Prompt('a "red"\ncircle, and more', {"count": 2, "tag": "colors"}),
]


@pytest.mark.parametrize(
    ("name", "separator", "column"),
    [("p.csv", ",", "prompt"), ("p.tsv", "\t", "caption"), ("p.csv", ",", "text")],
)
def test_the_columns_of_a_table_are_prompts_and_metadata(name, separator, column, tmp_path):
    header = separator.join(["count", column, "tag"])
    rows = f'1{separator}12{separator}numbers\n2{separator}"a ""red""\ncircle, and more"'
    table = f"\ufeff{header}\n{rows}{separator}colors\n"
    assert read_prompts(write_file(tmp_path, name, table)) == ROWS


def test_parquet_files_hold_nested_metadata(tmp_path):
    include = [{"count": 1, "shape": "circle"}]
    columns = {"prompt": ["a circle"], "include": [include], "score": [0.5], "note": [None]}
    parquet.write_table(pa.table(columns), tmp_path / "p.parquet")
    metadata = {"include": include, "score": 0.5, "note": None}
    assert read_prompts(tmp_path / "p.parquet") == [Prompt("a circle", metadata)]
    pictures = pa.table({"prompt": ["a"], "image": [{"bytes": b"png"}]})
    parquet.write_table(pictures, tmp_path / "pictures.parquet")
    with pytest.raises(UserError, match="in the column image, which a prompt cannot carry"):
        read_prompts(tmp_path / "pictures.parquet")
