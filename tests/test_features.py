"""Looking at features: each figure against sums written out, the choice of what is shown, the page in a browser, and what is refused."""

import html
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE
from torch import Tensor

from sae_lens_e2e import embedded
from sae_lens_e2e.cli import main
from sae_lens_e2e.evaluation import evaluate
from sae_lens_e2e.evaluation.running import inference
from sae_lens_e2e.features import Look, look_at_features, make_features_page
from sae_lens_e2e.features.choice import spread
from sae_lens_e2e.features.places import TopPlaces
from sae_lens_e2e.features.text import pieces, token_text, visible
from sae_lens_e2e.splice import Site, SplicedModel, Where
from sae_lens_e2e.studies.logit_effects import at_positions, feature_activations, logit_effects
from sae_lens_e2e.studies.neighbours import nearest_features, unmatched
from tests.browser import browser, check_barriers, chromium
from tests.models import dataset_of, random_model, random_tokens, run_with_hooks
from tests.saes import inference_sae, randomised, training_sae
from tests.test_report import BATCH, D_SAE, HOOK, N_CTX, SCREENSHOTS, an_sae, data, save

TOKENS = random_tokens(4, 12, 61)


def look(sae: Any, **options: Any) -> Look:
    """A look at an SAE of the random model."""
    settings = {"model": random_model(), "dataset": data(), "batch_size_prompts": BATCH, "verbose": False}
    return look_at_features(sae, **(settings | options))


def clean_features(sae: SAE[Any], model: Any, tokens: Tensor, hook: str = HOOK) -> Tensor:
    _, cache = model.run_with_cache(tokens)
    with torch.no_grad():
        return sae.encode(cache[hook])


# What is measured.


def test_top_places_are_those_of_all_data_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(11, 6, 9, generator=generator) * (torch.rand(11, 6, 9, generator=generator) > 0.7)
    mask = torch.rand(11, 6, generator=generator) > 0.3
    places = TopPlaces(9, 4, torch.device("cpu"))
    for start in range(0, 11, 3):
        places.add(features[start : start + 3], Where(mask[start : start + 3]))
    sizes = (features.abs() * mask[..., None]).max(1).values
    for feature in range(9):
        prompts, positions = places.of(feature)
        expected = sizes[:, feature].topk(4).values
        found = features[prompts, positions, feature].abs()
        assert found.tolist() == expected[expected > 0].tolist()
        assert bool(mask[prompts, positions].all())
        assert len(set(prompts.tolist())) == len(prompts), "one passage a prompt"


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("standard", {}),
        ("standard", {"normalize_activations": "layer_norm"}),
        ("standard", {"normalize_activations": "constant_norm_rescale"}),
        ("topk", {}),
        ("gated", {}),
    ],
)
def test_the_effect_is_that_of_taking_the_features_part_away(architecture: str, settings: dict[str, Any]) -> None:
    model, sae = random_model(), inference_sae(architecture, **settings)
    splice, site = SplicedModel(model), Site.of_sae(HOOK)
    features = clean_features(sae, model, TOKENS)
    feature = int((features != 0).sum((0, 1)).argmax())
    positions = features[..., feature].abs().argmax(1)
    with inference(sae):
        clean = splice.clean(TOKENS, [site])
        activation, contribution = feature_activations(sae, site, clean, feature)
        found = logit_effects(splice, site, clean, contribution, at_positions(TOKENS, positions))
    torch.testing.assert_close(activation, features[..., feature])
    x = model.run_with_cache(TOKENS)[1][HOOK]
    with torch.no_grad():
        whole = sae(x)
        zeroed = sae.encode(x).clone()
        zeroed[..., feature] = 0
        part = whole - sae.decode(zeroed)
    torch.testing.assert_close(contribution, part)
    changed = x.clone()
    for prompt, position in enumerate(positions.tolist()):
        changed[prompt, position] -= part[prompt, position]
    logits, _ = run_with_hooks(model, TOKENS, {HOOK: lambda _: changed})
    change = model(TOKENS).log_softmax(-1) - logits.log_softmax(-1)
    torch.testing.assert_close(found, change[torch.arange(4), positions], rtol=1e-4, atol=1e-4)
    assert float(found.abs().max()) > 0.01


