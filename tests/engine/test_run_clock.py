"""Chat templates that write the date: always that of the run's start."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tiny

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.data.dataset import PromptDataset, load_prompts
from fusedgrpo.engine.run_clock import RunClock
from fusedgrpo.engine.trainer import GRPOTrainer
from fusedgrpo.errors import CheckpointError

START = datetime(2026, 3, 7, 9, 5)
DATED = (
    "{% if strftime_now is defined %}w{{ strftime_now('%-d') }} w{{ strftime_now('%-M') }}"
    "{% endif %}{% for m in messages %} {{ m.content }}{% endfor %}"
)
ROWS = [{"prompt": [{"role": "user", "content": f"w{i}"}], "answer": i} for i in range(30, 34)]


def tokenizer(template: str = DATED) -> Any:
    made = tiny.tokenizer()
    made.chat_template = template
    return made


def load(clock: RunClock, template: str = DATED) -> PromptDataset:
    return load_prompts(
        ROWS, GRPOConfig(), tokenizer(template), vocab_size=40, context_length=None, clock=clock
    )


@pytest.mark.parametrize("space", ["", "\n\n  ", "  "])
@pytest.mark.parametrize(
    "form", ["%d %b %Y", "%-d.%-m.%y", "%A, %d %B %Y", "%H:%M", "100%%", "%%d"]
)
def test_a_template_is_told_the_date_as_transformers_would(space: str, form: str) -> None:
    made = tokenizer(
        space + "{{ strftime_now('" + form + "') }}" + space + "<{{ messages|length }}>"
    )
    message = [{"role": "user", "content": "w5"}]
    arguments = RunClock(START).pinned(made.chat_template)
    rendered = made.apply_chat_template(message, tokenize=False, **arguments)
    assert rendered == f"{space}{START.strftime(form)}{space}<1>"


def test_a_template_without_a_date_is_left_alone() -> None:
    assert RunClock(START).pinned("{{ messages[0].content }}") == {}
    assert RunClock(START).pinned(None) == {}


def test_the_date_is_no_part_of_the_data_but_of_the_prompts() -> None:
    clock = RunClock(START)
    data = load(clock)
    assert data[0].prompt_ids == (7, 5, 30)
    clock.started += timedelta(days=2, minutes=-1)
    later = data.encoded_again()
    assert later[0].prompt_ids == (9, 4, 30) and data[0].prompt_ids == (7, 5, 30)
    assert later.fingerprint == data.fingerprint == load(RunClock(START)).fingerprint
    assert later.ids_fingerprint != data.ids_fingerprint


def trainer(folder: Path, template: str = DATED, **options: Any) -> GRPOTrainer:
    config = GRPOConfig(
        output_dir=str(folder),
        max_completion_length=4,
        num_generations=2,
        prompts_per_step=2,
        max_steps=4,
        learning_rate=1e-2,
        lora_r=2,
        save_steps=2,
        use_cpu=True,
        bf16=False,
        **options,
    )

    def length(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [float(sum(ids)) for ids in completion_ids]

    return GRPOTrainer(
        tiny.model(), length, config, ROWS, processing_class=tokenizer(template)
    )  # fmt: skip


def test_a_run_resumed_on_another_day_goes_on_with_its_prompts(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    first.set_clock(START)
    first.train()
    weights = {n: p.detach().clone() for n, p in first.policy.trainable()}
    again = trainer(tmp_path)  # started now
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "step-000002"))
    assert again.clock.started == START
    assert again.data[0].prompt_ids == (7, 5, 30)
    for name, parameter in again.policy.trainable():
        assert parameter.equal(weights[name])


def test_another_chat_template_is_not_the_same_run(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    changed = trainer(tmp_path, template=DATED + "w4")
    with pytest.raises(CheckpointError, match="rows are the same, but are encoded to other tokens"):
        changed.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_version_0_1_is_resumed(tmp_path: Path) -> None:
    import json

    from fusedgrpo.engine import checkpoint_files as checkpoint

    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    first = trainer(tmp_path / "a", template)
    first.train()

    def as_then(path: Path) -> None:
        saved = tmp_path / "a" / "checkpoints" / "step-000002"
        for file in saved.rglob("*"):
            if file.is_file() and file.name != checkpoint.MANIFEST:
                (path / file.relative_to(saved)).parent.mkdir(exist_ok=True)
                (path / file.relative_to(saved)).write_bytes(file.read_bytes())
        state = json.loads((path / "state.json").read_text())
        del state["started"], state["prompt_ids"], state["config"]["text_as_user_turn"]
        state["data"] = first.data.fingerprint_of_format_1
        (path / "state.json").write_text(json.dumps(state))

    old = checkpoint.write_checkpoint(tmp_path / "old", 2, as_then)
    trainer(tmp_path / "b", template)._restore(old)
    other = trainer(tmp_path / "c", template + "w4")
    with pytest.raises(CheckpointError, match="the training prompts are not the same"):
        other._restore(old)
