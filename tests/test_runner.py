"""Whole runs: what they write, resuming and interrupting them, what they refuse, and what stock SAELens makes of them."""

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    ActivationsStore,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from typing_extensions import override

from sae_lens_e2e import (
    E2E,
    ApolloTrainingSAEConfig,
    Batch,
    E2EDownstream,
    E2ERunnerConfig,
    E2ETrainingRunner,
    Term,
)
from sae_lens_e2e._upstream import InterruptedException
from tests.models import D_MODEL, apollo_tiny4l, dataset_of, random_model, random_tokens
from tests.processes import run_stock
from tests.training import make_runner, make_trainer, runner_config, tried_step

N_STEPS, STEP_TOKENS = 12, 48
WRITTEN = ["cfg.json", "history.csv", "runner_cfg.json", "sae_weights.safetensors", "sparsity.safetensors"]
CHECKPOINT = sorted(
    [*WRITTEN, "activation_scaler.json", "activations_store_state.safetensors", "trainer_state.pt"],
)


def names_in(folder: str | Path) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def long_config(folder: Path, **overrides: Any) -> E2ERunnerConfig[Any]:
    """Twelve optimizer steps, saved and checkpointed below `folder`."""
    settings: dict[str, Any] = {
        "objective": "e2e",
        "training_tokens": N_STEPS * STEP_TOKENS,
        "output_path": str(folder / "output"),
        "checkpoint_path": str(folder / "checkpoints"),
        "lr": 1e-2,
    }
    return runner_config(**(settings | overrides))


def saved_tensors(cfg: E2ERunnerConfig[Any]) -> dict[str, torch.Tensor]:
    assert cfg.output_path is not None
    output = Path(cfg.output_path)
    return load_file(output / "sae_weights.safetensors") | load_file(output / "sparsity.safetensors")


def assert_identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# What is written


def test_a_run_writes_what_sae_lens_writes(tmp_path: Path) -> None:
    cfg = runner_config(
        sae=StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=64, l1_coefficient=0.01),
        objective=E2EDownstream(kl_coefficient=0.7),
        training_tokens=3 * STEP_TOKENS,
        output_path=str(tmp_path),
    )
    sae = make_runner(cfg, apollo_tiny4l()).run()
    assert names_in(tmp_path) == WRITTEN
    reloaded = SAE.load_from_disk(tmp_path)
    for name, value in reloaded.state_dict().items():
        assert torch.equal(value, sae.state_dict()[name]), name
    metadata = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert metadata["objective"] == {
        "name": "e2e_ds",
        "kl_coefficient": 0.7,
        "downstream_coefficient": 2.5,
        "downstream_hooks": ["blocks.2.hook_resid_pre", "blocks.3.hook_resid_pre"],
        "mse_coefficient": 0.0,
    }
    assert metadata["hook_name"] == "blocks.1.hook_resid_pre"
    assert metadata["l0"] > 0
    assert reloaded.cfg.metadata.objective == metadata["objective"]
    sparsity = load_file(tmp_path / "sparsity.safetensors")["sparsity"]
    assert sparsity.shape == (64,)
    assert float((10**sparsity).sum()) == pytest.approx(metadata["l0"], rel=1e-4)
    assert E2ERunnerConfig.from_dict(json.loads((tmp_path / "runner_cfg.json").read_text())).objective == cfg.objective


def test_a_run_over_an_earlier_output_replaces_it_whole(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"training_tokens": STEP_TOKENS, "output_path": str(tmp_path)}
    make_runner(runner_config(**settings)).run()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    make_runner(runner_config(**settings, seed=1)).run(overwrite=True)
    assert names_in(tmp_path) == WRITTEN
    assert (tmp_path / "sae_weights.safetensors").read_bytes() != before["sae_weights.safetensors"]


def test_nothing_is_written_where_nothing_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_runner(runner_config(training_tokens=STEP_TOKENS)).run()
    assert names_in(tmp_path) == []


