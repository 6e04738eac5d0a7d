"""Text to ids and back, what is under loss, golden ids, and files that are no tokenizers."""

import base64
import itertools
import json

import pytest
import regex
from conftest import usage_error
from hypothesis import given, settings
from hypothesis import strategies as st

from common.files import UsageError
from data.chats import scene_to_chats
from data.scenes import STAGE, load_book, load_scenes
from text.training import train_stage_tokenizer
from tokenizer import LONGEST_RUN, STAGE_TOKENIZER, load_tokenizer

NAMED = (
    "begin_of_text",
    "end_of_text",
    "finetune_right_pad_id",
    "start_header_id",
    "end_header_id",
    "eom_id",
    "eot_id",
)
MARKERS = [f"<|{name}|>" for name in (*NAMED, "python_tag", "system", "user", "assistant", "end")]
MARKERS += [f"<|reserved_special_token_{i}|>" for i in range(256)]
MARKERS += ["<s>", "</s>", "<unk>", "<pad>", "<0x0A>", "<0xE2>"]
TEXT = st.text(max_size=40) | st.lists(
    st.sampled_from([*MARKERS, " ", "\n", "a", "é", "\U0001f3ad"]), max_size=6
).map("".join)


@pytest.fixture(scope="module")
def llama(shared):
    return load_tokenizer(shared / "tokenizers" / "llama3")


@pytest.fixture(scope="module", params=["stage", "llama3"])
def tok(request):
    """Each of the two tokenizers in turn."""
    return request.getfixturevalue({"stage": "stage_tokenizer", "llama3": "llama"}[request.param])


def strings(value):
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from strings(child)


# ---- text --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(TEXT)
def test_any_text_comes_back(tok, text):
    """decode(encode(text)) is the text, and no id in between is special or out of range."""
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert all(0 <= i < tok.vocab_size for i in ids) and not set(ids) & set(tok.specials.values())


@pytest.mark.parametrize(
    "text",
    ["▁", "a▁b ▁▁c", "\0", "\r\n\t\v", "  two  ", "\ufeffx", "e\u0301 ﬁ ½", "\U0001f469\u200d\U0001f680"],
)
def test_odd_text_comes_back(tok, text):
    """Spaces of all kinds, what normalisation would change, and the sign SentencePiece itself writes for a
    space."""
    assert tok.decode(tok.encode(text)) == text


def test_all_text_of_the_stage_comes_back(tok):
    """Every string of every bundled story, in both tokenizers."""
    texts = {text for file in STAGE.glob("*.json") for text in strings(json.loads(file.read_text("utf-8")))}
    assert len(texts) > 1000 and all(tok.decode(tok.encode(text)) == text for text in texts)


def test_no_marker_in_a_text_becomes_special(tok):
    """Every marker of both tokenizers, alone and inside words: no special id, and the text comes back, in a
    chat as well."""
    assert set(tok.specials) <= set(MARKERS) and len(set(tok.specials.values())) == len(tok.specials)
    special = set(tok.specials.values())
    for marker in MARKERS:
        for text in (
            marker,
            f"a{marker}b",
            f"\n{marker} {marker}\n",
            marker[1:] + marker[:1],
            f"[{marker}](x)",
        ):
            ids = tok.encode(text)
            assert not special & set(ids) and tok.decode(ids) == text, text
    plain, odd = (
        [{"role": role, "content": text}] for role, text in (("user", "hi"), ("user", "".join(MARKERS)))
    )
    count = [sum(i in special for i in tok.render(messages)[0]) for messages in (plain, odd)]
    assert count[0] == count[1]


def test_specials_are_told_by_name(tok):
    """Ids of specials decode to their names, wherever they stand among text."""
    for marker, i in tok.specials.items():
        assert tok.decode([i]) == marker
        assert tok.decode([*tok.encode(" é "), i, *tok.encode(" b")]) == f" é {marker} b"


