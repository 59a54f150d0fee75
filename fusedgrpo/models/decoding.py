"""How completions are decoded with the generate of a model: asked of it, on a few tokens.

A cache of keys and values can be copied for each completion of a prompt, and padding in it is
masked. The state of a state-space, recurrent or convolution layer may carry padding on, may not be
copied by what copies keys and values, and goes by other names. So each route is tried, the fastest
first, and the first is taken whose log-probs are those that training computes.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedgrpo.errors import ModelError
from fusedgrpo.models.head import logits
from fusedgrpo.models.packed_batch import PackedBatch
from fusedgrpo.models.rounding import rounded_otherwise

if TYPE_CHECKING:
    from fusedgrpo.models.policy import Policy

log = logging.getLogger("fusedgrpo")

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Route:
    """forked: a prompt is computed once and what it left is copied for its completions; else
    generate computes it for each of them. padded: prompts of different lengths are decoded
    together. alone: one completion at a time. cached: a token is computed once; else everything
    before it again, for each token."""

    forked: bool = True
    padded: bool = True
    alone: bool = False
    cached: bool = True

    def __str__(self) -> str:
        if not self.cached:
            return "without a cache, each token from the whole sequence again"
        if self.alone:
            return "one completion at a time"
        prompt = "once for all its completions" if self.forked else "once for each completion"
        together = "any prompts" if self.padded else "prompts of one length"
        return f"{together} together, each prompt computed {prompt}"


ROUTES = (
    Route(),
    Route(padded=False),
    Route(forked=False, padded=False),
    Route(forked=False, padded=False, alone=True),
    Route(forked=False, padded=False, cached=False),
)

# How far log-probs may be from those of training, relative to the spread of the logits. A route is
# right if no token is further off than the first of the two. Else it may be rounding, which all
# routes share, or padding and forgotten state, which not all of them have: the mean of the worst
# prompt decides between them. It must be below the second, and near that of the best route or of
# what rounding makes of the training forward itself.
TOLERANCE = {
    torch.float64: (1e-5, 1e-3),
    torch.float32: (1e-3, 1e-2),
    torch.float16: (2e-2, 0.2),
    torch.bfloat16: (6e-2, 0.3),
}


def choose_route(policy: Policy) -> Route:
    """The fastest of ``ROUTES`` on which tokens get the log-probs that training gives them.

    Costs a few tokens where the first one does, draws no random number, and says so where it is
    another. Raises ModelError where there is none.
    """
    prompts, completions = few_tokens(policy.vocabulary_size)
    pairs = [(p, c) for p, c in zip(prompts, completions, strict=True) for _ in range(2)]
    pairs = [(p, c[::-1] if i % 2 else c) for i, (p, c) in enumerate(pairs)]
    expected = trained(policy, pairs)
    if not expected.isfinite().all():
        return ROUTES[0]  # weights that are not finite: nothing to compare, and for others to say
    exact, rounded = TOLERANCE[policy.dtype]
    found: dict[Route, float] = {}
    reasons: list[str] = []
    for route in ROUTES:
        try:
            errors = relative_errors(_decoded(policy, route, pairs), expected)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as problem:
            # What caches and models raise for a cache, a mask or an argument they do not know.
            reasons.append(f"{type(problem).__name__}: {problem}".splitlines()[0])
            continue
        if errors.max() <= exact:
            return _said(policy, route)
        found[route] = float(errors.mean(1).max().nan_to_num(torch.inf))
        reasons.append(f"log-probs are off by {found[route]:.1e} of their spread")
    best = min(found.values(), default=float("inf"))
    if best <= rounded:
        with rounded_otherwise(policy.causal_lm, policy.dtype):
            other = trained(policy, pairs)
        rounding = float(relative_errors(other, expected).mean(1).max().nan_to_num(0.0))
        most = min(max(2 * best, 2 * rounding), rounded)
        return _said(policy, next(route for route in found if found[route] <= most))
    raise ModelError(
        f"{type(policy.causal_lm).__name__} cannot be sampled from: its generate does not give "
        f"the log-probs of its training forward ({reasons[0]}; without a cache: {reasons[-1]}). "
        "Expected a causal LM of transformers."
    )


def _said(policy: Policy, route: Route) -> Route:
    if route != ROUTES[0]:
        log.warning("%s is decoded %s.", type(policy.causal_lm).__name__, route)
    return route


def decode(
    policy: Policy,
    route: Route,
    prompts: Prompts,
    prompt_of: Sequence[int],
    config: Any,
    processors: Any,
    skipped: int = 0,
    stopping: Any = None,
) -> Tensor:
    """``[len(prompt_of), new]``: tokens that generate appends to ``prompts[i]`` for each i of
    ``prompt_of``. Prompts have one length unless ``route.padded``; there is one if ``route.alone``.

    skipped: positions that are taken and hold nothing, as if so many tokens had been decoded.
    stopping: generate's criteria, which say of each row whether it has ended.
    """
    model, device = policy.causal_lm, policy.device
    with policy.scoring(), policy.autocast(), _own_generation_config(model):
        _forget(model, device)
        if not route.forked:
            rows = [[*prompts[i], *[prompts[i][-1]] * skipped] for i in prompt_of]
            ids = torch.tensor(rows, device=device)
            config.use_cache = route.cached
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=stopping,
            )
            return output[:, ids.shape[1] :]
        ids, attention_mask = left_padded(prompts, device)
        copies = torch.tensor(prompt_of, device=device)
        cache = prefill(model, ids, attention_mask, copies)
        if skipped:
            ids, attention_mask = lengthened(cache, ids, attention_mask, skipped)
        ids, attention_mask = ids[copies], attention_mask[copies]
        name = cache_name(model)
        if name != "past_key_values":
            # Such a state does not know how long it is, so generate gets what comes after it.
            processors = _with_prompt(processors, ids[:, :-1])
            ids, attention_mask = ids[:, -1:], attention_mask[:, -1:]
        output = model.generate(
            input_ids=ids,
            attention_mask=attention_mask,
            generation_config=config,
            logits_processor=processors,
            stopping_criteria=stopping,
            **{name: cache},
        )
    return output[:, ids.shape[1] :]


def cache_name(model: Any) -> str:
    """The argument of ``model`` that takes what it remembers."""
    parameters = inspect.signature(model.forward).parameters
    return next((n for n in ("cache_params", "state") if n in parameters), "past_key_values")


def prefill(model: Any, ids: Tensor, attention_mask: Tensor, copies: Tensor) -> Any:
    """The cache of all but the prompts' last tokens, computed once and then copied; None
    where there is nothing yet and the model makes its own."""
    from transformers import DynamicCache

    name = cache_name(model)
    own = name != "past_key_values" or not model._supports_default_dynamic_cache()
    cache: Any = None if own else DynamicCache(config=model.config)
    if ids.shape[1] == 1:
        return cache
    mask = attention_mask[:, :-1]
    options: dict[str, Any] = {}
    if name == "past_key_values":
        options = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    output = model.get_decoder()(
        input_ids=ids[:, :-1], attention_mask=mask, use_cache=True, **options, **{name: cache}
    )
    return _forked(output[name] if cache is None else cache, copies)


def _forked(cache: Any, copies: Tensor) -> Any:
    """``cache`` with the rows that ``copies`` names. Raises TypeError for an unknown kind."""
    from transformers import DynamicCache

    if isinstance(cache, (list, tuple)):
        return [tensor.index_select(0, copies) for tensor in cache]
    if type(cache) is DynamicCache:
        # batch_select_indices leaves out the states of layers that are no attention.
        cache.reorder_cache(copies)  # type: ignore[arg-type]  # int64, as it asks
    elif hasattr(cache, "batch_select_indices"):
        cache.batch_select_indices(copies)
    elif isinstance(getattr(cache, "rnn_state", None), dict):  # xLSTM
        cache.rnn_state = {
            layer: tuple(_forked(states, copies)) for layer, states in cache.rnn_state.items()
        }
    else:
        raise TypeError(f"a {type(cache).__name__} cannot be copied for several completions")
    return cache


def left_padded(prompts: Prompts, device: torch.device) -> tuple[Tensor, Tensor]:
    """Padded with each prompt's own first token: hidden by the mask, and to a repetition penalty,
    which sees ids alone, nothing new."""
    width = max(map(len, prompts))
    ids = torch.tensor([[p[0]] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def lengthened(
    cache: Any, ids: Tensor, attention_mask: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Add ``count`` positions to a prefilled cache; returns the ids and the mask to go with it."""
    for index, layer in enumerate(getattr(cache, "layers", ())):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is not None and values is not None:  # a state of fixed size grows no more
            shape, other = list(keys.shape), list(values.shape)
            shape[-2] = other[-2] = count
            cache.update(keys.new_zeros(shape), values.new_zeros(other), index)
    between = ids[:, :1].expand(-1, count)
    longer = torch.cat([ids[:, :-1], between, ids[:, -1:]], 1)
    return longer, torch.nn.functional.pad(attention_mask, (0, count), value=1)


