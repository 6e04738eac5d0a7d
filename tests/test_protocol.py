"""The two protocols side by side, how answers are read, which tokens stay as they were sampled, and what runs
leave behind."""

# ruff: noqa: F401, F811 (fixtures of another file)
import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, usage_error
from rich.console import Console
from rich.progress import Progress
from test_llm import RAW, SECRET, SPEECH, UNFINISHED, Script, Server, reasoner
from test_simulate import (
    in_turn,
    make_scene,
    play,
    read_lines,
    stage_answer,
    three_scenes,
    who,
    without_seconds,
)

import llm
import simulate
from common import files, terminal
from data import prompts
from data.chats import END_CHAT
from data.scenes import load_scenes, straighten
from engine.engine import Engine
from engine.params import SamplingParams
from evals import next_speaker
from llm import Reply, local
from play import protocol, replies, transcripts
from play.perform import Journal, perform
from play.protocol import PROTOCOLS, Protocol
from play.replies import parse_next_speaker
from play.stage import Stage

RELEASE = PROTOCOLS["release"]
ROLES = ("actor", "environment", "next_speaker")


@pytest.fixture(autouse=True)
def _out(monkeypatch, tmp_path):
    """What goes under out/ unless told otherwise goes to a folder of the test's own."""
    monkeypatch.setattr(files, "OUT", tmp_path / "out")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


# ---- the release, trap by trap -----------------------------------------------------------------------------


def test_the_release_tells_no_motivation():
    """In no prompt of an actor, where the paper's has the actor's own."""
    actor = Script(lambda *_: "Yes.")
    play(make_scene(), actor, actor, in_turn("Ben", "Ada"), **RELEASE)
    assert actor.asked and not any("The wish of" in messages[0]["content"] for messages, _ in actor.asked)


@pytest.mark.parametrize("answer", ["Zed", "<END CHAT>", "Ada"])
def test_the_release_keeps_an_invalid_name_and_sends_its_prompt_again(answer):
    """The next-speaker model reads its own invalid name where the paper's reads who was chosen, and, as a
    user turn, its system prompt; transcript and chance are otherwise alike."""
    for rules in (RELEASE, {}):
        next_speaker = Script(lambda *_: answer)
        _, messages, stats = play(
            make_scene(), Script(lambda *_: "Yes."), None, next_speaker, max_rounds=3, **rules
        )
        decision, (second, _) = messages[1], next_speaker.asked[1]
        chosen = messages[2]["role"]
        assert stats["fallbacks"] == (1 if answer == "Ada" else 2) and chosen != "Ada"
        assert decision["content"] == (answer if rules else chosen)
        assert second[4] == {"role": "assistant", "content": answer if rules else chosen}
        system = second[0]["content"]
        assert second[5]["content"] == (f"{system}\n\n" if rules else "") + f"{chosen}: Yes.\n\n"
        assert decision["answer"] == answer


def test_the_releases_empty_reply_counts():
    """It is a message without words, in no chat, and its speaker is followed by whom the model names; the
    paper passes over."""
    actor = Script(lambda messages, _: "" if who(messages + [{"content": ""}]) == "Ada" else "Yes.")
    for rules in (RELEASE, {}):
        rules = {**rules, "motivations": True}
        said, _, stats = play(
            make_scene(), actor, Script(lambda *_: "Wind."), in_turn("Ben"), max_rounds=2, **rules
        )
        assert stats["empty"] == 1 and said[0] == (
            ("Ada", "") if len(rules) > 1 else (said[0][0], said[0][1])
        )
        assert len(said) == (2 if len(rules) > 1 else 1)


def test_the_releases_failed_reply_is_an_empty_message():
    """In the paper's it is the end of the scene, told as a failure."""
    broken, chat = Script(lambda *_: "Yes."), Script.chat
    fails = Reply("", "error", error="too long")
    broken.chat = lambda asked, *more: [
        fails if who(messages) == "Ada" else reply
        for messages, reply in zip(asked, chat(broken, asked, *more), strict=True)
    ]
    rules = {**RELEASE, "motivations": True}
    wind = Script(lambda *_: "Wind.")
    said, _, stats = play(make_scene(), broken, wind, in_turn("Ben", "Ada"), max_rounds=3, **rules)
    assert said == [("Ada", ""), ("Ben", "Yes."), ("Environment", "Wind.")] and stats["empty"] == 1
    failures = []
    models = dict.fromkeys(ROLES, broken)
    perform([make_scene()], models, Protocol(), on_failure=lambda *failure: failures.append(failure[1:]))
    assert failures == [([], "too long")]


@pytest.mark.parametrize("answer", ["**Ben**", "Next speaker: Ben", "Ben.", "ben"])
def test_the_release_reads_bare_names_only(answer):
    """`Ben` and `Ben: ...` are names; anything around them makes it chance."""
    assert (
        play(make_scene(), Script(lambda *_: "Yes."), None, Script(lambda *_: answer), max_rounds=2)[2][
            "fallbacks"
        ]
        == 0
    )
    for text, expected in ((answer, 1), ("Ben", 0), ("Ben: hello", 0)):
        _, messages, stats = play(
            make_scene(),
            Script(lambda *_: "Yes."),
            None,
            Script(lambda *_, t=text: t),
            max_rounds=2,
            **RELEASE,
        )
        assert stats["fallbacks"] == expected and (expected or messages[2]["role"] == "Ben")


def test_the_releases_original_lines_come_from_wrong_mouths(shared):
    """With k = 3 its forced first speaker says lines that are not his: on the 100 scenes at hand 55 to 61 of
    300, by seed (103 of 600 are recorded for both halves of the test set); none in the paper's protocol."""
    scenes = load_scenes(shared / "coser" / "test" / "id.json")

    def wrong(rules, seed):
        count = 0
        for scene in scenes:
            said, _, stats = play(
                scene, Script(lambda *_: "."), continue_from=3, max_rounds=4, seed=seed, **rules
            )
            assert [text for _, text in said[:3]] == [turn["message"] for turn in scene.dialogues[:3]]
            count += sum(
                role != turn["character"]
                for (role, _), turn in zip(said[:3], scene.dialogues[:3], strict=True)
            )
        return count

    assert wrong({}, 0) == 0
    first = [scene.dialogues[0]["character"] != scene.speaking_characters[0] for scene in scenes]
    assert all(sum(first) <= wrong(RELEASE, seed) <= 3 * sum(first) + 10 for seed in range(3))
    assert [wrong(RELEASE, seed) for seed in range(3)] == [61, 55, 58]


def test_the_presets_differ_in_nothing_else():
    """Field by field; what both have in common is the paper's."""
    paper, release = Protocol(**PROTOCOLS["paper"]), Protocol(**RELEASE)
    assert replace(release, **dict.fromkeys(RELEASE, True)) == paper
    assert (
        paper.max_rounds,
        paper.end_from_round,
        paper.max_tokens,
        paper.temperature,
        paper.retry_temperature,
    ) == (
        20,
        5,
        512,
        0,
        1,
    )


# ---- how answers are read ----------------------------------------------------------------------------------

