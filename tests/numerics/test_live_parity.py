"""A live model generates what the plain model does: alone, in a padded batch, and joining one under way."""
# ruff: noqa: E402 - what is imported below needs what importorskip has just found

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from families import tiny_model
from processes import EXACT, run_file
from transformers import AutoTokenizer

from bs_node.model import plain_model
from testbed.config import load_run_file
from testbed.config.sections import ModelSection
from testbed.errors import ConfigError
from testbed.live.continuation import CANCELLED, LENGTH, STOP, Continuation
from testbed.live.engine import Engine
from testbed.live.model import LiveModel, live_model
from testbed.live.sampling import Sampling
from testbed.live.text import TextStream
from testbed.runlog.reader import read_events, read_table

pytestmark = [pytest.mark.torch]

DEMO = ModelSection().folder
PROMPTS = [
    "def main(",
    "import os\n\n\nclass PathTests(unittest.TestCase):\n    def test_",
    "for i in range(10",
    "x = ",
]
NEW = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With runtime and cache folders of its own, and torch on one thread, as a base station has it."""
    before = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("live")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_RUNTIME_DIR", "XDG_CACHE_HOME"):
            (folder / name).mkdir(mode=0o700)
            patch.setenv(name, str(folder / name))
        yield folder
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[LiveModel]:
    file = run_file(folder, EXACT, policies=['name = "topk"', 'name = "wlr"\ntheta = 0.0'])
    with live_model(load_run_file(file), config_path=file, out=None, insecure=False) as live:
        yield live


@pytest.fixture(scope="module")
def plain(live: LiveModel) -> Any:
    return plain_model(DEMO, "float32")


def ids_of(live: LiveModel, text: str) -> Any:
    return live.tokenizer(text, return_tensors="pt")["input_ids"][0]


@torch.inference_mode()
def greedy(model: Any, ids_T: Any, new_tokens: int = NEW) -> list[int]:
    """The plain model's own generation."""
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    out = model.generate(ids_T[None], attention_mask=torch.ones_like(ids_T[None]), **options)
    return [int(token) for token in out[0, len(ids_T) :]]


def continuations(live: LiveModel, sampling: Sampling, prompts: list[str] = PROMPTS) -> list[Continuation]:
    return [Continuation(ids_of(live, prompt), sampling) for prompt in prompts]


def generated(live: LiveModel, under_way: list[Continuation], max_batch: int = 8) -> list[list[int]]:
    engine = Engine(live, max_batch)
    for continuation in under_way:
        engine.submit(continuation)
    engine.run()
    return [continuation.token_ids for continuation in under_way]


def test_every_prompt_of_a_padded_batch_gives_the_plain_models_greedy_tokens(live: LiveModel, plain: Any) -> None:
    expected = [greedy(plain, ids_of(live, prompt)) for prompt in PROMPTS]
    assert generated(live, continuations(live, Sampling(NEW))) == expected


def test_a_prompt_alone_gives_the_plain_models_greedy_tokens(live: LiveModel, plain: Any) -> None:
    assert generated(live, continuations(live, Sampling(NEW), PROMPTS[:1])) == [greedy(plain, ids_of(live, PROMPTS[0]))]


def test_whoever_joins_late_or_leaves_early_changes_nobody_elses_tokens(live: LiveModel, plain: Any) -> None:
    engine = Engine(live, max_batch=3)
    lengths = (NEW, 3, 9, NEW)
    under_way = [
        Continuation(ids_of(live, prompt), Sampling(length)) for prompt, length in zip(PROMPTS, lengths, strict=True)
    ]
    for continuation in under_way:
        engine.submit(continuation)
        engine.step()
    engine.run()
    expected = [greedy(plain, c.prompt, length) for c, length in zip(under_way, lengths, strict=True)]
    assert [continuation.token_ids for continuation in under_way] == expected
    assert [continuation.finish_reason for continuation in under_way] == [LENGTH] * 4
    assert len({continuation.number for continuation in under_way}) == 4, "each came by itself"


def test_embeddings_in_place_of_ids_give_the_same_tokens_also_beside_ids(live: LiveModel) -> None:
    expected = generated(live, continuations(live, Sampling(NEW)))
    mixed = continuations(live, Sampling(NEW))
    mixed[1].prompt = live.model.get_input_embeddings()(mixed[1].prompt)
    assert generated(live, mixed) == expected


