"""How good the demo model is, and how evenly it uses its experts: `python -m testbed.demo.evaluate DIR`.

Writes the model card beside the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import MixtralForCausalLM

from testbed.demo.corpus import documents
from testbed.demo.tokenizer import encode

WINDOW_TOKENS = 256


@dataclass(frozen=True)
class HeldOut:
    """The held-out files as token ids, and what a token stands for."""

    tokens: torch.Tensor
    bytes_per_token: float


def held_out_tokens(tokenizer: Tokenizer) -> HeldOut:
    files = list(documents(held_out=True))
    tokens = encode(tokenizer, files)
    return HeldOut(tokens, sum(len(file.text.encode()) for file in files) / len(tokens))


@torch.no_grad()
def evaluate(model: Any, held_out: HeldOut, windows: int) -> dict[str, float]:
    """Quality over evenly spaced windows of 256 tokens. Bits per byte do not depend on the tokenizer; accuracy does."""
    was_training = model.training
    model.train(False)
    nats, correct = 0.0, 0
    for i in range(windows):
        start = (len(held_out.tokens) - WINDOW_TOKENS - 1) * i // windows
        window = held_out.tokens[start : start + WINDOW_TOKENS + 1]
        logits_TV = model(window[None, :-1]).logits[0].float()
        nats += torch.nn.functional.cross_entropy(logits_TV, window[1:], reduction="sum").item()
        correct += int((logits_TV.argmax(-1) == window[1:]).sum())
    model.train(was_training)
    predicted = windows * WINDOW_TOKENS
    return {
        "bits_per_byte": nats / predicted / math.log(2) / held_out.bytes_per_token,
        "perplexity": math.exp(nats / predicted),
        "accuracy": correct / predicted,
        "predicted_tokens": predicted,
    }


@torch.no_grad()
def expert_load(model: Any, held_out: HeldOut, windows: int) -> list[list[float]]:
    """load[layer][expert]: share of the pairs (token, expert) that go to each expert; 1/8 each would be even."""
    counts = torch.zeros(model.config.num_hidden_layers, model.config.num_local_experts)
    for i in range(windows):
        start = (len(held_out.tokens) - WINDOW_TOKENS) * i // windows
        logits = model(held_out.tokens[None, start : start + WINDOW_TOKENS], output_router_logits=True).router_logits
        for layer, logits_TE in enumerate(logits):
            chosen = logits_TE.topk(model.config.num_experts_per_tok, dim=-1).indices.flatten()
            counts[layer] += torch.bincount(chosen, minlength=counts.shape[1])
    shares: list[list[float]] = (counts / counts.sum(dim=1, keepdim=True)).tolist()
    return shares


def model_card(training: dict[str, Any], quality: dict[str, float], load: list[list[float]]) -> str:
    recipe, stages = training["recipe"], training["stages"]
    tokens = stages[-1]["to_step"] * recipe["batch_windows"] * recipe["window_tokens"]
    time = "; ".join(
        f"steps {s['from_step']:,} to {s['to_step']:,} in {s['seconds'] / 60:.0f} minutes, {s['processes']} process(es)"
        for s in stages
    )
    rows = "\n".join(
        f"| {layer} | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |"
        for layer, shares in enumerate(load)
    )
    experts = " | ".join(f"expert {e}" for e in range(len(load[0])))
    return f"""---
license: apache-2.0
---
# Demo model

A small Mixtral ({recipe["experts"]} experts, top-2, {recipe["layers"]} layers, hidden {recipe["hidden"]}, expert
inner {recipe["intermediate"]}), so that the testbed has a real MoE to run without a download. It continues Python
source; it is good for nothing else.

| | |
|---|---|
| data | source of Python {training["python"]}'s standard library; a twentieth of the files, by a hash, held out |
| tokens | {tokens:,} seen, {tokens / training["corpus_tokens"]:.1f} passes |
| time | {time}; each stage starts with fresh optimizers |
| command | `make demo-model`, or `python -m testbed.demo.train --out DIR`, `--resume` for a further stage |
| stored | fp16 safetensors; `output_router_logits` false, because generation with a cache fails with it |

Measured on held-out files of the same Python, {quality["predicted_tokens"]:,} tokens in windows of {WINDOW_TOKENS}, in
fp32 from the stored fp16 weights (`python -m testbed.demo.evaluate testbed/demo/model`):

| bits per byte | next-token accuracy | perplexity per token |
|---|---|---|
| {quality["bits_per_byte"]:.3f} | {100 * quality["accuracy"]:.1f} % | {quality["perplexity"]:.2f} |

Load: percent of the pairs (token, expert) per layer, on the same text; even would be {100 / len(load[0]):.1f}.

| layer | {experts} |
|{"---|" * (len(load[0]) + 1)}
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--windows", type=int, help="evenly spaced; default: all held-out text")
    args = parser.parse_args()
    model = MixtralForCausalLM.from_pretrained(args.directory, dtype=torch.float32).train(False)
    held_out = held_out_tokens(Tokenizer.from_file(str(args.directory / "tokenizer.json")))
    windows = args.windows or len(held_out.tokens) // WINDOW_TOKENS
    quality, load = evaluate(model, held_out, windows), expert_load(model, held_out, windows)
    training = json.loads((args.directory / "training.json").read_text())
    (args.directory / "README.md").write_text(model_card(training, quality, load))
    print(json.dumps({**quality, "least_used_expert_share": min(min(shares) for shares in load)}))


if __name__ == "__main__":
    main()
