"""SAEs that others have released: those of SAELens' registry, and of repositories on the Hugging Face Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory, get_repo_id_and_folder_name

from sae_lens_e2e.apollo.loaders import is_neuronpedia_apollo, load_neuronpedia_apollo_sae
from sae_lens_e2e.apollo.sources import is_apollos
from sae_lens_e2e.errors import named_line

_NAMED = 5
# How alike a name must be to a release's to be taken for a misspelt one, rather than for the owner of a repository.
_MISSPELT = 0.8


class Released(NamedTuple):
    """An SAE by release and id of SAELens' registry, or by repository of the Hub and folder in it, as SAELens takes them."""

    release: str
    sae_id: str

    @property
    def name(self) -> str:
        """As one writes it."""
        return f"{self.release}/{self.sae_id}"


def find_released(source: str | Path) -> Released | None:
    """What a source names, if it is the name of a released SAE: RELEASE/ID or RELEASE:ID, OWNER/REPOSITORY:FOLDER, or the like.

    What is on this machine or is Apollo's is none. Raises ValueError for an unknown release or id, with the nearest names.
    Downloads nothing.
    """
    name = str(source).rstrip("/")
    if Path(name).expanduser().exists() or name.startswith((".", "~")) or Path(name).is_absolute():
        return None
    directory = get_pretrained_saes_directory()
    release = next((known for known in directory if name == known or name.startswith((f"{known}/", f"{known}:"))), None)
    if release is not None:
        return Released(release, _known_id(release, name[len(release) + 1 :]))
    if is_apollos(name):
        return None
    first, colon, sae_id = name.partition(":")
    if "/" not in first or get_close_matches(name.split("/")[0], directory, n=1, cutoff=_MISSPELT):
        return _refuse_unknown(name, first if colon else name.split("/")[0])
    owner, repository, *folders = first.split("/")
    sae_id = sae_id if colon else "/".join(folders)
    if not sae_id or (colon and folders):
        raise ValueError(
            f"SAE {name!r}: there is nothing of that name on this machine, nor in SAELens' registry; of the Hub's give "
            "OWNER/REPOSITORY:FOLDER"
        )
    return Released(f"{owner}/{repository}", sae_id)


def load_released(released: Released, device: str = "cpu") -> SAE[Any]:
    """Download an SAE, as SAELens does, or take it from the cache; its norm is folded in where the registry has the scale.

    Apollo's in the registry are put right as `load_neuronpedia_apollo_sae` does. Raises OSError, in one line, if it cannot be
    had, ValueError if it is none that SAELens reads.
    """
    with _had_from_hub(released):
        if is_neuronpedia_apollo(released.release):
            return load_neuronpedia_apollo_sae(*released, device=device)
        return SAE.from_pretrained(*released, device=device)


def released_config(released: Released) -> dict[str, Any]:
    """The configuration of an SAE, its metadata under 'metadata', before its weights are downloaded. Raises as `load_released`."""
    with _had_from_hub(released):
        return load_sae_config_from_huggingface(*released)


def revision_of(released: Released) -> str | None:
    """The commit of its repository that was downloaded last, if this machine's cache knows."""
    repo_id, _ = get_repo_id_and_folder_name(*released)
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")
    try:
        return (folder / "refs" / constants.DEFAULT_REVISION).read_text().strip() or None
    except OSError:
        return None


def _known_id(release: str, sae_id: str) -> str:
    ids = get_pretrained_saes_directory()[release].saes_map
    if sae_id in ids:
        return sae_id
    near = get_close_matches(sae_id, ids, n=_NAMED) or list(ids)[:_NAMED]
    more = ", ..." if len(ids) > len(near) else ""
    raise ValueError(f"release {release!r} has no SAE {sae_id!r}; it has {len(ids)}: {', '.join(near)}{more}")


def _refuse_unknown(name: str, release: str) -> None:
    """Raise ValueError for a name that can be nothing but a misspelt release; a word that is near none is left to others."""
    near = get_close_matches(release, get_pretrained_saes_directory(), n=3)
    if near or ":" in name:
        advice = f"; the nearest are {', '.join(near)}" if near else "; of the Hub's give OWNER/REPOSITORY:FOLDER"
        raise ValueError(f"SAE {name!r}: there is no release {release!r} in SAELens' registry{advice}")


@contextmanager
def _had_from_hub(released: Released) -> Iterator[None]:
    """Say in one line which SAE could not be had, and why."""
    try:
        yield
    except MemoryError:
        raise
    except OSError as error:
        raise ConnectionError(
            f"SAE {released.name!r}: there is nothing of that name here, and it could not be had from the Hugging Face Hub "
            f"({named_line(error)[:200]})"
        ) from error
    except Exception as error:  # files of any kind fail in whatever way they happen to
        raise ValueError(f"SAE {released.name!r} is none that SAELens can read ({named_line(error)[:200]})") from error
