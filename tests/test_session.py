"""A play that a person takes part in: going on from messages, who sees what, and the terminal."""

import json
import random

import pytest
from conftest import ROOT, usage_error
from test_llm import Script
from test_simulate import make_scene

import llm
from common import files
from common.files import UsageError
from data.chats import END_CHAT, NEXT_SPEAKER
from data.scenes import to_test_scene
from evals.verdicts import read_performances
from llm.reply import Reply
from play.protocol import PROTOCOLS, Call, Performance, Protocol
from play.session import Session, line


@pytest.fixture(autouse=True)
def _out(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "OUT", tmp_path / "out")


def reply_to(call):
    """What a scripted cast answers: a function of the conversation and the params alone."""
    rng = random.Random(f"{call.messages}{call.params.seed}")
    if call.role == "next_speaker":
        return Reply(rng.choice(["Ada", "Ben", "Cy", "Environment", "nobody", END_CHAT]), "stop")
    spoken = rng.choice(["[I know.] Yes.", "(nods) No.", "Ben: It rains.", "", "Perhaps [not]."])
    return Reply(f"{spoken} {rng.randrange(100)}" if spoken else "", "stop")


def play(performance, human=None, lines=()):
    """(messages, calls) of a Performance with the scripted cast. `human` speaks the lines, then it stops."""
    coroutine, reply, calls, lines = performance.play(), None, [], iter(lines)
    try:
        while True:
            step, reply = coroutine.send(reply), None
            if isinstance(step, Call):
                calls.append(step)
                if step.role != "next_speaker" and step.agent == human:
                    text = next(lines, None)
                    if text is None:
                        break
                    reply = line(text)
                else:
                    reply = reply_to(step)
    except StopIteration:
        pass
    return performance.messages, calls


@pytest.mark.parametrize("given", [0, 2])
def test_going_on_from_any_message_ends_as_the_whole_play(given):
    """A play of the paper's protocol that is cut after any of its messages and goes on from there asks the
    same questions with the same seeds, and ends with the same messages."""
    scene = make_scene()
    for seed in range(12):
        protocol = Protocol(max_rounds=9, seed=seed, continue_from=given, temperature=0.7)
        whole, asked = play(Performance(scene, protocol))
        assert len(whole) > 3
        for cut in range(len(whole) + 1):
            messages, calls = play(Session(scene, protocol, whole[:cut]).performance())
            assert messages == whole, (seed, cut)
            rest = asked[len(asked) - len(calls) :]
            assert [(c.occasion, c.messages, c.params) for c in calls] == [
                (c.occasion, [{k: m[k] for k in ("role", "content")} for m in c.messages], c.params)
                for c in rest
            ]


def test_a_longer_limit_goes_on_where_the_shorter_one_paused():
    scene, short, long = make_scene(), Protocol(max_rounds=3, seed=4), Protocol(max_rounds=8, seed=4)
    paused, _ = play(Performance(scene, short))
    whole, _ = play(Performance(scene, long))
    assert len(paused) < len(whole) and play(Performance(scene, long, messages=paused))[0] == whole


def test_the_release_is_read_too():
    """Its decisions may name nobody of the scene; the speaker is then whoever spoke."""
    scene, protocol = make_scene(), Protocol(max_rounds=6, **PROTOCOLS["release"])
    for seed in range(8):
        whole, _ = play(Performance(scene, Protocol(max_rounds=6, seed=seed, **PROTOCOLS["release"])))
        spoken = [m for m in whole if m["role"] != NEXT_SPEAKER]
        session = Session(scene, protocol, whole)
        assert [t["character"] for t in session.performance().dialogue] == [
            m["role"] for m in spoken if m["content"]
        ]


