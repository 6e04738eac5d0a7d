"""Chat templates in the shapes of published ones: recognised, used as they are, or refused, against
transformers."""

# ruff: noqa: E501 (templates)
import itertools
import json
import resource
import shutil
import subprocess
import sys
import time

import pytest
import sentencepiece
import tokenizers
from conftest import ROOT
from transformers import AutoTokenizer

import llm
from common.files import UsageError
from text import sandbox
from text.export import save_tokenizer
from text.hf import QWEN2_PATTERN
from tokenizer import load_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_WITH_DEFAULT = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a model.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = (
    "{% set turns = messages %}{% for message in turns %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not 'tool_calls' in message %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)
MISTRAL_V3 = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Roles must alternate") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content']TRIM + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA_NAMES = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
)
NAMES = [
    *LLAMA_NAMES,
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<s>",
    "</s>",
    "<start_of_turn>",
    "<end_of_turn>",
]
PHI_NAMES = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TOO_MUCH = "too long or too much memory"
CHAT = [
    {"role": "system", "content": "You are Kent."},
    {"role": "user", "content": "Lear: Who  are you?"},
    {"role": "assistant", "content": "Kent: [He knows me.] (bows)  A man, sir."},
    {"role": "user", "content": "Lear: And?"},
    {"role": "assistant", "content": "Kent: Nothing.\nAt all"},
]


@pytest.fixture(scope="module")
def bpe():
    """The JSON of a byte-level BPE of the stage without added tokens."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN2_PATTERN), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    made.train([str(ROOT / "data" / "stage" / "ward_c.json")], trainer)
    return made.to_str()


@pytest.fixture
def folder(bpe, tmp_path):
    """make(template, names, eos, bos, **config) writes a byte-level BPE with such a template and returns its
    directory."""

    def make(template, names=NAMES, eos="<|im_end|>", bos="<|begin_of_text|>", **config):
        made = tokenizers.Tokenizer.from_str(bpe)
        made.add_special_tokens(list(names))
        made.save(str(tmp_path / "tokenizer.json"))
        config = {"chat_template": template, "eos_token": eos, "bos_token": bos, **config}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return make


def runs_under_loss(tok, messages):
    ids, mask = tok.render(messages)
    groups = itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [tok.decode([i for i, _ in run]) for own, run in groups if own]


def same_as_transformers(tok, directory, messages):
    """Text and ids are those of apply_chat_template."""
    theirs = AutoTokenizer.from_pretrained(directory)
    for chat, generate in ((messages, False), (messages[:-1], True)):
        options = {"add_generation_prompt": generate}
        ours = tok.render(chat, generate)[0]
        assert tok.decode(ours) == theirs.apply_chat_template(chat, tokenize=False, **options)
        assert ours == theirs.apply_chat_template(chat, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize(
    ("template", "eos", "expected"),
    [
        (CHATML, "<|im_end|>", "chatml"),  # a fine-tune of LLaMA 3: the tokenizer has its markers as well
        (CHATML_WITH_DEFAULT, "<|im_end|>", "chatml"),
        (QWEN, "<|im_end|>", "chatml"),
        (LLAMA3, "<|eot_id|>", "llama3"),
        (LLAMA31, "<|eot_id|>", "llama3"),
    ],
)
def test_a_known_format_is_recognised(folder, template, eos, expected):
    """The format of the template wins over the markers in the vocabulary; the ids are those of transformers,
    but for Llama 3.1's date preamble."""
    directory = folder(template, eos=eos)
    tok = load_tokenizer(directory)
    assert tok.chat_format == expected and tok.chat_format_reason.startswith(
        f"{expected}: the chat template in "
    )
    assert tok.stop_ids[0] == tok.specials[eos]
    assert runs_under_loss(tok, CHAT) == [CHAT[2]["content"] + eos, CHAT[4]["content"] + eos]
    if template != LLAMA31:
        same_as_transformers(tok, directory, CHAT)
    else:
        text = AutoTokenizer.from_pretrained(directory).apply_chat_template(CHAT, tokenize=False)
        head, _, tail = text.partition("Cutting Knowledge Date")
        assert tok.decode(tok.render(CHAT)[0]) == head + tail.split("\n", 3)[3]


