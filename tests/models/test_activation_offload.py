"""Activation offload: the numbers stay, the memory goes, and nothing is read before it is there."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusedgrpo.errors import ConfigError
from fusedgrpo.models import activation_offload as module
from fusedgrpo.models.activation_offload import CudaStreams, NoStreams, OffloadActivations
from fusedgrpo.models.policy import Policy

LAYERS = 6
PROMPT = [5, 6, 7, 8]
PAIRS = [(PROMPT, [12, 13, 14, tiny.EOS]), (PROMPT, [5, 6]), ([9, 9], [2]), ([3], [3, 1, 1, 4, 5])]
SHORT = PAIRS[:2]
LIMIT = 256  # bytes: below a layer input of any of these batches, above what else is saved


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of these tests takes several."""
    monkeypatch.setattr(module, "CHUNK", 256)


# Around both passes, as the loop has it. It ends with a test.
UPDATE = contextlib.ExitStack()


@pytest.fixture(autouse=True)
def _no_update_is_left() -> Iterator[None]:
    yield
    UPDATE.close()


class LateStreams:
    """A side stream as late as it may be: a copy runs when somebody waits for it or a later one.

    What was fetched is NaN until then. ``early``: device memory that was let go before its copy.
    """

    def __init__(self) -> None:
        self.chunks: set[int] = set()
        self.queue: list[tuple[Any, int, Tensor, bool]] = []
        self.issued = self.done = self.early = self.copies_out = 0
        self.fetched: list[Any] = []

    def new_chunk(self) -> Tensor:
        chunk = torch.full((module.CHUNK,), 255, dtype=torch.uint8)
        self.chunks.add(chunk.untyped_storage().data_ptr())
        return chunk

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> int:
        for to, source in pairs:
            back = to.untyped_storage().data_ptr() not in self.chunks
            on_device, chunk = (to, source) if back else (source, to)
            if back:
                on_device.fill_(255)
            place = weakref.ref(on_device.untyped_storage())
            if back and place not in self.fetched:
                self.fetched.append(place)
            self.queue.append((place, on_device.storage_offset(), chunk, back))
        self.copies_out += not back
        self.issued += 1
        self.queue.append((None, 0, torch.empty(0), False))
        return self.issued

    def wait(self, event: int) -> None:
        while self.done < event:
            place, start, chunk, back = self.queue.pop(0)
            if place is None:
                self.done += 1
                continue
            storage = place()
            if storage is None:
                self.early += 1
                continue
            on_device = torch.empty(0, dtype=torch.uint8).set_(storage)[start : start + len(chunk)]
            if back:
                on_device.copy_(chunk)
            else:
                chunk.copy_(on_device)

    def fetched_alive(self) -> int:
        return sum(place() is not None for place in self.fetched)


def made(*, lora: bool = False, reentrant: bool = False, family: str = "Qwen2") -> Policy:
    model = tiny.model(family, num_hidden_layers=LAYERS)
    wrapped = tiny.add_lora(model) if lora else model
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    # Reentrant ones need embeddings with a gradient; transformers 5.23 gives one to all.
    if reentrant:
        model.enable_input_require_grads()
    elif hasattr(model, "_require_grads_hook"):
        model.disable_input_require_grads()
    policy = Policy(wrapped.train())
    UPDATE.enter_context(policy.training())
    return policy


def loss_of(policy: Policy, pairs: Any = PAIRS) -> Tensor:
    logp = policy.logprobs(policy.pack(pairs)).logp
    return (logp * torch.linspace(-1, 1, len(logp))).sum()


def take_gradients(policy: Policy) -> list[Tensor]:
    grads = [p.grad for _, p in policy.trainable() if p.grad is not None]
    policy.model.zero_grad(set_to_none=True)
    return grads


def assert_same(one: Iterable[Tensor], other: Iterable[Tensor]) -> None:
    pairs = list(zip(one, other, strict=True))
    assert pairs
    assert all(torch.equal(a, b) for a, b in pairs)


