"""Faithfulness against its definition written out with whole forward passes, and the pairs it is measured on."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import SAEMetadata
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sae_lens_e2e import embedded
from sae_lens_e2e.splice.unembedding import LinearUnembedding, ModuleUnembedding
from sae_lens_e2e.studies.agreement import TEMPLATES, agreement_pairs
from sae_lens_e2e.studies.contrast import ContrastPair, tokenize_pair
from sae_lens_e2e.studies.faithfulness import Faithfulness, faithfulness, faithfulness_frame, logit_difference
from tests.models import random_model

HOOK = embedded.HOOK_NAME
MODELS = ("original", "spliced", "baseline")
FRIEND = ContrastPair("The friend", " was", " were", contrast="The friends")
PAIRS = (
    FRIEND,
    ContrastPair("The animal that the friends", " were", " was", contrast="The animals that the friend"),
    ContrastPair("The little toy", " is", " are", "toys", contrast="The little toys"),
    ContrastPair("The big toy", " is", " are", "toys", contrast="The big toys"),
    ContrastPair("One day, the little girls", " were", " was", "toys"),
)


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return embedded.load_model()


def sae_at(hook: str = HOOK, d_in: int = 64, noise: float = 0.05, **metadata: Any) -> StandardSAE:
    """The identity as an SAE, blurred by `noise`."""
    metadata = {"hook_name": hook, "prepend_bos": True} | metadata
    sae = StandardSAE(
        StandardSAEConfig(d_in=d_in, d_sae=2 * d_in, apply_b_dec_to_input=False, metadata=SAEMetadata(**metadata))
    )
    eye = torch.eye(d_in)
    blur = noise * torch.randn(d_in, 2 * d_in, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], 1) + blur)
        sae.W_dec.copy_(torch.cat([eye, -eye]))
        sae.b_enc.zero_()
        sae.b_dec.copy_(blur[:, 0])
    return sae


def constant_sae(output: Tensor, **metadata: Any) -> StandardSAE:
    """An SAE without a live feature."""
    sae = sae_at(**metadata)
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
        sae.b_dec.copy_(output)
    return sae


def everywhere(tokens: list[int]) -> list[int]:
    return list(range(len(tokens)))


# The definition, from whole forward passes of one prompt each and log-probabilities of the whole vocabulary

Run = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""Runs tokens (1, pos), with x (pos, d_in) at the hook if it is given; returns x as it was, and the logits."""


@dataclass
class Prompt:
    pair: int
    template: str
    tokens: list[int]
    right: int
    wrong: int
    replaced: list[int]
    x: Tensor


