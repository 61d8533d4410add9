"""The comparison figure: both files are written, whole and self-contained."""

import re
from pathlib import Path

from sae_lens_e2e.evaluation import Evaluation
from sae_lens_e2e.figures import comparison_html, comparison_png

HOOKS = ("blocks.4.hook_resid_pre", "blocks.5.hook_resid_post")
RESULTS = {
    name: Evaluation(1000, 1.8, 1.8 + increase, increase, l0, 90, 100, dict(zip(HOOKS, (0.1, 0.2), strict=True)))
    for name, increase, l0 in (("local", 0.4, 9.0), ("e2e_ds", 0.2, 8.0))
}


def test_png(tmp_path: Path) -> None:
    comparison_png(RESULTS, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_html_needs_no_network_and_holds_the_figures(tmp_path: Path) -> None:
    comparison_html(RESULTS, tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert not re.search(r"<(script|link)[^>]+(src|href)=", text)
    for wanted in ("local", "e2e_ds", "5.resid_post", "nats a token", "L0 (features active a token)"):
        assert wanted in text
