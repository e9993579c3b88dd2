"""The distributed model equals the plain one: every expert in a process of its own, behind CURVE sockets.

Measured with the shipped demo model; `pytest -s` prints the figures that the bounds below were taken from.
"""
# ruff: noqa: E402 - what is imported below needs what importorskip has just found

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from families import tiny_model
from rack import Rack, rack
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from bs_node.dispatcher import Dispatcher, InProcessDispatcher
from bs_node.model import experts_of, plain_model
from bs_node.session import Session
from jetson_node.experts import make_experts
from testbed.checkpoint.ffn import tensor_name
from testbed.checkpoint.manifest import MANIFEST_NAME, Manifest, file_entry, load_manifest, shard_name
from testbed.checkpoint.split import split
from testbed.config.sections import ModelSection
from testbed.demo.corpus import documents
from testbed.policies.topk import TopK
from testbed.policies.wlr import WLR

pytestmark = [pytest.mark.torch]

DEMO = ModelSection().folder
EIGHT = [f"jetson-{n}" for n in range(8)]
NEW_TOKENS = 16
PROMPT_TOKENS = 40


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_process(split_dir: Path, manifest: Manifest) -> InProcessDispatcher:
    return InProcessDispatcher([make_experts(split_dir, manifest, name, backend="torch") for name in manifest.devices])


class Bench:
    """A rack, the base station's model on it, and the plain model beside it."""

    def __init__(self, rack: Rack, model_dir: Path) -> None:
        self.rack, self.plain = rack, plain_model(model_dir, "float32")
        self.session: Session = rack.session(rack.wireless())
        self.model = rack.model(self.session)

    def over(self, dispatcher: Dispatcher, policy: Any = None) -> Any:
        """The distributed model with this dispatcher and policy."""
        self.session.dispatcher, self.session.policy = dispatcher, policy or TopK()
        return self.model


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The demo model with one expert of every layer on each of eight nodes."""
    folder = tmp_path_factory.mktemp("eight")
    split(DEMO, folder / "split", EIGHT)
    with rack(folder / "split", folder, arguments=["--backend", "torch"]) as nodes:
        yield Bench(nodes, DEMO)


@pytest.fixture(scope="module")
def prompts() -> Any:
    """Two held-out texts, the second one shorter and padded on the left: token ids and attention mask."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    first, second = [document.text for document in documents(held_out=True) if len(document.text) > 2000][:2]
    cut = {"truncation": True, "max_length": PROMPT_TOKENS}
    texts = [tokenizer.decode(tokenizer(first, **cut)["input_ids"]), second[:60]]
    return tokenizer(texts, padding=True, return_tensors="pt")


