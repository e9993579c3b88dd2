"""A base station on a GPU, where there is one; elsewhere its own code alone, on a stand-in that computes on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.torch]
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from families import tiny_model  # noqa: E402 - torch may be missing

from bs_node import gpu_rows, remote_experts  # noqa: E402
from bs_node.blocks import Block  # noqa: E402
from bs_node.dispatcher import InProcessDispatcher  # noqa: E402
from bs_node.model import compute_device, experts_of, load_bs_model, plain_model  # noqa: E402
from bs_node.registry import Node  # noqa: E402
from bs_node.session import Session  # noqa: E402
from bs_node.wireless import WirelessDispatcher, WireSettings  # noqa: E402
from jetson_node.experts import make_experts  # noqa: E402
from testbed.checkpoint.manifest import load_manifest  # noqa: E402
from testbed.checkpoint.split import split  # noqa: E402
from testbed.errors import CheckpointError, ConfigError, MessageError  # noqa: E402
from testbed.latency.estimator import Estimator  # noqa: E402
from testbed.policies.topk import TopK  # noqa: E402
from testbed.runlog.reader import read_table  # noqa: E402
from testbed.runlog.recorder import Recorder  # noqa: E402
from testbed.wire.quantization import SCHEMES, quantise  # noqa: E402

GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: not yet run on one"),
    ],
)
DEVICES = ("near", "far")
COPY_MS = 2.0  # by the stand-in's events


class StandInEvent:
    """Insists on the order that a GPU's events do."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.recorded = self.done = False

    def record(self) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded
        self.done = True

    def elapsed_time(self, later: StandInEvent) -> float:
        assert self.recorded
        assert later.recorded
        return COPY_MS


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CPU plays the GPU; answers with what was waited for."""
    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", StandInEvent)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: waits.append("stream"))
    )
    monkeypatch.setattr(remote_experts, "rows_of", gpu_rows.GpuRows)
    return waits


def random_rows(dtype: Any = torch.float32) -> Any:
    return torch.randn(5, 33, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_what_leaves_a_gpu_is_what_the_host_would_have_made_of_it(scheme: Any, dtype: Any, stand_in: Any) -> None:
    hidden_TD = random_rows(dtype)
    rows = gpu_rows.GpuRows(hidden_TD)
    assert (len(rows), rows.shape) == (5, (5, 33))
    np.testing.assert_array_equal(rows.quantise(scheme, 40), quantise(hidden_TD.float().numpy(), scheme, None, 40))
    np.testing.assert_array_equal(rows[np.array([3, 0])], hidden_TD.float().numpy()[[3, 0]])


def test_a_row_that_cannot_travel_is_refused_in_the_hosts_words(stand_in: Any) -> None:
    hidden_TD = random_rows()
    hidden_TD[3, 7] = torch.nan
    with pytest.raises(MessageError, match="row 3 of 5 to send has a NaN"):
        gpu_rows.GpuRows(hidden_TD).quantise(SCHEMES["int8"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_result_comes_back_in_the_models_dtype_and_copies_are_timed(dtype: Any, stand_in: Any) -> None:
    rows = gpu_rows.GpuRows(random_rows(dtype))
    rows.quantise(SCHEMES["int8"])
    out_TD = rows.zeros()
    assert out_TD.dtype == np.float32
    assert not out_TD.any()
    out_TD += random_rows().numpy()
    back_TD = rows.give_back(out_TD)
    assert torch.equal(back_TD, random_rows().to(dtype))
    assert rows.staging.total_ns == int(2 * COPY_MS * 1e6)  # to the host and back


def test_an_experts_module_on_a_gpu_gets_the_gates_choice_on_the_host_after_one_wait(stand_in: list[str]) -> None:
    hidden_TD, index_TK, weight_TK = random_rows(), torch.zeros(5, 2, dtype=torch.long), torch.ones(5, 2)
    given = gpu_rows.to_host(torch.nn.Identity(), (hidden_TD, index_TK, weight_TK))
    assert given[0] is hidden_TD
    assert [tensor.device.type for tensor in given[1:]] == ["cpu", "cpu"]
    assert stand_in == ["stream"]


class DeafStation:
    """Takes every part and never answers."""

    run = 1

    def __init__(self) -> None:
        self.registry, self.gone = SimpleNamespace(nodes=[None, None]), set[int]()
        self.payloads: list[bytes] = []

    def send(self, _node: Any, _header: bytes, payload_RB: Any) -> bool:
        self.payloads.append(payload_RB.tobytes())
        return True

    def receive(self, _timeout_ms: float) -> None:
        """Nobody answers."""


@pytest.mark.parametrize("padded_width", [0, 64])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_node_is_sent_the_same_bytes_wherever_they_were_quantised(
    scheme: Any, padded_width: int, stand_in: Any
) -> None:
    token_R = np.array([4, 0, 2])
    blocks = [Block(device, token_R, np.zeros(3, np.int64), [(device, 3)]) for device in (0, 1)]
    sent = []
    for hidden in (random_rows().numpy(), gpu_rows.GpuRows(random_rows())):
        station: Any = DeafStation()
        WirelessDispatcher(station, WireSettings(scheme, scheme, 64, 4096, padded_width, 0.0)).exchange(
            0, 0, hidden, blocks
        )
        sent.append(station.payloads)
    assert sent[0] == sent[1]
    assert len(sent[0]) > 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    tiny_model("qwen3_moe").save_pretrained(folder / "model")
    split(folder / "model", folder / "split", DEVICES, dtype="float32")
    return folder


def session_of(folder: Path, recorder: Any) -> Session:
    manifest = load_manifest(folder / "split")
    experts = [make_experts(folder / "split", manifest, device, backend="torch") for device in DEVICES]
    nodes = [Node(n, name, routing_id=b"x", boot_id=n) for n, name in enumerate(DEVICES)]
    return Session(TopK(), InProcessDispatcher(experts), Estimator(2, 100, 100), nodes, recorder=recorder)


@torch.inference_mode()
def answers(model: Any) -> tuple[Any, Any]:
    token_ids = torch.randint(3, 256, (2, 21), generator=torch.Generator().manual_seed(1)).to(model.device)
    wanted: Any = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(token_ids, attention_mask=torch.ones_like(token_ids), **wanted)
    return model(token_ids).logits.cpu(), tokens.cpu()


def answered_and_staged(folder: Path, log: Path, device: Any, prepare: Callable[[Any], None]) -> tuple[Any, list[Any]]:
    """What the distributed model answers, and the log's `staging_ns`."""
    manifest = load_manifest(folder / "split")
    with Recorder(log, "run", list(DEVICES), top_k=manifest.layers[0].top_k, experts=8) as recorder:
        session = session_of(folder, recorder)
        model = load_bs_model(folder / "split", manifest, "float32", remote_experts.IMPLEMENTATION, device)
        remote_experts.attach(model, manifest, session)
        prepare(model)
        answer = answers(model)
        session.settle()
    return answer, read_table(log, "rounds")["staging_ns"].to_pylist()