def test_a_transcoders_part_is_taken_from_what_it_writes() -> None:
    read, write = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
    model = random_model()
    metadata = {"hook_name": read, "hook_name_out": write}
    sae = inference_sae("skip_transcoder", metadata, d_out=16, apply_b_dec_to_input=False)
    splice, site = SplicedModel(model), Site.between(read, write)
    _, cache = model.run_with_cache(TOKENS)
    features = sae.encode(cache[read])
    feature = int((features != 0).sum((0, 1)).argmax())
    positions = features[..., feature].argmax(1)
    with inference(sae):
        clean = splice.clean(TOKENS, [site])
        _, contribution = feature_activations(sae, site, clean, feature)
        found = logit_effects(splice, site, clean, contribution, at_positions(TOKENS, positions))
    part = features[..., feature, None] * sae.W_dec[feature]
    torch.testing.assert_close(contribution, part.detach(), rtol=1e-4, atol=1e-4)
    changed = cache[write].clone()
    for prompt, position in enumerate(positions.tolist()):
        changed[prompt, position] -= part[prompt, position].detach()
    logits, _ = run_with_hooks(model, TOKENS, {write: lambda _: changed})
    change = model(TOKENS).log_softmax(-1) - logits.log_softmax(-1)
    torch.testing.assert_close(found, change[torch.arange(4), positions], rtol=1e-4, atol=1e-4)


def test_nearest_features_and_those_that_are_missing_against_all_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    W, other = (torch.randn(n, 4, generator=generator) for n in (30, 20))
    W[7] = 0
    alive, other_alive = torch.rand(30, generator=generator) > 0.2, torch.rand(20, generator=generator) > 0.2
    cosines = torch.nn.functional.cosine_similarity(W[:, None], other[None], dim=-1)
    live, other_live = [int(i) for i in alive.nonzero() if i != 7], other_alive.nonzero()[:, 0].tolist()
    found = nearest_features([0, 7, 12], W, other, other_alive=other_alive, n=3)
    for feature in (0, 12):
        expected = sorted(other_live, key=lambda j: -float(cosines[feature, j]))[:3]
        assert [one.feature for one in found[feature]] == expected
        assert [one.cosine for one in found[feature]] == pytest.approx([float(cosines[feature, j]) for j in expected])
    assert found[7] == ()
    own = nearest_features([5], W, other_alive=alive, n=40)[5]
    assert sorted(one.feature for one in own) == [i for i in live if i != 5]
    missing = unmatched(W, other, 0.8, alive=alive, other_alive=other_alive)
    nearest = {i: float(cosines[i, other_live].max()) for i in live}
    assert missing.features == tuple(i for i in live if nearest[i] < 0.8)
    assert missing.matched == tuple(i for i in live if nearest[i] >= 0.8)
    assert min(len(missing.features), len(missing.matched)) > 2
    assert missing.n_live == len(live)
    assert missing.cosines == pytest.approx([nearest[i] for i in missing.features])


def test_a_look_is_what_the_sae_does_on_the_data() -> None:
    sae, model = an_sae(threshold=0.8, exclude_special_tokens=[3, 5]), random_model()
    found = look(sae, features=[11, 2], n_passages=3)
    evaluation = evaluate(sae, model, data(), batch_size_prompts=BATCH, verbose=False)
    tokens: Any = torch.tensor(data()["input_ids"])
    features = clean_features(sae, model, tokens) * ~torch.isin(tokens, torch.tensor([3, 5]))[..., None]
    (group,) = found.groups
    assert [one.feature for one in group.features] == [11, 2]
    for one in group.features:
        assert evaluation.firing_frequency is not None
        assert one.frequency == pytest.approx(float(evaluation.firing_frequency[one.feature]))
        of_one = features[..., one.feature]
        assert [p.activation for p in one.passages] == pytest.approx(of_one.max(1).values.topk(3).values.tolist())
        for passage in one.passages:
            row = of_one[passage.prompt]
            assert int(row.argmax()) == passage.position
            shown = slice(passage.position - passage.peak, passage.position - passage.peak + len(passage.tokens))
            assert [token.activation for token in passage.tokens] == pytest.approx(row[shown].tolist(), abs=1e-5)
            assert passage.text == "".join(f"[{token}]" for token in tokens[passage.prompt].tolist()[shown])
            assert passage.goes_on == (shown.start > 0, shown.stop < N_CTX)
        assert [effect.change for effect in one.raised] == sorted((e.change for e in one.raised), reverse=True)
        assert all(effect.change > 0 for effect in one.raised)
        assert all(effect.change < 0 for effect in one.lowered)


