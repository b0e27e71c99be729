"""Read the rows of tables: `.csv`, `.tsv` and `.parquet` files."""

import io
from pathlib import Path
from typing import Any

from flowalign.errors import similar_file, UserError
from flowalign.files import read_text

SEPARATORS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*SEPARATORS, ".parquet")
PROMPT_COLUMNS = ("prompt", "caption", "text")
"""Names of the column of prompts. If a table has several, the first of these counts."""


def read_rows(path: Path, key: str) -> list[tuple[dict[str, Any], str]]:
    """Return each row by column, the prompt as `prompt`, and the words that name it in an error.

    Raises:
        UserError: The file cannot be read, has no column of prompts, or holds values that JSON
            cannot hold.
    """
    table = _read(path, key)
    if len(set(table.column_names)) < len(table.column_names):
        raise UserError(f"{key}: {path} has several columns of one name. Rename them.")
    column = next((name for name in PROMPT_COLUMNS if name in table.column_names), None)
    if column is None:
        raise UserError(
            f"{key}: {path} has the columns {', '.join(table.column_names)}. Name the column of "
            f"prompts {PROMPT_COLUMNS[0]}."
        )
    for field in table.schema:
        if _is_no_json(field.type):
            raise UserError(
                f"{key}: {path} holds {field.type} in the column {field.name}, which a prompt "
                "cannot carry along. Leave out the column, or write it as text."
            )
    rows = table.to_pylist()
    return [
        ({"prompt": row.pop(column), **row}, f"{key}: {path}, row {number}")
        for number, row in enumerate(rows, 1)
    ]


def _read(path: Path, key: str) -> Any:
    """Return the table of a file."""
    import pyarrow as pa  # takes half a second to import
    import pyarrow.csv as csv
    import pyarrow.parquet as parquet

    try:
        if path.suffix not in SEPARATORS:
            return parquet.read_table(path)
        text = read_text(path, key)
        names = dict.fromkeys(PROMPT_COLUMNS, pa.string())
        return csv.read_csv(
            io.BytesIO(text.encode()),
            parse_options=csv.ParseOptions(
                delimiter=SEPARATORS[path.suffix], newlines_in_values=True
            ),
            # A prompt of digits is a text too.
            convert_options=csv.ConvertOptions(column_types=names),
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
