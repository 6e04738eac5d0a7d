"""The script generate.py."""

import io
import re
import subprocess
import sys

import pytest
from conftest import ROOT, random_config, random_model, usage_error
from engines import alone, greedy

import checkpoint
from common.terminal import plain
from data import prompts
from data.chats import perspective, system_prompt
from generate import Engine, SamplingParams, find_character
from llm.local import load_engine


def expected_reply(engine, messages, max_tokens, opening=""):
    ids, _ = engine.tokenizer.render(messages, add_generation_prompt=True)
    return engine.generate([ids + engine.tokenizer.encode(opening)], greedy(max_tokens))[0]


def test_prompt(script, tiny_actor, stage_tokenizer):
    """--prompt prints the prompt and what follows it, and repeats itself with a seed."""
    prompt = "The ferry [at last] left now\n\nand (then)"
    options = ["--model", tiny_actor, "--max-tokens", 30, "--dtype", "float32"]
    code, out, err = script("generate", "--prompt", prompt, "--temperature", 0, *options)
    ids = [stage_tokenizer.bos_id, *stage_tokenizer.encode(prompt)]
    text = alone(checkpoint.load_model(tiny_actor), ids, greedy(30), tokenizer=stage_tokenizer).text
    assert (code, err) == (0, "") and out == prompt + plain(text) + "\n"
    seeded = [script("generate", "--prompt", "x", "--seed", seed, *options) for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]


@pytest.mark.parametrize(
    ("prompt", "printed"),
    [
        ("[bold]now[/] [link=x]", "[bold]now[/] [link=x]"),
        ("I :heart: it: (c) ->", "I :heart: it: (c) ->"),
        ("a\tb", "a\tb"),
        (" one " * 40, " one " * 40),
        ("red \x1b[31m, \x07\rback, \u202eturned", "red \ufffd[31m, \ufffd\ufffdback, \ufffdturned"),
        ("10\u00a0km \u300c\u3000\u65e5\u300d \u0645\u06cc\u200c \U0001f469\u200d\U0001f467",) * 2,
    ],
    ids=["markup", "emoji", "tab", "long", "controls", "spaces and joiners"],
)
def test_text_is_printed_as_it_is(prompt, printed, script, tiny_actor):
    """Nothing in a text is taken for markup, nothing is wrapped or spelt anew, and only control characters
    are replaced."""
    _, out, _ = script("generate", "--model", tiny_actor, "--prompt", prompt, "--max-tokens", 1)
    assert out.startswith(printed)


def test_prompt_from_stdin(script, tiny_actor, monkeypatch):
    """`--prompt -` reads the text from stdin."""
    options = ["--model", tiny_actor, "--max-tokens", 5, "--temperature", 0]
    given = script("generate", "--prompt", "Two\nlines", *options)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Two\nlines"))
    assert script("generate", "--prompt", "-", *options) == given


def test_stop_option(script, tiny_actor):
    """--stop ends the text; an empty string among them is not one."""
    options = ["--model", tiny_actor, "--max-tokens", 30, "--temperature", 0, "--prompt", "Go"]
    _, whole, _ = script("generate", *options)
    stop = whole[12:14]
    cut = whole[: whole.find(stop, 2)] + "\n"
    assert script("generate", *options, "--stop", "", stop)[1] == cut
    assert script("generate", *options, "--stop", stop, "--stop", "never said")[1] == cut


def test_chat_through_a_pipe(tiny_actor):
    """A line in, a reply out, each knowing what was said before; an empty line ends it. As a process of its
    own."""
    command = [
        sys.executable,
        "generate.py",
        "--model",
        tiny_actor,
        "--chat",
        "--temperature",
        "0",
        "--max-tokens",
        "12",
    ]
    command += ["--dtype", "float32"]
    done = subprocess.run(
        command, input="Good day\n Who are you? \n\nnot read\n", capture_output=True, text=True, cwd=ROOT
    )
    engine, messages, expected = load_engine(tiny_actor, "float32"), [], ""
    for line in ("Good day", "Who are you?"):
        messages.append({"role": "user", "content": line})
        ids = expected_reply(engine, messages, 12).ids
        messages.append({"role": "assistant", "content": "", "ids": ids})
        expected += plain(engine.tokenizer.decode(ids)) + "\n"
    assert (done.returncode, done.stderr, done.stdout) == (0, "", expected)


