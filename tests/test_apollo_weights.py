"""Apollo's SAEs as SAELens SAEs: what they compute, on which language model, and what is said of them."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
import torch.nn.functional as F
import yaml
from sae_lens import SAE, StandardSAE
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens import HookedTransformer

from sae_lens_e2e.apollo.model import PROCESSED
from sae_lens_e2e.apollo.weights import load_apollo_sae, load_apollo_saes
from tests.apollo import (
    HOOK,
    apollo_forward,
    golden_parameters,
    named_model,
    parameters,
    reference,
    run_config,
    write_pair,
    write_run,
)
from tests.models import D_MODEL, GOLDEN, apollo_tiny4l, random_model, random_tokens

RUNS = ("local", "e2e_ds")
RESIDUAL = ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.1.hook_resid_post")
CENTRED = (*RESIDUAL, "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out", "blocks.0.hook_resid_pre")
D_IN = {"blocks.1.mlp.hook_post": 32, "blocks.1.mlp.hook_pre": 32}


def raises_one_line(error: type[Exception], *parts: str, **arguments: Any) -> None:
    """`load_apollo_sae` must fail with one line that says all of `parts`."""
    with pytest.raises(error) as caught:
        load_apollo_sae(**arguments)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def spliced_logits(model: HookedTransformer, hook: str, tokens: Tensor, run: Any) -> Tensor:
    """The logits with `run(activation)` in the activation's place."""
    with torch.no_grad():
        return model.run_with_hooks(
            tokens,
            fwd_hooks=[(hook, lambda x, hook: run(x.flatten(2)).reshape(x.shape))],  # noqa: ARG005
        )


def activations(model: HookedTransformer, hooks: list[str], tokens: Tensor, sae: Any = None) -> dict[str, Tensor]:
    """Activations at `hooks`, with an SAE at HOOK or without; a hook that an SAE sits at gives what went into it."""
    found: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        found[hook.name] = x.detach()

    fwd_hooks: list[Any] = [(hook, keep) for hook in hooks]
    if sae is not None:
        fwd_hooks.append((HOOK, lambda x, hook: sae(x)))  # noqa: ARG005
    with torch.no_grad():
        found["logits"] = model.run_with_hooks(tokens, fwd_hooks=fwd_hooks)
    return found


def is_apollos(sae: StandardSAE, run: str, model: HookedTransformer | None = None) -> None:
    """Spliced into the reference model, the SAE must give every loss that Apollo's library computed on its batch."""
    golden = load_file(GOLDEN / f"apollo_{run}.safetensors")
    model, tokens = model or apollo_tiny4l(), golden["tokens"]
    downstream = [k.removeprefix("loss.in_to_orig.") for k in golden if k.startswith("loss.in_to_orig.")]
    clean = activations(model, [HOOK, *downstream], tokens)
    spliced = activations(model, [HOOK, *downstream], tokens, sae)
    with torch.no_grad():
        features = sae.encode(clean[HOOK])
        losses = {
            f"out_to_in.{HOOK}": (sae(clean[HOOK]) - clean[HOOK]).square().mean(),
            f"sparsity.{HOOK}": features.sum(-1).mean() / D_MODEL,
            **{f"in_to_orig.{hook}": (spliced[hook] - clean[hook]).square().mean() for hook in downstream},
        }
    if "loss.logits_kl" in golden:
        p, q = clean["logits"].log_softmax(-1), spliced["logits"].log_softmax(-1)
        losses["logits_kl"] = (p.exp() * (p - q)).sum(-1).mean()
    assert len(losses) == {"local": 2, "e2e_ds": 6}[run]
    for name, loss in losses.items():
        assert float(loss) == pytest.approx(float(golden[f"loss.{name}"]), rel=1e-5), name


