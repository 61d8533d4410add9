"""Where an SAE trained with Apollo's library comes from: a folder, the Hugging Face Hub, Weights & Biases, Neuronpedia's name."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import wandb
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSIFY_WEIGHTS_FILENAME
from wandb.errors import UsageError

from sae_lens_e2e.output import written_whole
from sae_lens_e2e.yaml_file import read_json

__all__ = ["HUB_NAMES", "HUB_REPO", "ApolloFiles", "find", "is_apollos"]

HUB_REPO = "apollo-research/e2e-saes-gpt2"
_LAYERS = (2, 6, 10)
# How Neuronpedia writes how each was trained: "efr" is end to end with future reconstruction.
_KIND_LETTERS = {"local": "l", "e2e": "e", "downstream": "efr"}
_NEURONPEDIA_IDS = {
    f"{kind}_similar_{metric}_layer_{layer}": f"gpt2-small/{layer}-res_s{metric[0]}{letters}-ajt"
    for kind, letters in _KIND_LETTERS.items()
    for metric in ("ce", "l0")
    for layer in _LAYERS
}
HUB_NAMES = tuple(_NEURONPEDIA_IDS)
_HUB_NAME_OF_ID = {neuronpedia_id: name for name, neuronpedia_id in _NEURONPEDIA_IDS.items()}

# Tables 3 and 2 of the paper, in that order: a run that is in both goes by the later one, similar CE.
_RUNS = {
    "local_similar_l0": ("6vtk4k51", "jup3glm9", "5vmpdgaz"),
    "e2e_similar_l0": ("bst0prdd", "tvj2owza", "8crnit9h"),
    "downstream_similar_l0": ("e26jflpq", "2lzle2f0", "cvj5um2h"),
    "local_similar_ce": ("ue3lz0n7", "1jy3m5j0", "m2hntlav"),
    "e2e_similar_ce": ("ovhfts9n", "zgdpkafo", "8crnit9h"),
    "downstream_similar_ce": ("visi12en", "2lzle2f0", "cvj5um2h"),
}
_NEURONPEDIA_ID_OF_RUN = {
    f"sparsify/gpt2/{run}": _NEURONPEDIA_IDS[f"{name}_layer_{layer}"]
    for name, runs in _RUNS.items()
    for layer, run in zip(_LAYERS, runs, strict=True)
}

_CONFIG = "final_config.yaml"
_CHECKPOINT = re.compile(r"samples_(\d+)\.pt")
_WANDB_PATH = re.compile(r"(?:wandb:)?(\w[\w-]*)/(\w[\w.-]*)/(\w[\w-]*)")
_WANDB_URL = re.compile(r"https?://.+/(\w[\w-]*)/(\w[\w.-]*)/runs/(\w[\w-]*)(?:[/?#].*)?")
# In the cache folder of a W&B run that has ended: the names of the files that it has there.
_LISTING = "files.json"
_KINDS = (
    "a run folder (final_config.yaml and samples_N.pt) or one samples_N.pt of it, a pair NAME.pt and NAME.yaml, "
    f"{HUB_REPO}/NAME, a W&B run ENTITY/PROJECT/RUN or its URL, or a Neuronpedia id like gpt2-small/6-res_scefr-ajt"
)


@dataclass(frozen=True)
class ApolloFiles:
    """One of Apollo's SAE checkpoints and the config it was trained with, on this machine."""

    checkpoint: Path
    """samples_N.pt of a run, or NAME.pt of the Hub's layout."""
    config: Path
    """final_config.yaml of a run, or NAME.yaml of the Hub's layout."""
    neuronpedia_id: str | None
    """Such as "gpt2-small/6-res_scefr-ajt", where it is one of the 18 that were released."""


