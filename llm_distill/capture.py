"""Reading signals from a Hugging Face model: only those asked for, only those layers.

The backbone runs, never the head: rows are selected from the last hidden state, and the head is
applied where the rows are consumed. What cannot be given is refused when the reader is made, by
name, from one run on a few tokens.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from llm_distill.attention_tap import Tap, clear, discover, install, mark
from llm_distill.lm_head import head_of, last_norm
from llm_distill.placement.joining import joined, part_of, parts
from llm_distill.placement.sharding import run_backbone
from llm_distill.signals import (
    Dense,
    Factored,
    ModelSpec,
    Request,
    Signals,
    Whole,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel

    from llm_distill.attention import Heads
    from llm_distill.placement.spreading import Spread
    from llm_distill.rows import Batch
    from llm_distill.signals import Head

PROBE_TOKENS = 8


def plain(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, adapters in place."""
    unwrap = getattr(model, "get_base_model", None)
    return cast("PreTrainedModel", unwrap() if callable(unwrap) else model)


def predicts_next(model: nn.Module) -> bool:
    """Whether position t predicts token t + 1 (causal) or token t (masked)."""
    name = type(plain(model)).__name__
    return "ForMaskedLM" not in name and "ForPreTraining" not in name


class Reader:
    """Reads the requested signals from one model.

    Attributes:
        name: For messages.
        request: What it was made for.
    """

    def __init__(
        self, model: nn.Module, request: Request, name: str, *, spread: Spread | None = None
    ) -> None:
        """Bind, and refuse what the model cannot give.

        Args:
            model: A transformers or PEFT model.
            request: What will be read.
            name: For messages.
            spread: The processes that compute its layers together, where there are several.

        Raises:
            ValueError: Naming the model, the signal and the layer.
        """
        self.name = name
        self.request = request
        self._model = model
        self._spread = spread
        _refuse_prompts(model, name)
        refuse_layers(request, ModelSpec.of(plain(model).config, name))
        self._taps: dict[int, Tap] = {}
        self._norm: nn.Module | None = None
        self._probe()

    def read(self, batch: Batch, *, extra: Request | None = None) -> Signals:
        """Run the backbone on a batch.

        Args:
            batch: Inputs and rows.
            extra: Asked besides, for this batch alone (logits for an evaluation).
        """
        return self.read_all([batch], extra=extra)[0]

    def read_all(self, batches: Sequence[Batch], *, extra: Request | None = None) -> list[Signals]:
        """Run the backbone once on several batches, side by side; signals of each.

        Args:
            batches: Inputs and rows.
            extra: As for `read`.
        """
        request = self.request if extra is None else self.request | extra
        batch = joined(batches)
        wide = batch if self._spread is None else self._spread.widened(batch)
        caught, last = self._run(wide.inputs, wide, request)
        layers = request.hidden | request.exits
        hidden = {layer: self._own(caught.hidden_states[layer], batch) for layer in layers}
        # In order: under tensor parallelism each layer is an exchange that all take part in.
        heads = {layer: self._caught(layer, batch) for layer in sorted(request.heads)}
        last = self._own(last, batch)
        head = head_of(plain(self._model)) if request.logits or request.exits else None
        found = []
        for part, sequences, places, length in parts(batches):
            cut = partial(part_of, sequences=sequences, length=length)
            whole: Whole | None = None
            exits: dict[int, Whole] = {}
            if head is not None:
                said = partial(self._said, head=head, index=part.supervised.index)
                whole = said(cut(last)) if request.logits else None
                exits = {k: said(self._normed(cut(hidden[k]))) for k in request.exits}
            states = {layer: cut(hidden[layer]) for layer in request.hidden}
            attention = {k: value.part(sequences, places, length) for k, value in heads.items()}
            found.append(Signals(self.name, whole, states, attention, exits=exits))
        return found

    def _said(self, states: Tensor, *, head: Head, index: Tensor) -> Whole:
        """Distributions of the rows of one batch."""
        return self._distribution(states.flatten(0, 1).index_select(0, index), head)

    def _normed(self, states: Tensor) -> Tensor:
        """States as the head of an exit gets them."""
        return states if self._norm is None else cast("Tensor", self._norm(states))

    def full_logits(self, batch: Batch) -> Tensor:
        """Logits of every position `[B, T, V]`, as `compute_metrics` expects them."""
        return cast("Tensor", self._model(**batch.inputs, use_cache=False).logits)

    def release(self) -> None:
        """Forget the positions of the last batch, once its backward is done."""
        for tap in self._taps.values():
            tap.queries = tap.caught = None

    def _run(
        self, inputs: Mapping[str, Tensor], batch: Batch | None, request: Request
    ) -> tuple[Any, Tensor]:
        """Outputs of the backbone and its last hidden state."""
        for layer, tap in self._taps.items():
            tap.queries, tap.caught, tap.open = None if batch is None else batch.queries, None, True
            tap.whole = layer in request.relations
        layers = sorted(request.hidden | request.exits)
        options: dict[str, Any] = {"output_hidden_states": layers} if layers else {}
        model = plain(self._model)
        inputs = {key: value for key, value in inputs.items() if self._takes(key)}
        if not model.config.is_encoder_decoder and hasattr(model.base_model.config, "use_cache"):
            options["use_cache"] = False
        outputs = run_backbone(model)(**inputs, **options)
        for tap in self._taps.values():
            tap.open = False
        return outputs, cast("Tensor", outputs.last_hidden_state)

    def _takes(self, name: str) -> bool:
        """Whether the backbone has an argument: models with ALiBi know no `position_ids`."""
        backbone = cast("PreTrainedModel", plain(self._model).base_model)
        parameters = inspect.signature(backbone.forward).parameters
        loose = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
        return name in parameters or (loose and name != "position_ids")

    def _own(self, states: Tensor, batch: Batch) -> Tensor:
        """States of this process's sequences."""
        return states if self._spread is None else self._spread.own(states, batch)

    def _caught(self, layer: int, batch: Batch) -> Heads:
        """What the tap of one block caught in this forward, of this process's sequences."""
        heads = self._taps[layer].caught
        if heads is None:
            raise RuntimeError(f"{self.name}: block {layer} ran without handing over its attention")
        self._taps[layer].caught = None
        return heads if self._spread is None else self._spread.own_heads(heads, batch)

    def _distribution(self, rows: Tensor, head: Head) -> Whole:
        """Rows and head; dense logits where the head's weights are not in memory."""
        output = cast("nn.Module", plain(self._model).get_output_embeddings())
        if any(p.is_meta for p in output.parameters()):
            return Dense(head.finish(output(head.features(rows))))
        return Factored(rows, head)

    @torch.no_grad()
    def _probe(self) -> None:
        """Run a few tokens: is every requested signal there, is the head understood?"""
        model = plain(self._model)
        clear(model)
        training = model.training
        model.eval()
        try:
            if self.request.heads:
                self._taps = self._find_taps(model)
            inputs = _probe_inputs(model)
            with last_norm(model, asked=bool(self.request.exits)) as norm:
                outputs, last = self._run(inputs, None, self.request)
            self._norm = norm.get(last.data_ptr())
            for layer in sorted(self.request.hidden | self.request.exits):
                states = getattr(outputs, "hidden_states", None)
                if not states or len(states) <= layer or states[layer] is None:
                    raise ValueError(
                        f"{self.name} ({type(model).__name__}) gives no hidden state {layer}"
                    )
            if self.request.logits or self.request.exits:
                self._check_head(model, inputs, last)
        finally:
            model.train(training)

    def _find_taps(self, model: PreTrainedModel) -> dict[int, Tap]:
        """Marks on the attention modules of the requested blocks."""
        install(model)
        found = discover(model, lambda: run_backbone(model)(**_probe_inputs(model)))
        missing = sorted(self.request.heads - found.keys())
        if missing:
            raise ValueError(
                f"{self.name} ({type(model).__name__}) has no attention map in block {missing[0]}; "
                "blocks that have one: "
                f"{sorted(found) or 'none'}"
            )
        layers = sorted(self.request.heads)
        return dict(zip(layers, mark(found[k] for k in layers), strict=True))

    def _check_head(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], last: Tensor
    ) -> None:
        """Compare our reading of the head with the model's own logits."""
        expected = model(**inputs).logits[0].float()
        ours = self._distribution(last[0], head_of(model)).logits(slice(None)).float()
        bound = 1e-3 if last.dtype in (torch.float32, torch.float64) else 5e-2
        if ours.shape != expected.shape or (
            ours - expected
        ).abs().max() > bound * expected.abs().max().clamp_min(1.0):
            raise ValueError(
                f"{self.name}: the head of {type(model).__name__} is more than a linear layer with "
                "bias, scale and "
                "soft cap, so its logits cannot be computed row by row; use HiddenStates and "
                "AttentionMaps with it"
            )