def decoder_layers(policy: Policy) -> Any:
    return policy.causal_lm.get_decoder().layers


@contextlib.contextmanager
def layer_inputs(policy: Policy) -> Iterator[list[Any]]:
    """Weak references to the storages of the layers' inputs, as the forward pass comes by."""
    seen: list[Any] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args: seen.append(weakref.ref(args[0].untyped_storage()))
        )
        for layer in decoder_layers(policy)
    ]
    yield seen
    for handle in handles:
        handle.remove()


def alive(references: list[Any]) -> int:
    return sum(reference() is not None for reference in references)


# --- the numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_loss_and_gradients_are_the_same_bit_for_bit(
    lora: bool, reentrant: bool, late: bool
) -> None:
    policy = made(lora=lora, reentrant=reentrant)
    assert policy.layout == "shared"
    expected = []
    for pairs in (PAIRS, SHORT):
        loss = loss_of(policy, pairs)
        loss.backward()
        expected.append([loss.detach(), *take_gradients(policy)])

    streams = LateStreams() if late else None
    offload = OffloadActivations("cpu", min_bytes=LIMIT, streams=streams)
    for pairs, want in zip((PAIRS, SHORT), expected, strict=True):
        with offload:
            loss = loss_of(policy, pairs)
        loss.backward()
        assert_same([loss.detach(), *take_gradients(policy)], want)
    assert offload.host_bytes
    if streams is not None:
        assert streams.copies_out >= 2 * LAYERS
        assert streams.fetched and not streams.early


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_backward_pass_may_run_inside(reentrant: bool) -> None:
    policy = made(reentrant=reentrant)
    loss_of(policy).backward()
    expected = take_gradients(policy)
    streams = LateStreams()
    with OffloadActivations("cpu", min_bytes=LIMIT, streams=streams):
        loss = loss_of(policy)
        of_forward = streams.copies_out
        loss.backward()
    assert_same(take_gradients(policy), expected)
    assert streams.copies_out == of_forward, "what a layer's own backward needs is left alone"


def test_models_with_sliding_windows_without_checkpointing() -> None:
    policy = Policy(tiny.model("Gemma3", num_hidden_layers=4))
    loss_of(policy).backward()
    expected = take_gradients(policy)
    streams = LateStreams()
    with OffloadActivations("cpu", min_bytes=1, streams=streams):
        loss = loss_of(policy)
    loss.backward()
    assert_same(take_gradients(policy), expected)
    assert not streams.early


def test_dropout_repeats_itself() -> None:
    grads = []
    for offload in (contextlib.nullcontext(), OffloadActivations("cpu", min_bytes=LIMIT)):
        policy = Policy(tiny.add_lora(tiny.model(num_hidden_layers=3), lora_dropout=0.5).train())
        for layer in decoder_layers(policy):
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = lambda f, *a: checkpoint(
                f, *a, use_reentrant=False
            )
        torch.manual_seed(1)
        with offload:
            loss = loss_of(policy)
        loss.backward()
        grads.append(take_gradients(policy))
    assert_same(*grads)


