"""The decoder samples from the policy that trains, in any company, and frees what it took."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import tiny
import torch
from torch import Tensor

from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.memory.oom_retry import OOMRetry
from fusedgrpo.engine.rollout import decode_loop
from fusedgrpo.engine.rollout.decode_loop import How
from fusedgrpo.engine.rollout.decoder_sampler import DecoderSampler
from fusedgrpo.engine.rollout.generate_sampler import GenerateSampler
from fusedgrpo.engine.rollout.sampler import SamplingParams
from fusedgrpo.engine.rollout.types import Completion, Group
from fusedgrpo.engine.rollout.warpers import warpers
from fusedgrpo.engine.seeding import derive
from fusedgrpo.errors import ModelError, NonFiniteError
from fusedgrpo.kernels.sample.philox import gumbel_tile
from fusedgrpo.models.kv_cache import PagedCache
from fusedgrpo.models.packed_batch import PackedBatch
from fusedgrpo.models.policy import Policy

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [4], [9, 9], [3, 30, 20] * 9]
FAMILIES = ["Llama", "Qwen2", "Qwen3", "Gemma2", "Phi3", "Mistral"]


def policy(family: str = "Qwen2", **config: Any) -> Policy:
    return Policy(tiny.model(family, **config))


def decoder(
    on: Policy,
    *,
    in_flight: int | None = None,
    tokens: int = 0,
    eos: Sequence[int] = (tiny.EOS,),
    behind: int = 0,
) -> DecoderSampler:
    execution = Execution(OOMRetry(tokens, in_flight))
    sampler = DecoderSampler(on, tiny.tokenizer(), eos, execution=execution)
    sampler.how = How(behind=behind, weights=sampler.how.weights)
    return sampler


def ids(groups: Sequence[Group]) -> list[list[tuple[int, ...]]]:
    return [[c.ids for c in group.completions] for group in groups]


def said_logp(groups: Sequence[Group]) -> Tensor:
    return torch.cat([c.logp for g in groups for c in g.completions])  # type: ignore[misc]


def policys_logp(on: Policy, groups: Sequence[Group]) -> Tensor:
    pairs = [(g.prompt_ids, c.ids) for g in groups for c in g.completions]
    with on.scoring():
        return on.logprobs(PackedBatch.build(pairs, "cpu")).logp


@torch.no_grad()
def expected(
    on: Policy, prompt: Sequence[int], completion: Completion, params: SamplingParams, seed: int
) -> list[int]:
    """What the model's own forward pass and the noise of ``seed`` say after each of its tokens."""
    sequence = torch.tensor([[*prompt, *completion.ids]])
    with on.scoring():
        scores = on.model(input_ids=sequence).logits[0].float()
    chain = warpers(params)
    tokens = []
    for place in range(len(completion.ids)):
        at = len(prompt) + place
        row = chain(sequence[:, :at], scores[at - 1 : at].clone())
        if not params.greedy:
            row = row + gumbel_tile(
                torch.tensor([seed]), torch.tensor([place]), 0, row.shape[1], row.dtype
            )
        tokens.append(int(row.argmax()))
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_log_probs_are_those_of_the_models_own_forward_pass(family: str) -> None:
    on = policy(family)
    params = SamplingParams(max_new_tokens=40)
    groups = decoder(on).sample(PROMPTS, 3, params, seed=5)
    assert len({len(c.ids) for g in groups for c in g.completions}) > 1, "some end, some are cut"
    assert (said_logp(groups) - policys_logp(on, groups)).abs().max() <= 1e-5
    for i, group in enumerate(groups):
        for sample, completion in enumerate(group.completions):
            seed = derive(5, i, sample)
            assert list(completion.ids) == expected(on, PROMPTS[i], completion, params, seed)
            ended = completion.ids[-1] == tiny.EOS
            assert tiny.EOS not in completion.ids[:-1]
            assert completion.finish_reason == ("stop" if ended else "length")
            assert ended or len(completion.ids) == 40


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_it_says_what_generate_says(family: str) -> None:
    on = policy(family)
    params = SamplingParams(max_new_tokens=40, greedy=True)
    ours = decoder(on).sample(PROMPTS, 1, params, seed=5)
    theirs = GenerateSampler(on, tiny.tokenizer(), [tiny.EOS]).sample(PROMPTS, 1, params, seed=5)
    assert ids(ours) == ids(theirs)
    torch.testing.assert_close(said_logp(ours), said_logp(theirs), rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def everyone() -> tuple[Policy, list[Group]]:
    """A policy, and what it says with all completions in flight."""
    on = policy()
    return on, list(decoder(on).sample(PROMPTS, 3, SamplingParams(max_new_tokens=20), seed=7))


# Every pair of the three.
@pytest.mark.parametrize("behind", [0, 1, 2])
@pytest.mark.parametrize("in_flight", [1, 2, 5, 12])
def test_company_changes_nothing(
    everyone: tuple[Policy, list[Group]], in_flight: int, behind: int
) -> None:
    on, alone = everyone
    params = SamplingParams(max_new_tokens=20)
    tokens = 12 * ((in_flight + behind) % 2)
    sampler = decoder(on, in_flight=in_flight, tokens=tokens, behind=behind)
    some = sampler.sample(PROMPTS, 3, params, seed=7)
    assert ids(some) == ids(alone)
    torch.testing.assert_close(said_logp(some), said_logp(alone), rtol=0, atol=1e-5)
    part = sampler.sample(PROMPTS[2:], 3, params, seed=7, first=2)
    assert ids(part) == ids(alone)[2:]


@pytest.mark.parametrize(
    "options",
    [
        {"greedy": True, "repetition_penalty": 1.3},
        {"temperature": 0.6},
        {"top_k": 5, "top_p": 0.9},
        {"min_p": 0.2, "repetition_penalty": 1.3, "temperature": 1.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("behind", [0, 1])
def test_the_options_of_sampling(options: dict[str, Any], behind: int) -> None:
    on = policy()
    params = SamplingParams(max_new_tokens=20, **options)
    groups = decoder(on, in_flight=3, behind=behind).sample(PROMPTS, 2, params, seed=3)
    for i, group in enumerate(groups):
        for sample, completion in enumerate(group.completions):
            seed = derive(3, i, sample)
            assert list(completion.ids) == expected(on, PROMPTS[i], completion, params, seed)


def test_a_sliding_window_that_cuts_prompt_and_completion() -> None:
    on = policy("Mistral", sliding_window=6)
    params = SamplingParams(max_new_tokens=24, greedy=True)
    ours = decoder(on, eos=[]).sample(PROMPTS, 2, params, seed=3)
    theirs = GenerateSampler(on, tiny.tokenizer(), []).sample(PROMPTS, 2, params, seed=3)
    assert ids(ours) == ids(theirs)


def test_the_models_modes_come_back() -> None:
    model = tiny.add_lora(tiny.model())
    tiny.stir(model)
    on = Policy(model)
    sampler = decoder(on)
    model.train()
    modes = [module.training for module in model.modules()]
    sampler.sample(PROMPTS, 2, SamplingParams(max_new_tokens=12), seed=3)
    assert [module.training for module in model.modules()] == modes


class Watched(PagedCache):
    """Notes how many pages are owned, and at the end that none is."""

    made: ClassVar[list[Watched]] = []
    most = 0

    def __init__(self, pages: int):
        super().__init__(pages)
        Watched.made.append(self)

    def take(self, count: int) -> list[int]:
        taken = super().take(count)
        self.most = max(self.most, self.pages - self.free)
        return taken


@pytest.mark.parametrize("behind", [0, 1])
def test_pages_are_those_of_what_was_said_and_come_back(
    monkeypatch: pytest.MonkeyPatch, behind: int
) -> None:
    monkeypatch.setattr("fusedgrpo.models.ragged_decode.PagedCache", Watched)
    on = policy()
    sampler = decoder(on, behind=behind)
    Watched.made.clear()
    groups = sampler.sample(PROMPTS, 4, SamplingParams(max_new_tokens=64), seed=2)
    (cache,) = Watched.made
    spare = 1
    prompts = sum(-(-len(p) // 16) for p in PROMPTS)
    own = sum(-(-(len(c.ids) - 1 + behind) // 16) for g in groups for c in g.completions)
    assert spare + prompts < cache.most <= spare + prompts + own < prompts + 16 * 4
    assert cache.free == cache.pages - spare, "all pages have come back"


def test_memory_that_runs_out_costs_no_finished_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    on = policy()
    params = SamplingParams(max_new_tokens=30)
    alone = decoder(on).sample(PROMPTS, 3, params, seed=9)
    sampler = decoder(on)
    plain, calls, finished = decode_loop.RaggedDecoder.next, [0], []

    def failing(self: Any, rows: Any, *more: Any) -> Any:
        calls[0] += 1
        if calls[0] in (12, 13, 25):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")
        return plain(self, rows, *more)

    complete = sampler._completion

    def noting(live: Any) -> Any:
        finished.append((live.asked.index, live.sample))
        return complete(live)

    monkeypatch.setattr(decode_loop.RaggedDecoder, "next", failing)
    monkeypatch.setattr(sampler, "_completion", noting)
    assert ids(sampler.sample(PROMPTS, 3, params, seed=9)) == ids(alone)
    assert len(finished) == len(set(finished)) == 12, "none was decoded twice"
    assert sampler.execution.oom_retry.retries == 3
    assert sampler.execution.oom_retry.in_flight is not None


def test_a_signal_is_heeded_before_the_next_token(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(BaseException):
        pass

    on = policy()
    sampler = decoder(on, eos=[])
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 5:
            raise Stop

    monkeypatch.setattr(Execution, "check_interrupt", lambda self: check())
    with pytest.raises(Stop):
        sampler.sample(PROMPTS, 2, SamplingParams(max_new_tokens=30), seed=0)
    assert len(calls) == 5


def test_logits_that_are_not_finite_are_an_error_that_names_the_row() -> None:
    on = policy()
    sampler = decoder(on)
    with torch.no_grad():
        on.causal_lm.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="data row 40, token 1"):
        sampler.sample(PROMPTS[:1], 2, SamplingParams(max_new_tokens=4), seed=0, rows=[40])


@contextlib.contextmanager
def as_rows(on: Policy) -> Any:
    layout, on.layout = on.layout, "rows"
    yield
    on.layout = layout


def test_a_model_that_it_cannot_decode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on = policy()
    with as_rows(on), pytest.raises(ModelError, match=r"sampler: decoder needs.*auto"):
        decoder(on)
    from fusedgrpo.models import cached_attention

    plain: Callable[..., Tensor] = cached_attention.TokenPlan.attend

    def wrong(self: Any, *arguments: Any, **options: Any) -> Tensor:
        return plain(self, *arguments, **options | {"scaling": 0.01})

    monkeypatch.setattr(cached_attention.TokenPlan, "attend", wrong)
    with pytest.raises(ModelError, match=r"does not give the log-probs of Qwen2.*auto"):
        decoder(on)


def test_warm_up_runs_the_longest_token_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    on = policy()
    sampler = decoder(on, in_flight=5)
    plain, seen = decode_loop.RaggedDecoder.next, []

    def noting(self: Any, rows: Any, *more: Any) -> Any:
        seen.append([row.said for row in rows])
        return plain(self, rows, *more)

    monkeypatch.setattr(decode_loop.RaggedDecoder, "next", noting)
    assert sampler.warm_up(PROMPTS, 3, SamplingParams(max_new_tokens=50))
    assert seen == [[49] * 5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits(dtype: torch.dtype) -> None:
    on = Policy(tiny.model(), compute_dtype=dtype)
    groups = decoder(on).sample(PROMPTS, 2, SamplingParams(max_new_tokens=20), seed=1)
    assert (said_logp(groups) - policys_logp(on, groups)).abs().max() < 0.3


def test_steps_a_step_behind_drop_what_was_said_after_the_end() -> None:
    on = policy()
    params = SamplingParams(max_new_tokens=30)
    launched: list[int] = []
    for behind in (0, 1):
        sampler = decoder(on, behind=behind)
        counted = [0]
        plain = decode_loop.RaggedDecoder.next

        def counting(
            self: Any, rows: Any, *more: Any, counted: list[int] = counted, plain: Any = plain
        ) -> Any:
            counted[0] += len(rows)
            return plain(self, rows, *more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode_loop.RaggedDecoder, "next", counting)
            groups = sampler.sample(PROMPTS, 3, params, seed=9)
        launched.append(counted[0])
        tokens = sum(len(c.ids) - 1 for g in groups for c in g.completions)
        ended = sum(c.finish_reason == "stop" for g in groups for c in g.completions)
        assert tokens <= counted[0] <= tokens + behind * ended
    assert launched[1] > launched[0]