def with_transformer_lens(model: HookedTransformer, hook_name: str, head: int | None = None) -> Run:
    @torch.no_grad()
    def run(tokens: Tensor, new: Tensor | None) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []

        def at_hook(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            activation = activation.clone()
            part = activation[0] if head is None else activation[0, :, head]
            kept.append(part.flatten(1).clone())
            if new is not None:
                part.copy_(new.reshape(part.shape))
            return activation

        logits = model.run_with_hooks(tokens, fwd_hooks=[(hook_name, at_hook)])
        return kept[0], logits

    return run


def with_module_hook(model: nn.Module, module: nn.Module) -> Run:
    @torch.no_grad()
    def run(tokens: Tensor, new: Tensor | None) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []

        def at_hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            kept.append((output[0] if isinstance(output, tuple) else output)[0])
            if new is None:
                return output
            return (new[None], *output[1:]) if isinstance(output, tuple) else new[None]

        handle = module.register_forward_hook(at_hook)
        logits = model(tokens).logits
        handle.remove()
        return kept[0], logits

    return run


def definition(
    sae: StandardSAE,
    run: Run,
    tokenizer: Any,
    pairs: Sequence[ContrastPair],
    ablation: str,
    replaced: Callable[[list[int]], list[int]] = everywhere,
) -> dict[str, dict[str, Any]]:
    prompts = [
        _prompt(run, tokenizer, number, pair.template, *texts, replaced)
        for number, pair in enumerate(pairs)
        for texts in _texts(pair)
    ]

    def ablated(prompt: Prompt, position: int) -> Tensor:
        if ablation == "zero":
            return torch.zeros(sae.cfg.d_in)
        peers = [p for p in prompts if (p.template, len(p.tokens)) == (prompt.template, len(prompt.tokens))]
        if ablation == "position_mean":
            return torch.stack([p.x[position] for p in peers if position in p.replaced]).mean(0)
        return torch.stack([p.x[at] for p in prompts for at in p.replaced]).mean(0)

    def difference(prompt: Prompt, new: Callable[[int], Tensor]) -> float:
        x = prompt.x.clone()
        for position in prompt.replaced:
            x[position] = new(position)
        log_p = run(torch.tensor([prompt.tokens]), x)[1][0, -1].log_softmax(-1)
        return float(log_p[prompt.right] - log_p[prompt.wrong])

    rows = []
    for prompt in prompts:
        x_hat = sae.decode(sae.encode(prompt.x[None]))[0].detach()
        new = (prompt.x.__getitem__, x_hat.__getitem__, lambda position, prompt=prompt: ablated(prompt, position))
        rows.append([difference(prompt, each) for each in new])
    return {
        name: _figures([(p.pair, row) for p, row in zip(prompts, rows, strict=True) if name in (p.template, "overall")])
        for name in ("overall", *(pair.template for pair in pairs))
    }


def _texts(pair: ContrastPair) -> list[tuple[str, str, str]]:
    prompts = [(pair.prompt, pair.correct, pair.wrong)]
    return prompts if pair.contrast is None else [*prompts, (pair.contrast, pair.wrong, pair.correct)]


def _prompt(
    run: Run, tokenizer: Any, pair: int, template: str, text: str, right: str, wrong: str, replaced: Any
) -> Prompt:
    def ids(text: str) -> list[int]:
        return [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]

    tokens = ids(text)
    x, _ = run(torch.tensor([tokens]), None)
    return Prompt(pair, template, tokens, ids(text + right)[-1], ids(text + wrong)[-1], replaced(tokens), x)


def _figures(rows: list[tuple[int, list[float]]]) -> dict[str, Any]:
    by_pair = [torch.tensor([row for n, row in rows if n == pair]).mean(0) for pair in {n for n, _ in rows}]
    original, spliced, baseline = torch.stack(by_pair).mean(0).tolist()
    return {
        "n": (len(by_pair), len(rows)),
        "differences": [original, spliced, baseline],
        "accuracies": [sum(row[i] > 0 for _, row in rows) / len(rows) for i in range(3)],
        "faithfulness": (spliced - baseline) / (original - baseline),
    }


def check(
    found: Faithfulness, expected: dict[str, dict[str, Any]], tolerance: float = 1e-5, minimum_gap: float = 0.1
) -> None:
    tasks = {**found.templates, "overall": found.overall}
    assert tasks.keys() == expected.keys()
    for name, task in tasks.items():
        performances = [getattr(task, which) for which in MODELS]
        differences = [p.logit_difference for p in performances]
        assert differences == pytest.approx(expected[name]["differences"], rel=tolerance, abs=tolerance)
        assert [p.accuracy for p in performances] == pytest.approx(expected[name]["accuracies"])
        assert (task.n_pairs, task.n_prompts) == expected[name]["n"]
        original, _, baseline = differences
        defined = original - baseline > minimum_gap
        value = pytest.approx(expected[name]["faithfulness"], rel=10 * tolerance) if defined else None
        assert task.faithfulness == value
        assert (task.note is None) == defined
    assert found.overall.faithfulness is not None
    assert abs(found.overall.spliced.logit_difference - found.overall.original.logit_difference) > 1e-3


@pytest.mark.parametrize("ablation", ["mean", "position_mean", "zero"])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_every_figure_is_its_definition(model: HookedTransformer, ablation: Any, batch_size: int) -> None:
    sae = sae_at()
    found = faithfulness(sae, model, PAIRS, ablation=ablation, batch_size=batch_size, verbose=False)
    check(found, definition(sae, with_transformer_lens(model, HOOK), model.tokenizer, PAIRS, ablation))
    assert (found.hook_name, found.ablation, found.n_left_out) == (HOOK, ablation, 0)


@pytest.mark.parametrize(
    ("hook", "head"),
    [
        ("blocks.0.hook_mlp_out", None),
        ("blocks.2.attn.hook_z", None),
        ("blocks.2.attn.hook_z", 1),
        ("blocks.5.hook_resid_post", None),
    ],
)
def test_other_hooks(model: HookedTransformer, hook: str, head: int | None) -> None:
    sae = sae_at(hook, 64 if head is None else 16, noise=0.3, hook_head_index=head)
    if hook.endswith("hook_z"):
        sae.turn_on_forward_pass_hook_z_reshaping()
    pairs = [pair for pair in PAIRS if pair.contrast is not None]
    # Some of these hooks hardly matter, so that what the SAE does to them is divided by little.
    found = faithfulness(sae, model, pairs, minimum_gap=1e-3, verbose=False)
    assert sae.hook_z_reshaping_mode == hook.endswith("hook_z")
    sae.turn_off_forward_pass_hook_z_reshaping()
    run = with_transformer_lens(model, hook, head)
    check(found, definition(sae, run, model.tokenizer, pairs, "mean"), 1e-4, minimum_gap=1e-3)


THE = 267


@pytest.mark.parametrize(
    ("metadata", "replaced"),
    [
        ({"exclude_special_tokens": True}, lambda tokens: list(range(1, len(tokens)))),
        ({"exclude_special_tokens": [THE]}, lambda tokens: [p for p, t in enumerate(tokens) if t != THE]),
        ({"seqpos_slice": [2, None]}, lambda tokens: list(range(2, len(tokens)))),
    ],
    ids=["special", "ids", "slice"],
)
def test_masked_positions_keep_their_activation_in_every_model(
    model: HookedTransformer, metadata: dict[str, Any], replaced: Any
) -> None:
    sae = sae_at(**metadata)
    for ablation in ("mean", "position_mean"):
        found = faithfulness(sae, model, PAIRS, ablation=ablation, verbose=False)
        run = with_transformer_lens(model, HOOK)
        check(found, definition(sae, run, model.tokenizer, PAIRS, ablation, replaced))


@torch.no_grad()
def _difference(model: nn.Module, tokenizer: Any, pair: ContrastPair) -> float:
    prompts = tokenize_pair(tokenizer, pair)
    assert prompts is not None
    logits = [model(torch.tensor([[tokenizer.bos_token_id, *prompt.tokens]])).logits[0, -1] for prompt in prompts]
    return sum(float(z[prompt.correct] - z[prompt.wrong]) for z, prompt in zip(logits, prompts, strict=True))


def test_a_hugging_face_model(model: HookedTransformer) -> None:
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
    ).eval()
    sae = sae_at("model.layers.1", 32)
    # This model knows no English. Whatever it prefers is called right, so that there is something to be faithful to.
    pairs = [
        pair
        if _difference(llama, model.tokenizer, pair) > 0
        else ContrastPair(pair.prompt, pair.wrong, pair.correct, contrast=pair.contrast)
        for pair in PAIRS
        if pair.contrast is not None
    ]
    found = faithfulness(sae, HookedProxyLM(llama, model.tokenizer), pairs, verbose=False)  # pyright: ignore[reportArgumentType]
    run = with_module_hook(llama, llama.model.layers[1])
    check(found, definition(sae, run, model.tokenizer, pairs, "mean"))


