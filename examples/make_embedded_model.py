"""Makes the language model and the stories that the package ships in ``sae_lens_e2e/embedded``.

Four steps, each reading what the ones before it left in the working folder, all on the CPU:

    python examples/make_embedded_model.py sample    --work build --corpus stories.jsonl --teacher stories15M
    python examples/make_embedded_model.py tokenizer --work build --corpus stories.jsonl
    python examples/make_embedded_model.py train     --work build --corpus stories.jsonl
    python examples/make_embedded_model.py export    --work build --out sae_lens_e2e/embedded

The teacher is a Llama language model of stories (stories15M of the tinyllamas): either a Hugging Face folder, or a
folder holding ``transformer_lens/`` (``config.json``, ``model.safetensors``) and ``huggingface/`` (the tokenizer).
The corpus is a JSON-lines file with a ``text`` field (TinyStories). The corpus is trained on and never shipped: every
shipped story is sampled from the teacher, and a sample that repeats a corpus document at length is thrown away.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

EOT = "<|endoftext|>"
EOT_ID = 0
N_CTX, D_MODEL, N_HEADS, D_MLP, N_LAYERS, D_VOCAB = 256, 64, 4, 256, 6, 1024
LN_EPS = 1e-5
HELD_OUT_SHARE = 0.08
# A run of this many words in two documents is copying; shorter runs are the stock openings of the genre.
COPIED_WORDS = 32

# UTF-8 punctuation that was once read as Windows-1252, and its ASCII spelling; the closing quote lost its last byte,
# so its two remaining characters must be tried after the longer sequences.
MOJIBAKE = {
    "\u00e2\u20ac\u0153": '"',
    "\u00e2\u20ac\u009d": '"',
    "\u00e2\u20ac\u2122": "'",
    "\u00e2\u20ac\u02dc": "'",
    "\u00e2\u20ac\u201c": "-",
    "\u00e2\u20ac\u201d": "-",
    "\u00e2\u20ac\u00a6": "...",
    "\u00e2\u20ac": '"',
}
PUNCTUATION = {
    "\u201c": '"',
    "\u201d": '"',
    "\u2018": "'",
    "\u2019": "'",
    "\u2013": "-",
    "\u2014": "-",
    "\u2026": "...",
    "\u00a0": " ",
}


def clean(text: str) -> str | None:
    """One spelling for every story: ASCII punctuation, single spaces, single newlines.

    Returns the normalised text, or None where something outside printable ASCII is left.
    """
    for wrong, right in (MOJIBAKE | PUNCTUATION).items():
        text = text.replace(wrong, right)
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ?\n[ \n]*", "\n", text).strip()
    return text if text.isascii() and (text.replace("\n", "").isprintable()) else None


def read_corpus(path: Path) -> list[str]:
    """The cleaned, distinct documents of a JSON-lines file, in file order."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [text for text in dict.fromkeys(clean(json.loads(line)["text"]) for line in lines) if text]


# ---------------------------------------------------------------------------------------------------------- sampling


@dataclass
class Sizes:
    """What a Llama model's weights do not say of its shape."""

    layers: int
    heads: int
    kv: int
    ctx: int
    eps: float
    theta: float


@dataclass
class Layer:
    """The weights of one Llama layer, the projections that read one input stacked into one matrix."""

    attn_norm: Tensor  # [d_model]
    qkv: Tensor  # [(n_heads + 2 * n_kv) * d_head, d_model]
    out: Tensor  # [d_model, n_heads * d_head]
    mlp_norm: Tensor  # [d_model]
    gate_up: Tensor  # [2 * d_mlp, d_model]
    down: Tensor  # [d_model, d_mlp]


def half_split(w: Tensor, n_heads: int) -> Tensor:
    """Reorders the rows of a query or key projection from adjacent-pair to half-split rotary pairs.

    w: [n_heads * d_head, d_model]; returns the same shape.
    """
    return w.view(n_heads, -1, 2, w.shape[-1]).transpose(1, 2).reshape(w.shape)


