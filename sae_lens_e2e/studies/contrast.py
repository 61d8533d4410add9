"""Contrast pairs: prompts with a right and a wrong continuation, as text, as tokens, and in batches."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sae_lens_e2e.splice import Positions, Where


@dataclass(frozen=True)
class ContrastPair:
    """A prompt that `correct` continues and `wrong` does not; after `contrast`, if there is one, it is the other way round.

    Texts are joined as they are, so a continuation brings its leading space: ContrastPair("The girl", " was", " were",
    contrast="The girls"). `template` is the name under which its figures are gathered. Raises ValueError for an empty text, or
    two continuations that are the same.
    """

    prompt: str
    correct: str
    wrong: str
    template: str = "custom"
    contrast: str | None = None

    def __post_init__(self) -> None:
        for field in ("prompt", "correct", "wrong", "template", "contrast"):
            if getattr(self, field) == "":
                raise ValueError(f"{field} of {self} is empty; give it some text")
        if self.correct == self.wrong:
            raise ValueError(f"correct and wrong of {self} are the same; give two continuations that differ")
        if self.template == "overall":
            raise ValueError("template='overall' is the name of the figures over all templates; choose another")


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt's tokens without BOS, and the single tokens that continue it rightly and wrongly."""

    tokens: tuple[int, ...]
    correct: int
    wrong: int


def tokenize_pairs(model: Any, pairs: Sequence[ContrastPair]) -> list[tuple[ContrastPair, tuple[TokenizedPrompt, ...]]]:
    """Those pairs whose continuations are single tokens to the model, with their prompts as tokens.

    Raises ValueError if there are none, the two prompts of a pair have different lengths, or the model has no tokenizer.
    """
    tokenizer = tokenizer_of(model)
    tokenized = [(pair, prompts) for pair in pairs if (prompts := tokenize_pair(tokenizer, pair)) is not None]
    if not tokenized:
        example = f", such as {pairs[0].correct!r} and {pairs[0].wrong!r}" if pairs else ""
        raise ValueError(
            f"pairs: of {len(pairs)}, none has two continuations of one token each{example}; give others, each with the "
            "leading space that a word has"
        )
    return tokenized


def tokenize_pair(tokenizer: Any, pair: ContrastPair) -> tuple[TokenizedPrompt, ...] | None:
    """The pair's one or two prompts as tokens; None if a continuation is not one token of its own after its prompt.

    Raises ValueError if the two prompts have different lengths.
    """
    lengths = prompt_lengths(tokenizer, pair)
    if len(set(lengths)) > 1:
        raise ValueError(
            f"prompt {pair.prompt!r} has {lengths[0]} tokens and contrast {pair.contrast!r} {lengths[1]}; "
            "use words of one length, or make them two pairs"
        )
    prompt = _tokenize_prompt(tokenizer, pair.prompt, pair.correct, pair.wrong)
    if prompt is None or pair.contrast is None:
        return None if prompt is None else (prompt,)
    contrast = _tokenize_prompt(tokenizer, pair.contrast, pair.wrong, pair.correct)
    return None if contrast is None else (prompt, contrast)


def prompt_lengths(tokenizer: Any, pair: ContrastPair) -> tuple[int, ...]:
    """The number of tokens of the pair's prompt, and of its contrast if there is one."""
    return tuple(len(_encode(tokenizer, text)) for text in (pair.prompt, pair.contrast) if text is not None)


def tokenizer_of(model: Any) -> Any:
    """The model's tokenizer; a tokenizer is its own. Raises ValueError if the model has none."""
    tokenizer = model if hasattr(model, "encode") else getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            "the model has no tokenizer to read prompts with; set model.tokenizer to the one it was trained with"
        )
    return tokenizer


def bos_tokens(model: Any, prepend_bos: bool | None) -> tuple[int, ...]:
    """What comes before every prompt: the BOS, or nothing. Raises ValueError if that is not known, or there is no BOS."""
    tokenizer = tokenizer_of(model)
    if prepend_bos is None:
        raise ValueError("sae.cfg.metadata.prepend_bos is not set; set it to what the SAE was trained with")
    if prepend_bos and tokenizer.bos_token_id is None:
        raise ValueError("prepend_bos=True in sae.cfg.metadata, but the tokenizer has no BOS; set it to False")
    return (tokenizer.bos_token_id,) if prepend_bos else ()


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Prompts of one template and one length, and so without padding."""

    group: tuple[str, int]
    """Template and number of tokens, which other batches may share."""
    tokens: Int[Tensor, "prompts pos"]
    where: Where
    """The tokens at which the SAE's output takes the activation's place."""
    choices: Int[Tensor, "prompts 2"]
    """The tokens that continue each prompt rightly and wrongly."""
    pairs: Int[Tensor, "prompts"]
    """Which pair each prompt is of, on the CPU."""


def prompt_batches(
    tokenized: Sequence[tuple[ContrastPair, tuple[TokenizedPrompt, ...]]],
    bos: Sequence[int],
    positions: Positions,
    batch_size: int,
    device: torch.device,
) -> list[PromptBatch]:
    """The prompts of all pairs, each behind `bos`, in batches of at most `batch_size`.

    Raises ValueError if `positions` leave none of any prompt to the SAE.
    """
    groups: dict[tuple[str, int], list[tuple[int, TokenizedPrompt]]] = defaultdict(list)
    for number, (pair, prompts) in enumerate(tokenized):
        for prompt in prompts:
            groups[pair.template, len(bos) + len(prompt.tokens)].append((number, prompt))
    batches = []
    for name, group in groups.items():
        tokens = torch.tensor([[*bos, *prompt.tokens] for _, prompt in group])
        where = positions.of(tokens)
        choices = torch.tensor([[prompt.correct, prompt.wrong] for _, prompt in group], device=device)
        pairs = torch.tensor([number for number, _ in group])
        parts = (part.split(batch_size) for part in (tokens.to(device), where, choices, pairs))
        batches += [PromptBatch(name, *part) for part in zip(*parts, strict=True)]
    if not any(batch.where.n for batch in batches):
        raise ValueError(
            f"seqpos_slice={positions.seqpos_slice} and exclude_special_tokens leave no position of these prompts to the SAE; "
            "give longer prompts"
        )
    return batches


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _tokenize_prompt(tokenizer: Any, prompt: str, correct: str, wrong: str) -> TokenizedPrompt | None:
    # Encoded behind its prompt, a continuation is what the model would see, however the tokenizer treats spaces.
    tokens = _encode(tokenizer, prompt)
    continued = [_encode(tokenizer, prompt + continuation) for continuation in (correct, wrong)]
    choices = [ids[-1] for ids in continued if ids[:-1] == tokens and ids[-1] != tokenizer.unk_token_id]
    return TokenizedPrompt(tuple(tokens), *choices) if tokens and len(set(choices)) == 2 else None