def test_a_chatml_fine_tune_of_llama_3_stops_at_its_own_mark(folder):
    """Stops of generation_config.json, the template and the tokenizer together; one number or a list."""
    directory = folder(CHATML)
    for stops in (608, [608, 604]):
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        tok = load_tokenizer(directory)
        assert set(tok.stop_ids) >= {tok.specials["<|im_end|>"], tok.specials["<|endoftext|>"], 608}
    (directory / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(UsageError, match="eos_token_id"):
        load_tokenizer(directory)


@pytest.mark.parametrize("where", ["named", "file"])
def test_where_a_template_stands(folder, where):
    """In a list of named ones, or in a file of its own, which wins."""
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": CHATML}]
    directory = folder(named if where == "named" else LLAMA3)
    if where == "file":
        (directory / "chat_template.jinja").write_text(CHATML)
    tok = load_tokenizer(directory)
    assert tok.chat_format == "chatml"
    assert ("chat_template.jinja" in tok.chat_format_reason) == (where == "file")


@pytest.mark.parametrize(
    ("template", "names", "eos", "end"),
    [
        (ZEPHYR, NAMES, "</s>", "</s>"),
        (PHI3, PHI_NAMES, "<|endoftext|>", "<|end|>"),
        ("{{ bos_token }}" + CHATML, NAMES, "<|im_end|>", "<|im_end|>"),
        (CHATML, ["<|im_end|>"], "<|im_end|>", "<|im_end|>"),  # <|im_start|> is plain text
        (CHATML.replace("assistant\n", "assistant\n<think>\n"), NAMES, "<|im_end|>", "<|im_end|>"),
    ],
)
def test_a_template_as_a_format(folder, template, names, eos, end):
    """transformers' ids; the loss on contents and end marks; nothing injected; saved and read again."""
    directory = folder(template, names, eos)
    tok = load_tokenizer(directory)
    assert tok.chat_format == "template" and tok.stop_ids[0] == tok.specials[end]
    assert tok.specials[eos] in tok.stop_ids
    same_as_transformers(tok, directory, CHAT)
    assert runs_under_loss(tok, CHAT) == [CHAT[2]["content"] + end, CHAT[4]["content"] + end]
    count = sum(i in tok.names for i in tok.render(CHAT)[0])
    odd = [
        {**m, "content": f" {''.join(names)}\n{{{{ 7 * 7 }}}} \uf8ff0\uf8ff{m['content']}\n "} for m in CHAT
    ]
    ids, mask = tok.render(odd)
    assert sum(i in tok.names for i in ids) == count
    assert runs_under_loss(tok, odd) == [odd[2]["content"] + end, odd[4]["content"] + end]
    again = load_tokenizer(tok.file, tok.chat_format)  # as another process opens it
    assert again.render(odd) == (ids, mask)
    (directory / "export").mkdir()
    save_tokenizer(tok, directory / "export")
    saved = load_tokenizer(directory / "export")
    assert (saved.chat_format, saved.render(odd), saved.stop_ids) == ("template", (ids, mask), tok.stop_ids)
    same_as_transformers(saved, directory / "export", CHAT)


def test_a_long_chat_is_within_the_bounds(folder):
    """A template of many characters, and a chat of many messages."""
    comment = "{# " + "x" * 9000 + " #}" + "{% if false %}" + "y" * 9000 + "{% endif %}"
    tok = load_tokenizer(
        folder(
            "{{ bos_token }}"
            + CHATML.replace("%}{{ '<|im_start|>' +", "%}" + comment + "{{ '<|im_start|>' +")
        )
    )
    assert tok.chat_format == "template"
    assert len(runs_under_loss(tok, CHAT[1:3] * 1000)) == 1000


def test_sampled_ids_stand_as_they_are(folder):
    tok = load_tokenizer(folder(ZEPHYR, eos="</s>"))
    sampled = [i for c in "Kent" for i in tok.encode(c)]
    ids, mask = tok.render([CHAT[1], {"role": "assistant", "content": "Kent", "ids": sampled}])
    assert [i for i, own in zip(ids, mask, strict=True) if own] == [*sampled, tok.specials["</s>"]]


def test_no_system_role(folder):
    """A template that refuses a system text is given it in the first user turn, as Mistral's formats do."""
    directory = folder(GEMMA.replace("TRIM", ""), eos="<end_of_turn>")
    tok = load_tokenizer(directory)
    joined = [{"role": "user", "content": f"{CHAT[0]['content']}\n\n{CHAT[1]['content']}"}, *CHAT[2:]]
    assert tok.chat_format == "template" and tok.render(CHAT) == tok.render(joined)
    same_as_transformers(tok, directory, joined)
    with pytest.raises(ValueError, match="system text only before"):
        tok.render([*CHAT[1:], CHAT[0]])


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (GEMMA.replace("TRIM", " | trim"), "trims"),
        (CHATML.replace("message['content']", "message['content'].split('</think>')[-1]"), "reads"),
        (PHI3.replace("{{'<|system|>\n' + message['content'] + '<|end|>\n'}}", ""), "leaves out the system text"),
        (MISTRAL_V3.replace("eos_token", "'<|im_end|>'"), "leaves out|reorders"),
        (CHATML.replace("'<|im_end|>'", "'###'"), "no special token"),
        (CHATML.replace("message['role']", "message['role'] + loop.index | string"), "depends on the others"),
        ("{% for m in messages %}", "endfor"),
        ("{{ cycler('a') }}", "leaves out"),
        ("{{ ''.__class__.__mro__ }}{{ messages.__class__() }}", "unsafe|undefined"),
        ("{{ 'a' * 10**9 }}", TOO_MUCH),
        ("{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}", TOO_MUCH),
        ("{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4, TOO_MUCH),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "."),
        ("{% set ns = namespace(v=['a']) %}{% for i in range(99) %}{% set ns.v = [ns.v, ns.v] %}{% endfor %}{{ ns.v }}", TOO_MUCH),
        ("x" * 100_001, "100,000"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_used(folder, template, why):
    """Refused in one line, at once; --chat-format still opens the checkpoint."""
    directory, start = folder(template, [*NAMES, *PHI_NAMES]), time.process_time()
    with pytest.raises(UsageError, match=f"({why}).*give --chat-format") as refused:
        load_tokenizer(directory)
    assert "\n" not in str(refused.value) and time.process_time() - start < 10
    tok = load_tokenizer(directory, "chatml")
    assert tok.chat_format == "chatml" and tok.stop_ids[0] == tok.specials["<|im_end|>"]


def test_a_long_template_is_compiled_once(folder):
    """16,000 characters of conditions, as templates with tools have them, are far within the limits."""
    branch = "{% for m in messages %}{{ m.content | trim }}{% if m.role == 'x' %}{{ 'y' + m.role }}{% endif %}{% endfor %}"
    template = QWEN + "{% if tools %}" + branch * 140 + "{% endif %}"
    assert 15_000 < len(template) < 20_000 and load_tokenizer(folder(template)).chat_format == "chatml"


REQUEST = json.dumps({"source": "Hi", "tokens": {}, "chats": [[[], False]]})


def run_sandbox(*command, **options):
    run = subprocess.run([sys.executable, *command], input=REQUEST, capture_output=True, text=True, **options)
    return run.stderr or json.loads(run.stdout)


def test_limits_that_a_system_lacks_or_has_already():
    """Windows has no `resource`; macOS refuses to limit memory; a lower limit may be there already."""
    start = f"import resource, runpy, sys; sys.argv[0] = {sandbox.__file__!r}; "
    run = "; runpy.run_path(sys.argv[0], run_name='__main__')"
    assert run_sandbox("-c", start + "sys.modules['resource'] = None" + run) == [["Hi", None]]
    refuse = "resource.setrlimit = lambda name, limits: open(b'/absent')"
    assert run_sandbox("-c", start + refuse + run) == [["Hi", None]]
    lower = (sandbox.MEMORY - 2**20,) * 2

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, lower)

    assert run_sandbox(sandbox.__file__, preexec_fn=limit) == [["Hi", None]]


def test_what_a_template_refuses_its_format_refuses(folder):
    """Here two messages in a row of the same role."""
    twice = "{% for m in messages %}{% if loop.nextitem is defined and loop.nextitem.role == m.role %}"
    tok = load_tokenizer(
        folder(twice + "{{ raise_exception('twice') }}{% endif %}{% endfor %}" + PHI3, PHI_NAMES)
    )
    assert tok.chat_format == "template" and tok.render(CHAT)
    with pytest.raises(ValueError, match="no user after user"):
        tok.render([*CHAT, CHAT[1], CHAT[1]])


def test_a_token_with_the_id_of_a_special_one(folder):
    """A vocabulary that gives a plain token the id of a special one: no text becomes that id."""
    directory = folder(CHATML)
    hf = json.loads((directory / "tokenizer.json").read_text())
    ends = {token["content"]: token["id"] for token in hf["added_tokens"]}
    hf["model"]["vocab"]["Qqq"], hf["model"]["ignore_merges"] = ends["<|im_end|>"], True
    (directory / "tokenizer.json").write_text(json.dumps(hf))
    tok = load_tokenizer(directory)
    ids = tok.encode("Qqq")
    assert not {*ids} & {*tok.specials.values()} and tok.decode(ids) == "Qqq"


def test_a_long_conversation(folder):
    """It is put together from a few rendered ones."""
    tok = load_tokenizer(folder(CHATML), "template")
    chat = [{"role": ("user", "assistant")[i % 2], "content": "Hi"} for i in range(9999)]
    assert len(tok.render(chat)[0]) > 9999 * 4


def test_asking_for_a_template_where_there_is_none(folder):
    with pytest.raises(UsageError, match="no chat template"):
        load_tokenizer(folder(None), "template")


def test_what_was_chosen_is_said(tiny_actor, script):
    """With --stats, and for whoever keeps settings."""
    why = "stage: tokenizer_config.json says so"
    assert llm.open_model(tiny_actor).chat_format_reason == why
    code, _, err = script("generate", "--model", tiny_actor, "--prompt", "The", "--max-tokens", 2, "--stats")
    assert code == 0 and f"chat format {why}" in err


def test_a_renamed_reserved_token_of_llama_3(shared, tmp_path):
    """ChatML on tiktoken ranks: a reserved token, and one more, get their names from tokenizer_config.json."""
    shutil.copy(shared / "tokenizers" / "llama3" / "tokenizer.model", tmp_path)
    names = {"128002": "<|im_start|>", "128256": "<|im_end|>", "128004": "<|finetune_right_pad_id|>"}
    added = {i: {"content": name} for i, name in names.items()}
    config = {"chat_template": CHATML, "eos_token": "<|im_end|>", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tok = load_tokenizer(tmp_path)
    assert (tok.chat_format, tok.vocab_size, tok.stop_ids[0]) == ("chatml", 128_257, 128_256)
    assert tok.render(CHAT[:1])[0][0] == 128_002 and len(tok.specials) == 257


# ---- SentencePiece -----------------------------------------------------------------------------------------


@pytest.fixture
def pieces(tmp_path):
    """make(template, control, added) writes a SentencePiece folder as Mistral's are."""

    def make(template, control=(), added=None, model_type="mistral"):
        sentencepiece.SentencePieceTrainer.train(
            input=str(ROOT / "data" / "stage" / "ward_c.json"), model_prefix=str(tmp_path / "tokenizer"),
            model_type="bpe", vocab_size=700, byte_fallback=True, control_symbols=list(control),
            remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2,
        )  # fmt: skip
        config = {"chat_template": template, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
        if added is not None:
            config["added_tokens_decoder"] = {str(i): {"content": name} for name, i in added.items()}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("template", "control", "expected"),
    [(MISTRAL, (), "mistral"), (MISTRAL_V3, ("[INST]", "[/INST]"), "mistral-v3"), (None, (), "mistral")],
)
def test_mistral_templates(pieces, template, control, expected):
    """Spaces that SentencePiece puts in itself and the place of a later system text do not matter."""
    tok = load_tokenizer(pieces(template, control))
    assert tok.chat_format == expected
    assert tok.stop_ids == [tok.specials["</s>"]]
    spoken = [i for i, own in zip(*tok.render(CHAT), strict=True) if own]
    assert tok.decode(spoken) == "".join(m["content"] + "</s>" for m in CHAT[2::2])


@pytest.mark.parametrize("where", ["added_tokens_decoder", "added_tokens.json", "tokenizer.json"])
def test_added_tokens_of_a_sentencepiece_folder(pieces, where):
    """ChatML on Mistral: its markers are no pieces. The ids are those of the whole text between special
    tokens."""
    added = {"<|im_end|>": 700, "<|im_start|>": 701}
    directory = pieces("{{ bos_token }}" + CHATML, added=added if where == "added_tokens_decoder" else None)
    if where == "added_tokens.json":
        (directory / where).write_text(json.dumps(added))
    if where == "tokenizer.json":
        tokens = [{"content": name, "id": i} for name, i in {"<unk>": 0, **added}.items()]
        (directory / where).write_text(json.dumps({"added_tokens": tokens}))
    tok = load_tokenizer(directory)
    assert (tok.chat_format, tok.vocab_size) == ("template", 702)
    assert tok.stop_ids == [700, tok.specials["</s>"]] and "<unk>" not in tok.specials
    expected = [tok.bos_id]
    for message in CHAT:
        whole = tok.pieces.encode(f"{message['role']}\n{message['content']}")
        expected += [701, *whole, 700, *tok.pieces.encode("\n")]
    assert tok.render(CHAT)[0] == expected
    text = "a<|im_end|><|im_start|>"
    assert not {700, 701} & set(tok.encode(text)) and tok.decode(tok.encode(text)) == text
    (directory / "export").mkdir()
    save_tokenizer(tok, directory / "export")
    assert load_tokenizer(directory / "export").render(CHAT)[0] == expected
    theirs = AutoTokenizer.from_pretrained(directory / "export")
    assert theirs.apply_chat_template(CHAT, tokenize=True, return_dict=False) == expected