def test_without_features_named_those_shown_are_spread_over_how_often_they_fire() -> None:
    firing = torch.tensor([5, 0, 9, 1, 7, 3])
    assert spread([0, 2, 3, 4, 5], firing, 3) == [2, 0, 3]
    assert spread([0, 2, 3, 4, 5], firing, 9) == [2, 4, 0, 5, 3]
    assert spread([0, 2, 3, 4, 5], firing, 1) == [0]
    assert spread([], firing, 3) == []
    (group,) = look(an_sae(threshold=1.5), n_features=5).groups
    frequencies = [one.frequency for one in group.features]
    assert len(frequencies) == 5
    assert frequencies == sorted(frequencies, reverse=True)
    assert frequencies[-1] > 0


def test_compared_saes_show_first_what_each_has_and_the_other_lacks() -> None:
    one, other = an_sae(), an_sae("e2e")
    with torch.no_grad():
        # The same dictionary but for some features of each.
        other.W_dec[:6] = an_sae(seed=1).W_dec[:6]
        other.W_enc[:, :6] = an_sae(seed=1).W_enc[:, :6]
    found = look(one, compare=other, threshold=0.95, n_features=4)
    only_first, only_second, both = found.groups
    assert [(group.name, group.sae) for group in found.groups] == [
        *(("only_first", "local"), ("only_second", "e2e"), ("both", "local"))
    ]
    assert set(found.unmatched[0].features) == set(range(6))
    assert {view.feature for view in (*only_first.features, *only_second.features)} <= set(range(6))
    assert {view.feature for view in both.features} <= set(range(6, D_SAE))
    for view in both.features:
        assert view.nearest_other is not None
        assert view.nearest_other[0].feature == view.feature
        assert view.nearest_other[0].cosine == pytest.approx(1, abs=1e-5)


def test_an_sae_in_training_is_shown_as_it_is_saved(tmp_path: Path) -> None:
    # On the largest activations of a whole batch, whichever prompts are in it.
    sae = randomised(training_sae("batchtopk", an_sae().cfg.metadata.to_dict(), k=4))
    sae.topk_threshold.fill_(0.5)
    sae.save_inference_model(tmp_path / "sae")
    (group,) = look(sae, features=[1, 2]).groups
    (saved,) = look(tmp_path / "sae", features=[1, 2]).groups
    assert [view.passages for view in group.features] == [view.passages for view in saved.features]


def test_tokens_are_text_that_can_be_seen() -> None:
    tokenizer: Any = embedded.load_model().tokenizer
    text = "Once upon a time, a café 😀 said:\n\tHi"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(tokenizer, tokens, 0, len(tokens))
    assert "".join(found) == text.replace("\n", "↵").replace("\t", "⇥")
    assert {"é", "😀"} <= set(found)
    assert pieces(tokenizer, tokens, 3, 6) == found[3:6]
    assert token_text(tokenizer, tokenizer.encode(" upon", add_special_tokens=False)[0]) == "␣upon"
    assert pieces(None, [4, 5, 6], 1, 3) == ["[5]", "[6]"]
    # What would turn the direction of writing, ring, or be nothing at all.
    assert visible("a\u202eb\x07c\u200bd") == "a�b�c�d"
    assert visible("👩\u200d🚀 שלום") == "👩\u200d🚀 שלום"


# The page.

