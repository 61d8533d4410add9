"""Apollo's SAEs through SAELens' own loading, from the Hub and from disk, and Neuronpedia's conversions put right."""

import dataclasses
import inspect
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, StandardSAE
from sae_lens.loading import pretrained_sae_loaders
from sae_lens.loading.pretrained_sae_loaders import (
    NAMED_PRETRAINED_SAE_CONFIG_GETTERS,
    NAMED_PRETRAINED_SAE_LOADERS,
    load_sae_config_from_huggingface,
    sae_lens_disk_loader,
)
from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup, get_pretrained_saes_directory
from safetensors.torch import save
from torch import Tensor

from sae_lens_e2e.apollo import loaders
from sae_lens_e2e.apollo.loaders import (
    apollo_disk_loader,
    apollo_huggingface_loader,
    load_neuronpedia_apollo_sae,
    neuronpedia_apollo_disk_loader,
    neuronpedia_apollo_loader,
)
from sae_lens_e2e.apollo.sources import HUB_REPO
from tests.apollo import HOOK, apollo_forward, named_model, parameters, run_config, write_pair, write_run
from tests.servers import Hub, hub

NAME = "e2e_similar_ce_layer_6"
HOOK_6 = "blocks.6.hook_resid_pre"
RELEASE, REPO = "gpt2-small-res_scefr-ajt", "neuronpedia/gpt2-small__res_scefr-ajt"
IDS = {HOOK_6: "6-res_scefr-ajt", "blocks.10.hook_resid_pre": "10-res_scefr-ajt"}
TRAINED = parameters()
X = torch.randn(200, 16, generator=torch.Generator().manual_seed(3)) + 0.5
CENTRED_X = X - X.mean(-1, keepdim=True)


def as_saelens(sae: dict[str, Tensor]) -> dict[str, Tensor]:
    """A conversion as a file of SAELens', the encoder left as it was trained."""
    return {
        "W_enc": sae["encoder.weight"].T.contiguous(),
        "b_enc": sae["encoder.bias"],
        "W_dec": (sae["decoder.weight"] / sae["decoder.weight"].norm(dim=0)).T.contiguous(),
        "b_dec": sae["decoder.bias"],
    }


def old_config(**changes: Any) -> dict[str, Any]:
    """A cfg.json as SAELens wrote them before version 6; a change to None leaves the key out."""
    config = {
        "architecture": "standard",
        "model_name": "gpt2-small",
        "hook_point": HOOK_6,
        "hook_point_layer": 6,
        "hook_point_head_index": None,
        "activation_fn_str": "relu",
        "d_in": 16,
        "d_sae": 48,
        "dtype": "float32",
        "device": "cpu",
        "normalize_activations": "none",
        "finetuning_scaling_factor": False,
        "dataset_path": "apollo-research/Skylion007-openwebtext-tokenizer-gpt2",
        "context_size": 1024,
        "sae_lens_training_version": None,
    }
    return {key: value for key, value in (config | changes).items() if value is not None}


def conversion(config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, bytes]:
    """The files of a SAELens SAE."""
    return {"cfg.json": json.dumps(config).encode(), "sae_weights.safetensors": save(weights)}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def difference(sae: SAE[Any], x: Tensor, expected_input: Tensor) -> float:
    """How far the SAE's features on `x` are from those that Apollo's library gives for `expected_input`."""
    with torch.no_grad():
        return float((sae.encode(x) - apollo_forward(TRAINED, expected_input)[0]).abs().max())


def is_right(sae: SAE[Any]) -> None:
    """On the model as it is, the SAE must compute what the trained one computed on the centred residual stream."""
    assert isinstance(sae, StandardSAE)
    assert difference(sae, X, CENTRED_X) < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(sae(X), apollo_forward(TRAINED, CENTRED_X)[1], atol=1e-5, rtol=0)


