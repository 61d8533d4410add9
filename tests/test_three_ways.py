"""One real model as a HookedTransformer, a Hugging Face model and a bridge: the same losses, and SAEs of equal quality.

The embedded model as its own folders would be, and a larger one trained by others where it is at hand.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, LoggingConfig, StandardTrainingSAEConfig
from sae_lens.load_model import HookedProxyLM
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sae_lens_e2e import E2EDownstream, E2ERunnerConfig, E2ETrainingRunner, embedded
from sae_lens_e2e.evaluation import evaluate
from sae_lens_e2e.loading import load_documents, load_model
from sae_lens_e2e.splice.bridge import hooked_transformer_hook
from sae_lens_e2e.training.history import read_history
from tests.models import dataset_of, packed, random_model, random_tokens

STORIES = Path(__file__).parents[2] / "shared"
KINDS = ("HookedTransformer", "AutoModelForCausalLM", "TransformerBridge")


def as_llama(model: HookedTransformer) -> LlamaForCausalLM:
    """The Hugging Face model that computes what a HookedTransformer of Llama's architecture does."""
    cfg, state = model.cfg, model.state_dict()
    assert cfg.d_mlp is not None
    n_kv = cfg.n_key_value_heads or cfg.n_heads
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=cfg.d_vocab,
            hidden_size=cfg.d_model,
            intermediate_size=cfg.d_mlp,
            num_hidden_layers=cfg.n_layers,
            num_attention_heads=cfg.n_heads,
            num_key_value_heads=n_kv,
            head_dim=cfg.d_head,
            max_position_embeddings=cfg.n_ctx,
            rms_norm_eps=cfg.eps,
            tie_word_embeddings=False,
        )
    )

    def rotated(weight: Tensor) -> Tensor:
        """(heads, d_model, d_head) to (heads * d_head, d_model), pairs of rotary dimensions apart as in Hugging Face."""
        if cfg.rotary_adjacent_pairs:
            weight = torch.cat([weight[..., ::2], weight[..., 1::2]], -1)
        return weight.transpose(1, 2).flatten(0, 1)

    weights = {
        "model.embed_tokens.weight": state["embed.W_E"],
        "model.norm.weight": state["ln_final.w"],
        "lm_head.weight": state["unembed.W_U"].T,
    }
    for i in range(cfg.n_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        keys = "_" if f"{ours}.attn._W_K" in state else ""
        weights |= {
            f"{theirs}.input_layernorm.weight": state[f"{ours}.ln1.w"],
            f"{theirs}.post_attention_layernorm.weight": state[f"{ours}.ln2.w"],
            f"{theirs}.self_attn.q_proj.weight": rotated(state[f"{ours}.attn.W_Q"]),
            f"{theirs}.self_attn.k_proj.weight": rotated(state[f"{ours}.attn.{keys}W_K"]),
            f"{theirs}.self_attn.v_proj.weight": state[f"{ours}.attn.{keys}W_V"].transpose(1, 2).flatten(0, 1),
            f"{theirs}.self_attn.o_proj.weight": state[f"{ours}.attn.W_O"].flatten(0, 1).T,
            f"{theirs}.mlp.gate_proj.weight": state[f"{ours}.mlp.W_gate"].T,
            f"{theirs}.mlp.up_proj.weight": state[f"{ours}.mlp.W_in"].T,
            f"{theirs}.mlp.down_proj.weight": state[f"{ours}.mlp.W_out"].T,
        }
    llama.load_state_dict({name: weight.contiguous() for name, weight in weights.items()})
    return llama.eval()


def three_ways(hooked: HookedTransformer, folder: Path, tokenizer: Any = None) -> dict[str, Any]:
    """The same model of each kind; the bridge is made of a folder, as a user has one."""
    # A bridge wants a tokenizer, if only to have one.
    tokenizer = tokenizer or embedded.load_model().tokenizer
    as_llama(hooked).save_pretrained(folder)
    proxy = HookedProxyLM(LlamaForCausalLM.from_pretrained(folder), tokenizer)
    bridge = TransformerBridge.boot_transformers(
        str(folder), hf_model=LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager"), tokenizer=tokenizer
    )
    return dict(zip(KINDS, (hooked, proxy, bridge), strict=True))


def hooks_of(kind: str, layer: int, later: int) -> tuple[str, str]:
    """What enters a block, and what enters a later one, by the names of a kind of model."""
    if kind == "AutoModelForCausalLM":
        return f"model.layers.{layer - 1}", f"model.layers.{later - 1}"
    return f"blocks.{layer}.hook_resid_pre", f"blocks.{later}.hook_resid_pre"


def train(kind: str, model: Any, dataset: Dataset, layer: int, d_in: int, **settings: Any) -> E2ETrainingRunner:
    hook, later = hooks_of(kind, layer, layer + 1)
    cfg = E2ERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=d_in, d_sae=8 * d_in, l1_coefficient=0.05),
        objective=E2EDownstream(downstream_hooks=(later,)),
        model_name="gpt2",
        model_class_name=kind,
        hook_name=hook,
        is_dataset_tokenized=True,
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False, wandb_log_frequency=1),
        verbose=False,
        **settings,
    )
    runner = E2ETrainingRunner(cfg, override_dataset=dataset, override_model=model)
    runner.run()
    return runner


def losses(folder: str) -> list[dict[str, float]]:
    return [
        {name.split("/")[1]: value for name, value in row.items() if name.startswith("losses/")}
        for row in read_history(folder)
    ]