def test_a_persons_thoughts_are_hidden_and_their_words_are_not_cut():
    """Others read a person's line without its thoughts; what looks like another's line stays, as typed."""
    scene, text = make_scene(), "Ben: said I. [SECRET (even this)] (waves) And then?"
    messages, calls = play(
        Session(scene, Protocol(max_rounds=8, seed=1), human="ada").performance(), "Ada", [text]
    )
    assert messages[0] == {"role": "Ada", "content": text, "human": True}
    others = [call for call in calls[1:] if call.agent != "Ada"]
    assert others and not any("SECRET" in str(call.messages) for call in others)
    assert not any("even this" in str(call.messages) for call in others)
    assert all("(waves) And then?" in str(call.messages) for call in others)
    own = [call for call in calls[1:] if call.agent == "Ada" and call.role != "next_speaker"]
    assert all("SECRET" in str(call.messages) for call in own)


def test_silence_is_passed_over():
    """A person who says nothing has no message and is asked once; nobody is asked who is next."""
    session = Session(make_scene(), Protocol(max_rounds=3), human="Ada")
    messages, calls = play(session.performance(), "Ada", ["  ", "x", "x"])
    assert messages[0]["role"] == NEXT_SPEAKER and messages[0]["content"] != "Ada"
    assert [c.agent for c in calls[:2]] == ["Ada", messages[0]["content"]]
    opened = Session(session.scene, session.protocol, messages[:1], "Ada")
    assert play(opened.performance(), "Ada", ["x", "x"])[0] == messages


def test_retry_and_edit():
    spoken = [{"role": "Ada", "content": "Hello.", "human": True}, {"role": NEXT_SPEAKER, "content": "Ben"}]
    session = Session(make_scene(), Protocol(), [*spoken, {"role": "Ben", "content": "Go."}], "Ada")
    again = session.retried()
    assert again.messages == spoken[:1] and again.seed == 1 and again.retried().seed == 2
    assert session.edited("Bye.").messages == [{**spoken[0], "content": "Bye."}]
    assert session.edited("").messages == [] and len(session.messages) == 3
    with pytest.raises(UsageError, match="no line of yours"):
        Session(make_scene(), Protocol(), human="Ada").edited("Bye.")


def test_retried_messages_can_be_played_again():
    """Each message of a play with retries is what its own recorded seed, else the protocol's, makes of the
    messages before it."""
    protocol, scene = Protocol(max_rounds=7, seed=5, temperature=0.7), make_scene()
    first, _ = play(Performance(scene, protocol))
    messages, _ = play(Session(scene, protocol, first[:3], seed=8).performance())
    assert [m.get("seed") for m in messages] == [None] * 3 + [8] * (len(messages) - 3) and len(messages) > 4
    for i, message in enumerate(messages):
        session = Session(scene, protocol, messages[:i], seed=message.get("seed"))
        assert play(session.performance())[0][i] == message
        other = Session(scene, protocol, messages[:i], seed=99)
        assert play(other.performance())[0][i] != message


def test_strangers_are_refused():
    with pytest.raises(UsageError, match="Zoe: not in this scene; choose from Ada, Ben"):
        Session(make_scene(), Protocol(), human="Zoe")
    with pytest.raises(UsageError, match="Zoe: speaks, but is not in this scene"):
        Session(make_scene(), Protocol(), [{"role": "Zoe", "content": "Hello."}])


# ---- the terminal


