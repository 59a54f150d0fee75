"""What the machine can do is asked in one place, and what is too old is said at import."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fusedgrpo import doctor, host
from fusedgrpo.errors import FusedGRPOError, VersionError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fresh() -> ModuleType:
    """The module as it is, whatever answers this session of tests was given."""
    spec = importlib.util.spec_from_file_location("fresh_host", host.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("line", "native"),
    [
        ("flags\t\t: fpu avx2", False),
        ("flags\t\t: fpu avx512f avx512_bf16", True),
        ("flags\t\t: amx_bf16 avx2", True),
        ("Features\t: fp asimd bf16", True),
        ("Features\t: fp asimd", False),
    ],
)
def test_a_cpu_has_bfloat16_by_its_flags(fresh, tmp_path, line: str, native: bool) -> None:
    fresh.CPUINFO = tmp_path / "cpuinfo"
    fresh.CPUINFO.write_text(f"processor : 0\nmodel name : A\n{line}\n\nprocessor : 1\n")
    assert fresh.has_bfloat16("cpu") is native
    assert fresh.cpu_name().startswith("A (")


def test_a_system_that_does_not_say_has_none(fresh, tmp_path) -> None:
    fresh.CPUINFO = tmp_path / "nothing"
    assert fresh.has_bfloat16(torch.device("cpu")) is False
    assert fresh.cpu_name() and fresh.cores() >= 1 and fresh.threads() >= 1


@pytest.mark.parametrize(
    ("capability", "native"), [((7, 5), False), ((8, 0), True), ((12, 0), True), (None, True)]
)
def test_a_gpu_has_bfloat16_by_its_generation(fresh, capability, native: bool) -> None:
    fresh.gpu_capability = lambda device: capability
    assert fresh.has_bfloat16("cuda") is native


def test_memory_is_all_that_there_is(fresh) -> None:
    """As the system counts it, less what it keeps for itself; not what is free."""
    said = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert fresh.memory() == pytest.approx(1024 * int(said["MemTotal"].split()[0]), rel=1e-3)


@pytest.mark.parametrize(
    ("gpu", "use_cpu", "device"),
    [(True, True, "cpu"), (True, False, "cuda"), (False, False, "cpu")],
)
def test_the_gpu_is_used_unless_the_cpu_is_asked_for(
    monkeypatch, gpu: bool, use_cpu: bool, device: str
) -> None:
    monkeypatch.setattr(host, "has_gpu", lambda: gpu)
    assert host.pick_device(use_cpu) == torch.device(device)


ASKING = re.compile(
    r"cuda\.(is_available|device_count|get_device_name|get_device_properties|mem_get_info"
    r"|get_device_capability|is_bf16_supported)|torch\.version\.|cpuinfo|cpu_count|getaffinity"
    r"|get_num_threads|sysconf|get_cpu_capability|importlib\.metadata|torch\.__version__",
)


def test_nothing_else_asks() -> None:
    files = [p for folder in ("fusedgrpo", "bench") for p in (ROOT / folder).rglob("*.py")]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        if path != Path(host.__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if ASKING.search(line)
    ]
    assert not found


# --- versions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("installed", ["2.9.1", "2.9.1+cu128", "2.8", "1.13.0"])
def test_an_older_torch_is_refused_and_both_versions_are_named(monkeypatch, installed: str) -> None:
    monkeypatch.setattr(host, "package_version", {"torch": installed}.get)
    with pytest.raises(VersionError, match=re.escape(f"torch 2.10 or later, this is {installed}")):
        host.require_packages()
    assert issubclass(VersionError, ImportError) and issubclass(VersionError, FusedGRPOError)


@pytest.mark.parametrize("installed", [None, "2.10", "2.10.0a0+git1", "2.13.0+cpu", "3.0", "10.0"])
def test_later_ones_and_none_are_not(monkeypatch, installed: str | None) -> None:
    monkeypatch.setattr(host, "package_version", {"torch": installed}.get)
    host.require_packages()


def test_it_is_said_at_import_without_importing_torch(tmp_path) -> None:
    (tmp_path / "torch-2.9.0.dist-info").mkdir()
    (tmp_path / "torch-2.9.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.9.0\n"
    )
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "try:\n    import fusedgrpo\nexcept ImportError as error:\n    print(error)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert done.stdout == (
        "fusedgrpo needs torch 2.10 or later, this is 2.9.0. Install it: pip install "
        "'torch>=2.10'.\nFalse\n"
    ), done.stderr


def test_what_is_refused_is_what_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, floor in host.FLOORS.items():
        assert f"{name}>={floor}" in project["dependencies"]


# --- doctor -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "bfloat16", "said"),
    [
        (False, True, "threads), computes in bfloat16"),
        (False, False, "threads), computes in float32"),
        (True, True, "GiB free, computes in bfloat16"),
        (True, False, "GiB free, computes in float16 with a loss scale"),
    ],
)
def test_doctor_says_in_what_a_run_would_compute(monkeypatch, gpu, bfloat16, said: str) -> None:
    monkeypatch.setattr(host, "has_gpu", lambda: gpu)
    monkeypatch.setattr(host, "gpu_count", lambda: 1)
    monkeypatch.setattr(host, "gpu_name", lambda device: "Tesla T4")
    monkeypatch.setattr(host, "gpu_memory", lambda device: (14 * 2**30, 15 * 2**30))
    monkeypatch.setattr(host, "has_bfloat16", lambda device: bfloat16)
    (check,) = doctor._devices()
    assert check.ok and said in check.finding
