"""`testbed serve` as a process of its own, asked by the official `openai` client."""
# ruff: noqa: E402 - what is imported below needs what importorskip has just found

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from processes import EXACT, TESTBED, Command, Log, run, run_file, started

pytestmark = [pytest.mark.torch]

KEY = "a-key-of-this-test-only"
PROMPTS = ["def main(", "import os\n\n\nclass PathTests(", "for i in range(10", "x = "]
POLICIES = ["topk", "wlr:theta=0.3"]
GREEDY: dict[str, Any] = {"model": "demo", "temperature": 0}


class Server:
    """A server that listens, its log, and clients for it."""

    def __init__(self, command: Command, log: Log, address: str) -> None:
        self.command, self.log, self.address = command, log, address

    def client(self, key: str = KEY) -> Any:
        return openai.OpenAI(base_url=self.address, api_key=key, max_retries=0, timeout=60)

    def raw(self, body: bytes, path: str = "/completions", kind: str = "application/json") -> tuple[int, Any]:
        """What any other client gets."""
        url = urlsplit(self.address)
        with closing(HTTPConnection(url.netloc, timeout=30)) as connection:
            headers = {"Authorization": f"Bearer {KEY}", "Content-Type": kind}
            connection.request("POST", url.path + path, body=body, headers=headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Server]:
    file = run_file(folder, EXACT, devices=[""] * 4, policies=['name = "topk"', 'name = "wlr"\ntheta = 0.3'])
    (folder / "keys.txt").write_text(f"{KEY}\n")
    argv = [TESTBED, "serve", str(file), "--port", "0", "--json", "--api-key-file", str(folder / "keys.txt"), *options]
    with started(argv, folder) as command:
        assert command.process.stdout is not None
        line = command.process.stdout.readline()
        if not line:
            raise AssertionError(command.process.communicate())
        yield Server(command, Log(command, folder / "logs"), json.loads(line)["address"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("served")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with server.client() as client:
        yield client


def completion(client: Any, prompt: str, **options: Any) -> Any:
    return client.completions.create(prompt=prompt, **({"max_tokens": 24} | GREEDY | options))


def test_the_model_is_listed_and_another_one_is_not_there(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["demo", "demo:topk", "demo:wlr:theta=0.3"]
    assert client.models.retrieve("demo:wlr:theta=0.3").testbed == {"policy": "wlr θ=0.3"}
    with pytest.raises(openai.NotFoundError, match="served: demo, demo:topk"):
        completion(client, "x", model="another")


def test_a_completion_says_what_was_used_and_how_long_each_token_took(client: Any) -> None:
    answer = completion(client, "def main(")
    assert answer.choices[0].text.startswith("self):")
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 24)
    (times,) = answer.testbed["answers"]
    assert len(times["token_s"]) == 23
    assert answer.testbed["emulated"] is False


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 5}])
def test_a_stream_is_the_same_text_in_pieces(client: Any, sampling: dict[str, Any]) -> None:
    whole = completion(client, PROMPTS[1], **sampling)
    chunks = list(completion(client, PROMPTS[1], **sampling, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert "".join(chunk.choices[0].text for chunk in pieces) == whole.choices[0].text
    assert len(pieces) > 12, "as they come, not at once"
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_a_conversation_is_answered_whole_and_as_a_stream(client: Any) -> None:
    messages = [{"role": "system", "content": "import os"}, {"role": "user", "content": "def f(x):"}]
    asked = {"messages": messages, "max_tokens": 12, **GREEDY}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert whole.choices[0].message.role == chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_stop_string_ends_the_text_before_it(client: Any) -> None:
    without = completion(client, "def main(").choices[0].text
    stop = without[7:13]
    answer = completion(client, "def main(", stop=[stop, "never there"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (without[: without.index(stop)], "stop")
    streamed = "".join(c.choices[0].text for c in completion(client, "def main(", stop=stop, stream=True))
    assert streamed == answer.choices[0].text


def test_every_token_of_prompt_and_answer_is_scored_where_it_stands(client: Any) -> None:
    answer = completion(client, "def main(", max_tokens=4, echo=True, logprobs=2)
    text, logprobs = answer.choices[0].text, answer.choices[0].logprobs
    assert text.startswith("def main(self):\n")
    assert len(logprobs.tokens) == answer.usage.total_tokens == 8
    assert "".join(logprobs.tokens) == text
    assert [text[at:].startswith(token) for at, token in zip(logprobs.text_offset, logprobs.tokens, strict=True)]
    assert logprobs.token_logprobs[0] is None
    scored = list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True))
    for token, logprob, top in scored[1:]:
        assert top[token] == logprob <= max(top.values()) < 0
        assert 2 <= len(top) <= 3
    assert all(logprob == max(top.values()) for _, logprob, top in scored[4:]), "greedy"
    only_scored = completion(client, "def main(", max_tokens=0, echo=True, logprobs=2).choices[0]
    assert only_scored.text == "def main("
    assert only_scored.logprobs.token_logprobs[1:] == pytest.approx(logprobs.token_logprobs[1:4], abs=1e-4)


@pytest.mark.parametrize("stop", [None, "as"])
def test_a_streams_scores_are_those_of_the_whole_answer(client: Any, stop: str | None) -> None:
    asked = {"messages": [{"role": "user", "content": "def f(x):"}], "max_tokens": 12, "stop": stop, **GREEDY}
    scored = {**asked, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**scored).choices[0]
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**scored, stream=True)]
    streamed = [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in whole.logprobs.content]
    said = bytes(byte for token in streamed for byte in token.bytes).decode()
    assert said.startswith(whole.message.content)
    assert (said == whole.message.content) is (stop is None)
    assert all(len(token.top_logprobs) == 3 for token in streamed)
    assert client.chat.completions.create(**asked).choices[0].logprobs is None


