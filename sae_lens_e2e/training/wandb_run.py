"""A run at Weights & Biases, on which its training does not depend: what W&B does not take costs a warning."""

import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
from sae_lens import logger

from sae_lens_e2e.errors import named_line, one_line
from sae_lens_e2e.training.trainer import Log

_WAITS = {"init_timeout": 30.0, "finish_timeout": 120.0}
"""For how many seconds its client may wait for W&B, at the start and at the end; WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT say otherwise."""

_ANSWERS_WITHIN = 5.0
"""Seconds within which a server that is there says something."""


class WandbRun:
    """One run at W&B. Whatever is not taken there, the server being gone for instance, costs one warning and no more.

    The other arguments are `wandb.init`'s. Raises ConnectionError if W&B does not take the run to begin with.
    """

    def __init__(self, cfg: Any, **init: Any):
        self._warned = False
        try:
            self._run = wandb.init(
                project=cfg.logger.wandb_project,
                entity=cfg.logger.wandb_entity,
                config=cfg.to_dict(),
                settings=wandb.Settings(**_settings()),
                **init,
            )
        except Exception as error:
            raise ConnectionError(
                f"W&B does not take the run ({one_line(error)}); see to the network, WANDB_BASE_URL and `wandb login`, or train without "
                "it: log_to_wandb=False (or WANDB_MODE=offline)"
            ) from error

    def log(self, figures: dict[str, Any], step: int) -> None:
        """Log figures by name, of an optimizer step."""
        self._tell(lambda: self._run.log(figures, step=step))

    def summarise(self, figures: Mapping[str, Any]) -> None:
        """Add figures to what W&B shows of the whole run."""
        self._tell(lambda: self._run.summary.update(dict(figures)))

    def log_files(self, log: Callable[..., None], *arguments: Any, **settings: Any) -> None:
        """Call what logs files, SAELens' `LoggingConfig.log`, if there is a server to take them; each would wait for it."""

        def log_where_there_is_one() -> None:
            if not (self._run.offline or self._run.disabled):
                _check_reachable(self._run.settings)
            log(*arguments, **settings)

        self._tell(log_where_there_is_one)

    def finish(self, failed: bool = False) -> None:
        """End the run, when W&B has taken what is left or the time for that is over."""
        self._tell(lambda: self._run.finish(exit_code=1) if failed else self._run.finish())

    def _tell(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            if not self._warned:
                logger.warning(
                    f"W&B does not take all of the run ({named_line(error)}); training and saving go on, and what was logged is kept in "
                    f"{Path(self._run.dir).parent}, for `wandb sync`"
                )
            self._warned = True


def unheard(figures: dict[str, Any], step: int) -> None:
    """Where ranks log that are not the first: they work out all that it logs, so as to read the same data, and say nothing."""


@contextmanager
def logged_to_wandb(cfg: Any) -> Iterator[Log | None]:
    """The one W&B run of a process, if the config asks for one, while the block lasts: what logs figures; None if it does not.

    Files that SAELens logs within the block are told to W&B in the same way. Raises what `WandbRun` raises.
    """
    if not cfg.logger.log_to_wandb:
        yield None
        return
    run = WandbRun(cfg, name=cfg.logger.run_name, id=cfg.logger.wandb_id)
    log_files = cfg.logger.log
    # SAELens calls it in the midst of saving.
    vars(cfg.logger)["log"] = lambda *arguments, **settings: run.log_files(log_files, *arguments, **settings)
    failed = True
    try:
        yield run.log
        failed = False
    finally:
        del vars(cfg.logger)["log"]
        run.finish(failed)


def _settings() -> dict[str, Any]:
    ours = {"finish_timeout_raises": True} | {
        name: seconds for name, seconds in _WAITS.items() if f"WANDB_{name.upper()}" not in os.environ
    }
    # Versions of its client before 2026 know no end of waiting.
    return {name: value for name, value in ours.items() if name in wandb.Settings.model_fields}


def _check_reachable(settings: wandb.Settings) -> None:
    """Raises OSError if nothing answers at W&B's address."""
    named = {"http": settings.http_proxy, "https": settings.https_proxy}
    proxies = {**urllib.request.getproxies(), **{scheme: proxy for scheme, proxy in named.items() if proxy}}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
    try:
        opener.open(settings.base_url, timeout=_ANSWERS_WITHIN).close()
    except urllib.error.HTTPError:
        return
    except urllib.error.URLError as error:
        # Its client has certificates of its own.
        if not isinstance(error.reason, ssl.SSLError):
            raise
