"""Graft beside every peer that is installed, on the same shapes in one run: speed, memory, plans, loading, losses.

    python benchmarks/train.py --folder /tmp/bench --out results.txt
    python benchmarks/train.py --folder /tmp/bench --parts shapes --models llama31-8b --contenders graft,unsloth-off

The parts, each of which `--parts` can ask for alone:

    shapes       steps of BATCHxSEQUENCE random tokens. `@GIB` caps what the allocator may reserve: Graft plans for it;
                 a peer has no budget to be given, so for most such cases it is held against what the peers took of
                 their own accord within that, and runs under the cap where CAPPED_PEERS says so
    packed       chat samples of log-normal length, samples a second: ours packed, Unsloth in packs, the others padded
    budgets      Graft under caps from 6 to 80 GiB: memory and time as planned and as measured
    load         Graft's base model for the first time, from the disk's cache and from memory; and the next job on it
    curves       losses of the same steps from the same adapter, beside PEFT on bitsandbytes, and of both beside the
                 same model computed in fp32 (hf-fp32); and Graft's loop with PEFT's order of rounding (graft-as-peft)
    determinism  what sums in a fixed order cost, padded and packed

The checkpoints have the real shapes and random weights, and are written once into `--folder`. Every contender runs in
a process of its own, one after another, for at most `--limit` seconds; what it has done by then counts. Peers run with
gradient checkpointing (their default) and without it ("-off"). Rows are printed as they come and appended to a file of
JSON lines beside `--out`, which holds the table; with `--keep`, rows that are in it already are not measured again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

SHAPES: dict[str, dict[str, Any]] = {
    "llama31-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 5e5,
    },
    "llama2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama32-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 5e5,
        "tie_word_embeddings": True,
    },
}
MODELS = ("llama31-8b", "llama2-7b")
CASES = {
    "llama31-8b": ("8x2048", "8x2048@9.8", "2x2048", "1x2048", "1x2048@5.3", "1x2048@5", "4x2048"),
    "llama2-7b": ("1x512", "4x2048@8", "1x1024"),
    "llama32-1b": ("1x512", "2x2048", "8x2048"),
}
# The cap of these holds from the start of the process on, loading included.
FROM_THE_START = ("1x2048@5.3", "1x2048@5")
# Peers run these as well, under the cap.
CAPPED_PEERS = ("4x2048@8",)
BUDGETS = (*(f"4x2048@{gib}" for gib in (6, 8, 12, 16, 24, 40)), "4x2048")  # the last: the whole card
LOADS = ("first load", "from the disk", "from memory")
PARTS = ("shapes", "packed", "budgets", "load", "curves", "determinism")
CONTENDERS = ("graft", "graft-as-peft", "unsloth", "unsloth-off", "hf", "hf-off", "hf-fp32", "liger", "liger-off")
NEEDS = {"graft": "graft_worker", "unsloth": "unsloth", "hf": "peft", "liger": "liger_kernel"}
CURVE_STEPS = 60

Row = dict[str, Any]


def write_weights(sizes: dict[str, Any], folder: Path, device: str = "cuda") -> None:
    """A Llama of these sizes with random weights in bf16, without a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        **sizes,
        max_position_embeddings=8192,
        dtype="bfloat16",
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
    model.save_pretrained(folder, max_shard_size="3GB")


def write_checkpoint(name: str, folder: Path) -> None:
    """A randomly initialised checkpoint with a toy tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    write_weights(SHAPES[name], folder)
    backend = Tokenizer(models.BPE(byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.decoder = decoders.ByteLevel()
    marks = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=marks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["hello world"] * 10, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    tokenizer.save_pretrained(folder)


# What is to be done ---------------------------------------------------------------------------------------------------


def tasks_of(part: str, model: str, contender: str, cases: list[str] | None, initial: Path) -> list[Row]:
    """What one contender has to do for one part; nothing where the part is not its."""
    main = model != "llama2-7b"  # one model is enough for what does not depend on the shape
    if contender in ("hf-fp32", "graft-as-peft") and part != "curves":
        return []
    if part == "shapes":
        chosen = CASES[model] if cases is None else cases
        return [
            {"part": part, "case": case} | ({"from_start": True} if case in FROM_THE_START else {})
            for case in chosen
            if contender == "graft" or "@" not in case or case in CAPPED_PEERS
        ]
    if part == "packed" and main:
        return [{"part": part, "case": "chat"}]
    if part == "budgets" and main and contender == "graft":
        return [{"part": part, "case": case} for case in BUDGETS]
    if part == "load" and main:
        return (
            [{"part": part, "case": case} for case in LOADS]
            if contender == "graft"
            else [{"part": part, "case": "its own"}]
        )
    if part == "curves" and main and contender in ("graft", "graft-as-peft", "hf", "hf-fp32"):
        return [{"part": part, "case": f"{CURVE_STEPS} steps", "steps": CURVE_STEPS, "initial": str(initial)}]
    if part == "determinism" and main and contender == "graft":
        return [{"part": part, "case": case} for case in ("8x2048", "packed")]
    return []


def processes_of(tasks: list[Row], contender: str) -> list[list[Row]]:
    """Tasks that may share a process, and so one load: not those that time Graft's loading, or cap it."""
    own = [task for task in tasks if contender == "graft" and (task["part"] == "load" or "from_start" in task)]
    apart = [[task] for task in sorted(own, key=lambda task: task["part"] != "load")]
    rest = [task for task in tasks if [task] not in apart]
    return [*apart, *([rest] if rest else [])]