# What the numbers mean


@pytest.mark.parametrize("ablation", ["mean", "position_mean", "zero"])
def test_the_identity_is_wholly_faithful(model: HookedTransformer, ablation: Any) -> None:
    found = faithfulness(sae_at(noise=0), model, ablation=ablation, verbose=False)
    assert tuple(found.templates) == TEMPLATES
    for task in (found.overall, *found.templates.values()):
        assert asdict(task.spliced) == pytest.approx(asdict(task.original), abs=1e-4)
        if task.faithfulness is not None:
            assert (task.low, task.faithfulness, task.high) == pytest.approx((1, 1, 1), abs=1e-4)
    assert found.overall.faithfulness is not None


def test_a_constant_is_not_faithful_at_all(model: HookedTransformer) -> None:
    tokens = [[0, *model.tokenizer.encode(text)[1:]] for pair in PAIRS for text, _, _ in _texts(pair)]  # pyright: ignore[reportOptionalMemberAccess]
    run = with_transformer_lens(model, HOOK)
    mean = torch.cat([run(torch.tensor([ids]), None)[0] for ids in tokens]).mean(0)
    outputs: dict[Any, Tensor] = {"mean": mean, "zero": torch.zeros(64)}
    for ablation, output in outputs.items():
        found = faithfulness(constant_sae(output), model, PAIRS, ablation=ablation, verbose=False)
        for task in (found.overall, *found.templates.values()):
            assert (task.low, task.faithfulness, task.high) == pytest.approx((0, 0, 0), abs=1e-4)
    # Without the subject, both prompts of a pair end alike, and one of them is as wrong as the other is right.
    contrasts = [pair for pair in PAIRS if pair.contrast is not None]
    found = faithfulness(sae_at(), model, contrasts, verbose=False)
    assert found.overall.baseline.logit_difference == pytest.approx(0, abs=1e-4)
    assert found.overall.original.logit_difference > 1


