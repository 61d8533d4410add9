"""A language model and its data by name: the embedded ones, a folder's, or the Hub's."""

from sae_lens_e2e.loading.documents import HELD_OUT, held_out_documents, load_documents, validation_documents
from sae_lens_e2e.loading.metadata import model_settings
from sae_lens_e2e.loading.models import EMBEDDED, is_local, load_model, model_class_of

__all__ = [
    "EMBEDDED",
    "HELD_OUT",
    "held_out_documents",
    "is_local",
    "load_documents",
    "load_model",
    "model_class_of",
    "model_settings",
    "validation_documents",
]
