"""Where one of Apollo's SAEs comes from: folders, the Hub, W&B, Neuronpedia's names."""

import re
from pathlib import Path
from typing import Any

import pytest
import wandb
from huggingface_hub import constants
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from sae_lens_e2e.apollo.sources import HUB_NAMES, HUB_REPO, ApolloFiles, find
from tests.servers import hub, wandb_server

NAME = "downstream_similar_ce_layer_6"
NEURONPEDIA_ID = "gpt2-small/6-res_scefr-ajt"
HUB_FILES = {f"{HUB_REPO}/{NAME}.{suffix}": f"{NAME}.{suffix}".encode() * 99 for suffix in ("pt", "yaml")}
RUN = "sparsify/gpt2/2lzle2f0"
RUN_FILES = {
    "config.yaml": b"wandb's own",
    # More than a page of W&B's listings, and before the checkpoints in it.
    **{f"media/images/{i}.png": b"png" for i in range(60)},
    "runs/e2e_ds/final_config.yaml": b"seed: 0",
    "runs/e2e_ds/samples_9000.pt": b"9000" * 99,
    "runs/e2e_ds/samples_40000.pt": b"40000" * 99,
}
# Tables 2 and 3 of the paper: layer by layer, trained locally, end to end, and end to end with the later layers.
PAPER = {
    "ue3lz0n7": "gpt2-small/2-res_scl-ajt",
    "ovhfts9n": "gpt2-small/2-res_sce-ajt",
    "visi12en": "gpt2-small/2-res_scefr-ajt",
    "1jy3m5j0": "gpt2-small/6-res_scl-ajt",
    "zgdpkafo": "gpt2-small/6-res_sce-ajt",
    "2lzle2f0": "gpt2-small/6-res_scefr-ajt",
    "m2hntlav": "gpt2-small/10-res_scl-ajt",
    "8crnit9h": "gpt2-small/10-res_sce-ajt",
    "cvj5um2h": "gpt2-small/10-res_scefr-ajt",
    "6vtk4k51": "gpt2-small/2-res_sll-ajt",
    "bst0prdd": "gpt2-small/2-res_sle-ajt",
    "e26jflpq": "gpt2-small/2-res_slefr-ajt",
    "jup3glm9": "gpt2-small/6-res_sll-ajt",
    "tvj2owza": "gpt2-small/6-res_sle-ajt",
    # 2lzle2f0, 8crnit9h and cvj5um2h are in both tables, and stand in the first.
    "5vmpdgaz": "gpt2-small/10-res_sll-ajt",
}