def test_commands_of_a_chat(script, tiny_actor, monkeypatch):
    """/system and /retry change what the next answer is made from, /help and mistakes answer on stderr,
    --stats counts."""
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("/retry\n/help\n/fly\n/system Be brief.\nGood day\n/retry\nAnd?\n")
    )
    options = ["--model", tiny_actor, "--max-tokens", 12, "--dtype", "float32", "--seed", 3, "--stats"]
    code, out, err = script("generate", "--chat", *options)
    engine, expected = load_engine(tiny_actor, "float32"), []
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Good day"}]

    def reply(seed):
        params = SamplingParams(0.8, max_tokens=12, seed=seed)
        return engine.generate([engine.tokenizer.render(messages, add_generation_prompt=True)[0]], params)[0]

    expected += [reply(3), reply(4)]
    messages += [
        {"role": "assistant", "content": "", "ids": expected[-1].ids},
        {"role": "user", "content": "And?"},
    ]
    expected.append(reply(4))
    assert code == 0 and out == "".join(plain(done.text) + "\n" for done in expected)
    known = expected[1].prompt_tokens + len(expected[1].ids) - (expected[1].finish_reason == "length")
    assert (
        f"; {known} of {expected[2].prompt_tokens} prompt tokens cached" in err
    )  # its own answer is not read again
    assert "/retry  " in err and "/fly" in err and "nothing has been said" in err and "Be brief." in err
    assert len(re.findall(r"tokens/s in float32.*cached", err)) == 3


def test_ctrl_c_ends_an_answer_and_not_the_chat(script, tiny_actor, monkeypatch):
    """What was said by then stays in the history, and the next line is answered."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Good day\nAnd?\n"))
    step, calls = Engine.step, iter(range(100))

    def interrupted(self):
        if next(calls) == 7:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    options = ["--model", tiny_actor, "--max-tokens", 12, "--temperature", 0, "--dtype", "float32"]
    code, out, _ = script("generate", "--chat", *options)
    monkeypatch.undo()
    engine = load_engine(tiny_actor, "float32")
    messages = [{"role": "user", "content": "Good day"}]
    first = expected_reply(engine, messages, 7).text
    messages += [
        {"role": "assistant", "content": first.rstrip("\ufffd")},
        {"role": "user", "content": "And?"},
    ]
    assert (
        code == 0
        and out == plain(messages[1]["content"] + "\n" + expected_reply(engine, messages, 12).text) + "\n"
    )


def test_ctrl_c_ends_a_completion_with_130(script, tiny_actor, monkeypatch):
    """Where there is no chat to go on with."""

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "step", interrupted)
    assert script("generate", "--model", tiny_actor, "--prompt", "Good day")[0] == 130


def test_a_line_too_long_for_the_model_does_not_end_the_chat(script, tiny_actor, monkeypatch):
    """It is refused with its size, and what was said before stays."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Good day\n" + "word " * 9000 + "\nAnd?\n"))
    options = ["--model", tiny_actor, "--temperature", 0, "--max-tokens", 5, "--dtype", "float32"]
    code, out, err = script("generate", "--chat", *options)
    assert code == 0 and len(out.splitlines()) == 2 and "the model takes" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("Good day\nAnd?\n"))
    assert script("generate", "--chat", *options)[1] == out