def test_n_answers_draw_by_themselves_and_come_again_with_their_seed(client: Any) -> None:
    drawn = {"max_tokens": 8, "temperature": 1.0, "seed": 3}
    answer = client.completions.create(model="demo", prompt=PROMPTS[:2], n=2, **drawn)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert texts[0] != texts[1]
    alone = [
        client.completions.create(model="demo", prompt=prompt, **(drawn | {"seed": seed})).choices[0].text
        for prompt in PROMPTS[:2]
        for seed in (3, 4)
    ]
    assert texts == alone
    prompt_tokens = [completion(client, prompt, max_tokens=1).usage.prompt_tokens for prompt in PROMPTS[:2]]
    assert answer.usage.prompt_tokens == sum(prompt_tokens), "each prompt once"
    assert answer.usage.completion_tokens == 32


def test_a_models_name_says_under_which_policy_it_answers(server: Server, client: Any) -> None:
    under_topk = completion(client, PROMPTS[1])
    streams = [completion(client, PROMPTS[1], model=f"demo:{policy}", stream=True) for policy in POLICIES]
    texts = ["".join(chunk.choices[0].text for chunk in stream) for stream in streams]
    assert texts[0] == under_topk.choices[0].text
    under_wlr = completion(client, PROMPTS[1], model="demo:wlr:theta=0.3")
    assert (under_topk.testbed["policy"], under_wlr.testbed["policy"]) == ("topk", "wlr θ=0.3")
    number = under_wlr.testbed["answers"][0]["prompt"]
    (event,) = server.log.events("generated", policy=1, prompt=number)
    assert event["tokens"] == 24
    assert server.log.wait(lambda: server.log.rows(policy=1, prompt=number, phase=1), "its rounds")


def test_requests_that_come_together_share_rounds_and_are_answered_as_if_alone(server: Server, client: Any) -> None:
    alone = [completion(client, prompt).choices[0].text for prompt in PROMPTS]
    before = len(server.log.rows(device=0))
    together: list[str] = [""] * 4
    ready = threading.Barrier(4)

    def ask(index: int) -> None:
        ready.wait()
        together[index] = completion(client, PROMPTS[index]).choices[0].text

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    rows = server.log.wait(lambda: server.log.rows(device=0)[before:], "rows")
    decode = [row for row in rows if row["phase"] == 1]
    assert max(row["tokens"] for row in decode) >= 3
    one_by_one = 4 * 23 * 4  # prompts, further tokens, layers
    assert len(decode) < 0.6 * one_by_one


def test_several_prompts_of_one_request_are_answered_in_their_order(client: Any) -> None:
    answer = client.completions.create(prompt=PROMPTS, max_tokens=8, **GREEDY)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [
        completion(client, prompt, max_tokens=8).choices[0].text for prompt in PROMPTS
    ]


def test_several_answers_are_streamed_side_by_side(client: Any) -> None:
    asked = {"prompt": PROMPTS[:2], "n": 2, "max_tokens": 12, "model": "demo", "temperature": 1.0, "seed": 1}
    whole = client.completions.create(**asked)
    chunks = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    texts = ["".join(chunk.text for chunk in chunks if chunk.index == index) for index in range(4)]
    assert texts == [choice.text for choice in whole.choices]
    ends = [place for place, chunk in enumerate(chunks) if chunk.finish_reason]
    assert sorted(chunks[place].index for place in ends) == [0, 1, 2, 3]
    assert {chunk.index for chunk in chunks[: ends[0]]} == {0, 1, 2, 3}, "nobody waits for another one's end"


def test_token_ids_are_a_prompt_too(client: Any) -> None:
    answer = client.completions.create(prompt=[266, 289, 262], max_tokens=4, **GREEDY)
    assert answer.usage.prompt_tokens == 3