@pytest.fixture
def released(tmp_path: Path) -> Iterator[Hub]:
    """A Hub with one of Apollo's SAEs and two of Neuronpedia's conversions, one of them with its sparsity."""
    pair = write_pair(tmp_path, NAME, named_model("gpt2-small", HOOK_6), TRAINED)
    files = {f"{HUB_REPO}/{NAME}{suffix}": Path(f"{pair}{suffix}").read_bytes() for suffix in (".pt", ".yaml")}
    for hook, folder in IDS.items():
        for name, content in conversion(old_config(hook_point=hook), as_saelens(TRAINED)).items():
            files[f"{REPO}/{folder}/{name}"] = content
    files[f"{REPO}/{IDS[HOOK_6]}/sparsity.safetensors"] = save({"sparsity": torch.arange(48.0)})
    with hub(files) as server:
        yield server


class TestApollosOwnFiles:
    def test_from_the_hub(self, released: Hub) -> None:
        sae = SAE.from_pretrained(HUB_REPO, NAME, converter=apollo_huggingface_loader)
        is_right(sae)
        assert sae.cfg.metadata.hook_name == HOOK_6
        assert sae.cfg.metadata.neuronpedia_id == "gpt2-small/6-res_sce-ajt"
        assert sae.cfg.metadata.centring_folded is True
        assert len(released.downloads()) == 2
        # It is in the cache then, unless it is asked for anew.
        SAE.from_pretrained(HUB_REPO, NAME, converter=apollo_huggingface_loader)
        assert len(released.downloads()) == 2
        SAE.from_pretrained(HUB_REPO, NAME, converter=apollo_huggingface_loader, force_download=True)
        assert len(released.downloads()) == 4

    @pytest.mark.usefixtures("released")
    def test_its_type(self) -> None:
        sae = SAE.from_pretrained(HUB_REPO, NAME, dtype="bfloat16", converter=apollo_huggingface_loader)
        assert {p.dtype for p in sae.parameters()} == {torch.bfloat16}
        assert sae.cfg.dtype == "bfloat16"

    @pytest.mark.usefixtures("released")
    def test_an_sae_that_the_hub_does_not_have(self) -> None:
        with pytest.raises(FileNotFoundError, match="local_similar_l0_layer_2"):
            SAE.from_pretrained(HUB_REPO, "local_similar_l0_layer_2", converter=apollo_huggingface_loader)

    @pytest.mark.usefixtures("released")
    def test_by_its_name_in_a_registry_of_saelens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lookup = PretrainedSAELookup(
            release="theirs",
            repo_id=HUB_REPO,
            model="gpt2-small",
            conversion_func=loaders.LOADER_NAME,
            saes_map={HOOK_6: NAME},
            expected_var_explained={},
            expected_l0={},
            neuronpedia_id={HOOK_6: "gpt2-small/6-res_mine"},
            norm_scaling_factor={},
            config_overrides=None,
        )
        monkeypatch.setitem(get_pretrained_saes_directory(), "theirs", lookup)
        sae = SAE.from_pretrained("theirs", HOOK_6)
        is_right(sae)
        assert sae.cfg.metadata.neuronpedia_id == "gpt2-small/6-res_mine"
        config = load_sae_config_from_huggingface("theirs", HOOK_6)
        assert (config["d_in"], config["d_sae"], config["apply_b_dec_to_input"]) == (16, 48, False)
        assert config["metadata"] == sae.cfg.metadata.to_dict()

    def test_from_disk(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path, run_config(), {HOOK: TRAINED})
        sae = SAE.load_from_disk(folder, converter=apollo_disk_loader)
        assert isinstance(sae, StandardSAE)
        assert difference(sae, X, X) < 1e-5
        assert sae.cfg.metadata.hook_name == HOOK
        half = SAE.load_from_disk(folder, dtype="float16", converter=apollo_disk_loader)
        assert half.W_enc.dtype == torch.float16

    @pytest.mark.parametrize("layout", ["run", "checkpoint", "pair"])
    def test_from_disk_in_each_layout(self, tmp_path: Path, layout: str) -> None:
        config = named_model("gpt2", HOOK_6)
        source = (
            write_pair(tmp_path, "mine", config, TRAINED)
            if layout == "pair"
            else write_run(tmp_path, config, {HOOK_6: TRAINED})
        )
        path = source / "samples_1600.pt" if layout == "checkpoint" else source
        is_right(SAE.load_from_disk(path, converter=apollo_disk_loader))

    def test_several_saes_in_one_checkpoint(self, tmp_path: Path) -> None:
        hooks = [HOOK, HOOK_6]
        write_run(tmp_path, run_config({"saes.sae_positions": hooks}), dict.fromkeys(hooks, TRAINED))
        with pytest.raises(ValueError, match="2 SAEs; choose one with load_apollo_sae"):
            SAE.load_from_disk(tmp_path, converter=apollo_disk_loader)

    def test_an_sae_of_saelens(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="is an SAE of SAELens"):
            SAE.load_from_disk(
                write(tmp_path, conversion(old_config(), as_saelens(TRAINED))), converter=apollo_disk_loader
            )