class TestTrainedSAEs:
    @pytest.mark.parametrize("run", RUNS)
    def test_a_run_folder(self, tmp_path: Path, run: str) -> None:
        sae = load_apollo_sae(write_run(tmp_path / "run", run_config(), {HOOK: golden_parameters(run)}))
        assert type(sae) is StandardSAE
        assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.apply_b_dec_to_input) == (D_MODEL, 8 * D_MODEL, False)
        is_apollos(sae, run)

    @pytest.mark.parametrize("run", RUNS)
    def test_a_pair_as_on_the_hub(self, tmp_path: Path, run: str) -> None:
        # Where its SAE sits may be written as one name or as a list of one.
        config = run_config({"saes.sae_positions": HOOK if run == "local" else [HOOK]})
        is_apollos(load_apollo_sae(write_pair(tmp_path, f"{run}_layer_2", config, golden_parameters(run))), run)

    @pytest.mark.parametrize("run", RUNS)
    def test_what_apollos_library_wrote(self, run: str) -> None:
        folder = reference(run)
        is_apollos(load_apollo_sae(folder), run)
        is_apollos(load_apollo_sae(folder / "samples_1600.pt"), run)
        earlier = load_apollo_sae(folder, n_samples=800)
        assert earlier.cfg.metadata.checkpoint == "samples_800.pt"
        with pytest.raises(AssertionError, match=r"out_to_in|sparsity"):
            is_apollos(earlier, run)

    def test_saved_it_is_a_stock_sae(self, tmp_path: Path) -> None:
        sae = load_apollo_sae(write_run(tmp_path / "run", run_config(), {HOOK: golden_parameters("e2e_ds")}))
        sae.save_model(tmp_path / "saved")
        stock = SAE.load_from_disk(tmp_path / "saved")
        assert isinstance(stock, StandardSAE)
        assert stock.cfg.metadata == sae.cfg.metadata
        is_apollos(stock, "e2e_ds")

    def test_the_rows_of_the_dictionary_have_norm_one(self, tmp_path: Path) -> None:
        sae = load_apollo_sae(write_run(tmp_path / "run", run_config(), {HOOK: parameters()}))
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))
        # Nothing that SAELens may do with the norms of the decoder changes it then.
        x = torch.randn(9, 16)
        before = sae(x)
        sae.fold_W_dec_norm()
        torch.testing.assert_close(sae(x), before)

    def test_an_element_that_never_grew_is_zero_and_not_nan(self, tmp_path: Path) -> None:
        dead = parameters()
        dead["decoder.weight"][:, 7] = 0
        halves = {name: tensor.half() for name, tensor in dead.items()}
        sae = load_apollo_sae(write_run(tmp_path / "run", run_config(), {HOOK: halves}))
        assert sae.W_dec[7].eq(0).all()
        assert sae.W_dec.isfinite().all()

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_the_type_of_its_weights(self, tmp_path: Path, dtype: str) -> None:
        folder = write_run(tmp_path / "run", run_config(), {HOOK: parameters()})
        sae = load_apollo_sae(folder, dtype=dtype)
        assert {str(p.dtype) for p in sae.parameters()} == {f"torch.{dtype}"}
        assert sae.cfg.dtype == dtype
        torch.testing.assert_close(sae.W_dec.float(), load_apollo_sae(folder).W_dec, atol=0.01, rtol=0)


