"""What each weight format costs on this machine: `python benchmarks/weight_formats.py [WIDTH INNER LAYERS]`.

One expert (default: Mixtral-8x7B's, 4096 x 14336, 32 layers) of random normal weights, one thread: bytes on a board
that holds one expert of every layer, time to encode, relative error of the outputs, time at 1, 16 and 128 rows beside
float16 (in turns, the fastest), and the most anonymous memory that a node takes while it loads four experts, over what
those weigh. The last line of stdout is one JSON document. Real weights have outliers: their errors differ.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from testbed.checkpoint.ffn import FfnSpec

BOARD_BYTES = 8e9
LOADED = 4
LOAD = """
import sys, threading
from pathlib import Path
from jetson_node.shard import Shard
from jetson_node.torch_experts import as_tensors
from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.packed_weights import compute_dtype, hold_expert

spec, fmt = FfnSpec.model_validate_json(sys.argv[2]), sys.argv[3]
dtype = compute_dtype(fmt, fmt if fmt in ("float32", "float16", "bfloat16") else "float32")

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

before = peak = anonymous_bytes()
over = threading.Event()
def watch():
    global peak
    while not over.wait(0.001):
        peak = max(peak, anonymous_bytes())

thread = threading.Thread(target=watch)
thread.start()
with Shard(Path(sys.argv[1])) as shard:
    held = [hold_expert(as_tensors(shard.expert(0, e, spec, fmt)), spec, fmt, dtype) for e in range(int(sys.argv[4]))]
over.set()
thread.join()
print(peak - before)
"""


def loading_peak_bytes(spec: FfnSpec, encoded: dict[str, torch.Tensor], fmt: str) -> int:
    """Most anonymous memory of a process that loads LOADED copies of the expert from one shard."""
    from safetensors.torch import save_file

    from testbed.checkpoint.ffn import tensor_name

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.safetensors"
        save_file({tensor_name(0, e, n): t.clone() for e in range(LOADED) for n, t in encoded.items()}, path)
        command = [sys.executable, "-c", LOAD, str(path), spec.model_dump_json(), fmt, str(LOADED)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    import torch

    from testbed.checkpoint.ffn import FfnSpec
    from testbed.checkpoint.format_costs import format_cost
    from testbed.checkpoint.stored_formats import FORMATS, expert_bytes
    from testbed.checkpoint.weight_formats import encode_expert

    torch.set_num_threads(1)
    width, inner, layers = map(int, sys.argv[1:] or (4096, 14336, 32))
    spec = FfnSpec(width=width, inner=inner)
    generator = torch.Generator().manual_seed(0)
    tensors = {n: (0.02 * torch.randn(s, generator=generator)).bfloat16() for n, s in spec.shapes().items()}
    result: dict[str, dict[str, object]] = {}
    for fmt in FORMATS:
        held_bytes = layers * expert_bytes(spec, fmt)
        began_s = time.process_time()
        encoded = encode_expert(tensors, fmt, spec)
        encode_s = time.process_time() - began_s
        peak_bytes = loading_peak_bytes(spec, encoded, fmt)
        del encoded
        ratio = peak_bytes / (LOADED * expert_bytes(spec, fmt))
        cost = format_cost(spec, tensors, fmt)
        fits = "fits" if held_bytes < BOARD_BYTES else "does not fit"
        print(f"{held_bytes / 1e9:6.2f} GB for {layers} layers, {fits} 8 GB; ", end="")
        print(f"encoded in {encode_s:.2f} s; loading peaks at {ratio:.2f} of its experts")
        print(f"    {cost.line()}", flush=True)
        result[fmt] = {"held_bytes": held_bytes, "encode_s": encode_s, "loading_peak_ratio": ratio, **cost.as_dict()}
    print(json.dumps({"width": width, "inner": inner, "layers": layers, "formats": result}))


if __name__ == "__main__":
    main()
