"""Every private name of SAELens and TransformerLens that we lean on, in one place; a test fails loudly when one moves.

Public names are imported where they are used. Of `SAETrainer` and the runners we override or call the methods listed in
`LEANED_ON`, by subclassing.
"""

from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner, LLMSaeEvaluator
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer

try:
    from transformer_lens.components.attention import Attention
except ImportError:  # TransformerLens 4 has none, and so nothing of ours leans on it
    Attention = None

__all__ = ["LEANED_ON", "InterruptedException", "LLMSaeEvaluator"]

LEANED_ON: dict[type, dict[str, tuple[str, ...]]] = {
    SAETrainer: {
        "_is_logging_step": ("self",),
        "_checkpoint_if_needed": ("self",),
        "_build_sparsity_log_dict": ("self",),
        "build_train_step_log_dict": ("self", "output", "n_training_samples"),
        "full_sparsity_window_log": ("self",),
        "maybe_reset_sparsity": ("self",),
        "set_final_sae_metadata": ("self",),
        "save_checkpoint": ("self", "checkpoint_name", "base_path", "wandb_aliases"),
        "load_trainer_state": ("self", "checkpoint_path"),
        "get_coefficients": ("self",),
    },
    ActivationsStore: {
        "_iterate_raw_dataset": ("self",),
        "_iterate_raw_dataset_tokens": ("self",),
        "_iterate_tokenized_sequences": ("self",),
        "state_dict": ("self",),
        "load": ("self", "file_path"),
    },
    LanguageModelSAETrainingRunner: {
        "_set_sae_metadata": ("self",),
        "_compile_sae_if_needed": ("self",),
        "save_checkpoint": ("self", "checkpoint_path"),
        "save_final_sae": ("self", "sae", "output_path", "log_feature_sparsity"),
        "run_trainer_with_interruption_handling": ("self", "trainer"),
    },
    MultiSAETrainingRunner: {
        "_set_sae_metadata": ("self",),
        "_save_runner_checkpoint_files": ("self", "checkpoint_path"),
    },
    MultiSAETrainingRunnerConfig: {"__post_init__": ("self",), "to_sae_trainer_config": ("self",)},
}
"""By class, the methods that we override or call, with their parameters."""

if Attention is not None:
    LEANED_ON[Attention] = {
        "calculate_attention_scores": ("self", "q", "k"),
        "apply_causal_mask": ("self", "attn_scores", "past_kv_pos_offset", "attention_mask"),
        "calculate_z_scores": ("self", "v", "pattern"),
    }
