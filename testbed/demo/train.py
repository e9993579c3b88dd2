"""Train the demo model: `python -m testbed.demo.train --out DIR`, or `make demo-model`.

A Mixtral of 8 experts, top-2, on the source of the running Python's standard library. The matrices inside the layers
are trained with Muon, which needs fewer tokens than AdamW for the same loss; embeddings, norms and gates with AdamW.
The learning rate stays flat and then falls to zero over the last part of the run.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from testbed.demo.corpus import documents
from testbed.demo.evaluate import evaluate, held_out_tokens
from testbed.demo.muon import Muon
from testbed.demo.tokenizer import encode, save_tokenizer, train_tokenizer

PROGRESS = "progress.json"
REPORT_EVERY_STEPS = 200


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, apart from the machine's arithmetic."""

    vocabulary: int = 2048
    hidden: int = 192
    intermediate: int = 384
    layers: int = 4
    experts: int = 8
    window_tokens: int = 256
    batch_windows: int = 16
    tokens: int = 28_000_000
    muon_lr: float = 0.02
    adam_lr: float = 0.003
    weight_decay: float = 0.05
    decay_fraction: float = 0.4
    warmup_steps: int = 100
    balance_loss: float = 0.01
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.tokens // (self.window_tokens * self.batch_windows)


def build_model(recipe: Recipe) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.hidden // 32,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        num_local_experts=recipe.experts,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=recipe.balance_loss,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        sliding_window=None,
    )
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("eager")
    return model


def build_optimizers(model: MixtralForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim >= 2 and "layers" in name and ".gate." not in name]
    inside = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in inside]
    return [
        Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_factor(step: int, recipe: Recipe) -> float:
    """Warm up, stay, then fall linearly to zero."""
    left = (recipe.steps - step) / (recipe.decay_fraction * recipe.steps)
    return min(1.0, (step + 1) / recipe.warmup_steps, left)


def train(recipe: Recipe, out: Path, *, resume: bool) -> None:
    """Train to the end of the recipe; every 200 steps `out` holds a whole checkpoint."""
    first_step = json.loads((out / PROGRESS).read_text())["step"] if resume else 0
    torch.manual_seed(recipe.seed + first_step)
    training = list(documents(held_out=False))
    tokenizer = train_tokenizer([document.text for document in training], recipe.vocabulary)
    tokens = encode(tokenizer, training)
    held_out = held_out_tokens(tokenizer)
    model = build_model(recipe)
    if resume:
        model.load_state_dict(MixtralForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict())
    optimizers = build_optimizers(model, recipe)
    print(f"{len(tokens):,} training tokens, {model.num_parameters():,} parameters, {recipe.steps:,} steps", flush=True)
    started_s = time.monotonic()
    for step in range(first_step, recipe.steps):
        loss = take_step(model, optimizers, tokens, recipe, step)
        if (step + 1) % REPORT_EVERY_STEPS == 0 or step + 1 == recipe.steps:
            quality = evaluate(model, held_out, windows=40)
            elapsed_s = time.monotonic() - started_s
            rate = (step + 1 - first_step) * recipe.batch_windows * recipe.window_tokens / elapsed_s
            print(f"step {step + 1}  {elapsed_s:.0f} s  {rate:.0f} tokens/s  loss {loss:.3f}  {quality}", flush=True)
            save(model, out)
            save_tokenizer(tokenizer, out)
            (out / PROGRESS).write_text(json.dumps({"step": step + 1}))
    facts = {
        "recipe": asdict(recipe),
        "resumed_at_step": first_step,
        "seconds": round(time.monotonic() - started_s),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "training_tokens_in_corpus": len(tokens),
    }
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


def take_step(
    model: MixtralForCausalLM, optimizers: list[torch.optim.Optimizer], tokens: torch.Tensor, recipe: Recipe, step: int
) -> float:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("full_lr", group["lr"]) * rate_factor(step, recipe)
    starts = torch.randint(len(tokens) - recipe.window_tokens, (recipe.batch_windows,)).tolist()
    batch = torch.stack([tokens[start : start + recipe.window_tokens] for start in starts])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.item())


def save(model: MixtralForCausalLM, out: Path) -> None:
    """fp16, router logits off: generation with a cache fails with them on."""
    model.config.output_router_logits = False
    MixtralForCausalLM.from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), dtype=torch.float16
    ).save_pretrained(out)
    model.config.output_router_logits = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint and tokenizer")
    parser.add_argument("--resume", action="store_true", help="go on from what --out holds, with fresh optimizers")
    parser.add_argument("--threads", type=int, default=2)
    for field in fields(Recipe):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    out, resume, threads = options.pop("out"), options.pop("resume"), options.pop("threads")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    train(Recipe(**options), out, resume=resume)


if __name__ == "__main__":
    main()
