"""Upload an exported adapter to the Hugging Face hub, with its card, pictures and configuration."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

from flowalign.bundled import portable
from flowalign.config.load import load_config
from flowalign.errors import UserError
from flowalign.models.hub import causes_of
from flowalign.progress import say, task
from flowalign.reporting.summary import Summary
from flowalign.runs.adapter_card import adapter_card, CARD, card_results
from flowalign.runs.checkpoint import find_checkpoint
from flowalign.runs.export import DIFFUSERS, PICTURES

LOG_IN = "Run `hf auth login` with a token that may write, or set HF_TOKEN."
DENIED = ("401 Client Error", "403 Client Error", "403 Forbidden", "LocalTokenNotFound")
OFFLINE = ("ConnectionError", "ConnectError", "OfflineMode", "Max retries", "timed out")
CONFIG = "config.yaml"


def check_push(repository: str, file_format: str) -> None:
    """Refuse an upload before anything is exported.

    Raises:
        UserError: The name is not owner/name, nobody is logged in, or the format has no card.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push {repository}: {error} Write --push owner/name.") from None
    if repository.count("/") != 1:
        raise UserError(f"--push {repository} is not a repository. Write --push owner/name.")
    if file_format != DIFFUSERS:
        raise UserError(
            f"--push uploads the format {DIFFUSERS}, which has a card. Leave out --format."
        )
    if get_token() is None:
        raise UserError(f"--push {repository} needs an account of the Hugging Face hub. {LOG_IN}")


def push_adapter(run: Path, step: int | None, adapter: Path, repository: str, public: bool) -> str:
    """Upload an adapter that `export_step` wrote. Returns the address of the repository.

    Args:
        run: The run folder.
        step: The exported step, as for `export_step`.
        adapter: The folder of the exported adapter.
        repository: owner/name, which is made if it does not exist.
        public: True to let everybody see a new repository.

    Raises:
        UserError: The hub cannot be reached, or refuses the upload.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with tempfile.TemporaryDirectory() as name, task(f"uploading to {repository}"):
        folder = Path(name)
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        _complete(run, step, folder, repository)
        try:
            # An existing repository stays as visible as it is.
            api.create_repo(repository, private=not public, exist_ok=True)
            api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message="Adapter from flowalign"
            )
        # The hub's errors have no common base class apart from Exception.
        except Exception as error:
            raise UserError(_explain(repository, adapter, error)) from error
    return f"{api.endpoint}/{repository}"


def _complete(run: Path, step: int | None, folder: Path, repository: str) -> None:
    """Add pictures, configuration, and a card whose code names the repository."""
    config, summary = load_config(run / CONFIG), _summary_of(run, step)
    for path in dict.fromkeys((config.model.path, config.evaluation_model.path)):
        if Path(path).is_dir():
            say(
                f"The card names the model {portable(path)}, a folder of this machine. "
                f"Correct it in {CARD} on the hub."
            )
    card = adapter_card(config, Path(repository)) + (card_results(summary) if summary else "")
    pictures = run / PICTURES
    if summary and pictures.is_file():
        shutil.copyfile(pictures, folder / pictures.name)
        card += f"\n![the same prompts and noise before and after training]({pictures.name})\n"
    shutil.copyfile(run / CONFIG, folder / CONFIG)
    card += f"\nThe settings of the training are in [{CONFIG}]({CONFIG}), for flowalign.\n"
    (folder / CARD).write_text(card, encoding="utf-8")


def _summary_of(run: Path, step: int | None) -> Summary | None:
    """Return the results of a run if they are those of the exported step."""
    try:
        summary: Any = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    exported = find_checkpoint(run, step).name
    if not isinstance(summary, dict) or exported != f"step-{summary.get('step', -1):06d}":
        return None
    return cast("Summary", summary) if summary.get("difference") else None


def _explain(repository: str, adapter: Path, error: BaseException) -> str:
    chain, kept = causes_of(error), f"The adapter is in {adapter}."
    if any(phrase in chain for phrase in DENIED):
        return f"{repository}: the hub refused the upload. {LOG_IN} {kept}"
    if any(phrase in chain for phrase in OFFLINE):
        return f"{repository}: the hub cannot be reached. Try again with a network. {kept}"
    reason = str(error).split("\n")[0].rstrip(".")
    return f"{repository}: the upload failed: {reason}. Check the repository on the hub. {kept}"
