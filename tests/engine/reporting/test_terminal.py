"""The command line with standard streams that are closed, full or left by their reader."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from fusedgrpo.engine.reporting.terminal import Forgiving, forgiving

TALKS = """
import logging, os, sys
from fusedgrpo.engine.reporting.terminal import keep_streams
keep_streams()
logging.basicConfig(level=logging.WARNING)
for number in range(3000):
    print("a line that nobody reads", number)
    sys.stderr.write("nor this one\\n")
logging.getLogger("fusedgrpo").warning("nor this")
with open(sys.argv[1], "w") as file:
    assert file.fileno() > 2
    os.write(1, b"not into the file")
    file.write("to the end")
"""


@pytest.mark.parametrize(
    "redirect", [">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full", "2>/dev/full", "2>&1 | head -n 1"]
)
def test_a_process_goes_on_whatever_its_streams_are(tmp_path: Path, redirect: str) -> None:
    end = tmp_path / "end"
    (tmp_path / "talks.py").write_text(TALKS)
    run = "exec(open(__import__('sys').argv[2]).read())"
    command = f'"{sys.executable}" -c "{run}" "{end}" "{tmp_path}/talks.py" {redirect}'
    done = subprocess.run(
        ["bash", "-c", command + "; exit ${PIPESTATUS[0]}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert end.read_text() == "to the end"


def test_a_failure_is_said_once_and_the_text_s_own_are_not_hidden(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    stream = forgiving(Full(), "Standard output")
    assert forgiving(stream, "") is stream
    with caplog.at_level(logging.WARNING, "fusedgrpo"):
        assert stream.write("abc") == 3 and stream.write("d") == 1
        stream.flush()
    assert caplog.text.count("No space left on device") == 1
    ascii_only = Forgiving(io.TextIOWrapper(io.BytesIO(), encoding="ascii"), "out")
    with pytest.raises(UnicodeError):
        ascii_only.write("é")