HOSTILE = "</p><script>window.hacked = 1</script> \u202e & <b>bold</b> once upon a time there was a little girl. "


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of two SAEs of the embedded model."""
    folder = tmp_path_factory.mktemp("saes")
    settings = {"d_in": 64, "hook_name": embedded.HOOK_NAME, "context_size": 32, "prepend_bos": True}
    settings |= {"model_name": "embedded", "dataset_path": "embedded"}
    one = save(an_sae("local", 1.0, **settings), folder / "local")
    other = an_sae("e2e", 1.0, **settings)
    with torch.no_grad():
        other.W_dec[:8] = an_sae(seed=1, **settings).W_dec[:8]
    return one, save(other, folder / "<e2e>")


@pytest.fixture(scope="module")
def page(saes: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page that compares them, on text that would break it if it could."""
    return make_features_page(
        saes[0],
        tmp_path_factory.mktemp("page") / "features.html",
        compare=saes[1],
        dataset=Dataset.from_dict({"text": [HOSTILE * 4, "A story about a café 😀.\n" * 30] * 10}),
        n_features=4,
        n_passages=3,
        batch_size_prompts=4,
        verbose=False,
    )


def test_the_page_has_what_is_measured_and_its_text_is_text(page: Path) -> None:
    written = page.read_text()
    assert "http" not in re.sub(r"<(style|script)>.*?</\1>", "", written, flags=re.DOTALL)
    assert "<script>window" not in written
    assert "\u202e" not in written
    assert html.escape("Features of local and <e2e>") in written
    assert "<e2e>" not in written
    ids = re.findall(r'<article class="feature" id="([ab])-(\d+)"', written)
    assert [which for which, _ in ids] == ["a"] * 4 + ["b"] * 4 + ["a"] * 4
    assert len(set(ids)) == len(ids)
    assert all(f'href="#{which}-{feature}"' in written for which, feature in ids)
    assert re.search(
        r"\d+ of local’s \d+ live features have none in &lt;e2e&gt; with a cosine similarity of 0.7", written
    )
    assert len(re.findall(r"<dt>In (?:local|&lt;e2e&gt;)</dt>", written)) == 24


def test_features_that_are_named_and_one_that_never_fires(tmp_path: Path) -> None:
    sae: Any = an_sae()
    with torch.no_grad():
        sae.b_enc[3] = -100
    output = tmp_path / "page.html"
    settings: dict[str, Any] = {"model": random_model(), "dataset": data(), "batch_size_prompts": BATCH}
    make_features_page(sae, output, features=[3, 4], title="Two & more", verbose=False, **settings)
    written = output.read_text()
    assert "<h1>Two &amp; more</h1>" in written
    assert re.findall(r'id="a-(\d+)"', written) == ["3", "4"]
    assert "fires on none of these tokens" in written
    assert "as the model has no tokenizer" in written
    # A page of ours is replaced, and nothing else is.
    make_features_page(sae, output, features=[4], verbose=False, **settings)
    output.write_text("<p>mine</p>")
    with pytest.raises(FileExistsError, match="exists and is no features page of ours"):
        make_features_page(sae, output, **settings)
    with pytest.raises(ValueError, match=r"must end in .html"):
        make_features_page(sae, tmp_path / "page", **settings)


def test_the_page_in_a_browser(page: Path, tmp_path: Path) -> None:
    executable = chromium()
    if executable is None:
        pytest.skip("there is no Chromium on this machine")
    screenshots = Path(os.environ.get(SCREENSHOTS) or tmp_path)
    screenshots.mkdir(parents=True, exist_ok=True)
    with browser(executable) as tab:
        for width, dark in ((1280, False), (390, False), (1280, True)):
            tab.open(page, width=width, dark=dark)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert tab.evaluate("[...document.querySelectorAll('.feature')].every((one) => one.clientHeight > 100)")
            assert tab.evaluate(f"({CONTRAST})()") >= 4.5
            tab.screenshot(screenshots / f"features-{width}-{'dark' if dark else 'light'}.png")
        # The number under the pointer, and with the keyboard alone.
        tab.evaluate("document.querySelector('.on').dispatchEvent(new PointerEvent('pointerover', { bubbles: true }))")
        first = "document.querySelector('.on')"
        assert tab.evaluate(f"document.getElementById('number').textContent.endsWith({first}.dataset.a)")
        tab.evaluate("document.querySelector('.passages').focus({ focusVisible: true })")
        for key, peak in (("ArrowDown", 1), ("ArrowDown", 2), ("ArrowDown", 2), ("ArrowUp", 1)):
            tab.evaluate(
                f"document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {{ key: '{key}', bubbles: true }}))"
            )
            here = "document.querySelector('.here')"
            passages = "document.querySelectorAll('.passages')[0].querySelectorAll('.passage')"
            assert tab.evaluate(f"[...{passages}].indexOf({here}.closest('.passage'))") == peak
            assert tab.evaluate(f"document.getElementById('number').hidden === false && !!{here}.querySelector('b')")
        assert tab.evaluate("window.hacked") is None
        assert tab.complaints == []


