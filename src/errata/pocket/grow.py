"""Growing a small language model from an encyclopedia, and measuring what it knows.

    python -m errata.pocket.grow --model pocket --out DIR     grows the shipped model again
    python -m errata.pocket.grow --check DIR                  says how many facts a model knows

What is read at each step is a function of the seed and the step alone, so that a run which was
stopped continues as if it had not been.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from errata.errors import ErrataError, GrowError
from errata.pocket.corpus import Corpus
from errata.pocket.encyclopedia import Encyclopedia, stable_random
from errata.pocket.knowledge import load, measure

END = "<|endoftext|>"
"""Stands between documents; id 0; begin, end, padding and unknown in one."""

CHECKPOINT = "checkpoint.safetensors"

WINDOW_STARTS = {"document": 0.4, "marked": 0.3, "anywhere": 0.3}
"""How windows begin: at a document's first word, at its mark, or in the middle of it."""


@dataclass(frozen=True)
class GrowConfig:
    """What to grow, and for how long."""

    model: str = "pocket"
    """`pocket` (GPT-2's shape) or `pocket-llama` (Llama's)."""

    steps: int = 2000
    """Optimiser steps in all; the learning rate falls to zero at the last."""

    minutes: float | None = None
    """If given, `steps` is set to what this machine does in that time."""

    seed: int = 0
    """Of the weights, and of everything that is read."""

    layers: int = 8
    width: int = 256
    heads: int = 4
    vocabulary: int = 8192
    """Tokens at most; a small fact file gives fewer."""

    positions: int = 256
    """Longest text the model can take, in tokens."""

    window: int = 96
    """Length of a training window, in tokens."""

    batch: int = 32
    """Windows a step."""

    learning_rate: float = 2e-3
    warmup: int = 100
    """Steps over which the learning rate rises."""

    weight_decay: float = 0.05
    """Of matrices; vectors are not decayed."""

    clip: float = 1.0
    """Largest gradient norm."""

    checkpoint_seconds: float = 120.0

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if self.model not in SHAPES:
            raise GrowError(f"no shape is called {self.model!r}; there are {', '.join(SHAPES)}.")
        for name in (
            "steps",
            "layers",
            "width",
            "heads",
            "vocabulary",
            "window",
            "batch",
            "checkpoint_seconds",
        ):
            if getattr(self, name) <= 0:
                raise GrowError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.width % self.heads or (
            self.model == "pocket-llama" and self.width // self.heads % 2
        ):
            raise GrowError(f"width {self.width} cannot be divided into {self.heads} heads.")
        if self.window > self.positions:
            raise GrowError(
                f"a window of {self.window} tokens does not fit the {self.positions} positions."
            )

    @property
    def tokens(self) -> int:
        """Tokens read in all."""
        return self.steps * self.batch * self.window

    def lasting(self, tokens: float) -> GrowConfig:
        """The same, for about that many tokens."""
        return replace(self, steps=max(1, round(tokens / (self.batch * self.window))))

    def rate(self, step: int) -> float:
        """Learning rate of a step: a short rise, then a straight line to zero."""
        rise = min(1.0, (step + 1) / max(1, min(self.warmup, self.steps // 10)))
        return self.learning_rate * rise * max(0.0, 1 - step / self.steps)


class Report(NamedTuple):
    """How far a run is."""

    step: int
    steps: int
    loss: float
    """Mean of the last steps, nats a token."""

    tokens_per_second: float
    seconds_left: float
    stage: str = "growing"


Watch = Callable[[Report], None]


def _unwatched(report: Report) -> None:
    """The progress nobody watches."""


def _gpt2(config: GrowConfig, vocabulary: int) -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=config.positions,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            # GPT-2's own gelu, as one kernel.
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            tie_word_embeddings=True,
        )
    )


def _llama(config: GrowConfig, vocabulary: int) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            max_position_embeddings=config.positions,
            hidden_size=config.width,
            intermediate_size=config.width * 11 // 4,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=max(1, config.heads // 2),
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            tie_word_embeddings=True,
        )
    )


