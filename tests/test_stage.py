"""The bundled stories: that there is enough of them, that each scene has all it needs, and that no line
stands twice."""

import json
import re
from collections import defaultdict

import pytest

from data.records import Report
from data.scenes import STAGE, load_scenes

STORIES = {file.stem: json.loads(file.read_text("utf-8")) for file in sorted(STAGE.glob("*.json"))}


def strings(value, place):
    """(place, text) of every string in a JSON value, names of characters aside."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            if key not in ("name", "character"):
                yield from strings(child, f"{place}/{key}")


def test_there_are_stories_enough():
    """At least six stories and 24 conversations, of 10 to 16 messages each."""
    lengths = [
        len(conversation["dialogues"])
        for story in STORIES.values()
        for plot in story["plots"]
        for conversation in plot["conversation"]
    ]
    assert len(STORIES) >= 6 and len({story["title"] for story in STORIES.values()}) == len(STORIES)
    assert len(lengths) >= 24 and min(lengths) >= 10 and max(lengths) <= 16


def test_the_stage_is_read_without_a_repair(stage):
    """Every conversation is there under its name, `story/number` from 1, and nothing was mended or dropped on
    the way."""
    report = Report()
    assert load_scenes(STAGE, report) == list(stage.values()) and not +report
    numbers = {
        name: sum(len(plot["conversation"]) for plot in story["plots"]) for name, story in STORIES.items()
    }
    assert list(stage) == [
        f"{name.replace('_', '-')}/{i + 1}" for name, number in numbers.items() for i in range(number)
    ]


def test_every_scene_has_its_circumstances(stage):
    """Scenario, topic, plot summary; a profile and a motivation of each who speaks, no two motivations the
    same."""
    for scene in stage.values():
        assert scene.scenario and scene.topic and scene.plot_summary
        cast = set(scene.speaking_characters) - {"Environment"}
        assert 2 <= len(cast) <= 4
        assert set(scene.major_characters) == cast == set(scene.motivations) and cast <= set(scene.profiles)
        texts = [scene.scenario, scene.plot_summary, *scene.motivations.values(), *scene.profiles.values()]
        assert all(len(text.split()) >= 15 for text in texts) and len(set(texts)) == len(texts)


def test_every_scene_has_thoughts_actions_and_an_environment(stage):
    """Half of the characters' messages or more have a thought, some an action; the Environment speaks and
    thinks nothing."""
    for name, scene in stage.items():
        own = [turn["message"] for turn in scene.dialogues if turn["character"] != "Environment"]
        world = [turn["message"] for turn in scene.dialogues if turn["character"] == "Environment"]
        assert 1 <= len(world) <= 4 and not re.search(r"[\[\]()]", "".join(world)), name
        assert sum("[" in message for message in own) >= len(own) / 2, name
        assert sum("(" in message for message in own) >= 2, name


def test_messages_are_well_formed(stage):
    """Brackets are closed and not nested, something is said or done to be seen, and no message begins with
    its own name."""
    for scene in stage.values():
        for turn in scene.dialogues:
            message = turn["message"]
            rest = re.sub(r"\[[^\[\]()]+\]|\([^\[\]()]+\)", "", message)
            assert not re.search(r"[\[\]()<>*\n]", rest), message
            assert re.sub(r"\[[^\]]*\]", "", message).strip(), message
            assert not message.startswith(f"{turn['character']}:") and message == message.strip()


@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)
def test_the_last_tenth_of_plots_is_held_out(story):
    """`split_plot_index` leaves out what lies behind 90% of the plots, one at least, and the reader follows
    it."""
    plots = story["plots"]
    assert story["split_plot_index"] == len(plots) * 9 // 10 < len(plots)


def test_held_out_scenes_are_tagged_so(stage):
    """A scene is for training exactly if its plot is before its story's split."""
    splits = {story["title"]: story["split_plot_index"] for story in STORIES.values()}
    assert {scene.book for scene in stage.values()} == set(splits)
    for scene in stage.values():
        assert scene.tag == ("train" if scene.i_p < splits[scene.book] else "id")


def test_no_sentence_stands_twice():
    """No sentence of three or more words is in the stories twice, in whatever place, case and punctuation
    aside."""
    places = defaultdict(list)
    for name, story in STORIES.items():
        for place, text in strings(story, name):
            for sentence in re.split(r"[.!?]+[\"')]*(?:\s|$)|[\[\]()\n]", text):
                words = re.findall(r"[\w']+", sentence.lower())
                if len(words) >= 3:
                    places[" ".join(words)].append(place)
    assert len(places) > 3000
    twice = {sentence: where for sentence, where in places.items() if len(where) > 1}
    assert not twice, twice