class TestNeuronpediasConversions:
    @pytest.fixture(params=["disk", "hub"])
    def load(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., SAE[Any]]]:
        """Loads a conversion from disk or from the Hub, put right or as SAELens does it."""
        if request.param == "disk":

            def from_disk(config: dict[str, Any], weights: dict[str, Tensor], stock: bool = False) -> SAE[Any]:
                folder = write(tmp_path / "conversion", conversion(config, weights))
                return SAE.load_from_disk(
                    folder, converter=sae_lens_disk_loader if stock else neuronpedia_apollo_disk_loader
                )

            yield from_disk
            return
        with hub({}) as server:

            def from_hub(config: dict[str, Any], weights: dict[str, Tensor], stock: bool = False) -> SAE[Any]:
                for name, content in conversion(config, weights).items():
                    server.files[f"{REPO}/{IDS[HOOK_6]}/{name}"] = content
                return SAE.from_pretrained(RELEASE, HOOK_6) if stock else load_neuronpedia_apollo_sae(RELEASE, HOOK_6)

            yield from_hub

    def test_an_old_config(self, load: Callable[..., SAE[Any]], caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            sae = load(old_config(), as_saelens(TRAINED))
        is_right(sae)
        assert sae.cfg.apply_b_dec_to_input is False
        metadata = sae.cfg.metadata
        assert [metadata.model_name, metadata.hook_name, metadata.context_size] == ["gpt2-small", HOOK_6, 1024]
        assert metadata.prepend_bos is False
        subjects = ["apply_b_dec_to_input was missing", "prepend_bos was missing", "W_enc was for a residual stream"]
        assert len(metadata.corrections) == len(subjects)
        for correction, subject in zip(metadata.corrections, subjects, strict=True):
            assert correction.startswith(subject)
            assert any(correction in message for message in caplog.messages)

    def test_what_saelens_makes_of_it_is_something_else(self, load: Callable[..., SAE[Any]]) -> None:
        stock = load(old_config(), as_saelens(TRAINED), stock=True)
        assert stock.cfg.apply_b_dec_to_input is True
        assert difference(stock, X, CENTRED_X) > 0.1
        # Either of the two alone would not do.
        assert difference(stock, X, X) > 0.1
        stock.cfg.apply_b_dec_to_input = False
        assert difference(stock, X, X) < 1e-5
        assert difference(stock, X, CENTRED_X) > 0.1

    @pytest.mark.parametrize("key", ["hook_point", "hook_name"])
    def test_one_that_says_what_it_needs(self, load: Callable[..., SAE[Any]], key: str) -> None:
        named = {"hook_point": None, key: HOOK_6}
        config = old_config(apply_b_dec_to_input=False, prepend_bos=False, **named)
        sae = load(config, as_saelens(TRAINED))
        is_right(sae)
        assert sae.cfg.metadata.hook_name == HOOK_6
        assert [c.split()[0] for c in sae.cfg.metadata.corrections] == ["W_enc"]

    def test_one_that_is_wrong(self, load: Callable[..., SAE[Any]]) -> None:
        sae = load(old_config(apply_b_dec_to_input=True, prepend_bos=True), as_saelens(TRAINED))
        is_right(sae)
        assert sae.cfg.metadata.corrections[0] == "apply_b_dec_to_input was True; it is now False"
        # What its config says about BOS is about how its dashboards were made.
        assert sae.cfg.metadata.prepend_bos is True
        assert len(sae.cfg.metadata.corrections) == 2

    def test_one_that_reads_past_the_mean_already(self, load: Callable[..., SAE[Any]]) -> None:
        weights = as_saelens(TRAINED)
        weights["W_enc"] = weights["W_enc"] - weights["W_enc"].mean(0)
        sae = load(old_config(apply_b_dec_to_input=False, prepend_bos=False), weights)
        is_right(sae)
        assert sae.cfg.metadata.corrections == []
        assert torch.equal(sae.W_enc, weights["W_enc"])

    def test_one_for_the_processed_model(self, load: Callable[..., SAE[Any]]) -> None:
        processed = {"center_writing_weights": True, "fold_ln": True}
        sae = load(old_config(prepend_bos=False, model_from_pretrained_kwargs=processed), as_saelens(TRAINED))
        assert difference(sae, CENTRED_X, CENTRED_X) < 1e-5
        assert torch.equal(sae.W_enc, as_saelens(TRAINED)["W_enc"])
        assert sae.cfg.metadata.model_from_pretrained_kwargs == processed
        assert [c.split()[0] for c in sae.cfg.metadata.corrections] == ["apply_b_dec_to_input"]

    def test_put_right_it_is_a_stock_sae_with_nothing_left_to_correct(
        self, load: Callable[..., SAE[Any]], tmp_path: Path
    ) -> None:
        load(old_config(), as_saelens(TRAINED)).save_model(tmp_path / "saved")
        stock = SAE.load_from_disk(tmp_path / "saved")
        is_right(stock)
        assert len(stock.cfg.metadata.corrections) == 3
        again = SAE.load_from_disk(tmp_path / "saved", converter=neuronpedia_apollo_disk_loader)
        is_right(again)
        assert again.cfg.metadata.corrections == []
        assert again.cfg.metadata.hook_name == HOOK_6

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_rounding_is_not_taken_for_a_mean(self, tmp_path: Path, dtype: str) -> None:
        wide = as_saelens(parameters(d_in=768, d_sae=256))
        wide["W_enc"] = wide["W_enc"] - wide["W_enc"].mean(0)
        config = old_config(apply_b_dec_to_input=False, prepend_bos=False, d_in=768, d_sae=256, dtype=dtype)
        rounded = {name: tensor.to(getattr(torch, dtype)) for name, tensor in wide.items()}
        _, state_dict = neuronpedia_apollo_disk_loader(write(tmp_path, conversion(config, rounded)))
        assert torch.equal(state_dict["W_enc"], rounded["W_enc"])
        # And a mean is not taken for rounding.
        raw = as_saelens(parameters(d_in=768, d_sae=256))
        raw = {name: tensor.to(getattr(torch, dtype)) for name, tensor in raw.items()}
        cfg_dict, state_dict = neuronpedia_apollo_disk_loader(write(tmp_path, conversion(config, raw)))
        assert len(cfg_dict["metadata"]["corrections"]) == 1
        assert state_dict["W_enc"].mean(0).abs().max() < 1e-4


class TestRegistry:
    @pytest.mark.usefixtures("released")
    @pytest.mark.parametrize("sae_id", IDS)
    def test_an_entry_by_its_release(self, sae_id: str) -> None:
        # That of layer 10 has its whole release inside it.
        sae = load_neuronpedia_apollo_sae(RELEASE, sae_id)
        is_right(sae)
        assert sae.cfg.metadata.neuronpedia_id == f"gpt2-small/{IDS[sae_id]}"
        assert sae.cfg.metadata.hook_name == sae_id
        half = load_neuronpedia_apollo_sae(RELEASE, sae_id, dtype="float16")
        assert half.W_enc.dtype == torch.float16

    @pytest.mark.usefixtures("released")
    def test_with_its_sparsity(self) -> None:
        for sae_id, expected in zip(IDS, (torch.arange(48.0), None), strict=True):
            found = SAE.from_pretrained_with_cfg_and_sparsity(RELEASE, sae_id, converter=neuronpedia_apollo_loader)
            is_right(found[0])
            assert (found[2] is None) == (expected is None)
            if expected is not None:
                assert found[2] is not None
                assert torch.equal(found[2], expected)

    @pytest.mark.usefixtures("released")
    def test_by_the_name_of_the_loader(self, monkeypatch: pytest.MonkeyPatch) -> None:
        directory = get_pretrained_saes_directory()
        ours = dataclasses.replace(directory[RELEASE], conversion_func=loaders.CONVERTED_LOADER_NAME)
        monkeypatch.setitem(directory, RELEASE, ours)
        is_right(SAE.from_pretrained(RELEASE, HOOK_6))
        config = load_sae_config_from_huggingface(RELEASE, HOOK_6)
        assert config["apply_b_dec_to_input"] is False
        assert config["metadata"]["hook_name"] == HOOK_6
        assert config["metadata"]["model_name"] == "gpt2-small"
        assert config["metadata"]["prepend_bos"] is False
        assert len(config["metadata"]["corrections"]) == 2

    def test_a_release_of_somebody_else(self) -> None:
        for release in ("gpt2-small-res-jb", "gemma-scope-2b-pt-res", "gpt2-small-res_scefr"):
            with pytest.raises(ValueError, match="none of Apollo's") as caught:
                load_neuronpedia_apollo_sae(release, HOOK_6)
            assert repr(release) in str(caught.value)
            assert "\n" not in str(caught.value)

    def test_every_release_of_theirs_that_saelens_knows_is_one(self) -> None:
        theirs = {name for name, lookup in get_pretrained_saes_directory().items() if "ajt" in lookup.repo_id}
        assert theirs == {f"gpt2-small-res_{kind}-ajt" for kind in ("sce", "scefr", "scl", "sle", "slefr", "sll")}


class TestWhatSAELensAsksOfALoader:
    """These fail where a new SAELens asks for something else than what these loaders give."""

    HUGGINGFACE = ("repo_id", "folder_name", "device", "force_download", "cfg_overrides")
    DISK = ("path", "device", "cfg_overrides")

    @pytest.mark.parametrize(
        ("protocol", "expected", "functions"),
        [
            ("PretrainedSaeHuggingfaceLoader", HUGGINGFACE, ("apollo_huggingface_loader", "neuronpedia_apollo_loader")),
            (
                "PretrainedSaeConfigHuggingfaceLoader",
                HUGGINGFACE,
                ("apollo_huggingface_config", "neuronpedia_apollo_config"),
            ),
            ("PretrainedSaeDiskLoader", DISK, ("apollo_disk_loader", "neuronpedia_apollo_disk_loader")),
        ],
    )
    def test_the_protocols(self, protocol: str, expected: tuple[str, ...], functions: tuple[str, ...]) -> None:
        asked = inspect.signature(getattr(pretrained_sae_loaders, protocol).__call__).parameters
        assert tuple(asked)[1:] == expected
        for name in functions:
            parameters = inspect.signature(getattr(loaders, name)).parameters.values()
            # Whatever else there is SAELens does not give.
            given = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)
            assert given == expected, name

    @pytest.mark.parametrize(
        ("call", "loader"),
        [
            (lambda converter: SAE.from_pretrained(RELEASE, HOOK_6, converter=converter), apollo_huggingface_loader),
            (lambda converter: SAE.load_from_disk("somewhere", converter=converter), apollo_disk_loader),
        ],
    )
    def test_how_it_calls_them(self, call: Callable[..., Any], loader: Callable[..., Any]) -> None:
        class CalledError(Exception):
            pass

        def converter(*args: Any, **kwargs: Any) -> Any:
            inspect.signature(loader).bind(*args, **kwargs)
            raise CalledError

        with pytest.raises(CalledError):
            call(converter)

    def test_the_names_are_registered(self) -> None:
        for name, loader, config in (
            ("apollo", apollo_huggingface_loader, loaders.apollo_huggingface_config),
            ("apollo_neuronpedia", neuronpedia_apollo_loader, loaders.neuronpedia_apollo_config),
        ):
            assert NAMED_PRETRAINED_SAE_LOADERS[name] is loader
            assert NAMED_PRETRAINED_SAE_CONFIG_GETTERS[name] is config
        # SAELens' own stay what they were.
        assert NAMED_PRETRAINED_SAE_LOADERS["sae_lens"] is pretrained_sae_loaders.sae_lens_huggingface_loader
