"""Asks torch for products on the GPU and prints what came out, as one line of JSON. Run in a process of its own.

Whole numbers, so small that every product and every sum of them is exact in half precision as well: right means equal,
whatever the order of the additions.
"""

from __future__ import annotations

import json
import platform
from typing import Any

SIZE = 256
LARGEST = 2  # 256 products of at most 2 x 2 stay below 2048, up to which half precision holds every whole number


def main() -> None:
    said: dict[str, object] = {"python": platform.python_version()}
    try:
        probe(said)
    except Exception as error:  # a broken torch fails in ways of its own, and each is an answer
        said["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    print("\n" + json.dumps(said), flush=True)


def probe(said: dict[str, object]) -> None:
    try:
        import torch  # noqa: PLC0415 - its absence is an answer too
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        said["torch"] = None
        return
    said.update(torch=str(torch.__version__), built_for_cuda=torch.version.cuda, available=torch.cuda.is_available())
    said["numpy_bridge"] = shares_arrays(torch)
    if not said["available"]:
        return
    major, minor = torch.cuda.get_device_capability()
    said.update(device=torch.cuda.get_device_name(), capability=f"{major}.{minor}")
    said["products_right"] = all(product_is_right(torch, dtype) for dtype in (torch.float32, torch.float16))


def shares_arrays(torch: Any) -> bool:
    """Whether tensors and numpy arrays become each other: a torch built for numpy 1 cannot with numpy 2."""
    try:
        import numpy as np  # noqa: PLC0415

        return bool((torch.from_numpy(np.arange(4)).numpy() == np.arange(4)).all())
    except (ImportError, RuntimeError, TypeError):
        return False


def product_is_right(torch: Any, dtype: Any, device: str = "cuda") -> bool:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-LARGEST, LARGEST + 1, (SIZE, SIZE), generator=generator) for _ in range(2))
    product = (a.to(device, dtype) @ b.to(device, dtype)).cpu().to(torch.int64)
    return bool(torch.equal(product, a @ b))


if __name__ == "__main__":
    main()
