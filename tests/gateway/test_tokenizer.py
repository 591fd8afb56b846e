"""Token ids and chat templates must be the model's own, whatever is cached and wherever it runs."""

from __future__ import annotations

import json
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from gateway import tokenizer as module
from gateway.template import ChatTemplate
from gateway.tokenizer import Segments, Tokenizer
from replicas.fake import FakeSettings, fake_card
from replicas.protocol import ConfigError, InvalidRequest, ModelCard, NotSupported

TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog is not amused. " * 3,
    "Überall dieselbe alte Leier: 東京 🚀 naïve café.\n\n  indented\tcode()",
]
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im|>"]


def byte_level() -> HuggingFaceTokenizer:
    tokenizer = HuggingFaceTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def metaspace() -> HuggingFaceTokenizer:
    """As Llama 2's: a mark is put before the text's first word only, so segments depend on being first."""
    tokenizer = HuggingFaceTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", *SPECIALS], show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def awkward() -> HuggingFaceTokenizer:
    """Added tokens that swallow white space, and one that is found only after lower-casing."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens([AddedToken("<left>", lstrip=True), AddedToken("<right>", rstrip=True)])
    tokenizer.add_tokens([AddedToken("<norm>", normalized=True)])
    return tokenizer


ALL = {"byte_level": byte_level(), "metaspace": metaspace(), "awkward": awkward()}
PIECES = st.sampled_from([*SPECIALS, "<left>", "<right>", "<norm>", "<NORM>", "<|im", " ", "\n", "the dog ", "東", "x"])


def card_of(tokenizer: HuggingFaceTokenizer, **changes) -> ModelCard:
    card = replace(fake_card(FakeSettings()), tokenizer_json=tokenizer.to_str().encode())
    return replace(card, special_tokens={"bos_token": "<s>", "eos_token": "</s>"}, **changes)


@pytest.fixture
def threads():
    with ThreadPoolExecutor(1) as threads:
        yield threads


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=150)
@given(texts=st.lists(st.lists(PIECES, max_size=30).map("".join), min_size=1, max_size=3))
def test_cached_segments_encode_to_exactly_what_the_whole_text_does(name: str, texts: list[str]) -> None:
    tokenizer = Tokenizer(card_of(ALL[name]), None)  # too short for the thread

    async def encode(text: str):
        return list(await tokenizer.encode_chat(text, "tenant"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CACHE_FROM_CHARS", 0)
        for text in [*texts, *texts]:
            assert run(encode(text)) == ALL[name].encode(text, add_special_tokens=False).ids


def run(coroutine):
    """A coroutine that never waits, without an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waited")


async def test_a_conversation_that_grows_is_encoded_only_where_it_is_new(threads, monkeypatch) -> None:
    tokenizer = Tokenizer(card_of(ALL["byte_level"]), threads)
    seen: list[list[str]] = []
    encode = tokenizer._encode
    monkeypatch.setattr(tokenizer, "_encode", lambda texts, special: seen.append(texts) or encode(texts, special))
    turns = [f"<|im_start|>user\n{'word ' * 3000}{i}<|im_end|>" for i in range(3)]
    for count in (1, 2, 3):
        ids = await tokenizer.encode_chat("".join(turns[:count]), "a")
        assert list(ids) == ALL["byte_level"].encode("".join(turns[:count]), add_special_tokens=False).ids
    assert [len(texts) for texts in seen] == [2, 1, 1]  # <|im_end|> is a segment of its own, the same one each turn
    await tokenizer.encode_chat("".join(turns), "another tenant")
    assert len(seen[-1]) == 4


def test_segments_are_bounded_by_their_tokens() -> None:
    segments = Segments(max_tokens=10)
    for number in range(20):
        segments.put(("", False, str(number)), array("i", [1, 2, 3]))
    assert len(segments) == 3
    assert segments.get(("", False, "19")) is not None
    assert segments.get(("", False, "0")) is None
    segments.put(("", False, "huge"), array("i", range(11)))
    assert segments.get(("", False, "huge")) is None


@pytest.mark.parametrize("post_processor", [False, True])
@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("text", ["the dog", "<s>the dog", "the dog " * 3000])
async def test_a_plain_prompt_gets_the_bos_its_model_wants_once(threads, post_processor, add_bos, text) -> None:
    tokenizer = HuggingFaceTokenizer.from_str(ALL["byte_level"].to_str())
    bos = tokenizer.token_to_id("<s>")
    if post_processor:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    ids = (await Tokenizer(card_of(tokenizer, add_bos=add_bos), threads).encode_prompts([text]))[0]
    body = tokenizer.encode(text.removeprefix("<s>"), add_special_tokens=False).ids
    wants = post_processor or add_bos or text.startswith("<s>")
    assert list(ids) == ([bos] if wants else []) + body


TEMPLATES = [
    fake_card(FakeSettings()).chat_template,
    "{{ bos_token }}{% for m in messages %}\n    {% if m.role == 'system' %}\n<<{{ m.content | trim }}>>\n"
    "    {% elif loop.last %}\n{{ m['content'] | upper }}\n    {% else %}\n{{ m | tojson }}\n    {% endif %}\n"
    "{% endfor %}{% generation %}A{% endgeneration %}{{ eos_token if not add_generation_prompt }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'assistant' %}{% continue %}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{{ ns.n }}:{{ m.content }}{% endfor %}"
    "{{ messages[::-1][0].role }}{% if tools %}T{% endif %}",
]
CHAT = [
    {"role": "system", "content": " Be <b>brief</b> & kind. "},
    {"role": "user", "content": 'Say "hi" 東京'},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "again"},
]


@pytest.mark.parametrize("source", TEMPLATES)
def test_templates_render_as_transformers_renders_them(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    [expected], _ = render_jinja_template([CHAT], chat_template=source, add_generation_prompt=True, **tokens)
    assert ChatTemplate(source, tokens).render(CHAT) == expected


def test_the_developer_is_the_system_to_a_template_that_does_not_know_it() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert ChatTemplate("{{ messages[0].role }}", {}).render(messages) == "system"
    assert ChatTemplate("{{ messages[0].role }}{# developer #}", {}).render(messages) == "developer"


def test_a_template_that_refuses_a_conversation_is_the_callers_error() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template.render(CHAT)
    with pytest.raises(InvalidRequest):
        ChatTemplate("{{ messages[9].content + 1 }}", {}).render(CHAT)


@pytest.mark.parametrize(
    "source", ["{{ messages.__class__.__mro__ }}", "{{ ''.__class__ }}", "{% set _ = messages.append(1) %}"]
)
def test_a_template_cannot_reach_out_of_its_sandbox(source: str) -> None:
    try:
        assert "class" not in ChatTemplate(source, {}).render(list(CHAT))
    except InvalidRequest:
        pass


def test_a_broken_template_is_refused_when_the_model_arrives_and_none_at_all_when_it_is_used() -> None:
    with pytest.raises(ConfigError):
        ChatTemplate("{% if %}", {})
    with pytest.raises(NotSupported):
        ChatTemplate("", {}).render(CHAT)


def test_the_card_of_a_tokenizer_without_added_tokens_works() -> None:
    document = json.loads(ALL["byte_level"].to_str())
    document["added_tokens"] = []
    card = replace(card_of(ALL["byte_level"]), tokenizer_json=json.dumps(document).encode())
    assert run(Tokenizer(card, None).encode_chat("the dog " * 500, "")) is not None
