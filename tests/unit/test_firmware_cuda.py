from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from firmware_boards import PROBED, Spoken
from hypothesis import given
from hypothesis import strategies as st

from firmware_setup.cuda import ask_cuda, cuda_of
from firmware_setup.machine import Answer, Commands, Machine

PRETENDED = """
class ProbeError(RuntimeError): pass
__version__ = "2.8.0"
class version: cuda = "12.6"
class cuda:
    is_available = staticmethod(lambda: True)
    get_device_capability = staticmethod(lambda: (8, 7))
    get_device_name = staticmethod(lambda: "Orin")
float32 = float16 = int64 = None
def from_numpy(array): raise RuntimeError("Numpy is not available")
class Generator:
    def manual_seed(self, seed): return self
"""


def asked_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: str) -> str | None:
    """What the probe says, in a process of its own, of a torch that is written here."""
    (tmp_path / "torch.py").write_text(torch)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    cuda = ask_cuda(Machine(tmp_path, Commands()), sys.executable)
    assert cuda.products_right is not True
    return cuda.error


def test_absent_torch_is_said_and_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text('raise ModuleNotFoundError("No module named torch", name="torch")')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    cuda = ask_cuda(Machine(tmp_path, Commands()), sys.executable)
    assert (cuda.asked, cuda.torch, cuda.error) == (True, None, None)
    assert cuda.python == ".".join(map(str, sys.version_info[:3]))


def test_a_torch_that_does_not_load_is_an_error_and_not_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = 'raise ImportError("libcusparseLt.so.0: cannot open shared object file")'
    assert (
        asked_with(tmp_path, monkeypatch, broken) == "ImportError: libcusparseLt.so.0: cannot open shared object file"
    )


def test_a_gpu_without_a_kernel_for_it_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = PRETENDED + 'def randint(*a, **k): raise ProbeError("no kernel image is available for execution")'
    assert asked_with(tmp_path, monkeypatch, torch) == "ProbeError: no kernel image is available for execution"


def test_a_torch_that_takes_its_process_down_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = "import os; print('NVML_SUCCESS == r INTERNAL ASSERT FAILED', flush=True); os.abort()"
    assert asked_with(tmp_path, monkeypatch, torch) == "it ended with code -6: NVML_SUCCESS == r INTERNAL ASSERT FAILED"


def test_a_torch_that_hangs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("import time; time.sleep(1000)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    cuda = ask_cuda(Machine(tmp_path, Commands()), sys.executable, timeout_s=0.5)
    assert cuda.error == f"{sys.executable} did not answer within 0.5 s"


def test_what_torch_prints_around_the_answer_is_passed_over() -> None:
    said = "UserWarning: compute capability 8.7\n" + json.dumps(PROBED) + "\nbye\n"
    assert cuda_of(Answer(0, said)).products_right is True


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_products_of_the_probe_are_exact_so_that_right_means_equal(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    from firmware_setup.cuda_probe import product_is_right, shares_arrays

    assert product_is_right(torch, getattr(torch, dtype), "cpu")
    assert shares_arrays(torch)


@pytest.mark.torch
def test_one_wrong_number_in_a_product_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from firmware_setup.cuda_probe import product_is_right

    right = torch.Tensor.cpu

    def wrong(tensor: object) -> object:
        product = right(tensor).clone()
        product[17, 3] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "cpu", wrong)
    assert not product_is_right(torch, torch.float32, "cpu")


@given(st.one_of(st.none(), st.integers()), st.one_of(st.text(), st.lists(st.none()).map(json.dumps)))
def test_hostile_answers_are_an_error_and_never_a_right_product(code: int | None, text: str) -> None:
    cuda = cuda_of(Answer(code, text))
    assert cuda.products_right is None
    assert cuda.error is not None


@given(
    st.dictionaries(st.sampled_from([*PROBED, "error"]), st.one_of(st.none(), st.integers(), st.text(), st.booleans()))
)
def test_an_answer_of_other_types_is_unknown(said: dict[str, object]) -> None:
    cuda = cuda_of(Answer(0, json.dumps(said)))
    assert cuda.products_right in (True, False, None)
    assert cuda.torch is None or isinstance(cuda.torch, str)


def test_an_interpreter_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    assert ask_cuda(Machine(tmp_path, Spoken({})), "/opt/none/python").error == "/opt/none/python is not installed"