def test_an_sae_is_less_faithful_the_more_it_blurs(model: HookedTransformer) -> None:
    found = [faithfulness(sae_at(noise=noise), model, PAIRS, verbose=False).overall for noise in (0, 0.1, 0.3)]
    intervals: Any = [(task.low, task.faithfulness, task.high) for task in found]
    values = [value for _, value, _ in intervals]
    assert values == sorted(values, reverse=True)
    assert values[0] - values[-1] > 0.3
    assert all(low < value < high for low, value, high in intervals[1:])


def test_undefined_where_the_model_does_not_do_the_task(model: HookedTransformer) -> None:
    backwards = [ContrastPair(p.prompt, p.wrong, p.correct, p.template, p.contrast) for p in PAIRS[2:]]
    found = faithfulness(sae_at(), model, [*PAIRS[:2], *backwards], verbose=False)
    assert found.templates["custom"].faithfulness is not None
    toys = found.templates["toys"]
    assert (toys.faithfulness, toys.low, toys.high) == (None, None, None)
    assert toys.note is not None
    assert "original model" in toys.note
    assert f"{toys.original.logit_difference:.2f}" in toys.note
    gap = found.templates["custom"].original.logit_difference - found.templates["custom"].baseline.logit_difference
    for minimum_gap, defined in ((gap - 1e-3, True), (gap + 1e-3, False)):
        again = faithfulness(sae_at(), model, PAIRS[:2], minimum_gap=minimum_gap, verbose=False)
        assert (again.overall.faithfulness is not None) == defined


