"""Runs the cases of a benchmark, ours and the other library's each in a process of its own, and prints a line for each case."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def run_cases(
    script: str,
    doc: str | None,
    cases: Sequence[Any],
    measure: Callable[[Any, str], dict[str, Any]],
    *,
    sides: Callable[[Any], Sequence[str]],
    header: str,
    columns: Sequence[str],
    line: Callable[[Any, dict[str, Any]], str],
    threads: int,
) -> None:
    """The command line of `script`: a case has a `name`; `measure(case, side)` answers JSON-able figures.

    What `--output` holds is not measured again. `header` is printed behind torch's version and the threads, `line` makes
    the case's row from what was found for its `sides`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of the names of cases to run")
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--output", type=Path, default=None, help="JSON file of what was measured, read and added to")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "SIDE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        name, side = arguments.child
        print(json.dumps(measure(next(case for case in cases if case.name == name), side)))
        return
    kept = arguments.output
    results: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept and kept.exists() else {}
    print(f"torch {torch.__version__}, {arguments.threads} threads; {header}\n")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)
    for case in cases:
        if not case.name.startswith(tuple(arguments.only)):
            continue
        found = results.setdefault(case.name, {})
        for side in sides(case):
            if not isinstance(found.get(side), dict):
                found[side] = run_apart(script, case.name, side, arguments.threads)
                if kept:
                    kept.write_text(json.dumps(results, indent=1) + "\n")
        print(line(case, found), flush=True)


def run_apart(script: str, name: str, side: str, threads: int) -> dict[str, Any] | str:
    """The measurement from a fresh process, or the last line of its error."""
    command = [sys.executable, script, "--child", name, side, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return f"skipped: {last.partition(': ')[2]}" if "ModuleNotFoundError" in last else last
    return json.loads(done.stdout.splitlines()[-1])