def test_torn_characters_do_not_raise(tok):
    """Half of a character decodes to U+FFFD, as happens in the middle of a stream."""
    ids = tok.encode("\U0001f9cc")
    assert len(ids) > 1 and "\ufffd" in tok.decode(ids[:-1])


# ---- conversations -----------------------------------------------------------------------------------------


def chats(stage, shared, tok):
    """Chats for a tokenizer: the stage's, or those of a play."""
    if tok.vocab_size < 10_000:
        return [
            chat
            for scene in list(stage.values())[::4]
            for chat in scene_to_chats(scene, next_speaker_share=1)
        ]
    scenes = load_book(shared / "coser" / "books" / "Othello.json")
    return [chat for scene in scenes for chat in scene_to_chats(scene, next_speaker_share=1)]


def test_the_loss_is_on_assistants_text_and_end_marks(stage, shared, tok):
    """Masked ids, run by run, decode to each assistant's content and the end of its turn, and nothing else is
    masked."""
    end = tok.decode([tok.stop_ids[0]])
    assert end in ("<|eot_id|>", "<|end|>")
    for chat in chats(stage, shared, tok):
        ids, mask = tok.render(chat.messages)
        runs = [
            tok.decode([i for i, _ in run])
            for own, run in itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
            if own
        ]
        assert runs == [m["content"] + end for m in chat.messages if m["role"] == "assistant"]


def test_the_whole_text_of_a_chat_is_rendered(stage, shared, tok):
    """A rendered chat decodes to the markers of its format around each content, unchanged."""
    form = {"<|end|>": "<|{role}|>{content}<|end|>"}.get(
        tok.decode([tok.stop_ids[0]]), "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
    )
    for chat in chats(stage, shared, tok)[:20]:
        body = "".join(form.format(**message) for message in chat.messages)
        assert tok.decode(tok.render(chat.messages)[0]) == tok.decode([tok.bos_id]) + body


def test_a_generation_prompt_is_a_prefix_of_the_whole(stage, shared, tok):
    """What a model is given before a turn is how the rendering with that turn begins: training and play
    cannot differ."""
    for chat in chats(stage, shared, tok)[:20]:
        whole, _ = tok.render(chat.messages)
        for i, message in enumerate(chat.messages):
            if message["role"] == "assistant":
                prompt, mask = tok.render(chat.messages[:i], add_generation_prompt=True)
                assert whole[: len(prompt)] == prompt and not any(
                    mask[len(tok.render(chat.messages[:i])[0]) :]
                )
                own = [*tok.encode(message["content"]), tok.stop_ids[0]]
                assert whole[len(prompt) : len(prompt) + len(own)] == own


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT), max_size=5))
def test_any_conversation_is_rendered(tok, turns):
    """Whatever is said, each turn ends once, begins once, and is under loss exactly if it is the
    assistant's."""
    ids, mask = tok.render([{"role": role, "content": text} for role, text in turns])
    assert len(ids) == len(mask) and ids.count(tok.stop_ids[0]) == len(turns) and ids.count(tok.bos_id) == 1
    assert sum(mask) == sum(len(tok.encode(text)) + 1 for role, text in turns if role == "assistant")


def test_an_unknown_role_is_refused(tok):
    """A role that no model has learnt is an error, and so never a marker."""
    with pytest.raises(ValueError, match="ipython"):
        tok.render([{"role": "ipython", "content": "x"}])


# ---- LLaMA 3 -----------------------------------------------------------------------------------------------


def test_llama3_golden_ids(llama):
    """Ids as llama-models records them, of a sentence and of a conversation."""
    assert llama.encode("This is a test sentence.") == [2028, 374, 264, 1296, 11914, 13]
    assert (llama.vocab_size, llama.bos_id, sorted(llama.stop_ids)) == (
        128_256,
        128_000,
        [128_001, 128_008, 128_009],
    )
    sentence, one = {"content": "This is a test sentence."}, [2028, 374, 264, 1296, 11914, 13]
    roles = [("system", 9125), ("user", 882), ("assistant", 78191)]
    ids, mask = llama.render([{"role": role, **sentence} for role, _ in roles], add_generation_prompt=True)
    head = {role: [128_006, i, 128_007, 271] for role, i in roles}
    turns = [[*head[role], *one, 128_009] for role, _ in roles]
    assert ids == [128_000, *turns[0], *turns[1], *turns[2], *head["assistant"]]
    assert mask == [False] * (1 + 11 + 11 + 4) + [True] * 7 + [False] * 4


