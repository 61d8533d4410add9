"""Looking at single features without a network: one page on an SAE, or on two side by side. Needs `sae-lens-e2e[figures]`."""

from sae_lens_e2e.features.look import Group, Look, look_at_features
from sae_lens_e2e.features.page import make_features_page
from sae_lens_e2e.features.passages import Passage, Token
from sae_lens_e2e.features.view import Effect, FeatureView

__all__ = ["Effect", "FeatureView", "Group", "Look", "Passage", "Token", "look_at_features", "make_features_page"]