def test_meeting_a_character(script, tiny_actor, monkeypatch):
    """--character plays one of the cast, told what actors are told, hearing the visitor as anyone, beginning
    with the name."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Good day\nA long way?\n"))
    options = ["--model", tiny_actor, "--temperature", 0, "--max-tokens", 12, "--dtype", "float32"]
    code, out, err = script(
        "generate", "--chat", "--character", "hanne", "--scene", "the-last-ferry/3", *options
    )
    scene, name = find_character("Hanne Brod", "the-last-ferry/3")
    assert code == 0 and name in err and scene.scenario[:40] in " ".join(err.split())
    engine, dialogue, expected = load_engine(tiny_actor, "float32"), [], ""
    system = {"role": "system", "content": system_prompt(scene, name, prompts.AT_PLAY, concise=True)}
    spoken = []
    for line in ("Good day", "A long way?"):
        dialogue.append({"character": "Visitor", "message": line})
        turns = perspective(dialogue, name)
        for turn, ids in zip(turns[1::2], spoken, strict=True):
            assert turn["content"].endswith("\n\n")
            turn["ids"] = engine.tokenizer.encode(f"{name}:") + ids + engine.tokenizer.encode("\n\n")
        done = expected_reply(engine, [system, *turns], 12, opening=f"{name}:")
        dialogue.append({"character": name, "message": done.text.strip()})
        spoken.append(done.ids)
        expected += f"{name}:{plain(done.text)}\n"
    assert out == expected


def test_characters_are_found_by_how_they_begin(stage):
    """Each of the cast by the full name in any case, and by the beginning of any word of it, in a scene they
    are in."""
    cast = {name for scene in stage.values() for name in scene.major_characters}
    assert len(cast) > 20
    for name in cast:
        for form in (name, name.upper(), name.lower()):
            scene, found = find_character(form)
            assert found == name and name in scene.major_characters
        for word in name.split():
            _, found = find_character(word[:3])
            assert any(part.lower().startswith(word[:3].lower()) for part in found.split())
    assert find_character("brod", "the-last-ferry/2")[1] == "Jory Brod"
    assert find_character("hanne b")[1] == "Hanne Brod"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ([], "--prompt"),
        (["--prompt", "x", "--chat"], "--prompt"),
        (["--prompt", "x", "--character", "hanne"], "--character"),
        (["--chat", "--scene", "the-last-ferry/1"], "--scene"),
        (["--chat", "--character", "Godot"], "Hanne Brod"),
        (["--chat", "--character", "brod", "--scene", "the-last-ferry/99"], "the-last-ferry/1"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt", "x", "--top-p", "0"], "top_p"),
        (["--prompt", "x", "--max-tokens", "0"], "max_tokens"),
        (["--prompt", "x", "--max-tokens", "many"], "many"),
        (["--prompt", "x", "--seed", "1" + "0" * 30], "seed"),
        (["--prompt", "x", "--dtype", "int4"], "int4"),
        (["--prompt", "word " * 9000], "8191"),
        (["--prompt", "torn \udcff"], "UTF-8"),
        (["--prompts", "x"], "--prompts"),
        (["--prompt", "x", "--model", "no/such/model"], "no/such/model"),
    ],
    ids=lambda value: (
        " ".join(value)[:40].encode("ascii", "replace").decode() if isinstance(value, list) else None
    ),
)
def test_bad_input_is_one_line(options, word, script, tiny_actor):
    """Each mistake is told in one line that names it, with exit code 2 and nothing on stdout but the
    prompt."""
    result = script("generate", "--model", tiny_actor, *options)
    assert word in usage_error(result)
    assert result[1] == "" or result[1].strip() == options[1].strip()


@pytest.mark.parametrize("option", [["--prompt", "-"], ["--chat"]])
def test_stdin_that_is_no_text(option, script, tiny_actor, monkeypatch):
    """Bytes that are not UTF-8 on stdin are a mistake like any other."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    assert "UTF-8" in usage_error(script("generate", "--model", tiny_actor, *option))


def test_a_model_without_its_tokenizer(script, tmp_path):
    """A checkpoint without a tokenizer.model says so."""
    checkpoint.save_model(random_model(random_config(0)), tmp_path / "model")
    assert "tokenizer.model" in usage_error(
        script("generate", "--model", tmp_path / "model", "--prompt", "x")
    )