CAST = ["Fitzwilliam Darcy", "Mr Bennet", "Mrs Bennet", "Lizzy", "Environment", "The Old Man"]
ANSWERS = [
    ("Lizzy", "Lizzy"),
    ("  lizzy \n", "Lizzy"),
    ("**Lizzy**", "Lizzy"),
    ('"Lizzy"', "Lizzy"),
    ("\u201cLizzy.\u201d", "Lizzy"),
    ("- Lizzy", "Lizzy"),
    ("# Mrs Bennet", "Mrs Bennet"),
    ("Next: Mr Bennet", "Mr Bennet"),
    ("Next Speaker: **Mr Bennet**", "Mr Bennet"),
    ("**Next speaker:** Mr Bennet", "Mr Bennet"),
    ("The next speaker should be Mrs Bennet, since Mr Bennet has just spoken.", "Mrs Bennet"),
    ("Answer: the environment", "Environment"),
    ('{"next_speaker": "Lizzy", "reason": "Mr Bennet asked her"}', "Lizzy"),
    ('```json\n{"reason": "Mr Bennet asked", "name": "Lizzy"}\n```', "Lizzy"),
    ('{"a": "Lizzy"}', "Lizzy"),
    ('["Lizzy"]', "Lizzy"),
    ("{Lizzy}", "Lizzy"),
    ("Lizzy: I will not.", "Lizzy"),
    ("Lizzy, because Mr Bennet asked her.", "Lizzy"),
    ("Lizzy\n\nShe was asked by Mr Bennet.", "Lizzy"),
    ("Lizzy \u2013 she must answer Mrs Bennet", "Lizzy"),
    ("Mr Bennet has asked a question, and it is for her to answer.\n\nLizzy", "Lizzy"),
    ("Mr Bennet just spoke, so Lizzy", "Lizzy"),
    ("I think Lizzy, who was asked by Mr Bennet", "Lizzy"),
    ("It is Lizzy's turn", "Lizzy"),
    ("Darcy", "Fitzwilliam Darcy"),
    ("Mr. Darcy", "Fitzwilliam Darcy"),
    ("Next: Darcy.", "Fitzwilliam Darcy"),
    ("Mr. Bennet", "Mr Bennet"),
    ("Bennet", None),
    ("old man", "The Old Man"),
    ("Charlotte", None),
    ("random", None),
    ("", None),
    ("Mr", None),
    ("the", None),
    ("Lizzyanne", None),
    ("<END CHAT>", END_CHAT),
    ("END CHAT", END_CHAT),
    ("end_chat", END_CHAT),
    ("**<END CHAT>**", END_CHAT),
    ("The scene is over, since Lizzy has left. <END CHAT>", END_CHAT),
    ('{"next_speaker": "<END CHAT>"}', END_CHAT),
    ("Lizzy, since it is too early for <END CHAT>", "Lizzy"),
    ("{broken json: Lizzy", "Lizzy"),
    ('{"next": {"name": "Lizzy"}}', "Lizzy"),
]


@pytest.mark.parametrize(("answer", "expected"), ANSWERS)
def test_next_speakers_are_read_in_all_the_ways_models_answer(answer, expected):
    """Wrapped, explained, abbreviated, as JSON; what means nobody is nobody."""
    assert parse_next_speaker(answer, CAST) == expected


LIN, BAO, LATIN = "\u6797\u9edb\u7389", "\u8d3e\u5b9d\u7389", "Lizzy"
TARO, HANAKO, THAI = "\u592a\u90ce", "\u82b1\u5b50", "\u0e2a\u0e21\u0e0a\u0e32\u0e22"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (f"\u4e0b\u4e00\u4e2a\u8bf4\u8bdd\u7684\u662f{LIN}\u3002", LIN),  # the next to speak is LIN.
        (f"\u5e94\u8be5\u7531{LIN}\u6765\u8bf4", LIN),  # LIN should speak
        (
            f"\u4e0b\u4e00\u4f4d\uff1a{LIN}\uff08\u56e0\u4e3a{BAO}\u95ee\u4e86\u5979\uff09",
            LIN,
        ),  # next: LIN (since BAO asked her)
        (f"{LIN}\uff0c\u56e0\u4e3a{BAO}\u521a\u8bf4\u8fc7", LIN),  # LIN, since BAO has just spoken
        (f"\u4e0b\u4e00\u4e2a\u662f{LATIN}\u8bf4\u8bdd", LATIN),
        (f"\u6b21\u306e\u8a71\u8005\u306f{TARO}\u3067\u3059\u3002", TARO),  # the next speaker is TARO.
        (f"{HANAKO}\u306e\u756a\u3067\u3059", HANAKO),  # it is HANAKO's turn
        (f"\u0e04\u0e19\u0e15\u0e48\u0e2d\u0e44\u0e1b\u0e04\u0e37\u0e2d{THAI}\u0e04\u0e23\u0e31\u0e1a", THAI),
        ("\u5b9d\u7389", None),  # a part of a name only
        ("Lizzyanne", None),
    ],
)
def test_names_in_scripts_without_spaces_are_found_within_a_sentence(answer, expected):
    """Chinese, Japanese, Thai, and a Latin name between them; with the label and the reason around it."""
    assert parse_next_speaker(answer, [LIN, BAO, LATIN, TARO, HANAKO, THAI]) == expected


def test_what_recorded_models_answered_is_read(shared):
    """Of the decisions GPT-4o's, CoSER-8B's and LLaMA-3.1-8B's runs recorded, all that name one of the cast
    are read so."""
    scenes = {scene.key: scene for scene in load_scenes(shared / "coser" / "test" / "id.json")}
    read = 0
    for file in sorted((shared / "coser" / "gca").glob("*.simulation.json")):
        for case in json.loads(file.read_text()):
            cast = [
                *scenes[f"{straighten(case['book'])}-{case['i_p']}-{case['i_c']}"].speaking_characters,
                "Environment",
            ]
            for answer in (m["content"] for m in case["simulation"] if m["role"] == "NSP"):
                if answer in cast:
                    read += 1
                    assert parse_next_speaker(answer, cast) == answer
                    assert parse_next_speaker(f"**Next speaker:** {answer}.", cast) == answer
    assert read > 3000


def test_any_text_is_read_without_a_mishap():
    """Whatever an answer is made of, a name of the cast, the end or nobody comes out."""
    rng = random.Random(0)
    pieces = [*CAST, "<END CHAT>", "{", "}", '"', ":", "next", "\n", "[", "\\", "\u0130", "\ud7ff", "**", " "]
    for _ in range(2000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(12)))
        assert parse_next_speaker(text, CAST) in {*CAST, END_CHAT, None}


# ---- one of the cast, by its probability -------------------------------------------------------------------