def assert_three_alike(
    models: dict[str, Any], dataset: Dataset, held_out: Dataset, layer: int, d_in: int, folder: Path, **settings: Any
) -> None:
    found, quality = {}, {}
    for kind, model in models.items():
        out = str(folder / kind)
        train(kind, model, dataset, layer, d_in, output_path=out, **settings)
        found[kind] = losses(out)
        quality[kind] = evaluate(SAE.load_from_disk(out), model, held_out, verbose=False, batch_size_prompts=4)
    reference, best = found["HookedTransformer"], quality["HookedTransformer"]
    assert best.ce_loss_increase > 0.01
    for kind in KINDS[1:]:
        # In later steps, what differs is how rounding has grown.
        for step, (ours, theirs) in enumerate(zip(found[kind][:6], reference[:6], strict=True)):
            for name, value in theirs.items():
                assert ours[name] == pytest.approx(value, rel=1e-4), (kind, step, name)
        assert quality[kind].ce_loss_increase == pytest.approx(best.ce_loss_increase, rel=1e-2)
        assert quality[kind].l0 == pytest.approx(best.l0, rel=1e-2)


def test_a_small_llama_three_ways(tmp_path: Path) -> None:
    hooked = random_model("RMS", n_key_value_heads=2, rotary_adjacent_pairs=False)
    for name, parameter in hooked.named_parameters():
        # Llama's have none.
        if ".b_" in name or name.endswith("b_U"):
            parameter.data.zero_()
    models = three_ways(hooked, tmp_path / "model")
    tokens = random_tokens(6, 12, 61)
    logits = [
        models["HookedTransformer"](tokens),
        models["AutoModelForCausalLM"](tokens),
        models["TransformerBridge"](tokens),
    ]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-4, atol=1e-4)
    data = dataset_of(random_tokens(64, 12, 61))
    steps = {
        "context_size": 12,
        "store_batch_size_prompts": 2,
        "train_batch_size_tokens": 48,
        "training_tokens": 5 * 48,
    }
    assert_three_alike(models, data, data, 1, 16, tmp_path, **steps)


def test_a_sae_of_a_bridge_says_what_stock_sae_lens_can_load(tmp_path: Path) -> None:
    hooked = random_model("RMS", rotary_adjacent_pairs=False)
    models = three_ways(hooked, tmp_path / "model")
    data = dataset_of(random_tokens(64, 12, 61))
    steps = {
        "context_size": 12,
        "store_batch_size_prompts": 2,
        "train_batch_size_tokens": 48,
        "training_tokens": 2 * 48,
    }
    runner = train(
        "TransformerBridge", models["TransformerBridge"], data, 1, 16, output_path=str(tmp_path / "sae"), **steps
    )
    metadata = json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]
    # A name that TransformerLens knows: the unprocessed HookedTransformer, and the same hook.
    assert (metadata["model_class_name"], metadata["hook_name"]) == ("HookedTransformer", "blocks.1.hook_resid_pre")
    assert metadata["model_from_pretrained_kwargs"] == {"center_writing_weights": False}
    assert metadata["hook_layer"] == 1
    runner.cfg.model_name = str(tmp_path / "model")
    runner._set_sae_metadata()
    assert runner.sae.cfg.metadata.model_class_name == "TransformerBridge"


@pytest.mark.parametrize(
    "hook", ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"]
)
def test_what_the_metadata_call_the_same_is_the_same(hook: str, tmp_path: Path) -> None:
    hooked = random_model("RMS", rotary_adjacent_pairs=False)
    for name, parameter in hooked.named_parameters():
        if ".b_" in name or name.endswith("b_U"):
            parameter.data.zero_()
    bridge = three_ways(hooked, tmp_path)["TransformerBridge"]
    name = f"blocks.1.{hook}"
    canonical = next(key for key, point in bridge.hook_dict.items() if point is bridge.hook_dict[name])
    assert hooked_transformer_hook(bridge, canonical) is not None
    tokens = random_tokens(2, 12, 61)
    ours, theirs = (model.run_with_cache(tokens, names_filter=[name])[1][name] for model in (bridge, hooked))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_stories15m_three_ways(tmp_path: Path) -> None:
    folder = STORIES / "models" / "stories15M"
    if not folder.is_dir():
        pytest.skip("stories15M, a model trained by others, is not at hand")
    hooked: Any = load_model(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder / "huggingface")
    models = three_ways(hooked, tmp_path / "model", tokenizer)
    documents, held_out = load_documents(str(STORIES / "data" / "stories.jsonl"))
    assert isinstance(documents, Dataset)
    data, rest = (packed(part.select(range(40)), hooked, 32) for part in (documents, held_out))
    steps = {"context_size": 32, "store_batch_size_prompts": 4, "train_batch_size_tokens": 128, "training_tokens": 512}
    assert_three_alike(models, data, rest.select(range(8)), 3, 288, tmp_path, lr=1e-3, **steps)


def test_stories260k_three_ways_from_its_own_folder(tmp_path: Path) -> None:
    folder = STORIES / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("stories260K, a model trained by others, is not at hand")
    models = {kind: load_model(str(folder), model_class_name=kind) for kind in KINDS}
    weights = load_file(folder / "huggingface" / "model.safetensors")
    assert weights, "the Hugging Face model is its authors' own"
    documents, held_out = load_documents(str(STORIES / "data" / "stories.jsonl"))
    assert isinstance(documents, Dataset)
    hooked: Any = models["HookedTransformer"]
    data, rest = (packed(part.select(range(100)), hooked, 64) for part in (documents, held_out))
    steps = {
        "context_size": 64,
        "store_batch_size_prompts": 4,
        "train_batch_size_tokens": 512,
        "training_tokens": 10_240,
    }
    assert_three_alike(models, data, rest.select(range(16)), 3, 64, tmp_path, lr=3e-3, **steps)
