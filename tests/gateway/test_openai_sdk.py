"""The newest openai SDK, used the way its documentation shows, against a gateway on a real socket."""

from __future__ import annotations

import openai
import pytest

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "Hello"}]}


def test_a_chat_answers_in_the_sdks_own_type(module_gateway) -> None:
    with module_gateway.openai() as client:
        answer = client.chat.completions.create(**CHAT, max_tokens=12)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == "fake"
    assert answer.system_fingerprint.startswith("fp_")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_a_streamed_chat_brings_the_same_text_token_by_token(module_gateway) -> None:
    with module_gateway.openai() as client:
        whole = client.chat.completions.create(**CHAT, max_tokens=40)
        with client.chat.completions.create(
            **CHAT, max_tokens=40, stream=True, stream_options={"include_usage": True}
        ) as stream:
            chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 40
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_asynchronous_client_streams_too(module_gateway) -> None:
    async with module_gateway.async_openai() as client:
        stream = await client.chat.completions.create(**CHAT, max_tokens=5, stream=True)
        texts = [chunk.choices[0].delta.content async for chunk in stream]
        whole = await client.chat.completions.create(**CHAT, max_tokens=5)
    assert "".join(filter(None, texts)) == whole.choices[0].message.content


def test_completions_take_text_texts_and_token_ids(module_gateway) -> None:
    with module_gateway.openai() as client:
        text = client.completions.create(model="fake", prompt="Hello", max_tokens=6)
        ids = client.completions.create(model="fake", prompt=list(b"Hello"), max_tokens=6)
        both = client.completions.create(model="fake", prompt=["Hello", "Bye"], n=2, temperature=0, max_tokens=6)
        lists = client.completions.create(model="fake", prompt=[list(b"Hello"), [1]], max_tokens=6)
    assert text.object == "text_completion"
    assert text.id.startswith("cmpl-")
    assert text.choices[0].text == ids.choices[0].text
    assert text.usage.prompt_tokens == ids.usage.prompt_tokens == 5
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text
    assert both.choices[2].text == both.choices[3].text != both.choices[0].text
    assert both.usage.prompt_tokens == 8
    assert both.usage.completion_tokens == 24
    assert lists.choices[0].text == text.choices[0].text


def test_a_streamed_completion_of_several_prompts_keeps_its_choices_apart(module_gateway) -> None:
    with module_gateway.openai() as client:
        request = {"model": "fake", "prompt": ["a", "b", "c"], "n": 2, "seed": 3, "max_tokens": 9}
        whole = client.completions.create(**request)
        texts = [""] * 6
        finished = []
        for chunk in client.completions.create(**request, stream=True, stream_options={"include_usage": True}):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                if choice.finish_reason:
                    finished.append(choice.index)
            usage = chunk.usage
    assert texts == [choice.text for choice in whole.choices]
    assert sorted(finished) == list(range(6))
    assert usage == whole.usage


def test_models_are_listed_by_name_and_alias(module_gateway) -> None:
    with module_gateway.openai() as client:
        assert [model.id for model in client.models.list()] == ["fake", "gpt-fake"]
        model = client.models.retrieve("gpt-fake")
        answer = client.chat.completions.create(**{**CHAT, "model": "gpt-fake"}, max_tokens=1)
    assert model.owned_by == "signalbox"
    assert model.model_dump()["root"] == "fake"
    assert answer.model == "fake"


def test_errors_are_the_sdks_own_exception_types(module_gateway) -> None:
    with module_gateway.openai() as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(**CHAT, max_tokens=-1)
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(**{**CHAT, "model": "gpt-5"})
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-5")
    assert bad.value.param == "max_tokens"
    assert bad.value.type == "invalid_request_error"
    assert missing.value.code == "model_not_found"
    with module_gateway.openai(api_key="sk-wrong") as client, pytest.raises(openai.AuthenticationError) as refused:
        client.chat.completions.create(**CHAT)
    assert refused.value.code == "invalid_api_key"


def test_the_sdks_usual_extras_at_their_neutral_values_are_accepted(module_gateway) -> None:
    with module_gateway.openai() as client:
        answer = client.chat.completions.create(
            **CHAT,
            max_completion_tokens=3,
            tools=[],
            tool_choice="none",
            parallel_tool_calls=True,
            response_format={"type": "text"},
            modalities=["text"],
            store=False,
            metadata={"team": "a"},
            user="me",
            service_tier="auto",
            logit_bias={"5": -100},
            stop=["never this"],
        )
        again = client.chat.completions.create(
            model="fake", messages=[*CHAT["messages"], answer.choices[0].message, CHAT["messages"][0]], max_tokens=2
        )
    assert again.usage.completion_tokens == 2


def test_vllms_extensions_pass_through_extra_body(module_gateway) -> None:
    extra = {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True}
    with module_gateway.openai() as client:
        answer = client.chat.completions.create(**CHAT, max_tokens=3, extra_body={**extra, "stop_token_ids": [7]})
    assert answer.usage.completion_tokens == 3


def test_a_repeated_prompt_reports_its_cached_tokens_but_never_another_tenants(module_gateway) -> None:
    request = {"model": "fake", "prompt": "x" * 100, "max_tokens": 1}
    with module_gateway.openai() as client:
        cached = [client.completions.create(**request).usage.prompt_tokens_details.cached_tokens for _ in range(2)]
    assert cached == [0, 96]
    from gateway.keys import KeyRegister, load_secret

    config = module_gateway.config
    with KeyRegister(config.database_url, load_secret(config.state_dir)) as register:
        other = register.create("other tenant")
    with module_gateway.openai(api_key=other) as client:
        assert client.completions.create(**request).usage.prompt_tokens_details.cached_tokens == 0