# --- the memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_the_inputs_of_the_layers_are_released(lora: bool, reentrant: bool) -> None:
    policy = made(lora=lora, reentrant=reentrant)
    with layer_inputs(policy) as inputs:
        loss = loss_of(policy)
    assert alive(inputs) == LAYERS
    loss.backward()
    del loss
    assert alive(inputs) == 0

    with layer_inputs(policy) as inputs:
        during: list[int] = []
        for layer in decoder_layers(policy):
            layer.mlp.register_forward_pre_hook(lambda *_: during.append(alive(inputs)))
        with OffloadActivations("cpu", min_bytes=LIMIT):
            loss = loss_of(policy)
    # The model itself holds on to the embeddings while it runs, the graph does if they are a leaf;
    # reentrant checkpoints save their input when they are done.
    assert during == ([1, 2, 3, 4, 4, 4] if reentrant else [1, 2, 3, 3, 3, 3])
    leaf = lora and reentrant
    assert alive(inputs) <= leaf, "the last two to be saved are of the norm and the head"
    loss.backward()
    del loss
    assert alive(inputs) == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_at_most_two_are_back_at_a_time(reentrant: bool) -> None:
    policy = made(lora=True, reentrant=reentrant)
    streams = LateStreams()
    back: list[int] = []
    with OffloadActivations("cpu", min_bytes=LIMIT, streams=streams):
        loss = loss_of(policy)
    for layer in decoder_layers(policy):
        layer.mlp.register_forward_pre_hook(lambda *_: back.append(streams.fetched_alive()))
    loss.backward()
    assert len(back) == LAYERS
    # The next one is on its way while a layer is computed, except behind the first layer.
    assert back == [2] * (LAYERS - 1) + [1]


def test_host_memory_is_that_of_the_largest_micro_batch() -> None:
    policy = made()
    offload = OffloadActivations("cpu", min_bytes=LIMIT)

    def host_bytes(pairs: Any) -> int:
        with offload:
            loss = loss_of(policy, pairs)
        loss.backward()
        return offload.host_bytes

    small = host_bytes(SHORT)
    large = host_bytes(PAIRS)
    assert 0 < small < large
    assert [host_bytes(p) for p in (PAIRS, SHORT, PAIRS)] == [large] * 3
    fresh = OffloadActivations("cpu", min_bytes=LIMIT)
    with fresh:
        loss_of(policy)
    assert fresh.host_bytes == large
    tokens = len(policy.pack(PAIRS).input_ids)
    assert large >= LAYERS * 16 * 4 * tokens


def test_a_storage_that_is_saved_again_is_moved_once() -> None:
    streams = LateStreams()
    x = torch.randn(8, 16, requires_grad=True)
    with OffloadActivations("cpu", min_bytes=LIMIT, streams=streams):
        h = x.tanh()  # saves h
        others = [x.exp() for _ in range(4)]  # h leaves the device
        y = h.t() @ h + h[2:10, ::2].sum() + (h[:, :1].expand(8, 16) * h).sum()
    assert streams.copies_out == 1 + len(others)
    (y.sum() + sum(o.sum() for o in others)).backward()
    got, x.grad = x.grad, None
    h = x.tanh()
    y = h.t() @ h + h[2:10, ::2].sum() + (h[:, :1].expand(8, 16) * h).sum()
    (y.sum() + sum(x.exp().sum() for _ in range(4))).backward()
    assert got is not None and x.grad is not None
    torch.testing.assert_close(got, x.grad)
    assert not streams.early


def test_an_address_that_is_used_again_is_not_taken_for_the_same_tensor() -> None:
    x = torch.randn(64, requires_grad=True)
    scales = [float(i) for i in range(50)]
    with OffloadActivations("cpu", min_bytes=LIMIT):
        total = sum((x * s).tanh().sum() for s in scales)
    (got,) = torch.autograd.grad(total, x)
    (expected,) = torch.autograd.grad(sum((x * s).tanh().sum() for s in scales), x)
    assert torch.equal(got, expected)


# --- errors and unusual orders --------------------------------------------------------------------


class Failure(RuntimeError):
    pass


def fail(*_: Any) -> None:
    raise Failure


@pytest.mark.parametrize("in_backward", [False, True])
def test_after_an_error_the_same_micro_batch_starts_clean(in_backward: bool) -> None:
    policy = made(lora=True)
    streams = LateStreams()
    offload = OffloadActivations("cpu", min_bytes=LIMIT, streams=streams)
    with offload:
        loss = loss_of(policy)
    loss.backward()
    del loss
    expected, host_bytes = take_gradients(policy), offload.host_bytes

    layer = decoder_layers(policy)[3].mlp
    with layer_inputs(policy) as inputs, pytest.raises(Failure):
        if not in_backward:
            handle = layer.register_forward_pre_hook(fail)
        with offload:
            loss = loss_of(policy)
        handle = layer.register_forward_pre_hook(fail)
        loss.backward()
    handle.remove()
    loss = None
    # torch keeps what a failed backward pass had in its queue until the next one.
    torch.ones((), requires_grad=True).backward()
    gc.collect()
    policy.model.zero_grad(set_to_none=True)
    assert alive(inputs) == streams.fetched_alive() == 0

    with offload:
        loss = loss_of(policy)
    loss.backward()
    assert_same(take_gradients(policy), expected)
    assert offload.host_bytes == host_bytes
    assert not streams.early