def read_teacher(folder: Path) -> tuple[Sizes, dict[str, Tensor], Any]:
    """A Llama model's sizes, its weights under Hugging Face's names (half-split rotary), and its tokenizer."""
    if not (folder / "transformer_lens").is_dir():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        c = model.config
        theta = getattr(c, "rope_theta", None) or c.rope_parameters["rope_theta"]
        heads, kv = c.num_attention_heads, c.num_key_value_heads
        sizes = Sizes(c.num_hidden_layers, heads, kv, c.max_position_embeddings, c.rms_norm_eps, theta)
        return sizes, model.state_dict(), AutoTokenizer.from_pretrained(folder)

    c = json.loads((folder / "transformer_lens" / "config.json").read_text())
    w = load_file(folder / "transformer_lens" / "model.safetensors")
    heads, kv = c["n_heads"], c.get("n_key_value_heads") or c["n_heads"]
    sizes = Sizes(c["n_layers"], heads, kv, c["n_ctx"], c["eps"], c["rotary_base"])
    state = {"model.embed_tokens.weight": w["embed.W_E"], "model.norm.weight": w["ln_final.w"]}
    state["lm_head.weight"] = w["unembed.W_U"].T if "unembed.W_U" in w else w["embed.W_E"]
    for layer in range(c["n_layers"]):
        old, new = f"blocks.{layer}.", f"model.layers.{layer}."
        for letter, n in (("Q", heads), ("K", kv), ("V", kv)):
            name = f"{old}attn._W_{letter}" if f"{old}attn._W_{letter}" in w else f"{old}attn.W_{letter}"
            flat = w[name].transpose(1, 2).reshape(-1, c["d_model"])[: n * c["d_head"]]
            state[f"{new}self_attn.{letter.lower()}_proj.weight"] = flat if letter == "V" else half_split(flat, n)
        state[f"{new}self_attn.o_proj.weight"] = w[f"{old}attn.W_O"].flatten(0, 1).T
        state[f"{new}input_layernorm.weight"] = w[f"{old}ln1.w"]
        state[f"{new}post_attention_layernorm.weight"] = w[f"{old}ln2.w"]
        for hf, lens in (("gate", "gate"), ("up", "in"), ("down", "out")):
            state[f"{new}mlp.{hf}_proj.weight"] = w[f"{old}mlp.W_{lens}"].T
    return sizes, state, AutoTokenizer.from_pretrained(folder / "huggingface")


class Teacher:
    """A Llama model that reads one token per step for many stories at once, keeping keys and values."""

    def __init__(self, sizes: Sizes, w: dict[str, Tensor], pieces: Tensor, dtype: torch.dtype) -> None:
        """pieces: [n] vocabulary ids that may be sampled; the unembedding keeps only their rows."""
        self.heads, self.kv, self.ctx, self.eps = sizes.heads, sizes.kv, sizes.ctx, sizes.eps
        self.d_head = w["model.layers.0.self_attn.q_proj.weight"].shape[0] // self.heads
        self.dtype = dtype
        self.embed = w["model.embed_tokens.weight"]
        self.final_norm = w["model.norm.weight"]
        self.unembed = w["lm_head.weight"][pieces].to(dtype).contiguous()
        self.layers: list[Layer] = []
        for layer in range(sizes.layers):
            p = f"model.layers.{layer}."

            def matrix(*names: str, prefix: str = p) -> Tensor:
                return torch.cat([w[f"{prefix}{name}_proj.weight"] for name in names]).to(dtype).contiguous()

            self.layers.append(
                Layer(
                    attn_norm=w[f"{p}input_layernorm.weight"],
                    qkv=matrix("self_attn.q", "self_attn.k", "self_attn.v"),
                    out=matrix("self_attn.o"),
                    mlp_norm=w[f"{p}post_attention_layernorm.weight"],
                    gate_up=matrix("mlp.gate", "mlp.up"),
                    down=matrix("mlp.down"),
                )
            )
        rates = sizes.theta ** (-torch.arange(0, self.d_head, 2).float() / self.d_head)
        angles = torch.outer(torch.arange(self.ctx).float(), rates)
        self.cos, self.sin = angles.cos(), angles.sin()

    def new_cache(self, batch: int) -> Tensor:
        """Room for keys and values: [n_layers, 2, batch, n_kv, n_ctx, d_head]."""
        return torch.zeros(len(self.layers), 2, batch, self.kv, self.ctx, self.d_head)

    def _rotate(self, x: Tensor, position: int) -> Tensor:
        a, b = x.chunk(2, -1)
        cos, sin = self.cos[position], self.sin[position]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * weight

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x.to(self.dtype), weight).float()

    def step(self, tokens: Tensor, position: int, cache: Tensor) -> Tensor:
        """tokens: [batch]; returns logits [batch, pieces] for the next token, and fills the cache at position."""
        batch = tokens.shape[0]
        x = self.embed[tokens]
        for layer, kv_cache in zip(self.layers, cache, strict=True):
            qkv = self._linear(self._norm(x, layer.attn_norm), layer.qkv).view(batch, -1, self.d_head)
            q, k, v = qkv.split([self.heads, self.kv, self.kv], 1)
            kv_cache[0, :, :, position] = self._rotate(k, position)
            kv_cache[1, :, :, position] = v
            keys, values = kv_cache[:, :, :, : position + 1]
            # Queries that share a key head stand in for a query length, so that no key is copied.
            q = self._rotate(q, position).view(batch, self.kv, -1, self.d_head)
            z = F.scaled_dot_product_attention(q, keys, values)
            x = x + self._linear(z.reshape(batch, -1), layer.out)
            gate, up = self._linear(self._norm(x, layer.mlp_norm), layer.gate_up).chunk(2, -1)
            x = x + self._linear(F.silu(gate) * up, layer.down)
        return self._linear(self._norm(x, self.final_norm), self.unembed)


