from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from fusedgrpo.engine.reporting import plots
from fusedgrpo.engine.reporting.report import write_report
from fusedgrpo.errors import DataError


def make_rows(rewards, **more):
    return [{"step": i, "reward": r, **more} for i, r in enumerate(rewards, start=1)]


def make_run(path, rows, config="learning_rate: 5.0e-7\nfinetuning_type: lora\n"):
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "config.resolved.yaml").write_text(config)
    (path / "run.json").write_text('{"sessions": [{"versions": {"torch": "2.1"}}]}')
    (path / "completions").mkdir()
    for step in (1, 20):
        record = {
            "step": step,
            "group": 0,
            "row": 3,
            "prompt": [{"role": "user", "content": "<script>alert(1)</script>"}],
            "completion": f"answer {step} <img src=x onerror=alert(2)>",
            "finish_reason": "stop",
            "length": 5,
            "rewards": {"<b>accuracy</b>": 1.0, "format": None},
            "reward": 1.0,
            "advantage": 0.5,
        }
        name = f"completions/step-{step:06d}.jsonl"
        (path / name).write_text(json.dumps(record) + "\n")
    return path


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """Drawing has its own tests and takes its time."""
    monkeypatch.setattr(plots, "render", lambda name, rows: b"png" if name == "reward" else None)


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.seen, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "rect", "circle", "line", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("rect", "circle", "line", "path"):
            assert self.open.pop() == tag


def test_the_report_holds_all_its_parts(tmp_path):
    rows = make_rows(
        [i / 20 for i in range(20)],
        **{
            "rewards/accuracy/mean": 0.5,
            "time/sample": 3.0,
            "time/score": 0.0,
            "time/update": 1.0,
            "memory/peak": 2.5e9,
            "eval_rewards/accuracy/mean": 0.75,
        },
    )
    path = write_report(make_run(tmp_path, rows))
    page = path.read_text()
    assert path == tmp_path / "report.html"
    assert (tmp_path / "plots/reward.png").read_bytes() == b"png"
    for part in (
        "The run learned",
        "far too small for LoRA",
        "data:image/png;base64,cG5n",
        '<th scope="row">rewards/accuracy/mean</th>',
        '<th scope="row">eval_rewards/accuracy/mean</th>',
        "(75%)",
        "Peak memory: 2.5 GB",
        "Completions of step 1<",
        "Completions of step 20<",
        "finetuning_type: lora",
        "torch 2.1",
    ):
        assert part in page


def test_the_page_is_well_formed_and_asks_for_nothing_outside(tmp_path):
    page = write_report(make_run(tmp_path, make_rows([0.5] * 20))).read_text()
    tags = Tags(page)
    assert tags.open == []
    assert "&lt;b&gt;accuracy&lt;/b&gt;" in page
    assert not {"link", "iframe", "object", "base", "form"} & {tag for tag, _ in tags.seen}
    for _, attributes in tags.seen:
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
    # Of the scripts and styles that may run, each is named by its hash, and there is no other.
    policy = next(a["content"] for tag, a in tags.seen if a.get("http-equiv"))
    allowed = set(re.findall(r"'sha256-[^']+'", policy))
    own = re.findall(r"<(?:script|style)>(.*?)</(?:script|style)>", page, re.DOTALL)
    assert {hashed(text) for text in own} == allowed
    assert len(own) == len(allowed) and "unsafe" not in policy and "*" not in policy
    assert policy.startswith("default-src 'none'")
    others = [a for tag, a in tags.seen if tag in ("script", "style") and a]
    assert others == [{"type": "application/json", "id": "data"}]
    assert "MIT License" in page and "Leon Sorokin" in page


def hashed(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_a_run_without_completions_and_config_is_reported_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.0}\n')
    out = write_report(tmp_path, tmp_path / "elsewhere.html")
    assert "Too short to tell" in out.read_text()


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"metrics\.jsonl' has no rows"):
        write_report(tmp_path)