def test_choices_are_the_cast_and_their_probabilities_are_kept():
    """The speaker is no choice, the end is one from the sixth round on; the decision has all
    probabilities."""
    asked = []

    class Chooser(Script):
        def chat(self, conversations, params, openings=None, on_reply=lambda: None):
            (p,) = params
            asked.append(p.choices)
            return [
                Reply(p.choices[0], "stop", probabilities={name: 1 / len(p.choices) for name in p.choices})
            ]

    _, messages, stats = play(
        make_scene(),
        Script(lambda *_: "Yes."),
        None,
        Chooser(None),
        max_rounds=8,
        next_speaker_mode="choices",
    )
    names = [m for m in messages if m["role"] == "NSP"]
    spoken = [m["role"] for m in messages if m["role"] != "NSP"]
    assert stats["fallbacks"] == 0 and len(asked) == 7
    for i, (choices, message) in enumerate(zip(asked, names, strict=True)):
        cast = {"Ada", "Ben", "Cy", "Environment"} - {spoken[i]}
        assert set(choices) == cast | ({END_CHAT} if i >= 5 else set())
        assert message["probabilities"].keys() == set(choices) and message["content"] == choices[0]


def test_choices_of_a_checkpoint_are_its_own_probabilities(
    script,
    three_scenes,
    tiny_actor,
    tmp_path,
    monkeypatch,
):
    """From the command line: what is recorded is what the model gives each name after the recorded chat,
    token by token."""
    monkeypatch.setattr(simulate, "Protocol", lambda **kw: Protocol(max_tokens=16, **kw))
    args = [
        "--scene",
        f"{three_scenes}:0",
        "--actor",
        tiny_actor,
        "--max-rounds",
        3,
        "--next-speaker-mode",
        "choices",
    ]
    assert script("simulate", *args, "--out", tmp_path / "a")[0] == 0
    [line] = read_lines(tmp_path / "a")
    model = llm.open_model(tiny_actor)
    scene, spoken = load_scenes(three_scenes)[0], line["messages"][0]
    dialogue = [{"character": spoken["role"], "message": spoken["content"]}]
    prompt, _ = model.prompt(protocol.next_speakers_chat(scene, dialogue))
    decision = line["messages"][1]
    probabilities = decision["probabilities"]
    ids = [model.tokenizer.encode(name) for name in probabilities]
    scores = torch.tensor(model.engine.score([prompt] * len(ids), ids)).softmax(-1)
    assert torch.allclose(scores, torch.tensor(list(probabilities.values())), atol=1e-4)
    assert decision["content"] == max(probabilities, key=probabilities.get)


def test_choices_need_a_local_model(script, three_scenes, tmp_path, monkeypatch):
    """An endpoint gives no probabilities; nothing is asked."""
    with Server(stage_answer) as server:
        server.use(monkeypatch)
        args = [
            "--scene",
            f"{three_scenes}:0",
            "--actor",
            "openai:m",
            "--next-speaker-mode",
            "choices",
            "--out",
            tmp_path / "a",
        ]
        assert "local" in usage_error(script("simulate", *args))
    assert not server.requests


# ---- next speakers against the books -----------------------------------------------------------------------


def test_an_evaluation_that_nobody_answers_is_an_error(script, three_scenes, monkeypatch):
    """And no score of zero."""
    with Server(lambda *_: (400, {"error": {"message": "no such option"}}, {})) as server:
        server.use(monkeypatch)
        line = usage_error(
            script("simulate", "--next-speaker-eval", three_scenes, "--next-speaker", "openai:m")
        )
    assert "none of" in line and "no such option" in line


def test_next_speaker_evaluation_counts_what_it_says(script, three_scenes, monkeypatch):
    """An endpoint that is right every second time gets that share; the baselines are those of a count by
    hand."""
    scenes = load_scenes(three_scenes)
    lines = {scene.scenario: [turn["character"] for turn in scene.dialogues] for scene in scenes}
    right = []

    def answer(body, _):
        system, *chat = body["messages"]
        names = next(names for scenario, names in lines.items() if scenario in system["content"])
        assert [m["content"] for m in chat if m["role"] == "assistant"] == names[
            : len(chat) // 2
        ]  # teacher-forced
        is_right = len(chat) // 2 % 2 == 0
        right.append(is_right)
        return names[len(chat) // 2] if is_right else "nobody at all"

    with Server(answer) as server:
        server.use(monkeypatch)
        code, out, err = script("simulate", "--next-speaker-eval", three_scenes, "--next-speaker", "openai:m")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    total = last = 0
    uniform = 0.0
    for scene in scenes:
        names = lines[scene.scenario]
        for i in range(1, len(names)):
            if names[i] == names[i - 1]:
                continue
            total += 1
            before = [name for name in names[:i] if name != names[i - 1]]
            last += bool(before) and before[-1] == names[i]
            uniform += 1 / (len({*scene.speaking_characters, "Environment"}) - 1)
    assert (found["total"], found["last_other"], found["correct"]) == (
        total,
        last,
        sum(right),
    ) and total == len(right)
    assert abs(found["uniform"] - uniform) < 1e-9 and found["percent"]["correct"] == round(
        100 * sum(right) / total, 2
    )
    assert f"{found['percent']['last_other']}%" in err


def test_the_last_other_speaker_is_right_as_often_as_published(shared):
    """About 65% on the test set: 746 of the 1,142 next speakers of its half at hand; a model that repeats it
    gets the same."""
    scenes = load_scenes(shared / "coser" / "test" / "id.json")

    def last_other(messages, _):
        spoken = [m["content"] for m in messages if m["role"] == "assistant"]
        return next((name for name in reversed(spoken) if name != spoken[-1]), "nobody")

    counts = next_speaker.evaluate_next_speaker(scenes, Script(last_other), Protocol())
    assert (counts["total"], counts["last_other"], counts["correct"]) == (1142, 746, 746)


# ---- tokens as sampled -------------------------------------------------------------------------------------


def test_ids_of_a_message_stand_as_they_are(stage_tokenizer):
    """In every chat format that has them: the ids replace the encoding of the content, under the same
    mask."""
    messages = [
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": "the ferry", "ids": [300, 301, 302]},
    ]
    plain = [messages[0], {"role": "assistant", "content": "the ferry"}]
    ids, mask = stage_tokenizer.render(messages)
    expected, expected_mask = stage_tokenizer.render(plain)
    n = len(stage_tokenizer.encode("the ferry"))
    assert ids == expected[: -n - 1] + [300, 301, 302] + expected[-1:]
    assert mask == expected_mask[: -n - 1] + [True] * 3 + expected_mask[-1:]


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ("Ada: well said\n\n", "all"),
        ("Ada: well", "some"),
        ("Ada: well sailed\n\n", "some"),
        ("Ada: otherwise\n\n", "none"),
        ("Ada: \n\n", "none"),
    ],
)
def test_as_much_of_a_reply_is_kept_as_sampled_as_the_turn_says(tiny_actor, content, kept):
    """The tokens up to where the turn says something else, then an encoding; the text is that of the turn in
    any case."""
    model = llm.open_model(tiny_actor)
    sampled = [
        i for c in " well said\n\n" for i in model.tokenizer.encode(c)
    ]  # a letter a token: no encoder does that
    ids, n = model.as_sampled(content, "Ada:", tuple(sampled))
    assert model.tokenizer.decode(ids) == content
    opening = model.tokenizer.encode("Ada:")
    assert ids[len(opening) : len(opening) + n] == sampled[:n] or kept == "none"
    assert (n == len(sampled), n > 0) == {"all": (True, True), "some": (False, True), "none": (False, False)}[
        kept
    ]


