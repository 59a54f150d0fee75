"""The memory that a model needs on a GPU, from its configuration alone: bytes of weights, adapters,
key-value cache and activations.

Weights are counted on the meta device. Activations are measured: a model of the same architecture
with two and with three decoder layers runs forward and backward on fake tensors, at the number of
tokens in question, and what its allocations would take is extended to all layers.
That is a straight line: each layer adds what it saves, its gradients and its casts. What
does not exist without a GPU has a stand-in (``fake_layers.py``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedgrpo.engine.memory.fake_layers import (
    ATTENTION,
    Batch,
    FourBitLinear,
    HeadMemory,
    HeadStandIn,
    four_bit_bytes,
    register_attention,
    rounded,
)
from fusedgrpo.engine.memory.storage_tracker import StorageTracker
from fusedgrpo.kernels.launch import tiling
from fusedgrpo.models.adapters.lora import add_lora
from fusedgrpo.models.at_rest import frozen_linear, store
from fusedgrpo.models.device import asked_compute_dtype, resting_dtype, stored_dtype
from fusedgrpo.models.dropout import own_dropout
from fusedgrpo.models.loading import enable_checkpointing
from fusedgrpo.models.router import planned_router

if TYPE_CHECKING:
    from fusedgrpo.config.schema import GRPOConfig


class Weights(NamedTuple):
    """Bytes of the model as loaded, and the sizes of what trains."""

    four_bit: int
    embeddings_and_head: int  # tied ones once
    other: int
    trained: tuple[int, ...]  # elements of each trained parameter
    trained_itemsize: int
    adapter: int  # bytes; 0 where the weights themselves train
    merged: int  # of a copy of all weights that have an adapter, in the dtype of computing


class Activations(NamedTuple):
    """Highest bytes above weights, optimizer and gradients, by part of a pass."""

    layers_forward: int
    head_forward: int
    head_backward: int = 0
    layers_backward: int = 0

    @property
    def forward(self) -> int:
        return max(self.layers_forward, self.head_forward)

    @property
    def backward(self) -> int:
        return max(self.head_backward, self.layers_backward)


@dataclass(frozen=True)
class ModelShape:
    """The measures of a causal LM that its memory follows from."""

    layers: int
    hidden: int
    itemsize: int  # of an activation

    @classmethod
    def of(cls, config: GRPOConfig, settings: Any) -> ModelShape:
        text = settings.get_text_config()
        itemsize = compute_dtype(config).itemsize
        return cls(text.num_hidden_layers, text.hidden_size, itemsize)


def compute_dtype(config: GRPOConfig) -> torch.dtype:
    """The dtype that the GPU computes in: what is planned for has bfloat16."""
    return asked_compute_dtype(config.bf16, config.fp16) or torch.float32


# --- weights ------------------------------------------------------------------------------------


def count_weights(config: GRPOConfig, settings: Any) -> Weights:
    """Every parameter of the architecture, built without memory."""
    model = _bare(config, settings)
    quantised = {id(m.weight) for m in model.modules() if isinstance(m, FourBitLinear)}
    head = model.get_output_embeddings()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) or m is head}
    four_bit = embeddings = other = 0
    for parameter in model.parameters():  # tied ones once
        if id(parameter) in quantised:
            four_bit += four_bit_bytes(parameter.numel(), config.use_bnb_nested_quant)
        elif id(parameter) in tables:
            embeddings += rounded(parameter.numel() * parameter.itemsize)
        else:
            other += rounded(parameter.numel() * parameter.itemsize)
    if config.finetuning_type == "full":
        trained = tuple(p.numel() for p in model.parameters())
        itemsize = next(model.parameters()).itemsize
        return Weights(four_bit, embeddings, other, trained, itemsize, 0, 0)
    adapted = _adapted(model, _adapter_names(config, settings))
    trained = tuple(config.lora_r * n for m in adapted for n in (m.in_features, m.out_features))
    adapter = sum(rounded(4 * n) for n in trained)
    itemsize = compute_dtype(config).itemsize
    merged = sum(rounded(itemsize * m.in_features * m.out_features) for m in adapted)
    return Weights(four_bit, embeddings, other, trained, 4, adapter, merged)


def _adapter_names(config: GRPOConfig, settings: Any) -> set[str]:
    """Last names of the layers that get an adapter: peft's choice, on a model of one layer."""
    found: Any = _small(config, settings, 1)
    return {name.rsplit(".", 1)[-1] for name in found.targeted_module_names}


def _adapted(model: Any, names: set[str]) -> list[nn.Linear]:
    """The linear layers of a bare model that get an adapter."""
    head = model.get_output_embeddings()
    return [
        m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m is not head and name.rsplit(".", 1)[-1] in names
    ]


# --- models without memory ----------------------------------------------------------------------


def _bare(config: GRPOConfig, settings: Any, layers: int | None = None) -> Any:
    """The causal LM on the meta device, without adapters; with ``layers`` decoder layers."""
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.base import get_keys_to_not_convert

    settings = copy.deepcopy(settings)
    text = settings.get_text_config()
    if layers is not None:
        text.num_hidden_layers = layers
        if types := getattr(text, "layer_types", None):
            text.layer_types = [*types, *types[-1:] * layers][:layers]
    computed = asked_compute_dtype(config.bf16, config.fp16)
    dtype = stored_dtype(config, computed) or text.dtype or torch.float32
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            settings, dtype=dtype, trust_remote_code=config.trust_remote_code
        )
        if config.disable_dropout:  # with dropout, a mask is saved for each
            for place in own_dropout(model):
                setattr(place.owner, place.name, 0.0)
        if config.load_in_4bit:
            kept = get_keys_to_not_convert(model)
            for name, module in list(model.named_modules()):
                if type(module) is nn.Linear and not any(k in name for k in kept):
                    module.__class__ = FourBitLinear
        if rests := resting_dtype(config, computed):
            head = model.get_output_embeddings()
            store(frozen_linear(model.requires_grad_(False)), head, rests)
    return model


