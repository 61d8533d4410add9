"""Time the steps of EleutherAI's sparsify, in its own environment and by its own `Trainer`: `loss_fn="kl"`, TopK, Adam.

    .venv-sparsify/bin/python benchmarks/sparsify_driver.py '{"model": "tiny", "hook_layer": 1, ...}'

A step is what lies between two batches being read. `peers.py` calls this.
"""

import argparse
import json
import tempfile
import time
from contextlib import suppress

from random_models import RANDOM_MODELS
from sparsify import SaeConfig, TrainConfig, Trainer  # pyright: ignore[reportMissingImports]
from timing import WARM_UP, figures, peak_memory, random_batches
from torch import Tensor
from torch.utils.data import Dataset


class _Enough(Exception):  # noqa: N818
    """All steps to be timed are over."""


class TimedPrompts(Dataset[dict[str, Tensor]]):
    """Prompts that note when the first of each batch is read, and end all after the last."""

    def __init__(self, batches: list[Tensor]):
        self.prompts = [prompt for batch in batches for prompt in batch]
        self.n_prompts, self.read_at = len(batches[0]), list[float]()

    def __len__(self) -> int:
        # One batch more, at which the last step is known to be over.
        return len(self.prompts) + self.n_prompts

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if i % self.n_prompts == 0:
            self.read_at.append(time.perf_counter())
        if i >= len(self.prompts):
            raise _Enough
        return {"input_ids": self.prompts[i]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", help="model, hook_layer, ratio, k, n_prompts, n_pos, lr, steps, as JSON")
    of = json.loads(parser.parse_args().settings)
    random_model = RANDOM_MODELS[of["model"]]
    model = random_model.load()
    prompts = TimedPrompts(random_batches(of["steps"], of["n_prompts"], of["n_pos"], random_model.config.vocab_size))
    with tempfile.TemporaryDirectory() as folder, peak_memory("cpu") as memory:
        cfg = TrainConfig(
            SaeConfig(expansion_factor=of["ratio"], k=of["k"]),
            batch_size=of["n_prompts"],
            loss_fn="kl",
            optimizer="adam",
            lr=of["lr"],
            lr_warmup_steps=0,
            # Their names leave out the module around the base model.
            hookpoints=[random_model.hook_name(of["hook_layer"]).partition(".")[2]],
            log_to_wandb=False,
            save_dir=folder,
        )
        with suppress(_Enough):
            Trainer(cfg, prompts, model).fit()  # pyright: ignore[reportArgumentType]
    seconds = [end - start for start, end in zip(prompts.read_at, prompts.read_at[1:], strict=False)]
    assert len(seconds) == WARM_UP + of["steps"]
    print(json.dumps(figures(seconds, memory)))


if __name__ == "__main__":
    main()
