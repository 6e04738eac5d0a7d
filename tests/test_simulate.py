"""The simulation: who knows what, who speaks next, what a reply adds; and the command line, with checkpoints
and endpoints."""

import functools
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from copy import deepcopy

import pytest
import torch
from conftest import ROOT, usage_error
from test_llm import KEY, Script, Server

import llm
import simulate
from common import files
from data import prompts
from data.chats import END_CHAT, next_speaker_chat, perspective, scene_to_chats, system_prompt
from data.scenes import Scene, load_scenes, straighten
from llm import local
from play import transcripts
from play.perform import SIDE_BY_SIDE, perform
from play.protocol import PROTOCOLS, Protocol
from play.replies import clean_reply, cut_repetition, parse_next_speaker, speaker_heads

STATS = {"prefilled", "decoded", "cached", "seconds"}


@pytest.fixture(autouse=True)
def _out(monkeypatch, tmp_path):
    """What goes under out/ unless told otherwise, kept answers too, goes to a folder of the test's own."""
    monkeypatch.setattr(files, "OUT", tmp_path / "out")


@pytest.fixture
def one_thread():
    """A tiny model only waits for more of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_scene(**changes):
    """Ada, Ben and the Environment, and Cy, who has no profile and so is no major character."""
    fields = dict(
        book="The Test",
        i_p=0,
        i_c=0,
        tag="train",
        scenario="A room.",
        topic="",
        plot_summary="All of them leave.",
    )
    names = ["Ada", "Ben", "Ada", "Environment", "Ben", "Ada", "Cy"]
    fields["dialogues"] = [{"character": name, "message": f"original {i}"} for i, name in enumerate(names)]
    fields["profiles"] = {"Ada": "Ada is tall.", "Ben": "Ben is short."}
    fields["motivations"] = {name: f"The wish of {name}." for name in ("Ada", "Ben", "Cy")}
    return Scene(**{**fields, **changes})


def who(messages):
    """Whose chat this is, by the motivation that only its owner is told."""
    told = [name for name in ("Ada", "Ben", "Cy") if f"The wish of {name}." in messages[0]["content"]]
    assert len(told) == 1
    return told[0]


def in_turn(*names):
    """A next-speaker model that names these, one after the other and from the beginning again."""
    return Script(lambda messages, _: names[(len(messages) - 4) // 2 % len(names)])


@pytest.fixture
def short_turns(monkeypatch, one_thread):
    """Turns of 40 tokens on the command line, since a model with random weights never ends one."""
    monkeypatch.setattr(
        simulate, "Protocol", functools.partial(Protocol, max_tokens=40, next_speaker_tokens=8)
    )


def play(scene, actor, environment=None, next_speaker=None, **protocol):
    """(said, all messages, stats) of a performance; `said` are (role, content) without the next-speaker
    decisions."""
    models = {"actor": actor, "environment": environment or actor, "next_speaker": next_speaker or actor}
    ends = []
    perform([scene], models, Protocol(**protocol), on_end=lambda *end: ends.append(end))
    [(_, messages, stats, _)] = ends
    return [(m["role"], m["content"]) for m in messages if m["role"] != "NSP"], messages, stats


# ---- who knows what ----------------------------------------------------------------------------------------


def test_thoughts_of_another_never_reach_an_agents_chat():
    """Whatever the brackets look like, a thought is in its own thinker's chats and in no other; actions are
    in all."""
    forms = [
        "[secret of {0}] (nods to {0}) well",
        "(nods to {0}) one [a [nested secret of {0}] end] two",
        "[many\nlines secret of {0}\n\n]\n(nods to {0}) three",
        "(nods to {0}) four [never closed: secret of {0}",
        "[secret of {0}][secret of {0}](nods to {0})] five",
    ]
    said = iter(range(1000))
    actor = Script(lambda messages, _: forms[next(said) % 5].format(who(messages)))
    environment = Script(lambda *_: "[secret of wind] (nods to wind) The door moves.")
    next_speaker = in_turn("Cy", "Ben", "Environment", "Ada", "Ben", "Cy", "Ada")
    play(make_scene(), actor, environment, next_speaker)
    assert {who(messages) for messages, _ in actor.asked} == {"Ada", "Ben", "Cy"} and environment.asked
    seen, own = set(), set()
    for model in (actor, environment, next_speaker):
        for messages, _ in model.asked:
            me = who(messages) if model is actor else "wind" if model is environment else None
            for message in messages:
                for name in ("Ada", "Ben", "Cy", "wind"):
                    if f"secret of {name}" in message["content"]:
                        assert name == me and message["role"] == "assistant"
                        own.add(name)
                    if f"(nods to {name})" in message["content"] and name != me:
                        seen.add((me, name))
    assert own == {"Ada", "Ben", "Cy", "wind"}
    assert seen == {
        (a, b) for a in ("Ada", "Ben", "Cy", "wind", None) for b in ("Ada", "Ben", "Cy", "wind") if a != b
    }


def test_thoughts_stay_in_the_transcript():
    """What is kept of a reply has its thoughts and actions."""
    said, _, _ = play(make_scene(), Script(lambda *_: "[why] (sits) Yes."), max_rounds=2)
    assert {content for _, content in said} == {"[why] (sits) Yes."}


def test_without_thoughts_no_actor_is_asked_for_them_nor_sees_its_own():
    """The ablation: no thought in any chat, and no word of square brackets in the prompt."""
    actor = Script(lambda *_: "[secret] (sits) Yes.")
    play(make_scene(), actor, Script(lambda *_: "Wind."), in_turn("Ben", "Ada"), thoughts=False)
    assert len(actor.asked) > 10
    assert not any("secret" in message["content"] for messages, _ in actor.asked for message in messages)
    assert not any("square brackets" in messages[0]["content"] for messages, _ in actor.asked)


def test_an_actor_knows_what_may_be_known():
    """The prompt has one's own profile and motivation and the others' profiles, never the plot's outcome or
    another's wish."""
    actor = Script(lambda *_: "Yes.")
    play(make_scene(), actor, Script(lambda *_: "Wind."), in_turn("Ben", "Ada"))
    for messages, _ in actor.asked:
        system = messages[0]["content"]
        assert (
            who(messages) and "Ada is tall." in system and "Ben is short." in system and "A room." in system
        )
        assert "All of them leave." not in system


def test_the_word_limit_is_told():
    """Actors are told to be concise, in about 60 words."""
    actor = Script(lambda *_: "Yes.")
    play(make_scene(), actor, Script(lambda *_: "Wind."), in_turn("Ben", "Ada"))
    assert actor.asked and all("60 words" in messages[0]["content"] for messages, _ in actor.asked)