def installed(contender: str) -> bool:
    """Whether what it needs can be imported."""
    return importlib.util.find_spec(NEEDS[contender.partition("-")[0]]) is not None


def run_child(contender: str, model: str, folder: Path, tasks: list[Row], limit: float, temporary: Path) -> list[Row]:
    """Its rows, printed as they come; those that it made by the time limit."""
    offline = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "UNSLOTH_COMPILE_LOCATION": str(temporary / "unsloth"),
    }
    options = ["--child", contender, "--models", model, "--folder", str(folder), "--tasks", json.dumps(tasks)]
    log = temporary / f"{contender}.err"
    rows = []
    with log.open("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, __file__, *options],
            env=os.environ | offline,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        cut = threading.Event()

        def end() -> None:
            cut.set()
            os.killpg(child.pid, signal.SIGKILL)

        timer = threading.Timer(limit, end)
        timer.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("ROW "):
                    rows.append(json.loads(line[4:]))
                    yield_row(rows[-1])
            child.wait()
        finally:
            timer.cancel()
        errors.seek(0)
        told = errors.read()
    if cut.is_set():
        print(f"{contender}: cut after {limit:.0f} s, {len(tasks) - len(rows)} of its tasks not done", flush=True)
    elif len(rows) < len(tasks):
        print(f"{contender} failed:\n{told[-2500:]}", flush=True)
    elif any("failed" in row for row in rows):
        print(f"{contender} said:\n{told[-1500:]}", flush=True)
    return rows


_sinks: list[Path] = []


def yield_row(row: Row) -> None:
    """Print a row and keep it, at once: a run that is cut keeps what it has."""
    short = {name: value for name, value in row.items() if name not in ("losses", "planned_parts", "planned_seconds")}
    print(json.dumps(short), flush=True)
    for sink in _sinks:
        with sink.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


# Tables ---------------------------------------------------------------------------------------------------------------


def _percent(measured: float, planned: float) -> str:
    return f"{100 * (planned / measured - 1):+.1f} %"


def _planned(row: Row) -> str:
    if "planned_ms" not in row or "step_ms" not in row:
        return ""
    return (
        f"{row['planned_gib']} GiB ({_percent(row['peak_gib'], row['planned_gib'])}), "
        f"{row['planned_ms']} ms ({_percent(row['step_ms'], row['planned_ms'])})"
    )


def _fits(peer: Row, row: Row) -> bool:
    """Whether a peer's row may be held against ours: the same shape, within our cap where there is one."""
    shape, _, cap = row["case"].partition("@")
    other, _, its_cap = peer["case"].partition("@")
    if peer["contender"] == "graft" or (peer["model"], other) != (row["model"], shape) or "tok_s" not in peer:
        return False
    return not cap or its_cap == cap or peer["peak_gib"] <= float(cap) + 0.05


def table(rows: list[Row]) -> str:
    """All parts, the fastest of a case first."""
    parts = []
    for part in PARTS:
        own = [row for row in rows if row["part"] == part]
        if own:
            parts.append(f"{part}\n" + _TABLES[part](own))
    return "\n\n".join(parts)


def _speeds(rows: list[Row]) -> str:
    unit = "samples_s" if rows[0]["part"] == "packed" else "tok_s"
    lines = [
        f"{'model':<12}{'case':<13}{'contender':<13}{unit.replace('_', '/'):>10}{'step ms':>9}{'peak GiB':>10}"
        f"{'reserved':>10}{'x peer':>8}  planned (off by), remark"
    ]
    order = {case: place for place, case in enumerate(c for cases in CASES.values() for c in cases)}
    for row in sorted(rows, key=lambda row: (row["model"], order.get(row["case"], 99), -row.get(unit, 0))):
        ratio = ""
        if row["contender"] == "graft" and unit in row:
            found = [peer[unit] for peer in rows if _fits(peer, row) and unit in peer]
            ratio = f"{row[unit] / max(found):.2f}" if found else ""
        remark = ", ".join(filter(None, (_planned(row), row.get("failed"), row.get("remark"))))
        lines.append(
            f"{row['model']:<12}{row['case']:<13}{row['contender']:<13}{row.get(unit, ''):>10}"
            f"{row.get('step_ms', ''):>9}{row.get('peak_gib', ''):>10}{row.get('reserved_gib', ''):>10}{ratio:>8}"
            f"  {remark}"
        )
    return "\n".join(lines)


def _budgets(rows: list[Row]) -> str:
    lines = [
        f"{'case':<13}{'planned GiB':>12}{'peak GiB':>10}{'off':>9}{'planned ms':>12}{'step ms':>9}{'off':>9}  plan"
    ]
    for row in rows:
        if "failed" in row or "planned_gib" not in row:
            lines.append(f"{row['case']:<13} {row.get('failed', 'no plan')}")
            continue
        lines.append(
            f"{row['case']:<13}{row['planned_gib']:>12}{row['peak_gib']:>10}"
            f"{_percent(row['peak_gib'], row['planned_gib']):>9}{row['planned_ms']:>12}{row['step_ms']:>9}"
            f"{_percent(row['step_ms'], row['planned_ms']):>9}  {row.get('remark', '')} {row['plan']}"
        )
    return "\n".join(lines)


def _loads(rows: list[Row]) -> str:
    lines = [f"{'contender':<13}{'case':<16}{'load s':>8}{'imports s':>11}  then"]
    for row in rows:
        told = [f"next job ready after {row['next_job_s']} s"] if "next_job_s" in row else []
        told += [f"its first step after {row['next_job_step_s']} s"] if "next_job_step_s" in row else []
        told += [str(row[name]) for name in ("remark", "failed") if row.get(name)]
        lines.append(
            f"{row['contender']:<13}{row['case']:<16}{row['load_s']:>8}{row.get('import_s', ''):>11}  {'; '.join(told)}"
        )
    return "\n".join(lines)


def _curves(rows: list[Row]) -> str:
    by = {row["contender"]: row for row in rows if "losses" in row}
    if not {"graft", "hf"} <= by.keys():
        return "\n".join(f"{row['contender']}: {row.get('failed', 'done')}" for row in rows) + "\nboth are needed"
    ours, theirs, exact = by["graft"], by["hf"], by.get("hf-fp32")
    lines = [f"losses from {theirs['losses'][0]:.4f} to {theirs['losses'][-1]:.4f}; Graft beside PEFT on bitsandbytes"]
    lines += _beside(ours, theirs)
    if "graft-as-peft" in by:
        lines += ["the same, with every product of Graft's rounded where PEFT rounds it"]
        lines += _beside(by["graft-as-peft"], theirs)
    apart = _apart(ours, theirs)
    for step in range(0, len(apart), 10):
        losses = [row["losses"][step] for row in (ours, theirs, exact) if row is not None]
        lines.append(f"step {step + 1:>3}: " + " ".join(f"{loss:.4f}" for loss in losses))
    if exact is not None:
        lines.append("how far from the same steps in fp32: Graft, PEFT on bitsandbytes")
        of_ours, of_theirs = _apart(ours, exact), _apart(theirs, exact)
        for name, first, last in (("steps 1-10", 0, 10), ("steps 11-20", 10, 20), ("all steps", 0, len(apart))):
            mean = [sum(found[first:last]) / (last - first) for found in (of_ours, of_theirs)]
            verdict = "kept" if mean[0] <= 1.1 * mean[1] else "NOT KEPT"
            lines.append(f"mean of {name:<16}{mean[0]:>10.2e}{mean[1]:>10.2e}   at most 1.1 times PEFT's: {verdict}")
    return "\n".join(lines)


def _beside(ours: Row, theirs: Row) -> list[str]:
    apart = _apart(ours, theirs)
    gates = [
        ("worst of steps 1-10", max(apart[:10]), 5e-3),
        (f"mean of {len(apart)} steps", sum(apart) / len(apart), 1e-2),
        ("final loss, relative", abs(ours["final"] / theirs["final"] - 1), 5e-3),
    ]
    return [
        f"{name:<24}{found:>10.2e}   at most {most:.0e}: {'kept' if found <= most else 'NOT KEPT'}"
        for name, found, most in gates
    ]


def _apart(one: Row, other: Row) -> list[float]:
    return [abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True)]