def test_the_interval_is_that_of_resampled_pairs(model: HookedTransformer) -> None:
    pairs = agreement_pairs(model, ["simple"], n_per_template=40)
    sae = sae_at(noise=0.2)
    found = faithfulness(sae, model, pairs, n_resamples=4000, verbose=False)
    apart = [replace(pair, template=f"pair {i}") for i, pair in enumerate(pairs)]
    one_by_one = list(faithfulness(sae, model, apart, ablation="zero", verbose=False).templates.values())
    # With zero ablation no figure of a pair depends on the others, so a resample is a mean of theirs.
    zero = faithfulness(sae, model, pairs, ablation="zero", n_resamples=4000, verbose=False).overall
    rows = torch.tensor([[getattr(task, which).logit_difference for which in MODELS] for task in one_by_one])
    drawn = rows[torch.randint(40, (4000, 40), generator=torch.Generator().manual_seed(5))].mean(1)
    low, high = (
        ((drawn[:, 1] - drawn[:, 2]) / (drawn[:, 0] - drawn[:, 2])).quantile(torch.tensor([0.025, 0.975])).tolist()
    )
    width = high - low
    assert width > 0.01
    assert (zero.low, zero.high) == pytest.approx((low, high), abs=0.1 * width)
    assert all(task.low is None and task.n_pairs == 1 for task in one_by_one)
    again = faithfulness(sae, model, pairs, n_resamples=4000, verbose=False)
    assert again == found
    assert faithfulness(sae, model, pairs, n_resamples=4000, seed=1, verbose=False).overall.low != found.overall.low


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_logit_difference_is_that_of_log_probabilities(soft_cap: float | None) -> None:
    torch.manual_seed(0)
    hidden, weight, bias, choices = torch.randn(5, 8), torch.randn(8, 30), torch.randn(30), torch.randint(30, (5, 2))

    def logits(hidden: Tensor) -> Tensor:
        logits = hidden.double() @ weight.double() + bias
        return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)

    log_p = logits(hidden).log_softmax(-1).gather(-1, choices)
    expected = (log_p[:, 0] - log_p[:, 1]).float()
    torch.testing.assert_close(logit_difference(LinearUnembedding(weight, bias, soft_cap), hidden, choices), expected)
    torch.testing.assert_close(logit_difference(ModuleUnembedding(logits, 30), hidden, choices).float(), expected)
    low = LinearUnembedding(weight.bfloat16(), bias.bfloat16(), soft_cap)
    found = logit_difference(low, hidden.bfloat16(), choices)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


def test_a_model_in_bfloat16(model: HookedTransformer) -> None:
    low = embedded.load_model().to(torch.bfloat16)
    found = faithfulness(sae_at(), low, PAIRS, verbose=False).overall
    full = faithfulness(sae_at(), model, PAIRS, verbose=False).overall
    assert found.faithfulness == pytest.approx(full.faithfulness, abs=0.05)
    assert found.original.logit_difference == pytest.approx(full.original.logit_difference, abs=0.05)


def test_model_and_sae_are_left_as_they_were(model: HookedTransformer) -> None:
    sae = sae_at()
    model.train()
    try:
        faithfulness(sae, model, PAIRS, verbose=False)
        assert model.training
    finally:
        model.eval()
    assert all(parameter.requires_grad for parameter in (*model.parameters(), *sae.parameters()))
    assert not any(point.has_hooks() for point in model.hook_dict.values())


# Results


def test_results_as_json_and_as_a_frame(model: HookedTransformer) -> None:
    backwards = ContrastPair("The toy", " are", " is", "backwards", contrast="The toys")
    long_word = ContrastPair("The toy", " was", " photosynthesis")
    results = {
        name: faithfulness(sae_at(noise=noise), model, [*PAIRS, backwards, long_word], verbose=False)
        for name, noise in (("sharp", 0), ("blurred", 0.2))
    }
    sharp = results["sharp"]
    assert sharp.n_left_out == 1
    assert Faithfulness.from_dict(json.loads(json.dumps(sharp.to_dict(), allow_nan=False))) == sharp
    frame = faithfulness_frame(results)
    templates = ["custom", "toys", "backwards", "overall"]
    assert list(zip(frame["sae"], frame["template"], strict=True)) == [(n, t) for n in results for t in templates]
    row = frame.set_index(["sae", "template"]).loc[("blurred", "toys")]
    task = results["blurred"].templates["toys"]
    assert row["faithfulness"] == task.faithfulness
    assert row["accuracy_baseline"] == task.baseline.accuracy
    assert row["logit_difference_spliced"] == task.spliced.logit_difference
    assert (row["hook"], row["ablation"], row["n_pairs"], row["n_prompts"]) == (HOOK, "mean", 3, 5)
    undefined = frame.set_index(["sae", "template"]).loc[("sharp", "backwards")]
    assert undefined[["faithfulness", "low", "high"]].isna().all()
    assert str(undefined["note"]).startswith("undefined")
    assert frame["faithfulness"].dtype == float
    assert list(faithfulness_frame({}).columns) == list(frame.columns)


