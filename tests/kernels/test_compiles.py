"""Every kernel compiles for sm_80, sm_90 and sm_120 without a card, and spills no register to memory.

The cases are the `compile_cases()` of the test files beside this one. The table itself (kernel, constants, registers,
shared memory, spills) is written on demand by

    .venv/bin/python tests/kernels/test_compiles.py benchmarks/results/$(date +%F)-compiled-kernels.csv

Compiling happens in processes of its own, because Triton is made to believe in another card there.
"""

from __future__ import annotations

import ast
import csv
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import graft_kernels
from graft_kernels.launch import (
    AVAILABLE,
    CAPABILITIES,
    INTERPRETED,
    Compiled,
    compile_only,
    is_built,
    launch,
    tl,
    triton,
)
from graft_kernels.lora_linear import Linear, weight_columns, weight_rows
from graft_kernels.nf4 import NF4Weight

HERE = Path(__file__).parent
PROCESSES = 2

# Kernels that may spill on a card, by how many bytes a thread, compiled with which constant, and why that pays or costs
# nothing.
MAY_SPILL: dict[tuple[str, str], list[tuple[int, str, str]]] = {
    ("sm_90", "_fused_linear_kernel"): [
        (48, "", "65 to 128 tokens: 8 to 16 % faster than without a limit of registers")
    ],
    ("sm_90", "_fused_hopper_kernel"): [
        (168, "BESIDE_M=128", "384 tokens: 3 to 19 % faster than two tiles of 256"),
        (16, "RANK=64", "once a tile, before its first step: while the parts of S are added"),
    ],
}

# Kernels written for one kind of tensor core: on the others their op takes another one.
ONLY_ON = {"_fused_hopper_kernel": "sm_90", "_low_rank_parts_kernel": "sm_90"}

COLUMNS = (
    *("card", "kernel", "case", "constants", "num_warps", "num_stages"),
    *("registers", "shared", "stack", "local"),
)

Case = tuple[str, Callable[[], object]]


@triton.jit
def _spilling_on_purpose(x_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    # One warp holds 256 numbers a thread across the sum: more than it has registers for.
    offset = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offset)
    tl.store(x_ptr + offset, x / tl.sum(x, axis=0))


def all_cases() -> Iterator[Case]:
    """The cases of every test file beside this one."""
    for path in sorted(HERE.glob("test_*.py")):
        if path.name == Path(__file__).name or "def compile_cases(" not in path.read_text():
            continue
        spec = importlib.util.spec_from_file_location(f"compile_cases_of_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        for name, thunk in module.compile_cases():
            yield f"{path.stem.removeprefix('test_')}: {name}", thunk


def launched_kernels() -> dict[str, str]:
    """Every kernel of the package and its module: the `@triton.jit` functions that no other one calls."""
    found, called = {}, set()
    for info in pkgutil.iter_modules(graft_kernels.__path__, "graft_kernels."):
        for value in vars(importlib.import_module(info.name)).values():
            if not isinstance(value, triton.runtime.JITFunction):
                continue
            found[id(value)] = value.fn
            tree = ast.parse(textwrap.dedent(inspect.getsource(value.fn)))
            names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            called |= {id(value.fn.__globals__.get(name)) for name in names}
    kernels: dict[str, str] = {}
    for key, function in found.items():
        if key not in called:
            name, module = function.__name__, function.__module__
            # Profilers and this file's table know a kernel by its name alone.
            assert name not in kernels, f"{module} and {kernels[name]} both have a kernel {name}"
            kernels[name] = module
    return kernels


@functools.cache
def cuobjdump() -> Path:
    return Path(importlib.import_module("triton.backends.nvidia").__file__ or "").parent / "bin" / "cuobjdump"


def resources(cubin: bytes) -> dict[str, int]:
    """What the kernel in `cubin` takes: REG in numbers, STACK and LOCAL in bytes a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump()), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    assert usage.keys() == {"REG", "STACK", "LOCAL"}, text
    return usage


def rows_of(card: str, case: str, compiled: list[Compiled], seen: set[str]) -> Iterator[dict[str, Any]]:
    for kernel in compiled:
        key = kernel.name + hashlib.sha256(kernel.cubin).hexdigest()
        if key in seen:
            continue
        seen.add(key)
        usage = resources(kernel.cubin)
        yield {
            "card": card,
            "kernel": kernel.name,
            "case": case,
            "constants": " ".join(f"{name}={value}" for name, value in sorted(kernel.constants.items())),
            "num_warps": kernel.num_warps,
            "num_stages": kernel.num_stages,
            "registers": usage["REG"],
            "shared": kernel.shared,
            "stack": usage["STACK"],
            "local": usage["LOCAL"],
        }


def compile_part(part: int) -> dict[str, Any]:
    """Every PROCESSES-th case, on every card: runs in a process of its own."""
    rows: list[dict[str, Any]] = []
    errors: list[str] = []
    seconds: dict[str, float] = {}
    cases = list(all_cases())[part::PROCESSES]
    if part == 0:
        x = torch.empty(2**13, device="meta")
        cases.append(("this file: a spill", lambda: launch(_spilling_on_purpose, (1,), x, SIZE=2**13, num_warps=1)))
    for card in CAPABILITIES:
        seen: set[str] = set()
        with compile_only(card) as compiled:
            for name, thunk in cases:
                before, start = len(compiled), time.perf_counter()
                try:
                    thunk()
                    if len(compiled) == before:
                        errors.append(f"{card}, {name}: launched no kernel")
                    rows.extend(rows_of(card, name, compiled[before:], seen))
                except Exception:
                    errors.append(f"{card}, {name}: {traceback.format_exc(limit=-3)}")
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
    return {"rows": rows, "errors": errors, "seconds": seconds}


def compile_all() -> dict[str, Any]:
    """Rows and errors of all cases, from PROCESSES processes with caches of their own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder, f"{part}.json") for part in range(PROCESSES)]
        children = [
            subprocess.Popen(
                [sys.executable, __file__, "--part", str(part), str(result)],
                env=environment | {"TRITON_CACHE_DIR": str(Path(folder, f"cache{part}"))},
                stderr=subprocess.PIPE,
                text=True,
            )
            for part, result in enumerate(results)
        ]
        try:
            said = [child.communicate()[1] for child in children]
        finally:
            for child in children:
                child.kill()
        assert not any(child.returncode for child in children), "\n".join(said)
        parts = [json.loads(result.read_text()) for result in results]
    rows = [row for part in parts for row in part["rows"]]
    rows.sort(key=lambda row: (row["kernel"], row["constants"], row["card"]))
    seconds = {name: took for part in parts for name, took in part["seconds"].items()}
    return {"rows": rows, "errors": [error for part in parts for error in part["errors"]], "seconds": seconds}


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--part"]:
        Path(arguments[2]).write_text(json.dumps(compile_part(int(arguments[1]))))
        return
    (target,) = arguments
    result = compile_all()
    with Path(target).open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(row for row in result["rows"] if row["kernel"] != _spilling_on_purpose.fn.__name__)
    print(f"{len(result['rows'])} kernels in {target}; the slowest cases:")
    for name, took in sorted(result["seconds"].items(), key=lambda item: -item[1])[:10]:
        print(f"{took:7.1f} s  {name}")
    if result["errors"]:
        sys.exit("\n".join(result["errors"]))