@pytest.mark.parametrize("name", ["the-last-ferry/1", "three-keys/5", "ward-c/2", "the-fox-who-paid-rent/5"])
def test_the_agents_chats_are_the_training_chats(stage, name):
    """With the original lines on stage, each chat asked, its reply included, begins the chat that training
    would draw."""
    scene, asked = deepcopy(stage[name]), []
    original = scene.dialogues
    scene.speaking_characters.sort(
        key=lambda name: name != original[0]["character"]
    )  # so that the right one begins
    assert all(a["character"] != b["character"] for a, b in zip(original, original[1:], strict=False))

    def actor(messages, _):
        asked.append(messages)
        return f"{original[len(asked) - 1]['character']}: {original[len(asked) - 1]['message']}"

    next_speaker = Script(lambda messages, _: original[len(messages) // 2 - 1]["character"])
    actor_model = Script(actor)
    said, _, _ = play(scene, actor_model, None, next_speaker, max_rounds=len(original))
    assert said == [(turn["character"], turn["message"].strip()) for turn in original]
    assert actor_model.openings == [f"{turn['character']}:" for turn in original]
    assert set(next_speaker.openings) == {""}
    trained = {}
    for epoch in range(40):
        for chat in scene_to_chats(scene, epoch, next_speaker_share=0):
            if chat.options["thoughts"]:
                trained.setdefault(chat.character, chat.messages)
    assert trained.keys() == set(scene.speaking_characters)
    for turn, (system, *chat) in zip(original, asked, strict=True):
        reply = {"role": "assistant", "content": f"{turn['character']}: {turn['message']}\n\n"}
        assert [*chat, reply] == trained[turn["character"]][1 : len(chat) + 2]
        at_play = {"role": "system", "content": system_prompt(scene, turn["character"], prompts.AT_PLAY)}
        assert {**system, "content": system["content"].replace(prompts.FORMAT_CONCISE, "")} == at_play
    trained = next_speaker_chat(scene, random.Random(0)).messages
    for (messages, _), turn in zip(next_speaker.asked, original[1:], strict=True):
        assert [*messages, {"role": "assistant", "content": turn["character"]}] == trained[
            : len(messages) + 1
        ]


def test_an_opening_is_what_training_begins_a_turn_with(stage, stage_tokenizer):
    """The ids of `Name:`, which an actor is made to begin with, begin the ids of each of its turns in
    training."""
    for scene in stage.values():
        for turn in scene.dialogues:
            opening = stage_tokenizer.encode(f"{turn['character']}:")
            whole = stage_tokenizer.encode(f"{turn['character']}: {turn['message']}\n\n")
            assert whole[: len(opening)] == opening


@pytest.mark.parametrize("seed", range(5))
def test_an_agents_chats_grow_at_the_end_alone(seed):
    """Each chat of an agent begins with the one before it, so that a cache serves; roles take turns and end
    on the user's."""
    rng = random.Random(seed)
    replies = ["Yes.", "[no] No.", "", "  ", "Ben: mine", "[only a thought]"]
    actor = Script(lambda *_: rng.choice(replies))
    environment = Script(lambda *_: rng.choice(replies))
    next_speaker = Script(lambda *_: rng.choice(["Ada", "Ben", "Cy", "Environment", "Zed"]))
    play(make_scene(), actor, environment, next_speaker, seed=seed)
    last = {}
    for model in (actor, environment, next_speaker):
        for messages, _ in model.asked:
            me = who(messages) if model is actor else id(model)
            text = "".join(f"\0{m['role']}\0{m['content']}" for m in messages)
            assert text.startswith(last.get(me, ""))
            last[me] = text
            assert [m["role"] for m in messages] == [
                "system",
                *["user", "assistant"] * (len(messages) // 2 - 1),
                "user",
            ]


# ---- whose turn --------------------------------------------------------------------------------------------


def test_the_first_speaker_is_the_first_listed():
    """Not who speaks first in the original, nor an order of ours: the first of the scene's own list."""
    for first in ("Ben", "Environment", "Cy"):
        scene = make_scene(
            speaking_characters=[first, *(n for n in ("Ada", "Ben", "Environment", "Cy") if n != first)]
        )
        said, _, _ = play(scene, Script(lambda *_: "Yes."), max_rounds=1)
        assert said == [(first, "Yes.")]


def test_an_environment_is_there_even_where_the_scene_has_none():
    """A scene without one gets an Environment, which the next-speaker model may name."""
    scene = make_scene(dialogues=[{"character": name, "message": "x"} for name in ("Ada", "Ben")])
    environment = Script(lambda *_: "Wind.")
    said, _, _ = play(
        scene, Script(lambda *_: "Yes."), environment, in_turn("Ben", "Environment", "Ada"), max_rounds=4
    )
    assert ("Environment", "Wind.") in said and len(environment.asked) == said.count(("Environment", "Wind."))


@pytest.mark.parametrize("rounds", [1, 2, 7, None])
def test_rounds_are_limited(rounds):
    """A scene nobody ends has as many turns as rounds, 20 if not told, and no decision after the last."""
    actor, next_speaker = Script(lambda *_: "Yes."), in_turn("Ben", "Ada")
    said, messages, _ = play(
        make_scene(), actor, None, next_speaker, **({"max_rounds": rounds} if rounds else {})
    )
    rounds = rounds or 20
    assert len(said) == len(actor.asked) == rounds and len(next_speaker.asked) == rounds - 1
    assert [m["role"] == "NSP" for m in messages] == [False, *[True, False] * (rounds - 1)]


@pytest.mark.parametrize(
    "answer", ["<END CHAT>", "<end chat>", " <END CHAT>\n", "The scene is over. <END CHAT>"]
)
def test_the_end_counts_from_the_sixth_round_on(answer):
    """<END CHAT> at round indices 0 to 4 is an invalid name; at 5 it ends the scene."""
    said, messages, stats = play(make_scene(), Script(lambda *_: "Yes."), None, Script(lambda *_: answer))
    assert len(said) == 6 and messages[-1] == {"role": "NSP", "content": END_CHAT} and stats["fallbacks"] == 5
    assert [m["content"] for m in messages if m["role"] == "NSP"].count(END_CHAT) == 1


@pytest.mark.parametrize(
    "answer", ["Zed", "random", "", "...", "<END CHAT>", "Adam", "Benjamin", "None of them", None]
)
def test_names_that_do_not_serve_fall_back(answer):
    """Unknown, empty or repeated names give a seeded choice of the major characters and the Environment, not
    the speaker."""

    def name(messages, _):
        return messages[-1]["content"].split(":")[0] if answer is None else answer

    def decide(seed, i_p=0):
        next_speaker = Script(name)
        said, messages, stats = play(
            make_scene(i_p=i_p),
            Script(lambda *_: "Yes."),
            None,
            next_speaker,
            seed=seed,
            end_from_round=20,
            max_rounds=12,
        )
        assert stats["fallbacks"] == 11
        roles = [role for role, _ in said]
        assert all(a != b for a, b in zip(roles, roles[1:], strict=False))
        assert [m["content"] for m in messages if m["role"] == "NSP"] == roles[
            1:
        ]  # the chosen names, not the answers
        for asked, _ in next_speaker.asked:
            assert [m["content"] for m in asked if m["role"] == "assistant"] == roles[: len(asked) // 2 - 1]
        return roles

    plays = [decide(seed) for seed in range(6)]
    assert decide(0, i_p=1) != plays[0] != decide(1)  # by the scene and by the seed
    assert {role for roles in plays for role in roles} == {"Ada", "Ben", "Environment"}
    assert plays == [decide(seed) for seed in range(6)] and len(set(map(tuple, plays))) > 3


@pytest.mark.parametrize(
    "form", ["{}", " {}\n", "{}.", "**{}**", '"{}"', "{}: I will", "The next is {}", "{}\nBecause.", "<{}>"]
)
def test_names_are_read_out_of_what_is_wrapped_around_them(form):
    """Any of the cast may be named, minor characters too, whatever the case; each is chosen and not fallen
    back to."""
    cast = ["Cy", "Environment", "Ben", "cy", "BEN"]
    names = in_turn(*(form.format(name) for name in cast))
    said, _, stats = play(make_scene(), Script(lambda *_: "Yes."), None, names, max_rounds=6)
    assert [role for role, _ in said[1:]] == ["Cy", "Environment", "Ben", "Cy", "Ben"] and stats[
        "fallbacks"
    ] == 0


@pytest.mark.parametrize(
    "answer", ["Anna", "Anna is next.", "I think Anna", "Next: Anna Bell", "Joanna", "It is Joanna's turn"]
)
def test_a_name_that_holds_another_is_read_whole(answer):
    """In a cast of Ann, Anna, Anna Bell and Joanna, an answer means the longest name that stands in it as a
    word."""
    names = ["Ben", "Ann", "Anna", "Anna Bell", "Joanna"]
    scene = make_scene(dialogues=[{"character": name, "message": "x"} for name in names])
    expected = next(name for name in ("Anna Bell", "Joanna", "Anna") if name in answer)
    said, _, _ = play(scene, Script(lambda *_: "Yes."), None, Script(lambda *_: answer), max_rounds=2)
    assert said[1][0] == expected


@pytest.mark.parametrize("k", [1, 3, 7, 16, 30])
def test_continue_from_k_keeps_the_original_lines(stage, k):
    """The first k messages are the original ones by those who said them, nobody is asked for them; then the
    play goes on."""
    for scene in stage.values():
        given = scene.dialogues[:k]
        actor = Script(lambda *_: "Go on.")
        said, messages, _ = play(scene, actor, None, Script(lambda *_: "?"), continue_from=k, max_rounds=18)
        assert said[: len(given)] == [(turn["character"], turn["message"]) for turn in given]
        assert len(said) == 18 and len(actor.asked) == 18 - len(given)
        spoken = [m for m in messages if m["role"] != "NSP"]
        names = [m["content"] for m in messages if m["role"] == "NSP"]
        assert names == [m["role"] for m in spoken[1:]]
        assert actor.asked[0][0][1:] == perspective(given, said[len(given)][0])


def test_original_lines_count_as_rounds():
    """Fewer rounds than lines to continue from: so many lines, nobody asked, and no decision after the
    last."""
    actor = Script(lambda *_: "Go on.")
    said, messages, _ = play(make_scene(), actor, continue_from=5, max_rounds=2)
    assert said == [("Ada", "original 0"), ("Ben", "original 1")] and not actor.asked
    assert messages[-1]["role"] == "Ben" and len(messages) == 3


def test_continue_from_puts_no_real_line_into_another_mouth(shared):
    """The first three lines of all 100 scenes of the test set are said by those who say them there."""
    file = shared / "coser" / "test" / "id.json"
    raw = json.loads(file.read_text())
    scenes = load_scenes(file)
    assert len(scenes) == len(raw) == 100
    for scene, item in zip(scenes, raw, strict=True):
        said, _, _ = play(scene, Script(lambda *_: "Go on."), continue_from=3, max_rounds=4)
        lines = [turn for turn in item["dialogues"] if {"character", "message"} <= turn.keys()][:3]
        assert said[:3] == [(turn["character"].strip(), turn["message"]) for turn in lines]


# ---- what a reply adds -------------------------------------------------------------------------------------

REPLIES = [
    ("Yes.", "Yes."),
    ("  Yes.\n\n", "Yes."),
    ("Ada: Yes.", "Yes."),
    ("Ada:Yes.", "Yes."),
    ("**Ada:** Yes.", "Yes."),
    ("**Ada**: Yes.", "Yes."),
    ("Ada : [why] Yes.", "[why] Yes."),
    ("Yes.\nBen: No.", "Yes."),
    ("Ada: Yes.\n\nBen: No.\n\nAda: But yes.\nEnvironment: Rain.", "Yes.\nBut yes."),
    ("Yes.\n  Environment: Rain.\nMore rain.", "Yes."),
    ("Ben: No.", ""),
    ("Environment: Rain.", ""),
    ("Ada:", ""),
    ("I told Ben: never.", "I told Ben: never."),
    ("There are two ways:\nstay or go.", "There are two ways:\nstay or go."),
    ("Benedict: a name I once had.", "Benedict: a name I once had."),
    ("Mr. A (old): hush.\nAda: Yes.", "Yes."),
    ("BEN: No.\nada: Yes.", "Yes."),
    ("Yes.\n- Ben: No.\n### Ben: No.\n> Ben (nods): No.", "Yes."),
    ("Ada (nods): Yes.\nBen\uff1aNo.", "(nods)\nYes."),
    ("Mr. A (old) is here.", "Mr. A (old) is here."),
]
# replies of Fitzwilliam Darcy, in a cast with Mr. Bennet, Mrs. Bennet, Lizzy, Ana and Ana Maria
FORMS = [
    ("Mr Darcy: Yes.", "Yes."),  # other forms of names of the cast
    ("Darcy: Yes.\nMr Bennet: No.\nMR. DARCY: Indeed.", "Yes.\nIndeed."),
    ("Yes.\n**Mr Bennet** (bows): No.\nFitzwilliam (sits): Well.", "Yes.\n(sits)\nWell."),
    ("Yes.\nBennet: No.", "Yes."),
    ("Yes.\nMr. Fitzwilliam Darcy: No.", "Yes.\nNo."),
    ("Yes.\nMaria: No.", "Yes."),
    ("Mrs. Darcy of Pemberley: No.\nDarcy: Yes.", "Yes."),
    ("Yes.\nJane: I will not.", "Yes."),  # people outside the cast
    ("Jane: (smiles) no.\nDarcy: Yes.", "Yes."),
    ('Yes.\nThe Merchant: "fish!"', "Yes."),
    ("Yes.\nLady Catherine de Bourgh: Silence!", "Yes."),
    ("Yes.\n\u00c9lise: Non.", "Yes."),
    ("Yes. Lizzy: No.", "Yes."),  # within a line
    ("[Hm.] Lizzy: No. Fitzwilliam Darcy: Yes.", "[Hm.]\nYes."),
    ("I ask theFitzwilliam Darcy: [Hm.] Yes.", "I ask the\n[Hm.] Yes."),
    ("Yes.Lizzy: (nods) No.", "Yes."),
]
KEPT = [  # by Fitzwilliam Darcy, too
    "Note: I leave at noon.",
    "Yes.\nP.S.: Do not wait.",
    "Remember: Never again.",
    "Sir: You are mistaken.",
    "We meet at 10:30. Until then.",
    "Noon: too late.",
    "10:30: The coach.",
    "Yes.\nLuke 10:30 says so.",
    "Genesis 3:16, and Psalm 23:1.",
    "I told Lizzy: never.",
    "Newsflash, Lizzy: it will not work.",
    "[He said it twice. Lizzy: what a name.] Yes.",
    "(reads on. Lizzy: he likes the name.) Yes.",
    'He wrote: "I am well. Lizzy: come home." That is all.',
    'The note says "I am ill.\nJane: I am not.\nYours." I wept.',
    "The sign reads:\nJane: Seamstress.",
    "[Maintain a fine line: no more.]",
    "Consider this:\nwe go.",
    "Jane: that is a name I know.",
    "Anamaria is here: look.",
    "Listen, Mr. Bennet: no.",
    "Time: It heals nothing.",
]
DARCYS = ["Fitzwilliam Darcy", "Mr. Bennet", "Mrs. Bennet", "Lizzy", "Ana", "Ana Maria", "Environment"]


def test_a_name_is_the_same_with_either_apostrophe():
    """As models write it."""
    assert clean_reply("D\u2019Artagnan: Yes.\nBen: No.", "D'Artagnan", ["D'Artagnan", "Ben"]) == "Yes."


@pytest.mark.parametrize(("reply", "own"), REPLIES)
def test_only_the_actors_own_part_is_kept(reply, own):
    """The leading name goes, and so do lines spoken for others; a name within a sentence stays."""
    assert clean_reply(reply, "Ada", ["Ada", "Ben", "Mr. A (old)", "Environment"]) == own


@pytest.mark.parametrize(("reply", "own"), [*FORMS, *((text, text) for text in KEPT)])
def test_lines_of_others_under_other_names(reply, own):
    """Another form of a name, a name outside the cast and a name within a line are somebody's; notes, times,
    verses, brackets and quotations are not."""
    assert clean_reply(reply, "Fitzwilliam Darcy", DARCYS) == own


def test_a_world_may_have_people_outside_the_cast():
    """The Environment narrates them; a line of the cast's is cut all the same."""
    reply = 'Rain falls.\nMerchant: "Fish!"\nSky: Grey.\n**Environmental Feedback:** Thunder.'
    assert clean_reply(reply, "Environment", DARCYS) == reply
    assert clean_reply(f"{reply}\nLizzy: Oh.", "Environment", DARCYS) == reply


def test_no_recorded_message_of_the_books_loses_a_word(shared):
    """Of 1,921 messages of real scenes, no rule takes a line for another's but where one of the cast is named
    in front."""
    scenes = load_scenes(shared / "coser" / "test" / "id.json") + load_scenes(shared / "coser" / "books")
    turns = [(scene, turn) for scene in scenes for turn in scene.dialogues]
    heads = [
        head[0]
        for scene, turn in turns
        for head in speaker_heads(
            straighten(turn["message"]), turn["character"], [*scene.speaking_characters, "Environment"]
        )
    ]
    assert len(turns) > 1500 and heads == []


def test_recorded_turns_hold_others_lines_as_often_as_counted(shared):
    """In 3,461 turns of three models, the words before it on the page read one by one: 20 other forms of
    names (19 the speaker's own), 10 names stuck to the word before (all own), 1 person outside the cast, none
    after a sentence."""
    scenes = {scene.key: scene for scene in load_scenes(shared / "coser" / "test" / "id.json")}
    found, turns = Counter(), 0
    for file in (shared / "coser" / "gca").glob("*.simulation.json"):
        for case in json.loads(file.read_text()):
            scene = scenes[f"{straighten(case['book'])}-{case['i_p']}-{case['i_c']}"]
            cast = [*scene.speaking_characters, "Environment"]
            for message in case["simulation"]:
                if message["role"] == "NSP":
                    continue
                turns += 1
                text = straighten(message["content"].removeprefix(message["role"] + ":"))
                for head, own in speaker_heads(text, message["role"], cast):
                    in_cast = "name" if head["name"] in map(straighten, cast) else "other"
                    within = head.start() > 0 and text[head.start() - 1] != "\n"
                    found["within" if within else in_cast, own] += 1
    assert turns == 3461
    assert found == {
        ("name", True): 29,
        ("name", False): 3,
        ("other", True): 19,
        ("other", False): 2,
        ("within", True): 10,
    }


def test_others_lines_never_reach_the_stage():
    """In a play, too: nobody reads what an actor says in another's name."""
    actor = Script(lambda messages, _: f"{who(messages)}: mine\n\nBen: not mine\nAda: not mine\nCy: not mine")
    next_speaker = in_turn("Environment", "Ada")
    said, _, _ = play(make_scene(), actor, Script(lambda *_: "Wind."), next_speaker, max_rounds=8)
    assert {content for role, content in said if role == "Ada"} == {"mine\nnot mine"}
    assert not any("Ben: not mine" in m["content"] for asked in next_speaker.asked for m in asked[0])


def test_long_runs_of_letters_are_cut():
    """A run of 100 letters or more keeps 20, where it stands; 99 stay."""
    assert cut_repetition(f"a {'h' * 99} b") == f"a {'h' * 99} b"
    for length in (100, 101, 5000):
        assert (
            cut_repetition(f"(waits) {'Ah' * length}, yes\n{'z' * length}!")
            == f"(waits) {'Ah' * 10}, yes\n{'z' * 20}!"
        )
    assert cut_repetition("-" * 300) == "-" * 300


def words(rng, n):
    """n words, all different."""
    return [f"w{i}" for i in rng.sample(range(10_000), n)]


@pytest.mark.parametrize("seed", range(12))
def test_a_phrase_five_times_in_a_row_is_said_once(seed):
    """Of 5 to 30 words that occur five times or more in a row the first is kept, and what stands before and
    after."""
    rng = random.Random(seed)
    for size in (5, 6, rng.randrange(7, 30), 30):
        before, phrase, after = (
            words(rng, rng.randrange(0, 12)),
            words(rng, size),
            words(rng, rng.randrange(0, 12)),
        )
        text = " ".join([*before, *phrase * rng.choice([5, 6, 9]), *after])
        assert cut_repetition(text).split() == [*before, *phrase, *after]


@pytest.mark.parametrize("seed", range(12))
def test_a_passage_said_again_ends_the_reply(seed):
    """At the second occurrence of 15 words or more the rest goes; 14 words may come again; nothing else is
    touched."""
    rng = random.Random(seed)
    for size in (15, 16, rng.randrange(17, 30), 30, 45):
        before, passage, between = words(rng, 5), words(rng, size), words(rng, rng.randrange(1, 20))
        text = "\n".join(
            [" ".join([*before, *passage]), " ".join(between), " ".join([*passage, "and", "so", "on"])]
        )
        assert cut_repetition(text) == "\n".join([" ".join([*before, *passage]), " ".join(between)])
        assert cut_repetition(" ".join([*passage, *between, *passage])).split() == [*passage, *between]
    passage = words(rng, 14)
    text = " ".join([*passage, "but", *passage, "and\n\n more  of", *passage])
    assert cut_repetition(text) == text


def test_what_does_not_repeat_is_left_alone(stage):
    """No line of the bundled scenes is changed."""
    for scene in stage.values():
        for turn in scene.dialogues:
            assert (
                clean_reply(turn["message"], turn["character"], scene.speaking_characters) == turn["message"]
            )


def test_an_empty_reply_is_asked_for_again_at_temperature_1():
    """The second try has temperature 1 and another seed; what it says is said."""
    actor = Script(lambda _, params: "Yes." if params.temperature else "")
    said, _, stats = play(make_scene(), actor, Script(lambda *_: "Wind."), in_turn("Ben"), max_rounds=1)
    assert said == [("Ada", "Yes.")] and stats["empty"] == 0
    first, second = (params for _, params in actor.asked)
    assert (first.temperature, second.temperature) == (0, 1) and first.seed != second.seed
    assert first.max_tokens == second.max_tokens == 512


@pytest.mark.parametrize("empty", ["", " \n", "Ada:", "Cy: I speak for Ada."])
def test_one_who_stays_silent_is_passed_over(empty):
    """After two empty replies another speaks; no empty message is kept or shown to anyone."""
    actor = Script(lambda messages, _: empty if who(messages) == "Ada" else "Yes.")
    next_speaker = in_turn("Ada", "Ben", "Environment")
    shown = []
    models = {"actor": actor, "environment": Script(lambda *_: "Wind."), "next_speaker": next_speaker}
    ends = []
    perform([make_scene()], models, Protocol(), lambda _, m: shown.append(m), lambda *end: ends.append(end))
    [(_, messages, stats, _)] = ends
    asked = sum(who(chat) == "Ada" for chat, _ in actor.asked)
    assert asked == 2 * stats["empty"] > 2
    said = [m for m in messages if m["role"] != "NSP"]
    assert len(said) == 20 - stats["empty"] and shown == said
    assert all(m["content"].strip() and m["role"] != "Ada" for m in said)
    chats = [chat for model in models.values() for chat, _ in model.asked]
    assert not any(
        line.strip() == "Ada:" for chat in chats for m in chat[1:] for line in m["content"].split("\n")
    )


@pytest.mark.parametrize("preset", ["paper", "release"])
def test_a_play_in_which_nobody_said_a_word_failed(preset):
    """A model that says nothing gives a failure, not an endless play nor a finished one; original lines are
    no words of it."""
    models = dict.fromkeys(("actor", "environment", "next_speaker"), Script(lambda *_: ""))
    for more, count in ({}, 20), ({"continue_from": 2}, 18):
        failures, rules = [], Protocol(**PROTOCOLS[preset], **more)
        perform([make_scene()], models, rules, on_failure=lambda *f, kept=failures: kept.append(f))
        [(_, messages, error)] = failures
        assert f"nobody said a word in {count} turn" in error
        assert [m["content"] for m in messages if m["content"]] == ["original 0", "original 1"][: 20 - count]
    assert play(make_scene(), models["actor"], continue_from=2, max_rounds=2)[0]  # nobody was asked


def test_a_wordless_play_is_tried_again(script, three_scenes, tmp_path, monkeypatch):
    """It is told as a failure with exit code 2, stands in failures.jsonl, and --resume asks for all of it
    again."""
    silent = load_scenes(three_scenes)[1].scenario
    mute = [True]

    def answer(body, number):
        return "" if mute and silent in body["messages"][0]["content"] else stage_answer(body, number)

    args = [
        "--scene",
        f"{three_scenes}:all",
        "--actor",
        "openai:m",
        "--max-rounds",
        3,
        "--out",
        tmp_path / "a",
    ]
    with Server(answer) as server:
        server.use(monkeypatch)
        line = usage_error(script("simulate", *args))
        assert "nobody said a word in 3 turn" in line and "2 of 3" in line and "--resume" in line
        [failure] = (tmp_path / "a" / "failures.jsonl").read_text().splitlines()
        assert json.loads(failure)["scene"]["scenario"] == silent
        assert "nobody said a word" in usage_error(script("simulate", *args, "--resume"))
        mute.clear()
        assert script("simulate", *args, "--resume")[0] == 0
        assert script("simulate", *args[:-1], tmp_path / "b")[0] == 0
    assert without_seconds(read_lines(tmp_path / "a")) == without_seconds(read_lines(tmp_path / "b"))
    assert not (tmp_path / "a" / "failures.jsonl").exists() and len(read_lines(tmp_path / "a")) == 3


# ---- many scenes, seeds ------------------------------------------------------------------------------------


def echo(messages, params):
    """A reply that depends on everything in the call, and on nothing else."""
    digest = hashlib.sha256(repr((messages, params)).encode()).hexdigest()
    if messages[0]["content"].startswith("You watch"):
        return END_CHAT if digest[0] in "01" else "random" if digest[0] < "9" else "Environment"
    return "" if digest[0] == "0" else f"[{digest[:8]}] (waves) {digest[8:20]}"


def performances(scenes, models, **protocol):
    """{scene key: (messages, stats)} of scenes played side by side."""
    ends = {}
    perform(
        scenes, models, Protocol(**protocol), on_end=lambda scene, *end: ends.update({scene.key: end[:2]})
    )
    return ends


def test_scenes_side_by_side_are_the_scenes_one_by_one(stage):
    """Playing forty scenes together changes none of them, and asks for many replies at a time."""
    roles = ("actor", "environment", "next_speaker")
    together = dict.fromkeys(roles, Script(echo))
    apart = {role: Script(echo) for role in roles}
    scenes = [deepcopy(scene) for scene in stage.values()]
    all_at_once = performances(scenes, together, seed=3)
    assert len(all_at_once) == len(scenes) and max(together["actor"].batches) == SIDE_BY_SIDE
    assert performances(scenes, apart, seed=3) == all_at_once
    for scene in scenes:
        assert performances([scene], apart, seed=3) == {scene.key: all_at_once[scene.key]}
    assert len({len(messages) for messages, _ in all_at_once.values()}) > 5  # they end at different times


@pytest.mark.usefixtures("one_thread")
def test_scenes_side_by_side_on_a_checkpoint(stage, tiny_actor):
    """The same with a real engine, which batches them and reuses what it has cached."""
    scenes = [stage["the-last-ferry/1"], stage["ward-c/1"], stage["three-keys/3"]]
    protocol = dict(max_rounds=3, max_tokens=24, next_speaker_tokens=4)
    together = performances(
        scenes,
        dict.fromkeys(("actor", "environment", "next_speaker"), llm.open_model(tiny_actor)),
        **protocol,
    )
    one_by_one = dict.fromkeys(("actor", "environment", "next_speaker"), llm.open_model(tiny_actor))
    for scene in scenes:
        messages, stats = performances([scene], one_by_one, **protocol)[scene.key]
        assert messages == together[scene.key][0]
        assert stats["decoded"] == together[scene.key][1]["decoded"]


def test_each_role_is_asked_of_its_own_model():
    """Three models, three jobs."""
    models = {role: Script(lambda *_, role=role: role) for role in ("actor", "environment", "next_speaker")}
    models["next_speaker"] = in_turn("Environment", "Ben", "Ada")
    said, _, stats = play(make_scene(), **models)
    assert {role: content for role, content in said} == {
        "Ada": "actor",
        "Ben": "actor",
        "Environment": "environment",
    }
    calls = sum(len(model.asked) for model in models.values())
    assert (stats["prefilled"], stats["cached"], stats["decoded"]) == (5 * calls, 2 * calls, 3 * calls)


def call_seeds(scene, reply="Yes.", cast=("Ben", "Ada"), **protocol):
    """{(role, round): seed} of all calls."""
    actor, next_speaker = Script(lambda *_: reply), in_turn(*cast)
    play(scene, actor, actor, next_speaker, max_rounds=10, **protocol)
    return {
        (model is actor, i): call[1].seed
        for model in (actor, next_speaker)
        for i, call in enumerate(model.asked)
    }


def test_call_seeds_depend_on_seed_scene_round_and_role_alone():
    """Neither what is said nor what else is played changes the seed of a call; each of the four does."""
    seeds = call_seeds(make_scene())
    assert len(seeds) == 19 and len(set(seeds.values())) == 19
    assert call_seeds(make_scene(), reply="No.") == seeds
    assert call_seeds(make_scene(scenario="A hall.", profiles={})) == seeds
    assert call_seeds(make_scene(), cast=("Cy", "Ben", "Ada")) == seeds
    assert call_seeds(make_scene(), temperature=0.9) == seeds
    for other in (
        call_seeds(make_scene(), seed=1),
        call_seeds(make_scene(book="Other")),
        call_seeds(make_scene(i_p=1)),
        call_seeds(make_scene(i_c=1)),
    ):
        assert not set(other.values()) & set(seeds.values())


# ---- command line ------------------------------------------------------------------------------------------


def stage_answer(body, _):
    """An endpoint whose answers depend on the conversation alone; it leaves the next speaker to chance."""
    if body["messages"][0]["content"].startswith("You watch"):
        return "random"
    return (
        "[\u00e0 part] (waves) "
        + hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()[:12]
        + " \u2014 \u6f22"
    )


def read_lines(out):
    return [json.loads(line) for line in (out / "transcripts.jsonl").read_text(encoding="utf-8").splitlines()]


def without_seconds(lines):
    return [{**line, "stats": {**line["stats"], "seconds": None}} for line in lines]


@pytest.fixture
def three_scenes(stage, tmp_path):
    """A test file of three bundled scenes."""
    file = tmp_path / "three.json"
    scenes = [stage[name].to_dict() for name in ("the-last-ferry/1", "ward-c/1", "three-keys/3")]
    file.write_text(json.dumps(scenes, ensure_ascii=False), encoding="utf-8")
    return file


def test_scenes_that_are_dropped_are_told(script, three_scenes, tmp_path):
    """A scene that cannot be played does not just shift the numbers of those after it."""
    scenes = json.loads(three_scenes.read_text())
    scenes[0]["dialogues"] = []
    three_scenes.write_text(json.dumps(scenes))
    line = script("simulate", "--scene", f"{three_scenes}:2", "--actor", "x", "--out", tmp_path / "a")[2]
    assert "1 dropped: conversation" in line and "dropped scenes are not counted" in line and "0 to 1" in line


def test_names_that_would_mislead_are_mended(tmp_path):
    """A name stands in one line of what others read, and is not that of the one who decides on the next
    speaker."""
    turns = [{"character": name, "message": "Yes."} for name in ("Ben\nAda: no", "NSP", "Ada")]
    scene = make_scene(dialogues=turns, profiles={"NSP": "Tall."}).to_dict()
    (tmp_path / "s.json").write_text(json.dumps([scene]))
    [found] = load_scenes(tmp_path / "s.json")
    assert {turn["character"] for turn in found.dialogues} == {"Ben Ada: no", "N.S.P.", "Ada"}
    assert found.profiles == {"N.S.P.": "Tall."} and "NSP" not in found.speaking_characters


def test_all_who_speak_are_of_the_cast():
    """Whatever a file lists."""
    assert {*make_scene(speaking_characters=["Environment"]).speaking_characters} == {
        "Ada",
        "Ben",
        "Cy",
        "Environment",
    }


def test_a_choice_among_nobody_is_not_asked_for():
    """A scene where the Environment is alone ends, or goes on by chance, and is no error of the run."""
    alone = make_scene(
        dialogues=[{"character": "Environment", "message": "Rain."}], profiles={}, motivations={}
    )
    said, _, stats = play(alone, Script(lambda *_: "Wind."), next_speaker_mode="choices", max_rounds=3)
    assert said[0] == ("Environment", "Wind.") and stats["fallbacks"] == 1


def test_a_markdown_line_is_no_list():
    """A narration that begins like a list or a rule is shown as it is."""
    for text, shown in (
        ("- x", r"\- x"),
        ("+ x", r"\+ x"),
        ("1. x", r"1\. x"),
        ("1) x", r"1\) x"),
        ("---", r"\---"),
    ):
        line = {
            "scene": {"book": "B", "scenario": ""},
            "messages": [{"role": "Environment", "content": text}],
        }
        assert f"> {shown}\n" in transcripts.markdown(line)


@pytest.mark.usefixtures("short_turns")
def test_a_bundled_scene_with_a_checkpoint(script, stage, tiny_actor, tmp_path):
    """One line with all that judging needs; the same command again says the same; the screen shows who
    speaks."""
    args = ["--scene", "the-last-ferry/1", "--actor", tiny_actor, "--max-rounds", 3]
    code, out, err = script("simulate", *args, "--out", tmp_path / "a")
    assert code == 0 and "error" not in err and str(tmp_path / "a") in err
    [line] = read_lines(tmp_path / "a")
    assert line.keys() >= {"book", "i_p", "i_c", "scene", "settings", "messages", "stats"}
    scene = stage["the-last-ferry/1"]
    assert (line["book"], line["i_p"], line["i_c"]) == (scene.book, scene.i_p, scene.i_c) and Scene(
        **line["scene"]
    ) == scene
    assert (
        line["settings"]["actor"] == str(tiny_actor)
        and line["settings"]["seed"] == 0
        and line["settings"]["max_rounds"] == 3
    )
    first, decision, second, *_ = line["messages"]
    assert (first["role"], decision["role"], second["role"]) == (
        scene.speaking_characters[0],
        "NSP",
        decision["content"],
    )
    assert first["role"] in out and scene.scenario.split()[0] in out and first["content"].split()[0] in out
    assert not first["content"].startswith(first["role"])
    assert line["stats"].keys() >= STATS and line["stats"]["decoded"] > 0 and line["stats"]["cached"] > 0
    assert script("simulate", *args, "--out", tmp_path / "b")[0] == 0
    a, b = ((tmp_path / name / "transcripts.jsonl").read_bytes() for name in "ab")
    drop = functools.partial(re.sub, rb'"seconds": [0-9.]*}}$', b"", flags=re.MULTILINE)
    assert drop(a) == drop(b) and len(a) - len(drop(a)) < 25


@pytest.mark.usefixtures("short_turns")
def test_the_seed_decides_what_is_drawn(script, tiny_actor, tmp_path):
    """At temperature 1 the same seed says the same and another seed something else."""
    args = ["--scene", "ward-c/2", "--actor", tiny_actor, "--max-rounds", 1, "--temperature", 1]
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        assert script("simulate", *args, "--seed", seed, "--out", tmp_path / name)[0] == 0
    a, b, c = (read_lines(tmp_path / name)[0]["messages"] for name in "abc")
    assert a == b != c


@pytest.mark.usefixtures("short_turns")
def test_a_scene_of_a_test_file_by_index(script, shared, tiny_actor, tmp_path):
    """FILE:INDEX plays that scene of the released test set."""
    file = shared / "coser" / "test" / "id.json"
    raw = json.loads(file.read_text())[41]
    code, _, _ = script(
        "simulate", "--scene", f"{file}:41", "--actor", tiny_actor, "--max-rounds", 1, "--out", tmp_path / "a"
    )
    [line] = read_lines(tmp_path / "a")
    assert code == 0 and (line["book"], line["i_p"], line["i_c"]) == (raw["book"], raw["i_p"], raw["i_c"])
    assert line["messages"][0]["role"] == raw["speaking_characters_w_env"][0]


def test_chance_falls_on_the_files_major_characters(shared):
    """Who may follow by chance in a scene of the test set are the major characters its file lists, and the
    Environment."""
    file = shared / "coser" / "test" / "id.json"
    missing = []
    for scene, item in zip(load_scenes(file), json.loads(file.read_text()), strict=True):
        expected = {*item["major_characters"], "Environment"} - {item["speaking_characters_w_env"][0]}
        chosen = set()
        for seed in range(60):
            said, _, _ = play(
                scene, Script(lambda *_: "Yes."), None, Script(lambda *_: "?"), seed=seed, max_rounds=2
            )
            chosen.add(said[1][0])
        missing += [(scene.key, chosen)] if chosen != expected else []
    assert missing == []


@pytest.mark.usefixtures("short_turns")
def test_only_a_scene_is_needed(script, tiny_actor, tmp_path, monkeypatch):
    """With --scene alone the stage actor plays, stderr says which, and each run gets a directory of its
    own."""
    monkeypatch.setattr(files, "OUT", tmp_path)
    monkeypatch.setattr(local, "BUNDLED_ACTOR", tiny_actor)
    monkeypatch.setattr(local, "SHIPPED_ACTOR", tiny_actor)
    for _ in range(2):
        code, _, err = script("simulate", "--scene", "the-last-ferry/1", "--max-rounds", 1)
        assert code == 0 and "using " in err
    lines = [read_lines(directory) for directory in sorted((tmp_path / "plays").iterdir())]
    assert len(lines) == 2 and lines[0][0]["messages"] == lines[1][0]["messages"]


def test_the_list_names_all_bundled_scenes(script, stage):
    """--list prints every name that --scene takes."""
    code, out, err = script("simulate", "--list")
    assert code == 0 and not err and [line.split()[0] for line in out.splitlines()] == list(stage)


def test_through_an_endpoint(script, three_scenes, tmp_path, monkeypatch):
    """Three scenes side by side: three lines in the order they end, thoughts kept, the key nowhere."""
    with Server(stage_answer) as server:
        server.use(monkeypatch)
        args = [
            "--scene",
            f"{three_scenes}:all",
            "--actor",
            "openai:m",
            "--next-speaker",
            "openai:n",
            "--max-rounds",
            4,
        ]
        code, out, err = script("simulate", *args, "--continue-from", 2, "--out", tmp_path / "a")
    assert code == 0
    assert "least possible" not in err  # what an endpoint sampled of its prompts nobody knows
    lines = read_lines(tmp_path / "a")
    assert {line["book"] for line in lines} == {scene.book for scene in load_scenes(three_scenes)}
    for line in lines:
        said = [(m["role"], m["content"]) for m in line["messages"] if m["role"] != "NSP"]
        assert said[:2] == [(turn["character"], turn["message"]) for turn in line["scene"]["dialogues"][:2]]
        assert len(said) == 4 and all(content.startswith("[\u00e0 part] (waves)") for _, content in said[2:])
    assert {request.body["model"] for request in server.requests} == {"m", "n"}
    written = "".join(file.read_text(encoding="utf-8") for file in (tmp_path / "a").rglob("*.json*"))
    assert KEY not in out + err + written


def test_what_a_model_says_cannot_move_the_cursor(script, tmp_path, monkeypatch):
    """Control characters do not reach the screen, and markup is shown as it is written."""
    with Server(lambda *_: "\x1b[31m[bold red]x[/bold red]\x07\x9b2J (sits)") as server:
        server.use(monkeypatch)
        _, out, err = script(
            "simulate",
            "--scene",
            "ward-c/1",
            "--actor",
            "openai:m",
            "--max-rounds",
            1,
            "--out",
            tmp_path / "a",
        )
    assert not {"\x1b", "\x07", "\x9b"} & set(out + err) and "[bold red]x[/bold red]" in out


def test_a_refusing_endpoint_is_one_line_without_the_key(script, tmp_path, monkeypatch):
    """A server that refuses and repeats the key: one line, its words without the key, and nothing of it in a
    file."""
    with Server(lambda *_: (401, {"error": {"message": f"no access with {KEY}"}}, {})) as server:
        server.use(monkeypatch)
        result = script("simulate", "--scene", "ward-c/1", "--actor", "openai:m", "--out", tmp_path / "a")
    assert "no access with" in usage_error(result) and KEY not in result[1] + result[2]
    assert KEY not in "".join(file.read_text() for file in (tmp_path / "a").rglob("*.json*"))


def test_without_a_key_nothing_is_begun(script, tmp_path, monkeypatch):
    """The line names the variable to set."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    result = script("simulate", "--scene", "ward-c/1", "--actor", "openai:m", "--out", tmp_path / "a")
    assert "OPENAI_API_KEY" in usage_error(result) and not (tmp_path / "a").exists()


@pytest.mark.parametrize("torn", ["half", "letter"])
def test_resume_plays_only_what_is_missing(script, three_scenes, tmp_path, monkeypatch, torn):
    """After a kill in the middle of the last line only that scene is played again, and the file comes out as
    if whole."""
    args = [
        "--scene",
        f"{three_scenes}:all",
        "--actor",
        "openai:m",
        "--max-rounds",
        4,
        "--out",
        tmp_path / "a",
    ]
    with Server(stage_answer) as server:
        server.use(monkeypatch)
        assert script("simulate", *args)[0] == 0
        whole = read_lines(tmp_path / "a")
        file = tmp_path / "a" / "transcripts.jsonl"
        content = file.read_bytes()
        last = content[:-1].rindex(b"\n") + 1
        end = {"half": (last + len(content)) // 2, "letter": content.rindex("\u6f22".encode()) + 1}[torn]
        file.write_bytes(content[:end])
        shutil.rmtree(tmp_path / "a" / "answers")  # or nothing at all would be asked again
        asked = len(server.requests)
        code, _, err = script("simulate", *args, "--resume")
        assert code == 0, err
        assert without_seconds(read_lines(tmp_path / "a")) == without_seconds(whole)
        again = server.requests[asked:]
        assert again and all(
            whole[2]["scene"]["scenario"] in request.body["messages"][0]["content"] for request in again
        )
        asked = len(server.requests)
        assert (
            script("simulate", *args, "--resume")[0] == 0 and len(server.requests) == asked
        )  # nothing is left to play


def test_a_directory_in_use_is_left_alone(script, three_scenes, tmp_path, monkeypatch):
    """Without --resume, or with other settings, nothing is asked and nothing written; the line says what is
    different."""
    base = ["--scene", f"{three_scenes}:all", "--actor", "openai:m", "--out", tmp_path / "a"]
    with Server(stage_answer) as server:
        server.use(monkeypatch)
        assert script("simulate", *base, "--max-rounds", 2)[0] == 0
        before = {file: file.read_bytes() for file in (tmp_path / "a").rglob("*.json*")}
        asked = len(server.requests)
        assert "--resume" in usage_error(script("simulate", *base, "--max-rounds", 2))
        for more, named in (
            (["--max-rounds", 3], "max_rounds"),
            (["--max-rounds", 2, "--seed", 1], "seed"),
            (["--max-rounds", 2, "--without-thoughts"], "thoughts"),
            (["--max-rounds", 2, "--continue-from", 1], "continue_from"),
            (["--max-rounds", 2, "--temperature", 0.5], "temperature"),
            (["--max-rounds", 2, "--next-speaker", "openai:n"], "next_speaker"),
        ):
            line = usage_error(script("simulate", *base, *more, "--resume"))
            assert named in line and str(tmp_path / "a") in line
    assert len(server.requests) == asked
    assert {file: file.read_bytes() for file in (tmp_path / "a").rglob("*.json*")} == before


def test_a_resume_with_another_dtype_says_which_it_was(tmp_path):
    """The dtype is chosen by free memory, which may have changed since."""
    identities = [f"sha256:1 cpu torch.{dtype}" for dtype in ("int8", "float32")]
    first, second = ({"actor": "a", "actor_identity": identity} for identity in identities)
    transcripts.claim(tmp_path, first, resume=False)
    with pytest.raises(files.UsageError, match=f"actor_identity was {identities[0]}"):
        transcripts.claim(tmp_path, second, resume=True)
    transcripts.claim(tmp_path, first, resume=True)


def test_an_endpoint_that_dies_midway(script, three_scenes, tmp_path, monkeypatch):
    """Finished scenes are kept, the line says how many and how to go on; going on plays the rest."""
    dead = True
    short = load_scenes(three_scenes)[1].scenario

    def answer(body, number):
        system = body["messages"][0]["content"]
        if system.startswith("You watch") and short in system:
            return END_CHAT
        if dead and short not in system and len(body["messages"]) > 14:  # later than the short scene's end
            return 503, {"error": {"message": "out of memory"}}, {"Retry-After": "0"}
        return stage_answer(body, number)

    args = [
        "--scene",
        f"{three_scenes}:all",
        "--actor",
        "openai:m",
        "--max-rounds",
        9,
        "--out",
        tmp_path / "a",
    ]
    with Server(answer) as server:
        server.use(monkeypatch)
        line = usage_error(script("simulate", *args))
        assert all(
            part in line for part in ("1 of 3", "--resume", str(tmp_path / "a"), "503", "out of memory")
        )
        [kept] = read_lines(tmp_path / "a")
        assert kept["scene"]["scenario"] == short and kept["messages"][-1]["content"] == END_CHAT
        dead = False
        assert script("simulate", *args, "--resume")[0] == 0
        assert script("simulate", *args[:-1], tmp_path / "b")[0] == 0
    resumed, at_once = (
        sorted(without_seconds(read_lines(tmp_path / n)), key=lambda line: line["book"]) for n in "ab"
    )
    assert len(resumed) == 3 and resumed == at_once


def test_the_choice_does_not_hang_on_hashing(tmp_path, monkeypatch):
    """Two processes with other string hashes play the same, next speakers by chance included."""
    with Server(stage_answer) as server:
        server.use(monkeypatch)
        args = [sys.executable, ROOT / "simulate.py", "--scene", "ward-c/3", "--actor", "openai:m"]
        runs = []
        for seed in "12":
            environment = {**os.environ, "PYTHONHASHSEED": seed}
            out = ["--out", tmp_path / seed]
            runs.append(
                subprocess.Popen([*args, *out], env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
            )
        assert [run.wait(120) for run in runs] == [0, 0]
    [one], [two] = (read_lines(tmp_path / seed) for seed in "12")
    assert one["messages"] == two["messages"] and len(one["messages"]) == 39
    assert len({m["content"] for m in one["messages"] if m["role"] == "NSP"}) > 2


def test_the_contract_of_the_command_line(script):
    """--help shows one example and the flags that users call."""
    code, out, _ = script("simulate", "--help")
    flags = (
        "--scene --actor --environment --next-speaker --out --continue-from --max-rounds --without-thoughts"
    )
    flags += " --resume --seed --chat-format --dtype"
    assert code == 0 and "python simulate.py --scene" in out
    assert [flag for flag in flags.split() if flag not in out] == []


def test_an_unknown_scene_is_told_which_there_are(script, stage, tmp_path):
    """The line lists the bundled scenes."""
    for spec in ("the-last-fairy/1", "nosuch.json:3", "nosuch.json:all", "the-last-ferry"):
        line = usage_error(script("simulate", "--scene", spec, "--actor", "x", "--out", tmp_path / "a"))
        assert spec in line and all(name in line for name in stage)


@pytest.mark.parametrize("index", [3, -1, 10**9])
def test_an_index_out_of_range_is_told_the_range(script, three_scenes, tmp_path, index):
    """The line names the file and its indices."""
    line = usage_error(
        script("simulate", "--scene", f"{three_scenes}:{index}", "--actor", "x", "--out", tmp_path / "a")
    )
    assert "0 to 2" in line and str(three_scenes) in line and not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--scene", "ward-c/1", "--list"],
        ["--scene", "ward-c/1", "--max-rounds", "0"],
        ["--scene", "ward-c/1", "--max-rounds", "many"],
        ["--scene", "ward-c/1", "--continue-from", "-1"],
        ["--scene", "ward-c/1", "--temperature", "-0.5"],
        ["--scene", "ward-c/1", "--temperature", "nan", "--actor", "openai:m"],
        ["--scene", "ward-c/1", "--resume"],
        ["--scene", "ward-c/1", "--max-round", "3"],
        ["--scene", "ward-c/1", "--actor", "nosuch"],
        ["--scene", "ward-c/1", "--actor", "openai:"],
        ["--scene", "ward-c/1", "--actor", "."],
        ["--scene", ".", "--actor", "nosuch"],
        ["--scene", "ward-c/1", "--actor", "openai:m", "--out", "file"],
        ["--scene", "ward-c/1", "--actor", "openai:m", "--out", "file/under"],
    ],
    ids=" ".join,
)
def test_a_command_that_cannot_be_is_one_line(script, tmp_path, monkeypatch, args):
    """Exit code 2 and one line; nothing is asked of any model."""
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    with Server(stage_answer) as server:
        server.use(monkeypatch)
        usage_error(
            script("simulate", *args, *([] if "--out" in args or "--resume" in args else ["--out", "a"]))
        )
    assert not server.requests


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"plots": []}', b"\xff\xfe\x00", b"5", b'[{"dialogues": []}]', b"[1, null]"],
)
def test_a_file_without_scenes_is_one_line(script, tmp_path, content):
    """An empty file, half a file, other JSON, other bytes: told as such, with the file's name."""
    (tmp_path / "bad.json").write_bytes(content)
    line = usage_error(
        script("simulate", "--scene", f"{tmp_path / 'bad.json'}:0", "--actor", "x", "--out", tmp_path / "a")
    )
    assert "bad.json" in line


@pytest.mark.parametrize(
    "content", [b"{}\n", b"[]\n", b"5\n", b"{\n{}\n", b"\xff\xfe\n", b'{"book": "x", "settings": {}}\n']
)
def test_transcripts_that_are_none_are_one_line(script, tmp_path, monkeypatch, content):
    """--resume on a file that holds something else: told which, and left as it is."""
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "transcripts.jsonl"
    file.write_bytes(content)
    with Server(stage_answer) as server:
        server.use(monkeypatch)
        args = ["--scene", "ward-c/1", "--actor", "openai:m", "--out", tmp_path / "a", "--resume"]
        assert str(tmp_path / "a") in usage_error(script("simulate", *args))
    assert file.read_bytes() == content and not server.requests


@pytest.mark.parametrize(
    ("name", "answer"), [("\u0130nci", "inci"), ("Iago", "\u0131ago"), ("Stra\u00dfe", "STRASSE")]
)
def test_names_of_other_alphabets_break_nothing(name, answer):
    """Letters whose upper and lower case do not pair up: the name is found or it is not, and the scene goes
    on."""
    assert parse_next_speaker(answer, [name, "Ben"]) in (name, None)
