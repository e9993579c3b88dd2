"""Train the demo model: `python -m testbed.demo.train --out DIR`, or `make demo-model`.

A Mixtral of 8 experts, top-2, on the source of the running Python's standard library. The matrices inside the layers
are trained with Muon, which needs fewer tokens than AdamW for the same loss; embeddings, norms and gates with AdamW.
The learning rate stays flat and then falls to zero over the last part of the run.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from transformers import MixtralConfig, MixtralForCausalLM

from testbed.demo.corpus import documents
from testbed.demo.evaluate import evaluate, held_out_tokens
from testbed.demo.muon import Muon
from testbed.demo.tokenizer import encode, save_tokenizer, train_tokenizer

FACTS = "training.json"
TOP_K = 2
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
    muon_lr: float = 0.01
    adam_lr: float = 0.002
    weight_decay: float = 0.1
    decay_fraction: float = 0.5
    warmup_steps: int = 100
    balance_loss: float = 0.02
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
        num_experts_per_tok=TOP_K,
        router_aux_loss_coef=0.0,
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


def train(recipe: Recipe, out: Path, *, resume: bool, rank: int = 0) -> None:
    """Train to the end of the recipe; every 200 steps `out` holds a whole checkpoint and what led to it."""
    earlier = json.loads((out / FACTS).read_text())["stages"] if resume else []
    first_step = earlier[-1]["to_step"] if earlier else 0
    torch.manual_seed(recipe.seed)
    training = list(documents(held_out=False))
    tokenizer = train_tokenizer([document.text for document in training], recipe.vocabulary)
    tokens, held_out = encode(tokenizer, training), held_out_tokens(tokenizer)
    model = build_model(recipe)
    if resume:
        model.load_state_dict(MixtralForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict())
    optimizers = build_optimizers(model, recipe)
    torch.manual_seed(recipe.seed + first_step + 1_000_003 * rank)  # every process sees other windows
    print(f"{len(tokens):,} training tokens, {model.num_parameters():,} parameters, {recipe.steps:,} steps", flush=True)
    started_s = time.monotonic()
    for step in range(first_step, recipe.steps):
        loss = take_step(model, optimizers, tokens, recipe, step)
        if rank == 0 and ((step + 1) % REPORT_EVERY_STEPS == 0 or step + 1 == recipe.steps):
            elapsed_s = time.monotonic() - started_s
            print(f"step {step + 1}  {elapsed_s:.0f} s  loss {loss:.3f}  {evaluate(model, held_out, 40)}", flush=True)
            processes = dist.get_world_size() if dist.is_initialized() else 1
            stage = {"from_step": first_step, "to_step": step + 1, "seconds": round(elapsed_s), "processes": processes}
            save(model, out)
            save_tokenizer(tokenizer, out)
            save_facts(recipe, [*earlier, stage], len(tokens), out)


def save_facts(recipe: Recipe, stages: list[dict[str, int]], corpus_tokens: int, out: Path) -> None:
    """What the model card will say of how it came about."""
    facts = {
        "recipe": asdict(recipe),
        "stages": stages,
        "corpus_tokens": corpus_tokens,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    (out / FACTS).write_text(json.dumps(facts, indent=2) + "\n")


def take_step(
    model: MixtralForCausalLM, optimizers: list[torch.optim.Optimizer], tokens: torch.Tensor, recipe: Recipe, step: int
) -> float:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("full_lr", group["lr"]) * rate_factor(step, recipe)
    windows = recipe.batch_windows // (dist.get_world_size() if dist.is_initialized() else 1)
    starts = torch.randint(len(tokens) - recipe.window_tokens, (windows,)).tolist()
    batch = torch.stack([tokens[start : start + recipe.window_tokens] for start in starts])
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch, labels=batch, output_router_logits=True)
    (output.loss + recipe.balance_loss * balance_loss(output.router_logits, TOP_K)).backward()
    average_gradients(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return float(output.loss.item())


def average_gradients(model: MixtralForCausalLM) -> None:
    """Over the processes of a training, in one message."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, averaged in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(averaged.view_as(gradient))


def balance_loss(router_logits: Sequence[torch.Tensor], top_k: int) -> torch.Tensor:
    """Mean over the layers of E * sum of (share of the choices * mean probability): 1 where all experts are used alike.

    Layer by layer: transformers' own balances the sum over all layers, and lets experts of single layers die.
    """
    losses = []
    for logits_TE in router_logits:
        probability_TE = logits_TE.float().softmax(dim=-1)
        experts = probability_TE.shape[1]
        chosen = probability_TE.topk(top_k, dim=-1).indices.flatten()
        share_E = torch.bincount(chosen, minlength=experts) / chosen.numel()
        losses.append(experts * (share_E * probability_TE.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def save(model: MixtralForCausalLM, out: Path) -> None:
    """fp16; `output_router_logits` stays false, generation with a cache fails with it."""
    MixtralForCausalLM.from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), dtype=torch.float16
    ).save_pretrained(out)


def train_process(rank: int, processes: int, meeting: str, recipe: Recipe, out: Path, resume: bool) -> None:
    """One of the processes that share a batch. One thread each: two would wait for each other in every operation."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    train(recipe, out, resume=resume, rank=rank)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint and tokenizer")
    parser.add_argument("--resume", action="store_true", help="go on from what --out holds, with fresh optimizers")
    parser.add_argument("--processes", type=int, default=2, help="one thread each; they share the batch (default 2)")
    for field in fields(Recipe):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    out, resume, processes = options.pop("out"), options.pop("resume"), options.pop("processes")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        arguments = (processes, meeting, Recipe(**options), out, resume)
        spawn(train_process, arguments, nprocs=processes)  # type: ignore[no-untyped-call] # torch gives it no types


if __name__ == "__main__":
    main()