def test_llama3_specials_have_their_ids(llama):
    """The named specials, and as many reserved ones as fill 128,000 to 128,255."""
    ids = (128_000, 128_001, 128_004, 128_006, 128_007, 128_008, 128_009)
    assert {f"<|{name}|>": i for name, i in zip(NAMED, ids, strict=True)}.items() <= llama.specials.items()
    assert llama.specials["<|python_tag|>"] == 128_010
    assert sorted(llama.specials.values()) == list(range(128_000, 128_256))


def test_llama3_equals_plain_byte_pair_merging(llama, shared):
    """The same ids as merging the lowest-ranked pair of each word again and again, on a play and on odd
    text."""
    lines = (shared / "tokenizers" / "llama3" / "tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    words = regex.compile(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
    )

    def merge(word):
        parts = [bytes([byte]) for byte in word]
        while len(parts) > 1 and word not in ranks:
            pairs = [
                (ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks
            ]
            if not pairs:
                break
            i = min(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [ranks[part] for part in (parts if word not in ranks else [word])]

    odd = "I'LL  pay\t1234567 marks,\r\n\n  you'd   say? — “日本語” naïveté \U0001f3ad\U0001f3ad !!!\n "
    scenes = load_book(shared / "coser" / "books" / "King Lear.json")
    for text in (odd, *(turn["message"] for scene in scenes for turn in scene.dialogues)):
        assert llama.encode(text) == [i for word in words.findall(text) for i in merge(word.encode())], text


# ---- the stage's own ---------------------------------------------------------------------------------------


def test_the_stage_tokenizer_is_what_the_stage_makes(stage, stage_tokenizer):
    """The file that is shipped is, byte for byte, what its scenes make today; the held-out ones have no part
    in it."""
    scenes = [scene for scene in load_scenes(STAGE) if scene.tag == "train"]
    assert 0 < len(scenes) < len(stage)
    assert train_stage_tokenizer(scenes, stage_tokenizer.vocab_size) == STAGE_TOKENIZER.read_bytes()


def test_the_tokenizer_is_made_on_the_command_line(script, tmp_path):
    """`tokenizer.py train --out FILE` writes the shipped file again."""
    code, out, err = script("tokenizer", "train", "--out", tmp_path / "tokenizer.model")
    assert (code, out) == (0, "") and "4096 pieces" in err
    assert (tmp_path / "tokenizer.model").read_bytes() == STAGE_TOKENIZER.read_bytes()


@pytest.mark.parametrize("size", [-1, 0, 10, 1_000_000])
def test_a_vocabulary_size_that_cannot_be_is_a_usage_error(script, tmp_path, size):
    """Too small for the characters, or larger than the text can fill: one line, exit code 2."""
    usage_error(script("tokenizer", "train", "--vocab-size", size, "--out", tmp_path / "tokenizer.model"))


@pytest.mark.parametrize("out", ["missing/tokenizer.model", "."])
def test_an_output_that_cannot_be_written_is_a_usage_error(script, tmp_path, out):
    """A directory that is not there, or a directory in the file's place."""
    usage_error(script("tokenizer", "train", "--out", tmp_path / out))


def test_a_tokenizer_of_no_scene_is_a_usage_error(script, tmp_path):
    """A test file holds no training scene: there is nothing to learn from."""
    file = tmp_path / "held_out.json"
    file.write_text(json.dumps([{"dialogues": [{"character": "A", "message": "hi"}]}]))
    usage_error(script("tokenizer", "train", "--data", file, "--out", tmp_path / "tokenizer.model"))


# ---- damaged files -----------------------------------------------------------------------------------------


def refuse(path, data):
    """Asserts that a tokenizer file of these bytes is a usage error that names it."""
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"tokenizer\.model"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"once upon\na time\n", b"{}", b"a 1\n", b"IQ== 0\n", bytes(range(256))]
)
def test_a_file_that_is_no_tokenizer_is_a_usage_error(tmp_path, content):
    """Empty, text, JSON, a few ranks, any bytes."""
    refuse(tmp_path / "tokenizer.model", content)


