"""Read the rows of tables: `.csv`, `.tsv` and `.parquet` files, and data sets."""

import io
from typing import Any

from flowalign.data.hub import open_dataset
from flowalign.data.source import DataSource
from flowalign.errors import similar_file, UserError
from flowalign.files import read_text

SEPARATORS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*SEPARATORS, ".parquet")
PROMPT_COLUMNS = ("prompt", "caption", "text")
"""Names of the column of prompts. If a table has several, the first of these counts."""


Row = tuple[dict[str, Any], str]
"""A row by column, the prompt as `prompt`, and the words that name it in an error."""


def read_rows(source: DataSource, key: str) -> list[Row]:
    """Return the rows of a file.

    Raises:
        UserError: The file cannot be read, has no column of prompts or an empty one, or holds
            values that JSON cannot hold.
    """
    table = read_table(source, key)
    column = _column_of_prompts(table.column_names, str(source), key)
    for field in table.schema:
        if _is_no_json(field.type):
            raise UserError(
                f"{key}: {source} holds {field.type} in the column {field.name}, which a prompt "
                "cannot carry along. Leave out the column, or write it as text."
            )
    return _rows(table.to_pylist(), column, f"{key}: {source}")


def read_dataset(source: DataSource, key: str) -> list[Row]:
    """Return the rows of a data set, without the columns that JSON cannot hold, such as pictures.

    Raises:
        UserError: The data set cannot be opened, or has no column of prompts or an empty one.
    """
    table = open_dataset(source, key)
    schema = table.features.arrow_schema
    # Nobody can change the data sets of others, so their pictures do not count as mistakes.
    table = table.remove_columns([field.name for field in schema if _is_no_json(field.type)])
    column = _column_of_prompts(table.column_names, str(source), key)
    return _rows(table.to_list(), column, f"{key}: {source}")


def read_table(source: DataSource, key: str) -> Any:
    """Return the table of a file, with the columns that flowalign knows."""
    table = _read(source, key)
    names = table.column_names
    if len(set(names)) < len(names):
        raise UserError(f"{key}: {source} has several columns of one name. Rename them.")
    for new, old in source.columns.items():
        if old not in names:
            raise UserError(
                f"{key}.columns.{new} is {old}, but {source} has the columns {', '.join(names)}. "
                "Name one of these."
            )
        # The column of that name would be in the way, and the user has chosen another.
        if new != old and new in table.column_names:
            table = table.drop_columns([new])
    return table.rename_columns(list(source.renamed(dict.fromkeys(table.column_names))))


def _column_of_prompts(names: list[str], source: str, key: str) -> str:
    column = next((name for name in PROMPT_COLUMNS if name in names), None)
    if column is None:
        raise UserError(
            f"{key}: {source} has the columns {', '.join(names)}. Name the column of "
            f"prompts {PROMPT_COLUMNS[0]}, or write {{path: ..., columns: {{prompt: COLUMN}}}}."
        )
    return column


def _rows(rows: list[dict[str, Any]], column: str, source: str) -> list[Row]:
    named = []
    for number, row in enumerate(rows, 1):
        prompt, where = row.pop(column), f"{source}, row {number}"
        if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
            raise UserError(
                f"{where} has no prompt in the column {column}. Write one, or remove it."
            )
        named.append(({"prompt": prompt, **row}, where))
    return named


def _read(source: DataSource, key: str) -> Any:
    """Return the table of a file as it is."""
    import pyarrow as pa  # takes half a second to import
    import pyarrow.csv as csv
    import pyarrow.parquet as parquet

    path = source.location
    try:
        if path.suffix not in SEPARATORS:
            return parquet.read_table(path)
        text = read_text(path, key)
        texts = [*PROMPT_COLUMNS, source.columns.get("prompt", PROMPT_COLUMNS[0])]
        return csv.read_csv(
            io.BytesIO(text.encode()),
            parse_options=csv.ParseOptions(
                delimiter=SEPARATORS[path.suffix], newlines_in_values=True
            ),
            # A prompt of digits is a text too.
            convert_options=csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string())),
        )
    except FileNotFoundError:
        raise UserError(
            f"{key}: there is no file {path}. Correct the path.{similar_file(path)}"
        ) from None
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise UserError(
            f"{key}: {path} cannot be read as a table: {reason}. Correct the file."
        ) from error


def _is_no_json(kind: Any) -> bool:
    """Return True for values such as bytes and dates, which JSON cannot hold."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _is_no_json(kind.value_type)
    if types.is_nested(kind):
        return any(_is_no_json(kind.field(i).type) for i in range(kind.num_fields))
    plain = (
        *(types.is_integer, types.is_floating, types.is_boolean, types.is_null),
        *(types.is_string, types.is_large_string),
    )
    return not any(is_plain(kind) for is_plain in plain)
