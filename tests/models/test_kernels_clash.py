"""Decision 0001: no package named ``kernels`` at the repository root.

Hugging Face's ``kernels`` distribution is imported by every modelling file of transformers that
finds its metadata. A root-level ``kernels/`` of ours would be imported in its place.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import HUNG
from transformers.utils.import_utils import KERNELS_MIN_VERSION

ROOT = Path(__file__).parents[2]

# Every name is there and every decorator leaves what it decorates alone.
STUB = """
class _Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, first=None, *args, **kwargs): return first
    def __getattr__(self, name):
        if name.startswith("__"): raise AttributeError(name)
        return _Anything()
def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    if name[0].isupper(): return _Anything
    if name.startswith("use_"): return lambda *a, **k: (lambda decorated: decorated)
    return _Anything()
"""

FORWARD = """
import sys
sys.path.insert(0, sys.argv[1])   # the root, as `python -c` and `python -m` have it
sys.path.append(sys.argv[2])      # site-packages with the stub
import torch
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.utils import is_kernels_available
assert is_kernels_available(), "transformers does not see the stub: this proves nothing"
config = Qwen2Config(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=1)
model = AutoModelForCausalLM.from_config(config)
assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 16)
import kernels
print(kernels.__file__)
"""


@pytest.fixture
def stub_distribution(tmp_path: Path) -> Path:
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(STUB)
    version = KERNELS_MIN_VERSION  # each transformers knows a few versions of it
    info = site / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    return site


def forward_from(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", FORWARD, str(root), str(site)],
        cwd=root,
        env=env | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=HUNG,
    )


@pytest.mark.slow
def test_a_model_runs_from_the_repository_root_beside_the_kernels_distribution(
    stub_distribution: Path,
) -> None:
    result = forward_from(ROOT, stub_distribution)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(stub_distribution / "kernels" / "__init__.py")


@pytest.mark.slow
def test_a_kernels_package_at_the_root_would_break_it(
    stub_distribution: Path, tmp_path: Path
) -> None:
    """What the test above guards against: it fails for a root laid out like this."""
    root = tmp_path / "root"
    (root / "kernels").mkdir(parents=True)
    (root / "kernels" / "__init__.py").write_text('"""Ours."""\n')
    result = forward_from(root, stub_distribution)
    assert result.returncode != 0
    assert "cannot import name" in result.stderr and str(root / "kernels") in result.stderr
