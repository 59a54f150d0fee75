from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fusedgrpo.engine.reporting.run_dir import RunDir
from fusedgrpo.errors import OutputDirError


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def leave_a_run(path: Path) -> None:
    with RunDir.open(path) as run:
        run.metrics.write_text('{"step": 1}\n')
        run.plots.mkdir()
        (run.plots / "reward.png").write_bytes(b"png")


def write_lock(path: Path, **holder: object) -> None:
    path.mkdir(exist_ok=True)
    (path / "run.lock").write_text(json.dumps(holder))


def test_open_creates_parents_and_close_gives_the_lock_back(tmp_path):
    run = RunDir.open(tmp_path / "a" / "b")
    assert json.loads((run.path / "run.lock").read_text())["pid"] == os.getpid()
    run.close()
    run.close()
    assert not (run.path / "run.lock").exists()


def test_the_log_is_written_and_no_longer_after_close(tmp_path):
    with RunDir.open(tmp_path) as run:
        logging.getLogger("fusedgrpo").info("for the log")
        logging.getLogger("fusedgrpo").info("half a character: \ud83d")
    logging.getLogger("fusedgrpo").info("too late")
    text = run.log.read_text()
    assert "for the log" in text and "half a character: \\ud83d" in text
    assert "too late" not in text


def test_warnings_still_reach_stderr_where_nobody_set_up_logging(tmp_path):
    script = (
        "import logging, sys; from fusedgrpo.engine.reporting.run_dir import RunDir\n"
        "with RunDir.open(sys.argv[1]): logging.getLogger('fusedgrpo').warning('mind this')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stderr.count("mind this") == 1
    assert "mind this" in (tmp_path / "run.log").read_text()


def test_a_living_run_is_refused_by_pid_and_host(tmp_path):
    with RunDir.open(tmp_path):
        with pytest.raises(
            OutputDirError, match=f"process {os.getpid()} on {socket.gethostname()}"
        ):
            RunDir.open(tmp_path)
        assert (tmp_path / "run.lock").exists()


def test_a_run_on_another_host_is_taken_to_live(tmp_path):
    write_lock(tmp_path, pid=dead_pid(), host="another-host", started=None)
    with pytest.raises(OutputDirError, match=r"another-host.*delete '.*run\.lock'"):
        RunDir.open(tmp_path)


def test_the_lock_of_a_dead_run_is_taken_over_and_said(tmp_path):
    pid = dead_pid()
    write_lock(tmp_path, pid=pid, host=socket.gethostname(), started=None)
    with RunDir.open(tmp_path) as run:
        assert f"process {pid}" in run.log.read_text()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_lock_whose_pid_was_given_to_another_process_is_taken_over(tmp_path):
    write_lock(tmp_path, pid=os.getpid(), host=socket.gethostname(), started="1")
    RunDir.open(tmp_path).close()


def test_a_torn_lock_does_not_block(tmp_path):
    (tmp_path / "run.lock").write_text('{"pi')
    RunDir.open(tmp_path).close()


def test_an_earlier_run_is_moved_aside_and_said(tmp_path):
    leave_a_run(tmp_path)
    (tmp_path / "notes.txt").write_text("the user's own")
    leave_a_run(tmp_path)
    with RunDir.open(tmp_path) as run:
        assert not run.metrics.exists()
        assert "previous/002" in run.log.read_text()
    assert (tmp_path / "previous/001/plots/reward.png").read_bytes() == b"png"
    assert (tmp_path / "previous/002/metrics.jsonl").exists()
    assert (tmp_path / "notes.txt").exists()


def test_resume_leaves_everything_and_appends_to_the_log(tmp_path):
    with RunDir.open(tmp_path) as run:
        logging.getLogger("fusedgrpo").info("before")
        run.metrics.write_text("{}\n")
    with RunDir.open(tmp_path, resume=True) as run:
        assert run.metrics.exists()
        assert "before" in run.log.read_text()
    assert not (tmp_path / "previous").exists()


def test_overwrite_deletes_the_run_and_nothing_else(tmp_path):
    leave_a_run(tmp_path)
    (tmp_path / "notes.txt").write_text("the user's own")
    with RunDir.open(tmp_path, overwrite=True) as run:
        assert not run.metrics.exists()
        assert not run.plots.exists()
    assert (tmp_path / "notes.txt").exists()
    assert not (tmp_path / "previous").exists()


def test_overwrite_moves_what_no_run_of_ours_left(tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "mine.png").write_bytes(b"png")
    RunDir.open(tmp_path, overwrite=True).close()
    assert (tmp_path / "previous/001/plots/mine.png").exists()


def test_a_path_below_a_file_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputDirError, match=r"output_dir '.*/file/run' cannot be written"):
        RunDir.open(tmp_path / "file" / "run")


def test_probe_refuses_what_open_would_and_leaves_no_trace(tmp_path):
    leave_a_run(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    RunDir.probe(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    with RunDir.open(tmp_path), pytest.raises(OutputDirError, match="in use by"):
        RunDir.probe(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputDirError, match="cannot be written"):
        RunDir.probe(tmp_path / "file" / "run")


def test_probe_says_whose_stale_lock_it_takes(tmp_path, caplog):
    pid = dead_pid()
    write_lock(tmp_path, pid=pid, host=socket.gethostname(), started=None)
    RunDir.probe(tmp_path)
    assert f"process {pid}" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputDirError, match="cannot be written"):
        RunDir.open(tmp_path)


def test_a_directory_that_refuses_the_probe_is_refused(tmp_path, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OutputDirError, match="cannot be written: Permission denied"):
        RunDir.open(tmp_path)
