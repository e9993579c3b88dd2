"""What a split costs against `cp` and `sync` of the same bytes in the same run, and how much memory it takes.

    python benchmarks/split.py --layers 1 --folder /var/tmp

The checkpoint has Mixtral-8x7B's dimensions, few layers and random weights in bf16: 3.3 GB with one layer, written once
beside its copies. Copy and split take turns, both from a warm page cache; the split's time is that of `split()`, Python
and its imports not counted, and its memory is sampled from outside (RssAnon: what no file stands behind).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.progress import Progress

HIDDEN, INNER, EXPERTS, VOCABULARY, NODES = 4096, 14336, 8, 32000, 8
KV = 1024
RATIO, RSS_ANON_GB = 0.6, 2.0
LARGEST_TENSOR = VOCABULARY * HIDDEN * 2
SAMPLE_S = 0.01
CHILD = """
import sys, time
from transformers.models.mixtral import modeling_mixtral
from testbed.checkpoint.split import split
start = time.monotonic()
split(sys.argv[1], sys.argv[2], [f"node-{n}" for n in range(int(sys.argv[3]))])
print(time.monotonic() - start)
"""


def write_checkpoint(folder: Path, layers: int) -> None:
    """As the hub stores it: an entry per expert and projection."""
    import torch
    from transformers import MixtralConfig

    from testbed.checkpoint.shard_writer import Hashing, ShardWriter

    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_local_experts": EXPERTS}
    MixtralConfig(**sizes, num_hidden_layers=layers, vocab_size=VOCABULARY).save_pretrained(folder)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        start = f"model.layers.{layer}"
        projections = {"q": HIDDEN, "k": KV, "v": KV}
        shapes |= {f"{start}.self_attn.{name}_proj.weight": (rows, HIDDEN) for name, rows in projections.items()}
        shapes[f"{start}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        shapes |= {f"{start}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        shapes[f"{start}.block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for name, shape in {"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}.items():
                shapes[f"{start}.block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    weights = torch.randn(VOCABULARY * HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    entries = {name: (shape, torch.bfloat16) for name, shape in shapes.items()}
    with Hashing() as hashing:
        writer = ShardWriter(folder / "model.safetensors", entries, hashing)
        for name, shape in shapes.items():
            writer.add(name, [weights[: torch.Size(shape).numel()].view(shape)])
        writer.finish()


def copy_seconds(source: Path, out: Path) -> float:
    start = time.monotonic()
    subprocess.run(["cp", "-r", source, out], check=True)
    subprocess.run(["sync"], check=True)
    return time.monotonic() - start


def split_seconds(source: Path, out: Path) -> tuple[float, float]:
    """(seconds of the split, peak of RssAnon in GB)."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, source, out, str(NODES)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    peak_kib = 0
    status = Path(f"/proc/{child.pid}/status")
    while child.poll() is None:
        found = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
        peak_kib = max([peak_kib, *(int(line.split()[1]) for line in found)])
        time.sleep(SAMPLE_S)
    if child.returncode or child.stdout is None:
        raise SystemExit(f"the split failed with exit code {child.returncode}")
    return float(child.stdout.read()), peak_kib * 1024 / 1e9


def measure(source: Path, repeats: int) -> dict[str, float]:
    gigabytes = sum(path.stat().st_size for path in source.iterdir()) / 1e9
    copies, splits, peaks = [], [], []
    with Progress(transient=True) as progress:
        for _ in progress.track(range(repeats)):
            copies.append(copy_seconds(source, source.parent / "copy"))
            shutil.rmtree(source.parent / "copy")
            seconds, peak_gb = split_seconds(source, source.parent / "split")
            shutil.rmtree(source.parent / "split")
            splits.append(seconds)
            peaks.append(peak_gb)
    ratios = [copied / split for copied, split in zip(copies, splits, strict=True)]
    return {
        "bytes_gb": gigabytes,
        "copy_s": statistics.median(copies),
        "split_s": statistics.median(splits),
        "speed_against_copy": statistics.median(ratios),
        "least": min(ratios),
        "rss_anon_peak_gb": max(peaks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where there is room for three copies of the checkpoint")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source = Path(folder) / "model"
        source.mkdir()
        write_checkpoint(source, arguments.layers)
        figures = measure(source, arguments.repeats)
    largest_gb = LARGEST_TENSOR / 1e9
    print(
        f"{figures['bytes_gb']:.2f} GB: cp + sync {figures['copy_s']:.2f} s, split {figures['split_s']:.2f} s, "
        f"{figures['speed_against_copy']:.2f} of its speed (least {figures['least']:.2f}; wanted {RATIO})\n"
        f"RssAnon at most {figures['rss_anon_peak_gb']:.2f} GB (wanted {RSS_ANON_GB} + {largest_gb:.2f} GB)"
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
