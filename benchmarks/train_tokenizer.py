"""Train a tokenizer of any size, for a model without one: byte-level BPE like Llama 3's, on text of Python packages.

    python benchmarks/train_tokenizer.py --vocab-size 128256 --output DIR

Reads the sources and pages of the packages beside it until --megabytes are read; real words and code, so that a
vocabulary has as many prefixes in common as a real one. Takes about a minute.
"""

import argparse
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|end_of_text|>"
WORDS = (  # letters, up to three digits, marks with the line's end, and spaces, as Llama 3 splits them
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--megabytes", type=int, default=200, help="of text to train on")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = Tokenizer(models.BPE())
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts(args.megabytes * 1_000_000), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(args.output)
    print(f"{tokenizer.get_vocab_size()} tokens in {args.output}")


def texts(most: int) -> Iterator[str]:
    """Files of text beside the installed packages, in the order of their names, up to so many characters."""
    for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*")):
        if path.suffix in {".py", ".pyi", ".md", ".rst", ".txt"} and path.is_file():
            text = path.read_text(errors="ignore")
            yield text
            if (most := most - len(text)) < 0:
                return


if __name__ == "__main__":
    main()