def test_checkpoints_are_named_as_sae_lens_names_them(tmp_path: Path) -> None:
    cfg = long_config(tmp_path, n_checkpoints=2, save_final_checkpoint=True)
    make_runner(cfg).run()
    assert cfg.checkpoint_path is not None
    assert names_in(cfg.checkpoint_path) == ["240", "432", "final_576"]
    for checkpoint in Path(cfg.checkpoint_path).iterdir():
        assert names_in(checkpoint) == CHECKPOINT
    assert names_in(tmp_path / "output") == WRITTEN
    final = load_file(Path(cfg.checkpoint_path) / "final_576" / "sae_weights.safetensors")
    assert_identical(final, load_file(tmp_path / "output" / "sae_weights.safetensors"))


# Resuming

RESUMABLE: dict[str, dict[str, Any]] = {
    "constant lr, l1 warm-up": {
        "sae": StandardTrainingSAEConfig(d_in=16, d_sae=40, l1_coefficient=0.2, l1_warm_up_steps=9)
    },
    "cosine lr": {"lr_scheduler_name": "cosineannealing", "lr_warm_up_steps": 3, "lr_end": 1e-4},
    "lr decay": {"lr_decay_steps": 4, "objective": "e2e_ds"},
    "dead features": {"sae": TopKTrainingSAEConfig(d_in=16, d_sae=128, k=2), "dead_feature_window": 1},
    "scaled activations": {
        "sae": StandardTrainingSAEConfig(d_in=16, d_sae=40, normalize_activations="expected_average_only_in"),
        "n_batches_for_norm_estimate": 2,
        "n_batches_in_buffer": 8,
    },
}


@pytest.mark.parametrize("n_prompts", [500, 22], ids=["one epoch", "many epochs"])
@pytest.mark.parametrize("setting", RESUMABLE)
def test_resuming_ends_bit_for_bit_where_the_whole_run_did(setting: str, n_prompts: int, tmp_path: Path) -> None:
    dataset = dataset_of(random_tokens(n_prompts, 12, 61))
    whole = long_config(tmp_path / "whole", n_checkpoints=2, **RESUMABLE[setting])
    make_runner(whole, dataset=dataset).run()
    assert whole.checkpoint_path is not None
    resumed = long_config(
        tmp_path / "resumed",
        resume_from_checkpoint=f"{whole.checkpoint_path}/240",
        n_checkpoints=2,
        **RESUMABLE[setting],
    )
    make_runner(resumed, dataset=dataset).run()
    assert_identical(saved_tensors(whole), saved_tensors(resumed))
    assert resumed.checkpoint_path is not None
    assert names_in(resumed.checkpoint_path) == ["432"], "the checkpoint resumed from is not written again"
    checkpoints = [Path(str(cfg.checkpoint_path)) / "432" for cfg in (whole, resumed)]
    assert_identical(*(load_file(path / "sae_weights.safetensors") for path in checkpoints))
    start = load_file(Path(whole.checkpoint_path) / "240" / "sae_weights.safetensors")
    assert not torch.equal(start["W_dec"], saved_tensors(whole)["W_dec"])