def _determinism(rows: list[Row]) -> str:
    lines = [f"{'case':<10}{'in order ms':>12}{'off ms':>10}{'cost':>9}  the same loss twice: in order, off"]
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['case']:<10} {row['failed']}")
            continue
        lines.append(
            f"{row['case']:<10}{row['step_ms']:>12}{row['off_ms']:>10}{row['cost_percent']:>7} %  "
            f"{row['same_loss_twice']}, {row['same_loss_twice_off']}"
        )
    return "\n".join(lines)


_TABLES = {
    "shapes": _speeds,
    "packed": _speeds,
    "budgets": _budgets,
    "load": _loads,
    "curves": _curves,
    "determinism": _determinism,
}


# All of them ----------------------------------------------------------------------------------------------------------


def _list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=_list, default=list(PARTS), help=f"of {','.join(PARTS)} (all)")
    parser.add_argument(
        "--models", type=_list, default=list(MODELS), help=f"of {','.join(SHAPES)} ({','.join(MODELS)})"
    )
    parser.add_argument("--contenders", type=_list, default=list(CONTENDERS), help=f"of {','.join(CONTENDERS)} (all)")
    parser.add_argument("--cases", type=_list, help="of the part shapes, BATCHxSEQUENCE[@GIB] (those of the model)")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds a contender's process may take (300)")
    parser.add_argument("--folder", type=Path, help="where checkpoints lie or are written (a temporary folder)")
    parser.add_argument("--out", type=Path, help="a file for the table, with card, versions and command")
    parser.add_argument("--keep", action="store_true", help="keep the rows that are in --out's JSON lines already")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--tasks", type=json.loads, help=argparse.SUPPRESS)
    return parser