def sample_stories(
    teacher: Teacher, pieces: Tensor, bos: int, args: argparse.Namespace, generator: torch.Generator
) -> Iterator[list[int]]:
    """The token ids of those stories of a batch that the teacher ended, the first to end coming first."""
    tokens = torch.full((args.batch,), bos)
    stories = torch.zeros(args.batch, 0, dtype=torch.long)
    cache = teacher.new_cache(args.batch)
    for position in range(teacher.ctx):
        logits = teacher.step(tokens, position, cache)
        values, index = (logits / args.temperature).softmax(-1).topk(min(100, len(pieces)))
        values[values.cumsum(-1) - values > args.top_p] = 0.0
        choice = torch.multinomial(values, 1, generator=generator)
        tokens = pieces[index.gather(1, choice)[:, 0]]
        stories = torch.cat([stories, tokens[:, None]], 1)
        # Dropping ended stories copies the whole cache, so it waits until a batch of them has gathered.
        if position % 16 == 15 or position == teacher.ctx - 1:
            ended = (stories == bos).any(1)
            for row in stories[ended].tolist():
                yield row[: row.index(bos)]
            stories, tokens, cache = stories[~ended], tokens[~ended], cache[:, :, ~ended]
            if not len(tokens):
                return


def step_sample(args: argparse.Namespace) -> None:
    """Appends stories to ``samples.jsonl`` until there are enough characters; an interrupted run continues."""
    started = time.time()
    sizes, weights, tokenizer = read_teacher(args.teacher)
    corpus = read_corpus(args.corpus)
    # The tinyllamas were trained on stories that each begin with a BOS and end with nothing, so the next story's BOS is
    # what ends one; an EOS never comes.
    bos = tokenizer.bos_token_id
    # A piece that the corpus never uses has next to no chance of being drawn, and most of the teacher's arithmetic
    # would go to scoring such pieces.
    ids = tokenizer(corpus)["input_ids"]
    pieces = torch.tensor(sorted({i for row in ids for i in row} | {bos}))
    teacher = Teacher(sizes, weights, pieces, getattr(torch, args.dtype))

    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "samples.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    characters, batch = sum(len(d["text"]) for d in done), max((d["batch"] for d in done), default=-1) + 1
    tokens = 0
    with path.open("a") as file, torch.no_grad():
        while characters < args.characters and time.time() - started < args.minutes * 60:
            generator = torch.Generator().manual_seed(args.seed * 100_003 + batch)
            for row in sample_stories(teacher, pieces, bos, args, generator):
                tokens += len(row)
                text = clean(tokenizer.decode(row, skip_special_tokens=True))
                if text and len(text) >= 100:
                    file.write(json.dumps({"text": text, "batch": batch}) + "\n")
                    characters += len(text)
            file.flush()
            batch += 1
            rate = tokens / (time.time() - started)
            print(f"batch {batch}: {characters / 1e6:.2f} M characters, {rate:.0f} teacher tokens/s", flush=True)


