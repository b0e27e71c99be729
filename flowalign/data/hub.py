"""Open data sets with the library `datasets`: on the hub, in a folder, or saved on disk."""

from pathlib import Path
from typing import Any, TYPE_CHECKING

from flowalign.data.source import DataSource
from flowalign.errors import UserError
from flowalign.models.hub import causes_of

if TYPE_CHECKING:
    from datasets import Dataset

DENIED = ("GatedRepoError", "gated", "401 Client Error", "403 Client Error", "403 Forbidden")
MISSING = ("DatasetNotFoundError", "RepositoryNotFoundError", "404 Client Error")
OFFLINE = (
    *("ConnectionError", "ConnectError", "OfflineMode", "LocalEntryNotFoundError", "offline mode"),
    *("Couldn't reach", "Max retries", "Couldn't find cache"),
)


def quiet_datasets() -> Any:
    """Import the library `datasets` without its progress bars and log."""
    import datasets  # slow to import, and used by few runs

    datasets.disable_progress_bars()
    # `datasets` logs an error before it raises it, and our message already says what failed.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def open_dataset(source: DataSource, key: str) -> "Dataset":
    """Open a data set of the hub, or one split of a folder, with the columns that flowalign knows.

    Raises:
        UserError: It cannot be reached or read, or has several splits and none is named.
    """
    library = quiet_datasets()
    path = source.path if source.is_on_hub else str(source.location)
    options = {"name": source.subset or None, "revision": source.revision}
    try:
        split = source.split or _only_split(library, source, path, key)
        table = library.load_dataset(path, split=split, **options)
    except UserError:
        raise
    except Exception as error:
        # `datasets` raises many types here, some of them only in its dependencies.
        raise UserError(f"{key}: {_explain(source, error)}") from error
    return renamed_columns(table, source, key)


def _only_split(library: Any, source: DataSource, path: str, key: str) -> str:
    names = library.get_dataset_split_names(
        path, config_name=source.subset or None, revision=source.revision
    )
    if len(names) > 1:
        raise UserError(
            f"{key}: {source.path} has the splits {', '.join(names)}. "
            f"Name one: {{path: {source.path}, split: {names[0]}}}."
        )
    return names[0]


def _explain(source: DataSource, error: BaseException) -> str:
    """Return why a data set could not be opened and what to do about it."""
    chain, path = causes_of(error), source.path
    if source.is_on_hub and any(phrase in chain for phrase in DENIED):
        return (
            f"{path} is gated or private. Accept its terms at "
            f"https://huggingface.co/datasets/{path}, then run `hf auth login` (or set HF_TOKEN), "
            "or give a local file or folder."
        )
    # Before the missing ones: without a network, `datasets` finds no data set at all.
    if source.is_on_hub and any(phrase in chain for phrase in OFFLINE):
        return (
            f"there is no file or folder {path}, and the hub cannot be reached. "
            "Give a local file or folder, or try again with a network."
        )
    if source.is_on_hub and any(phrase in chain for phrase in MISSING):
        return (
            f"there is no file or folder and no hub data set named {path}. Check the spelling; a "
            "private one needs `hf auth login` or HF_TOKEN."
        )
    reason = str(error).split("\n")[0].rstrip(".")
    return f"{source} cannot be opened as a data set: {reason}. Correct path, split or subset."


def renamed_columns(table: "Dataset", source: DataSource, key: str) -> "Dataset":
    """Return the table with its columns under the names that flowalign knows."""
    names = table.column_names
    for new, old in source.columns.items():
        if old not in names:
            raise UserError(
                f"{key}.columns.{new} is {old}, but {source} has the columns {', '.join(names)}. "
                "Name one of these."
            )
        if new != old:
            # The column of that name would be in the way, and the user has chosen another.
            table = table.remove_columns([new]) if new in table.column_names else table
            table = table.rename_column(old, new)
    return table


def folder_of(source: DataSource) -> Path | None:
    """Return the folder that names of files in a data set refer to, or None on the hub."""
    if source.is_on_hub:
        return None
    return source.location if source.location.is_dir() else source.location.parent