def test_an_allocation_that_fails_takes_nothing_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = made()
    loss_of(policy).backward()
    expected = take_gradients(policy)
    streams = NoStreams()
    offload = OffloadActivations("cpu", min_bytes=LIMIT, streams=streams)
    room = iter(range(7))

    def new_chunk() -> Tensor:
        if next(room, None) is None:
            raise Failure
        return torch.empty(module.CHUNK, dtype=torch.uint8)

    with monkeypatch.context() as patch, pytest.raises(Failure), offload:
        patch.setattr(streams, "new_chunk", new_chunk)
        loss_of(policy)
    assert offload.host_bytes == 7 * module.CHUNK
    with offload:
        loss = loss_of(policy)
    loss.backward()
    assert_same(take_gradients(policy), expected)


def test_two_forward_passes_before_their_backward_passes() -> None:
    policy = made()
    for pairs in (PAIRS, SHORT):
        loss_of(policy, pairs).backward()
    expected = take_gradients(policy)
    for first in (0, 1):
        streams = LateStreams()
        offload = OffloadActivations("cpu", min_bytes=LIMIT, streams=streams)
        losses = []
        for pairs in (PAIRS, SHORT):
            with offload:
                losses.append(loss_of(policy, pairs))
        for index in (first, 1 - first):
            losses[index].backward()
            losses[index] = None
        assert_same(take_gradients(policy), expected)
        assert not streams.early


def test_a_retained_graph_can_be_used_again() -> None:
    policy = made()
    loss_of(policy).backward()
    expected = take_gradients(policy)
    streams = LateStreams()
    with OffloadActivations("cpu", min_bytes=LIMIT, streams=streams):
        loss = loss_of(policy)
    for _ in range(3):
        loss.backward(retain_graph=True)
        assert_same(take_gradients(policy), expected)
        gc.collect()
        assert streams.fetched_alive() <= 2
    del loss
    gc.collect()
    assert streams.fetched_alive() == 0
    assert not streams.early


@pytest.mark.parametrize("order", [range(8), (3, 0, 6, 6, 1, 7), (7, 2, 5), (0,), ()])
def test_tensors_may_be_used_in_any_order_twice_or_never(order: Iterable[int]) -> None:
    streams = LateStreams()
    leaves = [torch.randn(100, requires_grad=True) for _ in range(8)]
    offload = OffloadActivations("cpu", min_bytes=LIMIT, streams=streams)
    with offload:
        outputs = [leaf.tanh() for leaf in leaves]  # each saves its output
        sums = [out.sum() for out in outputs]
    del outputs
    for i in order:
        (got,) = torch.autograd.grad(sums[i], leaves[i], retain_graph=True)
        assert torch.equal(got, torch.autograd.grad(leaves[i].tanh().sum(), leaves[i])[0])
        # The one in use, the one ahead of it; what the forward pass left are not fetched.
        assert streams.fetched_alive() <= 2
    used = offload.host_bytes
    del sums
    with offload:
        [leaf.tanh().sum() for leaf in leaves]
    assert offload.host_bytes == used
    streams.wait(streams.issued)
    assert not streams.early