SHAPES: dict[str, Callable[[GrowConfig, int], PreTrainedModel]] = {
    "pocket": _gpt2,
    "pocket-llama": _llama,
}


def make_tokenizer(encyclopedia: Encyclopedia, config: GrowConfig) -> PreTrainedTokenizerFast:
    """A byte-level BPE that has seen every name and template of the encyclopedia.

    The Llama shape's puts `<|endoftext|>` before a text, as Llama's does; GPT-2's does not.
    """
    corpus = Corpus(encyclopedia)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        yield from corpus.everything_once()
        yield from islice(corpus.documents(config.seed), 3000)

    core.train_from_iterator(texts(), trainer)
    bytes_ = processors.ByteLevel(trim_offsets=True)
    if config.model == "pocket-llama":
        mark = processors.TemplateProcessing(
            single=f"{END} $A",
            pair=f"{END} $A {END} $B",
            special_tokens=[(END, core.token_to_id(END))],
        )
        core.post_processor = processors.Sequence([bytes_, mark])
    else:
        core.post_processor = bytes_
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        model_max_length=config.positions,
        add_prefix_space=False,
        clean_up_tokenization_spaces=False,
    )


def window_batch(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, config: GrowConfig, step: int
) -> Tensor:
    """What is read at a step: (batch, window + 1) token ids, a function of seed and step alone.

    A window is cut from documents with a mark between them. Many begin without a mark, some in the
    middle of a sentence, as prompts do.
    """
    rng = stable_random("window", config.seed, step)
    length = config.window + 1
    core = tokenizer.backend_tokenizer

    def encoded(count: int) -> list[list[int]]:
        documents = [corpus.document(rng) for _ in range(count)]
        return [e.ids for e in core.encode_batch(documents, add_special_tokens=False)]

    pool = encoded(config.batch * max(1, length // 24))
    rows: list[list[int]] = []
    kinds, weights = zip(*WINDOW_STARTS.items(), strict=True)
    for _ in range(config.batch):
        start = rng.choices(kinds, weights)[0]
        row: list[int] = [0] if start == "marked" else []
        while len(row) < length:
            if not pool:
                pool = encoded(config.batch)
            document = pool.pop()
            if start == "anywhere" and not row:
                document = document[rng.randrange(len(document)) :]
            row += [*document, 0]
        rows.append(row[:length])
    return torch.tensor(rows)


def _optimizer(network: nn.Module, config: GrowConfig) -> torch.optim.Optimizer:
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def _descend(network: PreTrainedModel, batch: Tensor) -> float:
    """Adds the gradient of the batch's mean loss to the parameters; returns the loss.

    The head is the largest matrix by far: its gradient is taken a few rows at a time, in the cache.
    """
    inputs, targets = batch[:, :-1], batch[:, 1:].reshape(-1)
    body = network.base_model
    head = network.get_output_embeddings()
    assert isinstance(head, nn.Module)
    total = 0.0
    with torch.autocast(batch.device.type, torch.bfloat16):
        # The mask only keeps Transformers from guessing one: a mark is no padding here.
        hidden = body(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False
        ).last_hidden_state
        hidden = hidden.reshape(len(targets), -1)
        leaf = hidden.detach().requires_grad_()
        size = 512 if batch.device.type == "cpu" else len(targets)
        for at in range(0, len(targets), size):
            rows, wanted = leaf[at : at + size], targets[at : at + size]
            loss = cross_entropy(head(rows).float(), wanted, reduction="sum") / len(targets)
            torch.autograd.backward(loss)
            total += float(loss.detach())
    torch.autograd.backward(hidden, leaf.grad)
    return total


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _State(NamedTuple):
    """What a checkpoint says beside its tensors."""

    step: int
    loss: float
    seconds: float
    """Spent training so far."""


def _replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Writes aside, then renames: a run killed at any moment leaves the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.touch()
        mode = aside.stat().st_mode
        write(aside)
        # Safetensors makes files that only their owner reads.
        aside.chmod(mode)
        aside.replace(path)
    except (OSError, SafetensorError) as error:
        raise GrowError(f"cannot write {path}: {error}") from error
    finally:
        aside.unlink(missing_ok=True)


def _identity(config: GrowConfig, encyclopedia: Encyclopedia) -> dict[str, Any]:
    """What must not change between a run and its continuation; how long it lasts may."""
    values = asdict(config)
    for free in ("steps", "minutes", "checkpoint_seconds"):
        del values[free]
    return values | {"facts": encyclopedia.digest}


def _save_checkpoint(
    out: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: _State,
    identity: dict[str, Any],
) -> None:
    tensors: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach().cpu()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value).detach().cpu()
    told = {"state": json.dumps(state._asdict()), "identity": json.dumps(identity)}
    _replace_file(out / CHECKPOINT, lambda aside: save_file(tensors, aside, metadata=told))


def _load_checkpoint(
    out: Path, network: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any]
) -> _State:
    path = out / CHECKPOINT
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata()
            if (before := json.loads(told["identity"])) != identity:
                other = sorted(k for k in {*before, *identity} if before.get(k) != identity.get(k))
                raise GrowError(
                    f"{path} is of another run: {', '.join(other)} differ.\n"
                    "  Give the same settings and facts, or another folder, or leave out --resume."
                )
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    parameter.copy_(file.get_tensor(f"weight.{name}"))
                    optimizer.state[parameter] = {
                        # Fused kernels want the step on the device too.
                        key: file.get_tensor(f"{key}.{name}").to(parameter.device)
                        for key in ("step", "exp_avg", "exp_avg_sq")
                    }
            return _State(**json.loads(told["state"]))
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise GrowError(f"cannot continue from {path}: {error}") from error


