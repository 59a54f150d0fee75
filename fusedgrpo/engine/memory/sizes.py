"""The sizes of a run's parts in bytes, each measured once for all plans of one model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.batch_plan import BatchPlan, resolve_batch
from fusedgrpo.engine.memory.decoder_memory import DecoderMemory, DecoderModel, Decoding
from fusedgrpo.engine.memory.measure import (
    Activations,
    ModelShape,
    SmallModel,
    Weights,
    count_weights,
    straight_line,
)
from fusedgrpo.engine.memory.rollout_memory import GenerateMemory, generate_memory
from fusedgrpo.engine.memory.whose_rollout import decodes_itself
from fusedgrpo.engine.memory.workload import Asked, paged
from fusedgrpo.engine.rollout.sampler import SamplingParams
from fusedgrpo.models.activation_offload import CHUNK, KEPT
from fusedgrpo.models.adapters.plain_lora import all_plain

# Depths whose difference is one layer's share. The first layer is a case of its own: its input is
# the embedding, which the model holds on to.
DEPTHS = (2, 3)

# (settings of the model, rows=, prompt=, longest=) -> bytes: ``Sampler.memory``.
SamplerMemory = Callable[..., int]


class Sizes:
    """The parts of a run of one model, for options that are asked for.

    settings: the model's transformers configuration. world_size: processes, a GPU each.
    sampler_memory: of a sampler that is not ours, which knows what it takes; None for all others.
    decoder: False where completions do not come from our decoder, whatever the option ``sampler``:
    an object that was passed to the trainer. generate's memory is planned for it. reward_models:
    bytes of their weights; what a forward pass of theirs takes is not known.
    """

    def __init__(
        self,
        settings: Any,
        world_size: int = 1,
        sampler_memory: SamplerMemory | None = None,
        decoder: bool = True,
        reward_models: int = 0,
    ):
        self.decoder = decoder
        self.reward_models = reward_models
        self.settings = settings
        self.world_size = world_size
        self.sampler_memory = sampler_memory
        self._measured: dict[Any, Any] = {}

    def resident(self, asked: Asked) -> dict[str, int]:
        """Bytes that stay on the GPU during the whole run, by kind."""
        config, weights = asked.config, self.weights(asked)
        trained = sum(weights.trained)
        rows = {
            "weights in 4 bit": weights.four_bit,
            "embeddings and head": weights.embeddings_and_head,
            "other weights": weights.other,
            "LoRA adapter": weights.adapter,
            "optimizer state": 0 if paged(config) else optimizer_state(config, weights.trained),
            "reward models": self.reward_models,
        }
        if config.finetuning_type == "full" and config.beta:
            rows["reference model"] = trained * weights.trained_itemsize
        if asked.merged:
            rows["merged copy for rollouts"] = weights.merged
        elif self.decodes(asked):
            rows["adapter as rollouts have it"] = weights.prepared
        return {name: size for name, size in rows.items() if size}

    def weights(self, asked: Asked) -> Weights:
        key = "weights", _model_key(asked.config)
        return self._once(key, lambda: count_weights(asked.config, self.settings))

    def activations(self, asked: Asked, tokens: int, gradients: bool) -> Activations:
        """The memory of a micro-batch of ``tokens``, in an update or in scoring."""
        config = asked.config
        batch = asked.batch(max(min(tokens, self.step_tokens(asked)), 1))

        def at(layers: int) -> Activations:
            model, key = self._small_model(asked, layers, adapter=True)
            return self._once(
                (key, batch, gradients), lambda: model.activations(batch, gradients=gradients)
            )

        return straight_line(at, *DEPTHS, self._shape(config).layers)

    def decodes(self, asked: Asked) -> bool:
        """Whether completions come from our own decoder."""
        if self.sampler_memory is not None or not self.decoder:
            return False
        key = "decodes", asked.config.sampler, _model_key(asked.config)
        small = functools.partial(self._small_model, asked, DEPTHS[-1])
        return self._once(key, lambda: decodes_itself(asked.config, lambda: small()[0]))

    def merges(self, asked: Asked) -> bool:
        """Whether completions may come from a copy with the adapter in it."""
        if asked.config.finetuning_type != "lora" or not self.decodes(asked):
            return False
        key = "merges", _model_key(asked.config)
        small = functools.partial(self._small_model, asked, DEPTHS[-1], adapter=True)
        return self._once(key, lambda: all_plain(small()[0]))

    def rollout(self, asked: Asked, rows: int, tokens: int) -> GenerateMemory | DecoderMemory:
        """The memory of ``rows`` completions that are in flight together. tokens: of a micro-batch,
        which are as many as our decoder reads of prompts at once."""
        if self.sampler_memory is not None:
            size = self.sampler_memory(
                self.settings, rows=rows, prompt=asked.prompt, longest=asked.longest
            )
            return GenerateMemory(entries=size, prefill=0, decoding=0)
        if self.decodes(asked):
            return self._decoder(asked, rows, tokens)
        groups = max(rows // asked.config.num_generations, 1)

        def at(layers: int) -> GenerateMemory:
            model, key = self._small_model(asked, layers)
            return self._once(
                (key, rows, asked.prompt, asked.longest),
                lambda: generate_memory(
                    model, rows=rows, groups=groups, prompt=asked.prompt, length=asked.longest
                ),
            )

        return straight_line(at, *DEPTHS, self._shape(asked.config).layers)

    def _decoder(self, asked: Asked, rows: int, tokens: int) -> DecoderMemory:
        config = asked.config
        groups = self.rollout_groups(config)
        entering = min(-(-rows // config.num_generations), groups)
        case = Decoding(
            rows=rows,
            # In the end each of them may be of another prompt.
            prompts=min(rows, groups),
            prompt=asked.prompt,
            reads=min(max(tokens // asked.prompt, 1), entering),
            params=SamplingParams.of(config),
        )

        def at(layers: int) -> DecoderMemory:
            model, key = self._small_model(asked, layers)
            made = functools.partial(DecoderModel, model, merged=asked.merged)
            decoder = self._once(("decoder", key), made)
            return self._once((key, case), lambda: decoder.memory(case))

        return straight_line(at, *DEPTHS, self._shape(config).layers)

    def update(self, asked: Asked, tokens: int, offloading: bool) -> tuple[Activations, int]:
        """The memory of an update, and the bytes that are on the host instead."""
        found = self.activations(asked, tokens, True)
        if not offloading:
            return found, 0
        layers, one = self._shape(asked.config).layers, self._layer_input(asked, tokens)
        # Forward the model itself holds its embeddings besides; in the head's backward pass the
        # last input is on its way back.
        here = Activations(
            layers_forward=found.layers_forward - one * (layers - KEPT - 1),
            head_forward=found.head_forward - one * (layers - KEPT + 1),
            head_backward=found.head_backward - one * (layers - KEPT),
            layers_backward=found.layers_backward - one * (layers - KEPT),
        )
        return here, self._on_host(asked, tokens, one)

    def saved(self, asked: Asked, tokens: int, offloading: bool) -> int:
        """Bytes that the forward pass leaves for the backward pass."""
        layers = self._shape(asked.config).layers
        if asked.config.gradient_checkpointing:
            return self._layer_input(asked, tokens) * (KEPT if offloading else layers)
        return self.activations(asked, tokens, True).head_forward

    def step_tokens(self, asked: Asked) -> int:
        """Packed tokens of all that a process forwards in an optimizer step."""
        config = asked.config
        groups = -(-self._batch_plan(config).groups_per_step // self.world_size)
        per_group = asked.prompt + config.num_generations * config.max_completion_length
        if config.shared_prompt == "off":
            per_group = config.num_generations * asked.longest
        return groups * per_group

    def rollout_groups(self, config: GRPOConfig) -> int:
        """Groups that a process samples at once."""
        return -(-self._batch_plan(config).groups_per_rollout // self.world_size)

    def _on_host(self, asked: Asked, tokens: int, layer_input: int) -> int:
        """Every layer's input, the last norm's in float32 and what the head saves, in whole pieces
        (models/activation_offload.py)."""
        shape = self._shape(asked.config)
        batch = asked.batch(max(min(tokens, self.step_tokens(asked)), 1))
        saved = [layer_input] * shape.layers
        saved += [4 * batch.tokens * shape.hidden, batch.scored * shape.hidden * shape.itemsize]
        return sum(-(-size // CHUNK) * CHUNK for size in saved)

    def _layer_input(self, asked: Asked, tokens: int) -> int:
        shape = self._shape(asked.config)
        return min(tokens, self.step_tokens(asked)) * shape.hidden * shape.itemsize

    def _batch_plan(self, config: GRPOConfig) -> BatchPlan:
        return resolve_batch(config, 1 << 30, self.world_size)

    def _small_model(
        self, asked: Asked, layers: int, *, adapter: bool = False
    ) -> tuple[SmallModel, Any]:
        """adapter: as it trains, whatever it is that rollouts have."""
        config, merged = asked.config, asked.merged and not adapter
        key = _model_key(config), config.gradient_checkpointing, layers, merged
        make = functools.partial(SmallModel, config, self.settings, layers, merged=merged)
        return self._once(key, make), key

    def _shape(self, config: GRPOConfig) -> ModelShape:
        return ModelShape.of(config, self.settings)

    def _once(self, key: Any, measure: Callable[[], Any]) -> Any:
        if key not in self._measured:
            self._measured[key] = measure()
        return self._measured[key]


def optimizer_state(config: GRPOConfig, trained: tuple[int, ...]) -> int:
    """Two moments of each parameter, which no other optimizer but AdEMAMix with its three exceeds:
    float32; with 8 bits a byte, and a float32 for each 256, from 4,096 elements on (bitsandbytes).
    """
    moments = 3 if "ademamix" in config.optim else 2
    if "8bit" not in config.optim:
        return 4 * moments * sum(trained)
    sizes = (n + 4 * -(-n // 256) if n >= 4096 else 4 * n for n in trained)
    return moments * sum(sizes)


def _model_key(config: GRPOConfig) -> tuple[Any, ...]:
    """The options that a measurement depends on, beside lengths."""
    targets = config.lora_target_modules
    return (
        config.finetuning_type, config.lora_r,
        targets if isinstance(targets, str) else tuple(targets),
        config.load_in_4bit, config.use_bnb_nested_quant, config.dtype, config.bf16, config.fp16,
        config.lora_dropout, config.disable_dropout, config.router_aux_loss_coef,
        config.full_determinism, config.use_liger_kernel,
        tuple((config.liger_kernel_config or {}).items()),
    )  # fmt: skip
