from __future__ import annotations

from fusedgrpo.engine.reporting.formatting import (
    clock,
    number,
    one_line,
    printable,
    shorten,
    sparkline,
)


def test_number_keeps_three_digits():
    values = [0.0, 0.00012, 0.5, 12.345, 1234.5, 1e6, -0.25, None]
    shown = ["0.00", "1.2e-04", "0.500", "12.3", "1234", "1.0e+06", "-0.250", "-"]
    assert [number(value) for value in values] == shown


def test_clock():
    assert [clock(s) for s in (0, 59.6, 3725)] == ["0:00", "1:00", "1:02:05"]


def test_printable_keeps_text_and_drops_controls():
    assert printable("计算\u3000\t1\n\x07\x1b[31m\ud83d") == "计算\u3000\t1\n\ufffd\ufffd[31m\ufffd"


def test_shorten_keeps_both_ends():
    short = shorten("a" * 500 + "z" * 500, 101)
    assert short.startswith("aaa")
    assert short.endswith("zzz")
    assert len(short) <= 101
    assert shorten("abc", 101) == "abc"


def test_sparkline_spans_low_to_high_and_survives_equal_values():
    assert sparkline([0, 1, 2], 2) == "▁█"
    assert sparkline([5, 5], 10) == "▁▁"


def test_one_line_has_no_line_break():
    assert one_line("a\nb") == "a\\nb"
