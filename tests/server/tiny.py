"""A model of random weights with a tokenizer and a chat template, small enough to start in a second."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "A rank is lost, the others wait; nothing that was said is lost with it.",
    "Twofold cuts a prompt in chunks: heads and tails, and every rank has one of both.",
    "Grüße aus Köln, où l'été est court — 東京 🦊🦊",
]
CHAT_TEMPLATE = (
    "{% if tools %}<|tools|>{{ tools | tojson }}<tool_call>{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'system' and not loop.first %}{{ raise_exception('system must come first') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKS = "<think>{% if enable_thinking is false %}</think>{% endif %}"


def save_tiny_model(
    folder: Path, *, hidden_size: int = 64, num_layers: int = 2, max_positions: int = 2048, thinks: bool = False
) -> Path:
    """Writes the model to `folder`: the same weights each time. With `thinks`, its template begins a reasoning."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(SENTENCES * 20, trainer)
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    if thinks:
        tokenizer.add_tokens(["<think>", "</think>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE + (THINKS if thinks else "")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        initializer_range=0.2,  # sharp enough for answers that vary and do not hang on rounding
        eos_token_id=fast.eos_token_id,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder
