"""Checks that all of a checkpoint is understood. If its files do not match the model's code, it is refused.

`weight_files` looks at a directory, `check_checkpoint` at the headers of its files. They read no weights, so most
faults are found before a rank starts. `check_loaded`, `check_numbers` and `check_tied` run once a rank has loaded the
weights.
"""

import contextlib
import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import product, takewhile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel

from twofold.errors import ModelError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # what Transformers reads, in this order
PICKLED = "pytorch_model*.bin"
FOREIGN_WEIGHTS = ("*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack", "*.npz")
# Files in which other programs describe the quantisation of a checkpoint.
QUANTISATION_FILES = {
    "hf_quant_config.json": "ModelOpt",
    "quantize_config.json": "AutoGPTQ",
    "quant_config.json": "AutoAWQ",
}
# quant_method -> the library that Transformers needs for it; other methods need none.
LIBRARIES = {
    "aqlm": "aqlm",
    "auto-round": "auto-round",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "kernels",
    "fbgemm_fp8": "fbgemm-gpu",
    "fp_quant": "fp_quant",
    "gptq": "gptqmodel",
    "higgs": "flute-kernel",
    "hqq": "hqq",
    "quanto": "optimum-quanto",
    "quark": "amd-quark",
    "spqr": "spqr_quant",
    "torchao": "torchao",
    "vptq": "vptq",
}
UNQUANTISED = "serve the unquantised checkpoint, or a GGUF file"
FULL_PRECISION = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What unused tensors are, by their names.
KINDS = (
    (re.compile(r"lora_"), "they are of an adapter; merge it into its base model"),
    (re.compile(r"scale|zero|qweight|g_idx|absmax|quant|packed"), f"they are of a quantised checkpoint; {UNQUANTISED}"),
    (re.compile(r"\.bias$"), "config.json declares no such biases; get the files of one model, and all of them"),
)
OTHER_KIND = "config.json is of another model; get the files of one model, and all of them"
# Constants that old checkpoints carry: causal masks and RoPE frequencies, which the model's code makes itself.
CONSTANTS = re.compile(r"(\.attn\.masked_bias|\.attention\.masked_bias|rotary_emb\.inv_freq)$")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file's header."""

    file: Path
    dtype: str  # as safetensors writes it: F32, BF16, F8_E4M3, ...
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} in {self.file.name}"


def weight_files(folder: Path) -> list[Path]:
    """The files that Transformers reads weights from.

    Raises:
        ModelError: there are none, or not all that the index names.
    """
    if (folder / "adapter_config.json").is_file():
        raise _wrong(folder, "has an adapter (adapter_config.json), which would be left out; merge it into the model")
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return _indexed_files(folder)
    if others := sorted(path.name for path in folder.glob("*.safetensors")):
        raise _wrong(
            folder, f"has {others[0]}, but neither {WEIGHTS} nor {INDEX}, by which weights are found; get those files"
        )
    if pickled := sorted(path.name for path in folder.glob(PICKLED)):
        raise _wrong(
            folder,
            f"has no *.safetensors but {pickled[0]}; convert it once: transformers.AutoModelForCausalLM"
            f".from_pretrained({str(folder)!r}, dtype='auto').save_pretrained({str(folder)!r})",
        )
    if foreign := sorted(path.name for pattern in FOREIGN_WEIGHTS for path in folder.glob(pattern)):
        raise _wrong(
            folder,
            f"has no *.safetensors but {foreign[0]}, which is not read; get the model as Transformers saves it",
        )
    raise _wrong(folder, "has no *.safetensors; save weights there, or use load_format='dummy'")


def _indexed_files(folder: Path) -> list[Path]:
    try:
        names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _wrong(
            folder, f"has a {INDEX} that cannot be read ({type(error).__name__}); download it again"
        ) from error
    if not files:
        raise _wrong(folder, f"has a {INDEX} that names no file; download it again")
    if missing := [file.name for file in files if not file.is_file()]:
        raise _wrong(
            folder, f"lacks {len(missing)} of the {len(files)} files of its {INDEX}, such as {missing[0]}; get them too"
        )
    return files


def has_weights(folder: Path) -> bool:
    """Whether a directory has files of weights, of any format."""
    return any(next(folder.glob(pattern), None) for pattern in ("*.safetensors*", PICKLED, *FOREIGN_WEIGHTS))


def check_checkpoint(folder: Path, config: PretrainedConfig, model_class: type[PreTrainedModel]) -> None:
    """Looks at the headers of a model directory's weights.

    Raises:
        ModelError: not all of the checkpoint is understood.
    """
    headers = read_headers(weight_files(folder))
    try:
        _, found = _would_load(headers, config, model_class)
    except Exception as error:
        raise _wrong(folder, _what_does_not_fit(headers) or f"cannot be loaded: {_first_line(error)}") from error
    if name := _narrow_weight(headers, config, model_class):
        raise _wrong(
            folder,
            f"has weights that are not of full precision, and no quantization_config says what they mean: {name} "
            f"({headers[name]}); {UNQUANTISED}",
        )
    check_loaded(folder, config, found, headers)


def _narrow_weight(
    headers: Mapping[str, StoredTensor], config: PretrainedConfig, model_class: type[PreTrainedModel]
) -> str | None:
    """A tensor of 8 bits or of integers that the model would use as a weight. Masks and the like are allowed."""
    narrow = {name for name, tensor in headers.items() if tensor.dtype not in FULL_PRECISION}
    if not narrow:
        return None
    # With a shape that fits nowhere, the report names each tensor that is used.
    unfit = {name: replace(headers[name], shape=(1, 1, 1, 1, *headers[name].shape)) for name in narrow}
    try:
        model, found = _would_load({**headers, **unfit}, config, model_class)
    except Exception:  # a conversion uses one of them
        return min(narrow)
    targets = model.state_dict()
    used = (
        _stored_name(name, unfit)
        for name, _, _ in sorted(found["mismatched_keys"])
        if targets[name].dtype.is_floating_point
    )
    return next((name for name in used if name is not None), None)


def check_quantisation(source: str, config: PretrainedConfig) -> None:
    """Refuses quantised checkpoints, except GGUF files, which Transformers converts to full precision.

    Raises:
        ModelError: the configuration, or another file of the directory, says that the checkpoint is quantised.
    """
    said = getattr(config, "quantization_config", None)
    if said is not None:
        values: Mapping[str, Any] = said if isinstance(said, Mapping) else said.to_dict()
        method = str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
        if method == "None":
            raise _wrong(source, f"has a quantization_config without quant_method; {UNQUANTISED}")
        raise _wrong(source, f"is quantised (quant_method {method!r}), {_library(method)}; {UNQUANTISED}")
    if getattr(config, "compression_config", None) is not None:
        raise _wrong(source, f"is quantised (compression_config), which is not served; {UNQUANTISED}")
    for name, program in QUANTISATION_FILES.items():
        if (Path(source) / name).is_file():
            raise _wrong(source, f"is quantised by {program} ({name}), which is not served; {UNQUANTISED}")


def _library(method: str) -> str:
    """Why a method is not served, and whether a library would help."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if method not in {known.removesuffix("_4bit").removesuffix("_8bit") for known in AUTO_QUANTIZER_MAPPING}:
        return "which Transformers does not know"
    if library := LIBRARIES.get(method):
        try:
            version(library)
        except PackageNotFoundError:
            return f"which is not served: {library} is not installed, and would not be enough"
    return "which is not served"


def read_headers(files: list[Path]) -> dict[str, StoredTensor]:
    """Each tensor's name → where and how it is stored. Reads no data.

    Raises:
        ModelError: a file is broken or incomplete, or two files hold the same tensor.
    """
    headers: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _read_header(file):
            if name in headers:
                raise _wrong(
                    file.parent, f"has the tensor {name} in {headers[name].file.name} and in {file.name}; keep one"
                )
            headers[name] = tensor
    return headers


def _read_header(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        if opened.read(8) == b"version ":
            raise _wrong(file.parent, f"has a Git LFS pointer in place of {file.name}; run: git lfs pull")
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                part = tensors.get_slice(name)
                yield name, StoredTensor(file, part.get_dtype(), tuple(part.get_shape()))
    except Exception as error:
        raise _wrong(
            file.parent,
            f"has a broken or incomplete {file.name} ({size} bytes: {_first_line(error)}); download it again",
        ) from error


def _would_load(
    headers: Mapping[str, StoredTensor], config: PretrainedConfig, model_class: type[PreTrainedModel]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Loads tensors of these shapes on `meta`, with Transformers' renamings and conversions → the model, its report."""
    stored = {
        name: torch.empty(tensor.shape, dtype=FULL_PRECISION.get(tensor.dtype, torch.uint8), device="meta")
        for name, tensor in headers.items()
    }
    with _quiet_transformers():
        model, found = model_class.from_pretrained(
            None,
            config=copy.deepcopy(config),
            state_dict=stored,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    return model, found


def _what_does_not_fit(headers: Mapping[str, StoredTensor]) -> str | None:
    """Finds a fault among tensors with names that differ in numbers only (experts): another shape, or one missing."""
    kinds: dict[str, list[str]] = {}  # name with {} for each number -> names
    for name in headers:
        kinds.setdefault(re.sub(r"\d+", "{}", name), []).append(name)
    for kind, names in kinds.items():
        shapes = [headers[name].shape for name in names]
        usual = max(shapes, key=shapes.count)
        for name in names:
            if headers[name].shape != usual:
                return f"has {name} ({headers[name]}) while others have shape {list(usual)}; download the files again"
        numbers = zip(*(re.findall(r"\d+", name) for name in names), strict=True)
        for each in product(*(sorted(set(places), key=int) for places in numbers)):
            if kind.format(*each) not in headers:
                return (
                    f"lacks {kind.format(*each)}, which is needed with the others of its kind; download the files again"
                )
    return None


def check_loaded(
    source: Path | str,
    config: PretrainedConfig,
    found: Mapping[str, Any],
    headers: Mapping[str, StoredTensor] | None = None,
) -> None:
    """`found` is the loading report of `from_pretrained`: tensors that are unused, missing, or of other shapes.

    Raises:
        ModelError: there is one.
    """
    headers = headers or {}
    if unused := sorted(name for name in found["unexpected_keys"] if not _is_known(name, config)):
        name = next((name for name in unused if "scale" in name), unused[0])
        stored = _stored_name(name, headers)
        shown = name if stored is None else f"{stored} ({headers[stored]})"
        kind = next((kind for pattern, kind in KINDS if pattern.search(name)), OTHER_KIND)
        raise _wrong(source, f"has {_count(unused)} that the model does not use, such as {shown}: {kind}")
    if missing := sorted(found["missing_keys"]):
        raise _wrong(
            source, f"lacks {_count(missing)} that the model needs, such as {missing[0]}; download the files again"
        )
    if wrong := sorted(found["mismatched_keys"]):
        name, stored_shape, shape = wrong[0]
        stored = _stored_name(name, headers)
        where = "" if stored is None else f" in {headers[stored].file.name}"
        raise _wrong(
            source,
            f"has {name} of shape {list(stored_shape)}{where}, where config.json asks for {list(shape)}; "
            "get the files of one model, and all of them",
        )


def _count(names: list[str]) -> str:
    return "a tensor" if len(names) == 1 else f"{len(names)} tensors"


def _is_known(name: str, config: PretrainedConfig) -> bool:
    """Whether a tensor may go unused: a constant, or part of a layer that only predicts tokens further ahead (MTP)."""
    if CONSTANTS.search(name):
        return True
    num_layers = getattr(config, "num_hidden_layers", None)
    num_further = getattr(config, "num_nextn_predict_layers", None)
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer is None or not isinstance(num_layers, int) or not isinstance(num_further, int):
        return False
    return num_layers <= int(layer[1]) < num_layers + num_further


def _stored_name(name: str, headers: Mapping[str, StoredTensor]) -> str | None:
    """The name in the files of the model's tensor `name`: the most similar of those that end in the same word."""
    if name in headers:
        return name
    word = name.rpartition(".")[2]

    def likeness(other: str) -> int:
        pairs = zip(name, other, strict=False), zip(name[::-1], other[::-1], strict=False)
        return sum(1 for both in pairs for _ in takewhile(lambda letters: letters[0] == letters[1], both))

    return max((other for other in headers if other.rpartition(".")[2] == word), key=likeness, default=None)


@torch.no_grad()
def check_numbers(source: Path | str, weights: Mapping[str, torch.Tensor]) -> None:
    """Looks at each weight once, on the device where it is. `weights` by their names, such as a `state_dict`.

    Raises:
        ModelError: a weight is NaN or infinite.
    """
    once = {id(weight): (name, weight) for name, weight in weights.items()}  # tied ones
    named = [(name, weight) for name, weight in once.values() if weight.is_floating_point() and weight.numel()]
    if not named:
        return
    ends = torch.stack([torch.stack(torch.aminmax(weight.detach())).float() for _, weight in named]).cpu()  # [N, 2]
    if broken := (~ends.isfinite()).any(1).nonzero().flatten().tolist():
        (name, weight), is_nan = named[broken[0]], bool(ends[broken[0]].isnan().any())
        many = f" and {len(broken) - 1} others" if len(broken) > 1 else ""
        too_large = weight.dtype == torch.float16 and not is_nan
        raise _wrong(
            source,
            f"has {'NaN' if is_nan else 'infinite numbers'} in the tensor {name}{many}; "
            + ("float16 may be too narrow for it: try dtype='bfloat16'" if too_large else "download the files again"),
        )


def check_tied(source: Path | str, model: PreTrainedModel, expected: PreTrainedModel) -> None:
    """Compares the loaded model's parameters with those of a model made from the configuration only.

    Raises:
        ModelError: the configuration ties tensors that are stored with different values.
    """
    names = {name for name, _ in expected.named_parameters()}
    if apart := [name for name, _ in model.named_parameters() if name not in names]:
        raise _wrong(
            source,
            f"has {apart[0]} with values of its own, but config.json ties it to the token embeddings; if it is meant "
            "to differ, set tie_word_embeddings to false there",
        )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silences Transformers' report and progress bars; Twofold reports in one line."""
    logging = transformers.utils.logging
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def _wrong(source: Path | str, what: str) -> ModelError:
    return ModelError(f"model {str(source)!r} {what}", field="model")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
