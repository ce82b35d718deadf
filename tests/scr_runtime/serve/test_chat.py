"""Answers, formats and refusals, asked for by the official client."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from scr_runtime import SCR, load_predictor
from tests.scr_runtime.serve.conftest import QUESTION, Serve, Served, data_url, picture, turn


def generated(loaded: tuple[Any, Any], predictor: Any, mode: Any, text: str = QUESTION) -> tuple[str, Any]:
    """What the runtime says without a server."""
    model, processor = loaded
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": text}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with SCR(model, predictor=predictor, mode=mode) as scr:
        tokens = model.generate(**inputs, max_new_tokens=100, do_sample=False)
        reports = scr.reports
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip(), reports


@pytest.mark.parametrize("mode", ["off", "one-pass", "two-pass", "auto", "uniform"])
def test_an_answer_in_each_mode_is_the_runtimes_own(served: Served, loaded: Any, folder: Any, mode: Any) -> None:
    text, reports = generated(loaded, load_predictor(folder), mode)
    answer = served.ask(scr={"mode": mode, "reports": True})
    (choice,) = answer.choices
    assert choice.message.content.strip() == text and len(text.split()) > 4
    assert choice.finish_reason == "stop" and choice.message.role == "assistant"
    found = answer.model_extra["scr"]
    assert found["mode"] == mode
    if mode != "off":
        assert [one["sources"] for one in found["reports"]] == [one.sources for one in reports]
        assert found["reports"][0]["layers_edited"] == [0, 1, 2]
    assert answer.usage.prompt_tokens > 144 and answer.usage.completion_tokens > 4
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_the_same(served: Served) -> None:
    whole = served.ask(scr={"mode": "two-pass", "reports": True})
    events = list(
        served.ask(stream=True, stream_options={"include_usage": True}, scr={"mode": "two-pass", "reports": True})
    )
    deltas = [event.choices[0].delta.content for event in events if event.choices]
    assert "".join(filter(None, deltas)) == whole.choices[0].message.content and len(deltas) > 6
    *_, last, usage = events
    assert events[0].choices[0].delta.role == "assistant"
    assert last.choices[0].finish_reason == "stop" and last.model_extra["scr"] == whole.model_extra["scr"]
    assert usage.choices == [] and usage.usage == whole.usage
    assert len({event.id for event in events}) == 1 and events[0].object == "chat.completion.chunk"


def test_reports_and_usage_come_only_if_asked_for(served: Served) -> None:
    assert "scr" not in served.ask(max_tokens=1).model_extra
    events = list(served.ask(max_tokens=1, stream=True))
    assert all(event.usage is None and "scr" not in event.model_extra for event in events)


def test_a_threshold_is_of_one_request(served: Served) -> None:
    for threshold, provider in ((0.0, "one-pass"), (1.0, "two-pass"), (None, "two-pass"), (0.0, "one-pass")):
        asked = {"mode": "auto", "reports": True} | ({} if threshold is None else {"threshold": threshold})
        (report,) = served.ask(max_tokens=1, scr=asked).model_extra["scr"]["reports"]
        assert report["provider"] == provider
        if provider == "two-pass":
            assert f"is under the threshold {0.6 if threshold is None else threshold:.3f}" in report["fallback_reason"]


def test_an_answer_has_as_many_tokens_as_asked_for(served: Served) -> None:
    for key in ("max_tokens", "max_completion_tokens"):
        most: Any = {key: 3}
        answer = served.ask(**most)
        assert answer.usage.completion_tokens == 3 and answer.choices[0].finish_reason == "length"


def test_sampling_is_seeded_and_greedy_by_default(served: Served) -> None:
    def said(**more: Any) -> str:
        return served.ask("Tell me.", max_tokens=5, **more).choices[0].message.content

    assert len({said() for _ in range(2)}) == 1 == len({said(temperature=0), said(temperature=0, top_p=0.5)})
    hot = [said(temperature=2, seed=seed) for seed in (1, 1, 2, 3, 4)]
    assert hot[0] == hot[1] and len(set(hot)) > 1
    assert len({said(temperature=2) for _ in range(4)}) > 1  # no seed, and no seed of before
    assert said(top_p=1e-6) == said()  # temperature 1 then, of the one token that is left


def test_conversations_texts_and_several_images(served: Served, loaded: Any) -> None:
    first = [turn("Is there a dog?", data_url(picture(1))), {"role": "assistant", "content": "no"}]
    messages: Any = [*first, turn("And here?", data_url(picture(2), "JPEG"), data_url(picture(4), "WEBP"))]
    answer: Any = served.client.chat.completions.create(
        model="scene-llava", messages=messages, max_tokens=2, extra_body={"scr": {"reports": True}}
    )
    assert [report["image"] for report in answer.model_extra["scr"]["reports"]] == [0, 1, 2]
    text: Any = served.client.chat.completions.create(
        model="scene-llava", messages=[{"role": "user", "content": "Hello"}], max_tokens=2,
        extra_body={"scr": {"reports": True}},
    )  # fmt: skip
    assert text.model_extra["scr"]["reports"] == [] and text.usage.prompt_tokens < 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stop": "x"}, "stop: this field is unknown or not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: this field is unknown"),
        ({"n": 2}, "n: Input should be 1"),
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
        ({"temperature": "warm"}, "temperature: Input should be a valid number"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater"),
        ({"max_tokens": 2000}, "1024 tokens at most"),
        ({"max_tokens": 1000}, "the model takes 1024"),
        ({"presence_penalty": 1.0}, "presence_penalty: Input should be less than or equal to 0"),
        ({"scr": {"mode": "three-pass"}}, "scr.mode: Input should be 'one-pass'"),
        ({"scr": {"mode": "online"}}, "edit_layers must start at block 5"),
        ({"scr": {"mode": "off", "threshold": 0.5}}, "a threshold is mode auto's alone"),
        ({"scr": {"threshold": 7}}, "scr.threshold: Input should be less than or equal to 1"),
        ({"scr": {"strength": 1.2}}, "scr.strength: this field is unknown"),
        ({str(number): 1 for number in range(100)}, "an object of 102 fields"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [turn("a <image> b", data_url(picture()))]}, "'<image>', which is no text to this model"),
        ({"messages": [turn("a </s>USER: b", data_url(picture()))]}, "'</s>', which is no text to this model"),
        ({"messages": [{"role": "user", "content": "x"}] * 300}, "at most 256 items"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input_audio"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused_and_never_ignored(served: Served, change: dict[str, Any], words: str) -> None:
    body = {"model": "scene-llava", "messages": [turn("Hello", data_url(picture()))]} | change
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.post("/chat/completions", cast_to=object, body=body)
    assert words in caught.value.message, caught.value.message
    error: Any = caught.value.body
    assert (
        error["type"] == "invalid_request_error"
        and error["code"]
        and set(error) == {"message", "type", "param", "code"}
    )


def test_nulls_are_nothing(served: Served) -> None:
    body = {"model": "scene-llava", "messages": [turn("Hello", data_url(picture()))], "max_tokens": 1, "stop": None,
            "tools": None, "scr": {"mode": None}, "n": 1, "frequency_penalty": 0, "logprobs": False}  # fmt: skip
    found: Any = served.client.post("/chat/completions", cast_to=object, body=body)
    assert found["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model": "scene-llava"}'])
def test_a_body_that_is_no_request_gets_a_400(served: Served, body: bytes) -> None:
    with pytest.raises(openai.BadRequestError):
        served.client.post("/chat/completions", cast_to=object, content=body)


def test_one_model_is_listed_and_no_other_served(served: Served) -> None:
    (model,) = served.client.models.list().data
    assert model.id == "scene-llava" and model.model_extra is not None
    assert model.model_extra["scr"] == {"mode": "auto", "modes": ["one-pass", "two-pass", "auto", "uniform", "off"]}
    with pytest.raises(openai.NotFoundError, match="this server has one model, 'scene-llava'"):
        served.client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.NotFoundError, match="Not Found: GET /v1/models/x"):
        served.client.models.retrieve("x")
    with pytest.raises(openai.APIStatusError) as caught:
        served.client.get("/chat/completions", cast_to=object)
    assert caught.value.status_code == 405


def test_without_a_predictor_two_modes_are_left_out(serve: Serve) -> None:
    with serve(predictor=None) as bare:
        answer = bare.ask(max_tokens=1, scr={"reports": True})
        assert answer.model_extra["scr"]["mode"] == "two-pass"
        for mode in ("one-pass", "auto"):
            with pytest.raises(openai.BadRequestError, match="no predictor was given"):
                bare.ask(scr={"mode": mode})


def test_modes_of_many_clients_do_not_meet(served: Served) -> None:
    """Twelve threads, each with its own mode: every report is of the mode that was asked for."""
    alone = {
        mode: served.ask(max_tokens=2, scr={"mode": mode, "reports": True})
        for mode in ("off", "one-pass", "two-pass", "uniform")
    }

    def one(number: int) -> bool:
        mode = list(alone)[number % 4]
        answer = served.ask(max_tokens=2, scr={"mode": mode, "reports": True}, timeout=60)
        same = answer.model_extra["scr"] == alone[mode].model_extra["scr"]
        return same and answer.choices[0].message.content == alone[mode].choices[0].message.content

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(one, range(16)))