# Pairs


@pytest.mark.parametrize("attractor", ["opposite", "same"])
def test_pairs_agree_in_number_and_in_length(model: HookedTransformer, attractor: Any) -> None:
    pairs = agreement_pairs(model, attractor=attractor)
    assert Counter(pair.template for pair in pairs) == dict.fromkeys(TEMPLATES, 100)
    assert len(set(pairs)) == len(pairs)
    tokenizer: Any = model.tokenizer
    nouns = {
        "friend",
        "toy",
        "flower",
        "animal",
        "king",
        "bee",
        "boy",
        "girl",
        "dog",
        "cat",
        "bird",
        "teacher",
        "farmer",
    }
    numbers: Counter[tuple[str, ...]] = Counter()
    for pair in pairs:
        tokenized = tokenize_pair(tokenizer, pair)
        assert tokenized is not None
        one, many = tokenized
        assert len(one.tokens) == len(many.tokens)
        assert tokenizer.decode(one.tokens) == pair.prompt
        assert tokenizer.decode([one.correct]) == tokenizer.decode([many.wrong]) == pair.correct
        assert tokenizer.decode([one.wrong]) == tokenizer.decode([many.correct]) == pair.wrong
        assert pair.correct.endswith("s")  # is, was and has: the first prompt's subject is singular
        known = [
            "many" if word.endswith("s") else "one" for word in pair.prompt.split() if word.removesuffix("s") in nouns
        ]
        numbers[(pair.template, *known)] += len(known) == (1 if pair.template == "simple" else 2)
    found = {key for key, count in numbers.items() if count}
    other = "many" if attractor == "opposite" else "one"
    assert found == {
        ("simple", "one"),
        ("across_participle", "one", other),
        ("across_relative", "one", other),
        ("within_relative", other, "one"),
    }


def test_pairs_are_drawn_by_a_seed(model: HookedTransformer) -> None:
    first = agreement_pairs(model, ["simple"], n_per_template=20)
    assert len(first) == 20
    assert agreement_pairs(model.tokenizer, ["simple"], n_per_template=20) == first
    assert set(agreement_pairs(model, ["simple"], n_per_template=20, seed=1)) != set(first)
    # As many as there are.
    assert 50 < len(agreement_pairs(model, ["simple"], n_per_template=10_000)) < 10_000


def test_the_embedded_model_does_three_of_the_four(model: HookedTransformer) -> None:
    found = faithfulness(sae_at(noise=0), model, verbose=False)
    accuracy = {name: task.original.accuracy for name, task in found.templates.items()}
    assert accuracy["simple"] > 0.95
    assert accuracy["within_relative"] > 0.95
    assert accuracy["across_relative"] > 0.75
    # It agrees with the nearest noun.
    assert accuracy["across_participle"] < 0.1
    assert [name for name, task in found.templates.items() if task.faithfulness is None] == ["across_participle"]
    easy = agreement_pairs(model, ["across_participle"], attractor="same")
    assert faithfulness(sae_at(noise=0), model, easy, verbose=False).overall.original.accuracy > 0.9


def word_tokenizer(words: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose words begin with a space of their own, as in Llama, and of which all else is unknown."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", *(f"▁{word}" for word in words.split())])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def test_a_continuation_is_what_follows_in_its_tokenizer() -> None:
    tokenizer = word_tokenizer("The girl girls was were")
    pair = ContrastPair("The girl", " was", " were", contrast="The girls")
    tokenized = tokenize_pair(tokenizer, pair)
    assert tokenized is not None
    assert [(p.tokens, p.correct, p.wrong) for p in tokenized] == [((2, 3), 5, 6), ((2, 4), 6, 5)]
    # Unknown, not a word of its own, and two words.
    for wrong in (" shall", "s", " was were"):
        assert tokenize_pair(tokenizer, ContrastPair("The girl", " was", wrong)) is None
    pairs = agreement_pairs(tokenizer, ["within_relative"], n_per_template=3)
    assert {pair.correct for pair in pairs} == {" was"}