def test_every_agents_tokens_are_read_once(tiny_actor, stage):
    """On a real engine: what it says it read is what the scenes count, and at most 2% above the least
    possible, which is what rendering each agent's last chat gives."""
    model = llm.open_model(tiny_actor)
    submit, prompts_of, last = model.submit, {}, {}

    def noted(messages, params, opening):
        prompt, own = model.prompt(messages, opening)
        future = submit(messages, params, opening)
        prompts_of[future], last[messages[0]["content"]] = prompt, len(prompt) - own
        return future

    model.submit = noted
    ends = []
    scenes = [stage["the-last-ferry/1"], stage["ward-c/1"], stage["three-keys/3"]]
    protocol = Protocol(max_rounds=10, max_tokens=24, next_speaker_tokens=4, temperature=0.8)
    perform(scenes, dict.fromkeys(ROLES, model), protocol, on_end=lambda *end: ends.append(end[2]))
    assert all(future.result().prompt_tokens == len(prompt) for future, prompt in prompts_of.items())
    assert sum(stats["least"] for stats in ends) == sum(last.values())
    prefilled = sum(stats["prefilled"] for stats in ends)
    assert model.engine.stats["prefilled"] <= prefilled <= 1.02 * sum(last.values())


# ---- runs that are cut off, fail, or meet ------------------------------------------------------------------


def killed(args, at, tear):
    """Runs the command line in a child that is killed with SIGKILL at its at-th write to the disk; tear: half
    of the last line of that write is lost. True where it was killed, False where it came to its end
    before."""
    pid = os.fork()
    if pid == 0:
        count, fsync = 0, os.fsync

        def deadly(descriptor):
            nonlocal count
            count += 1
            if count == at:
                if tear:
                    size = os.fstat(descriptor).st_size
                    os.ftruncate(descriptor, max(0, size - random.Random(at).randrange(1, 40)))
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)

        os.fsync = deadly
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        sys.argv = ["simulate.py", *map(str, args)]
        try:
            simulate.main()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_a_run_killed_anywhere_goes_on_as_if_it_had_not_been(script, three_scenes, tmp_path, monkeypatch):
    """25 kill points over all writes of a run, half of them in the middle of a line: --resume ends with the
    same bytes but for the seconds, and asks again for the calls in flight at most."""
    args = ["--scene", f"{three_scenes}:all", "--actor", "openai:m", "--max-rounds", 4, "--out"]
    with Server(stage_answer) as server:
        server.use(monkeypatch)
        assert script("simulate", *args, tmp_path / "whole")[0] == 0
        whole, calls = (tmp_path / "whole" / "transcripts.jsonl").read_bytes(), len(server.requests)
        writes = (
            2 + 2 * calls + 3 + 1
        )  # settings, transcripts; each answer and reply; scenes; transcripts in order
        points = [*sorted(random.Random(0).sample(range(1, writes), 24)), writes]
        deaths = 0
        for at in points:
            out, before = tmp_path / f"at{at}", len(server.requests)
            deaths += killed([*args, out], at, tear=at % 2)
            shutil.rmtree(out / "answers", ignore_errors=True)  # the journal alone has to do
            code, _, err = script("simulate", *args, out, "--resume")
            assert code == 0, (at, err)
            assert without_seconds(read_lines(out)) == without_seconds(read_lines(tmp_path / "whole"))
            seconds = re.compile(rb'"seconds": [0-9.]+')
            assert seconds.sub(b"", (out / "transcripts.jsonl").read_bytes()) == seconds.sub(b"", whole)
            kept = {file.name for file in out.iterdir() if "tmp" not in file.name}
            assert kept - {"answers"} == {"settings.json", "transcripts.jsonl"}
            assert len(server.requests) - before <= calls + 3  # three scenes, a call in flight each
        assert deaths == 25


def test_errors_that_a_play_goes_on_past_are_in_the_journal(tmp_path):
    """With the release's rules a failed reply is an empty line: a resumed run has it again, and not the
    answer of a healthier server, after which all others would stand in a history that never was. With the
    paper's it ends the scene: asked again."""
    scene, call = make_scene(), SimpleNamespace(occasion="0.0|actor")
    live, failed = SimpleNamespace(scene=scene, call=call), Reply("", "error", error="busy")
    for errors in (True, False):
        Journal(tmp_path / f"{errors}.jsonl").keep([(live, failed)], errors)
        assert Journal(tmp_path / f"{errors}.jsonl").take(scene, call) == ((failed, 1) if errors else None)


def test_a_journal_torn_twice_is_read(tmp_path):
    """What a kill left of a line is gone before the next is written, so a second kill finds a journal that
    can be read."""
    scene, call = make_scene(), SimpleNamespace(occasion="0.0|actor")
    live, path = SimpleNamespace(scene=scene, call=call), tmp_path / "replies.jsonl"
    path.write_text('{"a|0": [1, {"text": "x", "finish_reason": "stop"}]}\n{"b|0": [1, {"te')
    Journal(path).keep([(live, Reply("y", "stop"))])
    journal = Journal(path)
    assert journal.replies.keys() == {"a|0", f"{scene.key}|0.0|actor"} and journal.take(scene, call) == (
        Reply("y", "stop"),
        2,
    )


def test_a_journal_torn_in_its_first_line_is_read(tmp_path):
    """The next reply is not written behind what is left of it."""
    scene, call = make_scene(), SimpleNamespace(occasion="0.0|actor")
    live, path = SimpleNamespace(scene=scene, call=call), tmp_path / "replies.jsonl"
    path.write_text('{"b|0": [1, {"te')
    Journal(path).keep([(live, Reply("y", "stop"))])
    assert Journal(path).take(scene, call) == (Reply("y", "stop"), 1)


def test_a_killed_run_of_a_checkpoint_goes_on_too(script, three_scenes, tiny_actor, tmp_path, monkeypatch):
    """The same with a real engine, whose cache is gone with the run: its counts come out the same as well."""
    monkeypatch.setattr(
        simulate, "Protocol", lambda **kw: Protocol(max_tokens=12, next_speaker_tokens=4, **kw)
    )
    args = [
        "--scene",
        f"{three_scenes}:all",
        "--actor",
        tiny_actor,
        "--max-rounds",
        5,
        "--temperature",
        0.9,
        "--out",
    ]
    assert script("simulate", *args, tmp_path / "whole")[0] == 0
    whole = without_seconds(read_lines(tmp_path / "whole"))
    again = tmp_path / "again"
    assert (
        script("simulate", *args, again)[0] == 0 and without_seconds(read_lines(again)) == whole
    )  # same seed, same bytes
    for at in (4, 7, 10, 12):
        assert killed([*args, tmp_path / f"at{at}"], at, tear=at % 2)
        assert killed([*args, tmp_path / f"at{at}", "--resume"], 5, tear=False)  # and again on the way
        assert script("simulate", *args, tmp_path / f"at{at}", "--resume")[0] == 0
        assert without_seconds(read_lines(tmp_path / f"at{at}")) == whole


