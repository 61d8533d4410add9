"""Pages that need nothing beside them: one style, and one frame around whatever is on them."""

from sae_lens_e2e.pages.page import check_page, render

__all__ = ["check_page", "render"]