def test_a_seed_makes_sampled_text_repeatable_whoever_else_is_in_the_batch(live: LiveModel) -> None:
    sampling = Sampling(NEW, do_sample=True, temperature=1.3, top_k=50, top_p=0.95, seed=7)
    alone = generated(live, continuations(live, sampling, PROMPTS[:1]))[0]
    in_company = generated(live, continuations(live, sampling))[0]
    others = generated(live, continuations(live, Sampling(NEW, do_sample=True, temperature=1.3, seed=8), PROMPTS[:1]))[
        0
    ]
    assert alone == in_company
    assert alone != others


def test_sampling_draws_as_transformers_does(live: LiveModel, plain: Any) -> None:
    """The first token of 400 seeds, against the probabilities that temperature, top_k and top_p leave."""
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from testbed.live.sampling import Sampler

    with torch.inference_mode():
        logits_1V = plain(ids_of(live, PROMPTS[0])[None]).logits[:, -1]
    expected = logits_1V
    for warper in (TemperatureLogitsWarper(1.5), TopKLogitsWarper(8), TopPLogitsWarper(0.8)):
        expected = warper(None, expected)
    probability_V = expected[0].softmax(-1)
    drawn = [
        Sampler(Sampling(do_sample=True, temperature=1.5, top_k=8, top_p=0.8, seed=seed)).next_token(logits_1V[0])
        for seed in range(400)
    ]
    share_V = torch.bincount(torch.tensor(drawn), minlength=len(probability_V)) / 400
    assert (share_V[probability_V == 0] == 0).all()
    assert (share_V - probability_V).abs().max() < 0.1, "four standard deviations"


def test_a_cancelled_one_ends_and_the_others_go_on(live: LiveModel, plain: Any) -> None:
    under_way = continuations(live, Sampling(NEW))
    engine = Engine(live, max_batch=2)
    for continuation in under_way:
        engine.submit(continuation)
    engine.step()
    under_way[0].cancelled = under_way[3].cancelled = True
    engine.run()
    assert [c.finish_reason for c in under_way] == [CANCELLED, LENGTH, LENGTH, CANCELLED]
    assert len(under_way[0].token_ids) == 1
    assert under_way[1].token_ids == greedy(plain, under_way[1].prompt)


@torch.inference_mode()
def test_tokens_of_prompts_and_answers_are_as_likely_as_the_plain_model_says(live: LiveModel, plain: Any) -> None:
    engine = Engine(live, max_batch=8)
    scored = [
        Continuation(ids_of(live, prompt), Sampling(3), scores_top=2, scores_prompt=True) for prompt in PROMPTS[:3]
    ]
    for continuation in [*scored, *continuations(live, Sampling(5), PROMPTS[3:])]:
        engine.submit(continuation)
    engine.run()
    for continuation in scored:
        ids_T = torch.cat([continuation.prompt, torch.tensor(continuation.token_ids)])
        logprobs_TV = plain(ids_T[None]).logits[0].log_softmax(-1)
        scores = [*continuation.prompt_scores, *continuation.scores]
        assert [score.token_id for score in scores] == ids_T[1:].tolist()
        expected_T = logprobs_TV[:-1].gather(-1, ids_T[1:, None])[:, 0]
        assert [score.logprob for score in scores] == pytest.approx(expected_T.tolist(), abs=1e-4)
        best = logprobs_TV[:-1].topk(2)
        assert [[logprob for _, logprob in score.top] for score in scores] == [
            pytest.approx(values, abs=1e-4) for values in best.values.tolist()
        ]
        assert all(score.top[0][0] == score.token_id for score in continuation.scores), "greedy"


def test_the_token_that_ends_a_text_is_scored_but_no_part_of_it(live: LiveModel) -> None:
    (usual,) = generated(live, continuations(live, Sampling(4), PROMPTS[:1]))
    ended = Continuation(ids_of(live, PROMPTS[0]), Sampling(9), scores_top=0)
    before = live.model.generation_config.eos_token_id
    try:
        live.model.generation_config.eos_token_id = usual[3]
        assert generated(live, [ended]) == [usual[: usual.index(usual[3])]]
    finally:
        live.model.generation_config.eos_token_id = before
    assert ended.finish_reason == STOP
    assert [score.token_id for score in ended.scores] == [*ended.token_ids, usual[3]]


