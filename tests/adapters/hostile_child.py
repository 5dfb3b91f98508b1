"""Loads hostile adapters one after the other and tells of each what came of it. Run as a script, by test_hostile.py.

Arguments: a JSON file [{name, address, own}, ...], the first a good adapter; answers are written beside it as answers.json.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import posthoc
from posthoc.adapters.errors import PosthocError

sys.path.insert(0, str(Path(__file__).parent))
from seeded import images, tiny

FORBIDDEN = re.compile(
    r"import|exec|compile|pickle\.find_class|marshal\.loads?|os\.(system|exec|posix_spawn|spawn|fork|startfile|link|symlink|"
    r"rename|remove|mkdir|rmdir|chmod|chown|truncate)|subprocess\.Popen|socket\..*|ctypes\..*|urllib\.Request|shutil\..*|"
    r"builtins\.(input|eval)|webbrowser\.open"
)
watching = False
seen: list[str] = []
opened: list[str] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not watching:
        return
    if event == "open":
        if not isinstance(arguments[0], int):  # a number is a file that was opened, and told of, before
            opened.append(os.fsdecode(arguments[0]))
        if isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            seen.append(f"open for writing {arguments[0]}")
    elif FORBIDDEN.fullmatch(event):
        seen.append(f"{event} {str(arguments)[:200]}")


def peak_bytes() -> int:
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def ask(case: dict[str, Any], new: torch.Tensor) -> dict[str, Any]:
    global watching
    seen.clear()
    opened.clear()
    modules = set(sys.modules)
    backbone = tiny() if case["own"] else None
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak_bytes()
    answer: dict[str, Any] = {"name": case["name"]}
    start = time.process_time()
    watching = True
    try:
        model = posthoc.load(case["address"], backbone=backbone)
        watching = False
        prediction = model(new)
        answer["scores"] = {head: prediction[head].uncertainty.tolist() for head in prediction.heads}
    except PosthocError as error:
        watching = False
        answer |= {"refused": type(error).__name__, "message": str(error)}
    except BaseException as error:
        watching = False
        answer |= {"crashed": f"{type(error).__module__}.{type(error).__name__}: {str(error)[:300]}"}
    answer |= {"seconds": time.process_time() - start, "bytes": peak_bytes() - before, "events": list(seen)}
    answer |= {"opened": list(opened), "modules": sorted(set(sys.modules) - modules)}
    return answer


def main() -> None:
    path = Path(sys.argv[1])
    cases = json.loads(path.read_text())
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    sys.addaudithook(watch)
    new = images(4, key=9)[0]
    for _ in range(2):  # what is imported at first use is imported now, by a good adapter and by bad addresses
        ask(cases[0], new)
        for address in ("/nowhere", "no/such", "file:///nowhere"):
            ask({"name": "", "address": address, "own": True}, new)
    answers = [ask(case, new) for case in cases]
    (path.parent / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
