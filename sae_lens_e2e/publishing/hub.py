"""Publish SAEs on the Hugging Face Hub, with a model card that says what they are."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from sae_lens import SAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.training.upload_saes_to_huggingface import upload_saes_to_huggingface

from sae_lens_e2e.evaluation.files import FILENAME as EVALUATION_FILENAME
from sae_lens_e2e.publishing.model_card import MARK, model_card
from sae_lens_e2e.publishing.neuronpedia import save_for_neuronpedia
from sae_lens_e2e.yaml_file import read_json

__all__ = ["Figures", "model_card", "upload_to_hub"]

_CARD = "README.md"
_ALONGSIDE = (SPARSITY_FILENAME, RUNNER_CFG_FILENAME)
_SAE_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")


class Figures(Protocol):
    """What an evaluation has to have: `evaluate(...)` gives one."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready figures by name."""
        ...


def upload_to_hub(
    saes: Mapping[str, SAE[Any] | Path | str],
    repo_id: str,
    *,
    revision: str = "main",
    private: bool | None = None,
    evaluations: Mapping[str, Figures] | None = None,
    write_card: bool = True,
) -> str:
    """Upload SAEs to a repository on the Hub, from which `SAE.from_pretrained(repo_id, id)` loads them; returns its URL.

    Each is uploaded as `save_for_neuronpedia` writes it, to the folder of its id, in a commit of its own. The model card
    comes last, and covers the SAEs that the repository has already, with their figures.

    Args:
        saes (Mapping): SAEs, or folders of them, by id, such as 'blocks.6.hook_resid_pre/e2e_ds'.
        repo_id (str): 'owner/name'; made if it does not exist.
        revision (str): The branch, made from main if it does not exist.
        private (bool | None): Whether a repository that is made is private; None is the owner's default.
        evaluations (Mapping | None): Figures for the card by SAE id, uploaded beside it as evaluation.json.
        write_card (bool): Whether to write README.md. One that this package wrote is written anew.

    Raises, before anything is uploaded, ValueError or FileNotFoundError naming each SAE that cannot be published and why,
    and FileExistsError if the repository's README.md is somebody else's.
    """
    figures = {sae_id: evaluation.to_dict() for sae_id, evaluation in (evaluations or {}).items()}
    _check_names(saes, repo_id, figures)
    api = HfApi()
    with tempfile.TemporaryDirectory() as temporary:
        folders = _stage(saes, Path(temporary))
        there = _files_there(api, repo_id, revision)
        if write_card:
            _check_card_is_ours(api, repo_id, revision, there or ())
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if there is None and revision != "main":
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        upload_saes_to_huggingface(dict(folders), repo_id, revision, add_default_readme=False)
        operations = _complete(folders, figures, there or ())
        if write_card:
            configs = {sae_id: read_json(folder / SAE_CFG_FILENAME) for sae_id, folder in folders.items()}
            others = _other_saes(api, repo_id, revision, there or (), folders)
            configs |= {sae_id: config for sae_id, (config, _) in others.items()}
            all_figures = figures | {sae_id: known for sae_id, (_, known) in others.items() if known}
            card = model_card(repo_id, dict(sorted(configs.items())), dict(sorted(all_figures.items())))
            operations.append(CommitOperationAdd(_CARD, card.encode()))
        if operations:
            api.create_commit(repo_id, operations, commit_message="Model card and evaluations", revision=revision)
    return str(url) if revision == "main" else f"{url}/tree/{revision}"


def _check_names(saes: Mapping[str, Any], repo_id: str, figures: Mapping[str, Any]) -> None:
    if not saes:
        raise ValueError("saes is empty; there is nothing to upload")
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"repo_id={repo_id!r} has no owner; make it 'owner/{repo_id}'")
    for sae_id in saes:
        if not _SAE_ID.fullmatch(sae_id):
            raise ValueError(
                f"SAE id {sae_id!r} cannot be a folder on the Hub; use letters, digits and . _ - in names separated by /"
            )
    if unknown := sorted(figures.keys() - saes.keys()):
        raise ValueError(f"evaluations of {', '.join(unknown)}: no such SAE is uploaded; there are {', '.join(saes)}")