def test_a_scene_that_fails_stops_no_other(script, three_scenes, tmp_path, monkeypatch):
    """A prompt that the endpoint refuses: told with the count and the reason, the others finished; --resume
    tries again."""
    scenes = load_scenes(three_scenes)
    refused = [True]

    def answer(body, number):
        if refused and scenes[1].scenario in body["messages"][0]["content"] and len(body["messages"]) > 4:
            return 400, {"error": {"message": "context length exceeded"}}, {}
        return stage_answer(body, number)

    args = ["--scene", f"{three_scenes}:all", "--actor", "openai:m", "--max-rounds", 5, "--out"]
    with Server(answer) as server:
        server.use(monkeypatch)
        line = usage_error(script("simulate", *args, tmp_path / "a"))
        assert (
            "1 scene(s)" in line
            and "context length exceeded" in line
            and "2 of 3" in line
            and "--resume" in line
        )
        assert len(read_lines(tmp_path / "a")) == 2
        [failure] = [
            json.loads(text) for text in (tmp_path / "a" / "failures.jsonl").read_text().splitlines()
        ]
        assert failure["book"] == scenes[1].book and failure["messages"] and "exceeded" in failure["error"]
        refused.clear()
        assert script("simulate", *args, tmp_path / "a", "--resume")[0] == 0
        assert not (tmp_path / "a" / "failures.jsonl").exists()
        assert script("simulate", *args, tmp_path / "b")[0] == 0
    assert without_seconds(read_lines(tmp_path / "a")) == without_seconds(read_lines(tmp_path / "b"))


def test_a_prompt_over_the_context_is_an_error_of_its_own(tiny_actor):
    """Of three conversations the one that is too long comes back with an error; the others are answered as
    ever."""
    model = llm.open_model(tiny_actor)
    long = [{"role": "user", "content": "word " * 9000}]
    short = [{"role": "user", "content": "hello"}]
    one, two, three = model.chat([short, long, short], SamplingParams(0, max_tokens=4))
    assert two.error and not two.text and "8191" in two.error.replace(",", "")
    assert one == model.chat([short], SamplingParams(0, max_tokens=4))[0] or one.text == three.text
    assert one.error is None and one.text


def test_two_runs_never_share_files(script, three_scenes, tmp_path, monkeypatch):
    """Without --out each run gets a directory of its own, named after its settings; one that is in use is
    left alone, and so is one whose scenes or model are others now."""
    with Server(stage_answer) as server:
        server.use(monkeypatch)
        args = ["--scene", f"{three_scenes}:0", "--actor", "openai:m", "--max-rounds", 1]
        for more in ([], [], ["--seed", 1], ["--protocol", "release"]):
            assert script("simulate", *args, *more)[0] == 0
        names = sorted(directory.name for directory in (files.OUT / "plays").iterdir())
        assert len(names) == 4 and len({name.rsplit(".", 1)[0] for name in names}) == 3
        out = files.OUT / "plays" / names[0]
        with transcripts.locked(out):
            assert "another run" in usage_error(script("simulate", *args, "--out", out, "--resume"))
        changed = json.loads(three_scenes.read_text())
        changed[0]["dialogues"][0]["message"] += " And more."
        three_scenes.write_text(json.dumps(changed))
        settings = json.loads((out / "settings.json").read_text())
        more = ["--seed", settings["seed"], "--protocol", settings["protocol"]]
        assert "(scenes)" in usage_error(script("simulate", *args, *more, "--out", out, "--resume"))


