"""The facts of ``run.json`` in words: model, data, batch, hardware, versions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from fusedgrpo.engine.reporting.formatting import quantity
from fusedgrpo.engine.reporting.metrics_log import Row, finite
from fusedgrpo.engine.reporting.run_record import newest_session

GIB = 2**30


def described(facts: Mapping[str, Any], rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Names and values, without those that nobody has written down."""
    newest = newest_session(facts)
    versions = _part(newest, "versions").items()
    found = [
        ("When", "; ".join(_sessions(facts))),
        ("Steps", _steps(facts, rows)),
        ("Model", _model(_part(facts, "model"))),
        ("Trained", _adapter(facts)),
        ("Data", _data(_part(facts, "data"))),
        ("Batch", _batch(_part(facts, "batch"))),
        ("Hardware", _machine(_part(newest, "machine"))),
        ("Computed by", _computed(facts)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions)),
        ("Command", str(newest.get("command") or "")),
    ]
    return [(name, value) for name, value in found if value]


def memory_table(facts: Mapping[str, Any]) -> list[list[str]]:
    """Phase, GB that were planned, GB that were measured; none without a plan."""
    memory = _part(facts, "memory")
    phases, measured = _part(_part(memory, "plan"), "phases"), _part(memory, "measured")
    return [[name, _gb(planned), _gb(measured.get(name))] for name, planned in phases.items()]


def bound_line(facts: Mapping[str, Any], shares: Mapping[str, float]) -> str:
    """How near a run came to the best that its GPU can do, or why that is not known; empty where
    there is nothing to say. shares: by phase."""
    card = _part(facts, "roofline")
    if reason := card.get("unknown"):
        return f"How near this is to the best that the GPU can do is not said: {reason}."
    flops, bandwidth = finite(card.get("flops")), finite(card.get("bandwidth"))
    if not shares or not flops or not bandwidth:
        return ""
    each = ", ".join(f"{phase} {share:.0%}" for phase, share in shares.items())
    return (
        f"Of the best that the GPU can do ({card.get('name')}, by its data sheet "
        f"{flops / 1e12:,.0f} TFLOP/s in 16 bit and {bandwidth / 1e9:,.0f} GB/s): {each}. "
        "Rewards, reading and waiting count as time, and not as work."
    )


def _part(facts: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of the file that others may have written."""
    part = facts.get(name)
    return part if isinstance(part, Mapping) else {}


def _gb(size: Any) -> str:
    value = finite(size)
    return "-" if value is None else f"{value / 1e9:.2f}"


def _sessions(facts: Mapping[str, Any]) -> Iterator[str]:
    sessions = facts.get("sessions")
    for session in sessions if isinstance(sessions, list) else []:
        if isinstance(session, Mapping):
            begun, ended = _time(session.get("started")), _time(session.get("ended"))
            how = session.get("how") or "running or killed"
            yield f"{begun} to {ended or '?'} ({how})" if ended else f"since {begun} ({how})"


def _time(text: Any) -> str:
    try:
        return datetime.fromisoformat(str(text)).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return ""


def _steps(facts: Mapping[str, Any], rows: Sequence[Row]) -> str:
    total, done = finite(facts.get("total_steps")), rows[-1]["step"]
    return f"{done} of {total:.0f}" if total else ""


def _model(model: Mapping[str, Any]) -> str:
    if not model:
        return ""
    quantisation = _part(model, "quantisation")
    kind = quantisation.get("kind") or quantisation.get("method")
    stored = f"{quantisation.get('bits')} bits ({kind})" if quantisation else model.get("dtype")
    words = [
        model.get("name"),
        model.get("architecture"),
        f"{_count(model.get('parameters'))} parameters",
        _named("weights in", stored),
    ]
    return ", ".join(dict.fromkeys(str(word) for word in words if word))


def _adapter(facts: Mapping[str, Any]) -> str:
    adapter, model = _part(facts, "adapter"), _part(facts, "model")
    if not model:
        return ""
    share = f"{_count(model.get('trainable'))} weights"
    if not adapter:
        return f"all weights ({share})"
    named = adapter.get("target_modules")
    targets = ", ".join(map(str, named)) if isinstance(named, list) else str(named)
    words = [adapter.get("type"), _named("r", adapter.get("r"))]
    words.append(_named("alpha", adapter.get("alpha")))
    words.append(f"on {_many(adapter.get('modules'), 'layer')} ({targets}): {share}")
    return ", ".join(str(word) for word in words if word)


def _data(data: Mapping[str, Any]) -> str:
    if not data:
        return ""
    words = [str(data.get("source") or "?"), _many(data.get("rows"), "prompt")]
    if data.get("skipped"):
        words.append(f"{_many(data['skipped'], 'row')} left out")
    for name, count in _part(data, "held_out").items():
        words.append(f"{count} held out" + (f" ({name})" if name else ""))
    words.append(f"longest prompt {_many(data.get('longest_prompt'), 'token')}")
    return ", ".join(words)


def _batch(batch: Mapping[str, Any]) -> str:
    if not batch:
        return ""
    words = [
        f"{_many(batch.get('prompts_per_step'), 'prompt')} x "
        f"{_many(batch.get('generations'), 'completion')} a step",
        f"{_many(batch.get('prompts_per_rollout'), 'prompt')} sampled at once",
        f"{_many(batch.get('tokens_per_microbatch'), 'token')} a micro-batch",
    ]
    if (passes := finite(batch.get("iterations"))) and passes > 1:
        words.append(f"{passes:.0f} passes")
    return ", ".join(words)


def _machine(machine: Mapping[str, Any]) -> str:
    if not machine:
        return ""
    words = []
    if machine.get("gpu"):
        words.append(f"{machine['gpu']} ({_gib(machine.get('gpu_memory'))})")
    words.append(f"{machine.get('cpu') or '?'}, {_many(machine.get('threads'), 'thread')}")
    words.append(_gib(machine.get("memory")))
    if (count := finite(machine.get("processes"))) and count > 1:
        words.append(f"{count:.0f} processes")
    words += [_named("computing in", machine.get("precision")), str(machine.get("platform") or "")]
    return ", ".join(word for word in words if word)


def _computed(facts: Mapping[str, Any]) -> str:
    names = {"attention": "attention", "layout": "layout", "sampler": "sampler"}
    names |= {"rollout_weights": "rollout weights", "kernels": "kernels"}
    return ", ".join(f"{words} {facts[name]}" for name, words in names.items() if facts.get(name))


def _named(name: str, value: Any) -> str:
    """``alpha 16``; nothing for a value that is not there."""
    return "" if value is None else f"{name} {value}"


def _many(count: Any, name: str) -> str:
    """``1 prompt``, ``2 prompts``; a question mark for a number that is not there."""
    return quantity(count, name) if isinstance(count, int) else f"? {name}s"


def _gib(size: Any) -> str:
    value = finite(size)
    return "? GiB" if value is None else f"{value / GIB:.0f} GiB"


def _count(number: Any) -> str:
    value = finite(number)
    if value is None:
        return "?"
    for unit, word in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {word}"
    return f"{value:.0f}"