def test_the_same_prompts_are_shown_before_and_after(tmp_path):
    run = make_run(tmp_path, make_rows([0.5] * 20))
    (run / "held_out").mkdir()

    def answer(row, reward, text):
        return {"row": row, "prompt": "1 + <b>1</b>", "completion": text, "length": 3,
                "reward": reward, "rewards": {"accuracy": reward}}  # fmt: skip

    before = [answer(0, 0.0, "three"), answer(1, 1.0, "two"), answer(2, 0.0, "x")]
    after = [answer(0, 1.0, "<i>two</i>"), answer(1, 0.0, "five"), answer(2, 0.0, "y")]
    for step, records in ((0, before), (20, after)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (run / f"held_out/step-{step:06d}.jsonl").write_text(text)
    page = write_report(run).read_text()
    assert "3 prompts, step 0 and step 20: 1 lost, 1 newly solved, 1 never." in page
    assert page.index(">lost<") < page.index(">newly solved<") < page.index(">never<")
    assert "&lt;i&gt;two&lt;/i&gt;" in page and "<b>1</b>" not in page
    assert Tags(page).open == []


FOREIGN = [None, 7, -1e308, "text", [], [1], [["x"]], {}, {"a": None}, True]


@pytest.mark.parametrize("key", ["row", "set", "prompt", "completion", "length", "rewards"])
def test_records_of_another_shape_are_no_end_of_a_report(tmp_path, key):
    """Nor is one whose lists do not fit together, a configuration that is none, or a number that
    no number is."""
    run = make_run(tmp_path, make_rows([0.5] * 20))
    (run / "config.resolved.yaml").write_text("a: [")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "reward": %s}\n{"step": true}\n' % ("9" * 5000))
        file.write('{"step": 22, "reward": 1e308, "entropy": -1e308}\n' + "[" * 100_000 + "\n")
    good = {"row": 0, "group": 0, "prompt": "1?", "completion": "2", "length": 1, "reward": 1.0,
            "rewards": {"a": 1.0}, "advantage": 0.5}  # fmt: skip
    odd = [{**good, key: value} for value in FOREIGN] + [{}, {"reward": 1e308}]
    drift = [{**record, "tokens": ["a", "b"], "before": [-1.0, 1e308], "after": [-1.0, -1.0]}
             for record in odd]  # fmt: skip
    drift += [
        {**good, "tokens": 3, "before": 1.0},
        {**good, "tokens": ["a"], "before": [], "after": []},
    ]
    for name, records in (("completions", odd), ("held_out", odd), ("drift", drift)):
        (run / name).mkdir(exist_ok=True)
        for step in (0, 20):
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (run / name / f"step-{step:06d}.jsonl").write_text(lines)
    page = write_report(run).read_text()
    assert Tags(page).open == [] and "20 steps" not in page and "22 steps" in page
    assert not re.search(r"\bnan\b|\binf\b|undefined", re.sub(r"(?s)<script.*?</script>", "", page))


def test_one_of_a_thing_is_not_many(tmp_path):
    run = make_run(tmp_path, [{"step": 1, "reward": 1.0, "time/sample": 1.0, "mine": 2.0}])
    (run / "completions/step-000020.jsonl").unlink()
    answer = {"row": 0, "prompt": "1?", "completion": "1", "length": 1, "reward": 0.0}
    (run / "held_out").mkdir()
    for step in (0, 1):
        (run / f"held_out/step-{step:06d}.jsonl").write_text(json.dumps(answer) + "\n")
    page = re.sub(r"(?s)<(script|style).*?</\1>", "", write_report(run).read_text())
    assert "1 step<" in page and "each of 1 prompt," in page and ">1 token<" in page
    assert "1 other metric<" in page
    assert not re.search(r"(?<![\d.,])1 (steps|prompts|completions|tokens|groups|metrics)\b", page)


def test_a_reason_says_which_steps_it_is_about(tmp_path):
    rows = make_rows([0.5] * 40, entropy=0.5)
    for row in rows[10:]:
        row["entropy"] = 0.001
    page = write_report(make_run(tmp_path, rows)).read_text()
    assert re.search(
        r"The entropy collapsed[^<]*\s*<span class=\"soft\">\(steps 36 to 40\)</span>", page
    )
    assert "entropy_coef: 0.001." in page