def _small(config: GRPOConfig, settings: Any, layers: int) -> Any:
    """The same with what trains: adapters, or all of it."""
    model = _bare(config, settings, layers)
    with torch.device("meta"):
        if config.finetuning_type == "full":
            return model.requires_grad_(True)
        wrapped: Any = add_lora(model, config)
    if config.load_in_4bit:
        for module in wrapped.modules():
            # peft's 4-bit layers leave the input as it is under autocast.
            module.cast_input_dtype_enabled = False
    return wrapped


def _merged(config: GRPOConfig, settings: Any, layers: int) -> Any:
    """The same with its adapters merged into copies of the weights, as a rollout sees it."""
    model = _bare(config, settings, layers)
    for module in _adapted(model, _adapter_names(config, settings)):
        module.__class__ = nn.Linear
        module.to(compute_dtype(config))
    return model.requires_grad_(False)


def _fill(model: nn.Module) -> None:
    """Fake tensors in place of those on the meta device; packed ones in 4-bit layers."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if id(old) not in made:
                if isinstance(module, FourBitLinear) and name == "weight":
                    new = torch.empty(four_bit_bytes(old.numel(), True), dtype=torch.uint8)
                else:
                    new = torch.empty(old.shape, dtype=old.dtype)
                made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad)
            setattr(module, name, made[id(old)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


# --- measuring ----------------------------------------------------------------------------------


class SmallModel:
    """A model of few decoder layers on fake tensors, to be measured at any number of tokens.

    merged: its adapters are merged into copies of the weights, for a rollout.
    """

    def __init__(self, config: GRPOConfig, settings: Any, layers: int, *, merged: bool = False):
        register_attention()
        model = (_merged if merged else _small)(config, settings, layers)
        for module in model.modules():
            own: Any = getattr(module, "config", None)
            if hasattr(own, "_attn_implementation"):
                own._attn_implementation_internal = ATTENTION
        self.model = model
        self.causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        if config.gradient_checkpointing:
            enable_checkpointing(self.causal_lm)
        self.router = planned_router(self.causal_lm, config.router_aux_loss_coef)
        self.dtype = compute_dtype(config)
        self.tracker = StorageTracker()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake, self.tracker:
            _fill(model)

    @property
    def head_weight(self) -> Tensor:
        return self.causal_lm.get_output_embeddings().weight

    def activations(self, batch: Batch, *, gradients: bool) -> Activations:
        """The memory of one pass over ``batch`` through all layers and the head.

        With gradients: an update, whose gradients count as there before. Without: scoring.
        """
        tracker = self.tracker
        peaks: dict[str, int] = {}
        trained = [p for p in self.model.parameters() if p.requires_grad and gradients]
        self.model.train(gradients)
        V, H = self.head_weight.shape
        head = HeadMemory(
            tracker, peaks, tiling(H, V, self.dtype.itemsize, "cuda"), V, self.dtype, gradients,
            gradients and self.head_weight.requires_grad,
        )  # fmt: skip
        with self.fake, tracker, torch.set_grad_enabled(gradients):
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            before = tracker.live
            tracker.start_peak()
            with self.autocast():
                router = self.router if gradients else None
                routed = {} if router is None else {"output_router_logits": True}
                outputs = self.forward(batch.tokens, fusedgrpo_keys=batch.keys, **routed)
                states = outputs.last_hidden_state[0]
                balance: Any = 0
                if router is not None:
                    each = torch.ones(batch.tokens)
                    balance = router.loss(router.sums(outputs.router_logits, each))
                peaks["layers_forward"] = tracker.peak.bytes
                del outputs
                loss = HeadStandIn.apply(states, head, batch) + balance
                del states, balance
            if gradients:
                loss.backward()
                peaks["layers_backward"] = tracker.peak.bytes
        for parameter in trained:
            parameter.grad = None
        return Activations(**{name: size - before for name, size in peaks.items()})

    def forward(self, tokens: int, **options: Any) -> Any:
        """The outputs of the decoder for one row of ``tokens`` without padding; ``options`` reach
        its attention."""
        ids, positions = torch.zeros(2, 1, tokens, dtype=torch.int64).unbind()
        return self.causal_lm.get_decoder()(
            input_ids=ids,
            position_ids=positions,
            attention_mask=torch.zeros(1, 1, 1, 1),
            use_cache=False,
            **options,
        )

    def autocast(self) -> Any:
        # Of the tensors' device, which stands for a GPU.
        return torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype != torch.float32)


def straight_line(at: Callable[[int], Any], first: int, second: int, wanted: int) -> Any:
    """A tuple of sizes that grow in a straight line, known at two places, at a third."""
    low, high = at(first), at(second)
    share = (wanted - first) / (second - first)
    return type(low)(*(round(a + (b - a) * share) for a, b in zip(low, high, strict=True)))
