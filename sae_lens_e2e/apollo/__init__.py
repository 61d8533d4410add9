"""What Apollo Research's library and paper left: their parametrisation, weights, configs and models, inwards."""

from sae_lens_e2e.apollo.loaders import (
    apollo_disk_loader,
    apollo_huggingface_loader,
    load_neuronpedia_apollo_sae,
    neuronpedia_apollo_disk_loader,
    neuronpedia_apollo_loader,
    register_loaders,
)
from sae_lens_e2e.apollo.model import load_apollo_model
from sae_lens_e2e.apollo.weights import load_apollo_sae, load_apollo_saes
from sae_lens_e2e.architectures.apollo import ApolloTrainingSAE, ApolloTrainingSAEConfig

__all__ = [
    "ApolloTrainingSAE",
    "ApolloTrainingSAEConfig",
    "apollo_disk_loader",
    "apollo_huggingface_loader",
    "load_apollo_model",
    "load_apollo_sae",
    "load_apollo_saes",
    "load_neuronpedia_apollo_sae",
    "neuronpedia_apollo_disk_loader",
    "neuronpedia_apollo_loader",
]

register_loaders()
