"""`testbed serve` as a process of its own, asked by the official `openai` client."""
# ruff: noqa: E402 - what is imported below needs what importorskip has just found

from __future__ import annotations

import json
import signal
import socket
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

from processes import TESTBED, Command, Log, run, run_file, started

pytestmark = [pytest.mark.torch]

SETTING = """
[wire]  # exact: what int8 rounds, the company in a batch may tip over
down = "fp32"
up = "fp32"

[timeouts]  # of a machine that is busy with other things
silence_s = 60.0
reply_s = 60.0
join_s = 90.0
"""
KEY = "a-key-of-this-test-only"
PROMPTS = ["def main(", "import os\n\n\nclass PathTests(", "for i in range(10", "x = "]
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
    file = run_file(folder, SETTING, devices=[""] * 4)
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
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
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
        ({"n": 2}, "n"),
        ({"temperature": 9}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 3}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"prompt": [99_999]}, "prompt"),
        ({"prompt": []}, None),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
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
        first = completion(client, "import ", max_tokens=900, stream=True)
        next(iter(first))
        with pytest.raises(openai.RateLimitError):
            client.completions.create(prompt=PROMPTS, max_tokens=4, **GREEDY)
        server.command.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="the server is ending"):
            list(first)
        done = server.command.finish(20)
        server.command.wait_until_nothing_runs()
        assert (done.returncode, done.stderr) == (0, "")
    assert not list(server.log.run_dir.glob("*.seg*"))
    assert server.log.events("node_lost") == []


def test_it_is_not_started_for_everybody_without_a_key(tmp_path: Path) -> None:
    done = run([TESTBED, "serve", str(run_file(tmp_path)), "--host", "0.0.0.0"], tmp_path)  # noqa: S104
    assert (done.returncode, done.stdout) == (2, "")
    assert "give it an --api-key-file" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "logs").exists()
