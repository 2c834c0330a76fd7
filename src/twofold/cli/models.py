"""list which model types of Transformers are served, and why not the others

A type is served if its configuration gives no reason against it. A model's directory is served if, in addition, all its
weights are understood: their files are complete, of full precision, and hold exactly the tensors that the model's code
uses. A model is checked again when it is loaded: it runs twice without attention, and is refused if its tokens still
affect each other. A type that is not known here is refused, never answered wrongly.
"""

import json
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from twofold.config import EngineConfig
from twofold.errors import ModelError

CHECKED_AGAIN = "A served type is checked once more when a model of it is loaded: only attention may mix its tokens."
WORDS = {True: ("served", "green"), False: ("refused", "red"), None: ("unknown", "yellow")}
BY_DEFAULT = "Types are judged by their default configuration; a model's own may differ: twofold models DIRECTORY"


def configure(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="TYPE_OR_MODEL", help="only this type, or the model of this directory or hub name"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--json", action="store_true", help="one JSON object a model type and line")


@dataclass(frozen=True, slots=True)
class Verdict:
    """On a model type. `served` is None where the default configuration cannot be made."""

    model_type: str
    served: bool | None
    reason: str | None = None
    only_by_tokens: str | None = None  # why no step of a served type runs by heads


def run(args: Namespace) -> int:
    import transformers

    from twofold.models.support import causal_model_types

    transformers.logging.set_verbosity_error()
    if args.model is None:
        verdicts = [judge(model_type) for model_type in causal_model_types()]
    else:
        verdicts = [_judge_one(args.model, args.trust_remote_code)]
    if args.json:
        for verdict in verdicts:
            print(json.dumps(asdict(verdict)))
    else:
        _show(verdicts, None if args.model else transformers.__version__)
    return 1 if args.model is not None and not verdicts[0].served else 0


def judge(model_type: str) -> Verdict:
    """Whether models of this type are served, by their default configuration."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(model_type)
    except Exception:  # each family checks its configuration in its own way
        return Verdict(model_type, None, "it has no default configuration to judge by; name a model's directory")
    return _judge_config(config)


def _judge_one(name: str, trust_remote_code: bool) -> Verdict:
    from transformers import CONFIG_MAPPING

    if name in CONFIG_MAPPING and not Path(name).is_dir():
        return judge(name)
    from twofold.models.checkpoint import has_weights
    from twofold.models.source import check_weights, load_config, resolve
    from twofold.models.support import model_class

    if "/" not in name and not Path(name).exists() and name != "demo":
        raise ModelError(
            f"{name!r} is neither a model type of Transformers, nor a directory, nor a hub name", field="model"
        )
    source = resolve(EngineConfig(model=name, load_format="dummy"))  # a directory without weights will do
    config = load_config(source, trust_remote_code)
    verdict = _judge_config(config, trust_remote_code)
    cls = model_class(config, trust_remote_code)
    if verdict.served and cls is not None and (not Path(name).is_dir() or has_weights(Path(name))):
        try:
            check_weights(source, config, cls)
        except ModelError as error:
            return Verdict(config.model_type, False, str(error))
    return verdict


def _judge_config(config: Any, trust_remote_code: bool = False) -> Verdict:
    from twofold.models.support import ONLY_BY_TOKENS, refusal

    if reason := refusal(config, trust_remote_code):
        return Verdict(config.model_type, False, reason)
    return Verdict(config.model_type, True, only_by_tokens=ONLY_BY_TOKENS.get(config.model_type))


def _show(verdicts: list[Verdict], version: str | None) -> None:
    console = Console(highlight=False, soft_wrap=True)
    width = max(len(verdict.model_type) for verdict in verdicts)
    for verdict in sorted(verdicts, key=lambda verdict: (not verdict.served, verdict.served is None)):
        word, style = WORDS[verdict.served]
        line = Text(f"{word:8}", style=style).append(verdict.model_type, style="default")
        by_tokens = verdict.only_by_tokens and f"all steps run by tokens: {verdict.only_by_tokens}"
        if note := verdict.reason or by_tokens:
            line.pad_right(width - len(verdict.model_type) + 2)
            line.append(note, style="dim")
        console.print(line)
    console.print()
    if version is not None:
        num_served = sum(verdict.served is True for verdict in verdicts)
        console.print(f"{num_served} of the {len(verdicts)} causal model types of Transformers {version} are served.")
        console.print(BY_DEFAULT)
    console.print(CHECKED_AGAIN)