def test_another_checkpoint_at_the_same_path_is_another_model(script, tiny_actor, tmp_path, monkeypatch):
    """The settings hold a hash of its files, so --resume does not go on with other weights; the same
    elsewhere are the same."""
    monkeypatch.setattr(
        simulate, "Protocol", lambda **kw: Protocol(max_tokens=4, next_speaker_tokens=2, **kw)
    )
    shutil.copytree(tiny_actor, tmp_path / "model")
    args = ["--scene", "ward-c/1", "--actor", tmp_path / "model", "--max-rounds", 1, "--out", tmp_path / "a"]
    assert script("simulate", *args)[0] == 0
    shutil.copytree(tiny_actor, tmp_path / "moved")
    assert script("simulate", *args, "--actor", tmp_path / "moved", "--resume")[0] == 0
    before = local.fingerprint(tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    plain = local.fingerprint(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert len({before, plain, local.fingerprint(tmp_path / "model")}) == 3
    assert "identity" in usage_error(script("simulate", *args, "--resume"))


# ---- reasoning ---------------------------------------------------------------------------------------------


def test_reasoning_is_in_the_transcript_and_nowhere_else():
    """Of an actor, the Environment and the next-speaker model: beside their messages, in no chat, and its ids
    in none."""

    class Thinker(Script):
        def chat(self, conversations, params, openings=None, on_reply=lambda: None):
            replies = super().chat(conversations, params, openings, on_reply)
            return [replace(r, reasoning=f"plan of {self.role}", ids=[1, 2, 3]) for r in replies]

    names = iter(["Environment", "Ada", "Ben"] * 9)
    models = {role: Thinker(lambda *_: "Well.") for role in ROLES}
    models["next_speaker"].say = lambda *_: next(names)
    for role, model in models.items():
        model.role = role
    _, messages, _ = play(make_scene(), **models, max_rounds=6)
    asked = [message for model in models.values() for chat, _ in model.asked for message in chat]
    assert asked and not any("plan of" in str(message) or "sampled" in message for message in asked)
    roles = {"NSP": "next_speaker", "Environment": "environment"}
    assert {m["role"] for m in messages} == {"NSP", "Environment", "Ada", "Ben"}
    assert all(m["reasoning"] == f"plan of {roles.get(m['role'], 'actor')}" for m in messages)
    assert "plan of" not in transcripts.markdown({"scene": make_scene().to_dict(), "messages": messages})
    _, messages, _ = play(make_scene(), Script(lambda *_: "Well."), max_rounds=3)
    assert all("reasoning" not in m for m in messages)


def test_reasoning_of_an_endpoint_reaches_nobody(script, three_scenes, tmp_path, monkeypatch):
    """A server that sends it beside the content: in transcripts.jsonl, and not on the screen, in the script
    or in a request."""

    def answer(body, number):
        message = {"content": stage_answer(body, number), "reasoning_content": "my secret plan"}
        return 200, {"choices": [{"message": message, "finish_reason": "stop"}]}, {}

    out = tmp_path / "a"
    args = [
        "--scene",
        f"{three_scenes}:0",
        "--actor",
        "openai:m",
        "--max-rounds",
        4,
        "--script",
        "--out",
        out,
    ]
    with Server(answer) as server:
        server.use(monkeypatch)
        code, screen, err = script("simulate", *args)
    assert code == 0 and "secret plan" not in screen + err + (out / "script.md").read_text()
    assert server.requests and not any("secret plan" in str(request.body) for request in server.requests)
    messages = read_lines(out)[0]["messages"]
    assert len(messages) == 7 and all(m["reasoning"] == "my secret plan" for m in messages)


def hidden_in_every_form():
    """{form: text -> a choice of an answer that says it}: all ways in which reasoning comes, besides what is
    cut off before anything is said."""

    def choice(content, finish_reason="stop", **fields):
        return {"message": {"content": content, **fields}, "finish_reason": finish_reason}

    def parts(text):
        thinking = {"type": "thinking", "thinking": [{"type": "text", "text": SECRET}]}
        return [thinking, {"type": "text", "text": text}]

    forms = {form: lambda text, raw=raw: choice(raw.replace(SPEECH, text)) for form, raw in RAW.items()}
    forms |= {
        f"unfinished {form}": lambda _, raw=raw: choice(raw, "length") for form, raw in UNFINISHED.items()
    }
    forms["content of parts"] = lambda text: choice(parts(text))
    forms["no content"] = lambda _: choice(None, "length", reasoning_content=SECRET)
    for name in ("reasoning", "reasoning_content"):
        forms[f"beside, {name}"] = lambda text, name=name: choice(text, **{name: SECRET})
    return forms


def test_no_reasoning_and_no_thought_reaches_another(script, three_scenes, tmp_path, monkeypatch):
    """From simulate.py to judge.py, of all roles, in every form: no request to anybody holds reasoning, and a
    thought is in requests of its own agent alone; neither screen nor script shows reasoning."""
    forms, lock, count, met = hidden_in_every_form(), threading.Lock(), Counter(), set()

    def mark(body):
        return hashlib.sha256(body["messages"][0]["content"].encode()).hexdigest()[:8]

    def answer(body, _):
        system, number = body["messages"][0]["content"], len(body["messages"])
        if "response_format" in body:
            role, said = "judge", json.dumps({"flaws": []})
        elif system.startswith("You watch"):
            role, said = "NSP", ("Environment", "random")[number // 2 % 2]
        else:
            role = "environment" if system.startswith("You are the world") else "actor"
            said = f"[thought {mark(body)}] Word {number}."
        with lock:
            form = list(forms)[count[role] % len(forms)]
            count[role] += 1
            met.add((role, form))
        return 200, {"choices": [forms[form](said)]}, {}

    out, scenes = tmp_path / "a", ["--scene", f"{three_scenes}:all"]
    with Server(answer) as server:
        server.use(monkeypatch)
        code, *screen = script("simulate", *scenes, "--actor", "openai:m", "--script", "--out", out)
        assert code == 0, screen
        played = len(server.requests)
        code, *more = script("judge", out, "--judge", "openai:m", "--repeats", 4)
        assert code == 0, more
    assert met == {(role, form) for role in ("actor", "environment", "NSP", "judge") for form in forms}
    assert not any("secretly plan" in json.dumps(request.body) for request in server.requests)
    for request in server.requests[:played]:
        assert set(re.findall(r"thought (\w{8})", json.dumps(request.body))) <= {mark(request.body)}
    assert "secretly" not in "".join([*screen, *more]) + (out / "script.md").read_text()
    messages = [message for line in read_lines(out) for message in line["messages"]]
    assert not any("secretly" in message["content"] for message in messages)
    assert {
        m["role"] in ("Environment", "NSP") for m in messages if "secretly" in m.get("reasoning", "")
    } == {
        True,
        False,
    }
    assert "secretly" in (out / "verdicts.jsonl").read_text()


def test_reasoning_of_a_checkpoint_is_not_streamed(script, reasoner, tmp_path, monkeypatch):
    """simulate.py with a model that thinks aloud before each turn: not on the screen at any time, in no later
    prompt, and in the transcript apart."""
    prompts, add = [], Engine.add
    monkeypatch.setattr(
        Engine, "add", lambda e, ids, *rest: prompts.append(e.tokenizer.decode(ids)) or add(e, ids, *rest)
    )
    (tmp_path / "scene.json").write_text(json.dumps([make_scene().to_dict()]))
    args = ["--scene", tmp_path / "scene.json", "--actor", reasoner, "--max-rounds", 4]
    code, screen, err = script("simulate", *args, "--out", tmp_path / "a")
    assert code == 0, err
    messages = read_lines(tmp_path / "a")[0]["messages"]
    turns = [message for message in messages if message["role"] != "NSP"]
    assert [(m["content"], m["reasoning"]) for m in turns] == [("Hi", "plan")] * 4
    assert screen.endswith("\n\n" + "".join(f"{m['role']}: Hi\n\n" for m in turns))
    assert len(prompts) == 7 and not any(re.search("plan|think>", prompt) for prompt in prompts)


def test_a_journal_without_reasoning_is_read(tmp_path):
    """Journals of before there was any."""
    path, scene = tmp_path / "replies.jsonl", make_scene()
    path.write_text(
        json.dumps({f"{scene.key}|0.0|actor": [1, {"text": "x", "finish_reason": "stop"}]}) + "\n"
    )
    reply, run = Journal(path).take(scene, SimpleNamespace(occasion="0.0|actor"))
    assert (reply.text, reply.reasoning, run) == ("x", "", 1)


def test_a_scene_that_is_forgotten_is_asked_for_again(tmp_path):
    """And no other, though its name begins alike."""
    one, other = make_scene(), make_scene(i_c=11)
    call, journal = SimpleNamespace(occasion="0.0|actor"), Journal(tmp_path / "replies.jsonl")
    for scene in (one, other, make_scene(i_c=1)):
        journal.keep([(SimpleNamespace(scene=scene, call=call), Reply("y", "stop"))])
    journal.forget(make_scene(i_c=1))
    journal = Journal(tmp_path / "replies.jsonl")
    assert journal.take(one, call) and journal.take(other, call) and not journal.take(make_scene(i_c=1), call)


# ---- settings and places -----------------------------------------------------------------------------------


def test_what_requests_had_to_change_is_recorded(script, three_scenes, tmp_path, monkeypatch):
    """In each transcript, by role, as it is after the run; how a checkpoint's chats are written is among the
    settings."""

    class Model(Script):
        chat_format_reason = "stage"

    def opened(spec, **options):
        model = Model(lambda *_: "Yes.")
        model.adaptations = []
        model.say = lambda *_: model.adaptations.__setitem__(slice(None), [f"{spec}: no seed"]) or "Yes."
        return model

    monkeypatch.setattr(simulate, "open_model", opened)
    args = ["--scene", f"{three_scenes}:0", "--actor", "x", "--next-speaker", "y", "--max-rounds", 2]
    assert script("simulate", *args, "--out", tmp_path / "a")[0] == 0
    [line] = read_lines(tmp_path / "a")
    assert line["adaptations"] == {
        "actor": ["x: no seed"],
        "environment": ["x: no seed"],
        "next_speaker": ["y: no seed"],
    }
    settings = json.loads((tmp_path / "a" / "settings.json").read_text())
    assert settings["actor_chat_format"] == Model.chat_format_reason and settings == line["settings"]


def test_chat_format_and_dtype_are_passed_on(script, three_scenes, tiny_actor, tmp_path, monkeypatch):
    """To the checkpoints: the dtype is part of what the model is; an endpoint has neither, which is one
    line."""
    monkeypatch.setattr(
        simulate, "Protocol", lambda **kw: Protocol(max_tokens=8, next_speaker_tokens=4, **kw)
    )
    args = ["--scene", f"{three_scenes}:0", "--max-rounds", 1, "--out", tmp_path / "a"]
    more = ["--dtype", "bfloat16", "--chat-format", "stage"]
    assert script("simulate", *args, "--actor", tiny_actor, *more)[0] == 0
    settings = read_lines(tmp_path / "a")[0]["settings"]
    assert (
        settings["actor_identity"].endswith("bfloat16")
        and settings["actor_chat_format"] == "stage: as asked for"
    )
    wrong = [*args[:-1], tmp_path / "b", "--actor", tiny_actor, "--chat-format", "chatml"]
    assert "chatml" in usage_error(script("simulate", *wrong))  # its tokenizer has no such markers
    with Server(stage_answer) as server:
        server.use(monkeypatch)
        line = usage_error(script("simulate", *args[:-1], tmp_path / "c", "--actor", "openai:m", *more))
    assert "--chat-format" in line and not server.requests and not (tmp_path / "c").exists()


def test_answers_of_an_endpoint_are_beside_the_run(script, three_scenes, tmp_path, monkeypatch):
    """In the run's own directory, which stderr names, and nowhere under the checkout's out/."""
    args = ["--scene", f"{three_scenes}:0", "--actor", "openai:m", "--max-rounds", 2]
    with Server(stage_answer) as server:
        server.use(monkeypatch)
        code, _, err = script("simulate", *args, "--out", tmp_path / "a")
        assert code == 0 and str(tmp_path / "a" / "answers") in err
        assert len([*(tmp_path / "a" / "answers").rglob("*.json")]) == len(server.requests) > 2
        assert not files.OUT.exists()
        assert script("simulate", *args)[0] == 0
    [directory] = (files.OUT / "plays").iterdir()
    assert (directory / "answers").is_dir() and [*files.OUT.iterdir()] == [files.OUT / "plays"]


def test_an_evaluation_of_next_speakers_goes_where_out_says(script, three_scenes, tmp_path, monkeypatch):
    """Its JSON and the answers, which a second run does not ask for again; what it cannot do is refused."""
    args = ["--next-speaker-eval", three_scenes, "--next-speaker", "openai:m"]
    with Server(lambda *_: "Environment") as server:
        server.use(monkeypatch)
        _, screen, _ = script("simulate", *args, "--out", tmp_path / "e")
        asked = len(server.requests)
        assert (
            script("simulate", *args, "--out", tmp_path / "e")[0] == 0 and len(server.requests) == asked > 10
        )
        assert json.loads((tmp_path / "e" / "next_speaker.json").read_text()) == json.loads(screen)
        assert (tmp_path / "e" / "answers").is_dir() and not files.OUT.exists()
        for more in (["--script"], ["--resume", "--out", tmp_path / "e"]):
            assert more[0] in usage_error(script("simulate", *args, *more))
    assert len(server.requests) == asked


def test_a_closed_pipe_tells_how_to_go_on(three_scenes, tmp_path, monkeypatch):
    """`| head -1`: the play stops without a traceback, and stderr names --resume; the rest can be played."""
    with Server(lambda body, n: stage_answer(body, n) * 2000) as server:
        server.use(monkeypatch)
        args = [sys.executable, ROOT / "simulate.py", "--scene", f"{three_scenes}:0", "--actor", "openai:m"]
        args += ["--max-rounds", "4", "--out", tmp_path / "a"]
        run = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        run.stdout.readline()
        run.stdout.close()
        err = run.stderr.read()
        run.wait(60)
        assert "--resume" in err and str(tmp_path / "a") in err and "Traceback" not in err, err
        again = subprocess.run([*args, "--resume"], stdout=subprocess.DEVNULL, cwd=tmp_path, timeout=60)
    assert again.returncode == 0 and len(read_lines(tmp_path / "a")) == 1


def test_progress_is_a_line_now_and_then_without_a_terminal(monkeypatch, capsys):
    """Every ten seconds at most."""
    clock = iter([0, 5, 11, 12, 22, 23])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(terminal, "progress", lambda *_: contextlib.nullcontext(Progress(disable=True)))
    with terminal.reporting(9, "scenes") as update:
        for done in (1, 2, 3):
            update(done, f"playing {done}")
    assert capsys.readouterr().err.splitlines() == ["playing 2, 2 of 9 scenes"]


# ---- what is shown and written -----------------------------------------------------------------------------


@pytest.mark.parametrize("thoughts", ["show", "hide"])
def test_a_scene_streams_what_is_played(script, tiny_actor, stage, tmp_path, monkeypatch, thoughts):
    """Letter by letter, the screen has each turn as the transcript has it, or without the thoughts."""
    said = ["[my secret] (nods) Good day.\n\nWick Tarn: not mine", " Well.\n[a\nsecret] Then go."]
    shown = []

    class Model(Script):
        letters = 0

        def step(self):
            [(future, messages, *_)] = self.line
            if messages[0]["content"].startswith("You watch"):
                self.line, text = [], "Wick Tarn"
            elif self.letters < len(text := said[len(shown) % 2]):
                self.letters += 1
                return
            else:
                shown.append(text)
                self.line, self.letters = [], 0
            future.set_result(Reply(text, "stop"))

        def spoken(self, future):
            return said[len(shown) % 2][: self.letters]

    monkeypatch.setattr(simulate, "open_model", lambda *_, **__: Model(None))
    args = ["--scene", "the-last-ferry/1", "--actor", "x", "--max-rounds", 2, "--thoughts", thoughts]
    code, out, _ = script("simulate", *args, "--out", tmp_path / "a")
    assert code == 0 and "not mine" not in out and out.count("(nods) Good day.") == 1
    assert (out.count("my secret"), out.count("secret]")) == ((1, 2) if thoughts == "show" else (0, 0))
    [line] = read_lines(tmp_path / "a")
    assert line["messages"][0]["content"] == "[my secret] (nods) Good day."
    if thoughts == "show":
        assert all(m["content"] in out for m in line["messages"] if m["role"] != "NSP")


def test_a_turn_is_wrapped_at_words(stage, monkeypatch):
    """On a terminal no line is wider than it or begins with the space it was broken at, and no word is
    lost."""
    file = io.StringIO()
    monkeypatch.setattr(
        terminal, "stdout", Console(file=file, force_terminal=True, width=40, highlight=False)
    )
    monkeypatch.setattr("sys.stdout", file)
    said, shown = Stage(stage["the-last-ferry/1"]), file.tell()
    text = " ".join("word" * (1 + i % 3) for i in range(200))
    for n in (7, 300, len(text)):
        said.put("Wick Tarn", text[:n])
    lines = re.sub("\x1b\\[[0-9;]*m", "", file.getvalue()[shown:]).split("\n")
    assert " ".join(line.rstrip() for line in lines) == f"Wick Tarn: {text}"
    assert len(lines) > 20 and all(len(line) <= 40 and not line.startswith(" ") for line in lines)


def test_a_script_is_markdown_in_which_nothing_said_is_markup(script, three_scenes, tmp_path, monkeypatch):
    """Names, thoughts and actions are set apart; stars, brackets and HTML of a reply stay text."""
    evil = "[I am *bold*] (bows) <script>alert(1)</script> # no heading _x_ ![i](http://x) &lt; | `code`"
    with Server(
        lambda body, _: "random" if body["messages"][0]["content"].startswith("You watch") else evil
    ) as server:
        server.use(monkeypatch)
        args = [
            "--scene",
            f"{three_scenes}:0-1",
            "--actor",
            "openai:m",
            "--max-rounds",
            2,
            "--script",
            "--out",
            tmp_path / "a",
        ]
        assert script("simulate", *args)[0] == 0
    text = (tmp_path / "a" / "script.md").read_text()
    assert text.count("\n## ") + text.startswith("## ") == 2 and text.count(":** ") >= 3
    assert (
        "<script" not in text
        and "![" not in text.replace("!\\[", "")
        and r"\*bold\*" in text
        and r"*\[I am" in text
    )
    assert "*(bows)*" in text


def test_scenes_by_range_and_limit(script, three_scenes, tmp_path, monkeypatch):
    """FILE:0-1 are two scenes, FILE:all with --limit 1 and FILE with --limit 2 the first ones."""
    with Server(stage_answer) as server:
        server.use(monkeypatch)
        books = [scene.book for scene in load_scenes(three_scenes)]
        for i, (spec, more, expected) in enumerate(
            [
                (":1-2", [], books[1:]),
                (":all", ["--limit", 1], books[:1]),
                ("", ["--limit", 2], books[:2]),
                ("", [], books[:1]),
            ]
        ):
            args = ["--scene", f"{three_scenes}{spec}", "--actor", "openai:m", "--max-rounds", 1, *more]
            assert script("simulate", *args, "--out", tmp_path / str(i))[0] == 0
            assert [line["book"] for line in read_lines(tmp_path / str(i))] == expected
        for spec in (":2-1", ":0-3", ":3-4"):
            line = usage_error(script("simulate", "--scene", f"{three_scenes}{spec}", "--actor", "openai:m"))
            assert "0 to 2" in line


def test_a_slow_endpoint_holds_up_its_own_scene_alone():
    """While one scene waits for an answer, another is played to its end."""
    scenes = [make_scene(i_p=0, scenario="Slow."), make_scene(i_p=1, scenario="Quick.")]
    ended = []

    class Remote(Script):
        local = False

        def submit(self, messages, params, opening=""):
            return pool.submit(self.answer, messages, params)

        def answer(self, messages, params):
            if "Slow." in messages[0]["content"] and not ended:
                deadline = time.monotonic() + 20
                while not ended and time.monotonic() < deadline:
                    time.sleep(0.005)
            return self.chat([messages], params)[0]

    pool = ThreadPoolExecutor()
    models = dict.fromkeys(
        ROLES, Remote(lambda m, _: "random" if m[0]["content"].startswith("You watch") else "Yes.")
    )
    perform(scenes, models, Protocol(max_rounds=6), on_end=lambda scene, *_: ended.append(scene.scenario))
    assert ended == ["Quick.", "Slow."]


def test_a_long_turn_holds_up_its_own_scene_alone():
    """The same of a local model: a scene goes on as soon as its own reply is there, whatever else is being
    spoken."""
    scenes, ended = [make_scene(i_p=0, scenario="Slow."), make_scene(i_p=1, scenario="Quick.")], []

    class Model(Script):
        def step(self):
            slow = [asked for asked in self.line if "Slow." in asked[1][0]["content"] and not ended]
            self.line = [asked for asked in self.line if asked not in slow]
            super().step()
            self.line = slow

    models = dict.fromkeys(
        ROLES, Model(lambda m, _: "random" if m[0]["content"].startswith("You watch") else "Yes.")
    )
    perform(scenes, models, Protocol(max_rounds=6), on_end=lambda scene, *_: ended.append(scene.scenario))
    assert ended == ["Quick.", "Slow."]


def test_prompts_name_the_length_at_play():
    """The word limit is told at play and not in training."""
    scene = make_scene()
    assert "60 words" in prompts.actor(scene, "Ada", prompts.AT_PLAY, concise=True)
    assert "60 words" not in prompts.actor(scene, "Ada", prompts.AT_PLAY)


@pytest.mark.parametrize(
    "said",
    ["Ada Lee: Yes, I will.\nAda: No.", "Ada: No.\nAda Lee: Yes, I will.",
     "Yes.\nada (nods): No.\n- Ada Lee (rises): I will.",
     "Yes, " + "over and over again we go " * 7 + "and that is all.", "Well.\nAda",
     "Well.\nAdam is here: look.",
     "Lee: Yes.\nZoe: No.\nLee: Well.", "Yes. Ben: No.", "Yes, we goAda Lee: [why] Well.",
     "Yes.\nZoe (nods): No.", "Ben? Not Ben",
     "Note: Yes.", "Yes.\nMr. Zed von Lee (old", "Yes.\nZoe: well, yes."],
)  # fmt: skip
def test_what_was_shown_is_what_is_played(said, monkeypatch, capsys):
    """Letter by letter, with a name that begins another one: nothing of another's line shows, and all of the
    turn does."""
    shown = Stage(make_scene(speaking_characters=["Ada", "Ada Lee", "Ben"]))
    call = SimpleNamespace(agent="Ada Lee", role="actor")
    capsys.readouterr()
    for n in range(len(said)):
        shown.on_text(call, said[: n + 1])
    played = replies.clean_reply(said, "Ada Lee", shown.cast)
    shown.on_message({"role": "Ada Lee", "content": played})
    out = capsys.readouterr().out
    assert out.endswith(f"{played}\n\n") and "No." not in out.replace(played, "")


def test_filters_of_sampling_are_for_turns_alone(script, three_scenes, tmp_path, monkeypatch):
    """--min-p and --repetition-penalty reach the requests for turns and the settings, no next speaker."""
    args = ["--scene", f"{three_scenes}:0", "--actor", "openai:m", "--max-rounds", 3, "--out", tmp_path / "a"]
    with Server(stage_answer) as server:
        server.use(monkeypatch)
        assert script("simulate", *args, "--min-p", 0.1, "--repetition-penalty", 1.2)[0] == 0
        bodies = [request.body for request in server.requests]
    asked = [(body.get("min_p"), body.get("repetition_penalty")) for body in bodies]
    assert {*asked} == {(0.1, 1.2), (None, None)} and len(asked) == 5
    settings = json.loads((tmp_path / "a" / "settings.json").read_text())
    assert (settings["min_p"], settings["repetition_penalty"]) == (0.1, 1.2)


def test_the_default_temperature(script, three_scenes, tmp_path, monkeypatch):
    """Greedy, as published, where an actor is named; for watching where none is; what is given where one
    is."""
    monkeypatch.setattr(simulate, "default_actor", lambda: "openai:m")
    args = ["--scene", f"{three_scenes}:0", "--max-rounds", 1, "--out"]
    cases = {
        "named": (["--actor", "openai:m"], 0.0),
        "none": ([], 0.7),
        "given": (["--temperature", 0.2], 0.2),
    }
    with Server(stage_answer) as server:
        server.use(monkeypatch)
        for name, (more, expected) in cases.items():
            assert script("simulate", *args, tmp_path / name, *more)[0] == 0
            assert server.requests[-1].body["temperature"] == expected