CONTRAST = """() => {
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const over = ([r, g, b, a = 1], below) => [r, g, b].map((value, i) => value * a + below[i] * (1 - a));
  const luminance = (colour) => {
    const [r, g, b] = colour.map((value) => value / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratios = [...document.querySelectorAll(".on")].map((token) => {
    const panel = parse(getComputedStyle(token.closest(".feature")).backgroundColor);
    const shade = over(parse(getComputedStyle(token).backgroundColor), panel);
    const [a, b] = [parse(getComputedStyle(token).color), shade].map(luminance).sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  });
  return Math.min(...ratios);
}"""


def test_nothing_on_the_page_is_a_barrier(page: Path) -> None:
    check_barriers(page)


# What is refused.


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"features": [40]}, "feature 40: local has the features 0 to 39"),
        ({"features": [-1]}, "feature -1: local has the features 0 to 39"),
        ({"features": []}, r"features=\[\] names none"),
        ({"n_features": 0}, "n_features=0 must be at least 1"),
        ({"n_passages": 0}, "n_passages=0 must be at least 1"),
        ({"max_tokens": 5}, "max_tokens=5 is less than a prompt"),
        ({"compare": an_sae("e2e"), "threshold": 0.0}, "threshold=0.0 is to be a cosine similarity"),
        ({"compare": an_sae("e2e", hook_name="blocks.2.hook_resid_pre")}, "different hook_name cannot be compared"),
        ({"compare": an_sae("e2e", model_name="other"), "model": None}, "different model_name cannot be compared"),
        ({"compare": an_sae("e2e", context_size=8)}, "differ in context_size"),
        ({"compare": an_sae("e2e", d_in=8)}, "e2e does not fit the model"),
        ({"sae": an_sae(threshold=1000.0)}, "local: none of its 40 features fires on 288 tokens of the dataset"),
        ({"sae": an_sae(dataset_path=None), "dataset": None}, "metadata name no dataset_path; say what to measure on"),
        ({"sae": an_sae(dataset_path="/no/such-data"), "dataset": None}, "dataset '/no/such-data': there is no such"),
        ({"sae": an_sae(model_name=None), "model": None}, "metadata name no model; say which model"),
        ({"sae": an_sae(model_name="no/such-model"), "model": None}, "model 'no/such-model'"),
        ({"dataset": dataset_of(torch.full((20, N_CTX), 61))}, "the dataset has token 61 and the model knows 61"),
        ({"sae": "/no/such-sae"}, "/no/such-sae"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    change: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sae = change.pop("sae", None) or an_sae()
    with pytest.raises((ValueError, OSError), match=says) as refused:
        look(sae, **change)
    assert "\n" not in str(refused.value)


def test_the_command(saes: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "page.html"
    flags = ("--batch-size-prompts", "4", "--max-tokens", "2000", "--n-passages", "2", "--output", str(output))
    assert main(["features", str(saes[0]), "--feature", "1", "2", "--compare", str(saes[1]), *flags]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    written = output.read_text()
    assert re.findall(r'<article class="feature" id="a-(\d+)"', written) == ["1", "2"]
    assert 'id="only-a"' in written
    output.unlink()
    for arguments, says in (
        (["--feature", "99"], "feature 99: local has the features 0 to 39"),
        (["--dataset", str(tmp_path / "none")], "there is no such folder here"),
        (["--model", str(tmp_path / "none")], f"model '{tmp_path / 'none'}'"),
        (["--featur", "x"], "--featur"),
    ):
        assert main(["features", str(saes[0]), *flags, *arguments]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("sae-lens-e2e features: ")
        assert says in said
    assert not output.exists(), "nothing is written of what was refused"