def find(
    source: str | Path,
    *,
    n_samples: int | None = None,
    force_download: bool = False,
    cache_dir: str | Path | None = None,
) -> ApolloFiles:
    """Find the two files of one SAE that Apollo's library trained, downloading them if they are not on this machine.

    source: a run folder with final_config.yaml and samples_N.pt, or one samples_N.pt in it; a pair NAME.pt and NAME.yaml,
        by either file, by NAME without a suffix, or by a folder that holds no other; one of HUB_NAMES, alone or after
        "apollo-research/e2e-saes-gpt2/"; a W&B run as "entity/project/run", with or without "wandb:" before it, or its
        URL; a Neuronpedia id. What exists on this machine wins over a name.
    n_samples: which checkpoint of a run, in samples trained on; None is the last.
    force_download: download what is in the cache already, too.
    cache_dir: where downloads are kept; None is huggingface_hub's own cache for the Hub, and ~/.cache/sae-lens-e2e
        (XDG_CACHE_HOME instead of ~/.cache where that is set) for W&B.

    Raises ValueError for a source that is none of these, is ambiguous, or is an SAE of another library, and for n_samples
    where there are no runs; FileNotFoundError for files, names and runs that do not exist; PermissionError without a W&B
    API key; ConnectionError where a download fails, which leaves no part of it behind.
    """
    path = Path(source).expanduser()
    local = None if _is_left_by_wandb(path) else _find_local(path, n_samples)
    if local is not None:
        return local
    name = str(source).rstrip("/")
    hub_name = _HUB_NAME_OF_ID.get(name, name.removeprefix(f"{HUB_REPO}/"))
    if hub_name in HUB_NAMES:
        _refuse_n_samples(n_samples, name)
        return _download_from_hub(hub_name, force_download, cache_dir)
    if name == HUB_REPO or name.startswith(f"{HUB_REPO}/"):
        raise ValueError(
            f"{name!r} names none of the SAEs in {HUB_REPO}; put one of these after it: {', '.join(HUB_NAMES)}"
        )
    run = _WANDB_PATH.fullmatch(name) or _WANDB_URL.fullmatch(name)
    if run:
        return _download_from_wandb("/".join(run.groups()), n_samples, force_download, cache_dir)
    raise ValueError(f"{name!r} is no SAE of Apollo's: nothing of that name is on this machine; give {_KINDS}")


def is_apollos(name: str) -> bool:
    """Whether a name that is nothing on this machine is one of Apollo's, by which `find` downloads: the Hub's, W&B's, Neuronpedia's."""
    in_repository = name == HUB_REPO or name.startswith(f"{HUB_REPO}/")
    of_run = _WANDB_PATH.fullmatch(name) or _WANDB_URL.fullmatch(name)
    return name in HUB_NAMES or name in _HUB_NAME_OF_ID or in_repository or bool(of_run)


def _is_left_by_wandb(path: Path) -> bool:
    """Whether it is the empty folder that W&B's client makes, in its working folder, for a run it was asked about."""
    return bool(_WANDB_PATH.fullmatch(str(path))) and path.is_dir() and not any(path.iterdir())


def _find_local(path: Path, n_samples: int | None) -> ApolloFiles | None:
    """What `path` stands for on this machine, or None where it stands for nothing."""
    if path.is_dir():
        return _find_in_folder(path, n_samples)
    stem = path.with_suffix("") if path.suffix in (".pt", ".yaml") else path
    checkpoint = _CHECKPOINT.fullmatch(f"{stem.name}.pt")
    if checkpoint and path.parent.is_dir():
        named = int(checkpoint[1])
        if n_samples not in (None, named):
            raise ValueError(f"n_samples={n_samples} contradicts {str(path)!r}; leave it out, or give the run folder")
        return _run_in(path.parent, named)
    if path.name == _CONFIG and path.is_file():
        return _run_in(path.parent, n_samples)
    if any(Path(f"{stem}{suffix}").is_file() for suffix in (".pt", ".yaml")):
        _refuse_n_samples(n_samples, str(path))
        return _pair(stem)
    if path.exists():
        raise ValueError(f"{str(path)!r} is no SAE of Apollo's; give {_KINDS}")
    return None