class TestSeveralSAEs:
    OTHER = "blocks.0.mlp.hook_post"

    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        # A position of Apollo's may be part of a name, and stand for every hook that it is part of.
        config = run_config({"saes.sae_positions": ["hook_resid_pre", self.OTHER]})
        saes = {HOOK: parameters(), self.OTHER: parameters(d_in=32, seed=1)}
        return write_run(tmp_path / "run", config, saes)

    def test_all_of_them_by_hook(self, run: Path) -> None:
        saes = load_apollo_saes(run)
        assert list(saes) == [HOOK, self.OTHER]
        for hook, sae in saes.items():
            assert sae.cfg.metadata.hook_name == hook
        assert [sae.cfg.metadata.hook_layer for sae in saes.values()] == [2, 0]
        x = torch.randn(20, 32)
        torch.testing.assert_close(saes[self.OTHER](x), apollo_forward(parameters(d_in=32, seed=1), x)[1])

    def test_one_of_them(self, run: Path) -> None:
        sae = load_apollo_sae(run, self.OTHER)
        assert sae.cfg.d_in == 32
        torch.testing.assert_close(sae.W_dec, load_apollo_saes(run)[self.OTHER].W_dec)

    def test_which_one_must_be_said(self, run: Path) -> None:
        raises_one_line(ValueError, "2 SAEs", "hook_name=", HOOK, self.OTHER, source=run)

    def test_a_hook_that_the_checkpoint_does_not_have(self, run: Path) -> None:
        wanted = "blocks.1.hook_resid_pre"
        raises_one_line(ValueError, f"hook_name={wanted!r}", HOOK, self.OTHER, source=run, hook_name=wanted)

    def test_a_hook_that_the_only_sae_does_not_sit_at(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "one", run_config(), {HOOK: parameters()})
        raises_one_line(ValueError, "blocks.3", HOOK, source=folder, hook_name="blocks.3.hook_resid_pre")

    def test_one_that_cannot_be_converted_is_in_nobodys_way(self, tmp_path: Path) -> None:
        hook_z = "blocks.0.attn.hook_z"
        config = named_model("gpt2", changes={"saes.sae_positions": [HOOK, hook_z]})
        folder = write_run(tmp_path / "run", config, {HOOK: parameters(), hook_z: parameters()})
        assert load_apollo_sae(folder, HOOK).cfg.metadata.centring_folded
        raises_one_line(ValueError, hook_z, "fold_centring=False", source=folder, hook_name=hook_z)
        with pytest.raises(ValueError, match=re.escape(hook_z)):
            load_apollo_saes(folder)