@contextlib.contextmanager
def _own_generation_config(model: Any) -> Iterator[None]:
    """Put the model's generation_config aside: generate() fills what ours leaves open from it, and
    its repetition penalty or suppressed tokens would silently change the policy."""
    from transformers import GenerationConfig

    original, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = original


def _forget(model: Any, device: torch.device) -> None:
    """Empty what modules keep of the last call: the positions of its pictures (Qwen-VL), and the
    state that a prompt of one token would be taken to continue (RecurrentGemma)."""
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None
    if getattr(model, "_is_stateful", False):
        model.get_decoder()(
            input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False
        )


def _with_prompt(processors: Any, before: Tensor) -> Any:
    """The chain as it would run if ``before`` stood in front of what generate knows of."""
    from transformers import LogitsProcessorList

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        return processors(torch.cat([before, input_ids], 1), scores)

    return LogitsProcessorList([process])


# --- the trial -----------------------------------------------------------------------------------


def few_tokens(vocabulary: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of different lengths, one of a single token, with completions of equal length."""
    ids = (torch.arange(40) * 7 % min(vocabulary, 97)).tolist()
    prompts = [ids[:7], ids[7:8], ids[8:11]]
    return prompts, [ids[11 + 4 * i : 15 + 4 * i] for i in range(len(prompts))]


def trained(policy: Policy, pairs: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """``[pairs, tokens, V]`` float32: log-probs as training computes them."""
    packed = PackedBatch.build(pairs, policy.device, policy.layout)
    with policy.scoring(), policy.autocast():
        scores = logits(policy.head, policy.hidden(packed)).float()
    return scores.log_softmax(-1).view(len(pairs), -1, scores.shape[-1])


def _decoded(policy: Policy, route: Route, pairs: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """The same as generate computes them, when each token of the completions is forced on it."""
    from transformers import GenerationConfig, LogitsProcessorList

    result: dict[int, Tensor] = {}
    if route.padded:
        batches = [list(range(len(pairs)))]
    elif route.alone:
        batches = [[i] for i in range(len(pairs))]
    else:
        # The single token last: what longer ones left behind must not show in it.
        lengths = sorted({len(prompt) for prompt, _ in pairs}, reverse=True)
        batches = [[i for i, (p, _) in enumerate(pairs) if len(p) == n] for n in lengths]
    for members in batches:
        prompts: list[list[int]] = []
        for i in members:
            if pairs[i][0] not in prompts:
                prompts.append(pairs[i][0])
        forced = torch.tensor([pairs[i][1] for i in members], device=policy.device)
        scores: list[Tensor] = []
        decode(
            policy,
            route,
            prompts,
            [prompts.index(pairs[i][0]) for i in members],
            GenerationConfig(max_new_tokens=forced.shape[1], do_sample=False, pad_token_id=0),
            LogitsProcessorList([_forcing(forced, scores)]),
        )
        logp = torch.stack([score.float().log_softmax(-1) for score in scores], 1)
        result.update(zip(members, logp, strict=True))
    return torch.stack([result[i] for i in range(len(pairs))])


def _forcing(tokens: Tensor, seen: list[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        token = tokens[:, len(seen), None]
        seen.append(scores)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)

    return process


def relative_errors(decoded: Tensor, expected: Tensor) -> Tensor:
    """``[prompts, tokens]``: how far log-probs are off, relative to the spread of a token's; both
    rows of a prompt in one."""
    width = min(decoded.shape[-1], expected.shape[-1])
    decoded, expected = (x[..., :width].double() for x in (decoded, expected))
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    errors = (decoded - expected).norm(dim=-1) / spread.clamp(min=1e-30)
    return errors.reshape(len(errors) // 2, -1)