def _find_in_folder(folder: Path, n_samples: int | None) -> ApolloFiles:
    """The one run or the one pair that `folder` holds."""
    pairs = sorted(file.with_suffix("") for file in folder.glob("*.pt") if file.with_suffix(".yaml").is_file())
    checkpoints = _checkpoints(file.name for file in folder.iterdir())
    is_run = bool(checkpoints) and (folder / _CONFIG).is_file()
    choices = [*pairs, folder / checkpoints[max(checkpoints)]] if is_run else pairs
    if len(choices) > 1:
        raise ValueError(f"{str(folder)!r} holds several SAEs; choose one of {', '.join(map(str, choices))}")
    if is_run:
        return _run_in(folder, n_samples)
    if pairs:
        _refuse_n_samples(n_samples, str(folder))
        return _pair(pairs[0])
    raise _nothing_in(folder, bool(checkpoints))


def _nothing_in(folder: Path, has_checkpoints: bool) -> ValueError | FileNotFoundError:
    """The error for a folder without an SAE of Apollo's, which says what it is or what it lacks."""
    if (folder / SAE_CFG_FILENAME).is_file():
        load = f"sae_lens.SAE.load_from_disk({str(folder)!r}"
        if (folder / SAE_WEIGHTS_FILENAME).is_file():
            return ValueError(f"{str(folder)!r} is an SAE of SAELens, not of Apollo's library; use {load})")
        if (folder / SPARSIFY_WEIGHTS_FILENAME).is_file():
            loader = "sae_lens.loading.pretrained_sae_loaders.sparsify_disk_loader"
            return ValueError(
                f"{str(folder)!r} is an SAE of EleutherAI's sparsify, not of Apollo's library; use {load}, converter={loader})"
            )
    if has_checkpoints:
        return FileNotFoundError(f"{str(folder)!r} has checkpoints and no {_CONFIG}; put the one of that run there")
    if (folder / _CONFIG).is_file():
        return FileNotFoundError(
            f"{str(folder)!r} has a {_CONFIG} and no samples_N.pt; put a checkpoint of that run there"
        )
    unpaired = min(folder.glob("*.pt"), default=None)
    if unpaired:
        return FileNotFoundError(f"{str(unpaired)!r} has no {unpaired.stem}.yaml beside it; put it there")
    return FileNotFoundError(
        f"{str(folder)!r} holds neither {_CONFIG} and samples_N.pt, nor a pair NAME.pt and NAME.yaml"
    )


def _run_in(folder: Path, n_samples: int | None) -> ApolloFiles:
    checkpoints = _checkpoints(file.name for file in folder.iterdir())
    if not checkpoints or not (folder / _CONFIG).is_file():
        raise _nothing_in(folder, bool(checkpoints))
    return ApolloFiles(folder / _choose(checkpoints, n_samples, repr(str(folder))), folder / _CONFIG, None)


def _pair(stem: Path) -> ApolloFiles:
    checkpoint, config = Path(f"{stem}.pt"), Path(f"{stem}.yaml")
    for missing, present in ((checkpoint, config), (config, checkpoint)):
        if not missing.is_file():
            raise FileNotFoundError(f"{str(present)!r} has no {missing.name} beside it; put it there")
    return ApolloFiles(checkpoint, config, _NEURONPEDIA_IDS.get(stem.name))


def _checkpoints(names: Iterable[str]) -> dict[int, str]:
    """The checkpoints among some file names, by the samples that they were trained on."""
    return {int(match[1]): name for name in names if (match := _CHECKPOINT.fullmatch(name))}


def _choose(checkpoints: dict[int, str], n_samples: int | None, where: str) -> str:
    if n_samples is None:
        return checkpoints[max(checkpoints)]
    if n_samples not in checkpoints:
        available = ", ".join(str(n) for n in sorted(checkpoints))
        raise FileNotFoundError(f"n_samples={n_samples}: {where} has no such checkpoint; it has {available}")
    return checkpoints[n_samples]


def _refuse_n_samples(n_samples: int | None, source: str) -> None:
    if n_samples is not None:
        raise ValueError(f"n_samples={n_samples}: {source!r} is one checkpoint; leave n_samples out")


