"""Prompts for the server benchmark: random, conversations, or from a file or data set."""

import json
import math
import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from twofold.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class Prompt:
    content: str | list[int]
    num_tokens: int
    max_tokens: int
    history: list[dict[str, str]] = field(default_factory=list)  # what was said before, as a chat's messages
    later: list[str] = field(default_factory=list)  # what the same user says after each answer
    turn: int = 1

    def next(self, answer: str) -> "Prompt":
        """The next turn of a conversation: all that was said, and more."""
        assert isinstance(self.content, str)
        history = [*self.history, {"role": "user", "content": self.content}, {"role": "assistant", "content": answer}]
        return Prompt(self.later[0], 0, self.max_tokens, history, self.later[1:], self.turn + 1)


def make_prompts(args: Namespace, tokenizer: "PreTrainedTokenizerBase") -> list[Prompt]:
    """Makes `args.num_prompts` prompts, or the first of each conversation, the same for the same seed.

    Raises:
        ConfigError: the file cannot be read, or has no prompts.
    """
    if args.dataset_name == "random":
        return _random_prompts(args, tokenizer)
    if args.dataset_name == "conversations":
        return _conversations(args, tokenizer)
    if args.dataset_path is None:
        raise ConfigError(f"--dataset-name {args.dataset_name} needs --dataset-path", field="dataset_path")
    try:
        text = Path(args.dataset_path).read_text(encoding="utf-8")
        read = _custom if args.dataset_name == "custom" else _sharegpt
        found = list(islice(read(text, args, tokenizer), args.num_prompts))
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"cannot read prompts from {args.dataset_path!r}: {error!r}"
        raise ConfigError(message, field="dataset_path") from None
    if not found:
        raise ConfigError(f"{args.dataset_path!r} has no prompts", field="dataset_path")
    return [found[i % len(found)] for i in range(args.num_prompts)]


def _random_prompts(args: Namespace, tokenizer: "PreTrainedTokenizerBase") -> list[Prompt]:
    rng = np.random.default_rng(args.seed)
    special = set(tokenizer.all_special_ids)
    ids = np.array([token for token in range(len(tokenizer)) if token not in special])
    prefix = rng.choice(ids, args.random_prefix_len)

    def length(mean: int) -> int:
        low, high = mean * (1 - args.random_range_ratio), mean * (1 + args.random_range_ratio)
        return max(int(rng.integers(math.floor(low), math.ceil(high) + 1)), 1)

    prompts = []
    for _ in range(args.num_prompts):
        num_in, num_out = length(args.random_input_len), length(args.random_output_len)
        tokens = np.concatenate([prefix, rng.choice(ids, num_in)]).tolist()
        if args.backend == "openai-chat":
            text = tokenizer.decode(tokens)
            prompts.append(Prompt(text, len(tokenizer.encode(text)), num_out))
        else:
            prompts.append(Prompt(tokens, len(tokens), num_out))
    return prompts


def _conversations(args: Namespace, tokenizer: "PreTrainedTokenizerBase") -> list[Prompt]:
    """The first turns of `args.num_conversations` conversations.

        system: shared prefix | user: own prefix, new text | assistant: answer | user: new text | assistant: answer …

    Text is of words that are one token each, as far as the tokenizer has such words, so lengths are nearly exact.
    """
    rng = np.random.default_rng(args.seed)
    words = [text for text in map(tokenizer.decode, range(len(tokenizer))) if re.fullmatch(" [a-zA-Z]+", text)]

    def text(num_tokens: int) -> str:
        return "".join(rng.choice(words, num_tokens)) if num_tokens else ""

    shared = [text(args.shared_prefix_len) for _ in range(args.num_shared_prefixes)]
    prompts = []
    for i in range(args.num_conversations):
        first, *later = (text(args.turn_len) for _ in range(args.num_turns))
        prefix = shared[i % len(shared)]
        history = [{"role": "system", "content": prefix}] if prefix else []
        num_tokens = args.shared_prefix_len + args.prefix_len + args.turn_len
        prompts.append(Prompt(text(args.prefix_len) + first, num_tokens, args.output_len, history, later))
    return prompts


def _custom(text: str, args: Namespace, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Prompt]:
    for line in _shuffled([line for line in text.split("\n") if line.strip()], args):
        content = str(json.loads(line)["prompt"])
        yield Prompt(content, len(tokenizer.encode(content)), args.custom_output_len)


def _sharegpt(text: str, args: Namespace, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Prompt]:
    """The first question of each conversation. As in vLLM, very short and very long ones are left out."""
    for one in _shuffled(json.loads(text), args):
        turns = one["conversations"]
        if len(turns) < 2:
            continue
        question = turns[0]["value"]
        num_in, num_out = len(tokenizer.encode(question)), args.sharegpt_output_len
        if num_out is None:
            num_out = len(tokenizer.encode(turns[1]["value"]))
            if num_out < 4:
                continue
        if 4 <= num_in <= 1024 and num_in + num_out <= 2048:
            yield Prompt(question, num_in, num_out)


def _shuffled(entries: list[Any], args: Namespace) -> Iterator[Any]:
    return (entries[i] for i in np.random.default_rng(args.seed).permutation(len(entries)))