def test_a_prompt_may_be_scored_without_a_token_more_and_others_join_no_fuller_than_memory_allows(
    live: LiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [Continuation(ids_of(live, prompt), Sampling(0), scores_top=0, scores_prompt=True) for prompt in PROMPTS]
    longest = max(continuation.prompt_tokens for continuation in asked)
    monkeypatch.setattr("testbed.live.engine.MAX_LOGITS", 2 * longest * live.model.config.vocab_size)
    assert generated(live, asked) == [[]] * 4
    assert [len(continuation.prompt_scores) for continuation in asked] == [c.prompt_tokens - 1 for c in asked]
    numbers = [continuation.number for continuation in asked]
    assert max(map(numbers.count, numbers)) <= 2
    monkeypatch.setattr("testbed.live.engine.MAX_LOGITS", longest * live.model.config.vocab_size - 1)
    with pytest.raises(ConfigError, match=f"have at most {longest - 1} scored"):
        generated(live, [max(asked, key=lambda continuation: continuation.prompt_tokens)])


def test_a_round_has_one_policy_and_whoever_came_first_is_first(live: LiveModel) -> None:
    policies = [0, 1, 0, 1, 1]
    under_way = [Continuation(ids_of(live, PROMPTS[0]), Sampling(3), policy=policy) for policy in policies]
    under_way[3].cancelled = True
    expected = generated(live, [Continuation(ids_of(live, PROMPTS[0]), Sampling(3), policy=0)])
    before, ends = len(ended_events(live)), []
    for index, continuation in enumerate(under_way):
        continuation.tell = lambda token_id, index=index: ends.append(index) if token_id is None else None
    assert generated(live, under_way) == [*expected * 3, [], *expected]
    live.use_policy(0)
    assert [index for index in ends if index != 3] == [0, 1, 2, 4]
    assert [event["policy"] for event in ended_events(live)[before:]] == [policies[index] for index in ends]
    rounds = read_table(live.run_dir, "rounds").to_pylist()
    assert {(c.policy, c.number) for c in under_way if not c.cancelled} <= {(r["policy"], r["prompt"]) for r in rounds}


def test_rows_and_events_carry_policy_and_prompt(live: LiveModel) -> None:
    live.use_policy(1)
    asked = continuations(live, Sampling(3), PROMPTS[:2])
    tokens, second = generated(live, asked), live.begin_prompt()
    live.use_policy(0)
    number = asked[0].number
    assert (asked[1].number, second) == (number, number + 1), "those who come together are one prompt"
    assert all(len(token_ids) == 3 for token_ids in tokens)
    rounds = read_table(live.run_dir, "rounds").to_pylist()
    mine = [row for row in rounds if (row["policy"], row["prompt"]) == (1, number)]
    layers = live.model.config.num_hidden_layers
    assert len(mine) == 3 * layers * 8, "one prefill and two more tokens of both, on eight devices"
    assert {row["tokens"] for row in mine if row["phase"] == 1} == {2}
    events = [event for event in ended_events(live) if (event["policy"], event["prompt"]) == (1, number)]
    assert [(event["tokens"], len(event["token_s"]), event["finish_reason"]) for event in events] == [
        (3, 2, LENGTH)
    ] * 2


def ended_events(live: LiveModel) -> list[dict[str, Any]]:
    return [event for event in read_events(live.run_dir) if event["kind"] == "generated"]


def test_text_that_comes_token_by_token_is_the_text_of_all_tokens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    for text in ("def f(x):\n    return 'äöü 漢字 🙂'\n", "", "  spaces  \n\n\tand tabs"):
        token_ids, stream = tokenizer(text)["input_ids"], TextStream(tokenizer)
        assert "".join([*(stream.add(token_id) for token_id in token_ids), stream.rest()]) == text
    cut = TextStream(tokenizer)
    half = "".join([*(cut.add(token_id) for token_id in tokenizer("🙂")["input_ids"][:-1]), cut.rest()])
    assert "🙂" not in half


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_another_family_joins_and_leaves_alike(family: str, folder: Path) -> None:
    """One with windows of attention, one whose keys and values differ in width."""
    place = folder / family
    place.mkdir()
    tiny_model(family).save_pretrained(place / "model")
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.save_pretrained(place / "model")
    experts = plain_model(place / "model", "float32")
    file = run_file(place, EXACT + f'[model]\npath = "{place / "model"}"\n', devices=[""] * 2)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 256, (length,), generator=generator) for length in (21, 5, 12)]
    with live_model(load_run_file(file), config_path=file, out=None, insecure=False) as live:
        engine = Engine(live, max_batch=2)
        under_way = [Continuation(prompt, Sampling(length)) for prompt, length in zip(prompts, (12, 4, 8), strict=True)]
        for continuation in under_way:
            engine.submit(continuation)
            engine.step()
        engine.run()
    expected = [greedy(experts, c.prompt, c.sampling.max_new_tokens) for c in under_way]
    assert [continuation.token_ids for continuation in under_way] == expected