def read_samples(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The sampled stories as (train, held out), without those that copy the corpus or an earlier story."""
    seen: set[int] = set()

    def runs(text: str) -> set[int]:
        words = re.findall(r"[a-z']+", text.lower())
        return {hash(tuple(words[i : i + COPIED_WORDS])) for i in range(max(1, len(words) - COPIED_WORDS + 1))}

    for text in read_corpus(args.corpus):
        seen |= runs(text)
    kept: list[str] = []
    lines = (args.work / "samples.jsonl").read_text().splitlines()
    for line in lines:
        text = json.loads(line)["text"]
        if seen.isdisjoint(new := runs(text)):
            kept.append(text)
        seen |= new
    split = round(len(kept) * (1 - HELD_OUT_SHARE))
    print(f"{len(lines)} samples, {len(kept)} kept, {split} of them to train on")
    return kept[:split], kept[split:]


# --------------------------------------------------------------------------------------------------------- tokenizer


def step_tokenizer(args: argparse.Namespace) -> None:
    """Trains the byte-level BPE vocabulary on the corpus and the samples that are not held out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=D_VOCAB,
        special_tokens=[EOT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_corpus(args.corpus) + read_samples(args)[0], trainer)
    tokenizer.save(str(args.work / "tokenizer.json"), pretty=False)


# ---------------------------------------------------------------------------------------------------------- training


def pack(documents: list[list[int]]) -> np.ndarray:
    """Rows of one BOS and N_CTX - 1 tokens of the documents, each followed by an end-of-text; the rest is dropped.

    Returns [rows, N_CTX] uint16.
    """
    stream = np.concatenate([np.array([*document, EOT_ID], dtype=np.uint16) for document in documents])
    body = stream[: len(stream) // (N_CTX - 1) * (N_CTX - 1)].reshape(-1, N_CTX - 1)
    return np.concatenate([np.full((len(body), 1), EOT_ID, dtype=np.uint16), body], axis=1)


def unigram_entropy(rows: np.ndarray) -> float:
    """The entropy in nats of the tokens that a model is asked to predict, those after each row's BOS."""
    p = np.bincount(rows[:, 1:].ravel()) / rows[:, 1:].size
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def new_weights(seed: int) -> dict[str, Tensor]:
    """GPT-2's initialisation, under TransformerLens's names; the unembedding is the embedding."""
    generator = torch.Generator().manual_seed(seed)
    d_head = D_MODEL // N_HEADS

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    w = {"embed.W_E": normal(D_VOCAB, D_MODEL, std=0.05), "pos_embed.W_pos": normal(N_CTX, D_MODEL, std=0.02)}
    std, std_out = D_MODEL**-0.5, D_MODEL**-0.5 / math.sqrt(2 * N_LAYERS)
    for layer in range(N_LAYERS):
        p = f"blocks.{layer}."
        for n in ("ln1", "ln2"):
            w |= {f"{p}{n}.w": torch.ones(D_MODEL), f"{p}{n}.b": torch.zeros(D_MODEL)}
        for letter in "QKV":
            w[f"{p}attn.W_{letter}"] = normal(N_HEADS, D_MODEL, d_head, std=std)
            w[f"{p}attn.b_{letter}"] = torch.zeros(N_HEADS, d_head)
        w |= {f"{p}attn.W_O": normal(N_HEADS, d_head, D_MODEL, std=std_out), f"{p}attn.b_O": torch.zeros(D_MODEL)}
        w |= {f"{p}mlp.W_in": normal(D_MODEL, D_MLP, std=std), f"{p}mlp.b_in": torch.zeros(D_MLP)}
        w |= {f"{p}mlp.W_out": normal(D_MLP, D_MODEL, std=std_out / 2), f"{p}mlp.b_out": torch.zeros(D_MODEL)}
    return w | {"ln_final.w": torch.ones(D_MODEL), "ln_final.b": torch.zeros(D_MODEL)}


def losses(w: dict[str, Tensor], rows: Tensor) -> Tensor:
    """Cross-entropy in nats of every token after the first of each row: rows [batch, n] gives [batch * (n - 1)]."""
    inputs, targets = rows[:, :-1], rows[:, 1:]
    batch, length = inputs.shape

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (D_MODEL,), w[f"{name}.w"], w[f"{name}.b"], LN_EPS)

    x = F.embedding(inputs, w["embed.W_E"]) + w["pos_embed.W_pos"][:length]
    for layer in range(N_LAYERS):
        p = f"blocks.{layer}."
        qkv_w = torch.cat([w[f"{p}attn.W_{n}"] for n in "QKV"]).transpose(1, 2).reshape(-1, D_MODEL)
        qkv_b = torch.cat([w[f"{p}attn.b_{n}"] for n in "QKV"]).flatten()
        qkv = F.linear(norm(x, f"{p}ln1"), qkv_w, qkv_b).view(batch, length, 3, N_HEADS, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, -1)
        x = x + z @ w[f"{p}attn.W_O"].flatten(0, 1) + w[f"{p}attn.b_O"]
        hidden = F.gelu(norm(x, f"{p}ln2") @ w[f"{p}mlp.W_in"] + w[f"{p}mlp.b_in"], approximate="tanh")
        x = x + hidden @ w[f"{p}mlp.W_out"] + w[f"{p}mlp.b_out"]
    logits = norm(x, "ln_final") @ w["embed.W_E"].T
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")


def mean_loss(w: dict[str, Tensor], rows: np.ndarray) -> float:
    """Mean cross-entropy in nats per predicted token of rows [n, N_CTX]."""
    tokens = torch.from_numpy(rows.astype(np.int64))
    with torch.no_grad():
        parts = [losses(w, part) for part in tokens.split(32)]
    return float(torch.cat(parts).double().mean())


def step_train(args: argparse.Namespace) -> None:
    """Trains the model on the corpus and the samples, and writes ``model.safetensors`` and the packed rows."""
    tokenizer = Tokenizer.from_file(str(args.work / "tokenizer.json"))
    train_text, held_out_text = read_samples(args)

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch(texts)]

    sampled, corpus = encode(train_text), encode(read_corpus(args.corpus))
    held_out = pack(encode(held_out_text))
    np.save(args.work / "train.npy", pack(sampled))
    np.save(args.work / "held_out.npy", held_out)
    documents = sampled + corpus
    entropy = unigram_entropy(held_out)
    n_tokens = {"sampled": sum(map(len, sampled)), "corpus": sum(map(len, corpus)), "held_out": held_out.size}
    print(f"tokens: {n_tokens}; held-out unigram entropy {entropy:.4f} nats")

    w = {name: value.requires_grad_() for name, value in new_weights(args.seed).items()}
    matrices = [v for v in w.values() if v.ndim > 1]
    vectors = [v for v in w.values() if v.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-8)
    rng = np.random.default_rng(args.seed)

    def batches() -> Iterator[Tensor]:
        while True:
            # Documents fall differently over the rows of each pass, so a pass is never quite a repetition.
            rows = pack([documents[i] for i in rng.permutation(len(documents))])
            rows = rows[rng.permutation(len(rows))].astype(np.int64)
            for start in range(0, len(rows) - args.rows + 1, args.rows):
                yield torch.from_numpy(rows[start : start + args.rows])

    started, running = time.time(), 0.0
    for step, rows in zip(range(args.steps), batches(), strict=False):
        warmup = min(1.0, (step + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        loss = losses(w, rows).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(w.values()), 1.0)
        optimizer.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 250 == 0:
            rate = (step + 1) * args.rows * N_CTX / (time.time() - started)
            held = mean_loss(w, held_out[:96])
            print(f"step {step + 1}: train {running:.4f}, held out {held:.4f}, {rate:.0f} tokens/s", flush=True)

    w = {name: value.detach() for name, value in w.items()}
    save_file(w, args.work / "model.safetensors")
    facts = {"cross_entropy": mean_loss(w, held_out), "unigram_entropy": entropy, "tokens": n_tokens}
    facts |= {"corpus_documents": len(corpus), "steps": args.steps, "rows": args.rows, "lr": args.lr, "seed": args.seed}
    (args.work / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(facts)


# ------------------------------------------------------------------------------------------------------------ export

MODEL_CARD = """\
# sae-lens-e2e-stories

A small GPT-2-like language model of children's stories, and stories to run it on. They ship inside `sae-lens-e2e` so
that its examples, tests and measurements run without a network. They are for exercising sparse autoencoders, not for
writing: the stories are grammatical and forgetful.

| Fact | Figure |
| --- | --- |
| Architecture | {n_layers} layers, d_model {d_model}, {n_heads} heads, d_mlp {d_mlp}, context {n_ctx} |
| Nonlinearities | gelu_new, LayerNorm |
| Positions | learned |
| Unembedding | tied to the embedding, no bias |
| Parameters | {parameters:,} |
| Vocabulary | {d_vocab:,} pieces of byte-level BPE, of which `<|endoftext|>` (id 0) is the only special one |
| Train rows | {train_rows:,} of {n_ctx} tokens ({train_tokens:,} tokens) |
| Held-out rows | {held_out_rows:,} of {n_ctx} tokens ({held_out_tokens:,} tokens) |
| Held-out unigram entropy | {unigram_entropy:.4f} nats/token |
| Held-out cross-entropy | {cross_entropy:.4f} nats/token |
| Cross-entropy / unigram entropy | {ratio:.1%} |

Both held-out figures are means over tokens 1 to {last} of every held-out row, the tokens that the model predicts.

## Rows

Every row is `<|endoftext|>` followed by {last} tokens of the stories, which are set end to end with `<|endoftext|>`
after each. So the first token of a row is the BOS (nothing needs prepending), a row mostly starts and ends in the
middle of a story, and an `<|endoftext|>` inside a row separates two stories. The model was trained on rows of exactly
this form.

## What it was trained on

- The train stories shipped here, which were sampled from stories15M (of the tinyllamas, Llama architecture, MIT
  licence) at temperature 0.9 and top-p 0.95, keeping those that the model itself ended.
- {corpus_documents:,} TinyStories documents ({corpus_tokens:,} tokens; CDLA-Sharing-1.0). They are not shipped: a sample
  with a run of {copied_words} words that also occurs in one of them, or in an earlier sample, was thrown away.

The held-out stories were sampled in the same way, after the others, and neither the model nor the tokenizer was
trained on them. Curly quotes, dashes and line breaks were brought to one ASCII spelling throughout.

Training was {steps:,} steps of AdamW over {rows} rows each, cosine schedule from {lr}, seed {seed}.

## How to make it again

    recipe=examples/make_embedded_model.py
    python $recipe sample    --corpus stories.jsonl --teacher stories15M --characters {characters}
    python $recipe tokenizer --corpus stories.jsonl
    python $recipe train     --corpus stories.jsonl --steps {steps} --rows {rows} --lr {lr} --seed {seed}
    python $recipe export    --characters {characters}

`stories.jsonl` holds TinyStories documents under `text`; `stories15M` is the teacher's folder. It takes about an hour
on one CPU core. Sampling in bfloat16 is not bit-for-bit the same on every machine, so expect other stories of the same
kind, and figures that differ in the third digit.
"""


def config() -> dict[str, Any]:
    """The fields of TransformerLens's ``HookedTransformerConfig``."""
    return {
        "n_layers": N_LAYERS,
        "d_model": D_MODEL,
        "n_ctx": N_CTX,
        "d_head": D_MODEL // N_HEADS,
        "n_heads": N_HEADS,
        "d_mlp": D_MLP,
        "d_vocab": D_VOCAB,
        "act_fn": "gelu_new",
        "eps": LN_EPS,
        "normalization_type": "LN",
        "positional_embedding_type": "standard",
        "original_architecture": "GPT2LMHeadModel",
        "model_name": "sae-lens-e2e-stories",
        "default_prepend_bos": True,
    }


def write_rows(rows: np.ndarray, path: Path) -> None:
    """rows: [n, N_CTX] uint16, as one ``input_ids`` column of fixed-length lists."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), N_CTX)
    # Dictionary pages pack ten-bit codes across byte boundaries, where zstd no longer sees that tokens repeat.
    pq.write_table(
        pa.table({"input_ids": column}),
        path,
        compression="zstd",
        compression_level=22,
        use_dictionary=False,
        write_statistics=False,
        row_group_size=len(rows),
        data_page_size=1 << 26,
    )


def step_export(args: argparse.Namespace) -> None:
    """Writes the files that the package ships, with their digests and the model card."""
    args.out.mkdir(parents=True, exist_ok=True)
    facts = json.loads((args.work / "facts.json").read_text())
    rows = {split: np.load(args.work / f"{split}.npy") for split in ("train", "held_out")}
    weights = load_file(args.work / "model.safetensors")

    def write_json(name: str, content: dict[str, Any]) -> None:
        (args.out / name).write_text(json.dumps(content, indent=1) + "\n")

    # Not save_file, which makes a file that only its owner can read, and an installed package keeps that.
    (args.out / "model.safetensors").write_bytes(save(weights))
    write_json("config.json", config())
    shutil.copyfile(args.work / "tokenizer.json", args.out / "tokenizer.json")
    special = {"bos_token": EOT, "eos_token": EOT, "unk_token": EOT, "pad_token": EOT}
    write_json(
        "tokenizer_config.json",
        special
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": N_CTX,
            "clean_up_tokenization_spaces": False,
        },
    )
    for split, array in rows.items():
        write_rows(array, args.out / f"{split}.parquet")
    card = MODEL_CARD.format(
        **{key: value for key, value in config().items() if key != "eps"},
        parameters=sum(value.numel() for value in weights.values()),
        train_rows=len(rows["train"]),
        train_tokens=rows["train"].size,
        held_out_rows=len(rows["held_out"]),
        held_out_tokens=rows["held_out"].size,
        unigram_entropy=facts["unigram_entropy"],
        cross_entropy=facts["cross_entropy"],
        ratio=facts["cross_entropy"] / facts["unigram_entropy"],
        last=N_CTX - 1,
        corpus_documents=facts["corpus_documents"],
        corpus_tokens=facts["tokens"]["corpus"],
        copied_words=COPIED_WORDS,
        characters=args.characters,
        **{key: facts[key] for key in ("steps", "rows", "lr", "seed")},
    )
    (args.out / "MODEL_CARD.md").write_text(card)
    shipped = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    shipped += [f"{split}.parquet" for split in rows]
    write_json("checksums.json", {name: hashlib.sha256((args.out / name).read_bytes()).hexdigest() for name in shipped})
    for path in sorted(args.out.iterdir()):
        if path.is_file():
            print(f"{path.stat().st_size:>9,} {path.name}")


def main() -> None:
    """Reads the command line and runs one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    commands = {"sample": step_sample, "tokenizer": step_tokenizer, "train": step_train, "export": step_export}
    parsers = {name: steps.add_parser(name, help=(run.__doc__ or "").split("\n")[0]) for name, run in commands.items()}
    for name, sub in parsers.items():
        sub.add_argument("--work", type=Path, default=Path("build/embedded"), help="the working folder")
        if name != "export":
            sub.add_argument("--corpus", type=Path, required=True, help="JSON lines with a `text` field")
            sub.add_argument("--seed", type=int, default=0)
            sub.add_argument("--threads", type=int, default=1)
    sample = parsers["sample"]
    sample.add_argument("--teacher", type=Path, required=True, help="the teacher's folder")
    sample.add_argument("--characters", type=int, default=4_700_000, help="stop at this many characters of stories")
    sample.add_argument("--minutes", type=float, default=60.0, help="stop after this long")
    sample.add_argument("--batch", type=int, default=256, help="stories sampled at once")
    sample.add_argument("--temperature", type=float, default=0.9)
    sample.add_argument("--top-p", type=float, default=0.95)
    sample.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the matrix products")
    train = parsers["train"]
    train.add_argument("--steps", type=int, default=5500)
    train.add_argument("--rows", type=int, default=16, help="rows of 256 tokens in a batch")
    train.add_argument("--lr", type=float, default=3e-3)
    export = parsers["export"]
    export.add_argument("--characters", type=int, default=4_700_000, help="as given to sample, for the card")
    export.add_argument("--out", type=Path, default=Path("sae_lens_e2e/embedded"), help="the package's folder")
    args = parser.parse_args()
    torch.set_num_threads(getattr(args, "threads", 1))
    commands[args.step](args)


if __name__ == "__main__":
    main()