@torch.inference_mode()
def answer(model: Any, input_ids: Any, attention_mask: Any) -> tuple[Any, Any]:
    """Logits of a prompt, and the tokens that greedy decoding with the KV cache adds to it."""
    tokens = model.generate(
        input_ids,
        attention_mask=attention_mask,
        **{"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0},
    )
    return model(input_ids, attention_mask=attention_mask).logits, tokens


def assert_equal(got: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    """The promise is 1e-5; with one thread on both sides not one bit differs."""
    (logits, tokens), (plain_logits, plain_tokens) = got, expected
    assert torch.equal(tokens, plain_tokens)
    assert (logits - plain_logits).abs().max() <= 1e-5
    assert torch.equal(logits, plain_logits)


def test_eight_nodes_in_fp32_answer_bit_for_bit_like_the_plain_model(demo: Bench, prompts: Any) -> None:
    one = prompts["input_ids"][:1], prompts["attention_mask"][:1]
    assert_equal(answer(demo.over(demo.rack.wireless()), *one), answer(demo.plain, *one))


def test_a_padded_batch_of_two_answers_bit_for_bit_like_the_plain_model(demo: Bench, prompts: Any) -> None:
    both = prompts["input_ids"], prompts["attention_mask"]
    assert 0 < both[1][1].sum() < both[1][0].sum(), "one of the two is padded"
    assert_equal(answer(demo.over(demo.rack.wireless()), *both), answer(demo.plain, *both))


def test_the_in_process_dispatcher_answers_bit_for_bit_like_the_plain_model(demo: Bench, prompts: Any) -> None:
    both = prompts["input_ids"], prompts["attention_mask"]
    dispatcher = in_process(demo.rack.split_dir, demo.rack.manifest)
    assert_equal(answer(demo.over(dispatcher), *both), answer(demo.plain, *both))


def test_wlr_with_theta_0_answers_bit_for_bit_like_the_plain_model(demo: Bench, prompts: Any) -> None:
    both = prompts["input_ids"], prompts["attention_mask"]
    assert_equal(answer(demo.over(demo.rack.wireless(), WLR(theta=0.0)), *both), answer(demo.plain, *both))


@pytest.mark.parametrize(
    "placement",
    [None, {"jetson-0": [7, 0, 3], "jetson-1": [1, 2], "jetson-2": [4], "jetson-3": [5, 6]}],
    ids=["two experts each", "one to three experts each"],
)
def test_four_nodes_with_several_experts_each_answer_bit_for_bit(
    placement: dict[str, list[int]] | None, demo: Bench, prompts: Any, tmp_path: Path
) -> None:
    split(DEMO, tmp_path / "split", EIGHT[:4], placement=placement)
    both = prompts["input_ids"], prompts["attention_mask"]
    with rack(tmp_path / "split", tmp_path) as nodes:
        assert_equal(answer(nodes.model(nodes.session(nodes.wireless())), *both), answer(demo.plain, *both))


@pytest.fixture(scope="module")
def prefill(demo: Bench) -> tuple[Any, list[tuple[tuple[Any, ...], Any]]]:
    """Token ids of 256 tokens of held-out text, and what went into and came out of the plain model's experts."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    text = next(document.text for document in documents(held_out=True) if len(document.text) > 8000)
    token_ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :256]
    seen: list[tuple[tuple[Any, ...], Any]] = []
    hooks = [
        experts.register_forward_hook(lambda _module, args, out: seen.append((args, out)))
        for experts in experts_of(demo.plain).values()
    ]
    with torch.inference_mode():
        demo.plain(token_ids)
    for hook in hooks:
        hook.remove()
    return token_ids, seen


def token_kl(reference: Any, got: Any) -> Any:
    """Nats of KL(reference || got) between the next-token distributions after each token."""
    p, q = (logits[0].double().log_softmax(-1) for logits in (reference, got))
    return (p.exp() * (p - q)).sum(-1)


# Per scheme, in both directions: relative error of the block output in the worst layer, and median and mean of the KL
# divergence in nats per token. Worst of nine held-out texts of 256 tokens, measured with the shipped model:
#   int8 0.0122, 7.8e-5, 2.1e-3        fp16 3.1e-4, 6.6e-8, 1.9e-6
# The bounds are 1.3 to 2 times that, but for the mean of fp16: means are made by the few tokens whose gate was so near
# a tie that the error of an earlier layer turned it, and one of them may cost much (1.5e-4 was seen).
BOUNDS = {"int8": (0.02, 1.1e-4, 2.6e-3), "fp16": (6e-4, 1e-7, 3e-4)}


@pytest.mark.parametrize("scheme", BOUNDS)
@torch.inference_mode()
def test_a_coarser_wire_stays_within_its_measured_bounds(
    scheme: str, demo: Bench, prefill: tuple[Any, list[tuple[tuple[Any, ...], Any]]]
) -> None:
    token_ids, seen = prefill
    model = demo.over(demo.rack.wireless(down=scheme, up=scheme))
    errors = [
        float((experts(*args) - out).norm() / out.norm())
        for experts, (args, out) in zip(experts_of(model).values(), seen, strict=True)
    ]
    kl_T = token_kl(demo.plain(token_ids).logits, model(token_ids).logits)
    median, mean = float(kl_T.median()), float(kl_T.mean())
    print(f"\n{scheme}: block output off by {[f'{e:.2g}' for e in errors]}, KL median {median:.2g}, mean {mean:.2g}")
    largest_error, largest_median, largest_mean = BOUNDS[scheme]
    assert 0 < max(errors) <= largest_error
    assert 0 < median <= largest_median
    assert 0 < mean <= largest_mean


def swap_experts(split_dir: Path, one: str, other: str) -> None:
    """Give two nodes of a split each other's experts, under their own names and with hashes that say it is right."""
    manifest = load_manifest(split_dir)
    held = {name: list(manifest.held_by(name)) for name in (one, other)}
    shards = {name: load_file(split_dir / shard_name(name)) for name in held}
    for mine, theirs in ((one, other), (other, one)):
        swapped = {
            tensor_name(*slot, part): shards[theirs][tensor_name(*taken, part)].clone()
            for slot, taken in zip(held[mine], held[theirs], strict=True)
            for part in manifest.layers[slot[0]].spec.shapes()
        }
        save_file(swapped, split_dir / shard_name(mine))
    document = json.loads((split_dir / MANIFEST_NAME).read_text())
    for name in held:
        document["files"][shard_name(name)] = file_entry(split_dir / shard_name(name)).model_dump()
    (split_dir / MANIFEST_NAME).write_text(json.dumps(document))


def test_two_nodes_with_each_others_experts_are_noticed_by_this_comparison(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    split(tmp_path / "model", tmp_path / "split", EIGHT[:4])
    swap_experts(tmp_path / "split", EIGHT[1], EIGHT[2])
    prompt = torch.randint(3, 256, (1, 21), generator=torch.Generator().manual_seed(1))
    plain = plain_model(tmp_path / "model", "float32")
    with rack(tmp_path / "split", tmp_path) as nodes, torch.inference_mode():
        model = nodes.model(nodes.session(nodes.wireless()))
        assert (model(prompt).logits - plain(prompt).logits).abs().max() > 1e-2
