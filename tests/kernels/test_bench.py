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

NOT_OPS = {"launch", "operands", "bench", "fused_hopper"}  # the last is fused_linear's kernel on one kind of card


def test_every_op_of_the_package_has_a_case() -> None:
    modules = {info.name for info in pkgutil.iter_modules(graft_kernels.__path__)}
    assert set(bench.OPS) == modules - NOT_OPS | {"lora_overhead"}


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
    case = bench.Case("x", "1x1", "forward", {"graft": bench.timed(float, 2.0)}, nbytes=100, flops=600)
    (row,) = bench.measure(case, (100.0, 500.0), True)
    assert (row["provider"], row["ms"], row["p20"], row["p80"]) == ("graft", 2.0, 1.5, 3.0)
    assert row["roofline"] == pytest.approx(0.6)  # 600 operations at 500 a ms are 1.2 of 2 ms
    assert set(row) <= set(bench.COLUMNS)
    assert bench.line(row).split() == ["graft", "2.0000", "ms", "(1.5000", "to", "3.0000)", "60.0%"]


@pytest.mark.parametrize("overhead", [None, {"graft": "eager"}])
def test_a_provider_that_fails_says_how_and_one_that_is_not_there_says_nothing(
    monkeypatch: pytest.MonkeyPatch, overhead: dict[str, str] | None
) -> None:
    monkeypatch.setattr(bench, "milliseconds", lambda call, quick: (call(), 1.5, 3.0))
    monkeypatch.setattr(bench, "in_turns", lambda calls, quick, lead: dict.fromkeys(calls, (1.0, 1.0, 1.0)))
    monkeypatch.setattr(bench, "captured", lambda call: (call(), call)[1])

    def missing() -> bench.Call:
        bench.peer("a_package_that_nobody_has.ops", "Function")
        raise AssertionError

    def without_its_own_dependency() -> bench.Call:
        raise ImportError("no module named something\nat all")

    def failing() -> object:
        raise RuntimeError

    providers: dict[str, bench.Provider] = {
        "liger": missing,
        "unsloth": without_its_own_dependency,
        "eager": lambda: failing,
        "graft": bench.timed(float, 2.0),
    }
    rows = list(bench.measure(bench.Case("x", "1", "forward", providers, 1, overhead=overhead), (1.0, 1.0), True))
    assert [row["provider"] for row in rows] == ["unsloth", "eager", "graft"]
    assert [row.get("note") for row in rows] == [
        "failed: ImportError: no module named something", "failed: RuntimeError", None
    ]  # fmt: skip
    assert bench.line(rows[1]).split() == ["eager", "failed:", "RuntimeError"]
    assert all(set(row) <= set(bench.COLUMNS) for row in rows)
    assert "overhead" not in rows[2]


def test_calls_that_are_compared_take_turns_and_none_is_always_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], list[str]()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    def taking(name: str, base: float) -> bench.Call:
        def call() -> None:
            order.append(name)
            now[0] += base + len(order) % 7  # some calls take longer than others

        return call

    for name, value in {"CACHE_BYTES": 8, "DEVICE": "cpu"}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = bench.in_turns({"one": taking("one", 10.0), "two": taking("two", 100.0)}, quick=True, lead=2)
    rounds = list(zip(order[::2], order[1::2], strict=True))
    assert {tuple(sorted(each)) for each in rounds} == {("one", "two")}
    assert {each[0] for each in rounds} == {"one", "two"}
    for name, base in (("one", 10.0), ("two", 100.0)):
        median, low, high = found[name]
        assert base <= low < median < high < base + 7


def test_an_overhead_is_a_difference_in_parts_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "captured", lambda call: call)
    taken = {bench.BASE: 2.0, "graft: no adapters": 3.0, "graft": 3.1, "eager": 2.5}
    monkeypatch.setattr(bench, "in_turns", lambda calls, quick, lead: {name: (taken[name],) * 3 for name in calls})
    over = {"graft": "graft: no adapters", "eager": bench.BASE}
    providers = {name: bench.timed(float, 1.0) for name in taken}
    rows = list(bench.measure(bench.Case("x", "1", "forward", providers, 0, 1, over), (1.0, 1.0), True))
    assert [row["ms"] for row in rows] == list(taken.values())
    assert [row.get("overhead") for row in rows] == [None, None, pytest.approx(0.05), pytest.approx(0.25)]
    assert bench.line(rows[2]).endswith("adds +5.0%")


def test_a_case_that_can_be_no_graph_takes_turns_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    leads = list[int]()

    def in_turns(calls: dict[str, bench.Call], quick: bool, lead: int) -> dict[str, tuple[float, float, float]]:
        leads.append(lead)
        return {name: (float(str(call())),) * 3 for name, call in calls.items()}

    monkeypatch.setattr(bench, "captured", lambda call: lambda: 1.0)
    monkeypatch.setattr(bench, "in_turns", in_turns)
    providers = {"graft": bench.timed(float, 2.0)}
    for graphs, ms in ((True, 1.0), (False, 2.0)):
        case = bench.Case("x", "1", "forward", providers, flops=1, overhead={}, graphs=graphs)
        assert [row["ms"] for row in bench.measure(case, (1.0, 1.0), True)] == [ms]
    assert leads[1] > leads[0] > 0  # the host needs longer for its launches than for a graph


def test_lines_go_to_the_file_and_a_failure_of_ours_to_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cases(tokens: int, options: bench.Options) -> Iterator[bench.Case]:
        yield bench.Case("nf4", "1x1", "decode", {"graft": bench.timed(float, 2.0)}, nbytes=100)

    def broken(tokens: int, options: bench.Options) -> Iterator[bench.Case]:
        providers = {"graft": bench.timed(float, "no number"), "eager": bench.timed(float, 2.0)}
        yield bench.Case("rope", "1x1", "forward", providers, nbytes=100)

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
    assert bench.main(["--quick", "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "graft is missing from: rope 1x1 forward" in said.err
    assert "failed: ValueError: could not convert" in said.out
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["op"], row["provider"], row["ms"]) for row in rows] == [
        ("nf4", "graft", "2.0"), ("rope", "graft", ""), ("rope", "eager", "2.0")
    ]  # fmt: skip
    assert rows[1]["note"].startswith("failed: ValueError")


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
            assert not case.overhead or {*case.overhead, *case.overhead.values(), bench.BASE} == set(case.providers)
            for name, provide in case.providers.items():
                if name.startswith("graft") or name == "eager":
                    provide()()
                    seen += name.startswith("graft")
        assert seen > 0 or (op, device) == ("attention", "cpu")  # whose kernels are all of the card