def write(folder: Path, *names: str) -> Path:
    """`folder` with files of those names, each holding its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(name)
    return folder


def names(files: ApolloFiles) -> tuple[str, str]:
    return files.checkpoint.name, files.config.name


def everything_in(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def raises_one_line(error: type[Exception], source: str | Path, *parts: str, **options: Any) -> None:
    """`find` must fail with one line that says all of `parts`."""
    with pytest.raises(error) as caught:
        find(source, **options)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


class TestFolders:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        # The last by its number is not the last by its spelling.
        return write(tmp_path / "run", "final_config.yaml", "samples_800.pt", "samples_1600.pt", "metrics.json")

    def test_a_run_gives_its_last_checkpoint(self, run: Path):
        assert find(run) == ApolloFiles(run / "samples_1600.pt", run / "final_config.yaml", None)
        assert find(str(run)) == find(run / "final_config.yaml") == find(run)

    def test_or_the_one_asked_for(self, run: Path):
        assert names(find(run, n_samples=800)) == ("samples_800.pt", "final_config.yaml")
        for source in (run / "samples_800.pt", run / "samples_800"):
            assert find(source) == find(source, n_samples=800) == find(run, n_samples=800)

    def test_a_checkpoint_that_is_not_there(self, run: Path):
        raises_one_line(FileNotFoundError, run, "n_samples=900", "800, 1600", n_samples=900)
        raises_one_line(FileNotFoundError, run / "samples_900.pt", "n_samples=900", "800, 1600")
        raises_one_line(ValueError, run / "samples_800.pt", "n_samples=1600", "leave it out", n_samples=1600)

    def test_a_home_folder_is_written_as_in_a_shell(self, run: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HOME", str(run.parent))
        assert find("~/run") == find(run)

    @pytest.mark.parametrize("name", ["mine", "e2e_1.5_seed_0", "downstream_similar_l0_layer_10"])
    def test_a_pair_by_either_file_or_its_name_or_its_folder(self, tmp_path: Path, name: str):
        write(tmp_path, f"{name}.pt", f"{name}.yaml", "README.md")
        neuronpedia_id = "gpt2-small/10-res_slefr-ajt" if name.startswith("downstream") else None
        expected = ApolloFiles(tmp_path / f"{name}.pt", tmp_path / f"{name}.yaml", neuronpedia_id)
        for source in (tmp_path / f"{name}.pt", tmp_path / f"{name}.yaml", tmp_path / name, tmp_path):
            assert find(source) == expected
            raises_one_line(ValueError, source, "n_samples=8", "one checkpoint", n_samples=8)

    def test_a_folder_with_several_names_them(self, tmp_path: Path):
        write(tmp_path, "a.pt", "a.yaml", "b.pt", "b.yaml", "c.pt")
        raises_one_line(ValueError, tmp_path, "several", str(tmp_path / "a"), str(tmp_path / "b"))
        assert names(find(tmp_path / "b")) == ("b.pt", "b.yaml")

    def test_as_does_one_with_a_run_and_a_pair(self, run: Path):
        write(run, "a.pt", "a.yaml")
        raises_one_line(ValueError, run, "several", str(run / "a"), str(run / "samples_1600.pt"))
        assert names(find(run / "samples_1600.pt")) == ("samples_1600.pt", "final_config.yaml")

    @pytest.mark.parametrize(
        ("held", "error", "says"),
        [
            ([], FileNotFoundError, ["final_config.yaml and samples_N.pt", "NAME.pt and NAME.yaml"]),
            (["samples_8.pt"], FileNotFoundError, ["no final_config.yaml"]),
            (["final_config.yaml"], FileNotFoundError, ["no samples_N.pt"]),
            (["a.pt", "b.yaml"], FileNotFoundError, ["a.pt", "no a.yaml"]),
            (["cfg.json", "sae_weights.safetensors"], ValueError, ["SAELens", "SAE.load_from_disk('"]),
            (
                ["cfg.json", "sae.safetensors"],
                ValueError,
                ["EleutherAI", "SAE.load_from_disk('", "sparsify_disk_loader"],
            ),
        ],
    )
    def test_a_folder_without_says_what_it_is_or_lacks(
        self, tmp_path: Path, held: list[str], error: type[Exception], says: list[str]
    ):
        raises_one_line(error, write(tmp_path / "folder", *held), "folder", *says)

    def test_half_of_a_pair_or_a_run(self, tmp_path: Path):
        write(tmp_path, "a.pt", "b.yaml", "samples_8.pt", "notes.txt")
        raises_one_line(FileNotFoundError, tmp_path / "a.pt", "no a.yaml")
        raises_one_line(FileNotFoundError, tmp_path / "b", "no b.pt")
        raises_one_line(FileNotFoundError, tmp_path / "samples_8.pt", "no final_config.yaml")
        raises_one_line(ValueError, tmp_path / "notes.txt", "no SAE of Apollo's")

    def test_what_is_here_wins_over_a_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        write(tmp_path / NEURONPEDIA_ID, "mine.pt", "mine.yaml")
        write(tmp_path / HUB_REPO, f"{NAME}.pt", f"{NAME}.yaml")
        write(tmp_path / RUN, "final_config.yaml", "samples_8.pt")
        assert names(find(NEURONPEDIA_ID)) == ("mine.pt", "mine.yaml")
        assert find(f"{HUB_REPO}/{NAME}").checkpoint == Path(HUB_REPO, f"{NAME}.pt")
        assert find(RUN).checkpoint == Path(RUN, "samples_8.pt")

    @pytest.mark.parametrize(
        "source", ["no/such/place/sae.pt", "gpt2-small/5-res_scefr-ajt", "e2e_layer_6", "/no/such"]
    )
    def test_what_is_nothing_at_all_lists_the_kinds(self, source: str):
        kinds = ["samples_N.pt", "NAME.pt and NAME.yaml", HUB_REPO, "ENTITY/PROJECT/RUN", NEURONPEDIA_ID]
        raises_one_line(ValueError, source, source, *kinds)


def test_the_released_saes_are_those_that_saelens_lists():
    listed = {
        neuronpedia_id
        for release, entry in get_pretrained_saes_directory().items()
        if re.fullmatch(r"gpt2-small-res_s.*-ajt", release)
        for neuronpedia_id in entry.neuronpedia_id.values()
    }
    assert len(set(HUB_NAMES)) == 18
    with hub({f"{HUB_REPO}/{name}.{suffix}": name.encode() for name in HUB_NAMES for suffix in ("pt", "yaml")}):
        found = {name: find(name).neuronpedia_id for name in HUB_NAMES}
        assert set(found.values()) == listed
        for name, neuronpedia_id in found.items():
            assert find(str(neuronpedia_id)).checkpoint.read_text() == name


class TestHub:
    @pytest.mark.parametrize("source", [f"{HUB_REPO}/{NAME}", NAME, NEURONPEDIA_ID])
    def test_both_files_are_downloaded_once(self, source: str):
        with hub(HUB_FILES) as server:
            found = find(source)
            assert found.neuronpedia_id == NEURONPEDIA_ID
            assert found.checkpoint.read_bytes() == HUB_FILES[f"{HUB_REPO}/{NAME}.pt"]
            assert found.config.read_bytes() == HUB_FILES[f"{HUB_REPO}/{NAME}.yaml"]
            assert found.checkpoint.is_relative_to(server.cache)
            assert find(source) == found
            assert len(server.downloads()) == 2
            assert find(source, force_download=True) == found
            assert len(server.downloads()) == 4

    def test_where_downloads_are_kept(self, tmp_path: Path):
        with hub(HUB_FILES) as server:
            assert find(NAME, cache_dir=tmp_path).checkpoint.is_relative_to(tmp_path)
            assert everything_in(server.cache) == []

    def test_the_cache_is_enough_without_a_network(self, monkeypatch: pytest.MonkeyPatch):
        with hub(HUB_FILES) as server:
            found = find(NAME)
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
            assert find(NAME) == found
            assert len(server.downloads()) == 2

    def test_the_repository_alone_is_ambiguous(self):
        raises_one_line(ValueError, HUB_REPO, *HUB_NAMES)
        raises_one_line(ValueError, f"{HUB_REPO}/", *HUB_NAMES)
        raises_one_line(ValueError, f"{HUB_REPO}/e2e_layer_6", "e2e_layer_6'", *HUB_NAMES)

    def test_it_has_one_checkpoint_of_each(self):
        with hub(HUB_FILES) as server:
            raises_one_line(ValueError, NAME, "n_samples=400000", NAME, n_samples=400_000)
            raises_one_line(ValueError, NEURONPEDIA_ID, "n_samples=400000", n_samples=400_000)
            assert server.requests == []

    @pytest.mark.parametrize("served", [{}, {f"{HUB_REPO}/README.md": b""}, {f"{HUB_REPO}/{NAME}.yaml": b""}])
    def test_what_the_hub_does_not_have(self, served: dict[str, bytes]):
        with hub(served):
            raises_one_line(FileNotFoundError, NAME, f"{HUB_REPO}/{NAME}", "HF_ENDPOINT")

    def test_no_network(self, monkeypatch: pytest.MonkeyPatch):
        with hub(HUB_FILES):
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
            raises_one_line(ConnectionError, NAME, NAME, "network")
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            closed_port = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", closed_port)
            raises_one_line(ConnectionError, NAME, NAME, "refused", "network", force_download=True)

    def test_a_connection_that_breaks_leaves_nothing(self):
        with hub(HUB_FILES) as server:
            server.cut_short.add(f"{HUB_REPO}/{NAME}.pt")
            raises_one_line(ConnectionError, NAME, NAME, "network")
            assert not [file for file in everything_in(server.cache) if file.endswith((".pt", ".incomplete"))]
            server.cut_short.clear()
            assert find(NAME).checkpoint.read_bytes() == HUB_FILES[f"{HUB_REPO}/{NAME}.pt"]


class TestWandb:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        return tmp_path / "sae-lens-e2e" / "wandb"

    @pytest.mark.parametrize(
        "source",
        [
            RUN,
            f"wandb:{RUN}",
            "https://wandb.ai/sparsify/gpt2/runs/2lzle2f0",
            "https://wandb.ai/sparsify/gpt2/runs/2lzle2f0/overview?nw=nwuser",
        ],
    )
    def test_both_files_are_downloaded_once(self, source: str, cache: Path):
        with wandb_server({RUN: RUN_FILES}) as server:
            found = find(source)
            assert found == ApolloFiles(
                cache / RUN / "samples_40000.pt", cache / RUN / "final_config.yaml", NEURONPEDIA_ID
            )
            assert found.checkpoint.read_bytes() == b"40000" * 99
            assert found.config.read_bytes() == b"seed: 0"
            asked = len(server.requests)
            assert find(source) == found
            # An ended run does not change: no network is needed.
            assert len(server.requests) == asked
            assert find(source, force_download=True) == found
            assert server.downloads() == ["runs/e2e_ds/final_config.yaml", "runs/e2e_ds/samples_40000.pt"] * 2

    def test_another_checkpoint_comes_by_itself(self, cache: Path):
        with wandb_server({RUN: RUN_FILES}) as server:
            earlier = find(RUN, n_samples=9000)
            assert earlier.checkpoint.read_bytes() == b"9000" * 99
            # It is another SAE than the one that was released.
            assert earlier.neuronpedia_id is None
            assert find(RUN).checkpoint.read_bytes() == b"40000" * 99
            assert find(RUN, n_samples=9000) == earlier
            assert find(RUN, n_samples=40000) == find(RUN)
            assert [Path(name).name for name in server.downloads()] == [
                "final_config.yaml",
                "samples_9000.pt",
                "samples_40000.pt",
            ]
            raises_one_line(FileNotFoundError, RUN, "n_samples=8", "9000, 40000", n_samples=8)
        # What was downloaded is a run folder like any other.
        assert find(cache / RUN).checkpoint == cache / RUN / "samples_40000.pt"

    def test_where_downloads_are_kept(self, tmp_path: Path, cache: Path):
        with wandb_server({RUN: RUN_FILES}):
            assert find(RUN, cache_dir=tmp_path / "mine").checkpoint.is_relative_to(tmp_path / "mine")
        assert not cache.exists()

    def test_a_run_that_goes_on_is_asked_again(self):
        with wandb_server({RUN: RUN_FILES}) as server:
            server.states[RUN] = "running"
            assert find(RUN) == find(RUN)
            assert len(server.downloads()) == 2
            server.runs[RUN]["runs/e2e_ds/samples_41000.pt"] = b"41000"
            assert find(RUN).checkpoint.read_bytes() == b"41000"
            assert len(server.downloads()) == 3

    def test_which_of_the_released_it_is(self):
        files = {"final_config.yaml": b"", "samples_400000.pt": b""}
        # The last is another seed, which was not released.
        ids = {f"sparsify/gpt2/{run}": neuronpedia_id for run, neuronpedia_id in PAPER.items()}
        ids |= {"sparsify/gpt2/pzelh1s8": None, "sparsify/other/tvj2owza": None}
        with wandb_server(dict.fromkeys(ids, files)):
            assert {run: find(run).neuronpedia_id for run in ids} == ids

    def test_a_run_that_does_not_exist(self, cache: Path):
        with wandb_server({RUN: RUN_FILES}):
            for source in ("sparsify/gpt2/no-such", "nobody/gpt2/2lzle2f0"):
                raises_one_line(FileNotFoundError, source, source, "check the name")
        assert not cache.exists()

    def test_a_run_of_something_else(self, cache: Path):
        with wandb_server({RUN: {"config.yaml": b""}}):
            raises_one_line(FileNotFoundError, RUN, RUN, "final_config.yaml")
        assert not cache.exists()

    def test_the_folder_that_its_client_leaves_is_not_the_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        with wandb_server({RUN: RUN_FILES}):
            monkeypatch.setenv("WANDB_DIR", str(tmp_path))
            found = find(RUN)
            assert (tmp_path / RUN).is_dir()
            assert find(RUN) == found

    def test_without_an_api_key(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        with wandb_server({RUN: RUN_FILES}):
            monkeypatch.setenv("NETRC", str(tmp_path / "none"))
            monkeypatch.delenv("WANDB_API_KEY")
            raises_one_line(PermissionError, RUN, RUN, "not on this machine", "wandb login", "WANDB_API_KEY")

    @pytest.mark.parametrize("key", ["f" * 40, "short"])
    def test_with_a_wrong_one(self, key: str, monkeypatch: pytest.MonkeyPatch):
        with wandb_server({RUN: RUN_FILES}):
            monkeypatch.setenv("WANDB_API_KEY", key)
            raises_one_line(ConnectionError, RUN, RUN, "WANDB_API_KEY", "wandb login")

    def test_no_network(self, monkeypatch: pytest.MonkeyPatch):
        with wandb_server({RUN: RUN_FILES}):
            monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
            # How long it tries, in seconds.
            monkeypatch.setattr(wandb.Api, "_HTTP_TIMEOUT", 1)
            raises_one_line(ConnectionError, RUN, RUN, "network")

    @pytest.mark.parametrize("breaks", ["cut short", "not there"])
    def test_a_download_that_fails_leaves_nothing(self, breaks: str, cache: Path):
        name = "runs/e2e_ds/samples_40000.pt"
        with wandb_server({RUN: RUN_FILES}) as server:
            find(RUN, n_samples=9000)
            before = everything_in(cache)
            failing = server.cut_short if breaks == "cut short" else server.missing
            failing.add(name)
            raises_one_line(ConnectionError, RUN, RUN, "network")
            assert everything_in(cache) == before
            failing.clear()
            assert find(RUN).checkpoint.read_bytes() == b"40000" * 99


def test_a_run_of_apollos_own_library():
    run = Path(__file__).parents[2] / "shared" / "apollo" / "e2e_ds"
    if not run.is_dir():
        pytest.skip("Apollo's runs are not on this machine")
    assert names(find(run)) == ("samples_1600.pt", "final_config.yaml")
    assert names(find(run, n_samples=800)) == ("samples_800.pt", "final_config.yaml")