def _stage(saes: Mapping[str, SAE[Any] | Path | str], root: Path) -> dict[str, Path]:
    """A folder for each SAE with what is to be uploaded of it, once all are known to be complete."""
    folders, problems = {}, []
    for number, (sae_id, given) in enumerate(saes.items()):
        folders[sae_id] = root / str(number)
        try:
            if isinstance(given, SAE):
                save_for_neuronpedia(given, folders[sae_id])
            else:
                _copy_folder(Path(given), folders[sae_id])
        except (ValueError, FileNotFoundError) as error:
            problems.append((sae_id, error))
    if problems:
        kind = FileNotFoundError if all(isinstance(error, FileNotFoundError) for _, error in problems) else ValueError
        raise kind("; ".join(f"{sae_id}: {error}" for sae_id, error in problems)) from problems[0][1]
    return folders


def _copy_folder(source: Path, target: Path) -> None:
    for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
        if not (source / name).is_file():
            raise FileNotFoundError(f"{str(source)!r} has no {name}, so it is no folder of an SAE")
    try:
        sae = SAE.load_from_disk(source)
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{str(source)!r} cannot be loaded as an inference SAE of SAELens ({what})") from error
    save_for_neuronpedia(sae, target)
    for name in _ALONGSIDE:
        if (source / name).is_file():
            shutil.copy(source / name, target / name)


def _files_there(api: HfApi, repo_id: str, revision: str) -> list[str] | None:
    """The files of a revision on the Hub; None if there is no such repository or revision."""
    try:
        return api.list_repo_files(repo_id, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None


def _check_card_is_ours(api: HfApi, repo_id: str, revision: str, there: Iterable[str]) -> None:
    if _CARD in there and MARK not in Path(_download(api, repo_id, revision, _CARD)).read_text():
        raise FileExistsError(
            f"{repo_id} has a {_CARD} that was not written by sae-lens-e2e; pass write_card=False to keep it, or delete it "
            "on the Hub to have one written"
        )


def _complete(
    folders: Mapping[str, Path], figures: Mapping[str, Any], there: Iterable[str]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Put each SAE's figures beside it, and take away what is there of an earlier SAE of that id."""
    added: dict[str, bytes] = {
        f"{sae_id}/{EVALUATION_FILENAME}": json.dumps(values, indent=1).encode() for sae_id, values in figures.items()
    }
    may_be_stale = {f"{sae_id}/{name}" for sae_id in folders for name in (*_ALONGSIDE, EVALUATION_FILENAME)}
    uploaded = {f"{sae_id}/{file.name}" for sae_id, folder in folders.items() for file in folder.iterdir()}
    stale = may_be_stale.intersection(there) - uploaded - added.keys()
    return [
        *(CommitOperationAdd(name, content) for name, content in added.items()),
        *(CommitOperationDelete(name) for name in sorted(stale)),
    ]


def _other_saes(
    api: HfApi, repo_id: str, revision: str, there: Iterable[str], uploaded: Mapping[str, Path]
) -> dict[str, tuple[dict[str, Any], dict[str, Any] | None]]:
    """The cfg.json and figures of the SAEs that the repository had before, other than those now uploaded."""
    files = set(there)
    ids = [name.removesuffix(f"/{SAE_CFG_FILENAME}") for name in sorted(files) if name.endswith(f"/{SAE_CFG_FILENAME}")]
    others: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {}
    for sae_id in ids:
        if sae_id not in uploaded:
            config = read_json(_download(api, repo_id, revision, f"{sae_id}/{SAE_CFG_FILENAME}"))
            evaluation = f"{sae_id}/{EVALUATION_FILENAME}"
            known = read_json(_download(api, repo_id, revision, evaluation)) if evaluation in files else None
            others[sae_id] = (config, known)
    return others


def _download(api: HfApi, repo_id: str, revision: str, name: str) -> str:
    return api.hf_hub_download(repo_id, name, revision=revision)