class TestProcessedModel:
    """Runs on a model by name saw what it has with processed weights; SAELens runs it as it is."""

    TOKENS = random_tokens(6, 16, 61)

    @staticmethod
    def processed(model: HookedTransformer) -> HookedTransformer:
        """The model as `HookedTransformer.from_pretrained` makes it, by the same function of TransformerLens'."""
        processed = copy.deepcopy(model)
        processed.load_and_process_state_dict({k: v.clone() for k, v in model.state_dict().items()}, **PROCESSED)
        return processed

    @staticmethod
    def sae(model: HookedTransformer, hook: str) -> dict[str, Tensor]:
        """Apollo's parameters for the hook, at the scale of what the model has there."""
        with torch.no_grad():
            _, cache = model.run_with_cache(TestProcessedModel.TOKENS, names_filter=hook)
        x = cache[hook].flatten(2)
        parts = parameters(d_in=x.shape[-1], d_sae=4 * x.shape[-1])
        return {**parts, "encoder.bias": parts["encoder.bias"] * x.std()}

    @staticmethod
    def both(
        folder: Path, hook: str, normalization: str = "LN", name: str = "gpt2", **options: Any
    ) -> tuple[dict[str, float], StandardSAE]:
        """How far the converted SAE on the model as it is comes from Apollo's on the processed one, and the SAE."""
        model = random_model(normalization)
        processed = TestProcessedModel.processed(model)
        trained = TestProcessedModel.sae(processed, hook)
        folder = write_run(folder, named_model(name, hook), {hook: trained})
        sae = load_apollo_sae(folder, **options)
        kept: dict[str, Tensor] = {}

        def apollos(x: Tensor) -> Tensor:
            kept["theirs"], x_hat = apollo_forward(trained, x)
            return x_hat

        def ours(x: Tensor) -> Tensor:
            kept["ours"] = sae.encode(x)
            return sae.decode(kept["ours"])

        theirs = spliced_logits(processed, hook, TestProcessedModel.TOKENS, apollos).log_softmax(-1)
        found = spliced_logits(model, hook, TestProcessedModel.TOKENS, ours).log_softmax(-1)
        clean = model(TestProcessedModel.TOKENS).log_softmax(-1)
        # The comparison means something: features fire, not all of them, and the splice changes what the model says.
        assert 0.02 < (kept["theirs"] > 0).float().mean() < 0.5
        assert (theirs - clean).abs().max() > 0.1
        return {
            "features": float((kept["ours"] - kept["theirs"]).abs().max()),
            "log-probabilities": float((found - theirs).abs().max()),
        }, sae

    def test_the_model_is_the_same_but_for_the_mean_of_its_residual_stream(self) -> None:
        model = random_model("LN")
        processed = self.processed(model)
        before, after = (activations(m, list(CENTRED), self.TOKENS) for m in (model, processed))
        torch.testing.assert_close(after["logits"].log_softmax(-1), before["logits"].log_softmax(-1), atol=1e-4, rtol=0)
        for hook in CENTRED:
            assert before[hook].mean(-1).abs().max() > 0.1, hook
            centred = before[hook] - before[hook].mean(-1, keepdim=True)
            torch.testing.assert_close(after[hook], centred, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("hook", CENTRED)
    def test_folded_it_does_the_same_on_the_model_as_it_is(self, tmp_path: Path, hook: str) -> None:
        differences, sae = self.both(tmp_path, hook)
        assert max(differences.values()) < 1e-4, differences
        assert sae.cfg.metadata.centring_folded is True
        assert sae.cfg.metadata.model_from_pretrained_kwargs == {}
        assert sae.W_enc.mean(0).abs().max() < 1e-6

    @pytest.mark.parametrize("hook", CENTRED)
    def test_unfolded_it_does_not(self, tmp_path: Path, hook: str) -> None:
        differences, sae = self.both(tmp_path, hook, fold_centring=False)
        assert min(differences.values()) > 1e-2, differences
        # The metadata say with which model it does.
        assert sae.cfg.metadata.centring_folded is False
        assert sae.cfg.metadata.model_from_pretrained_kwargs == PROCESSED

    @pytest.mark.parametrize("hook", RESIDUAL)
    def test_unfolded_it_is_apollos_on_the_processed_model(self, tmp_path: Path, hook: str) -> None:
        processed = self.processed(random_model("LN"))
        trained = self.sae(processed, hook)
        folder = write_run(tmp_path, named_model("gpt2", hook), {hook: trained})
        sae = load_apollo_sae(folder, fold_centring=False)
        theirs = spliced_logits(processed, hook, self.TOKENS, lambda x: apollo_forward(trained, x)[1])
        ours = spliced_logits(processed, hook, self.TOKENS, sae)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("hook", D_IN)
    def test_the_hidden_layer_of_an_mlp_is_left_by_processing(self, tmp_path: Path, hook: str) -> None:
        differences, sae = self.both(tmp_path, hook)
        assert max(differences.values()) < 1e-4, differences
        assert sae.cfg.metadata.centring_folded is False
        assert sae.cfg.metadata.model_from_pretrained_kwargs == {}
        # To fold there would have been wrong, so it cannot be asked for.
        wrong = sae.encode(random := torch.randn(50, 32)) - sae.encode(random - random.mean(-1, keepdim=True))
        assert wrong.abs().max() > 1e-2
        raises_one_line(ValueError, hook, "nothing to fold", source=tmp_path, fold_centring=True)

    @pytest.mark.parametrize("hook", ["blocks.1.attn.hook_z", "blocks.1.ln1.hook_normalized", "blocks.1.hook_q_input"])
    def test_elsewhere_there_is_no_folding(self, tmp_path: Path, hook: str) -> None:
        write_run(tmp_path, named_model("gpt2", hook), {hook: parameters()})
        for fold_centring in (None, True):
            raises_one_line(
                ValueError, hook, "gpt2", "fold_centring=False", source=tmp_path, fold_centring=fold_centring
            )
        sae = load_apollo_sae(tmp_path, fold_centring=False)
        assert sae.cfg.metadata.centring_folded is False
        assert sae.cfg.metadata.model_from_pretrained_kwargs == PROCESSED

    def test_what_is_refused_does_differ(self, tmp_path: Path) -> None:
        differences, _ = self.both(tmp_path, "blocks.1.attn.hook_z", fold_centring=False)
        assert min(differences.values()) > 1e-2, differences

    @pytest.mark.parametrize("hook", RESIDUAL)
    def test_a_model_with_rmsnorm_is_not_centred(self, tmp_path: Path, hook: str) -> None:
        differences, sae = self.both(tmp_path, hook, "RMS", "llama-7b")
        # Folding the norms' weights alone moves this model's log-probabilities by more than 1e-4.
        assert max(differences.values()) < 1e-3, differences
        assert sae.cfg.metadata.centring_folded is False
        assert sae.cfg.metadata.model_from_pretrained_kwargs == {}
        raises_one_line(ValueError, hook, "nothing to fold", source=tmp_path, fold_centring=True)

    @pytest.mark.parametrize(
        ("names", "folded"),
        [
            (("gpt2", "gpt2-small", "GPT2-medium", "distilgpt2", "gpt2-stanford-small-a"), True),
            # Named for what they have in common with Mistral the project, not with the model of that name.
            (("gpt2-mistral-small-a", "stanford-crfm/alias-gpt2-small-x21"), True),
            (("roneneldan/TinyStories-1M", "tiny-stories-33M", "pythia-70m-deduped", "gpt-neo-125M", "gpt-j"), True),
            (("opt-125m", "phi-1", "phi-2", "olmo-1b", "stablelm-base-3b", "santacoder"), True),
            (("llama-7b", "Llama-2-7b", "meta-llama/Llama-3.2-1B", "CodeLlama-7b-python", "mistral-7b"), False),
            (("gemma-2b", "google/gemma-2-2b", "qwen-1.8b", "qwen3-0.6b", "qwen-32b-preview", "yi-6b"), False),
            (("mixtral-8x7b", "phi-3", "phi-4", "olmo-2-1b", "olmoe", "apertus", "gpt-oss"), False),
        ],
    )
    def test_which_norm_a_model_has(self, tmp_path: Path, names: tuple[str, ...], folded: bool) -> None:
        for name in names:
            write_run(tmp_path, named_model(name), {HOOK: parameters()})
            assert load_apollo_sae(tmp_path).cfg.metadata.centring_folded is folded, name

    @pytest.mark.parametrize("name", ["attn-only-2l-demo", "solu-2l", "bloom-560m", "somebody/their-model"])
    def test_a_model_whose_norm_is_not_known(self, tmp_path: Path, name: str) -> None:
        write_run(tmp_path, named_model(name), {HOOK: parameters()})
        raises_one_line(ValueError, name, "fold_centring=True", source=tmp_path)
        folded, unfolded = (load_apollo_sae(tmp_path, fold_centring=fold) for fold in (True, False))
        assert folded.W_enc.mean(0).abs().max() < 1e-6
        torch.testing.assert_close(unfolded.W_enc, parameters()["encoder.weight"].T)
        assert unfolded.cfg.metadata.model_from_pretrained_kwargs == PROCESSED

    def test_the_activation_of_a_solu_model_is_not_taken_for_granted(self, tmp_path: Path) -> None:
        hook = "blocks.1.mlp.hook_post"
        write_run(tmp_path, named_model("solu-2l", hook), {hook: parameters()})
        raises_one_line(ValueError, hook, "solu-2l", source=tmp_path)

    @pytest.mark.parametrize("hook", [*CENTRED, *D_IN, "blocks.1.attn.hook_z"])
    def test_a_run_on_a_saved_model_used_it_as_it_is(self, tmp_path: Path, hook: str) -> None:
        trained = parameters()
        write_run(tmp_path, run_config({"saes.sae_positions": [hook]}), {hook: trained})
        sae = load_apollo_sae(tmp_path)
        assert sae.cfg.metadata.centring_folded is False
        assert sae.cfg.metadata.model_from_pretrained_kwargs == {}
        x = torch.randn(50, 16) + 1
        features, x_hat = apollo_forward(trained, x)
        torch.testing.assert_close(sae.encode(x), features)
        torch.testing.assert_close(sae(x), x_hat)
        raises_one_line(ValueError, hook, "nothing to fold", source=tmp_path, fold_centring=True)


class TestMetadata:
    def test_all_that_a_user_of_saelens_or_neuronpedia_needs(self, tmp_path: Path) -> None:
        config = named_model(
            "gpt2-small",
            "blocks.6.hook_resid_pre",
            {
                "train_data.dataset_name": "apollo-research/Skylion007-openwebtext-tokenizer-gpt2",
                "train_data.n_ctx": 1024,
                "loss.in_to_orig.hook_positions": [f"blocks.{layer}.hook_resid_pre" for layer in range(7, 12)],
                "loss.sparsity.coeff": 50.0,
            },
        )
        source = write_pair(tmp_path, "downstream_similar_ce_layer_6", config, parameters())
        assert load_apollo_sae(source).cfg.metadata.to_dict() == {
            "sae_lens_version": sae_lens.__version__,
            "sae_lens_training_version": None,
            "model_name": "gpt2-small",
            "model_class_name": "HookedTransformer",
            "model_from_pretrained_kwargs": {},
            "hook_name": "blocks.6.hook_resid_pre",
            "hook_layer": 6,
            "hook_head_index": None,
            "dataset_path": "apollo-research/Skylion007-openwebtext-tokenizer-gpt2",
            "context_size": 1024,
            "prepend_bos": False,
            "exclude_special_tokens": False,
            "neuronpedia_id": "gpt2-small/6-res_scefr-ajt",
            "training_library": "e2e_sae",
            "centring_folded": True,
            "objective": {
                "name": "e2e_ds",
                "kl_coefficient": 0.5,
                "downstream_coefficient": 2.5,
                "downstream_hooks": [f"blocks.{layer}.hook_resid_pre" for layer in range(7, 12)],
                "mse_coefficient": 0.0,
            },
            "sparsity": {"coeff": 50.0, "p_norm": 1.0},
            "checkpoint": "downstream_similar_ce_layer_6.pt",
        }

    def test_of_a_run_on_a_saved_model(self, tmp_path: Path) -> None:
        metadata = load_apollo_sae(write_run(tmp_path, run_config(), {HOOK: parameters()})).cfg.metadata
        assert (metadata.model_name, metadata.neuronpedia_id) == ("tiny4l/model.pt", None)
        assert (metadata.dataset_path, metadata.context_size) == ("tiny512x64", 64)

    def test_text_that_apollos_library_tokenised_began_with_a_bos(self, tmp_path: Path) -> None:
        config = run_config({"train_data.is_tokenized": False})
        assert load_apollo_sae(write_run(tmp_path, config, {HOOK: parameters()})).cfg.metadata.prepend_bos is True

    def test_an_objective_without_equivalent_is_kept_as_it_is(self, tmp_path: Path) -> None:
        config = run_config({"loss.out_to_orig": {"coeff": 0.3}})
        metadata = load_apollo_sae(write_run(tmp_path, config, {HOOK: parameters()})).cfg.metadata
        assert metadata.objective == {"name": "apollo", **config["loss"]}

    def test_the_local_objective_is_a_mean_over_d_in(self, tmp_path: Path) -> None:
        config = run_config({"loss.in_to_orig": None, "loss.logits_kl": None, "loss.out_to_in.coeff": 1.0})
        metadata = load_apollo_sae(write_run(tmp_path, config, {HOOK: parameters()})).cfg.metadata
        assert metadata.objective == {"name": "local", "mse_coefficient": 1 / 16}


class TestBadInput:
    @pytest.mark.parametrize("positions", [None, [], [HOOK, "blocks.3.hook_resid_pre"], ["hook_resid_pre"]])
    def test_a_pair_that_does_not_say_where_its_sae_sits(self, tmp_path: Path, positions: Any) -> None:
        source = write_pair(tmp_path, "mine", run_config({"saes.sae_positions": positions}), parameters())
        raises_one_line(ValueError, "mine.yaml", "saes.sae_positions", source=source)

    def test_a_checkpoint_beside_the_config_of_another_run(self, tmp_path: Path) -> None:
        write_run(tmp_path, run_config({"saes.sae_positions": ["blocks.1.hook_resid_pre"]}), {HOOK: parameters()})
        raises_one_line(ValueError, HOOK, "blocks.1.hook_resid_pre", "config of that run", source=tmp_path)

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("", "no 'saes'"),
            ("- 1\n", "no 'saes'"),
            ("just words", "no 'saes'"),
            ("tlens_config:\n  d_model: 32\n", "no 'saes'"),
            ("architecture: standard\nd_in: 32\nhook_name: blocks.2.hook_resid_pre\n", "no 'saes'"),
            ("saes: {}\nloss: {}\n", "no 'train_data'"),
            ("saes: [1]\nloss: {}\ntrain_data: {}\n", "saes=[1] is not a mapping"),
            ("saes: {}\nloss: {logits_kl: 0.5}\ntrain_data: {}\n", "loss.logits_kl=0.5 is not a mapping"),
            ("saes: {}\nloss: {}\ntrain_data: {}\nlr: fast\n", "lr='fast' must be a number"),
            ("saes: {}\nloss: {}\ntrain_data: {}\n", "saes.sae_positions=[]"),
            ("saes: {sae_positions: blocks.2.hook_resid_pre}\nloss: {}\ntrain_data: {}\n", "tlens_model_path"),
            ("a: [1, 2\nb: }", "is neither YAML nor JSON"),
            ("when: 2024-99-99", "is neither YAML nor JSON"),
            ("x: !!python/object/apply:os.mkdir [here]", "is neither YAML nor JSON"),
        ],
    )
    def test_a_config_that_is_none_of_apollos(
        self, tmp_path: Path, text: str, says: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        source = write_pair(tmp_path, "mine", run_config(), parameters())
        (tmp_path / "mine.yaml").write_text(text)
        before = sorted(tmp_path.iterdir())
        raises_one_line(ValueError, says, source=source)
        assert sorted(tmp_path.iterdir()) == before

    def test_a_config_that_is_not_text(self, tmp_path: Path) -> None:
        source = write_pair(tmp_path, "mine", run_config(), parameters())
        (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00\x01")
        raises_one_line(ValueError, "mine.yaml", "is neither YAML nor JSON", source=source)

    def test_a_damaged_checkpoint(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path, run_config(), {HOOK: parameters()})
        checkpoint = folder / "samples_1600.pt"
        checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
        raises_one_line(ValueError, "samples_1600.pt", "damaged", source=folder)

    def test_nothing_is_changed_by_loading(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path, named_model("gpt2"), {HOOK: parameters()})
        before = {file: file.read_bytes() for file in folder.rglob("*")}
        load_apollo_sae(folder)
        assert {file: file.read_bytes() for file in folder.rglob("*")} == before
        assert yaml.safe_load((folder / "final_config.yaml").read_text())["tlens_model_name"] == "gpt2"


def test_the_dictionary_is_normalised_as_pytorch_does_it() -> None:
    # The helper that stands for Apollo's forward pass is held against their own words: F.normalize(decoder, dim=0).
    sae, x = parameters(), torch.randn(7, 16)
    features = F.relu(F.linear(x, sae["encoder.weight"], sae["encoder.bias"]))
    expected = F.linear(features, F.normalize(sae["decoder.weight"], dim=0), sae["decoder.bias"])
    torch.testing.assert_close(apollo_forward(sae, x)[1], expected)
