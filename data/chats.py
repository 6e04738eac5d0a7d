"""From a scene to training chats, one per character (paper, section 4: given-circumstance acting).

`perspective` is how one character has lived a conversation: own messages are assistant turns with thoughts, everyone
else's are user turns with the thoughts gone. Training chats and the agents of simulate.py are built by this same function,
so what an actor learns is what it will see on stage. The loss is on assistant turns only.
"""

import random
from dataclasses import dataclass, field

from data import prompts
from data.brackets import remove_thoughts
from data.scenes import ENVIRONMENT

START = "===Conversation Start===\n\n"
END_CHAT = "<END CHAT>"
NEXT_SPEAKER = "NSP"


@dataclass
class Chat:
    """One training sample. `kind` is `character`, `environment` or `next_speaker`; `options` are those drawn for it."""

    messages: list
    character: str
    kind: str
    key: str
    options: dict = field(default_factory=dict)


def perspective(dialogue, character, thoughts=True):
    """The conversation as `character` lives it: user and assistant turns, the first a user turn.

    dialogue: list of `{character, message}`. thoughts=False removes the character's own thoughts as well (the paper's
    ablation without inner thoughts). Others' consecutive messages share a user turn; a consecutive own message joins the
    assistant turn before it, without the name.
    """
    messages = [{"role": "user", "content": START}]
    for turn in dialogue:
        own = turn["character"] == character
        text = turn["message"] if own and thoughts else remove_thoughts(turn["message"])
        role = "assistant" if own else "user"
        named = text if own and messages[-1]["role"] == role else f"{turn['character']}: {text}"
        if messages[-1]["role"] == role:
            messages[-1]["content"] += named + "\n\n"
        else:
            messages.append({"role": role, "content": named + "\n\n"})
    return messages


def next_speaker_perspective(dialogue, names=None):
    """The conversation as the next-speaker model sees it: it says a name, then is shown what that one said.

    names: what the assistant says before each message, where that differs from who speaks (`random` in training).
    """
    messages = [{"role": "user", "content": START}]
    for i, turn in enumerate(dialogue):
        messages.append({"role": "assistant", "content": names[i] if names else turn["character"]})
        shown = f"{turn['character']}: {remove_thoughts(turn['message'])}\n\n"
        messages.append({"role": "user", "content": shown})
    return messages


def draw_options(rng, thoughts=True):
    """The release's variety of prompts, as shares of a draw: see coser paper, appendix, and data/prompts.py."""
    return {
        "opener": rng.randrange(len(prompts.OPENERS)),
        "style": rng.choices(list(prompts.STYLES), [share for share, _ in prompts.STYLES.values()])[0],
        "plot_summary": rng.random() < 0.5,
        "motivation": rng.random() < 0.5,
        "others": rng.random() < 0.5,
        "thoughts": rng.random() < 0.5 and thoughts,
    }


def system_prompt(scene, character, options, concise=False):
    """What `character` is told before the scene begins; the Environment is told its own thing."""
    if character == ENVIRONMENT:
        return prompts.environment(scene)
    return prompts.actor(scene, character, options, concise)


def scene_to_chats(scene, epoch=0, seed=0, thoughts=True, next_speaker_share=0.1, variants="draw"):
    """The training chats of a scene: one for each who speaks, and now and then one for the next speaker.

    Options are drawn from (seed, scene, character, epoch) alone, so adding a book changes no other chat.
    thoughts=False is the ablation without inner thoughts. A character all of whose turns are empty gives no chat.
    variants: `draw` is the paper's one for each who speaks; `all` the release's four, with and without thoughts and the
    others' profiles, what else varies drawn for each (two in the ablation).
    """
    chats = []
    fixed = [{}]
    if variants == "all":
        fixed = [
            {"thoughts": own, "others": others}
            for own in (True, False)[not thoughts :]
            for others in (True, False)
        ]
    for character in scene.speaking_characters:
        rng = random.Random(f"{seed}|{scene.key}|{character}|{epoch}")
        for chosen in fixed:
            options = draw_options(rng, thoughts) | chosen
            turns = perspective(scene.dialogues, character, options["thoughts"])
            own = [turn["content"] for turn in turns if turn["role"] == "assistant"]
            if not any(text.removeprefix(f"{character}: ").strip() for text in own):
                continue
            if turns[-1]["role"] == "user":  # nothing after the last own message is ever under loss
                turns.pop()
            system = {"role": "system", "content": system_prompt(scene, character, options)}
            kind = "environment" if character == ENVIRONMENT else "character"
            chats.append(Chat([system, *turns], character, kind, scene.key, options))
    rng = random.Random(f"{seed}|{scene.key}|{NEXT_SPEAKER}|{epoch}")
    if rng.random() < next_speaker_share:
        chats.append(next_speaker_chat(scene, rng))
    return chats


def next_speaker_chat(scene, rng):
    """The chat of the next-speaker model; one who is neither major nor Environment becomes `random` 25% of the time."""
    known = {*scene.major_characters, ENVIRONMENT}
    speakers = [turn["character"] for turn in scene.dialogues]
    names = [name if name in known or rng.random() >= 0.25 else "random" for name in speakers]
    turns = next_speaker_perspective(scene.dialogues, names)
    system = {"role": "system", "content": prompts.next_speaker(scene)}
    end = {"role": "assistant", "content": END_CHAT}
    return Chat([system, *turns, end], NEXT_SPEAKER, "next_speaker", scene.key)
