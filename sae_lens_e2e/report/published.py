"""What Braun et al. (2024, arXiv 2405.12241) found on GPT2-small: the few figures that a report compares with."""

from dataclasses import dataclass

LAYERS = (2, 6, 10)
MODEL = "GPT2-small"


@dataclass(frozen=True)
class Published:
    """A row of table 2 or 3."""

    l0: float
    n_alive: float
    ce_loss_increase: float


SIMILAR_CE = {
    "local": (Published(73.5, 41_000, 0.016), Published(69.4, 26_000, 0.144), Published(162.7, 33_000, 0.122)),
    "e2e": (Published(33.4, 22_000, 0.020), Published(27.5, 22_000, 0.145), Published(62.3, 25_000, 0.131)),
    "e2e_ds": (Published(36.2, 18_000, 0.015), Published(36.8, 15_000, 0.124), Published(70.2, 25_000, 0.144)),
}
"""Table 2, at `LAYERS`."""

SIMILAR_L0 = {
    "local": (Published(18.4, 18_000, 0.101), Published(42.8, 21_000, 0.228), Published(74.9, 28_000, 0.202)),
    "e2e": (Published(18.6, 20_000, 0.043), Published(39.7, 25_000, 0.099), Published(62.3, 25_000, 0.131)),
    "e2e_ds": (Published(17.9, 15_000, 0.039), Published(36.8, 15_000, 0.124), Published(70.2, 25_000, 0.144)),
}
"""Table 3, at `LAYERS`."""

LATER_LAYER_MSE = {"local": (0.5, 2.0), "e2e": (14.5, 22.0), "e2e_ds": (1.5, 2.5)}
"""Figure 2, layer 6: from the first later layer to the last."""

NEAREST_COSINE_DIFFERENCE = {"e2e": (0.166, 0.163, 0.168), "e2e_ds": (0.040, 0.037, 0.043)}
"""Figure 3a, layer 6: how much larger local's mean nearest cosine is, with its 95 % interval."""

L2_RATIO_LATER = {"local": (0.98, 0.92, 0.91), "e2e": (0.67, 0.31, 0.15), "e2e_ds": (0.74, 0.56, 0.32)}
"""Table 5, at `LAYERS`: after position 0."""


def ratios(rows: dict[str, tuple[Published, ...]], objective: str, measure: str) -> list[float]:
    """An objective's measure as a fraction of local's, layer by layer."""
    pairs = zip(rows[objective], rows["local"], strict=True)
    return [getattr(row, measure) / getattr(local, measure) for row, local in pairs]
