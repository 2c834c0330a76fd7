"""A model as ranks run it: Transformers' modules, described by the probe, with their transforms applied."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from twofold.attention.op import ForwardContext, forward_context
from twofold.attention.spec import AttentionSpec
from twofold.errors import ModelError
from twofold.models.probe import probe
from twofold.models.transforms import native
from twofold.models.transforms.base import Transform, transform
from twofold.models.transforms.experts import FewTokenExperts
from twofold.models.transforms.last_layer import CutLastLayer, LastLayer
from twofold.models.transforms.latents import KeepLatents
from twofold.models.transforms.native_stack import Stack
from twofold.models.transforms.packing import PackProjections
from twofold.parallel.sums import Sum, summing


class DecoderModel:
    """A causal language model of Transformers in two halves: token ids to hidden states, hidden states to logits.

    The second half runs only for tokens after which a token is sampled, or a prompt log-probability is wanted.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.body: torch.nn.Module = model.base_model
        self.dtype: torch.dtype = model.dtype
        modules, specs = map(list, zip(*probe(model), strict=True))
        self.attentions: list[torch.nn.Module] = modules
        self.specs: list[AttentionSpec] = specs
        for module, spec in zip(modules, specs, strict=True):
            module.twofold_v_head_dim = spec.v_head_dim
        self.layers = _layers(self.body, len(specs))
        transform(KeepLatents(model, modules, self.specs), self.dtype)
        cut = CutLastLayer(model, self.layers, self.specs)
        self.last_layer: LastLayer | None = cut.last if transform(cut, self.dtype) else None
        self.stack: Stack | None = None  # where our kernel for CPUs runs all layers at once
        self.head: torch.nn.Module = model.get_output_embeddings()
        # Some families embed more ids than they can predict.
        self.vocab_size: int = min(model.get_input_embeddings().num_embeddings, len(self.head.weight))
        self.num_words = len(self.head.weight)
        self.sum: Sum | None = None  # by heads: of the ranks' partial results
        self.words: range | None = None  # of the vocabulary, that this rank's logits are of; None: all
        # The family's own code after the hidden states (scales, softcaps) runs on the ones given here.
        self._given = _Given()
        setattr(model, model.base_model_prefix, self._given)
        try:
            with torch.inference_mode():
                weight = self.head.get_parameter("weight")
                self.logits(weight.new_zeros(1, weight.shape[1]))
        except Exception as error:
            raise ModelError(f"{type(model).__name__} is not served: its head cannot run apart ({error})") from error

    def optimize(self, num_ranks: int, enforce_eager: bool) -> None:
        """Applies the transforms for GPUs."""
        changes: list[Transform] = [FewTokenExperts(self.body)]
        if not enforce_eager and self.layers is not None:
            changes.append(PackProjections(self.layers, num_ranks))
        for change in changes:
            transform(change, self.dtype)

    def optimize_for_cpu(self) -> None:
        """Applies the transforms for CPUs, once our kernels are there."""
        for change in native.CHANGES:
            transform(change(torch.nn.ModuleList([self.body, self.head])), self.dtype)
        transform(Stack(self), self.dtype)

    def compile(self) -> None:
        """Compiles layers in place, at their first call."""
        if self.layers is not None:
            from twofold.models.transforms.compile import CompileLayers  # the compiler takes seconds to import

            transform(CompileLayers(self.layers), self.dtype)

    def hidden_states(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, context: ForwardContext, needs_all: bool
    ) -> torch.Tensor:
        """input_ids [N], position_ids [N] → [N, hidden_size], or [V', hidden_size] of each row's last token only."""
        if self.stack is not None and self.stack.serves(len(input_ids), context):
            hidden = self.stack.run(input_ids, position_ids, context)
            return hidden if needs_all else hidden[context.metadata.last_token_idx()]
        with forward_context(context), summing(self.sum):
            if needs_all:
                return self._run(input_ids, position_ids)
            if self.last_layer is None:
                return self._run(input_ids, position_ids)[context.metadata.last_token_idx()]
            with self.last_layer.of_last_tokens(context):
                return self._run(input_ids, position_ids)

    def _run(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.body(input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False)[0]
        return hidden[0]

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [S, hidden_size] → [S, vocab_size], or [S, len(self.words)]."""
        self._given.hidden_states = hidden_states[None]
        logits: torch.Tensor = self.model(
            input_ids=hidden_states.new_zeros(1, len(hidden_states), dtype=torch.long)
        ).logits
        return logits[0]


def _layers(body: torch.nn.Module, num_attentions: int) -> torch.nn.ModuleList | None:
    """The list of modules with one module for each attention; None if there is none."""
    lists = (module for module in body.modules() if isinstance(module, torch.nn.ModuleList))
    return next((modules for modules in lists if len(modules) == num_attentions), None)


class _Given(torch.nn.Module):
    """Stands in for the layers: returns hidden states that were computed before."""

    hidden_states: torch.Tensor

    def forward(self, *args: Any, **kwargs: Any) -> "_Output":
        return _Output(last_hidden_state=self.hidden_states)

    @property
    def decoder(self) -> "_Given":
        """Some families' heads call the decoder within the base model."""
        return self


class _Output(BaseModelOutputWithPast):  # type: ignore[misc]
    """Some families pass on other outputs of their layers; here these are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None