def test_a_model_whose_rows_are_staged_answers_bit_for_bit_like_the_plain_one(
    checkpoint: Path, tmp_path: Path, stand_in: list[str]
) -> None:
    def hook(model: Any) -> None:
        for experts in experts_of(model).values():
            experts.register_forward_pre_hook(gpu_rows.to_host)

    (logits, tokens), staged = answered_and_staged(checkpoint, tmp_path, "cpu", hook)
    plain_logits, plain_tokens = answers(plain_model(checkpoint / "model", "float32"))
    assert torch.equal(tokens, plain_tokens)
    assert torch.equal(logits, plain_logits)
    assert set(staged) == {int(COPY_MS * 1e6)}  # in this process nothing travels: the result's copy alone
    assert len(stand_in) * len(DEVICES) == len(staged)  # one wait for the gate per round


def test_on_the_cpu_nothing_is_staged_and_nobody_waits(checkpoint: Path, tmp_path: Path) -> None:
    def no_hook(model: Any) -> None:
        assert not any(experts._forward_pre_hooks for experts in experts_of(model).values())

    _, staged = answered_and_staged(checkpoint, tmp_path, "cpu", no_hook)
    assert set(staged) == {None}


@pytest.mark.parametrize("device", [GPU])
def test_a_base_station_on_a_gpu_answers_like_the_plain_model(device: str, checkpoint: Path, tmp_path: Path) -> None:
    def on_gpu(model: Any) -> None:
        assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cuda"}

    (logits, tokens), staged = answered_and_staged(checkpoint, tmp_path, device, on_gpu)
    plain_logits, plain_tokens = answers(plain_model(checkpoint / "model", "float32"))
    assert torch.equal(tokens, plain_tokens)
    torch.testing.assert_close(logits, plain_logits, rtol=1e-4, atol=1e-5)
    assert all(ns > 0 for ns in staged)


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_rows_leave_a_gpu_for_pinned_memory(scheme: Any, device: str) -> None:
    rows = gpu_rows.GpuRows(random_rows().to(device))
    np.testing.assert_array_equal(rows.quantise(scheme), quantise(random_rows().numpy(), scheme))
    out_TD = rows.zeros()
    assert torch.from_numpy(out_TD).is_pinned()
    out_TD += random_rows().numpy()
    assert torch.equal(rows.give_back(out_TD).cpu(), random_rows())
    assert rows.staging.total_ns > 0


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "gemma4_text", "qwen3_next"])
def test_a_loaded_model_moves_whole(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "model")
    split(tmp_path / "model", tmp_path / "split", DEVICES, dtype="float32")
    model = load_bs_model(tmp_path / "split", load_manifest(tmp_path / "split"), "float32", "eager").to("meta")
    held = {f"{name}.{key}": value for name, module in model.named_modules() for key, value in vars(module).items()}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), **held}
    assert not [name for name, t in tensors.items() if isinstance(t, torch.Tensor) and t.device.type != "meta"]


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compute_device("auto").type == compute_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match=r'^model\.device: "cuda", but torch .* finds no GPU here; .*device = "cpu"$'):
        load_bs_model(checkpoint / "split", load_manifest(checkpoint / "split"), "float32", "eager", "cuda")


def test_a_gpu_is_taken_where_it_is_asked_for_or_nobody_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [compute_device(name).type for name in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]


def test_a_model_that_the_gpu_does_not_take_is_one_line(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr("transformers.PreTrainedModel.to", full)
    with pytest.raises(CheckpointError, match=r"^[^\n]*does not take the base station's part \(CUDA out of memory\.\)"):
        load_bs_model(checkpoint / "split", load_manifest(checkpoint / "split"), "float32", "eager")