def _check(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    for name, known in (("parts", PARTS), ("models", tuple(SHAPES)), ("contenders", CONTENDERS)):
        if unknown := [value for value in getattr(given, name) if value not in known]:
            parser.error(f"--{name} has {unknown[0]!r}, known are {', '.join(known)}")


def _checkpoint(model: str, folder: Path) -> Path:
    found = folder / model
    if not (found / "tokenizer.json").exists():
        began = time.perf_counter()
        code = f"import train; train.write_checkpoint({model!r}, train.Path({str(found)!r}))"
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})
        print(f"checkpoint {model} written in {time.perf_counter() - began:.0f} s", flush=True)
    return found


def main() -> None:
    """The command line."""
    parser = _parser()
    given = parser.parse_args()
    _check(parser, given)
    if given.child:
        import contenders

        from graft_worker.processes import die_with_parent

        die_with_parent(signal.SIGKILL, os.getppid())  # a run that is cut leaves nothing on the card
        contenders.run(given.child, given.models[0], given.folder, given.tasks)
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit("benchmarks/train.py needs a CUDA card, and torch finds none.")
    from graft_kernels.bench import facts

    told = "\n".join(f"{name}: {value}" for name, value in facts().items())
    command = "python benchmarks/train.py " + " ".join(sys.argv[1:])
    rows: list[Row] = []
    if given.out:
        lines = given.out.with_suffix(".jsonl")
        lines.parent.mkdir(parents=True, exist_ok=True)
        if given.keep and lines.exists():
            rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
        else:
            lines.write_text("", encoding="utf-8")
        _sinks.append(lines)

    def save() -> None:
        if given.out:
            given.out.write_text(f"{command}\n{told}\n\n{table(rows)}\n", encoding="utf-8")

    present = []
    for contender in given.contenders:
        if installed(contender):
            present.append(contender)
        else:
            print(f"{contender}: not installed", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        for model in given.models:
            done = {(row["model"], row["contender"], row["part"], row["case"]) for row in rows if "failed" not in row}
            todo = {
                contender: [
                    task
                    for part in given.parts
                    for task in tasks_of(part, model, contender, given.cases, folder / f"{model}-adapter.pt")
                    if (model, contender, part, task["case"]) not in done
                ]
                for contender in present
            }
            if not any(todo.values()):
                continue
            checkpoint = _checkpoint(model, folder)
            for contender, tasks in todo.items():
                for own in processes_of(tasks, contender):
                    rows += run_child(contender, model, checkpoint, own, given.limit, Path(temporary))
                    save()
    print(table(rows))
    save()


if __name__ == "__main__":
    main()
