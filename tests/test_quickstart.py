"""``examples/quickstart.ipynb`` runs from top to bottom, and shows a run as a notebook should."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
STEPS = 3


def texts(cell: Any) -> list[str]:
    """What the outputs of a cell say, each as text."""
    found = [output.get("text") or output["data"]["text/plain"] for output in cell.outputs]
    return ["".join(text) for text in found]


def check_outputs(cells: dict[str, Any], steps: int) -> None:
    """The outputs of a notebook that was executed."""
    everything = [text for cell in cells.values() for text in texts(cell)]
    assert not any("%|" in text or "it/s" in text for text in everything), "a bar of a library"
    opened = texts(cells["trainer = GRPOTrainer("])
    assert len(opened) == 1 and opened[0].startswith("ready after "), opened
    shown = texts(cells["trainer.train()"])
    panels = [text for text in shown if "fusedgrpo ─" in text]
    assert len(panels) == 1 and f"step {steps}/{steps}" in panels[0] and "done" in panels[0]
    assert "The run" in shown[-1] and "reward_std" in shown[-1]
    assert len(shown) <= 9, "notes are few, and the panel is one output"


def by_source(notebook: Any) -> dict[str, Any]:
    """Its cells with code, by the piece of their source that the checks above name them by."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    named = ("trainer = GRPOTrainer(", "trainer.train()")
    return {
        next((name for name in named if name in cell.source), str(i)): cell
        for i, cell in enumerate(code)
    }


@pytest.mark.slow  # a kernel that imports torch
def test_the_quickstart_runs_and_its_panel_is_one_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    model = tiny.save(tmp_path / "model")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<pad> {{ m.content }} {% endfor %}<bos>"
    tokenizer.save_pretrained(model)
    parameters.source = (
        f"from pathlib import Path\nMODEL = {str(model)!r}\nSTEPS = {STEPS}\n"
        "import torch; torch.set_num_threads(1)"
    )
    client = nbclient.NotebookClient(
        notebook,
        timeout=None,  # a busy machine is many times slower
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    check_outputs(by_source(notebook), STEPS)


def test_the_outputs_that_are_committed_are_those_of_a_whole_run() -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = by_source(notebook)
    counts = [cell.execution_count for cell in cells.values()]
    assert counts == list(itertools.islice(itertools.count(1), len(counts)))
    (steps,) = (c.source.rpartition("STEPS = ")[2] for c in cells.values() if "STEPS =" in c.source)
    check_outputs(cells, int(steps))
    (curve,) = (c for c in cells.values() if "reward.png" in c.source)
    assert any("image/png" in output.get("data", {}) for output in curve.outputs)
