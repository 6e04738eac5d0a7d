"""Every family of the published table, against transformers: logits, greedy text, chat formats,
tokenizers."""

import json
import random
import subprocess
import sys

import pytest
import sentencepiece
import tokenizers
import torch
from conftest import ROOT, SHARED, random_config, random_model, usage_error
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import checkpoint
import engine.engine
from checkpoint import weights
from common import files
from generate import Engine, SamplingParams
from llm import open_model
from model import ModelConfig
from text.chat import CHAT_FORMATS
from text.export import save_tokenizer
from text.hf import QWEN2_PATTERN
from tokenizer import STAGE_TOKENIZER, load_tokenizer

FAMILIES = ["llama", "mistral", "qwen2", "mixtral"]
CHAT = [
    {"role": "system", "content": "You are Kent."},
    {"role": "user", "content": "===Conversation Start===\n\nLear: Who are you?\n\n"},
    {"role": "assistant", "content": "Kent: [He knows me.] (bows)  A man, sir.\n\n"},
    {"role": "user", "content": "Lear: And?\n\n"},
    {"role": "assistant", "content": "Kent: Nothing.\n\n"},
]


def peer_of(directory, dtype=torch.float32):
    experts = (
        {"experts_implementation": "eager"} if "mixtral" in (directory / "config.json").read_text() else {}
    )
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **experts).eval()