def test_a_tensor_that_is_modified_after_it_was_saved_is_an_error() -> None:
    offload = OffloadActivations("cpu", min_bytes=LIMIT, streams=LateStreams())
    x = torch.randn(100, requires_grad=True)
    for later in (0, 1, 3):  # still on the device, being copied, gone
        with offload:
            y = x.exp()
            total = y.sum()
            y.mul_(2)
            kept = [x.tanh() for _ in range(later)]
        with pytest.raises(RuntimeError, match="modified in place"):
            total.backward()
        del kept
    small = torch.randn(2, requires_grad=True)
    with offload:
        y = small.exp()
        total = y.sum()
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified in place"):
        total.backward()


def test_a_tensor_that_is_modified_when_its_copy_is_complete_keeps_its_values() -> None:
    x = torch.randn(100, requires_grad=True)
    with OffloadActivations("cpu", min_bytes=LIMIT, streams=LateStreams()):
        y = x.exp()
        total = y.sum()
        kept = [x.tanh() for _ in range(2)]
        with torch.no_grad():
            y.mul_(2)
    total.backward()
    assert x.grad is not None and len(kept) == 2
    assert torch.equal(x.grad, x.detach().exp())


def test_a_storage_with_new_values_is_another_one() -> None:
    x = torch.randn(100, requires_grad=True)
    streams = LateStreams()
    with OffloadActivations("cpu", min_bytes=LIMIT, streams=streams):
        y = x.detach().clone()
        first = x * y
        kept = [x.tanh() for _ in range(2)]
        y.mul_(2)
        second = x * y
    (first + second).sum().backward()
    assert x.grad is not None and len(kept) == 2
    assert torch.equal(x.grad, y / 2 + y)


# --- what moves ---------------------------------------------------------------------------------


class Saved(torch.autograd.Function):
    """Saves its second argument and notes what came back."""

    back: Tensor

    @staticmethod
    def forward(ctx: Any, x: Tensor, saved: Tensor) -> Tensor:
        ctx.save_for_backward(saved)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (Saved.back,) = ctx.saved_tensors
        return grad, None


class Marked(Tensor):
    pass


BASE = torch.randn(12, 10, 8)


@pytest.mark.parametrize(
    "saved",
    [
        BASE,
        BASE.transpose(0, 2),
        BASE[3:7, ::2, 1],
        BASE[:, :1].expand(12, 5, 8),
        BASE.as_strided((20, 6), (3, 1), 11),
        BASE.bfloat16().permute(2, 0, 1),
        BASE.half()[5:],
        BASE.double().view(torch.float32),
        BASE.flatten()[1:1],
    ],
)
def test_values_strides_and_dtype_come_back(saved: Tensor) -> None:
    streams = LateStreams()
    x = torch.zeros(1, requires_grad=True)
    with OffloadActivations("cpu", min_bytes=LIMIT, streams=streams):
        out = Saved.apply(x, saved.detach())
        others = [Saved.apply(x, torch.randn(100)) for _ in range(2)]
    out.backward()
    back = Saved.back
    assert streams.copies_out == 3 and len(others) == 2
    assert back.dtype == saved.dtype and back.stride() == saved.stride()
    assert back.storage_offset() == saved.storage_offset()
    assert back.untyped_storage().data_ptr() != saved.untyped_storage().data_ptr()
    assert torch.equal(back, saved)


PARAMETER = nn.Parameter(torch.randn(16, 16))