def test_a_checkpoint_that_is_not_there_is_refused_at_construction(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for missing in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(FileNotFoundError, match=f"resume_from_checkpoint='{missing}'"):
            make_runner(runner_config(resume_from_checkpoint=str(missing)))


# Interruption


@dataclass(frozen=True)
class Signalling(E2E):
    """e2e, sending its own process signals in the middle of a forward pass."""

    signals: tuple[int, ...] = ()
    at_pass: int = 0
    counted: list[int] = field(default_factory=list)

    @override
    def terms(self, batch: Batch) -> dict[str, Term]:
        self.counted.append(0)
        if len(self.counted) == self.at_pass:
            for number in self.signals:
                os.kill(os.getpid(), number)
        return super().terms(batch)

    @override
    def to_dict(self) -> dict[str, Any]:
        return E2E().to_dict()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What an interrupted run must end with once it has been resumed."""
    cfg = long_config(tmp_path_factory.mktemp("uninterrupted"))
    make_runner(cfg).run()
    return saved_tensors(cfg)


@pytest.fixture
def signal_handlers() -> Iterator[list[Any]]:
    """The handlers before a run, put back after the test whatever the run did to them."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield before
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def current_handlers() -> list[Any]:
    return [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at_pass", [1, 8, 9])
def test_an_interrupted_run_finishes_its_step_and_can_be_resumed(
    number: signal.Signals,
    at_pass: int,
    tmp_path: Path,
    uninterrupted: dict[str, torch.Tensor],
    signal_handlers: list[Any],
) -> None:
    cfg = long_config(tmp_path / "first", objective=Signalling(signals=(number,), at_pass=at_pass))
    with pytest.raises(InterruptedException):
        make_runner(cfg).run()
    assert current_handlers() == signal_handlers
    assert not (tmp_path / "first" / "output").exists()
    steps_done = (at_pass + 1) // 2
    assert cfg.checkpoint_path is not None
    assert names_in(cfg.checkpoint_path) == [str(steps_done * STEP_TOKENS)]
    checkpoint = Path(cfg.checkpoint_path) / str(steps_done * STEP_TOKENS)
    assert names_in(checkpoint) == CHECKPOINT

    resumed = long_config(tmp_path / "second", resume_from_checkpoint=str(checkpoint))
    make_runner(resumed).run()
    assert_identical(saved_tensors(resumed), uninterrupted)


def test_a_second_signal_stops_at_once_and_leaves_nothing_that_would_resume_wrongly(
    tmp_path: Path, uninterrupted: dict[str, torch.Tensor], signal_handlers: list[Any]
) -> None:
    objective = Signalling(signals=(signal.SIGINT, signal.SIGINT), at_pass=8)
    cfg = long_config(tmp_path / "first", objective=objective)
    with pytest.raises(KeyboardInterrupt):
        make_runner(cfg).run()
    assert len(objective.counted) == 8
    assert current_handlers() == signal_handlers
    checkpoints = Path(str(cfg.checkpoint_path))
    for checkpoint in checkpoints.iterdir() if checkpoints.exists() else ():
        resumed = long_config(tmp_path / "second", resume_from_checkpoint=str(checkpoint))
        make_runner(resumed).run()
        assert_identical(saved_tensors(resumed), uninterrupted)


def test_signal_handlers_are_put_back_after_a_run_that_ends_well(signal_handlers: list[Any]) -> None:
    def mine(number: int, frame: Any) -> None: ...

    signal.signal(signal.SIGTERM, mine)
    make_runner(runner_config(training_tokens=STEP_TOKENS)).run()
    assert current_handlers() == [signal_handlers[0], mine]


# The wrong runner, the wrong config


def test_stock_runner_refuses_an_end_to_end_config_and_trains_nothing(tmp_path: Path) -> None:
    cfg = long_config(tmp_path)
    runner = LanguageModelSAETrainingRunner(
        cfg, override_dataset=dataset_of(random_tokens(64, 12, 61)), override_model=random_model()
    )
    before = {name: value.clone() for name, value in runner.sae.state_dict().items()}
    with pytest.raises(TypeError, match="E2ETrainingRunner"):
        runner.run()
    assert_identical(before, runner.sae.state_dict())
    assert names_in(tmp_path) == []


def test_our_runner_refuses_a_stock_config() -> None:
    cfg = LanguageModelSAERunnerConfig(sae=StandardTrainingSAEConfig(d_in=16, d_sae=40))
    with pytest.raises(TypeError, match="LanguageModelSAERunnerConfig; make it an E2ERunnerConfig"):
        E2ETrainingRunner(cfg)  # pyright: ignore[reportArgumentType]


LATE = "blocks.2.hook_resid_pre"
BAD_INPUT: list[tuple[dict[str, Any], str]] = [
    ({"hook_name": "blocks.1.hook_residpre"}, r"hook_name.*'blocks.1.hook_residpre'.*blocks.1.hook_resid_pre"),
    ({"hook_name": "nonsense"}, "hook_name.*'nonsense'"),
    ({"hook_name": "blocks.7.hook_resid_pre"}, "hook_name.*'blocks.7.hook_resid_pre'"),
    ({"sae": StandardTrainingSAEConfig(d_in=17, d_sae=40)}, "d_in=17 .*blocks.1.hook_resid_pre.*16"),
    ({"hook_name": "blocks.1.mlp.hook_post"}, "d_in=16 .*blocks.1.mlp.hook_post.*32"),
    ({"hook_head_index": 0}, "hook_head_index=0.*blocks.1.hook_resid_pre has no heads"),
    (
        {"hook_name": "blocks.1.attn.hook_z", "hook_head_index": 4, "sae": StandardTrainingSAEConfig(d_in=4, d_sae=8)},
        "hook_head_index=4.*4 heads",
    ),
    (
        {"objective": E2EDownstream(downstream_hooks=("blocks.0.hook_resid_post",))},
        "downstream_hooks.*blocks.0.hook_resid_post is not downstream of hook_name='blocks.1.hook_resid_pre'",
    ),
    (
        {
            "objective": E2EDownstream(downstream_hooks=("blocks.1.attn.hook_z", LATE)),
            "hook_name": "blocks.1.hook_mlp_out",
        },
        "downstream_hooks.*blocks.1.attn.hook_z is not downstream of hook_name='blocks.1.hook_mlp_out'",
    ),
    ({"objective": E2EDownstream(downstream_hooks=("blocks.2.hook_nothing",))}, "downstream_hooks.*hook_nothing"),
    ({"hook_name": LATE}, f"no block comes after hook_name='{LATE}'.*e2e"),
    (
        {"context_size": 17, "train_batch_size_tokens": 68},
        "context_size=17 is longer than the model's, 16",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), BAD_INPUT, ids=[message[:40] for _, message in BAD_INPUT])
def test_what_does_not_fit_the_model_is_refused_at_construction(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_runner(runner_config(**overrides))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Dataset.from_dict({"label": [1, 2, 3]}), "'tokens', 'input_ids', 'text'"),
        (dataset_of(random_tokens(64, 11, 61)), "context_size 11, but the provided context_size is 12"),
    ],
)
def test_a_dataset_without_what_is_needed_is_refused_at_construction(dataset: Dataset, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_runner(dataset=dataset)


def test_no_dataset_at_all_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="dataset_path"):
        E2ETrainingRunner(runner_config(), override_model=random_model())