def test_where_there_is_no_tokenizer_is_a_usage_error(tmp_path):
    """A missing path, an empty directory, a directory in the file's place."""
    (tmp_path / "taken" / "tokenizer.model").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "missing", tmp_path / "empty", tmp_path / "taken"):
        with pytest.raises(UsageError, match=r"no tokenizer\.model"):
            load_tokenizer(path)


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.999])
def test_a_cut_file_is_a_usage_error(shared, tmp_path, share):
    """Both kinds of file, cut anywhere."""
    for file in (STAGE_TOKENIZER, shared / "tokenizers" / "llama3" / "tokenizer.model"):
        data = file.read_bytes()
        refuse(tmp_path / "tokenizer.model", data[: max(1, int(len(data) * share))])


def test_a_marker_that_is_missing_is_a_usage_error(tmp_path):
    """A stage tokenizer one of whose markers has another name cannot render."""
    refuse(tmp_path / "tokenizer.model", STAGE_TOKENIZER.read_bytes().replace(b"<|user|>", b"<|abcd|>"))


def test_a_marker_that_is_no_text_is_a_usage_error(tmp_path):
    """A damaged byte within a marker's name."""
    refuse(tmp_path / "tokenizer.model", STAGE_TOKENIZER.read_bytes().replace(b"<|user|>", b"<|\xffser|>"))


@pytest.mark.parametrize(
    ("line", "damaged"),
    [
        (7, b"KA=="),  # no rank
        (7, b"KA== seven"),  # a rank that is no number
        (7, b"KA== 8"),  # a rank twice
        (7, b"IQ== 7"),  # a token twice
        (7, b"KA== -7"),  # a rank below 0
        (7, b"K 7"),  # base64 cut short
        (
            9906,
            b"SGVs\xff\xff\xff\xffbG8= 9906",
        ),  # not base64, though what is left without those bytes would be
        (0, b"**** 0"),  # not base64 at all: an empty token
        (0, b"enp6enp6enp6enp6enp6 0"),  # `!` is gone, so a text that holds one could not be encoded
    ],
)
def test_a_damaged_line_of_ranks_is_a_usage_error(shared, tmp_path, line, damaged):
    """One line of 128,000 is wrong: the file is refused, not read as another tokenizer."""
    lines = (shared / "tokenizers" / "llama3" / "tokenizer.model").read_bytes().splitlines()
    assert lines[line].split()[1] == b"%d" % line
    refuse(tmp_path / "tokenizer.model", b"\n".join([*lines[:line], damaged, *lines[line + 1 :]]))


def test_a_damaged_tokenizer_stops_a_script_with_one_line(script, tmp_path):
    """As `train.py --tokenizer` meets it."""
    (tmp_path / "tokenizer.model").write_bytes(STAGE_TOKENIZER.read_bytes()[:1000])
    error = usage_error(script("train", "--dry-run", "--tokenizer", tmp_path, "--out", tmp_path / "out"))
    assert str(tmp_path) in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("sign", [" ", "\n", "a", "!", "é"])
def test_endless_runs_are_encoded(shared, sign):
    """A million of one sign neither overflows a stack nor takes minutes, and comes back; runs up to the limit
    are not cut."""
    llama = load_tokenizer(shared / "tokenizers" / "llama3")
    text = f"x {sign * 1_000_000} y"
    assert llama.decode(llama.encode(text)) == text
    for number in (1, 7, LONGEST_RUN - 1):
        text = f"x{sign * number}" + " y" * 20_000
        assert llama.encode(text) == llama.bpe.encode_ordinary(text)
