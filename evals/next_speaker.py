"""Measures how often a model names who really speaks next."""

from common import terminal
from common.files import UsageError
from data.scenes import ENVIRONMENT
from engine.params import SamplingParams
from play.protocol import next_speakers_chat


def evaluate_next_speaker(scenes, model, protocol):
    """Counts how often the model names the real next speaker: for each message but the first, it reads the
    real ones before.

    Returns the counts {correct, answered (with a valid name), failed, total, last_other, uniform}. Baselines:
    the last other speaker (the second message has none, which is wrong), and uniform over the cast without
    the current speaker (an expected count). A message by who has just spoken is left out, since by the
    protocol nobody follows themselves. UsageError if no question was answered.
    """
    counts = dict.fromkeys(("correct", "answered", "failed", "total", "last_other", "uniform"), 0)
    errors, longest = [], max(len(scene.dialogues) for scene in scenes)
    with terminal.reporting(longest - 1, "messages of each scene") as update:
        for index in range(1, longest):
            asked = [scene for scene in scenes if speaker_changes(scene, index)]
            if asked:
                count_baselines(asked, index, counts)
                errors += count_answers(asked, index, model, protocol, counts)
            update(index, "naming next speakers")
    counts["failed"] = len(errors)
    if errors and len(errors) == counts["total"]:
        raise UsageError(f"none of {len(errors)} questions was answered; the first: {errors[0]}")
    if errors:
        share = f"{len(errors)} of {counts['total']} questions"
        terminal.note(f"{share} were not answered; the first: {errors[0]}")
    return counts


def speaker_changes(scene, index):
    turns = scene.dialogues[index - 1 : index + 1]
    return len(turns) == 2 and turns[0]["character"] != turns[1]["character"]


def speakers(scene, index):
    """(the cast, who speaks before message `index`, its speaker)"""
    cast = list(dict.fromkeys([*scene.speaking_characters, ENVIRONMENT]))
    return cast, [turn["character"] for turn in scene.dialogues[:index]], scene.dialogues[index]["character"]


def count_baselines(scenes, index, counts):
    for scene in scenes:
        cast, before, speaker = speakers(scene, index)
        others = [name for name in before if name != before[-1]]
        counts["last_other"] += others[-1:] == [speaker]
        counts["uniform"] += 1 / (len(cast) - 1)


def count_answers(scenes, index, model, protocol, counts):
    """Asks the model who speaks message `index` of each scene, all at once; returns the errors."""
    params, errors = [], []
    for scene in scenes:
        cast, before, _ = speakers(scene, index)
        choices = [name for name in cast if name != before[-1]]
        shared = dict(max_tokens=protocol.next_speaker_tokens, seed=protocol.seed)
        shared["choices"] = choices if protocol.next_speaker_mode == "choices" else None
        params.append(SamplingParams(protocol.temperature, **shared))
    replies = model.chat([next_speakers_chat(scene, scene.dialogues[:index]) for scene in scenes], params)
    for scene, reply in zip(scenes, replies, strict=True):
        cast, before, speaker = speakers(scene, index)
        named = protocol.named(reply.text, cast)
        counts["total"] += 1
        counts["answered"] += named in cast and named != before[-1]
        counts["correct"] += named == speaker
        errors += [reply.error] if reply.error is not None else []
    return errors
