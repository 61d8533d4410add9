"""Finetune SAEs that somebody has trained, and say what that changed."""

from sae_lens_e2e.finetuning.finetune import finetune
from sae_lens_e2e.finetuning.result import Finetuned

__all__ = ["Finetuned", "finetune"]