# What is refused, before the model runs


def never_run(model: HookedTransformer) -> HookedTransformer:
    """A model that runs on the few tokens that are tried on any, and on no prompt."""
    forward = model.forward

    def tried(tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert torch.equal(tokens[0], torch.arange(tokens.shape[1])), "the model was run"
        return forward(tokens, *args, **kwargs)

    object.__setattr__(model, "forward", tried)
    return model


@pytest.mark.parametrize(
    ("pairs", "metadata", "options", "message"),
    [
        ([ContrastPair("The toy", " was", " photosynthesis")], {}, {}, "of 1, none has two continuations of one token each"),
        ([], {}, {}, "of 0, none"),
        ([ContrastPair("A girl", " was", " were", contrast="A girls")], {}, {}, "prompt 'A girl' has 2 tokens and contrast 'A girls' 3"),
        ([ContrastPair("One" * 256, " was", " were")], {}, {}, "the model takes 256; leave it out"),
        (PAIRS, {"hook_name": "blocks.9.hook_resid_pre"}, {}, "the model has no hook 'blocks.9.hook_resid_pre'"),
        (PAIRS, {"hook_name": None}, {}, "metadata.hook_name is not set"),
        (PAIRS, {"prepend_bos": None}, {}, "metadata.prepend_bos is not set"),
        (PAIRS, {"seqpos_slice": [50, None]}, {}, "leave no position"),
        (PAIRS, {}, {"ablation": "median"}, "ablation='median' must be one of mean, position_mean, zero"),
        (PAIRS, {}, {"batch_size": 0}, "batch_size=0"),
        (PAIRS, {}, {"n_resamples": 0}, "n_resamples=0"),
        (PAIRS, {}, {"minimum_gap": 0.0}, "minimum_gap=0.0"),
    ],
)  # fmt: skip
def test_bad_input(pairs: Any, metadata: dict[str, Any], options: dict[str, Any], message: str) -> None:
    model = never_run(embedded.load_model())
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        faithfulness(sae_at(**metadata), model, pairs, verbose=False, **options)
    assert len(str(error.value).splitlines()) == 1


def test_models_and_saes_that_do_not_fit(model: HookedTransformer) -> None:
    sae = sae_at("blocks.1.hook_resid_pre", 16)
    with pytest.raises(ValueError, match="has no tokenizer"):
        faithfulness(sae, never_run(random_model()), PAIRS)
    with pytest.raises(ValueError, match="set d_in=64"):
        faithfulness(sae, model, PAIRS)
    broken = sae_at()
    with torch.no_grad():
        broken.b_dec.fill_(torch.nan)
    with pytest.raises(ValueError, match="b_dec holds numbers that are not finite"):
        faithfulness(broken, model, PAIRS, verbose=False)
    without_bos = word_tokenizer("The girl girls was were")
    without_bos.bos_token = None  # pyright: ignore[reportAttributeAccessIssue]
    nameless = random_model()
    nameless.tokenizer = without_bos
    with pytest.raises(ValueError, match="has no BOS"):
        faithfulness(sae, nameless, [ContrastPair("The girl", " was", " were")])


def test_pairs_that_make_no_sense(model: HookedTransformer) -> None:
    with pytest.raises(ValueError, match=r"prompt of .* is empty"):
        ContrastPair("", " was", " were")
    with pytest.raises(ValueError, match="the same"):
        ContrastPair("The girl", " was", " was")
    with pytest.raises(ValueError, match="'overall'"):
        ContrastPair("The girl", " was", " were", "overall")
    with pytest.raises(ValueError, match="no 'passive'; choose from simple"):
        agreement_pairs(model, ["passive"])
    with pytest.raises(ValueError, match="n_per_template=0"):
        agreement_pairs(model, n_per_template=0)
    with pytest.raises(ValueError, match="attractor='near'"):
        agreement_pairs(model, attractor="near")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"no pair of 'simple' .* leave it out"):
        agreement_pairs(word_tokenizer("The little girl girls was"))