# Seeds


def test_the_seed_decides_the_initial_sae_and_nothing_else() -> None:
    model = random_model()
    torch.manual_seed(5)
    expected_draw = torch.rand(3)
    torch.manual_seed(5)
    first = make_runner(runner_config(seed=1), model).sae.state_dict()
    assert torch.equal(torch.rand(3), expected_draw), "the caller's random numbers were drawn from"
    assert_identical(first, make_runner(runner_config(seed=1), model).sae.state_dict())
    assert not torch.equal(first["W_dec"], make_runner(runner_config(seed=2), model).sae.state_dict()["W_dec"])


# Weights & Biases


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a LevelDB log of protocol buffers after a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportAttributeAccessIssue]

    content, position, partial = path.read_bytes(), 7, b""
    first, middle, last, block = 2, 3, 4, 32768
    while position + 7 <= len(content):
        room = block - position % block
        if room < 7:
            position += room
            continue
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        kind = content[position + 6]
        if position + 7 + length > len(content):
            return
        partial = (partial if kind in (middle, last) else b"") + content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind not in (first, middle):
            record: Any = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(partial)
            yield record


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    """What a finished run logged, one dictionary a step."""
    (path,) = folder.rglob("*.wandb")
    records: list[Any] = []
    give_up = time.monotonic() + 20
    # The file is written by a process of wandb's, which may still be at it when the run is over.
    while not any(record.HasField("exit") for record in records) and time.monotonic() < give_up:
        time.sleep(0.1)
        records = list(wandb_records(path))
    return [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]


