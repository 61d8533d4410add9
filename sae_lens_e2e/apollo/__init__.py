"""Apollo Research's own parametrisation of an SAE, for repeating what they did."""

from sae_lens_e2e.apollo.architecture import ApolloTrainingSAE, ApolloTrainingSAEConfig

__all__ = ["ApolloTrainingSAE", "ApolloTrainingSAEConfig"]