@pytest.fixture(
    params=[(family, seed) for family in FAMILIES for seed in range(4)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def pair(request, tmp_path):
    """(our model, transformers' model, the directory both are from, random tokens [2, 60])."""
    family, seed = request.param
    config = random_config(f"{family}{seed}", family)
    model = random_model(config, seed)
    checkpoint.save_model(model, tmp_path / "model")
    tokens = torch.randint(config.vocab_size, (2, 60), generator=torch.Generator().manual_seed(seed))
    return checkpoint.load_model(tmp_path / "model"), peer_of(tmp_path / "model"), tmp_path / "model", tokens


@torch.no_grad()
def test_logits_and_greedy_text_are_transformers(pair):
    """fp32 logits within 1e-5; 64 greedy tokens through the cache are `generate`'s, for ragged prompts in one
    batch."""
    model, peer, _, tokens = pair
    torch.testing.assert_close(model(tokens), peer(tokens).logits, rtol=1e-5, atol=1e-5)
    prompts = [tokens[0, :30], tokens[1, :50], tokens[1, :1]]
    done = Engine(model).generate(
        [prompt.tolist() for prompt in prompts], SamplingParams(temperature=0, max_tokens=64)
    )
    for prompt, completion in zip(prompts, done, strict=True):
        options = {"attention_mask": torch.ones_like(prompt[None]), "eos_token_id": -1, "pad_token_id": 0}
        options["use_cache"] = (
            model.config.sliding_window != 1
        )  # transformers' cache of a window of 1 keeps everything
        expected = peer.generate(prompt[None], max_new_tokens=64, do_sample=False, **options)
        assert completion.ids == expected[0, len(prompt) :].tolist()


@torch.no_grad()
def test_bf16_is_as_near_as_transformers(pair):
    """Our bf16 logits are no further from the fp32 ones than twice transformers' own."""
    _, peer, directory, tokens = pair
    exact = peer(tokens).logits
    ours = checkpoint.load_model(directory, dtype=torch.bfloat16)(tokens).float()
    theirs = peer_of(directory, torch.bfloat16)(tokens).logits.float()
    assert (ours - exact).abs().mean() <= 2 * (theirs - exact).abs().mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted(family):
    """num_parameters is what the model has."""
    config = random_config(7, family)
    assert config.num_parameters() == sum(
        p.numel() for p in checkpoint.build_model(config, "meta", None).parameters()
    )


def test_published_sizes(script):
    """The dry run names the published parameter counts; their shapes are in the presets."""
    for preset, published in (("llama-3.1-8b", 8_030_261_248), ("llama-3.1-70b", 70_553_706_496)):
        if not SHARED.is_dir():
            pytest.skip("needs the LLaMA 3 tokenizer")
        tokenizer = SHARED / "tokenizers" / "llama3"
        code, _, err = script(
            "train", "--model", preset, "--tokenizer", tokenizer, "--dry-run", "--max-steps", 1
        )
        assert code == 0
        assert f"{published:,} parameters" in err
        assert f"weights {4 * published / 2**30:.2f}, " in err  # GiB of fp32 master weights, on one rank


# ---- tokenizers --------------------------------------------------------------------------------------------


def random_text(rng):
    def character():
        point = rng.choice(
            [
                rng.randrange(32),
                rng.randrange(32, 127),
                rng.randrange(0x80, 0xD800),
                rng.randrange(0xE000, 0x110000),
            ]
        )
        return chr(point)

    parts = [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "'s",
        "'LL",
        "123",
        "4567",
        "é",
        "e\u0301",
        "😀",
        "你好",
        "ﬁ",
        "<|eot_id|>",
        "</s>",
        "[INST]",
    ]
    return "".join(
        rng.choice([character(), rng.choice(parts), "word", " Word"]) for _ in range(rng.randrange(1, 25))
    )


def texts(number):
    """Real text in pieces, and random strings."""
    rng = random.Random(1)
    random_strings = [random_text(rng) for _ in range(number)]
    real = [json.loads(line)["content"] for line in (SHARED / "books" / "classics.jsonl").open()]
    real += [file.read_text() for file in sorted(SHARED.rglob("*.json"))[: number // 1000]]
    return real + random_strings


@pytest.fixture(scope="module")
def qwen2_file(tmp_path_factory):
    """A byte-level BPE in the shape of Qwen 2's, trained on the stage."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN2_PATTERN), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.normalizer = tokenizers.normalizers.NFC()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    made.train([str(file) for file in sorted((ROOT / "data" / "stage").glob("*.json"))], trainer)
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    file = tmp_path_factory.mktemp("qwen2") / "tokenizer.json"
    made.save(str(file))
    return file


@pytest.fixture(scope="module", params=["llama3", "qwen2", "llama2", "mistral", "stage"])
def ours(request, qwen2_file):
    if request.param in ("llama3", "llama2", "mistral") and not SHARED.is_dir():
        pytest.skip("needs the published tokenizers")
    path = {
        "llama3": SHARED / "tokenizers" / "llama3",
        "llama2": SHARED / "tokenizers" / "llama2",
        "mistral": SHARED / "tokenizers" / "llama2",
        "qwen2": qwen2_file,
        "stage": STAGE_TOKENIZER,
    }[request.param]
    return load_tokenizer(path, "mistral" if request.param == "mistral" else None)


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    """What transformers opens of our export."""
    directory = tmp_path_factory.mktemp("export")
    save_tokenizer(ours, directory)
    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("number", [2000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_ids_are_transformers(ours, theirs, number, shared):
    """The same ids as the exported (or original) tokenizer.json gives in transformers, on real text and on
    random strings."""
    for text in texts(number):
        if (
            ours.chat_format == "stage"
        ):  # there a literal U+2581 is kept apart from a space, as transformers does not
            text = text.replace("\u2581", "")
        assert ours.encode(text) == theirs.encode(
            text, add_special_tokens=False, split_special_tokens=True
        ), text[:80]


def test_a_tokenizer_json_gives_the_ids_of_the_ranks(shared, tmp_path):
    """LLaMA 3 as tiktoken ranks, and as the tokenizer.json derived from them."""
    ranks = load_tokenizer(shared / "tokenizers" / "llama3")
    save_tokenizer(ranks, tmp_path)
    derived = load_tokenizer(tmp_path / "tokenizer.json")
    assert derived.render(CHAT) == ranks.render(CHAT)
    assert derived.specials == ranks.specials
    for text in texts(1000):
        assert derived.encode(text) == ranks.encode(text)


def test_chats_are_those_of_the_template(ours, theirs):
    """Our ids of a chat are those of the exported chat template; decoding them gives the template's text."""
    for messages in (CHAT, CHAT[1:3]):
        assert ours.render(messages)[0] == theirs.apply_chat_template(
            messages, tokenize=True, return_dict=False
        )
    head = ours.render(CHAT[:2], add_generation_prompt=True)[0]
    expected = theirs.apply_chat_template(
        CHAT[:2], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert head == expected
    assert ours.render(CHAT[:3])[0][: len(head)] == head


def test_masked_ids_are_the_assistants_words(ours):
    """Ids under loss decode to the assistants' texts, each with its end mark."""
    ids, mask = ours.render(CHAT)
    end, spoken, part = ours.stop_ids[0], [], []
    for i, own in zip(ids, mask, strict=True):
        part += [i] * own
        if own and i == end:
            spoken.append(ours.decode(part[:-1]))
            part = []
    assert not part
    assert spoken == [message["content"] for message in CHAT if message["role"] == "assistant"]


def test_nothing_is_injected(ours):
    """A special token's name in any role's text gives no special id there, and comes back as text."""
    for name in ours.specials:
        text = f"a{name}b {name}"
        assert not set(ours.encode(text)) & set(ours.specials.values()), name
        assert ours.decode(ours.encode(text)) == text, name
    plain = [i for i in ours.render(CHAT)[0] if i in ours.names]
    for name in (*list(ours.specials)[:5], *list(ours.specials)[-5:]):
        chat = [{**message, "content": message["content"] + name} for message in CHAT]
        assert [i for i in ours.render(chat)[0] if i in ours.names] == plain, name


def test_what_tiktoken_would_split_otherwise_is_refused(qwen2_file, tmp_path):
    """Merges out of the order of ids, an unknown split, normaliser or model: refused by name."""
    hf = json.loads(qwen2_file.read_text())
    swapped = {**hf["model"], "merges": [*hf["model"]["merges"][1:], hf["model"]["merges"][0]]}
    for change, word in (
        ({"model": swapped}, "order"),
        ({"normalizer": {"type": "NFKC"}}, "NFKC"),
        ({"model": {**hf["model"], "type": "Unigram"}}, "Unigram"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**hf, **change}))
        with pytest.raises(files.UsageError, match=word):
            load_tokenizer(tmp_path)


def test_long_runs_do_not_stall(ours):
    """400,000 spaces, letters or digits are encoded (in seconds) and come back; half a character is
    refused."""
    for text in (" " * 400_000, "a" * 400_000, "1" * 400_000, " \n" * 200_000):
        assert ours.decode(ours.encode(text)) == text
    with pytest.raises(files.UsageError, match="surrogate"):
        ours.encode("a\ud800b")


def test_mistral_v3_markers_are_special(tmp_path):
    """A SentencePiece model with [INST] among its control pieces is v0.3: the markers are ids, and never come
    from text."""
    sentencepiece.SentencePieceTrainer.train(
        input=str(ROOT / "data" / "stage" / "ward_c.json"),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        control_symbols=["[INST]", "[/INST]"],
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    v3 = load_tokenizer(tmp_path / "tokenizer.model")
    assert v3.chat_format == "mistral-v3"
    ids, mask = v3.render(CHAT)
    begin, end = v3.specials["[INST]"], v3.specials["[/INST]"]
    assert [i for i in ids if i in v3.names] == [
        v3.bos_id,
        begin,
        end,
        v3.stop_ids[0],
        begin,
        end,
        v3.stop_ids[0],
    ]
    assert v3.decode(ids[2 : ids.index(end)]) == f"{CHAT[0]['content']}\n\n{CHAT[1]['content']}"
    assert not {begin, end} & set(v3.encode("[INST] x [/INST]"))
    (tmp_path / "export").mkdir()
    save_tokenizer(v3, tmp_path / "export")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert theirs.apply_chat_template(CHAT, tokenize=True, return_dict=False) == ids


def test_every_format_has_its_golden_chat(shared):
    """The text of a chat in each format, written out by hand."""
    sp, ranks = (load_tokenizer(shared / "tokenizers" / name) for name in ("llama2", "llama3"))
    turns = [
        {"role": role, "content": content}
        for role, content in (("system", "S"), ("user", "U"), ("assistant", "A"))
    ]
    assert ranks.decode(ranks.render(turns)[0]) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
    )
    pieces = [sp.pieces.id_to_piece(i) for i in sp.render(turns)[0]]
    assert pieces == ["<s>", "▁S", "▁US", "ER", ":", "▁U", "▁A", "SS", "IST", "ANT", ":", "▁A", "</s>"]
    mistral = load_tokenizer(shared / "tokenizers" / "llama2", "mistral")
    pieces = [mistral.pieces.id_to_piece(i) for i in mistral.render(turns)[0]]
    assert "".join(pieces) == "<s>▁[INST]▁S<0x0A><0x0A>U▁[/INST]▁A</s>"
    assert set(CHAT_FORMATS) == {"llama3", "chatml", "stage", "mistral", "mistral-v3", "vicuna"}


# ---- directories -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_is_read(family, tmp_path):
    """A directory that transformers 5 wrote of each family gives the same model back."""
    model = random_model(random_config(11, family))
    checkpoint.save_model(model, tmp_path / "ours")
    peer_of(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    loaded = checkpoint.load_model(tmp_path / "theirs")
    assert loaded.config == model.config
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_works_on_a_directory_of_each_family(family, script, tmp_path, shared, qwen2_file):
    """`generate.py --model DIR --prompt` on a saved checkpoint with the family's own kind of tokenizer,
    sharded, the vocabulary padded; and AutoTokenizer opens the directory with the same ids and the same
    chats."""
    file = {"llama": shared / "tokenizers" / "llama3", "qwen2": qwen2_file}.get(
        family, shared / "tokenizers" / "llama2"
    )
    tokenizer = load_tokenizer(file, "mistral" if family in ("mistral", "mixtral") else None)
    config = random_config(3, family, vocab_size=tokenizer.vocab_size + 64)
    directory = tmp_path / "model"
    checkpoint.save_model(random_model(config), directory, tokenizer, max_shard_bytes=2_000_000)
    code, out, _ = script("generate", "--model", directory, "--prompt", "The ferry", "--max-tokens", 8)
    assert code == 0
    assert out.startswith("The ferry")
    assert load_tokenizer(directory).render(CHAT) == tokenizer.render(CHAT)
    theirs = AutoTokenizer.from_pretrained(directory)
    text = "The ferry's  12 men\n\n(left) ..."
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert theirs.apply_chat_template(CHAT, tokenize=True, return_dict=False) == tokenizer.render(CHAT)[0]
    stops = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    assert stops == tokenizer.stop_ids


def test_a_tensor_in_two_shards_is_named(tmp_path):
    """Which of the two would be right cannot be known."""
    model = random_model(random_config(2))
    checkpoint.save_model(model, tmp_path / "model", max_shard_bytes=1)
    directory = tmp_path / "model"
    index = json.loads((directory / weights.INDEX).read_text())
    (name, file), (_, other) = list(index["weight_map"].items())[:2]
    (directory / other).write_bytes((directory / file).read_bytes())
    (directory / files.MANIFEST).unlink()
    with pytest.raises(files.UsageError, match=name):
        checkpoint.load_model(directory)


def test_pickled_weights_are_not_read(script, tmp_path, tiny_actor):
    """A directory with .bin files says why they are not read; a Hub id without the optional package, what to
    run."""
    directory = tmp_path / "pickled"
    directory.mkdir()
    for name in ("config.json", "tokenizer.model"):
        (directory / name).write_bytes((tiny_actor / name).read_bytes())
    (directory / "pytorch_model.bin").write_bytes(b"")
    assert "pickles" in usage_error(script("generate", "--model", directory, "--prompt", "x"))


@pytest.mark.slow
def test_loading_holds_the_weights_and_one_shard(tmp_path):
    """Peak memory of loading a 1.6 GB checkpoint in eight shards: at most the weights, one shard, and the
    interpreter."""
    config = random_config(
        0, hidden_size=1024, num_attention_heads=8, num_key_value_heads=8, head_dim=128, vocab_size=1000
    )
    config = ModelConfig(**{**vars(config), "intermediate_size": 12_000, "num_hidden_layers": 10})
    model = checkpoint.build_model(config, "cpu", torch.float32)
    checkpoint.save_model(model, tmp_path / "model", max_shard_bytes=200_000_000)
    weights = sum(p.nbytes for p in model.parameters())
    shard = max(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    code = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    peak = {}
    for what, load in (
        ("empty", ""),
        ("loaded", f"import checkpoint; m = checkpoint.load_model({str(tmp_path / 'model')!r}); "),
    ):
        command = [sys.executable, "-c", f"import torch, checkpoint; {load}{code}"]
        peak[what] = 1024 * int(
            subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        )
    assert peak["loaded"] - peak["empty"] <= weights + shard * 1.05


def test_a_stray_system_text_is_no_assistants(shared):
    """Where a family has no system role, a system text that no first user turn follows is refused, not
    trained on."""
    mistral = load_tokenizer(shared / "tokenizers" / "llama2", "mistral")
    system, user, assistant = (
        {"role": role, "content": role[0] * 3} for role in ("system", "user", "assistant")
    )
    for chat in ([system, assistant, user], [user, assistant, system, user], [system]):
        with pytest.raises(ValueError, match="system text"):
            mistral.render(chat)


def test_a_completion_goes_on_from_its_prompt(shared, tiny_actor, monkeypatch):
    """SentencePiece drops a text's first space: between a prompt and what follows it is kept, at a chat's
    start it is not."""
    sp = load_tokenizer(shared / "tokenizers" / "llama2")
    prompt, rest = [sp.bos_id, *sp.encode("The ferry")], sp.encode("went over")

    class Parrot(torch.nn.Module):
        config = random_config(0, vocab_size=sp.vocab_size)

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens, positions, cache, rows):
            logits = torch.zeros(len(rows), sp.vocab_size)
            logits[0, [*rest, *sp.stop_ids][int(positions.flatten()[rows[0]]) + 1 - len(prompt)]] = 1
            return logits

    monkeypatch.setattr(engine.engine, "packed", lambda model: model)
    greedy = SamplingParams(temperature=0)
    assert "".join(Engine(Parrot(), sp).stream(prompt, greedy, goes_on=True)) == " went over"
    assert "".join(Engine(Parrot(), sp).stream(prompt, greedy)) == "went over"
    actor = open_model(tiny_actor)
    actor.engine, actor.tokenizer, actor.encode, actor.markers = Engine(Parrot(), sp), sp, sp.encode, ()
    for opening, text in (("The ferry", " went over"), ("", "went over")):  # of a chat's reply
        actor.prompt = lambda messages, opening: (prompt, 0)
        assert actor.chat([[]], greedy, [opening])[0].text == text


@pytest.mark.parametrize("what", ["other head", "integers"])
def test_tensors_that_would_be_misread_are_refused(what, tmp_path):
    """A tied model with another output projection in its file, and quantised weights without a word in
    config.json."""
    checkpoint.save_model(random_model(random_config(0, tie_word_embeddings=True)), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    (tmp_path / "model" / files.MANIFEST).unlink()
    tensors = load_file(file)
    if what == "other head":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    else:
        tensors = {name: tensor.to(torch.int8) for name, tensor in tensors.items()}
    save_file(tensors, file)
    with pytest.raises(files.UsageError, match="tied" if what == "other head" else "I8"):
        checkpoint.load_model(tmp_path / "model")