@pytest.mark.parametrize(
    "saved",
    [
        PARAMETER,
        PARAMETER.t(),
        PARAMETER[2:, None].expand(14, 3, 16),
        nn.Parameter(torch.randn(16, 16), requires_grad=False).view(-1),
        torch.arange(100),
        torch.randn(100).as_subclass(Marked),
        torch.randn(LIMIT // 4 - 1),
        torch.randn(10, 10).to_sparse(),
        torch.randn(100, dtype=torch.complex64).conj().imag,
        torch.randn(100, device="meta"),
    ],
    ids=lambda t: f"{type(t).__name__}-{t.device.type}-{t.dtype}"[:40],
)
def test_what_is_no_large_activation_of_the_device_stays(saved: Tensor) -> None:
    streams = LateStreams()
    x = torch.zeros(1, requires_grad=True)
    offload = OffloadActivations("cpu", min_bytes=LIMIT, streams=streams)
    with offload:
        out = Saved.apply(x, saved)
    out.backward()
    assert offload.host_bytes == streams.copies_out == 0
    if saved.layout is torch.strided:
        assert Saved.back.data_ptr() == saved.data_ptr()
        assert Saved.back.stride() == saved.stride()
    if saved.device.type == "cpu":
        assert torch.equal(Saved.back.to_dense(), saved.to_dense())


def test_nothing_moves_where_nothing_is_saved() -> None:
    policy = made()
    offload = OffloadActivations("cpu", min_bytes=LIMIT)
    with offload, policy.scoring():
        loss_of(policy)
    assert offload.host_bytes == 0


def test_a_device_without_an_implementation_is_refused() -> None:
    with pytest.raises(ConfigError, match="mps"):
        OffloadActivations("mps")


# --- CUDA ---------------------------------------------------------------------------------------


def test_copies_start_behind_the_computation_and_it_goes_on_behind_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []

    class Stream:
        def __init__(self, name: str):
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

        def record_event(self) -> str:
            log.append(f"event on {self.name}")
            return "event"

        def wait_event(self, event: str) -> None:
            log.append(f"{self.name} waits for {event}")

    @contextlib.contextmanager
    def current(stream: Stream) -> Iterator[None]:
        log.append(f"enter {stream.name}")
        yield
        log.append(f"leave {stream.name}")

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        log.append("copy")
        yield target, torch.ones(3)

    target = torch.zeros(3)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", current)
    streams = CudaStreams(torch.device("cuda", 0))
    streams.wait(streams.copy(pairs()))
    assert log == [
        "side waits for main",
        "enter side",
        "copy",
        "event on side",
        "leave side",
        "main waits for event",
    ]
    assert torch.equal(target, torch.ones(3))


class Stack(nn.Module):
    """Layers under checkpoints, wide enough that their inputs are what counts."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x.float().square().mean()


@pytest.mark.gpu
def test_on_a_gpu_the_peak_is_lower_and_the_numbers_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CHUNK", 4 << 20)
    layers, tokens, width = 24, 8192, 1024
    model = Stack(layers, width).to("cuda", torch.bfloat16)
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    offload = OffloadActivations("cuda")

    def run(around: Any) -> tuple[int, list[Tensor]]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with around:
            loss = model(x)
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return torch.cuda.max_memory_allocated() - before, [loss.detach(), *grads]

    run(contextlib.nullcontext())  # cuBLAS takes its workspace
    peak, expected = run(contextlib.nullcontext())
    for _ in range(10):
        with_offload, got = run(offload)
        assert_same(got, expected)
    size = tokens * width * 2
    assert peak - with_offload > (layers - 5) * size
    assert layers * size <= offload.host_bytes <= (layers + 3) * size
    assert torch.cuda.memory_allocated() < 2 * peak


@pytest.mark.gpu
def test_on_a_gpu_the_policy_trains_the_same_with_a_busy_side_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = made(lora=True)
    policy.model.to("cuda")
    grads = []
    offload = OffloadActivations("cuda", min_bytes=LIMIT)
    copy = CudaStreams.copy

    def slow(self: CudaStreams, pairs: Any) -> Any:
        with torch.cuda.stream(self.side):
            torch.cuda._sleep(2_000_000)
        return copy(self, pairs)

    monkeypatch.setattr(CudaStreams, "copy", slow)
    for around in (contextlib.nullcontext(), offload, offload):
        with around:
            logp = policy.logprobs(policy.pack(PAIRS)).logp
            loss = (logp * torch.linspace(-1, 1, len(logp), device="cuda")).sum()
        loss.backward()
        grads.append(take_gradients(policy))
    assert_same(grads[0], grads[1])
    assert_same(grads[0], grads[2])
