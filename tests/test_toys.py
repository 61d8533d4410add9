"""Models of a few tokens only, models that predict other tokens than they read, and hooks that look as if they fitted."""

from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import nn

from sae_lens_e2e import E2ETrainingRunner
from sae_lens_e2e.evaluation import evaluate
from sae_lens_e2e.splice import Site, SplicedModel, check_sites
from tests.models import (
    ANY,
    HUGGING_FACE,
    any_model,
    block_output,
    bridge_model,
    dataset_of,
    random_model,
    random_tokens,
)
from tests.training import make_runner, runner_config


def toy(kind: str, d_vocab: int) -> Any:
    """A model of any kind that knows so few tokens."""
    if kind == "HookedTransformer":
        return random_model(d_vocab=d_vocab)
    if kind == "TransformerBridge":
        return bridge_model(d_vocab=d_vocab)
    model = any_model(kind)
    model.model.resize_token_embeddings(d_vocab)
    return model


@pytest.mark.parametrize("d_vocab", [1, 2, 5])
@pytest.mark.parametrize("kind", ANY)
def test_a_model_of_a_few_tokens_is_probed_with_those(kind: str, d_vocab: int) -> None:
    model = SplicedModel(toy(kind, d_vocab))
    assert model.d_vocab_in == model.unembedding.d_vocab == d_vocab
    hook = block_output(kind, 0)
    check_sites(model, {"sae": Site.of_sae(hook)}, {"sae": (16, 16)}, [block_output(kind, 2)])
    assert model.later_layers(hook)[-1] == block_output(kind, 2)
    assert kind in HUGGING_FACE or model.n_ctx == 16


def test_it_trains_and_is_evaluated() -> None:
    model = random_model(d_vocab=3)
    tokens = dataset_of(random_tokens(64, 12, 3))
    sae = make_runner(runner_config(), model, tokens).run()
    assert evaluate(sae, model, tokens, batch_size_prompts=4, verbose=False).kl >= 0


@pytest.mark.parametrize(("n_heads", "n_ctx"), [(4, 16), (7, 16), (6, 16), (4, 4), (2, 2)])
@pytest.mark.parametrize("hook", ["hook_pattern", "hook_attn_scores"])
def test_an_attention_pattern_is_no_activation_of_a_token(hook: str, n_heads: int, n_ctx: int) -> None:
    model = SplicedModel(random_model(n_heads=n_heads, n_ctx=n_ctx))
    name = f"blocks.1.attn.{hook}"
    for site in (Site.of_sae(name), Site.of_sae(name, 0)):
        with pytest.raises(ValueError, match=f"{hook} has no activation for each token") as error:
            check_sites(model, {"sae": site}, {"sae": (7, 7)})
        assert "set d_in" not in str(error.value)


def predicting(n: int) -> Any:
    """A model that reads 61 tokens and predicts fewer, or more."""
    return random_model(d_vocab_out=n)


def test_a_model_that_predicts_too_few_tokens_trains_with_a_warning_and_evaluation_says_why_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, tokens = predicting(7), dataset_of(random_tokens(64, 12, 61))
    sae = make_runner(runner_config(objective="e2e"), model, tokens).run()
    assert "the model reads 61 tokens and predicts 7" in caplog.text
    with pytest.raises(ValueError, match=r"the model reads 61 tokens and predicts 7, .* cannot predict"):
        evaluate(sae, model, tokens, batch_size_prompts=4, verbose=False)
    with pytest.raises(ValueError, match="objective 'ce': the model reads 61 tokens and predicts 7"):
        make_runner(runner_config(objective="ce"), model, tokens)


def test_a_model_that_predicts_more_tokens_is_as_any_other() -> None:
    model, tokens = predicting(64), dataset_of(random_tokens(64, 12, 61))
    sae = make_runner(runner_config(objective="ce"), model, tokens).run()
    assert evaluate(sae, model, tokens, batch_size_prompts=4, verbose=False).kl >= 0


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_weights_that_are_no_real_numbers_are_not_evaluated(dtype: torch.dtype) -> None:
    model, tokens = random_model(), dataset_of(random_tokens(64, 12, 61))
    sae = make_runner(runner_config(), model, tokens).run()
    sae.b_dec = nn.Parameter(sae.b_dec.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=f"b_dec holds {str(dtype).removeprefix('torch.')}"):
        evaluate(sae, model, tokens, batch_size_prompts=4, verbose=False)


@pytest.mark.parametrize("prompts", [1, 4])
def test_a_row_that_is_too_short_is_refused_by_its_number(prompts: int) -> None:
    rows = random_tokens(16, 12, 61).tolist()
    rows[6] = rows[6][:5]
    cfg = runner_config(store_batch_size_prompts=1, train_batch_size_tokens=prompts * 12, training_tokens=16 * 12)
    runner = make_runner(cfg, dataset=Dataset.from_dict({"input_ids": rows}))
    with pytest.raises(ValueError, match="row 6 of the dataset has 5 tokens, fewer than context_size=12"):
        runner.run()


def test_a_token_that_the_model_does_not_know_is_named() -> None:
    with pytest.raises(ValueError, match=r"has token \d+ and the model knows 40"):
        make_runner(runner_config(), random_model(d_vocab=40)).run()


def test_an_empty_dataset_is_not_replaced_by_the_configs() -> None:
    cfg = runner_config(dataset_path="somewhere/else")
    for empty in (Dataset.from_dict({"input_ids": []}), IterableDataset.from_generator(lambda: iter([]))):
        with pytest.raises(ValueError, match="override_dataset is empty"):
            E2ETrainingRunner(cfg, override_dataset=empty, override_model=random_model())