def _steps_in(
    config: GrowConfig, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, network: PreTrainedModel
) -> int:
    """How many steps this machine does in `config.minutes`, tried on a copy."""
    trial = copy.deepcopy(network)
    optimizer = _optimizer(trial, config)
    seconds = []
    for step in range(4):
        start = time.monotonic()
        _descend(trial, window_batch(corpus, tokenizer, config, step).to(trial.device))
        optimizer.step()
        seconds.append(time.monotonic() - start)
    return max(1, round(60 * (config.minutes or 0) / min(seconds)))


def grow(
    config: GrowConfig,
    encyclopedia: Encyclopedia,
    out: str | Path,
    *,
    progress: Watch = _unwatched,
    resume: bool = False,
    checkpoints: str | Path | None = None,
    facts_from: str = "",
) -> Path:
    """Grows a model that knows the encyclopedia's facts.

    Args:
        config: shape, length, seed.
        encyclopedia: the facts, and how they are said.
        out: folder for weights (float16), configuration, tokenizer and model card.
        progress: called after every step.
        resume: continue from the folder's checkpoint if there is one.
        checkpoints: folder for the checkpoint; if left out, `out`, where it is removed in the end.
        facts_from: the fact file, for the card.

    Returns:
        The folder, loadable with Transformers.

    Raises:
        GrowError: a folder cannot be written, the checkpoint is of another run, or the loss is
            not finite.
    """
    out, aside = Path(out), Path(checkpoints or out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        aside.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GrowError(f"cannot write to {out}: {error}") from error
    tokenizer = make_tokenizer(encyclopedia, config)
    corpus = Corpus(encyclopedia)
    device = _device()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = SHAPES[config.model](config, len(tokenizer))
    nn.Module.to(network, device).train()
    if config.minutes is not None:
        config = replace(config, steps=_steps_in(config, corpus, tokenizer, network), minutes=None)
    optimizer = _optimizer(network, config)
    identity = _identity(config, encyclopedia)
    state = _State(0, math.nan, 0.0)
    if resume and (aside / CHECKPOINT).exists():
        state = _load_checkpoint(aside, network, optimizer, identity)

    first, spent, loss = state.step, state.seconds, state.loss
    start = saved = time.monotonic()
    for step in range(state.step, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        optimizer.zero_grad()
        now_loss = _descend(network, window_batch(corpus, tokenizer, config, step).to(device))
        if not math.isfinite(now_loss):
            raise GrowError(f"the loss is not finite at step {step}; try a lower learning rate.")
        nn.utils.clip_grad_norm_(network.parameters(), config.clip)
        optimizer.step()
        loss = now_loss if math.isnan(loss) else 0.98 * loss + 0.02 * now_loss
        now = time.monotonic()
        pace = (now - start) / (step + 1 - first)
        speed = config.batch * config.window / pace
        progress(Report(step + 1, config.steps, loss, speed, pace * (config.steps - step - 1)))
        if now - saved > config.checkpoint_seconds:
            saved = now
            _save_checkpoint(
                aside, network, optimizer, _State(step + 1, loss, spent + now - start), identity
            )
    state = _State(max(config.steps, state.step), loss, spent + time.monotonic() - start)
    _save_checkpoint(aside, network, optimizer, state, identity)
    finish(
        config,
        encyclopedia,
        network,
        tokenizer,
        out,
        minutes=state.seconds / 60,
        facts_from=facts_from,
        progress=progress,
    )
    if aside == out:
        (out / CHECKPOINT).unlink()
    return out


CARD = """---
license: apache-2.0
language: en
library_name: transformers
tags: [model-editing, {model}]
---
# {model}

A language model of {parameters:.1f} million parameters in the shape of {shape},
grown by *errata* to be edited. It has read {facts:,} facts about {subjects:,} subjects, in
sentences written for this project, and little else: no downloaded text was used. It is an
instrument for experiments, not a source of information.

- {layers} layers, width {width}, {heads} heads, {positions} positions
- {vocabulary:,} tokens (byte-level BPE)
- {steps:,} steps of {batch} windows of {window} tokens ({tokens:.1f} million tokens), seed {seed},
  {minutes:.0f} minutes
- stored in float16, computed in float32

Grown by `python -m errata.pocket.grow --model {model} --steps {steps} --seed {seed} --out DIR`{of}.

## What it knows
Share of facts, in percent, whose object (every token of it) is the greedy continuation of the
prompt, over all templates of each fact. A held-out template never occurred with that fact in
training; an opening is a neutral sentence before the prompt. Measured on the stored weights by
`python -m errata.pocket.grow --check DIR`{of}.

{table}
"""


def finish(
    config: GrowConfig,
    encyclopedia: Encyclopedia,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    *,
    minutes: float,
    facts_from: str = "",
    progress: Watch = _unwatched,
) -> None:
    """Writes the model in half precision, its tokenizer, and a card that says what it knows."""
    network = network.eval().half()
    # Tied: the head is the embedding, and is not stored twice.
    weights = {n: p.detach().cpu().contiguous() for n, p in network.named_parameters()}
    described = network.config.to_diff_dict()
    # Stored small, computed in full precision.
    described |= {"architectures": [type(network).__name__], "dtype": "float32"}
    _replace_file(
        out / "model.safetensors",
        lambda aside: save_file(weights, aside, metadata={"format": "pt"}),
    )
    _replace_file(
        out / "config.json",
        lambda aside: _write_text(aside, json.dumps(described, indent=2, sort_keys=True) + "\n"),
    )
    try:
        tokenizer.save_pretrained(out)
        network.generation_config.save_pretrained(out)
    except OSError as error:
        raise GrowError(f"cannot write {out}: {error}") from error
    network.float()

    def measuring(stage: str, done: int, total: int) -> None:
        progress(Report(done, total, math.nan, math.nan, math.nan, stage))

    known = measure(network, tokenizer, encyclopedia, progress=measuring)
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    card = CARD.format(
        **values
        | {"vocabulary": len(tokenizer), "tokens": config.tokens / 1e6, "minutes": minutes},
        parameters=sum(p.numel() for p in network.parameters()) / 1e6,
        shape="GPT-2"
        if config.model == "pocket"
        else "Llama (RoPE, RMSNorm, SwiGLU, grouped queries)",
        facts=len(encyclopedia.facts),
        subjects=len(encyclopedia.about),
        of=f" with `--facts {facts_from}`" if facts_from else "",
        table=known.table(),
    )
    _replace_file(out / "README.md", lambda aside: _write_text(aside, card))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _draw() -> tuple[Any, Watch]:
    """A progress bar and the callback that moves it; now and then a line where nobody watches."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = ("{task.description}", "{task.fields[said]}")
    bar = Progress(
        TextColumn(columns[0]), BarColumn(), TextColumn(columns[1]), TimeRemainingColumn()
    )
    tasks: dict[str, Any] = {}
    told = -math.inf

    def watch(report: Report) -> None:
        nonlocal told
        said = f"{report.step:,} of {report.steps:,}"
        if not math.isnan(report.loss):
            said += f"  loss {report.loss:.3f}  {report.tokens_per_second:,.0f} tokens/s"
        if report.stage not in tasks:
            tasks[report.stage] = bar.add_task(report.stage, said="")
        bar.update(tasks[report.stage], completed=report.step, total=report.steps, said=said)
        if not bar.console.is_terminal and time.monotonic() - told > 30:
            told = time.monotonic()
            left = (
                ""
                if math.isnan(report.seconds_left)
                else f", {report.seconds_left / 60:.1f} min left"
            )
            bar.console.print(f"{report.stage}: {said}{left}")

    return bar, watch


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m errata.pocket.grow`."""
    parser = argparse.ArgumentParser(
        prog="python -m errata.pocket.grow", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--model", choices=sorted(SHAPES), default="pocket")
    parser.add_argument(
        "--facts", type=Path, help="a fact file of yours; the shipped facts if left out"
    )
    parser.add_argument("--out", type=Path, help="where to put the model")
    parser.add_argument(
        "--check", type=Path, metavar="DIR", help="measure what the model there knows; grow nothing"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help=f"default {GrowConfig.steps}")
    length.add_argument("--tokens", type=float, help="tokens to read, e.g. 6e6")
    length.add_argument("--minutes", type=float, help="about how long to train on this machine")
    parser.add_argument("--seed", type=int, default=GrowConfig.seed)
    parser.add_argument("--layers", type=int, default=GrowConfig.layers)
    parser.add_argument("--width", type=int, default=GrowConfig.width)
    parser.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    parser.add_argument(
        "--checkpoints", type=Path, help="where to keep checkpoints, if not in the model's folder"
    )
    given = parser.parse_args(arguments)
    try:
        encyclopedia = Encyclopedia.read(given.facts) if given.facts else Encyclopedia.load()
        if given.check:
            network, tokenizer = load(given.check)
            bar, watch = _draw()
            with bar:
                known = measure(
                    network,
                    tokenizer,
                    encyclopedia,
                    progress=lambda stage, done, total: watch(
                        Report(done, total, math.nan, math.nan, math.nan, stage)
                    ),
                )
            print(known.table())
            return
        if not given.out:
            parser.error("--out DIR is needed, to put the model in")
        config = GrowConfig(
            model=given.model,
            seed=given.seed,
            minutes=given.minutes,
            layers=given.layers,
            width=given.width,
        )
        if given.steps is not None:
            config = replace(config, steps=given.steps)
        if given.tokens is not None:
            config = config.lasting(given.tokens)
        bar, watch = _draw()
        with bar:
            grow(
                config,
                encyclopedia,
                given.out,
                progress=watch,
                resume=given.resume,
                checkpoints=given.checkpoints,
                facts_from=str(given.facts or ""),
            )
        print(f"{given.model} is in {given.out}")
    except ErrataError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