# In an interpreting process there is nothing to compile with, and without Triton nothing to compile.
if AVAILABLE and not INTERPRETED:
    import pytest

    @pytest.fixture(scope="module")
    def compiled() -> dict[str, Any]:
        return compile_all()

    @pytest.mark.timeout(900)
    def test_every_case_compiles_for_every_card(compiled: dict[str, Any]) -> None:
        assert not compiled["errors"], "\n".join(compiled["errors"])
        assert {row["card"] for row in compiled["rows"]} == set(CAPABILITIES)

    def test_every_kernel_of_the_package_is_among_the_cases(compiled: dict[str, Any]) -> None:
        for card in CAPABILITIES:
            names = {row["kernel"] for row in compiled["rows"] if row["card"] == card}
            wanted = {name: module for name, module in launched_kernels().items() if ONLY_ON.get(name, card) == card}
            missing = {name: module for name, module in wanted.items() if name not in names}
            assert not missing, f"{card}: no compile_cases() launches {missing}"
            assert names - {_spilling_on_purpose.fn.__name__} <= wanted.keys()

    def test_no_kernel_spills_registers(compiled: dict[str, Any]) -> None:
        spilling = [row for row in compiled["rows"] if row["stack"] or row["local"]]
        # The one that must spill shows that a spill would be seen.
        on_purpose = [row for row in spilling if row["kernel"] == _spilling_on_purpose.fn.__name__]
        assert {row["card"] for row in on_purpose} == set(CAPABILITIES)
        surprises = []
        for row in spilling:
            exceptions = MAY_SPILL.get((row["card"], row["kernel"]), [])
            allowed = max((size for size, constant, _ in exceptions if constant in row["constants"]), default=0)
            if row not in on_purpose and row["stack"] + row["local"] > allowed:
                surprises.append(" ".join(f"{name}={row[name]}" for name in COLUMNS))
        assert not surprises, "\n".join(surprises)
        needed = {(row["card"], row["kernel"]) for row in spilling}
        assert set(MAY_SPILL) <= needed, "an exception that no kernel needs"

    def test_what_a_machine_has_built_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
        assert not is_built(_spilling_on_purpose)
        with compile_only("sm_90"):
            launch(_spilling_on_purpose, (1,), torch.empty(32, device="meta"), SIZE=32, num_warps=1)
        assert is_built(_spilling_on_purpose)

    def test_weights_and_adapters_of_every_layer_and_model_share_one_kernel_in_each_form(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A second model must not build again what the first one has built."""
        monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))

        def linear(N: int, K: int) -> Linear:
            blocks = N * K // 64
            weight = NF4Weight(
                packed=torch.empty(N * K // 2, dtype=torch.uint8),
                shape=(N, K),
                blocksize=64,
                absmax=torch.empty(blocks, dtype=torch.uint8),
                code2=torch.empty(256),
                absmax2=torch.empty(-(-blocks // 256)),
                offset=torch.empty(()),
            )
            return Linear(weight, torch.empty(16, K), torch.empty(N, 16))

        # Input and outputs of qkv, o, gate and up, down: of Llama 3.1 8B, Llama 2 7B and Qwen 2.5 7B.
        llama3 = [(4096, 4096, 1024, 1024), (4096, 4096), (4096, 14336, 14336), (14336, 4096)]
        llama2 = [(4096, 4096, 4096, 4096), (4096, 4096), (4096, 11008, 11008), (11008, 4096)]
        qwen = [(3584, 3584, 512, 512), (3584, 3584), (3584, 18944, 18944), (18944, 3584)]
        with compile_only("sm_90"), torch.device("meta"):
            for K, *outs in (*llama3, *llama2, *qwen):
                layers = [linear(N, K) for N in outs]
                weight_columns(layers, 2.0, torch.bfloat16)
                weight_rows(layers, 2.0, torch.bfloat16)
        assert len(list(tmp_path.glob("*/_weight_and_adapters_kernel.cubin"))) == 2


if __name__ == "__main__":
    main(sys.argv[1:])
