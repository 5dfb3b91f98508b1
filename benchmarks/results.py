"""All the tables of docs/results.md and docs/metric_learning.md, one benchmark after the other.

    python benchmarks/results.py --shared ../shared --data outputs/data --output outputs

Each writes its tables as OUTPUT/NAME.md and what it computed below OUTPUT/NAME; what is there is not computed again, so a run
that was stopped goes on. Some hours on 2 cores, most of it to extract features.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
STEPS: dict[str, list[list[str]]] = {
    "cifar10": [
        ["cifar10.py", "--shared", "{shared}", "--data", "{data}", "--output", "{folder}"],
        ["cifar10_tables.py", "{folder}"],
    ],
    "laplace_cifar10": [["laplace_cifar10.py", "--shared", "{shared}", "--data", "{data}", "--output", "{folder}"]],
    "laplace_imagenet": [["laplace_imagenet.py", "--shared", "{shared}", "--data", "{data}", "--output", "{folder}"]],
    "metric_laplace": [
        ["metric_laplace_cifar10.py", "--shared", "{shared}", "--data", "{data}", "--output", "{folder}.json"]
    ],
    "temperature": [["temperature.py", "--shared", "{shared}", "--data", "{data}"]],
    "evaluation": [["evaluation.py", "--shared", "{shared}", "--data", "{data}", "--output", "{folder}"]],
    "omniglot": [["omniglot.py", "--shared", "{shared}", "--output", "{folder}"]],
    "shift": [["shift.py", "--shared", "{shared}", "--data", "{data}", "--output", "{folder}"]],
    "transfer": [["transfer.py", "--shared", "{shared}", "--data", "{data}", "--output", "{folder}"]],
}
"""Commands of each step; what the last one prints are the tables."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with golden numbers and data")
    parser.add_argument("--data", type=Path, default=Path("outputs/data"), help="where data sets and features are kept")
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        places = {"shared": arguments.shared, "data": arguments.data, "folder": arguments.output / name}
        for command in STEPS[name]:
            script, *options = (word.format(**places) for word in command)
            print(f"{name}: {script} {' '.join(options)}", flush=True)
            printed = subprocess.run(
                [sys.executable, HERE / script, *options], stdout=subprocess.PIPE, check=True, text=True
            )
        (arguments.output / f"{name}.md").write_text(printed.stdout)


if __name__ == "__main__":
    main()