@pytest.fixture
def at_terminal(script, monkeypatch, tmp_path):
    """simulate.py --play Ada with typed lines and a scripted cast: ((code, stdout, stderr), transcripts)."""

    def run(typed, *args):
        file = tmp_path / "scene.json"
        fields = to_test_scene(make_scene())
        file.write_text(json.dumps([fields]), "utf-8")

        def say(messages, params):
            if messages[0]["content"].startswith("You watch a scene"):
                return "Ben" if "Ada:" in messages[-1]["content"] else "Ada"
            return f"(nods) I am here, {params.seed}."

        monkeypatch.setattr(llm, "Local", lambda *_: Script(say))
        monkeypatch.setattr(Script, "spoken", lambda *_: "", raising=False)
        source = iter(typed)

        def read(prompt=""):
            value = next(source, EOFError)
            if isinstance(value, type):
                raise value
            return value

        monkeypatch.setattr("builtins.input", read)
        out = tmp_path / "out"
        spec = ["--scene", file, "--play", "ada", "--actor", tmp_path, "--out", out]
        result, kept = script("simulate", *spec, *args), out / "transcripts.jsonl"
        lines = kept.read_text("utf-8").splitlines() if kept.exists() else []
        return result, [json.loads(text) for text in lines]

    return run


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_a_play_at_the_terminal(at_terminal, tmp_path, end):
    """Lines come from stdin; the transcript is one of simulate.py's, kept at Ctrl-C as well."""
    (code, out, err), [kept] = at_terminal(["[Hm.] Good evening.", "And now?", end])
    assert code == 0, err
    assert "Ada:  Good evening." in out and "Ben: (nods) I am here" in out and "Hm." not in out
    mine = [m["content"] for m in kept["messages"] if m.get("human")]
    assert mine == ["[Hm.] Good evening.", "And now?"] and kept["settings"]["human"] == "Ada"
    assert list(kept) == ["book", "i_p", "i_c", "scene", "settings", "messages", "stats"]
    [(scene, messages, settings)] = read_performances(tmp_path / "out")
    assert scene.to_dict() == kept["scene"] and messages == kept["messages"]
    opened = Session(
        scene, Protocol(**{k: settings[k] for k in vars(Protocol())}), messages, settings["human"]
    )
    assert opened.is_asked(next_call(opened))


def next_call(session):
    """The first thing a restored session asks, with the next speaker Ada."""
    coroutine = session.performance().play()
    step = coroutine.send(None)
    while step.role == "next_speaker":
        step = coroutine.send(Reply("Ada", "stop"))
    return step


def test_commands_at_the_terminal(at_terminal):
    """/retry plays the others again with another seed; /edit replaces one's last line."""
    (code, out, err), [kept] = at_terminal(["Good evening.", "/retry", "/edit Good night.", EOFError])
    assert code == 0, err
    answers = [text for text in out.split("\n") if text.startswith("Ben: ")]
    assert len(answers) == 3 and answers[0] != answers[1]
    assert [m["content"] for m in kept["messages"] if m.get("human")] == ["Good night."]
    assert [m.get("seed") for m in kept["messages"] if m["role"] == "Ben"] == [1]
    assert kept["settings"]["seed"] == 0
    (code, out, err), _ = at_terminal(["/edit nothing yet", EOFError], "--max-rounds", "2")
    assert code == 2


def test_a_command_that_does_not_exist_is_not_spoken(at_terminal, tmp_path):
    (code, out, err), [kept] = at_terminal(["/rety", "/retry", "Hello.", EOFError])
    assert code == 0 and "/rety: not a command (an empty line" in " ".join(err.split())
    assert [m["content"] for m in kept["messages"] if m.get("human")] == ["Hello."] and "/rety" not in out


def test_nothing_said_leaves_no_transcript(at_terminal):
    result, kept = at_terminal([EOFError])
    assert "nobody has said a word" in result[2] and result[0] == 2 and not kept


def test_flags_that_do_not_go_with_play(script, tmp_path):
    play = ["--scene", "the-last-ferry/1", "--actor", tmp_path, "--play"]
    for more in (["--resume", "--out", tmp_path / "o"], ["--protocol", "release"]):
        assert "--play goes with" in usage_error(script("simulate", *play, "Hanne", *more))
    assert "choose from Hanne Brod, Wick Tarn" in usage_error(script("simulate", *play, "Nobody"))
    assert "choose from Hanne Brod, Wick Tarn" in usage_error(script("simulate", *play, ""))
    play[1] = f"{ROOT / 'data' / 'stage' / 'the_last_ferry.json'}:all"
    assert "needs one scene" in usage_error(script("simulate", *play, "Hanne"))
