"""Show what a packed model writes, on the CPU.

    python records/records.py sample runs/ID/final_model.int6.ptz --prompt "The river"

For the pleasure, and as a check that the artifact is a language model: the same prompt, seed,
temperature and torch give the same text. A text ends where the model begins another document.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from artifact import Artifact, find_tokenizer, open_artifact
from logs import LogError
from product import script

MOST_TOKENS, MOST_TEXTS = 2000, 64
LEAST_TEMPERATURE = 1e-6  # below it logits overflow; 0 is told apart
SEEDS = (-2 ** 63, 2 ** 64 - MOST_TEXTS)  # what torch takes; each text has the next one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--prompt", default="", metavar="TEXT",
                        help="what the text begins with (default: nothing, as a document begins)")
    parser.add_argument("--tokens", type=int, default=64, help="at most so many a text")
    parser.add_argument("--number", type=int, default=3, help="of texts")
    parser.add_argument("--temperature", type=float, default=0.8,
                        help="0: always the likeliest; 1: as the model has it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, metavar="FILE",
                        help="default: TOKENIZER_PATH, or the one that the run used")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")


def next_tokens(logits, temperature: float, generators) -> list[int]:
    """Return a token per row of logits (B, V), drawn at a temperature; 0 takes the likeliest."""
    import torch
    if temperature == 0:
        return logits.argmax(-1).tolist()
    shares = (logits.double() / temperature).softmax(-1)
    return [int(torch.multinomial(row, 1, generator=generator))
            for row, generator in zip(shares, generators)]


class Memory:
    """Keys and values of the tokens read so far, so that each token goes through the model once.

    A forward calls attention once per entry of the layout, always in the same order.
    """

    def __init__(self) -> None:
        self.held: list[tuple[Any, Any]] = []
        self.call, self.length = 0, 0  # of attention in this forward; tokens read

    def attend(self, q_BTHK, k_BTGK, v_BTGK):
        import torch
        if self.call < len(self.held):
            pairs = zip(self.held[self.call], (k_BTGK, v_BTGK))
            k_BTGK, v_BTGK = (torch.cat(pair, dim=1) for pair in pairs)
            self.held[self.call] = k_BTGK, v_BTGK
        else:
            self.held.append((k_BTGK, v_BTGK))
        self.call += 1
        return script().attention_sdpa(q_BTHK, k_BTGK, v_BTGK)

    def logits(self, model, layout, rows):
        """Return the logits (B, V) behind rows (B, T), of which earlier calls read the first."""
        product, begin, end = script(), self.length, rows.shape[1]
        self.call, self.length = 0, end
        # positions go on where reading stopped, and the first token still sees the one before
        tables = {end - begin: tuple(table[begin:] for table in model.rotary(end))}
        tokens, before = rows[:, begin:], rows[:, max(0, begin - 1):]
        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.object(model, "tables", tables))
            if model.smear is not None:
                seen = model.smear(model.tok_emb(before), before)[:, before.shape[1] - end + begin:]
                patches.enter_context(mock.patch.object(model.smear, "forward", lambda *_: seen))
            return model.logits(product.Batch(tokens, tokens[:, -1:]), layout)[:, -1]


def write_tokens(artifact: Artifact, start: list[int], number: int, tokens: int,
                 temperature: float, seed: int) -> list[list[int]]:
    """Return `number` continuations of `start`, each ended before a document's first token.

    Where the window is full, reading begins anew with its later half.
    """
    import torch
    memory = Memory()
    model, layout = artifact.model(attend=memory.attend)
    # beyond the training length the rotary base depends on the length: nothing could be kept
    window = min(artifact.config.eval_seq_len, artifact.config.train_seq_len)
    ends, rows, first = start[0], torch.tensor([start] * number), 0
    generators = [torch.Generator().manual_seed(seed + i) for i in range(number)]
    with torch.inference_mode():
        for _ in range(tokens):
            if rows.shape[1] - first > window:
                first, memory.held, memory.length = rows.shape[1] - window // 2, [], 0
            logits = memory.logits(model, layout, rows[:, first:])
            drawn = next_tokens(logits, temperature, generators)
            rows = torch.cat([rows, torch.tensor(drawn)[:, None]], dim=1)
            if bool((rows[:, len(start):] == ends).any(-1).all()):
                break
    texts = [row[len(start):] for row in rows.tolist()]
    return [text[:text.index(ends)] if ends in text else text for text in texts]


def samples(artifact: Artifact, tokenizer: Path, prompt: str = "", **how: Any) -> Iterator[str]:
    """Yield what a model writes behind a prompt; see `write_tokens` for the rest."""
    processor = script().load_tokenizer(tokenizer)
    start = [processor.bos_id(), *processor.encode(prompt)]
    for tokens in write_tokens(artifact, start, **how):
        text = processor.decode(start[1:] + tokens)
        shown = processor.decode(start[1:])
        yield text[len(shown):] if text.startswith(shown) else text


def run(args: argparse.Namespace) -> int:
    for name, low, high in (("tokens", 1, MOST_TOKENS), ("number", 1, MOST_TEXTS),
                            ("temperature", 0, 100), ("seed", *SEEDS)):
        if not low <= (value := getattr(args, name)) <= high or not math.isfinite(value):
            raise LogError(f"--{name} {value}: must be from {low} to {high}")
    if 0 < args.temperature < LEAST_TEMPERATURE:
        raise LogError(f"--temperature {args.temperature}: must be 0 or at least "
                       f"{LEAST_TEMPERATURE}")
    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        raise LogError(f"--prompt {args.prompt!a}: is no UTF-8 text") from None
    since, artifact = time.perf_counter(), open_artifact(args.artifact)
    tokenizer = find_tokenizer(artifact, args.tokenizer)
    texts = list(samples(artifact, tokenizer, args.prompt, number=args.number, tokens=args.tokens,
                         temperature=args.temperature, seed=args.seed))
    if args.json:
        print(json.dumps(dict(prompt=args.prompt, seed=args.seed, temperature=args.temperature,
                              texts=texts), indent=1))
        return 0
    for i, text in enumerate(texts):
        print(f"--- {i + 1} of {len(texts)}, seed {args.seed + i}\n{args.prompt}{text}")
    print(f"--- {time.perf_counter() - since:.1f} s, temperature {args.temperature:g}")
    return 0
