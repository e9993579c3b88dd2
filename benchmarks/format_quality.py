"""What weight formats on the nodes cost in quality: `python benchmarks/format_quality.py [--limit N]`.

The shipped model is split once per format and run with topk over two node processes, rows in fp32 both ways, so that
nothing but the weights differs: perplexity and next token of 80 held-out windows of 128 tokens (`testbed run`), and
the accuracy of the offline tasks (`testbed eval --tasks stdlib`). Differences are against float32, over the same
windows and items, with 95 % intervals by a paired bootstrap. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from testbed.config.sections import ModelSection
from testbed.evaluation.accuracy import mean_interval, paired_difference
from testbed.runlog.reader import read_events

REFERENCE = "float32"
DEVICES = ("near", "far")
WINDOWS, WINDOW_TOKENS = 80, 128
RUN_FILE = """
name = "{fmt}"
model = {{ path = "{split}" }}
wire = {{ down = "fp32", up = "fp32" }}
timeouts = {{ reply_s = 120, silence_s = 60 }}
log = {{ directory = "{logs}", scores = "none" }}
workload = {{ score_prompts = {windows}, score_tokens = {tokens}, generate_prompts = 0 }}
device = [{devices}]
policy = [{{ name = "topk" }}]
"""


def run_file(folder: Path, fmt: str) -> Path:
    """A split in the format, and the run file that uses it."""
    from testbed.checkpoint.split import split

    split(ModelSection().folder, folder / fmt, DEVICES, weight_formats=dict.fromkeys(DEVICES, fmt))
    path = folder / f"{fmt}.toml"
    devices = ", ".join(f'{{ name = "{device}" }}' for device in DEVICES)
    path.write_text(
        RUN_FILE.format(
            fmt=fmt, split=folder / fmt, logs=folder / "logs", windows=WINDOWS, tokens=WINDOW_TOKENS, devices=devices
        )
    )
    return path


def events(kind: str, *command: str) -> list[dict[str, Any]]:
    """Of that kind, from the log of a `testbed` command. Raises RuntimeError where a busy machine lost an expert."""
    testbed = str(Path(sys.executable).with_name("testbed"))
    done = subprocess.run([testbed, *command, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    document = json.loads(done.stdout.splitlines()[-1])
    (policy,) = document.get("policies") or document["rows"]
    if policy["kept_fraction"] < 1:
        raise RuntimeError(
            f"{document['directory']}: {1 - policy['kept_fraction']:.2g} of the experts' answers are missing"
        )
    return [event for event in read_events(Path(document["directory"])) if event["kind"] == kind]


def measured(folder: Path, fmt: str, limit: int | None) -> dict[str, list[float]]:
    """Nats per token and right next tokens of every window, and the score of every item."""
    path = str(run_file(folder, fmt))
    scored = events("scored", "run", path)
    asked = events("evaluated", "eval", path, "--tasks", "stdlib", *([] if limit is None else ["--limit", str(limit)]))
    return {
        "nats": [event["nats"] / event["tokens"] for event in scored],
        "correct": [event["correct"] / event["tokens"] for event in scored],
        "items": [score for event in asked for score in event["scores"]],
    }


def compared(ours: dict[str, list[float]], reference: dict[str, list[float]]) -> dict[str, Any]:
    """Means, and differences to the reference with their intervals; the perplexity's as a fraction of it."""
    nats = paired_difference(ours["nats"], reference["nats"])
    items = paired_difference(ours["items"], reference["items"])
    return {
        "perplexity": math.exp(sum(ours["nats"]) / len(ours["nats"])),
        "perplexity_change": [math.expm1(nats.mean), math.expm1(nats.low), math.expm1(nats.high)],
        "next_token": sum(ours["correct"]) / len(ours["correct"]),
        "accuracy": list(mean_interval(ours["items"])),
        "accuracy_difference": [items.mean, items.low, items.high],
        "gained": items.gained,
        "lost": items.lost,
    }


def line(fmt: str, row: dict[str, Any]) -> str:
    change, accuracy, difference = (
        [100 * value for value in row[key]] for key in ("perplexity_change", "accuracy", "accuracy_difference")
    )
    return (
        f"| {fmt} | {row['perplexity']:.4f} | {change[0]:+.2f} ({change[1]:+.2f} to {change[2]:+.2f}) "
        f"| {100 * row['next_token']:.2f} | {accuracy[0]:.1f} ({accuracy[1]:.1f} to {accuracy[2]:.1f}) "
        f"| {difference[0]:+.1f} ({difference[1]:+.1f} to {difference[2]:+.1f}) | {row['gained']}, {row['lost']} |"
    )


def main() -> None:
    from testbed.checkpoint.stored_formats import FORMATS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="at most so many items of each task")
    args = parser.parse_args()
    rows: dict[str, Any] = {}
    print("| format | perplexity | change, % | next token, % | accuracy, % | against float32, points | right, wrong |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        reference = None
        for fmt in (REFERENCE, *(fmt for fmt in reversed(FORMATS) if fmt != REFERENCE)):
            ours = measured(Path(name), fmt, args.limit)
            reference = reference or ours
            rows[fmt] = {**compared(ours, reference), "windows": len(ours["nats"]), "items": len(ours["items"])}
            print(line(fmt, rows[fmt]), flush=True)
    print(json.dumps({"reference": REFERENCE, "formats": rows}))


if __name__ == "__main__":
    main()
