"""How often a model names who really speaks next."""

from common import terminal
from common.files import UsageError
from data.scenes import ENVIRONMENT
from engine.params import SamplingParams
from play.protocol import next_speakers_chat


def evaluate_next_speaker(scenes, model, protocol, on_batch=lambda *_: None):
    """How often a model names the real next speaker, teacher-forced: for every message but the first it reads the real ones
    before it. Returns {correct, answered, failed, total, last_other, uniform}: counts, and for `uniform` an expected one.

    Baselines: the last other speaker (the last to speak before the current one who is not the current one; at the second
    message there is none, which counts as wrong), and uniform over the cast without the current speaker. A message by the
    one who has just spoken is left out, since by the protocol nobody follows himself.
    """
    counts, errors = dict.fromkeys(("correct", "answered", "failed", "total", "last_other", "uniform"), 0), []
    for i in range(1, max(len(scene.dialogues) for scene in scenes)):
        batch = []
        for scene in scenes:
            names = [turn["character"] for turn in scene.dialogues[: i + 1]]
            if len(names) > i and names[i] != names[i - 1]:
                cast = list(dict.fromkeys([*scene.speaking_characters, ENVIRONMENT]))
                batch.append((scene, cast, names))
                others = [name for name in names[:i] if name != names[i - 1]]
                counts["last_other"] += bool(others) and others[-1] == names[i]
                counts["uniform"] += 1 / (len(cast) - 1)
        params = []
        for _, cast, names in batch:
            choices = (
                [name for name in cast if name != names[i - 1]]
                if protocol.next_speaker_mode == "choices"
                else None
            )
            shared = dict(max_tokens=protocol.next_speaker_tokens, seed=protocol.seed)
            params.append(SamplingParams(protocol.temperature, choices=choices, **shared))
        replies = (
            model.chat([next_speakers_chat(scene, scene.dialogues[:i]) for scene, _, _ in batch], params)
            if batch
            else []
        )
        for (_, cast, names), reply in zip(batch, replies, strict=True):
            named = protocol.named(reply.text, cast)
            counts["total"] += 1
            errors += [reply.error] if reply.error is not None else []
            counts["answered"] += named in cast and named != names[i - 1]
            counts["correct"] += named == names[i]
        on_batch(i, counts)
    counts["failed"] = len(errors)
    if errors and len(errors) == counts["total"]:
        raise UsageError(f"none of {len(errors)} questions was answered; the first: {errors[0]}")
    if errors:
        terminal.note(
            f"{len(errors)} of {counts['total']} questions were not answered; the first: {errors[0]}"
        )
    return counts