def test_a_run_is_logged_to_wandb_term_by_term(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg = runner_config(
        objective=E2EDownstream(downstream_hooks=(LATE, "blocks.2.hook_resid_post")),
        logger=LoggingConfig(log_to_wandb=True, wandb_log_frequency=1, eval_every_n_wandb_logs=2),
        n_eval_batches=1,
        eval_batch_size_prompts=2,
        training_tokens=4 * STEP_TOKENS,
        output_path=str(tmp_path / "output"),
    )
    make_runner(cfg).run()
    history = wandb_history(tmp_path)
    assert len(history) == 4
    parts = {f"metrics/downstream_mse/{LATE}", "metrics/downstream_mse/blocks.2.hook_resid_post"}
    losses = {"losses/overall_loss", "losses/kl", "losses/downstream_mse", "losses/mse_loss", "losses/l1_loss"}
    evaluation = {f"model_performance_preservation.ce_loss_{kind}" for kind in ("score", "with_sae", "without_sae")}
    coefficients = {
        "details/kl_coefficient": 0.5,
        "details/downstream_mse_coefficient": 2.5,
        "details/mse_loss_coefficient": 0,
        "details/l1_coefficient": 0.02,
    }
    for number, logged in enumerate(history):
        assert losses | parts | {"metrics/l0", "metrics/grad_norm"} <= logged.keys()
        assert {name: logged[name] for name in coefficients} == coefficients
        # The evaluation logs dictionaries, which wandb joins with a dot.
        assert evaluation & logged.keys() == (evaluation if number % 2 else set()), sorted(logged)
        expected = 0.5 * logged["losses/kl"] + 2.5 * logged["losses/downstream_mse"] + logged["losses/l1_loss"]
        assert logged["losses/overall_loss"] == pytest.approx(expected, rel=1e-4)
        assert logged["losses/downstream_mse"] == pytest.approx(sum(logged[part] for part in parts) / 2, rel=1e-4)
        assert logged["details/n_training_samples"] == (number + 1) * STEP_TOKENS
    assert names_in(tmp_path / "output") == WRITTEN


# Hugging Face models


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights, saved with a tokenizer of whole words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    vocabulary = {"<s>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, 61)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=16,
        initializer_range=0.4,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def words_of(tokens: torch.Tensor) -> Dataset:
    return Dataset.from_dict({"text": [" ".join(f"w{max(2, i)}" for i in row) for row in tokens.tolist()]})


@pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning")
@pytest.mark.parametrize("objective", ["e2e", "e2e_ds"])
def test_a_hugging_face_model_is_loaded_by_name_and_trained_on(
    objective: str, llama_folder: Path, tmp_path: Path
) -> None:
    cfg = runner_config(
        objective=objective,
        model_name=str(llama_folder),
        model_class_name="AutoModelForCausalLM",
        hook_name="model.layers.0",
        is_dataset_tokenized=False,
        training_tokens=2 * STEP_TOKENS,
        output_path=str(tmp_path),
        n_batches_for_norm_estimate=2,
    )
    runner = E2ETrainingRunner(cfg, override_dataset=words_of(random_tokens(40, 15, 61)))
    before = {name: value.clone() for name, value in runner.sae.state_dict().items()}
    sae = runner.run()
    assert names_in(tmp_path) == WRITTEN
    assert not torch.equal(before["W_enc"], sae.W_enc)
    assert all(bool(parameter.isfinite().all()) for parameter in sae.parameters())
    metadata = SAE.load_from_disk(tmp_path).cfg.metadata
    assert metadata.model_class_name == "AutoModelForCausalLM"
    if objective == "e2e_ds":
        assert metadata.objective["downstream_hooks"] == ["model.layers.1"]


def test_a_hugging_face_model_that_lacks_the_hook_is_refused(llama_folder: Path) -> None:
    cfg = runner_config(
        model_name=str(llama_folder), model_class_name="AutoModelForCausalLM", hook_name="model.layers.9"
    )
    with pytest.raises(ValueError, match=r"model\.layers\.9"):
        E2ETrainingRunner(cfg, override_dataset=dataset_of(random_tokens(64, 12, 61)))


def as_hooked_transformer(llama: Any) -> HookedTransformer:
    from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights

    cfg = HookedTransformerConfig(
        n_layers=3,
        d_model=16,
        n_heads=4,
        d_head=4,
        d_mlp=32,
        n_ctx=16,
        d_vocab=61,
        act_fn="silu",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=4,
        rotary_adjacent_pairs=False,
        gated_mlp=True,
        final_rms=True,
        eps=1e-6,
        device="cpu",
    )
    model = HookedTransformer(cfg)
    model.load_state_dict(convert_llama_weights(llama, cfg), strict=False)
    return model


@pytest.mark.parametrize(
    ("on_hugging_face", "on_hooked_transformer"),
    [
        ("e2e", "e2e"),
        (
            E2EDownstream(downstream_hooks=("model.layers.1", "model.layers.2")),
            E2EDownstream(downstream_hooks=("blocks.2.hook_resid_pre", "blocks.2.hook_resid_post")),
        ),
        ("e2e_ds", "e2e_ds"),
    ],
    ids=["e2e", "e2e_ds with hooks", "e2e_ds by default"],
)
def test_both_kinds_of_model_give_the_same_loss(
    on_hugging_face: Any, on_hooked_transformer: Any, llama_folder: Path
) -> None:
    tokens = random_tokens(4, 12, 61, seed=7)
    cfg = runner_config(
        objective=on_hugging_face,
        model_name=str(llama_folder),
        model_class_name="AutoModelForCausalLM",
        hook_name="model.layers.0",
    )
    hugging_face = E2ETrainingRunner(cfg, override_dataset=dataset_of(random_tokens(64, 12, 61)))
    proxy: Any = hugging_face.model
    hooked = make_runner(
        runner_config(objective=on_hooked_transformer, hook_name="blocks.0.hook_resid_post"),
        as_hooked_transformer(proxy.model),
    )
    losses, slopes = [], []
    for runner in (hugging_face, hooked):
        trainer = make_trainer(runner)
        output, slope = tried_step(trainer, tokens)
        slopes.append(slope)
        losses.append(output.losses)
    assert losses[0].keys() == losses[1].keys()
    for name, value in losses[0].items():
        torch.testing.assert_close(value, losses[1][name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    for name, value in slopes[0].items():
        assert float((value - slopes[1][name]).norm() / value.norm()) < 1e-4, name


# Stock SAELens

EVALUATE_WITHOUT_US = """
import json, sys
sys.modules["sae_lens_e2e"] = None
from sae_lens import SAE, ActivationsStore
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from tests.models import dataset_of, random_model, random_tokens

found = {}
for folder in sys.argv[1:]:
    sae, model = SAE.load_from_disk(folder), random_model()
    store = ActivationsStore.from_sae(model, sae, dataset_of(random_tokens(32, 12, 61, seed=4)), streaming=False)
    config = EvalConfig(
        batch_size_prompts=8, n_eval_reconstruction_batches=3, compute_ce_loss=True, compute_sparsity_metrics=True
    )
    metrics, _ = run_evals(sae, store, model, ActivationScaler(), config, exclude_special_tokens=False)
    found[folder] = {
        **metrics["model_performance_preservation"],
        "l0": metrics["sparsity"]["l0"],
        "architecture": sae.cfg.architecture(),
    }
assert not any(name.startswith("sae_lens_e2e.") for name in sys.modules)
print("RESULT" + json.dumps(found))
"""
ARCHITECTURES = {
    "standard": StandardTrainingSAEConfig(d_in=16, d_sae=40, l1_coefficient=0.02),
    "apollo": ApolloTrainingSAEConfig(d_in=16, d_sae=40, sparsity_coefficient=0.3),
}


def evaluated(sae: SAE[Any], model: HookedTransformer) -> dict[str, float]:
    store = ActivationsStore.from_sae(model, sae, dataset_of(random_tokens(32, 12, 61, seed=4)), streaming=False)
    config = EvalConfig(
        batch_size_prompts=8, n_eval_reconstruction_batches=3, compute_ce_loss=True, compute_sparsity_metrics=True
    )
    metrics, _ = run_evals(sae, store, model, ActivationScaler(), config, exclude_special_tokens=False)
    return {**metrics["model_performance_preservation"], "l0": metrics["sparsity"]["l0"]}


@pytest.mark.filterwarnings("ignore:.*non-empty model_from_pretrained_kwargs:UserWarning")
def test_stock_sae_lens_loads_and_evaluates_what_was_trained(tmp_path: Path) -> None:
    model = random_model()
    in_this_process: dict[str, dict[str, float]] = {}
    for architecture, sae_config in ARCHITECTURES.items():
        folder = str(tmp_path / architecture)
        trained = make_runner(long_config(tmp_path, sae=sae_config, output_path=folder), model).run()
        in_this_process[folder] = evaluated(SAE.load_from_disk(folder), model)
        assert in_this_process[folder] == pytest.approx(evaluated(trained, model), rel=1e-5, abs=1e-6)
        assert 0 < in_this_process[folder]["l0"] < 40
    process = run_stock(EVALUATE_WITHOUT_US, *in_this_process, cwd=Path(__file__).parent.parent)
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(process.stdout.split("RESULT")[1])
    for folder, expected in in_this_process.items():
        assert found[folder].pop("architecture") == "standard"
        assert found[folder] == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert expected["ce_loss_with_sae"] != pytest.approx(expected["ce_loss_without_sae"], abs=1e-3)