def _refuse_prompts(model: nn.Module, name: str) -> None:
    """Refuse adapters that live outside the backbone: they would neither be read nor trained.

    Raises:
        ValueError: Naming the kind of adapter.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        kind = type(model.active_peft_config).__name__.removesuffix("Config")
        raise ValueError(
            f"{name} has an adapter of the kind {kind}, prompts in front of the sequence, and "
            "signals are read without it; take one inside the model, such as LoRA"
        )


def refuse_layers(request: Request, spec: ModelSpec) -> None:
    """Refuse layers a model does not have.

    Raises:
        ValueError: Naming model, layer and what there is.
    """
    for layer in sorted(request.hidden):
        if not 0 <= layer <= spec.depth:
            raise ValueError(f"{spec.name}: hidden state {layer} is out of range 0..{spec.depth}")
    if request.heads and not (spec.heads and spec.attends):
        asker = "Relations" if request.relations else "AttentionMaps"
        raise ValueError(
            f"{spec.name} ({spec.kind}) has no attention that can be read, and "
            f"{asker} asks for blocks {sorted(request.heads)}; use Logits and HiddenStates with it"
        )
    for layer in sorted(request.heads):
        if not 1 <= layer <= spec.depth:
            raise ValueError(
                f"{spec.name}: block {layer} is out of range 1..{spec.depth} (the embedding has no "
                "heads)"
            )


def _probe_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """A few tokens for one sequence, where the model's embedding lives."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    device = cast("Tensor", model.get_input_embeddings().weight).device
    device = torch.device("cpu") if device.type == "meta" else device
    ids = torch.arange(PROBE_TOKENS, device=device)[None] % vocabulary
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