def test_who_hangs_up_is_no_longer_computed_for(server: Server, client: Any) -> None:
    stream = completion(client, "import ", max_tokens=900, stream=True)
    for _, _chunk in zip(range(3), stream, strict=False):
        pass
    stream.close()
    event = server.log.wait_for("generated", finish_reason="cancelled", prompt_tokens=2)
    assert 3 <= event["tokens"] < 900
    url = urlsplit(server.address)
    body = json.dumps({"prompt": "for i in range(10):\n", "max_tokens": 900, **GREEDY}).encode()
    head = f"POST {url.path}/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    prompts = len(server.log.events("generated"))
    with socket.create_connection((url.hostname, url.port)) as connection:
        connection.sendall(head.encode() + body)
        server.log.wait(lambda: len(server.log.rows(device=0, phase=0)) > 0, "its prefill")
    ended = server.log.wait(lambda: server.log.events("generated")[prompts:], "its end")
    assert ended[0]["finish_reason"] == "cancelled"
    assert completion(client, "x = ", max_tokens=2).choices[0].text, "others are answered as before"


def test_while_nobody_asks_nodes_may_leave_and_join_again(server: Server, client: Any) -> None:
    server.command.node(server.log.run_dir, "jetson-1").kill()
    server.log.wait_for("node_lost", device="jetson-1")
    server.log.wait_for("node_joined", device="jetson-1", joins=2)
    url = urlsplit(server.address)
    with closing(HTTPConnection(url.netloc, timeout=30)) as connection:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())) == (200, {"ok": True, "nodes": 4, "waiting": 0})
    assert completion(client, "def main(").choices[0].text.startswith("self):")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"n": 99}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"temperature": 9}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 30}, "logprobs"),
        ({"prompt": [99_999]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["x", 1]}, "prompt"),
        ({"prompt": ["x"] * 64, "n": 2}, None),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stream_options": {"more": True}}, "stream_options"),
        ({"extra_body": {"num_beams": 4}}, "num_beams"),
        ({"max_tokens": 5000}, None),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client: Any, options: dict[str, Any], param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**({"prompt": "x", "max_tokens": 4} | GREEDY | options))
    assert caught.value.body["type"] == "invalid_request_error"
    if param is not None:
        assert caught.value.body["param"] == param


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "demo"}', b"[" * 100_000])
def test_a_broken_body_is_answered_400(server: Server, body: bytes) -> None:
    status, answer = server.raw(body)
    assert status == 400
    assert answer["error"]["message"]


def test_a_body_beyond_the_bound_is_answered_413_and_another_kind_415(server: Server) -> None:
    assert server.raw(b" " * (2**23 + 1))[0] == 413
    assert server.raw(b"{}", kind="text/plain")[0] == 415
    assert server.raw(b"{}", path="/embeddings")[0] == 404


def test_without_the_right_key_nothing_is_answered(server: Server) -> None:
    for wrong in ("another-key-of-this-test", "x", KEY + "x"):
        with server.client(wrong) as stranger:
            for ask in (lambda: completion(stranger, "x"), stranger.models.list):
                with pytest.raises(openai.AuthenticationError):
                    ask()


def test_beyond_its_queue_it_says_429_and_ctrl_c_ends_it_with_goodbye_and_a_sealed_log(tmp_path: Path) -> None:
    with serving(tmp_path, "--batch", "1", "--max-waiting", "1") as server, server.client() as client:
        streams = [completion(client, "import ", max_tokens=900, stream=True)]
        next(iter(streams[0]))
        streams.append(completion(client, "x = ", stream=True))
        with pytest.raises(openai.RateLimitError):
            completion(client, "y = ")
        server.command.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="the server is ending"):
            list(streams[0])
        done = server.command.finish(20)
        server.command.wait_until_nothing_runs()
        assert (done.returncode, done.stderr) == (0, "")
    assert not list(server.log.run_dir.glob("*.seg*"))
    assert server.log.events("node_lost") == []


def test_with_a_certificate_it_speaks_https_only_and_sigterm_ends_a_stream_and_all_it_started(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    make += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    with serving(tmp_path, "--tls-cert", str(certificate), "--tls-key", str(key)) as server:
        assert server.address.startswith("https://")
        with server.client() as stranger, pytest.raises(openai.APIConnectionError):  # who signed it, it does not know
            stranger.models.list()
        trusting = openai.DefaultHttpxClient(verify=ssl.create_default_context(cafile=str(certificate)))
        with openai.OpenAI(base_url=server.address, api_key=KEY, http_client=trusting, timeout=60) as client:
            stream = completion(client, "import ", max_tokens=900, stream=True)
            next(iter(stream))
            server.command.process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="the server is ending"):
                list(stream)
        done = server.command.finish(20)
        server.command.wait_until_nothing_runs()
        assert (done.returncode, done.stderr) == (0, "")


def test_it_is_not_started_for_everybody_without_a_key(tmp_path: Path) -> None:
    done = run([TESTBED, "serve", str(run_file(tmp_path)), "--host", "0.0.0.0"], tmp_path)  # noqa: S104
    assert (done.returncode, done.stdout) == (2, "")
    assert "give it an --api-key-file" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "logs").exists()