def _download_from_hub(name: str, force_download: bool, cache_dir: str | Path | None) -> ApolloFiles:
    def download(filename: str) -> Path:
        return Path(hf_hub_download(HUB_REPO, filename, cache_dir=cache_dir, force_download=force_download))

    try:
        config, checkpoint = download(f"{name}.yaml"), download(f"{name}.pt")
    except (RemoteEntryNotFoundError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"the Hub has no {HUB_REPO}/{name}.yaml and .pt that this token can read; check HF_ENDPOINT and HF_TOKEN"
        ) from error
    except Exception as error:  # its HTTP library's errors share no base class with its own
        reason = _one_line(error.__cause__ or error)
        raise ConnectionError(
            f"cannot download {HUB_REPO}/{name} ({reason}); check the network, or give a folder with its .pt and .yaml"
        ) from error
    return ApolloFiles(checkpoint, config, _NEURONPEDIA_IDS[name])


def _download_from_wandb(
    path: str, n_samples: int | None, force_download: bool, cache_dir: str | Path | None
) -> ApolloFiles:
    cache = cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "sae-lens-e2e"
    folder = Path(cache).expanduser() / "wandb" / path
    checkpoints = {} if force_download else _cached_checkpoints(folder)
    checkpoint = checkpoints.get(max(checkpoints, default=0) if n_samples is None else n_samples)
    if checkpoint is None or not all((folder / name).is_file() for name in (_CONFIG, checkpoint)):
        checkpoint, checkpoints = _fetch(path, folder, n_samples, force_download)
    # What was released is a run's last checkpoint.
    released = _NEURONPEDIA_ID_OF_RUN.get(path) if checkpoint == checkpoints[max(checkpoints)] else None
    return ApolloFiles(folder / checkpoint, folder / _CONFIG, released)


def _cached_checkpoints(folder: Path) -> dict[int, str]:
    """The checkpoints that a W&B run is known to have: none if it was never asked, or still running when it was."""
    listing = folder / _LISTING
    return _checkpoints(read_json(listing)) if listing.is_file() else {}


def _fetch(path: str, folder: Path, n_samples: int | None, force_download: bool) -> tuple[str, dict[int, str]]:
    """Get what `folder` lacks of one checkpoint of a W&B run; its name, and all the run has by their samples."""
    with _explaining_wandb(path):
        run = wandb.Api().run(path)
        # Apollo's library stores them under the folder that it saved to.
        files = {Path(file.name).name: file for file in run.files()}
    checkpoints = _checkpoints(files)
    if _CONFIG not in files or not checkpoints:
        raise FileNotFoundError(f"W&B run {path} lacks {_CONFIG} or samples_N.pt; it is no run of Apollo's library")
    checkpoint = _choose(checkpoints, n_samples, f"W&B run {path}")
    with (
        _explaining_wandb(path),
        written_whole(folder) as partial,
        tempfile.TemporaryDirectory(dir=partial) as downloads,
    ):
        for name in (_CONFIG, checkpoint):
            if force_download or not (folder / name).is_file():
                files[name].download(root=downloads).close()
                Path(downloads, files[name].name).replace(partial / name)
        if run.state != "running":
            (partial / _LISTING).write_text(json.dumps(sorted(files)))
    return checkpoint, checkpoints


@contextmanager
def _explaining_wandb(path: str) -> Iterator[None]:
    """Errors of wandb's as one line that says what to do."""
    try:
        yield
    except UsageError as error:
        raise PermissionError(
            f"{path!r} is not on this machine, and there is no W&B API key to get a run of that name with; "
            "run `wandb login` or set WANDB_API_KEY"
        ) from error
    except OSError:
        raise
    except Exception as error:
        if "Could not find run" in str(error):
            raise FileNotFoundError(
                f"{path!r} is neither on this machine nor a W&B run that this API key can read; check the name"
            ) from error
        raise ConnectionError(
            f"cannot get W&B run {path} ({_one_line(error)}); check the network and WANDB_API_KEY, or `wandb login` again"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
