"""The benchmark has a case for every op, every case computes, and without a card it says so."""

from __future__ import annotations

import csv
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import graft_kernels
from graft_kernels import bench
from graft_kernels.launch import INTERPRETED

NOT_OPS = {"launch", "operands", "bench"}


def test_every_op_of_the_package_has_a_case() -> None:
    modules = {info.name for info in pkgutil.iter_modules(graft_kernels.__path__)}
    assert set(bench.OPS) == modules - NOT_OPS


def test_without_arguments_everything_is_timed() -> None:
    parsed = bench.parse([])
    assert (parsed.ops, parsed.out, parsed.quick, parsed.compile) == ([], None, False, True)


def test_the_command_line_is_understood() -> None:
    parsed = bench.parse(["nf4", "rope", "--out", "x.csv", "--quick", "--no-compile"])
    assert (parsed.ops, parsed.out, parsed.quick, parsed.compile) == (["nf4", "rope"], Path("x.csv"), True, False)


def test_an_unknown_op_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        bench.parse(["nf5"])
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert "no such op: nf5" in said
    assert "rms_norm" in said


def test_without_a_card_it_exits_with_2_and_one_sentence() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "graft_kernels.bench", "nf4"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "graft_kernels.bench needs a CUDA card, and torch finds none.\n"


def test_quick_is_the_smallest_size_of_each_op() -> None:
    for op in bench.OPS:
        all_sizes = bench.token_sizes(op, quick=False)
        assert bench.token_sizes(op, quick=True) == all_sizes[:1] == (min(all_sizes),)


def test_a_row_says_how_much_of_the_card_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "milliseconds", lambda call, quick: (call(), 1.5, 3.0))

    def missing() -> bench.Call:
        raise ImportError

    def failing() -> bench.Call:
        raise RuntimeError("out of memory")

    providers = {"graft": bench.timed(float, 2.0), "liger": missing, "eager": failing}
    (row,) = bench.measure(bench.Case("x", "1x1", "forward", providers, nbytes=100, flops=600), (100.0, 500.0), True)
    assert (row["provider"], row["ms"], row["p20"], row["p80"]) == ("graft", 2.0, 1.5, 3.0)
    assert row["roofline"] == pytest.approx(0.6)  # 600 operations at 500 a ms are 1.2 of 2 ms
    assert set(row) <= set(bench.COLUMNS)


def test_lines_go_to_the_file_and_a_failure_of_ours_to_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cases(tokens: int, options: bench.Options) -> Iterator[bench.Case]:
        yield bench.Case("nf4", "1x1", "decode", {"graft": bench.timed(float, 2.0)}, nbytes=100)

    def broken(tokens: int, options: bench.Options) -> Iterator[bench.Case]:
        yield bench.Case("rope", "1x1", "forward", {"eager": bench.timed(float, 2.0)}, nbytes=100)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "OPS", {"nf4": cases, "rope": broken})
    monkeypatch.setattr(bench, "milliseconds", lambda call, quick: (call(), 1.5, 3.0))
    monkeypatch.setattr(bench, "ceilings", lambda quick: (100.0, 100.0))
    facts = dict.fromkeys(("card", "driver", "torch", "triton", "peers", "commit"), "known")
    monkeypatch.setattr(bench, "facts", lambda: facts)
    out = tmp_path / "out.csv"
    assert bench.main(["nf4", "--quick", "--out", str(out)]) == 0
    with out.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert tuple(row) == bench.COLUMNS
    assert (row["card"], row["op"], row["provider"], row["ms"]) == ("known", "nf4", "graft", "2.0")
    assert bench.main(["--quick"]) == 1
    assert "graft is missing from: rope 1x1 forward" in capsys.readouterr().err


# In an interpreting process the kernels would run in bf16, which the interpreter cannot.
if not INTERPRETED:
    # Of the fused kernel there is none on the CPU.
    @pytest.mark.parametrize("op", sorted(set(bench.OPS) - {"fused_linear"}))
    def test_every_case_computes_at_a_small_size(op: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        small = {"H": 128, "I": 192, "HEADS": 4, "KEY_HEADS": 2, "D": 64, "V": 320, "RANK": 4, "DEVICE": device}
        for name, value in small.items():
            monkeypatch.setattr(bench, name, value)
        seen = 0
        for case in bench.OPS[op](32, bench.Options(compile=False)):
            assert case.op == op
            assert case.nbytes > 0 or case.flops > 0
            for name, provide in case.providers.items():
                if name.startswith("graft") or name == "eager":
                    provide()()
                    seen += name.startswith("graft")
        assert seen > 0 or (op, device) == ("attention", "cpu")  # whose kernels are all of the card
